"""The cache in many architectures, with `DynamicCache` as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer, RotorQuantHybridSlidingLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.quant.packing import packed_bytes
from tests.helpers.models import (
    MODELS,
    SLIDING_WINDOW,
    build,
    feed,
    prompt,
    relative_error,
    same,
    snapshot,
    storages,
)

SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4}
ALL = list(MODELS)
COMPRESSED = [name for name in ALL if set(MODELS[name].layers) != {"own"}]
SLIDING = [name for name in ALL if MODELS[name].sliding]
UNIFORM = [name for name in ALL if MODELS[name].uniform]
WITHOUT_STATES = [name for name in ALL if not MODELS[name].stateful]
TWO_KERNELS = [name for name in COMPRESSED if len(MODELS[name].attention) > 1]

CHUNKS = {
    "at once": (60,),
    "one by one": (1,) * 32,
    "sevens": (7,) * 8,
    "prompt then steps": (41,) + (1,) * 8,
    "over the window at once": (5, 30, 1, 2, 22),
}


def states_of(layer: Any) -> list[Tensor]:
    """The recurrent and convolution states of a layer."""
    states = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [x for found in states for x in found.values() if x is not None]


def is_compressed(layer: Any) -> bool:
    """Whether the layer is one of this package."""
    return isinstance(layer, RotorQuantLayer)


# --- which layers are compressed ---


@pytest.mark.parametrize("name", ALL)
def test_attention_layers_are_compressed_and_others_are_those_of_transformers(name):
    config = build(name).config
    types = [type(layer) for layer in RotorQuantCache(config=config).layers]
    instead = {
        DynamicLayer: RotorQuantLayer,
        DynamicSlidingWindowLayer: RotorQuantSlidingLayer,
        LinearAttentionAndFullAttentionLayer: RotorQuantHybridLayer,
        LinearAttentionAndSlidingWindowAttentionLayer: RotorQuantHybridSlidingLayer,
    }
    oracle = [type(layer) for layer in DynamicCache(config=config).layers]
    assert types == [instead.get(kind, kind) for kind in oracle]

    kinds = {
        RotorQuantLayer: "full",
        RotorQuantSlidingLayer: "sliding",
        RotorQuantHybridLayer: "hybrid",
        RotorQuantHybridSlidingLayer: "hybrid_sliding",
    }
    held = [kinds.get(kind, "own") for kind in types if kind.__name__ != "DummyLayer"]
    assert tuple(held) == MODELS[name].layers


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_have_the_window_of_the_model(name):
    layers = RotorQuantCache(config=build(name).config).layers
    windows = {layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)}
    assert windows == {SLIDING_WINDOW}


# --- with a window longer than the text, nothing is lost ---


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_dynamic_cache_while_nothing_is_packed(name, chunks):
    model, ids = build(name), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, residual_length=1000, statistics_length=0)
    logits = feed(model, cache, ids, chunks)
    oracle = DynamicCache(config=model.config)
    torch.testing.assert_close(logits, feed(model, oracle, ids, chunks), rtol=0, atol=1e-6)
    assert cache.memory().packed_numbers == 0
    assert cache.get_seq_length() == oracle.get_seq_length() == sum(chunks)


@pytest.mark.parametrize("name", WITHOUT_STATES)
def test_without_a_config_the_logits_are_those_of_dynamic_cache_too(name):
    model, ids, chunks = build(name), prompt(2, 60), CHUNKS["prompt then steps"]
    logits = feed(model, RotorQuantCache(residual_length=1000, statistics_length=0), ids, chunks)
    assert torch.equal(logits, feed(model, DynamicCache(), ids, chunks))


@pytest.mark.parametrize("name", ALL)
def test_padded_rows_see_what_they_see_with_dynamic_cache(name):
    model, ids, chunks = build(name), prompt(3, 60), (40, 1, 1, 6, 1)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :3] = 0
    ids[mask == 0] = 0
    exact = RotorQuantCache(config=model.config, residual_length=1000, statistics_length=0)
    reference = feed(model, DynamicCache(config=model.config), ids, chunks, mask)
    logits = feed(model, exact, ids, chunks, mask)
    seen = mask[:, : sum(chunks)].bool()
    torch.testing.assert_close(logits[seen], reference[seen], rtol=0, atol=1e-6)

    packed = RotorQuantCache("k8v8", config=model.config, **SMALL)
    logits = feed(model, packed, ids, chunks, mask)
    assert relative_error(logits[seen], reference[seen]) < 0.03


@pytest.mark.parametrize("name", ALL)
def test_beam_search_is_that_of_dynamic_cache_while_nothing_is_packed(name):
    model, ids = build(name), prompt(2, 30)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    cache = RotorQuantCache(config=model.config, residual_length=1000, statistics_length=0)
    beams = model.generate(ids, past_key_values=cache, **options)
    oracle = DynamicCache(config=model.config)
    assert torch.equal(beams, model.generate(ids, past_key_values=oracle, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3", "falcon_h1", "inkling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(name, dtype):
    model, ids, chunks = build(name, dtype=dtype), prompt(2, 60), CHUNKS["prompt then steps"]
    reference = feed(model, DynamicCache(config=model.config), ids, chunks)
    exact = RotorQuantCache(config=model.config, residual_length=1000, statistics_length=0)
    assert torch.equal(feed(model, exact, ids, chunks), reference)

    cache = RotorQuantCache("k8v8", config=model.config, **SMALL)
    logits = feed(model, cache, ids, chunks)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    assert 0 < relative_error(logits.float(), reference.float()) < 0.03


# --- generation with packed tokens ---


@pytest.mark.parametrize("name", COMPRESSED)
def test_generation_reads_the_packed_tokens(name):
    """Random models nearly tie, so that what is compared is logits along the generated text."""
    model, prompted, new = build(name), 20, 40
    cache = RotorQuantCache("k8v8", config=model.config, **SMALL)
    out = model.generate(
        prompt(2, prompted),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (2, prompted + new)
    assert cache.memory().packed_numbers > 0

    ids, steps = out.sequences, (prompted,) + (1,) * (new - 1)
    reference = feed(model, DynamicCache(config=model.config), ids, steps)[:, prompted - 1 :]
    eight_bits = relative_error(torch.stack(out.logits, dim=1), reference)
    assert eight_bits < (0.06 if name == "gemma4" else 0.03)  # whose scores are not scaled down

    errors = {}
    for bits in (4, 2):
        settings = {"key_bits": bits, "value_bits": bits} | SMALL
        fewer = RotorQuantCache(config=model.config, **settings)
        logits = feed(model, fewer, ids, steps)[:, prompted - 1 :]
        errors[bits] = relative_error(logits, reference)
    # 4 bits have some 16 times the error of 8, 2 bits some 4 times that of 4, up to about 1.
    assert errors[4] > 5 * eight_bits
    assert errors[2] > min(2 * errors[4], 0.8)


@pytest.mark.parametrize("part", ["key_bits", "value_bits"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "lfm2", "falcon_h1"])
def test_keys_and_values_are_both_read_from_the_packed_store(name, part):
    model, ids, chunks = build(name), prompt(2, 60), CHUNKS["prompt then steps"]
    reference = feed(model, DynamicCache(config=model.config), ids, chunks)
    errors = {}
    for bits in (2, 8):
        settings = {"key_bits": 8, "value_bits": 8, part: bits} | SMALL
        cache = RotorQuantCache(config=model.config, **settings)
        errors[bits] = relative_error(feed(model, cache, ids, chunks), reference)
    assert errors[2] > 3 * errors[8]


@pytest.mark.parametrize("name", UNIFORM)
def test_only_rope_needs_the_config_where_all_layers_have_full_attention(name):
    model, ids, chunks = build(name), prompt(2, 60), (30, 1, 12, 1, 5)
    settings = SMALL | {"rope_layout": "none"}
    with_config = RotorQuantCache(config=model.config, **settings)
    without = RotorQuantCache(**settings)
    logits = feed(model, with_config, ids, chunks)
    assert torch.equal(logits, feed(model, without, ids, chunks))
    assert same(snapshot(with_config.layers), snapshot(without.layers))


@pytest.mark.parametrize("name", TWO_KERNELS)
def test_attention_implementations_agree(name):
    ids, chunks = prompt(2, 60), (40, 1, 1, 6, 1, 1)
    logits = []
    for attention in MODELS[name].attention:
        model = build(name, attention)
        # Not all show their queries.
        cache = RotorQuantCache("k4v4", config=model.config, query_aware=False, **SMALL)
        logits.append(feed(model, cache, ids, chunks))
        assert cache.memory().packed_numbers > 0
    # Not equal: rounding may move a number into the next bin.
    assert relative_error(*logits) < 2e-3


# --- sliding windows ---


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_sliding_layers_keep_what_later_tokens_see(name, chunks):
    model, ids = build(name), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    oracle = DynamicCache(config=model.config)
    feed(model, cache, ids, chunks)
    feed(model, oracle, ids, chunks)
    for layer, expected in zip(cache.layers, oracle.layers, strict=True):
        if is_compressed(layer):
            assert layer.keys.shape == expected.keys.shape
            assert layer.values.shape == expected.values.shape
        if getattr(layer, "is_sliding", False):
            assert layer.keys.shape[2] == SLIDING_WINDOW - 1
            assert layer.recent[0].shape[2] < SMALL["residual_length"] + SMALL["block_length"]
            states = sum(x.numel() for x in states_of(layer))
            assert layer.numbers()[0] == layer.keys.numel() + layer.values.numel() + states


@pytest.mark.parametrize("name", SLIDING)
def test_the_memory_of_sliding_layers_stays_bounded(name):
    model, ids = build(name), prompt(1, 120)
    cache = RotorQuantCache(config=model.config, **SMALL)
    sizes = {}
    for start in range(0, 120, 5):
        feed(model, cache, ids[:, start : start + 5], (5,))
        sliding = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
        sizes[start + 5] = sum(storages(sliding).values())
    assert max(sizes.values()) <= 1.3 * max(sizes[n] for n in (25, 30, 35, 40))


@pytest.mark.parametrize("name", [name for name in SLIDING if name in WITHOUT_STATES])
def test_without_a_config_nothing_leaves_the_window(name):
    model, ids = build(name), prompt(1, 120)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (5,) * 24)
    everything = RotorQuantCache(**SMALL)
    feed(model, everything, ids, (5,) * 24)
    assert everything.memory().numbers > cache.memory().numbers
    assert everything.layers[0].keys.shape[2] == 120


# --- memory ---


@pytest.mark.parametrize("name", COMPRESSED)
def test_memory_by_layer_is_that_of_the_tensors(name):
    rows, bits, itemsize, scale = 2, 3, 4, 2
    model = build(name)
    cache = RotorQuantCache("k3v3", config=model.config, **SMALL)
    ids, start = prompt(rows, 60), 0
    for count in (37, 1, 1, 15, 1):
        feed(model, cache, ids[:, start : start + count], (count,))
        start += count
        for layer in filter(is_compressed, cache.layers):  # no view of what is no longer held
            assert sum(layer.nbytes().values()) == sum(storages(layer).values())
    report = cache.memory()
    assert report.tokens == 55

    parts, packed_numbers = {}, 0
    for layer in cache.layers:
        if not is_compressed(layer):
            continue
        sizes = layer.nbytes()
        packed = len(layer.store)
        window, sinks = layer.recent[0].shape[2], layer.sinks[0].shape[2]
        assert packed > 0
        assert packed + window + sinks == layer.keys.shape[2]
        vectors = rows * layer.keys.shape[1]
        for side, states in (("key", layer.keys), ("value", layer.values)):
            d = states.shape[3]
            assert sizes[f"{side}_codes"] == vectors * packed * packed_bytes(d, bits)
            assert sizes[f"{side}_scale"] == vectors * packed * scale
        d = layer.keys.shape[3] + layer.values.shape[3]
        # With room for the tokens to come while the library decodes.
        slots = SMALL["residual_length"] + SMALL["block_length"] - 1
        slots = window if layer.buffer is None else slots
        assert sizes["window"] == vectors * slots * d * itemsize
        assert sizes["sinks"] == vectors * sinks * d * itemsize
        packed_numbers += vectors * packed * d
        parts = {part: parts.get(part, 0) + size for part, size in sizes.items()}
    assert report.packed_numbers == packed_numbers
    ropes = [x.rope.frequencies for x in cache.layers if is_compressed(x) and x.rope]
    shared = sum(x.nbytes for x in ropes) - sum({id(x): x.nbytes for x in ropes}.values())
    parts["statistics"] -= shared  # layers of a type have the same
    own = [layer for layer in cache.layers if not is_compressed(layer)]
    states = [states_of(layer) for layer in cache.layers if is_compressed(layer)]
    parts["exact_layers"] = sum(storages([*own, *states]).values())
    assert {part: report.parts[part] for part in parts} == parts
    assert report.total_bytes == sum(parts.values()) + report.parts["tables"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "falcon_h1", "zaya"])
def test_exact_layers_are_left_to_transformers(name):
    model, ids, chunks = build(name), prompt(2, 60), CHUNKS["prompt then steps"]
    exact = tuple(i for i, kind in enumerate(MODELS[name].layers) if kind != "own")
    all_exact = RotorQuantCache(config=model.config, exact_layers=exact, **SMALL)
    oracle = DynamicCache(config=model.config)
    assert [type(a) for a in all_exact.layers] == [type(b) for b in oracle.layers]
    assert torch.equal(feed(model, all_exact, ids, chunks), feed(model, oracle, ids, chunks))

    last = RotorQuantCache(config=model.config, exact_layers=(-1,), **SMALL)
    kept = [not is_compressed(layer) for layer in last.layers]
    assert kept == [
        kind == "own" or i == len(kept) - 1 for i, kind in enumerate(MODELS[name].layers)
    ]


def test_exact_layers_counted_from_the_first_need_no_config():
    model = build("llama")
    cache = RotorQuantCache(exact_layers=(1,), **SMALL)
    feed(model, cache, prompt(2, 60), (40, 1))
    assert [is_compressed(layer) for layer in cache.layers] == [True, False]


def test_latent_attention_has_keys_and_values_of_different_sizes():
    model = build("deepseek_v3")
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, prompt(2, 60), (40, 1))
    layer = cache.layers[0]
    assert layer.keys.shape[3] != layer.values.shape[3]
    assert (layer.store.d_key, layer.store.d_value) == (layer.keys.shape[3], layer.values.shape[3])
