"""RotorQuantProd: unbiased inner products from b bits per element.

Stage 1 is `RotorQuantMSE` with b - 1 bits. Stage 2 stores of its residual r the signs of m
projections and the norm (QJL, Zandieh et al., arXiv:2406.03482), and estimates

    <q, x>  ~  <q, x_hat> + |r| sqrt(pi/2) / m <S q, sign(S r)>,

without bias for any q (TurboQuant, arXiv:2504.19874, Algorithm 2 and Theorem 2).

The rows of S are Gaussian, or orthogonal in blocks of d with the length E|g| of a Gaussian
vector g of R^d: with E|<u, e>| the mean over the unit sphere, E|g| E|<u, e>| = sqrt(2/pi), so the
same constant is exactly unbiased for both, and orthogonal rows have the lower variance.
"""

from __future__ import annotations

import math
from typing import Self, TypedDict, cast

import torch
from torch import Tensor

from rotorquant_hf.quant.checks import check_finite, check_hessian, check_vectors
from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.lloyd_max import MAX_BITS
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.mse import MSECodes, RotorQuantMSE, peak_and_rest
from rotorquant_hf.quant.packing import pack, packed_bytes, unpack
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec, Term
from rotorquant_hf.quant.rotations import Rotation, haar_matrix, shared_rotation

PROJECTIONS = ("orthogonal", "gaussian")
"""Names of the laws of S."""


class ProdCodes(TypedDict):
    """Quantised vectors.

    `mse_indices`: the codes of stage 1; `qjl_signs`: (..., ceil(m / 8)) uint8, packed;
    `residual_norm`: (...).
    """

    mse_indices: MSECodes
    qjl_signs: Tensor
    residual_norm: Tensor


