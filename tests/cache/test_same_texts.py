"""Every way of writing, in every architecture, writes the tokens of `DynamicCache`.

In the lossless mode: tokens are packed and read as codes, and nothing is rounded. With codes of few
bits, random models write other texts, and a fault of logic would pass for rounding.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.layers.full import RotorQuantLayer
from tests.helpers.lossless import lossless
from tests.helpers.models import MODELS, build, feed, prompt, relative_error
from tests.helpers.writing import NEW, TAKES_BACK, WAYS, likeness

SMALL = {"residual_length": 4, "statistics_length": 0, "block_length": 2}
"""So few recent tokens that some of the tokens that are written are packed too."""

SAME = 1e-5
"""Relative error of logits, of which float32 leaves some 1e-7 (`helpers.models.relative_error`)."""

OWN_CLASSES = ("falcon", "falcon_multi_query", "gpt_neo", "gptj")
"""Their code has a class for each of its own implementations, and takes no other."""

RECURRENT = [name for name in MODELS if MODELS[name].stateful and name not in ("lfm2", "inkling")]
"""With a state that cannot be had back; convolutions alone can."""


def cases() -> list[tuple[str, str, str]]:
    """Architecture, attention and way."""
    return [
        (name, attention, way)
        for name, tiny in MODELS.items()
        for attention in (*tiny.attention, *(() if name in OWN_CLASSES else ("rotorquant",)))
        for way in WAYS
        if not (name in RECURRENT and way in TAKES_BACK)
    ]


@functools.cache
def by_dynamic_cache(name: str, way: str) -> tuple[Tensor, Tensor]:
    """Tokens and logits."""
    model = build(name)
    try:
        return WAYS[way](model, DynamicCache(config=model.config))[:2]
    except RuntimeError as error:  # Transformers 5.17 does not crop sliding windows rightly
        pytest.skip(f"DynamicCache of transformers {transformers.__version__}: {error}")


@pytest.mark.filterwarnings("ignore:query_aware")  # "eager" shows no queries
@pytest.mark.filterwarnings("ignore:.*does not use transformers.AttentionInterface")
@pytest.mark.parametrize(("name", "attention", "way"), cases())
def test_the_tokens_are_those_of_dynamic_cache(name: str, attention: str, way: str) -> None:
    tokens, logits = by_dynamic_cache(name, way)
    model = build(name, attention)
    with lossless():
        written = WAYS[way](model, RotorQuantCache(config=model.config, **SMALL))
        assert written.cache.memory().packed_numbers > 0
    assert torch.equal(written.tokens, tokens)
    assert relative_error(written.logits, logits) < SAME


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_state_is_not_taken_back(name: str) -> None:
    """`DynamicCache` leaves it as it is, and goes on with what it has read of the forgotten."""
    model = build(name)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, prompt(2, 40), (40,))
    cache.activate_past_recording()
    feed(model, cache, prompt(2, 5), (5,))
    with pytest.raises(RuntimeError, match="recurrent state"):
        cache.crop(-3)
    assert {layer.get_seq_length() for layer in cache.layers if hasattr(layer, "keys")} == {45}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("way", TAKES_BACK)
def test_the_ways_that_undo_tokens_do(name: str, way: str) -> None:
    """Proposals are taken, and others are cropped."""
    by_dynamic_cache(name, way)  # skips where that fails
    model = build(name)
    cache = DynamicCache(config=model.config)
    likeness(model)  # a copy of the model as it is
    with (
        mock.patch.object(cache, "crop", wraps=cache.crop) as crop,
        mock.patch.object(model, "forward", wraps=model.forward) as forward,
    ):
        WAYS[way](model, cache)
    assert min(call.args[0] for call in crop.call_args_list) < 0
    assert way == "crop" or forward.call_count < NEW


def test_beams_change_places() -> None:
    model = build("llama")
    cache = DynamicCache(config=model.config)
    with mock.patch.object(cache, "reorder_cache", wraps=cache.reorder_cache) as reorder:
        WAYS["beams"](model, cache)
    orders = [call.args[0].tolist() for call in reorder.call_args_list]
    assert any(order != sorted(order) for order in orders)


@pytest.mark.parametrize("part", ["packed", "recent"])
def test_a_part_that_beams_leave_behind_is_noticed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix fails where it should: here rows keep their places in one part of the cache."""
    model = build("llama")
    if part == "packed":
        monkeypatch.setattr("rotorquant_hf.store.kv_store.RotorQuantKVCache.map", lambda *_: None)
    else:
        monkeypatch.setattr(RotorQuantLayer, "_map", lambda layer, fn: layer.store.map(fn))
    with lossless():
        written = WAYS["beams"](model, RotorQuantCache(config=model.config, **SMALL))
    _, logits = by_dynamic_cache("llama", "beams")
    assert relative_error(written.logits, logits) > 10 * SAME
