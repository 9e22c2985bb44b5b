"""Attention over packed codes in plain torch.

Sinks, packed tokens and recent tokens are read one after the other, each tile by tile with a
running softmax (Milakov and Gimelshein, arXiv:1805.02867), which leaves the largest score m, the
mass l = sum_t exp(s_t - m) and the average value a. Two of these are joined as

    M = max(m, m'),  w = l exp(m - M),  w' = l' exp(m' - M),  A = (w a + w' a') / (w + w').

No more than a tile of the history is ever decoded.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates
from rotorquant_hf.quant.packed import PackedSpan

# Elements of a tile of keys or values, and of its scores: 2 and 4 MiB in float32.
_TILE_ELEMENTS = 1 << 19
_MAX_SCORES = 1 << 20
_MIN_TILE = 32  # tokens, however many rows and heads there are

# The largest score over no tokens. Finite, so that differences are never inf - inf.
_NO_SCORE = torch.finfo(torch.float32).min


def attend_tiled(
    query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions
) -> Tensor:
    """softmax(scale q k^T + mask) v, computed in float32.

    Args:
        query: (batch, query heads, n, key dim); heads g k ... g k + g - 1 read kv head k.
        keys, values: the same tokens.
        options: the settings.

    Returns:
        (batch, query heads, n, value dim) in the query's dtype; zeros for a query that sees no
        token.
    """
    batch, query_heads, n, _ = query.shape
    _, heads, tokens, d = keys.shape
    groups, value_dim = query_heads // heads, values.shape[3]
    tile = max(_MIN_TILE, _TILE_ELEMENTS // (batch * heads * max(d, value_dim)))
    size = max(1, _MAX_SCORES // (batch * query_heads * tile))
    recent_keys, recent_values = keys.recent, values.recent
    out = query.new_empty(batch, query_heads, n, value_dim)
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            rules = ScoreRules(options, (batch, heads, groups, n, tokens), rows)
            q = query[:, :, rows].float() * options.scale
            q = q.unflatten(1, (heads, groups)).flatten(2, 3)
            seen = _start(q, value_dim, options.sink_logits)
            first = 0
            for part in (
                FullPrecisionPart(q, keys.sinks, values.sinks),
                PackedPart(q, keys.packed, values.packed),
                FullPrecisionPart(q, recent_keys, recent_values),
            ):
                if min(part.tokens, rules.end - first) > 0:
                    seen = seen.join(_read(q, part, first, rules, tile))
                first += part.tokens
            out[:, :, rows] = seen.average.unflatten(2, (groups, -1)).flatten(1, 2)
    return out


class _Summary(NamedTuple):
    """Attention of m queries per kv head over some tokens, float32.

    `peak`: the largest score, (batch, heads, m, 1). `mass`: the sum of exp(score - peak), of the
    same shape: 0 if no token is seen, else at least 1. `average`: of the values, (batch, heads,
    m, value dim).
    """

    peak: Tensor
    mass: Tensor
    average: Tensor

    def join(self, other: _Summary) -> _Summary:
        """Attention over the tokens of both."""
        peak = torch.maximum(self.peak, other.peak)
        ours = self.mass * (self.peak - peak).exp()
        theirs = other.mass * (other.peak - peak).exp()
        mass = ours + theirs
        average = (ours * self.average + theirs * other.average) / mass.clamp(min=1)
        return _Summary(peak, mass, average)


def _start(query: Tensor, value_dim: int, sink_logits: Tensor | None) -> _Summary:
    """Attention of queries (batch, heads, m, key dim) over the sink logits and no token."""
    average = query.new_zeros(*query.shape[:3], value_dim)
    peak = torch.full_like(average[..., :1], _NO_SCORE)
    if sink_logits is None:
        return _Summary(peak, torch.zeros_like(peak), average)
    # The m rows are those of the first query head of the group, then of the next.
    per_group = sink_logits.view(query.shape[1], -1, 1, 1)
    peak.unflatten(2, (per_group.shape[1], -1)).copy_(per_group)
    return _Summary(peak, torch.ones_like(peak), average)


def _read(query: Tensor, part: Part, first: int, rules: ScoreRules, tile: int) -> _Summary:
    """Attention over a part whose first token is token `first` of all; at least one is read."""
    end = min(part.tokens, rules.end - first)
    peak = torch.full_like(query[..., :1], _NO_SCORE)
    mass = torch.zeros_like(peak)
    sums: list[Tensor] = []
    for start in range(0, end, tile):
        tokens = slice(start, min(start + tile, end))
        scores = part.scores(tokens)  # (batch, heads, m, tile)
        scores = rules.apply(scores, slice(first + tokens.start, first + tokens.stop))
        # What was summed so far is in units of exp(peak); a higher peak shrinks it.
        highest = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))  # (batch, heads, m, 1)
        weights = scores.sub_(highest).exp_()
        shrink, peak = (peak - highest).exp_(), highest
        mass = mass * shrink + weights.sum(dim=-1, keepdim=True)
        new = part.sums(weights, tokens)
        sums = [a.mul_(shrink).add_(b) for a, b in zip(sums, new, strict=True)] if sums else new
    return _Summary(peak, mass, part.average([x / mass.clamp(min=1) for x in sums]))


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


class FullPrecisionPart:
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


class ScoreRules:
    """The rules for some rows (query tokens) of one attention call.

    Args:
        options: the settings of the call.
        shape: (batch, heads, groups, n, tokens) of all its scores, heads being kv heads.
        rows: which of the n query tokens.
    """

    def __init__(
        self, options: AttentionOptions, shape: tuple[int, int, int, int, int], rows: slice
    ) -> None:
        batch, heads, self._groups, n, tokens = shape
        self._softcap = options.softcap
        self._mask = options.mask
        if self._mask is not None:
            mask = self._mask.expand(batch, heads * self._groups, n, tokens)[:, :, rows]
            self._mask = mask.unflatten(1, (heads, self._groups))
        last = tokens - n + rows.start if options.causal else tokens  # that the first row sees
        self._first_unseen = last + 1  # each row sees one token more
        self.end = min(tokens, last + rows.stop - rows.start)  # of the tokens that some row sees

    def apply(self, scores: Tensor, tokens: slice) -> Tensor:
        """The scores that go into the softmax, -inf where a token is not seen.

        Args:
            scores: (batch, heads, groups * rows, tokens) float32; may be overwritten.
            tokens: which tokens.
        """
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_().mul_(self._softcap)
        scores = scores.unflatten(2, (self._groups, -1))
        if self._mask is not None:
            mask = self._mask[..., tokens]
            if mask.dtype == torch.bool:
                scores = torch.where(mask, scores, -math.inf)
            else:
                scores += mask
        if tokens.stop > self._first_unseen:
            unseen = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
            scores.masked_fill_(unseen.triu(self._first_unseen - tokens.start), -math.inf)
        return scores.flatten(2, 3)
