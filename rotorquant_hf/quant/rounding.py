"""Rounding that knows along which directions vectors will be read.

An error e of a stored key costs a score q . e. Queries are far from isotropic: their second moment
C has an effective rank of a few out of d. Nearest rounding spreads its error evenly; here it is
pushed out of the directions that queries look along, to minimise e' H e with the Hessian
H = A^-T C A^-1, where y = A (x - mean) is what is coded.

The coordinates are rounded in order, and the error of each is made up for in those that follow
(LDLQ: Chee et al., arXiv:2307.13304, equation 2 and theorem 1; the same sweep is GPTQ's, Frantar et
al., arXiv:2210.17323, algorithm 1). With U the upper Cholesky factor, H^-1 = U' U:

    c_i = nearest(w_i),   w_j <- w_j - (w_i - c_i) U_ij / U_ii   for all j > i.

Codes, scales and everything that reads them stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 16
"""Coordinates rounded one by one before the rest is updated by one matrix product."""


def feedback(hessian: Tensor, ridge: float = 0.03) -> Tensor:
    """What `round_with_feedback` subtracts from later coordinates per unit of error.

    Args:
        hessian: (..., d, d), symmetric and positive semidefinite, of any unit.
        ridge: added to the diagonal, as a share of its mean: it keeps directions that no query
            looked along from taking all of the error.

    Returns:
        U_ij / U_ii, (..., d, d) float32, upper triangular with a unit diagonal.

    Raises:
        ValueError: if the hessian has NaN or infinite entries, or is not positive semidefinite.
    """
    h = hessian.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # A head that no query has looked along yet: nothing to prefer.
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    h = h / mean[..., None, None] + ridge * eye
    # H = L D L' with L unit *upper* triangular is the Cholesky factorisation of H with rows and
    # columns reversed, and U_ij / U_ii of H^-1 = U' U are the entries of L^-1 reversed alike:
    # no inverse of an ill-conditioned H is formed.
    lower, info = torch.linalg.cholesky_ex(h.flip(-1, -2))
    if bool((info != 0).any()):
        raise ValueError(
            "the hessian is not positive semidefinite, or has NaN or infinite entries; pass second "
            "moments of queries, q' q summed over tokens"
        )
    lower = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.flip(-1, -2).float()


def round_with_feedback(w: Tensor, centroids: Tensor, boundaries: Tensor, factor: Tensor) -> Tensor:
    """Indices of centroids for vectors, (..., n, d) int32.

    Args:
        w: (..., n, d) float32, in the unit of the centroids.
        centroids: (levels,) ascending. boundaries: (levels - 1,), the midpoints.
        factor: (..., d, d), from `feedback`.
    """
    w = w.clone()
    d = w.shape[-1]
    index = torch.empty(w.shape, dtype=torch.int32, device=w.device)
    for begin in range(0, d, _COLUMNS):
        end = min(begin + _COLUMNS, d)
        block, local = w[..., begin:end], factor[..., begin:end, begin:end]
        errors = torch.empty_like(block)
        for i in range(end - begin):
            column = block[..., i].contiguous()
            chosen = torch.bucketize(column, boundaries, out_int32=True)
            index[..., begin + i] = chosen
            errors[..., i] = column - centroids[chosen]
            # [..., n, 1] x [..., 1, later columns of the block]
            block[..., i + 1 :] -= errors[..., i : i + 1] * local[..., i : i + 1, i + 1 :]
        if end < d:
            w[..., end:] -= errors @ factor[..., begin:end, end:]
    return index
