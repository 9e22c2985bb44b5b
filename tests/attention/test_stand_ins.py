"""Stand-ins: what is in the places of sinks, and that attention does not notice."""

from __future__ import annotations

import pytest
import torch

from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.stand_ins import StandIns

SINKS, TOKENS = 4, 20


def left_padded(padding: list[int], n: int = TOKENS, tokens: int = TOKENS) -> torch.Tensor:
    """The boolean mask (rows, 1, n, tokens) of the last n queries of rows with so much padding."""
    queries = torch.arange(tokens - n, tokens)[:, None]
    keys = torch.arange(tokens)
    rows = [(keys <= queries) & (keys >= p) for p in padding]
    return torch.stack(rows)[:, None]


def added(mask: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.where(mask, 0.0, hidden)


@pytest.mark.parametrize("n", [1, 3, TOKENS])
@pytest.mark.parametrize("kind", ["boolean", "smallest", "infinite"])
def test_the_first_tokens_that_are_not_padding(n, kind):
    mask = left_padded([0, 2, 4, 9, 19], n)
    if kind != "boolean":
        mask = added(mask, torch.finfo().min if kind == "smallest" else -torch.inf)
    found = StandIns.of(mask, 5, SINKS)
    assert found.tokens.tolist() == [
        [0, 1, 2, 3],
        [4, 5, 2, 3],  # two places are padding; tokens 2 and 3 are sinks anyway
        [4, 5, 6, 7],
        [9, 10, 11, 12],
        [19, 1, 2, 3],  # of a row with one token of its own
    ]
    assert found.needed()
    assert torch.equal(found.within(20).tokens, found.tokens)
    fewer = found.tokens.clone()
    fewer[-1] = torch.arange(4)
    assert torch.equal(found.within(19).tokens, fewer)
    fewer[-2, 3] = 3
    assert torch.equal(found.within(12).tokens, fewer)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),  # the same for all rows
        torch.zeros(3, TOKENS),
        left_padded([0, 0, 0]),
        torch.randn(1, 2, 5, TOKENS),  # a bias
    ],
    ids=["causal", "all seen", "rows", "bias"],
)
def test_without_padding_nothing_stands_in(mask):
    found = StandIns.of(mask, 3, SINKS)
    assert torch.equal(found.tokens, torch.arange(SINKS).expand(3, -1))
    assert not found.needed()


def test_what_other_queries_read_is_no_padding():
    mask = left_padded([0, 6])
    mask[0, :, -1, :6] = False  # from the last query alone
    assert StandIns.of(mask, 2, SINKS).tokens.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["boolean", "added", "by head"])
def test_attention_over_places_is_attention_over_tokens(n, kind):
    """The same keys and values are seen, in another order."""
    torch.manual_seed(0)
    padding = [0, 1, 4, 11]
    keys, values = torch.randn(2, 4, 2, TOKENS, 8, dtype=torch.float64)
    query = torch.randn(4, 2, n, 8, dtype=torch.float64)
    mask = left_padded(padding, n)
    if kind == "added":
        mask = added(mask, -torch.inf).double() + torch.randn(4, 1, n, TOKENS)
    elif kind == "by head":
        mask = mask & (torch.rand(4, 2, n, TOKENS) > 0.3)
        mask[..., -1] = True
    expected = attention_reference(query, keys, values, AttentionOptions(0.3, mask))
    found = StandIns.of(left_padded(padding, n), 4, SINKS)
    moved = []
    for states in (keys, values):
        sinks = found.placed(states)
        wrong = states.clone()
        wrong.scatter_(2, found._like(states), 100.0)  # where they are, nobody reads
        wrong[:, :, :SINKS] = sinks
        moved.append(wrong)
        wrong = wrong.clone()
        wrong[:, :, :SINKS] = torch.nan
        found.put_back(wrong, sinks)
        for row, p in enumerate(padding):
            assert torch.equal(wrong[row, :, p:], states[row, :, p:])
    masked = found.masked(mask, TOKENS)
    assert masked.dtype == mask.dtype
    result = attention_reference(query, *moved, AttentionOptions(0.3, masked))
    torch.testing.assert_close(result, expected)
