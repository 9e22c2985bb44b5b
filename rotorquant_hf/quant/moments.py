"""The second moment of the queries of a layer, along which its keys should be exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import sampled, token_tiles

_SAMPLE = 1024  # tokens; every query head of a group has a query of each


@dataclass(frozen=True)
class QueryMoment:
    """The mean of q q' over queries, for every row of a batch and kv head.

    Attributes:
        mean: (batch, heads, d, d) float32.
        count: queries of a row and head that it was taken from.
        pre_rope: the same of the queries before RoPE turned them, if it is known how.
    """

    mean: Tensor
    count: int
    pre_rope: Tensor | None = None

    @classmethod
    def of(
        cls, query: Tensor, heads: int, rope: Rope | None = None, positions: Tensor | None = None
    ) -> QueryMoment:
        """That of queries, as attention to `heads` kv heads gets them.

        Args:
            query: (batch, query heads, n, d). Query heads are a multiple of `heads`:
                g k ... g k + g - 1 read kv head k. Of many tokens a sample is looked at.
            heads: kv heads.
            rope: how RoPE has turned them; None if that is not known, or there is none.
            positions: (n,), where in the text they are; needed for `rope`.
        """
        query = sampled(query, _SAMPLE)
        mean = _moment(query, heads)
        count = query.shape[2] * (query.shape[1] // heads)
        if rope is None or positions is None:
            return cls(mean, count)
        before = rope.turn(query, -sampled(positions, _SAMPLE, axis=0))
        return cls(mean, count, _moment(before, heads))

    def merged(self, other: QueryMoment) -> QueryMoment:
        """That of the queries of both."""
        count = self.count + other.count
        share = other.count / max(count, 1)
        mean = torch.lerp(self.mean, other.mean, share)
        if self.pre_rope is None or other.pre_rope is None:
            return QueryMoment(mean, count)
        return QueryMoment(mean, count, torch.lerp(self.pre_rope, other.pre_rope, share))

    def shrunk(self) -> QueryMoment:
        """The same drawn towards no direction at all as queries are few.

        Of d queries or fewer the directions in which none looked are unknown, not unimportant.
        """
        d = self.mean.shape[-1]
        level = self.mean.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        level = level * (d / max(self.count, 1))
        shrunk = self.map(Tensor.clone)
        for moment in (shrunk.mean, shrunk.pre_rope):
            if moment is not None:
                moment.diagonal(dim1=-2, dim2=-1).add_(level)
        return shrunk

    def map(self, fn: Callable[[Tensor], Tensor]) -> QueryMoment:
        """The same with `fn` applied to the tensors (a batch selection, a move to a device)."""
        before = None if self.pre_rope is None else fn(self.pre_rope)
        return QueryMoment(fn(self.mean), self.count, before)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.mean.nbytes + (0 if self.pre_rope is None else self.pre_rope.nbytes)


def _moment(query: Tensor, heads: int) -> Tensor:
    """The mean of q q', (batch, heads, d, d) float32; 0 of no queries."""
    batch, query_heads, n, d = query.shape
    total = torch.zeros(batch, heads, d, d, device=query.device)
    grouped = query.detach().unflatten(1, (heads, query_heads // heads))
    with torch.autocast(query.device.type, enabled=False):
        for tile in token_tiles(n, batch * query_heads * d):
            part = grouped[:, :, :, tile].flatten(2, 3).float()
            total += part.mT @ part
    return total / max(n * (query_heads // heads), 1)
