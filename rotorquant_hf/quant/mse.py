"""RotorQuantMSE: rotate, scale, code with a Lloyd-Max codebook, pack.

For a vector x of R^d: y = T(x), index_j = nearest centroid of N(0, 1/d) to y_j / |x|, and the
reconstruction is T^-1(s c) with c = centroid[index] and one scale s per vector (centroids are those
of `LloydMaxCodebook.of_integers`):

    norm            s = |x|                 the RotorQuant reference
    matched         s = |x| / |c|           the reconstruction has the norm of x
    least_squares   s = <y, c> / <c, c>     least squared error
    unbiased        s = |x|^2 / <y, c>      <x, x_hat> = |x|^2: no shrinking (EDEN,
                                            Vargaftik et al., arXiv:2108.08842)

With a Hessian, the second moment of the queries that will read the vectors, the indices are chosen
for a small error along those queries (`rounding`), and least_squares is weighted by it.

Sources: RotorQuant (the reference classes this project implements); TurboQuant, Zandieh et al.,
arXiv:2504.19874, Algorithm 1.
"""

from __future__ import annotations

from typing import Self, TypedDict, cast

import torch
from torch import Tensor

from rotorquant_hf.quant.checks import check_finite, check_hessian, check_vectors
from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.lloyd_max import LloydMaxCodebook, nearest
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.packing import pack, packed_bytes, unpack
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec, Term
from rotorquant_hf.quant.rotations import Rotation, make_rotation, shared_rotation
from rotorquant_hf.quant.rounding import Feedback, round_with_feedback

SCALES = ("norm", "matched", "least_squares", "unbiased")
"""Names of the rules for the one scale per vector."""


class MSECodes(TypedDict):
    """Quantised vectors: `codes` (..., packed_bytes(d, bits)) uint8 and `scale` (...)."""

    codes: Tensor
    scale: Tensor


