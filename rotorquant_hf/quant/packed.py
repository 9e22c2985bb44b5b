"""What attention reads of the packed store: a frozen span of quantised keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.quantizer import Quantizer, Term
from rotorquant_hf.quant.tiles import token_tiles


@dataclass(frozen=True)
class PackedSpan:
    """A run of `tokens` quantised keys or values, sharing the store's memory.

    Attributes:
        rows: views (batch, heads, tokens, ...) of the store's tensors, as `Quantizer.encode`
            names them.
        statistics: equalisation and centring of these vectors.
        quantizer: what coded them.
    """

    rows: dict[str, Tensor]
    statistics: ChannelStatistics
    quantizer: Quantizer

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, tokens = next(iter(self.rows.values())).shape[:3]
        return batch, heads, tokens, self.quantizer.d

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of which the vectors are sums."""
        return _terms(self.quantizer)

    def fold(self, queries: Tensor) -> FoldedQueries:
        """Take equalisation, centre, rotation and the order of the elements into the queries.

        Args:
            queries: (batch, heads, n, d) float32.
        """
        mean = self.statistics.mean
        scaled = queries * self.statistics.scale
        return FoldedQueries(
            [scaled @ term.basis.T for term in self.terms],
            None if mean is None else queries @ mean.mT,
        )

    def unfold(self, sums: list[Tensor]) -> Tensor:
        """Vectors from their elements, or averages of vectors from averages of their elements.

        Args:
            sums: for each term scale * elements, (batch, heads, n, size) float32, or averages of
                these (over any tokens, with weights that sum to 1).

        Returns:
            (batch, heads, n, d) float32.
        """
        parts = [elements @ term.basis for elements, term in zip(sums, self.terms, strict=True)]
        return self.statistics.denormalize(functools.reduce(torch.add, parts))

    def look_up(self, tokens: slice) -> list[tuple[Tensor, Tensor]]:
        """For each term the elements (batch, heads, n, size) and scales (batch, heads, n), float32.

        The elements are not scaled: scores and weights are fewer.
        """
        found = []
        for term in self.terms:
            elements = term.table.look_up(self.rows[term.codes][:, :, tokens])
            found.append((elements, self.rows[term.scale][:, :, tokens].float()))
        return found

    def _tiles(self) -> Iterator[slice]:
        batch, heads, tokens, d = self.shape
        return token_tiles(tokens, batch * heads * d)

    def materialize(self, out: Tensor) -> None:
        """Write the reconstructed vectors into `out`, (batch, heads, tokens, d) of any dtype."""
        with torch.autocast(out.device.type, enabled=False):
            for tile in self._tiles():
                scaled = [x.mul_(scale.unsqueeze(-1)) for x, scale in self.look_up(tile)]
                out[:, :, tile] = self.unfold(scaled)

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products of queries (batch, query heads, n, d) with the vectors: (.., n, tokens).

        Query heads are grouped: heads g k ... g k + g - 1 read kv head k. Float32, not divided
        by sqrt(d).
        """
        batch, heads, tokens, _ = self.shape
        q = queries.float().unflatten(1, (heads, -1)).flatten(2, 3)
        scores = q.new_empty(batch, heads, q.shape[2], tokens)
        with torch.autocast(q.device.type, enabled=False):
            folded = self.fold(q)
            for tile in self._tiles():
                scores[..., tile] = self.inner_products(folded, tile)
        return scores.unflatten(2, (-1, queries.shape[2])).flatten(1, 2)

    def inner_products(self, folded: FoldedQueries, tokens: slice) -> Tensor:
        """Inner products of the folded queries with some tokens, (batch, heads, n, tokens)."""
        parts = [
            (q @ elements.mT).mul_(scale.unsqueeze(2))
            for q, (elements, scale) in zip(folded.terms, self.look_up(tokens), strict=True)
        ]
        if folded.offset is not None:
            parts.append(folded.offset)
        return functools.reduce(Tensor.add_, parts)

    def weighted_sums(self, weights: Tensor, tokens: slice) -> list[Tensor]:
        """Sums over some tokens of weight * scale * elements, for `unfold`.

        Args:
            weights: (batch, heads, n, tokens) float32.

        Returns:
            For each term (batch, heads, n, size).
        """
        return [(weights * scale.unsqueeze(2)) @ x for x, scale in self.look_up(tokens)]


class FoldedQueries(NamedTuple):
    """Queries ready for looked-up elements: <q, x> = offset + sum_terms <term, elements> scale.

    `terms`: (batch, heads, n, size) each; `offset`: <q, mean>, (batch, heads, n, 1), or None.
    """

    terms: list[Tensor]
    offset: Tensor | None


@functools.lru_cache(maxsize=64)
def _terms(quantizer: Quantizer) -> tuple[Term, ...]:
    with torch.inference_mode(False), torch.no_grad():  # they may be needed for a gradient
        return quantizer.terms()
