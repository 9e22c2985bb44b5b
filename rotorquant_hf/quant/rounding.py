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


def regularised(hessian: Tensor, ridge: float = 0.03) -> Tensor:
    """A Hessian of mean diagonal 1, plus a ridge, (..., d, d) float32.

    Args:
        hessian: (..., d, d), symmetric and positive semidefinite, of any unit; 0: none preferred.
        ridge: added to the diagonal, as a share of its mean: it keeps directions that no query
            looked along from taking all of the error.
    """
    h = hessian.double()
    mean = h.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return (h / mean + ridge * eye).float()


def feedback(hessian: Tensor) -> Tensor:
    """What `round_with_feedback` subtracts from later coordinates per unit of error.

    Args:
        hessian: (..., d, d), symmetric and positive definite; see `regularised`.

    Returns:
        U_ij / U_ii, (..., d, d) float32, upper triangular with a unit diagonal.

    Raises:
        ValueError: if the Hessian is not positive definite, or has NaN or infinite entries.
    """
    h = hessian.double()
    # With H = L D L', L unit *upper* triangular (the Cholesky factor of H with rows and columns
    # reversed), U_ij / U_ii are the entries of L^-1: no inverse of an ill-conditioned H is formed.
    lower, info = torch.linalg.cholesky_ex(h.flip(-1, -2))
    if bool((info != 0).any()):
        raise ValueError(
            "the hessian is not positive semidefinite, or has NaN or infinite entries; pass second "
            "moments of queries, q' q summed over tokens"
        )
    lower = lower / lower.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.flip(-1, -2).float()


def round_with_feedback(w: Tensor, centroids: Tensor, boundaries: Tensor, factor: Tensor) -> Tensor:
    """Indices of centroids for vectors, int32 in the shape of `w`.

    Args:
        w: (..., n, d) or (d,) float32, in the unit of the centroids.
        centroids: (levels,) ascending. boundaries: (levels - 1,), the midpoints.
        factor: (..., d, d), from `feedback`.
    """
    if w.dim() == 1:
        return round_with_feedback(w[None], centroids, boundaries, factor)[0]
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


def weighted_dot(a: Tensor, b: Tensor, hessian: Tensor) -> Tensor:
    """a' H b of vectors (..., n, d) with Hessians (..., d, d), (..., n, 1)."""
    return ((a @ hessian) * b).sum(dim=-1, keepdim=True)