class RotorQuantProd(Quantizer):
    """The quantiser with unbiased inner products.

    Args:
        d: vector dimension, 8 to 576.
        bits: bits per element in all, 2 to 8: bits - 1 for stage 1 and, with qjl_dim = d, 1 for
            the signs.
        qjl_dim: m, the number of projections; by default d.
        seed: seed of the rotation; S is drawn from seed + 1.
        device: where the tables lie.
        projection: "orthogonal" (default) or "gaussian" rows of S.
        rotation, rotor_layers, scale, scale_dtype: as in `RotorQuantMSE`; `residual_norm` is
            stored in `scale_dtype` too.

    Raises:
        ValueError: naming the value that is not possible.
    """

    min_bits = 2

    def __init__(
        self,
        d: int,
        bits: int,
        qjl_dim: int | None = None,
        seed: int = 42,
        device: torch.device | str = "cpu",
        *,
        projection: str = "orthogonal",
        rotation: str | Rotation = "cascade",
        rotor_layers: int | None = None,
        scale: str = "least_squares",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if type(bits) is not int or not self.min_bits <= bits <= MAX_BITS:
            raise ValueError(
                f"bits is {bits!r}; a product quantiser takes {self.min_bits} to {MAX_BITS}, one "
                "bit being for the signs of the residual"
            )
        if qjl_dim is not None and qjl_dim < 1:
            raise ValueError(f"qjl_dim is {qjl_dim}; choose at least 1, or None for d")
        self.d = d
        self.bits = bits
        self.qjl_dim = d if qjl_dim is None else qjl_dim
        self.projection = projection
        self.mse = RotorQuantMSE(
            d,
            bits - 1,
            seed,
            device=device,  # a rotation that is shared must not leave it
            rotation=rotation,
            rotor_layers=rotor_layers,
            scale=scale,
            scale_dtype=scale_dtype,
        )
        self.S: Tensor
        with torch.device("cpu"):  # drawn there, whatever torch.set_default_device says
            projection_matrix = _projection_matrix(projection, self.qjl_dim, d, seed + 1)
        self.register_buffer("S", projection_matrix, persistent=False)
        self.to(device)

    @classmethod
    def from_spec(cls, spec: QuantizerSpec, d: int, device: torch.device) -> Self:
        """As in `Quantizer`; scales and residual norms are stored in 16 bits."""
        return cls(
            d,
            spec.bits,
            spec.qjl_dim,
            spec.seed,
            device=device,
            projection=spec.qjl_projection,
            rotation=shared_rotation(d, spec.rotation, spec.rotor_layers, spec.seed, device),
            scale=spec.scale,
            scale_dtype=torch.float16,
        )

    @property
    def rotation(self) -> Rotation:
        """T of stage 1."""
        return self.mse.rotation

    @property
    def bytes_per_vector(self) -> int:
        """Bytes that one quantised vector takes: codes, scale, signs and residual norm."""
        signs = packed_bytes(self.qjl_dim, 1)
        return self.mse.bytes_per_vector + signs + self.mse.scale_dtype.itemsize

    @property
    def correction(self) -> Tensor:
        """sqrt(pi/2) / m S, (m, d): the residual counts as |r| (signs @ correction)."""
        return self.S * (math.sqrt(math.pi / 2) / self.qjl_dim)

    def quantize(self, x: Tensor, hessian: Tensor | None = None) -> ProdCodes:
        """Quantise vectors x (..., d), floating. `hessian` and errors: as `RotorQuantMSE.quantize`.

        A Hessian serves stage 1; the estimate stays unbiased, whatever stage 1 leaves over.
        S acts on the residual in the rotated space: S T is again Gaussian (orthogonal), so the
        law of the estimate is the same, and nothing has to be rotated back.
        """
        check_vectors("x", x, self.d)
        x = x.float()
        check_finite("x", x)
        if hessian is not None:
            check_hessian(hessian, x)
        return self._code(x, None if hessian is None else LowRankHessian.of(hessian))

    def _code(self, x: Tensor, hessian: LowRankHessian | None = None) -> ProdCodes:
        y_hat, mse_indices = self.mse.code(x, hessian)
        x, peak = peak_and_rest(x)
        residual = self.rotation.rotate(x) - y_hat / peak
        norm = torch.linalg.vector_norm(residual, dim=-1) * peak.squeeze(-1)
        max_norm = torch.finfo(self.mse.scale_dtype).max
        with torch.autocast(x.device.type, enabled=False):
            positive = (residual @ self.S.T) >= 0
        return {
            "mse_indices": mse_indices,
            "qjl_signs": pack(positive, 1),
            "residual_norm": norm.clamp(max=max_norm).to(self.mse.scale_dtype),
        }

    def encode(self, u: Tensor, hessian: LowRankHessian | None = None) -> dict[str, Tensor]:
        """As in `Quantizer`: the rows of stage 1, `signs` and `residual_norm`."""
        codes = self._code(u, hessian)
        return {
            **cast(dict[str, Tensor], codes["mse_indices"]),
            "signs": codes["qjl_signs"],
            "residual_norm": codes["residual_norm"],
        }

    def terms(self) -> tuple[Term, ...]:
        """As in `Quantizer`: stage 1, and the residual as its signs estimate it."""
        signs = CodeTable.of(self.S.new_tensor([-1.0, 1.0]), 1, self.qjl_dim)
        basis = self.correction @ self.rotation.matrix()
        return *self.mse.terms(), Term.of("signs", "residual_norm", signs, basis)

    def drawn(self) -> dict[str, Tensor]:
        """As in `Quantizer`: the first rows of T and S."""
        return {**self.mse.drawn(), "projection": self.S[0].clone()}

    @property
    def stage_one(self) -> RotorQuantMSE:
        """The quantiser of bits - 1 that comes first."""
        return self.mse

    @property
    def sign_matrix(self) -> Tensor:
        """S."""
        return self.S

    def decode(self, codes: ProdCodes) -> Tensor:
        """The vectors z (..., d) float32 with <rotate(q), z> = inner_product(q, codes).

        The estimate is linear in q: its second term is <T q, S^T sign(S r)> times a scalar.
        """
        signs = unpack(codes["qjl_signs"], 1, self.qjl_dim).float() * 2 - 1
        with torch.autocast(signs.device.type, enabled=False):
            residual = (signs @ self.correction) * codes["residual_norm"].float().unsqueeze(-1)
        return self.mse.decode(codes["mse_indices"]) + residual

    def dequantize(self, codes: ProdCodes) -> Tensor:
        """The reconstruction of stage 1, (..., d) float32."""
        return self.mse.dequantize(codes["mse_indices"])

    def inner_product(self, y: Tensor, codes: ProdCodes) -> Tensor:
        """Unbiased estimates of <y, x>.

        Args:
            y: (..., d); its leading shape broadcasts with that of the quantised vectors.
            codes: from `quantize`.

        Returns:
            (...) float32.
        """
        return (self.rotation.rotate(y.float()) * self.decode(codes)).sum(dim=-1)

    def forward(self, x: Tensor) -> ProdCodes:
        """`quantize`, as in the reference."""
        return self.quantize(x)

    def extra_repr(self) -> str:
        return f"d={self.d}, bits={self.bits}, qjl_dim={self.qjl_dim}, {self.projection}"


def _projection_matrix(projection: str, m: int, d: int, seed: int) -> Tensor:
    """S, (m, d) float32."""
    generator = torch.Generator().manual_seed(seed)
    if projection == "gaussian":
        return torch.randn(m, d, generator=generator, dtype=torch.float32)
    if projection == "orthogonal":
        blocks = [haar_matrix(d, generator) for _ in range((m + d - 1) // d)]
        length = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
        return (torch.cat(blocks)[:m] * length).float()
    raise ValueError(f"projection is {projection!r}; choose one of {', '.join(PROJECTIONS)}")
