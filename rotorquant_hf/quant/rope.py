"""How RoPE turns keys and queries, and what that does to their statistics.

RoPE turns pairs of channels of a vector at position p by angles w p: x_p = R(p) x_0 (Su et al.,
arXiv:2104.09864, equation 15). So the mean and the second moment of vectors at some positions are
not those at others. They are known for all positions once they are known for the x_0.

As a complex number z = a + ib, a pair (a, b) is multiplied by exp(iwp). With phi(w) the mean of
exp(iwp) over some positions,

    the mean of R(p) m        has the pairs m_k phi(w_k)
    the mean of R(p) C R(p)': take the rows of C by pairs, z = C_a + i C_b. Row k is multiplied by
        exp(iw_k p), and its columns are turned: a by a cos(w_l p) - b sin(w_l p), b by
        a sin(w_l p) + b cos(w_l p). The means of these products are
        (phi(w_k + w_l) + phi(w_k - w_l)) / 2  and  (phi(w_k + w_l) - phi(w_k - w_l)) / 2i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rotorquant_hf.quant.device import on_cpu

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, eq=False)  # compared as an object: tensors have no one truth
class Rope:
    """The turning of the first 2 r channels of vectors; the others stay.

    Attributes:
        frequencies: w of the pairs, (batch or 1, 1, 1, r) float32, in radians per token. 0 turns
            nothing.
        layout: the channels of pair i: "half" (i, i + r) or "interleaved" (2i, 2i + 1).
    """

    frequencies: Tensor
    layout: str

    @property
    def channels(self) -> int:
        """How many channels turn: 2 r."""
        return 2 * self.frequencies.shape[-1]

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """R(p) x, float32.

        Args:
            x: (batch, heads, n, d).
            positions: p, (n,), or (1,) for all; negative ones turn back. With more axes the result
                has them too: (m, 1, 1, 1) gives (m, batch, heads, n, d).
        """
        if on_cpu(x):
            return self._turned(x, *self.sines(positions))
        angles = positions[..., None] * self.frequencies
        return self._times(x, torch.polar(torch.ones_like(angles), angles))

    def sines(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles at positions (n,), each (batch or 1, 1, n, r) float32."""
        angles = positions[..., None] * self.frequencies
        return angles.cos(), angles.sin()

    def spread(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The mean of R(p) x over positions, float32.

        Args:
            x: (batch, heads, n, d).
            lengths: a mixture, in equal shares, of the positions from 0 to each of these.
        """
        return self._times(x, self.mean_turns(lengths))

    def mean_turns(self, lengths: tuple[int, ...]) -> Tensor:
        """By what `spread` multiplies pairs, as complex numbers: (batch or 1, 1, 1, r)."""
        return _mean_turns(self.frequencies, lengths)

    def spread_moment(self, moment: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The mean of R(p) C R(p)' over positions, float32.

        Args:
            moment: C, (batch, heads, d, d), symmetric.
            lengths: as in `spread`.
        """
        c = moment.float()
        first, second = self._pairs
        # (..., r, d), its columns by pairs and those that do not turn.
        a, b, rest = self._split(torch.complex(c[..., first, :], c[..., second, :]))
        by_cos, by_sin = self.mean_products(lengths)
        turned = (
            torch.addcmul(by_cos * a, by_sin, b, value=-1),
            torch.addcmul(by_cos * b, by_sin, a),
        )
        if not rest.shape[-1]:
            rows = self._join(*turned, rest)
            return self._join(rows.real.mT, rows.imag.mT, c[..., :0]).mT
        rest = rest * self.mean_turns(lengths).mT
        rows = self._join(*turned, rest)
        # Rows that do not turn: symmetric to the columns, but for the corner where both do not.
        corner = c[..., self.channels :, self.channels :]
        still = self._join(rest.real.mT, rest.imag.mT, corner)
        return self._join(rows.real.mT, rows.imag.mT, still.mT).mT

    def mean_products(self, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """By what `spread_moment` multiplies rows of pairs, their first columns and their second:
        complex (batch or 1, 1, r, r).
        """
        return _mean_products(self.frequencies, lengths)

    @property
    def turns(self) -> Tensor:
        """Whether anything turns in a row, (batch or 1, 1, 1, 1)."""
        return self.frequencies.any(dim=-1, keepdim=True)

    def where(self, condition: Tensor) -> Rope:
        """The same where `condition` (batch, 1, 1, 1) holds; elsewhere nothing turns."""
        return replace(self, frequencies=self.frequencies * condition)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Rope:
        """The same with `fn` applied to the tensor (a batch selection, a move to a device)."""
        return replace(self, frequencies=fn(self.frequencies))

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        """x with its pairs, as complex numbers, multiplied by `factor` (..., r)."""
        if on_cpu(x):
            return self._turned(x, factor.real, factor.imag)
        a, b, rest = self._split(x.float())
        z = torch.complex(a, b) * factor
        return self._join(z.real, z.imag, rest.expand(*z.shape[:-1], -1))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`_times` of cos + i sin, for a CPU: real numbers, and each written where it stays.

        Complex numbers would be copied together first, and apart in the end.
        """
        a, b, rest = self._split(x.float())
        first, second = self._pairs
        with torch.no_grad():
            out = a.new_empty(*cos.shape[: cos.dim() - x.dim()], *x.shape)
            torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
            torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
            out[..., self.channels :] = rest
        return out

    @property
    def _pairs(self) -> tuple[slice, slice]:
        """First and second channels of the pairs."""
        r = self.frequencies.shape[-1]
        if self.layout == "half":
            return slice(0, r), slice(r, 2 * r)
        return slice(0, 2 * r, 2), slice(1, 2 * r, 2)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and second channels of the pairs, and the channels that do not turn."""
        first, second = self._pairs
        return x[..., first], x[..., second], x[..., self.channels :]

    def _join(self, a: Tensor, b: Tensor, rest: Tensor) -> Tensor:
        if self.layout == "half":
            return torch.cat((a, b, rest), dim=-1)
        return torch.cat((torch.stack((a, b), dim=-1).flatten(-2), rest), dim=-1)


def is_turned_by(taken: Rope | None, rope: Rope | None) -> bool:
    """Whether RoPE turns vectors now as it did when statistics of them were taken.

    Args:
        taken: of the statistics; None, or nothing in a row, where RoPE did not fit the vectors.
        rope: what turns the vectors now, (1, 1, 1, r); None if that is not known.
    """
    if taken is None:
        return True
    if rope is None or rope.channels != taken.channels or rope.layout != taken.layout:
        return False
    found = taken.frequencies.to(rope.frequencies)
    turns = found.any(dim=-1, keepdim=True)
    return torch.allclose(found, torch.where(turns, rope.frequencies, 0.0), rtol=1e-5, atol=0.0)


@lru_cache(maxsize=8)
def _mean_turns(w: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """`_mean_turn`, kept, as layers share w."""
    with torch.inference_mode(False):
        return _mean_turn(w, lengths)


def _mean_turn(w: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """phi: the mean of exp(iwp) over the mixture of positions, complex in the shape of w."""
    # (exp(iwL) - 1) / iwL = exp(iwL / 2) sin(wL / 2) / (wL / 2)
    angles = torch.stack([w * (length / 2) for length in lengths])
    return torch.polar(torch.sinc(angles / torch.pi), angles).mean(dim=0)


@lru_cache(maxsize=4)
def _mean_products(w: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The means of exp(iw_k p) cos(w_l p) and of exp(iw_k p) sin(w_l p), complex (..., r, r).

    Kept, as layers share w, (..., 1, r).
    """
    with torch.inference_mode(False):
        sums, differences = _mean_turn(w.mT + w, lengths), _mean_turn(w.mT - w, lengths)
        return (sums + differences) / 2, (sums - differences) / 2j
