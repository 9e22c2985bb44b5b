"""Rows with padding keep their own first tokens in full precision, whatever happens to a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention.stand_ins import StandIns
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from tests.helpers.models import build, prompt

SETTINGS = RotorQuantConfig(
    key_bits=2, value_bits=2, residual_length=8, block_length=8, statistics_length=32
)
PADDING = [0, 3, 17]
PROMPT, TOTAL = 60, 90


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(2, 3, 2, TOTAL, 32, generator=torch.Generator().manual_seed(0))


def mask_of(n: int, tokens: int, padding: list[int] = PADDING) -> torch.Tensor:
    queries, keys = torch.arange(tokens - n, tokens)[:, None], torch.arange(tokens)
    return torch.stack([(keys <= queries) & (keys >= p) for p in padding])[:, None]


def feed(layer: RotorQuantLayer, states: torch.Tensor, n: int) -> torch.Tensor:
    """The next n tokens through attention, with grouped queries; its output."""
    start = layer.get_seq_length() if layer.is_initialized else 0
    keys, values = layer.update(*states[:, :, :, start : start + n])
    query = torch.randn(3, 4, n, 32, generator=torch.Generator().manual_seed(start))
    mask = mask_of(n, start + n)
    return functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)


def exact(layer: RotorQuantLayer, states: torch.Tensor, rows: list[int]) -> None:
    """The first four tokens of every row of its own are as they came; later ones are not."""
    for held, came in zip((layer.keys, layer.values), states, strict=True):
        dense = held.materialize()
        for row, of in enumerate(rows):
            p = PADDING[of]
            assert torch.equal(dense[row, :, p : p + 4], came[of, :, p : p + 4])
            assert not torch.equal(dense[row, :, p + 4], came[of, :, p + 4])


@pytest.mark.parametrize("steps", [(PROMPT,), (20, 10, PROMPT - 30), (20, *[1] * (PROMPT - 20))])
@torch.no_grad()
def test_first_tokens_of_every_row_are_exact(states, steps):
    layer = RotorQuantLayer(SETTINGS)
    for n in steps:
        feed(layer, states, n)
    assert len(layer.store)
    exact(layer, states, [0, 1, 2])
    feed(layer, states, 5)
    layer.crop(-3)
    exact(layer, states, [0, 1, 2])
    fork = copy.copy(layer)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    exact(layer, states, [2, 0, 1])
    layer.batch_select_indices(torch.tensor([0, 2]))
    exact(layer, states, [2, 1])
    layer.batch_repeat_interleave(2)
    exact(layer, states, [2, 2, 1, 1])
    exact(fork, states, [0, 1, 2])


@torch.no_grad()
def test_attention_reads_them_and_nothing_twice(states):
    """Over packed codes as over the materialised tensors, which are in the order of the tokens."""
    layer = RotorQuantLayer(SETTINGS)
    feed(layer, states, PROMPT)
    for n in (1, 3):
        keys, values = layer.update(*states[:, :, :, PROMPT : PROMPT + n])
        query, mask = torch.randn(3, 4, n, 32), mask_of(n, PROMPT + n)
        found, expected = (
            functional.scaled_dot_product_attention(query, k, v, mask, enable_gqa=True)
            for k, v in ((keys, values), (keys.materialize(), values.materialize()))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        layer.crop(-n)


@torch.no_grad()
def test_the_kernels_read_them_too(states):
    on_torch, on_kernels = RotorQuantLayer(SETTINGS), RotorQuantLayer(SETTINGS)
    outputs: list[list[torch.Tensor]] = []
    for layer, name in ((on_torch, "torch"), (on_kernels, "triton")):
        feed(layer, states, PROMPT)  # the same codes
        with backend(name):
            outputs.append([feed(layer, states, n) for n in (1, 2)])
    assert on_kernels.ring is not None
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    exact(on_kernels, states, [0, 1, 2])


@torch.no_grad()
def test_a_crop_into_the_padding_leaves_a_layer_that_works(states):
    layer = RotorQuantLayer(SETTINGS)
    feed(layer, states, PROMPT)
    layer.crop(-(PROMPT - 18))  # of the last row one token of its own is left
    # The other rows keep theirs.
    assert layer.stand_ins.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 3], [17, 1, 2, 3]]
    feed(layer, states, 30)
    for held, came in zip((layer.keys, layer.values), states, strict=True):
        dense = held.materialize()
        assert torch.equal(dense[:, :, -8:], came[:, :, 40:48])
        assert torch.equal(dense[0, :, :4], came[0, :, :4])
        assert torch.equal(dense[1, :, 4:7], came[1, :, 4:7])
    layer.crop(-(layer.get_seq_length() - 3))  # into the sinks
    assert layer.stand_ins is None


@pytest.mark.parametrize("n", [2, 6, 36])
def test_what_a_sliding_window_hides_is_no_padding(n):
    """A cache that does not know that layers slide (no config) gets such masks, too."""
    tokens, window = 36, 24
    queries, keys = torch.arange(tokens - n, tokens)[:, None], torch.arange(tokens)
    mask = ((keys <= queries) & (keys > queries - window))[None, None]
    assert not StandIns.of(mask, 2, 4).needed()
    padded = mask & (keys >= 14)  # within the window of every query that is not padding
    assert StandIns.of(padded, 2, 4).tokens.tolist() == [[14, 15, 16, 17]] * 2


def test_a_prompt_read_in_inference_mode_goes_on_outside_of_it():
    model, ids = build("llama"), prompt(2, 61)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = RotorQuantCache(SETTINGS, config=model.config)
        with mode():
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        assert cache.layers[0].stand_ins is not None
        logits.append(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_file_has_them(states, tmp_path):
    cache = RotorQuantCache(SETTINGS)
    keys, values = cache.update(*states[:, :, :, :PROMPT], 0)
    query = torch.randn(3, 2, PROMPT, 32)
    functional.scaled_dot_product_attention(query, keys, values, mask_of(PROMPT, PROMPT))
    cache.save(tmp_path / "cache.safetensors")
    loaded = RotorQuantCache.load(tmp_path / "cache.safetensors")
    exact(loaded.layers[0], states, [0, 1, 2])
    feed(cache.layers[0], states, 1)
    assert torch.equal(loaded.layers[0].stand_ins.tokens, cache.layers[0].stand_ins.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
def test_a_padded_row_is_as_near_as_alone(attention):
    """The first tokens of a model matter most: quantised, the row's error would be far larger."""
    model, ids = build("llama", attention), prompt(1, 60)
    padded = torch.cat((torch.zeros(1, 24, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(84) >= 24).long()[None]
    cache = RotorQuantCache(SETTINGS, config=model.config)
    with torch.no_grad():
        model(
            padded,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
        )
        alone = RotorQuantCache(SETTINGS, config=model.config)
        model(ids, past_key_values=alone)
    for layer, single in zip(cache.layers, alone.layers, strict=True):
        assert layer.stand_ins.tokens.tolist() == [[24, 25, 26, 27]]
        for side in (0, 1):
            torch.testing.assert_close(layer.sinks[side], single.sinks[side], rtol=0, atol=1e-5)
