"""What the errors of quantised vectors cost: a quadratic form of a few strong directions.

An error e of a stored key costs a score q . e, so in the mean over queries e' C e with their second
moment C. Queries are far from isotropic: C has an effective rank of a few out of d. Here its RANK
strongest directions are kept, and the others count alike:

    H = level I + F F',   F (d, RANK)

which is 4 (d = 64) to 16 (d = 256) times smaller than C, and all that rounding needs: see
`rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RANK = 16
"""Directions kept. At 3 bits the softmax KL of SmolLM2's keys (d = 64) is 7% smaller by all of
them."""

RIDGE = 0.03
"""Added to the diagonal, as a share of its mean: it keeps directions that no query looked along
from taking all of the error."""

ITERATIONS = 3
"""Of the subspace iteration."""


@dataclass(frozen=True)
class LowRankHessian:
    """level I + F F', of mean diagonal 1 + RIDGE.

    Attributes:
        factor: F, (..., d, RANK) float16. With d < RANK its last columns are 0.
    """

    factor: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> LowRankHessian:
        """That of a second moment: its strongest directions by subspace iteration.

        What the others have counts alike in all directions. The host does not wait for a GPU.

        Args:
            hessian: (..., d, d), symmetric and positive semidefinite, of any unit; 0: no direction
                is preferred.

        Raises:
            ValueError: on the CPU, if the Hessian's diagonal is negative somewhere, or an entry is
                NaN or infinite.
        """
        d = hessian.shape[-1]
        rank = min(RANK, d)
        with torch.autocast(hessian.device.type, enabled=False):
            h = doubled(hessian)
            mean = h.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
            h = h / torch.nn.functional.threshold(mean, 0.0, 1.0)  # 1 for 0
            h.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
            basis = start_of_iteration(d, rank, h.device)
            for _ in range(ITERATIONS):
                basis = _orthonormal(h @ basis)
            _check_moment(hessian, basis)
            factor = basis @ torch.linalg.cholesky_ex(basis.mT @ h @ basis)[0]
            # What the other directions have, counts in all, and so is taken out of these. (Exact
            # where the basis has found the eigenvectors; an eigensolver would wait for the GPU.)
            strength = factor.square().sum(dim=-2, keepdim=True)
            rest = (d * (1 + RIDGE) - strength.sum(dim=-1, keepdim=True)) / max(d - rank, 1)
            rest = rest if rank < d else torch.full_like(rest, RIDGE)
            factor = factor * (1 - rest / strength).clamp(min=0).sqrt()
        if rank < RANK:
            factor = torch.nn.functional.pad(factor, (0, RANK - rank))
        return cls(factor.half().to(hessian.device))

    @property
    def level(self) -> Tensor:
        """(..., 1, 1) float32."""
        norm = torch.linalg.vector_norm(
            self.factor, dim=(-2, -1), keepdim=True, dtype=torch.float32
        )
        return RIDGE + 1 - norm.square() / self.factor.shape[-2]

    def matrix(self) -> Tensor:
        """H, (..., d, d) float32."""
        factor = self.factor.float()
        eye = torch.eye(factor.shape[-2], device=factor.device)
        return self.level * eye + factor @ factor.mT

    def map(self, fn: Callable[[Tensor], Tensor]) -> LowRankHessian:
        """The same with `fn` applied to the tensor (a batch selection, a move to a device)."""
        return LowRankHessian(fn(self.factor))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.factor.nbytes


def doubled(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@lru_cache(maxsize=32)
def start_of_iteration(d: int, rank: int, device: torch.device) -> Tensor:
    """Where subspace iteration starts: at random, as no direction is known to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        start = torch.randn(d, rank, generator=generator, dtype=torch.float64, device="cpu")
        return start.to(device)


def _orthonormal(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns (..., d, r), which are linearly independent."""
    # By Cholesky's factor: small products and solutions, where a GPU's QR goes column by column.
    lower, _ = torch.linalg.cholesky_ex(x.mT @ x)
    return torch.linalg.solve_triangular(lower, x.mT, upper=False).mT


def _check_moment(hessian: Tensor, basis: Tensor) -> None:
    if hessian.device.type != "cpu":  # reading the answer would make the host wait for the device
        return
    negative = float(hessian.diagonal(dim1=-2, dim2=-1).min()) < 0
    if negative or not math.isfinite(float(basis.sum())):
        raise ValueError(
            "the hessian has a negative diagonal, or NaN or infinite entries; pass second moments "
            "of queries, q' q summed over tokens"
        )
