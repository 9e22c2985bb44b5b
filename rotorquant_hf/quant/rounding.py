"""Rounding that knows along which directions vectors will be read.

Nearest rounding spreads the error of a vector evenly. Here it is pushed out of the directions that
queries look along, to minimise e' H e with a Hessian H = level I + F F' (`hessian`).

The coordinates are rounded in order, and the error of each is made up for in those that follow
(LDLQ: Chee et al., arXiv:2307.13304, equation 2 and theorem 1; the same sweep is GPTQ's, Frantar et
al., arXiv:2210.17323, algorithm 1). Given the errors e_j = y_j - c_j of the coordinates before i,
the best error of i, with all after it still free, is the i-th element of

    -H_tt^-1 H_tb e_b = -F_t (level I + F_t' F_t)^-1 s,   s = F_b' e_b

where b are the coordinates before i and t those from i on. So the sweep carries s along, which is
RANK numbers instead of d:

    c_i = nearest(y_i + p_i . s),   s <- s + f_i (y_i - c_i),
    p_i = (level I + sum_{j >= i} f_j f_j')^-1 f_i,   f_i the i-th row of F.

Codes, scales and everything that reads them stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotorquant_hf.quant.hessian import LowRankHessian, doubled
from rotorquant_hf.quant.lloyd_max import nearest
from rotorquant_hf.quant.rotations import Rotation

_COLUMNS = 16
"""Coordinates rounded one by one before s is updated by one matrix product."""


class Feedback(NamedTuple):
    """The Hessian of rotated vectors as the sweep reads it, float32.

    Attributes:
        factor: F, (..., d, RANK). gains: the p_i, (..., d, RANK). level: (..., 1, 1).
    """

    factor: Tensor
    gains: Tensor
    level: Tensor

    @classmethod
    def of(cls, hessian: LowRankHessian, rotation: Rotation) -> Feedback:
        """That of vectors T(x) whose x have this Hessian."""
        level = hessian.level
        with torch.autocast(level.device.type, enabled=False):
            factor = rotation.rotate(hessian.factor.mT).mT.contiguous()
            f = doubled(factor).flip(-2)  # backwards: the sums are of those that follow
            tail = (f.unsqueeze(-1) * f.unsqueeze(-2)).cumsum(dim=-3)  # (..., d, RANK, RANK)
            tail.diagonal(dim1=-2, dim2=-1).add_(level.to(tail.device))
            gains, _ = torch.linalg.solve_ex(tail, f)
        return cls(factor, gains.flip(-2).float().to(factor.device), level)

    def along(self, x: Tensor) -> Tensor:
        """F' x of vectors (..., n, d): (..., n, RANK)."""
        return x @ self.factor

    def dot(
        self, a: Tensor, b: Tensor, a_along: Tensor | None = None, b_along: Tensor | None = None
    ) -> Tensor:
        """a' H b of vectors (..., n, d), as (..., n, 1); F' a and F' b where these are known."""
        a_along = self.along(a) if a_along is None else a_along
        b_along = self.along(b) if b_along is None else b_along
        along = (a_along * b_along).sum(dim=-1, keepdim=True)
        return self.level * (a * b).sum(dim=-1, keepdim=True) + along


class Rounded(NamedTuple):
    """Vectors y and what they are rounded to.

    Attributes:
        indices: (..., n, d) int32. centroids: c, those of these indices.
        lost: s = F' (y - c), (..., n, RANK).
    """

    indices: Tensor
    centroids: Tensor
    lost: Tensor


def round_with_feedback(
    y: Tensor, centroids: Tensor, boundaries: Tensor, feedback: Feedback
) -> Rounded:
    """Centroids for vectors.

    Args:
        y: (..., n, d) float32, in the unit of the centroids.
        centroids: (levels,) ascending. boundaries: (levels - 1,), the midpoints.
        feedback: leading axes as those of `y`, or fewer.
    """
    # Coordinates first: what is worked on at a time, one coordinate of all vectors, lies together.
    y = y.mT.contiguous()
    indices = torch.empty(y.shape, dtype=torch.int32, device=y.device)
    c = torch.empty_like(y)
    s = y.new_zeros(*y.shape[:-2], feedback.factor.shape[-1], y.shape[-1])
    d = y.shape[-2]
    for begin in range(0, d, _COLUMNS):
        block = slice(begin, min(begin + _COLUMNS, d))
        f, p = feedback.factor[..., block, :], feedback.gains[..., block, :]
        wanted = y[..., block, :] + p @ s
        within = p @ f.mT  # what the error of a coordinate adds to the others of the block
        errors = torch.empty_like(wanted)
        for i in range(wanted.shape[-2]):
            at = begin + i
            chosen = nearest(wanted[..., i, :].contiguous(), boundaries)
            indices[..., at, :] = chosen
            c[..., at, :] = centroids[chosen]
            errors[..., i, :] = y[..., at, :] - c[..., at, :]
            # [..., later coordinates of the block, 1] x [..., 1, n]
            wanted[..., i + 1 :, :].addcmul_(
                within[..., i + 1 :, i : i + 1], errors[..., i : i + 1, :]
            )
        s += f.mT @ errors
    return Rounded(indices.mT.contiguous(), c.mT.contiguous(), s.mT.contiguous())