class RotorQuantMSE(Quantizer):
    """The quantiser of least squared error.

    Args:
        d: vector dimension, 8 to 576.
        bits: bits per element, 1 to 8.
        seed: seed of the rotation.
        grade_bits: bits per grade, as in the reference. Only {"vector": b} means anything (and
            overrides `bits`): R v ~R of a vector v is a vector, its other grades are
            identically zero, and asking for bits for them is refused.
        device: where the tables lie.
        rotation: "cascade" (default), "rotors", "haar", "hadamard", or a `Rotation` to share.
        rotor_layers: layers of the rotation, None for its default.
        scale: rule for the scale: "norm", "matched", "least_squares" or "unbiased".
        scale_dtype: dtype in which the scale is stored. In float16 vectors of norm below 3e-8
            become 0, and above 65504 are refused.

    Raises:
        ValueError: naming the value that is not possible.
    """

    def __init__(
        self,
        d: int,
        bits: int,
        seed: int = 42,
        grade_bits: dict[str, int] | None = None,
        device: torch.device | str = "cpu",
        *,
        rotation: str | Rotation = "cascade",
        rotor_layers: int | None = None,
        scale: str = "least_squares",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; choose one of {', '.join(SCALES)}")
        self.d = d
        self.bits = bits if grade_bits is None else _bits_of_vector_grade(grade_bits)
        self.scale = scale
        self.scale_dtype = scale_dtype
        if isinstance(rotation, str):
            rotation = make_rotation(d, rotation, rotor_layers, seed)
        elif rotation.d != d:
            raise ValueError(f"the rotation given is for vectors of {rotation.d} elements, not {d}")
        self.rotation = rotation
        codebook = LloydMaxCodebook.of_integers(d, self.bits)
        self.centroids: Tensor
        self.boundaries: Tensor
        self.register_buffer("centroids", codebook.centroids.float(), persistent=False)
        self.register_buffer("boundaries", codebook.boundaries.float(), persistent=False)
        self.to(device)

    @classmethod
    def from_spec(cls, spec: QuantizerSpec, d: int, device: torch.device) -> Self:
        """As in `Quantizer`; scales are stored in 16 bits."""
        return cls(
            d,
            spec.bits,
            spec.seed,
            device=device,
            rotation=shared_rotation(d, spec.rotation, spec.rotor_layers, spec.seed, device),
            scale=spec.scale,
            scale_dtype=torch.float16,
        )

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one quantised vector takes: codes and scale."""
        return packed_bytes(self.d, self.bits) + self.scale_dtype.itemsize

    def quantize(self, x: Tensor, hessian: Tensor | None = None) -> tuple[Tensor, MSECodes]:
        """Quantise vectors.

        Args:
            x: (..., d), floating.
            hessian: (d, d), or (..., d, d) for x (..., n, d): the second moment q' q of queries,
                of any unit. The codes then keep (x - x_hat)' H (x - x_hat) small, and never
                larger than without, with H the nearest `LowRankHessian`.

        Returns:
            The reconstruction in the rotated space, T(x_hat), (..., d) float32, and the codes.

        Raises:
            TypeError: if `x` is not floating. ValueError: if its last axis is not d, or on the
                CPU if it has NaN or infinite entries, or a norm that `scale_dtype` cannot hold,
                or for a Hessian of another shape or that is no second moment.
        """
        check_vectors("x", x, self.d)
        x = x.float()
        check_finite("x", x)
        if hessian is not None:
            check_hessian(hessian, x)
        return self.code(x, None if hessian is None else LowRankHessian.of(hessian))

    def code(self, x: Tensor, hessian: LowRankHessian | None = None) -> tuple[Tensor, MSECodes]:
        """`quantize` without its checks, for float32 vectors known to be finite."""
        if x.dim() == 1:
            y_hat, one = self.code(x[None], hessian)
            return y_hat[0], {"codes": one["codes"][0], "scale": one["scale"][0]}
        x, peak = peak_and_rest(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit = self.rotation.rotate(x / norm.clamp(min=1))  # |x| >= 1 unless x = 0
        index = nearest(unit, self.boundaries)
        c = self.centroids[index]
        with torch.autocast(x.device.type, enabled=False):
            if hessian is None:
                scale = self._scale_of_unit(unit, c)
            else:
                index, c, scale = self._round_for_queries(unit, index, c, hessian)
            scale = norm * scale * peak
        max_scale = torch.finfo(self.scale_dtype).max
        # Asked the other way round, NaN would pass: finite x may overflow on its way here.
        if x.device.type == "cpu" and not bool((scale <= max_scale).all()):
            raise ValueError(
                f"x has a vector of norm {float((norm * peak).max()):.3g}, too large for its "
                f"scale in {self.scale_dtype} (at most {max_scale:.3g}); divide x (in a cache, "
                "norms are relative to the first block compressed: start a new cache)"
            )
        scale = scale.clamp(max=max_scale).to(self.scale_dtype)
        codes: MSECodes = {"codes": pack(index, self.bits), "scale": scale.squeeze(-1)}
        return c * scale.float(), codes

    def _round_for_queries(
        self, unit: Tensor, index: Tensor, c: Tensor, hessian: LowRankHessian
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, centroids and scales for rotated unit vectors.

        They are those of the sweep, or the given ones, of nearest rounding, where these do better.
        """
        feedback = Feedback.of(hessian, self.rotation)
        aware = round_with_feedback(unit, self.centroids, self.boundaries, feedback)
        unit_along = feedback.along(unit)
        errors, scales = [], []
        for chosen, along in (
            (aware.centroids, unit_along - aware.lost),
            (c, feedback.along(c)),
        ):
            if self.scale == "least_squares":
                # Of the sweep's centroids it may be negative, for a vector that few queries see.
                energy = feedback.dot(chosen, chosen, along, along)
                scale = (feedback.dot(chosen, unit, along, unit_along) / energy).clamp(min=0)
            else:
                scale = self._scale_of_unit(unit, chosen)
            e, e_along = unit - scale * chosen, unit_along - scale * along
            errors.append(feedback.dot(e, e, e_along, e_along))
            scales.append(scale)
        better = errors[0] < errors[1]
        return (
            torch.where(better, aware.indices, index),
            torch.where(better, aware.centroids, c),
            torch.where(better, scales[0], scales[1]),
        )

    def _scale_of_unit(self, y: Tensor, c: Tensor) -> Tensor:
        """The scale (..., 1) for rotated unit vectors `y` and their centroids `c`, (..., d)."""
        if self.scale == "norm":
            return torch.ones_like(y[..., :1])
        if self.scale == "matched":
            return 1 / torch.linalg.vector_norm(c, dim=-1, keepdim=True)
        dot = (y * c).sum(dim=-1, keepdim=True)
        if self.scale == "least_squares":
            return dot / c.square().sum(dim=-1, keepdim=True)
        # y and its nearest centroids agree in sign everywhere, so the product is positive; 0 only
        # for x = 0. (With a Hessian, centroids for which it is not lose to the nearest.)
        return 1 / dot.clamp(min=torch.finfo(dot.dtype).tiny)

    def encode(self, u: Tensor, hessian: LowRankHessian | None = None) -> dict[str, Tensor]:
        """As in `Quantizer`: `codes` and `scale` of `MSECodes`."""
        return dict(cast(dict[str, Tensor], self.code(u, hessian)[1]))

    def terms(self) -> tuple[Term, ...]:
        """As in `Quantizer`: x_hat = scale * (centroids @ T)."""
        table = CodeTable.of(self.centroids, self.bits, self.d)
        return (Term.of("codes", "scale", table, self.rotation.matrix()),)

    def drawn(self) -> dict[str, Tensor]:
        """As in `Quantizer`: the first row of T."""
        return {"rotation": self.rotation.matrix()[0].clone()}

    @property
    def stage_one(self) -> RotorQuantMSE:
        """Itself, the only stage."""
        return self

    def decode(self, codes: MSECodes) -> Tensor:
        """T(x_hat), (..., d) float32: <rotate(q), decode(codes)> = <q, x_hat>."""
        index = unpack(codes["codes"], self.bits, self.d)
        return self.centroids[index.int()] * codes["scale"].float().unsqueeze(-1)

    def dequantize(self, codes: MSECodes) -> Tensor:
        """The reconstruction x_hat, (..., d) float32."""
        return self.rotation.unrotate(self.decode(codes))

    def forward(self, x: Tensor) -> tuple[Tensor, MSECodes]:
        """Quantise and reconstruct: x_hat (..., d) float32, and the codes."""
        y_hat, codes = self.quantize(x)
        return self.rotation.unrotate(y_hat), codes

    def extra_repr(self) -> str:
        return f"d={self.d}, bits={self.bits}, scale={self.scale!r}"


def peak_and_rest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / peak (..., d) and peak (..., 1), the largest magnitude of each vector, 1 for zeros.

    Norms are taken of the first: squares of 1e-30 or 1e30 leave float32.
    """
    peak = x.abs().amax(dim=-1, keepdim=True)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    return x / peak, peak


def _bits_of_vector_grade(grade_bits: dict[str, int]) -> int:
    zero_grades = sorted(set(grade_bits) & {"scalar", "bivector", "trivector"})
    if zero_grades:
        raise ValueError(
            f"grade_bits asks for bits for {', '.join(zero_grades)}, but a rotated vector has only "
            "its vector grade, the others are identically zero; pass {'vector': bits}"
        )
    if set(grade_bits) != {"vector"}:
        raise ValueError(f"grade_bits is {grade_bits!r}; pass {{'vector': bits}}")
    return grade_bits["vector"]
