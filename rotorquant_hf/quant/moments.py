"""The second moment of the queries of a layer, along which its keys should be exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.quant.hessian import doubled
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import sampled, sampled_positions

SAMPLED_QUERIES = 1024
"""Tokens looked at of a long pass; every query head of a group has a query of each."""


@dataclass(frozen=True)
class QueryMoment:
    """The mean of q q' over queries, for every row of a batch and kv head.

    Attributes:
        mean: (batch, heads, d, d) float32.
        count: queries of a row and head that it was taken from.
        pre_rope: the same of the queries before RoPE turned them, if it is known how.
        scale: factor of their inner products with keys; None for d^-1/2.
    """

    mean: Tensor
    count: int
    pre_rope: Tensor | None = None
    scale: float | None = None

    @classmethod
    def of(
        cls,
        query: Tensor,
        heads: int,
        rope: Rope | None = None,
        positions: range | Tensor | None = None,
    ) -> QueryMoment:
        """That of queries, as attention to `heads` kv heads gets them.

        Args:
            query: (batch, query heads, n, d). Query heads are a multiple of `heads`:
                g k ... g k + g - 1 read kv head k. Of many tokens a sample is looked at.
            heads: kv heads.
            rope: how RoPE has turned them; None if that is not known, or there is none.
            positions: where in the text they are, a range or (n,); needed for `rope`.
        """
        query = sampled(query, SAMPLED_QUERIES).detach()
        query = query.to(torch.float32, memory_format=torch.contiguous_format)
        mean = _moment(query, heads)
        count = query.shape[2] * (query.shape[1] // heads)
        if rope is None or positions is None:
            return cls(mean, count)
        before = rope.turn(query, -sampled_positions(positions, SAMPLED_QUERIES, query.device))
        return cls(mean, count, _moment(before, heads))

    def merged(self, other: QueryMoment) -> QueryMoment:
        """That of the queries of both; with the scale of the other's."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        mean, before = torch.lerp(self.mean, other.mean, share), None
        if self.pre_rope is not None and other.pre_rope is not None:
            before = torch.lerp(self.pre_rope, other.pre_rope, share)
        return QueryMoment(mean, count, before, other.scale)

    def shrunk(self, moment: Tensor) -> Tensor:
        """A moment of these queries, in float64, drawn to no direction at all as they are few.

        Of d queries or fewer the directions in which none looked are unknown, not unimportant.

        Args:
            moment: (batch, heads, d, d) float32: `mean`, or of the queries at other positions.
        """
        shrunk = doubled(moment)  # a copy
        diagonal = shrunk.diagonal(dim1=-2, dim2=-1)
        level = diagonal.mean(dim=-1, keepdim=True)
        diagonal.add_(level, alpha=self.shrinkage)
        return shrunk

    @property
    def shrinkage(self) -> float:
        """What `shrunk` adds to the diagonal, as a share of its mean."""
        return self.mean.shape[-1] / max(self.count, 1)

    @property
    def score_scale(self) -> float:
        """Factor of the inner products with keys."""
        return self.mean.shape[-1] ** -0.5 if self.scale is None else self.scale

    def map(self, fn: Callable[[Tensor], Tensor]) -> QueryMoment:
        """The same with `fn` applied to the tensors (a batch selection, a move to a device)."""
        before = None if self.pre_rope is None else fn(self.pre_rope)
        return QueryMoment(fn(self.mean), self.count, before, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.mean.nbytes + (0 if self.pre_rope is None else self.pre_rope.nbytes)


def _moment(query: Tensor, heads: int) -> Tensor:
    """The mean of q q' of float32 queries, (batch, heads, d, d) float32; 0 of no queries."""
    batch, query_heads, n, d = query.shape
    count = n * (query_heads // heads)  # of every kv head
    grouped = query.reshape(batch, heads, count, d)
    with torch.autocast(query.device.type, enabled=False):
        return grouped.mT @ grouped / max(count, 1)
