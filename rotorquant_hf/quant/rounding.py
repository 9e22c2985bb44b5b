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
            factor = rotation.rotate(hessian.factor.float().mT).mT
            f = doubled(factor)
            outer = f.unsqueeze(-1) * f.unsqueeze(-2)  # (..., d, RANK, RANK)
            tail = outer.flip(-3).cumsum(dim=-3).flip(-3)
            tail += doubled(level).unsqueeze(-1) * torch.eye(f.shape[-1], device=f.device)
            gains, _ = torch.linalg.solve_ex(tail, f)
        return cls(factor.contiguous(), gains.float().to(factor.device), level)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """a' H b of vectors (..., n, d), (..., n, 1)."""
        along = ((a @ self.factor) * (b @ self.factor)).sum(dim=-1, keepdim=True)
        return self.level * (a * b).sum(dim=-1, keepdim=True) + along


def round_with_feedback(
    y: Tensor, centroids: Tensor, boundaries: Tensor, feedback: Feedback
) -> Tensor:
    """Indices of centroids for vectors, int32 in the shape of `y`.

    Args:
        y: (..., n, d) float32, in the unit of the centroids.
        centroids: (levels,) ascending. boundaries: (levels - 1,), the midpoints.
        feedback: leading axes as those of `y`, or fewer.
    """
    d = y.shape[-1]
    index = torch.empty(y.shape, dtype=torch.int32, device=y.device)
    s = y.new_zeros(*y.shape[:-1], feedback.factor.shape[-1])
    for begin in range(0, d, _COLUMNS):
        block = slice(begin, min(begin + _COLUMNS, d))
        f, p = feedback.factor[..., block, :], feedback.gains[..., block, :]
        wanted = y[..., block] + s @ p.mT
        within = f @ p.mT  # what the error of a coordinate adds to the others of the block
        errors = torch.empty_like(wanted)
        for i in range(wanted.shape[-1]):
            column = wanted[..., i].contiguous()
            chosen = torch.bucketize(column, boundaries, out_int32=True)
            index[..., begin + i] = chosen
            errors[..., i] = y[..., begin + i] - centroids[chosen]
            # [..., n, 1] x [..., 1, later columns of the block]
            wanted[..., i + 1 :] += errors[..., i : i + 1] * within[..., i : i + 1, i + 1 :]
        s += errors @ f
    return index
