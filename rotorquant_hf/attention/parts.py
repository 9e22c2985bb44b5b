"""The exact and the packed tokens of an attention call, behind one interface."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rotorquant_hf.quant.packed import PackedSpan


class Part(Protocol):
    """A run of tokens that some queries read.

    Queries are (batch, heads, m, d), m being all query tokens of the query heads of one kv head.
    """

    @property
    def tokens(self) -> int:
        """How many tokens."""

    def scores(self, tokens: slice) -> Tensor:
        """Inner products of the queries with some tokens, (batch, heads, m, tokens) float32."""

    def sums(self, weights: Tensor, tokens: slice) -> list[Tensor]:
        """What `average` makes weighted sums of some tokens' values of; these may be added.

        Args:
            weights: (batch, heads, m, tokens) float32.
        """

    def average(self, sums: list[Tensor]) -> Tensor:
        """The values' average (batch, heads, m, value dim), if the weights sum to 1."""


class ExactPart:
    """Tokens stored as they are.

    Args:
        query: (batch, heads, m, key dim) float32.
        keys: (batch, heads, tokens, key dim). values: (batch, heads, tokens, value dim).
    """

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        self._query, self._keys, self._values = query, keys, values

    @property
    def tokens(self) -> int:
        return self._keys.shape[2]

    def scores(self, tokens: slice) -> Tensor:
        return self._query @ self._keys[:, :, tokens].float().mT

    def sums(self, weights: Tensor, tokens: slice) -> list[Tensor]:
        return [weights @ self._values[:, :, tokens].float()]

    def average(self, sums: list[Tensor]) -> Tensor:
        return sums[0]


class PackedPart:
    """Quantised tokens, read as codes: only the queries and the average are rotated.

    Args:
        query: (batch, heads, m, key dim) float32.
        keys, values: the same tokens.
    """

    def __init__(self, query: Tensor, keys: PackedSpan, values: PackedSpan) -> None:
        self._query, self._keys, self._values = keys.fold(query), keys, values

    @property
    def tokens(self) -> int:
        return self._keys.shape[2]

    def scores(self, tokens: slice) -> Tensor:
        return self._keys.inner_products(self._query, tokens)

    def sums(self, weights: Tensor, tokens: slice) -> list[Tensor]:
        return self._values.weighted_sums(weights, tokens)

    def average(self, sums: list[Tensor]) -> Tensor:
        return self._values.unfold(sums)
