"""What attention reads of the packed store: a frozen span of quantised keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from rotorquant_hf.quant import RotorQuantMSE, RotorQuantProd
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.tiles import token_tiles

Quantizer = RotorQuantMSE | RotorQuantProd


@dataclass(frozen=True)
class PackedSpan:
    """A run of `tokens` quantised keys or values, sharing the store's memory.

    Attributes:
        rows: views (batch, heads, tokens, ...) of the store's tensors: "codes", "scale" and for
            `RotorQuantProd` also "signs" and "residual_norm".
        statistics: equalisation and centring of these vectors.
        quantizer: what coded them.
    """

    rows: dict[str, Tensor]
    statistics: ChannelStatistics
    quantizer: Quantizer

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, tokens = self.rows["scale"].shape
        return batch, heads, tokens, self.quantizer.d

    @property
    def terms(self) -> tuple[Term, ...]:
        """The parts of which the vectors are sums."""
        return _terms(self.quantizer, self.rows["scale"].device)

    def fold(self, queries: Tensor) -> FoldedQueries:
        """Take equalisation, centre, rotation and the order of the numbers into the queries.

        Args:
            queries: (batch, heads, n, d) float32.
        """
        mean = self.statistics.mean
        weighted = queries * self.statistics.weight
        return FoldedQueries(
            [weighted @ term.basis.T for term in self.terms],
            None if mean is None else queries @ mean.mT,
        )

    def unfold(self, sums: list[Tensor]) -> Tensor:
        """Vectors from their numbers, or averages of vectors from averages of their numbers.

        Args:
            sums: for each term scale * numbers, (batch, heads, n, size) float32, or averages of
                these (over any tokens, with weights that sum to 1).

        Returns:
            (batch, heads, n, d) float32.
        """
        parts = [numbers @ term.basis for numbers, term in zip(sums, self.terms, strict=True)]
        return self.statistics.denormalize(functools.reduce(torch.add, parts))

    def look_up(self, tokens: slice) -> list[tuple[Tensor, Tensor]]:
        """For each term the numbers (batch, heads, n, size) and scales (batch, heads, n), float32.

        The numbers are not scaled: scores and weights are fewer.
        """
        found = []
        for term in self.terms:
            numbers = term.table.look_up(self.rows[term.codes][:, :, tokens])
            found.append((numbers, self.rows[term.scale][:, :, tokens].float()))
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
            (q @ numbers.mT).mul_(scale.unsqueeze(2))
            for q, (numbers, scale) in zip(folded.terms, self.look_up(tokens), strict=True)
        ]
        if folded.offset is not None:
            parts.append(folded.offset)
        return functools.reduce(Tensor.add_, parts)

    def weighted_sums(self, weights: Tensor, tokens: slice) -> list[Tensor]:
        """Sums over some tokens of weight * scale * numbers, for `unfold`.

        Args:
            weights: (batch, heads, n, tokens) float32.

        Returns:
            For each term (batch, heads, n, size).
        """
        return [(weights * scale.unsqueeze(2)) @ x for x, scale in self.look_up(tokens)]


class FoldedQueries(NamedTuple):
    """Queries ready for looked-up numbers: <q, x> = offset + sum_terms <term, numbers> scale.

    `terms`: (batch, heads, n, size) each; `offset`: <q, mean>, (batch, heads, n, 1), or None.
    """

    terms: list[Tensor]
    offset: Tensor | None


@dataclass(frozen=True)
class Term:
    """One of the parts of which reconstructed vectors are sums: scale * (numbers @ basis).

    Attributes:
        codes: name of the rows that hold the codes.
        scale: name of the rows that hold the scales.
        table: the numbers that the codes stand for, and their order.
        basis: (size, d) float32.
    """

    codes: str
    scale: str
    table: CodeTable
    basis: Tensor


@functools.lru_cache(maxsize=64)
def _terms(quantizer: Quantizer, device: torch.device) -> tuple[Term, ...]:
    """Stage 1, and for `RotorQuantProd` the residual, as its signs estimate it."""
    mse = stage_one(quantizer)
    with torch.inference_mode(False), torch.no_grad():  # they may be needed for a gradient
        rotation = quantizer.rotation.matrix().to(device)
        codes = CodeTable.of(mse.centroids.to(device), mse.bits, mse.d)
        first = Term("codes", "scale", codes, _in_order(rotation, codes.order))
        if isinstance(quantizer, RotorQuantMSE):
            return (first,)
        signs = CodeTable.of(torch.tensor([-1.0, 1.0], device=device), 1, quantizer.qjl_dim)
        basis = _in_order(quantizer.correction.to(device) @ rotation, signs.order)
        return first, Term("signs", "residual_norm", signs, basis)


def _in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """The rows of a matrix in this order, zero for padding."""
    return torch.cat((matrix, torch.zeros_like(matrix[:1])))[order]


def stage_one(quantizer: Quantizer) -> RotorQuantMSE:
    """What codes the vectors; of `RotorQuantProd` the first of two stages."""
    return quantizer if isinstance(quantizer, RotorQuantMSE) else quantizer.mse


def projections(quantizer: Quantizer) -> int:
    """How many signs a vector has: m of `RotorQuantProd`, else 0."""
    return 0 if isinstance(quantizer, RotorQuantMSE) else quantizer.qjl_dim


def encode(quantizer: Quantizer, u: Tensor) -> dict[str, Tensor]:
    """Quantise vectors to the rows that the store keeps."""
    if isinstance(quantizer, RotorQuantMSE):
        _, codes = quantizer.quantize(u)
        return dict(cast(dict[str, Tensor], codes))
    prod = quantizer.quantize(u)
    return {
        **cast(dict[str, Tensor], prod["mse_indices"]),
        "signs": prod["qjl_signs"],
        "residual_norm": prod["residual_norm"],
    }
