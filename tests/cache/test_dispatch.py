"""Models whose weights lie elsewhere than where they are used: accelerate's dispatch and hooks.

One device computes here, the CPU; weights are brought to it from the CPU or the disk for each use,
and are placeholders on the device "meta" in between.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from rotorquant_hf import DecodeGraph, RotorQuantCache, allocate_bits, calibrate
from rotorquant_hf.placement import input_device
from tests.helpers.models import build, feed, prompt, same, snapshot

SMALL = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2, "statistics_length": 16}
CPU = torch.device("cpu")


def by_device_map(placed: dict[str, str]) -> Callable[[Any, Path], Any]:
    """A model that is saved, and loaded with a device map."""

    def dispatched(model: Any, folder: Path) -> Any:
        model.save_pretrained(folder / "model")
        options = {"device_map": placed, "offload_folder": folder / "offloaded"}
        return AutoModelForCausalLM.from_pretrained(folder / "model", **options).eval()

    return dispatched


_REST = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
DISPATCHED: dict[str, Callable[[Any, Path], Any]] = {
    "offloaded to the CPU": lambda model, folder: accelerate.cpu_offload(copy.deepcopy(model)),
    "offloaded to the disk": lambda model, folder: accelerate.disk_offload(
        copy.deepcopy(model), folder / "offloaded", execution_device=CPU, offload_buffers=True
    ),
    "a layer on the disk": by_device_map(
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", **_REST}
    ),
    "the first weights on the disk": by_device_map(
        {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", **_REST}
    ),
}


@pytest.fixture(scope="module")
def whole() -> Any:
    return build("llama")


@pytest.fixture(scope="module", params=DISPATCHED)
def dispatched(request, whole, tmp_path_factory) -> Any:
    found = DISPATCHED[request.param](whole, tmp_path_factory.mktemp("dispatched"))
    assert any(x.device.type == "meta" for x in found.parameters())
    return found


def generated(model: Any) -> tuple[torch.Tensor, RotorQuantCache]:
    """A text, greedy, and its cache."""
    ids = prompt(2, 60)
    cache = RotorQuantCache("k4v4", config=model.config, **SMALL)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, past_key_values=cache, **options), cache


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
def test_the_text_and_the_cache_are_those_of_the_whole_model(whole, dispatched, attention) -> None:
    for each in (whole, dispatched):
        each.set_attn_implementation(attention)
    (expected, one), (text, cache) = generated(whole), generated(dispatched)
    assert torch.equal(text, expected)
    assert cache.memory().packed_numbers == one.memory().packed_numbers > 0
    for layer, other in zip(cache.layers, one.layers, strict=True):
        states = layer.store.state()
        assert {x.device for x in (*states.values(), *layer.sinks, *layer.recent)} == {CPU}
        assert same(snapshot(states), snapshot(other.store.state()))
    for each in (whole, dispatched):
        each.set_attn_implementation("sdpa")


def test_statistics_and_bits_are_taken_where_the_model_computes(whole, dispatched) -> None:
    assert input_device(dispatched) == CPU
    settings = RotorQuantCache("k3v3", **SMALL).settings
    ids = prompt(3, 100)
    found, expected = (calibrate(x, ids, settings) for x in (dispatched, whole))
    for index, pair in expected.layers.items():
        for side, other in zip(found.layers[index], pair, strict=True):
            assert same(snapshot(side.tensors()), snapshot(other.tensors()))
    assert allocate_bits(dispatched, ids[:1], settings) == allocate_bits(whole, ids[:1], settings)


def test_what_no_graph_replays_is_refused(dispatched) -> None:
    _, cache = generated(dispatched)
    before = snapshot(cache.layers)
    with pytest.raises(ValueError, match=r"offloaded, .* device_map=|is on cpu; CUDA graphs need"):
        DecodeGraph(dispatched, cache)
    assert same(snapshot(cache.layers), before)


def test_offloaded_weights_are_named_where_a_graph_is_refused(whole) -> None:
    with pytest.raises(ValueError, match=r"weights are offloaded, .* with device_map=\{'': 0\}"):
        DecodeGraph(accelerate.cpu_offload(copy.deepcopy(whole)), RotorQuantCache())


@pytest.mark.parametrize(("name", "tokens"), [("llama", 40), ("llama", 12), ("gemma3", 13)])
def test_a_layer_goes_where_its_tokens_are(name, tokens) -> None:
    """As those of a file that was loaded for a model on several devices."""
    model = build(name)
    cache = RotorQuantCache(config=model.config, exact_layers=(0,), **SMALL)
    feed(model, cache, prompt(2, tokens), (tokens,))
    for index, layer in enumerate(cache.layers):
        new = torch.empty(2, 2, 1, layer.keys.shape[-1], device="meta")
        keys, values = cache.update(new, new, index)
        assert keys.device == values.device == new.device
        assert layer.get_seq_length() == tokens + 1
        if index:
            assert (len(layer.store) > 0) == (tokens == 40)
            held = [*layer.store.state().values(), *layer.sinks, *layer.recent]
            ropes = layer.rope, layer.store.keys.rope
            assert {x.device for x in (*held, *(x.frequencies for x in ropes))} == {new.device}
