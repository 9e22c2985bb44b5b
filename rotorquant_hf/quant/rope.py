"""How RoPE turns keys and queries, and what that does to their statistics.

RoPE turns pairs of channels of a vector at position p by angles w p: x_p = R(p) x_0 (Su et al.,
arXiv:2104.09864, equation 15). So the mean and the second moment of vectors at some positions are
not those at others. They are known for all positions once they are known for the x_0.

R(p) is diagonal in the complex numbers a + ib and a - ib of the pairs (a, b): it multiplies them
by exp(iwp) and exp(-iwp). With phi(w) the mean of exp(iwp) over some positions, in these numbers

    the mean of R(p) m       has the elements m_k phi(w_k)
    the mean of R(p) C R(p)' has the elements C_kl phi(w_k - w_l)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
            positions: p, (n,), or (1,) for all; negative ones turn back.
        """
        angles = positions.float()[:, None] * self.frequencies
        return self._times(x, torch.polar(torch.ones_like(angles), angles))

    def spread(self, x: Tensor, lengths: Sequence[int | Tensor]) -> Tensor:
        """The mean of R(p) x over positions, float32.

        Args:
            x: (batch, heads, n, d).
            lengths: a mixture, in equal shares, of the positions from 0 to each of these (numbers,
                or tensors () on the device).
        """
        return self._times(x, _mean_turn(self.frequencies, lengths))

    def spread_moment(self, moment: Tensor, lengths: Sequence[int | Tensor]) -> Tensor:
        """The mean of R(p) C R(p)' over positions, float32.

        Args:
            moment: C, (batch, heads, d, d), symmetric.
            lengths: as in `spread`.
        """
        c, w, r = moment.float(), self.frequencies, self.frequencies.shape[-1]
        a, b = self._pairs
        aa, ab, ba, bb = c[..., a, a], c[..., a, b], c[..., b, a], c[..., b, b]
        # The means of z conj(z)' and of z z' for z = a + ib of the pairs.
        phi = _mean_turn(torch.stack((w.mT - w, w.mT + w)), lengths)
        same = torch.complex(aa + bb, ba - ab) * phi[0]
        mirrored = torch.complex(aa - bb, ba + ab) * phi[1]
        out = c.clone()
        both = (mirrored + same) / 2
        out[..., a, a], out[..., b, a] = both.real, both.imag
        both = (mirrored - same) / 2
        out[..., b, b], out[..., a, b] = -both.real, both.imag
        if c.shape[-1] > 2 * r:
            still = slice(2 * r, None)
            z = torch.complex(c[..., a, still], c[..., b, still]) * _mean_turn(w, lengths).mT
            out[..., a, still], out[..., b, still] = z.real, z.imag
            out[..., still, : 2 * r] = out[..., : 2 * r, still].mT
        return out

    @property
    def turns(self) -> Tensor:
        """Whether anything turns in a row, (batch or 1, 1, 1, 1)."""
        return (self.frequencies != 0).any(dim=-1, keepdim=True)

    def where(self, condition: Tensor) -> Rope:
        """The same where `condition` (batch, 1, 1, 1) holds; elsewhere nothing turns."""
        return replace(self, frequencies=self.frequencies * condition)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Rope:
        """The same with `fn` applied to the tensor (a batch selection, a move to a device)."""
        return replace(self, frequencies=fn(self.frequencies))

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        """x with its pairs, as complex numbers, multiplied by `factor` (..., r)."""
        a, b, rest = self._split(x.float())
        z = torch.complex(a, b) * factor
        return self._join(z.real, z.imag, rest)

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


def _mean_turn(w: Tensor, lengths: Sequence[int | Tensor]) -> Tensor:
    """phi: the mean of exp(iwp) over the mixture of positions, complex in the shape of w."""
    means = [  # (exp(iwL) - 1) / iwL = exp(iwL / 2) sin(wL / 2) / (wL / 2)
        torch.sinc(w * (length / (2 * torch.pi))) * torch.exp(0.5j * length * w)
        for length in lengths
    ]
    return torch.stack(means).mean(dim=0)
