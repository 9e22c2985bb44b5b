"""The second moment of the queries of a layer, along which its keys should be exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.quant.tiles import sampled, token_tiles

_SAMPLE = 1024  # tokens; every query head of a group has a query of each


@dataclass(frozen=True)
class QueryMoment:
    """The mean of q q' over queries, for every row of a batch and kv head.

    Attributes:
        mean: (batch, heads, d, d) float32.
        count: queries of a row and head that it was taken from.
    """

    mean: Tensor
    count: int

    @classmethod
    def of(cls, query: Tensor, heads: int) -> QueryMoment:
        """That of queries (batch, query heads, n, d), as attention to `heads` kv heads gets them.

        Query heads are a multiple of `heads`; g k ... g k + g - 1 read kv head k. Of many queries
        a sample is looked at.
        """
        query = sampled(query, _SAMPLE)
        batch, query_heads, n, d = query.shape
        total = torch.zeros(batch, heads, d, d, device=query.device)
        grouped = query.detach().unflatten(1, (heads, query_heads // heads))
        with torch.autocast(query.device.type, enabled=False):
            for tile in token_tiles(n, batch * query_heads * d):
                part = grouped[:, :, :, tile].flatten(2, 3).float()
                total += part.mT @ part
        count = n * (query_heads // heads)
        return cls(total / max(count, 1), count)

    def merged(self, other: QueryMoment) -> QueryMoment:
        """That of the queries of both."""
        count = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / max(count, 1))
        return QueryMoment(mean, count)

    def shrunk(self) -> Tensor:
        """(batch, heads, d, d): the mean, drawn towards no direction at all as queries are few.

        Of d queries or fewer the directions in which none looked are unknown, not unimportant.
        """
        d = self.mean.shape[-1]
        level = self.mean.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        eye = torch.eye(d, device=self.mean.device)
        return self.mean + (d / max(self.count, 1)) * level * eye

    def map(self, fn: Callable[[Tensor], Tensor]) -> QueryMoment:
        """The same with `fn` applied to the tensor (a batch selection, a move to a device)."""
        return QueryMoment(fn(self.mean), self.count)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.mean.nbytes
