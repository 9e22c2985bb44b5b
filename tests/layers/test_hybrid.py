"""Hybrid layers: the attention part is packed, and the recurrent states follow along."""

import copy

import pytest
import torch
from transformers import DynamicCache

from rotorquant_hf import DecodeGraph, RotorQuantCache, RotorQuantConfig, serialization
from rotorquant_hf.backend import backend
from rotorquant_hf.calibration import shape_of
from rotorquant_hf.layers import RotorQuantHybridLayer, RotorQuantHybridSlidingLayer
from tests.helpers import cuda_graph
from tests.helpers.models import MODELS, build, feed, prompt, relative_error, same, snapshot

SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4}
EXACT = {"residual_length": 1000, "statistics_length": 0}
HYBRID = ["falcon_h1", "zamba2", "zaya", "inkling"]
RECURRENT = ["falcon_h1", "zamba2", "zaya"]
WITHOUT_OWN = [name for name in HYBRID if "own" not in MODELS[name].layers]
"""Layers of states alone are Transformers', which cannot repeat or select rows."""


def cache_of(name, **options):
    return RotorQuantCache("k8v8", config=build(name).config, **SMALL | options)


def hybrid_layers(cache):
    return [x for x in cache.layers if isinstance(x, RotorQuantHybridLayer)]


def conv_layer(kind, **options):
    """A layer that has read 20 tokens, recording them, and a function that reads more."""
    config = RotorQuantConfig(**SMALL | options)
    layer = (
        RotorQuantHybridLayer(config)
        if kind == "full"
        else RotorQuantHybridSlidingLayer(config, 12)
    )
    generator = torch.Generator().manual_seed(0)

    def read(tokens):
        layer.update_conv_state(torch.randn(2, 6, tokens, generator=generator), conv_kernel_size=3)
        layer.update(*torch.randn(2, 2, 2, tokens, 16, generator=generator))

    layer.activate_past_recording()
    read(20)
    return layer, read


# --- generation ---


@pytest.mark.parametrize("name", HYBRID)
def test_while_nothing_is_packed_two_turns_are_those_of_dynamic_cache(name):
    model, ids = build(name), prompt(2, 20)
    sampling = {"do_sample": True, "top_k": 20}
    for options in ({"do_sample": False}, sampling, {"do_sample": False, "num_beams": 3}):
        texts = []
        for cache in (cache_of(name, **EXACT), DynamicCache(config=model.config)):
            torch.manual_seed(1)
            first = model.generate(ids, past_key_values=cache, max_new_tokens=8, **options)
            if "num_beams" in options:  # leaves a cache of all beams
                texts.append(first)
                continue
            longer = torch.cat((first, prompt(2, 5, seed=3)), dim=1)
            texts.append(model.generate(longer, past_key_values=cache, max_new_tokens=8, **options))
        assert torch.equal(*texts)


@pytest.mark.parametrize("name", HYBRID)
def test_packed_tokens_cost_little_divergence(name):
    model, ids, chunks = build(name), prompt(2, 60), (30, *(1,) * 15, 9)
    expected = feed(model, DynamicCache(config=model.config), ids, chunks).log_softmax(-1)
    found = {}
    for bits in (2, 4, 8):
        cache = cache_of(name, key_bits=bits, value_bits=bits)
        logits = feed(model, cache, ids, chunks).log_softmax(-1)
        assert all(len(layer.store) for layer in hybrid_layers(cache))
        found[bits] = float((expected.exp() * (expected - logits)).sum(-1).mean())
    assert found[8] < 1e-5
    assert found[8] < 0.1 * found[4]
    assert found[4] < 0.3 * found[2]


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
@pytest.mark.parametrize("name", HYBRID)
def test_the_cache_sees_the_queries(name, attention):
    model = copy.deepcopy(build(name))
    model.set_attn_implementation(attention)
    cache = cache_of(name)
    feed(model, cache, prompt(2, 40), (30, 1))
    for layer in hybrid_layers(cache):
        assert layer.store.keys.statistics.hessian is not None


def test_prompt_lookup_takes_convolutions_back():
    model, ids = build("inkling"), prompt(1, 12).repeat(1, 3)
    options = {"max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 4}
    text = model.generate(ids, past_key_values=cache_of("inkling", **EXACT), **options)
    oracle = DynamicCache(config=model.config)
    assert torch.equal(text, model.generate(ids, past_key_values=oracle, **options))


def test_the_kernels_decode():
    model, ids, chunks = build("zaya"), prompt(1, 40), (26, *(1,) * 5, 3, 1)
    logits = []
    for which in ("torch", "triton"):
        cache = RotorQuantCache("k4v4", config=model.config, **SMALL)
        with backend(which):
            logits.append(feed(model, cache, ids, chunks))
        assert all((layer.ring is not None) == (which == "triton") for layer in cache.layers)
    assert relative_error(*logits) < 2e-3  # rounding may move a number into the next bin


# --- rows ---


@pytest.mark.parametrize(
    ("rearrange", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_select_indices(slice(1, 3)), [1, 2]),
    ],
    ids=["reorder", "repeat", "select", "mask", "slice"],
)
@pytest.mark.parametrize("name", WITHOUT_OWN)
def test_rows_take_their_states_along(name, rearrange, rows):
    model, ids = build(name), prompt(3, 40)
    cache, wanted = cache_of(name), cache_of(name)
    feed(model, cache, ids, (30, 1))
    rearrange(cache)
    feed(model, wanted, ids[rows], (30, 1))
    assert cache.batch_size == len(rows)
    logits = [feed(model, x, ids[rows][:, 31:], (1, 5)) for x in (cache, wanted)]
    assert relative_error(*logits) < 1e-3  # rounding may move a number into the next bin


def test_beams_over_layers_of_states_alone():
    model, ids = build("zamba2"), prompt(3, 40)
    cache, wanted = cache_of("zamba2"), cache_of("zamba2")
    feed(model, cache, ids, (30, 1))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = ids[[2, 0, 0]]
    feed(model, wanted, ids, (30, 1))
    logits = [feed(model, x, ids[:, 31:], (1, 5)) for x in (cache, wanted)]
    assert relative_error(*logits) < 1e-3


# --- reset, crop, errors ---


@pytest.mark.parametrize("name", WITHOUT_OWN)
def test_after_a_reset_any_batch_is_read_as_by_a_new_cache(name):
    model = build(name)
    cache, fresh = cache_of(name), cache_of(name)
    feed(model, cache, prompt(2, 40), (30, 1))
    cache.reset()
    assert same(snapshot(cache.layers), snapshot(fresh.layers))
    assert not any(layer.state_tensors() for layer in cache.layers)
    logits = [feed(model, x, prompt(3, 40, seed=1), (30, 1, 1)) for x in (cache, fresh)]
    assert torch.equal(*logits)


def test_a_reset_goes_on_recording():
    layer, _ = conv_layer("sliding")
    layer.reset()
    assert layer.record_past


def test_what_waits_for_queries_is_stored_before_the_recording():
    """With what has left the window, which a recording would keep."""
    config = RotorQuantConfig(**SMALL)
    layer = RotorQuantHybridSlidingLayer(config, 12)
    layer.update(*torch.randn(2, 2, 2, 30, 16))
    assert layer.waits
    layer.activate_past_recording()
    assert not layer.waits
    assert layer.record_past
    assert layer.keys.shape[2] == 11


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("recording", [False, True])
def test_recurrent_states_refuse_a_crop_and_nothing_is_done(name, recording):
    model = build(name)
    cache = cache_of(name)
    feed(model, cache, prompt(2, 40), (12, 1))
    if recording:
        cache.activate_past_recording()
    for layer in hybrid_layers(cache):
        before = snapshot(vars(layer))
        assert layer.is_croppable is False
        with pytest.raises(RuntimeError, match=r"crop\(-3\) of a layer with a recurrent state"):
            layer.crop(-3)
        with pytest.raises(ValueError, match="tokens_to_remove is 3"):
            layer.crop(3)
        assert same(snapshot(vars(layer)), before)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_convolutions_are_cropped_with_the_attention(kind):
    layer, read = conv_layer(kind, **EXACT)
    layer.crop(0)
    before = snapshot(vars(layer))
    read(3)
    assert layer.is_croppable
    layer.crop(-3)
    assert layer.get_seq_length() == 20
    assert same(snapshot([layer.state_tensors(), layer.recent]), snapshot_of(before))
    layer.record_past = False
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)


def snapshot_of(before):
    """Of a snapshot of a layer what its states and its recent tokens are."""
    return [{"conv_states.0": before["conv_states"][0]}, before["_recent"]]


def test_if_the_attention_part_refuses_a_crop_the_states_stay():
    layer, read = conv_layer("sliding")
    layer.crop(0)
    read(2)
    before = snapshot(vars(layer))
    with pytest.raises(RuntimeError, match="further than the recorded past"):
        layer.crop(-4)
    assert same(snapshot(vars(layer)), before)


def test_crop_of_an_empty_layer():
    layer = RotorQuantHybridLayer(RotorQuantConfig())
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    layer.activate_past_recording()
    layer.crop(-1)
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("past", [0, 30])
@pytest.mark.parametrize("name", ["falcon_h1", "inkling"])
def test_a_pass_that_fails_says_when_the_cache_cannot_go_on(name, past, failing):
    """The states have read the new tokens before the attention refuses them."""
    model, ids = build(name), prompt(2, 50)
    cache = cache_of(name)
    if past:
        feed(model, cache, ids, (past,))
    attention = model.model.layers[failing].self_attn
    handle = attention.v_proj.register_forward_hook(lambda *args: args[2] * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        feed(model, cache, ids[:, past:], (5,))
    handle.remove()
    if past:
        assert "cache.reset()" in caught.value.__notes__[0]
        cache.reset()
    else:  # it is as new
        assert not hasattr(caught.value, "__notes__")
    logits = [feed(model, x, ids, (30, 1)) for x in (cache, cache_of(name))]
    assert torch.equal(*logits)


# --- forks, files, bytes ---


@pytest.mark.parametrize("name", HYBRID)
def test_a_fork_has_states_of_its_own(name):
    cache = cache_of(name)
    feed(build(name), cache, prompt(2, 40), (30, 1))
    for layer in hybrid_layers(cache):
        fork = copy.copy(layer)
        before = snapshot(layer.state_tensors())
        assert same(snapshot(fork.state_tensors()), before)
        for state in fork.state_tensors().values():
            state.zero_()
        fork.has_previous_state[0] = False
        assert same(snapshot(layer.state_tensors()), before)
        assert layer.has_previous_state[0]


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("name", HYBRID)
def test_a_saved_cache_goes_on(name, length, tmp_path):
    model, ids = build(name), prompt(2, 60)
    cache = cache_of(name)
    feed(model, cache, ids, (length, 1))
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", config=model.config)
    for ours, theirs in zip(hybrid_layers(cache), hybrid_layers(loaded), strict=True):
        assert same(snapshot(ours.state_tensors()), snapshot(theirs.state_tensors()))
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    logits = [feed(model, x, ids[:, length + 1 :], (1, 1, 8, 1)) for x in (cache, loaded)]
    assert torch.equal(*logits)
    assert loaded.memory().parts == cache.memory().parts
    with pytest.raises(ValueError, match=r"pass config=model\.config"):
        RotorQuantCache.load(tmp_path / "cache")


def test_a_file_of_layers_that_were_not_compressed_is_refused(tmp_path):
    config = build("falcon_h1").config
    old = DynamicCache(config=config)
    feed(build("falcon_h1"), old, prompt(2, 40), (30,))
    settings = RotorQuantConfig()
    serialization.save(tmp_path / "old", settings, old.layers, shape_of(config))
    message = "LinearAttentionAndFullAttentionLayer, the model needs RotorQuantHybridLayer.*earlier"
    with pytest.raises(ValueError, match=message):
        RotorQuantCache.load(tmp_path / "old", config=config)


@pytest.mark.parametrize("name", WITHOUT_OWN)
def test_bytes_of_states_are_counted(name):
    model = build(name)
    cache, oracle = cache_of(name), DynamicCache(config=model.config)
    for x in (cache, oracle):
        feed(model, x, prompt(2, 60), (41, 1))
    states = [
        state
        for layer in oracle.layers
        for found in (layer.conv_states, layer.recurrent_states)
        for state in found.values()
        if state is not None
    ]
    report = cache.memory()
    assert report.parts["exact_layers"] == sum(x.nbytes for x in states) > 0
    held = sum(layer.keys.numel() + layer.values.numel() for layer in oracle.layers)
    assert report.numbers == held + sum(x.numel() for x in states)
    assert report.packed_numbers > 0.5 * held
    assert report.dtype == torch.float32


def test_the_dtype_of_a_report_is_that_of_the_keys():
    """Convolution states of this model are float32 whatever the model is."""
    model = build("inkling", dtype=torch.bfloat16)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, prompt(2, 40), (30, 1))
    assert cache.layers[0].conv_states[0].dtype == torch.float32
    assert cache.memory().dtype == cache.layers[0].dtype == torch.bfloat16


def test_states_stay_on_the_device_of_the_model():
    """Some models read them after `update`, when an offloaded cache has moved the layer away."""
    cache = cache_of("zaya")
    feed(build("zaya"), cache, prompt(2, 40), (30, 1))
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
        assert {x.device.type for x in (*layer.sinks, *layer.recent)} == {"meta"}
        assert {x.device.type for x in layer.state_tensors().values()} == {"cpu"}
    assert cache.is_linear == [False, False]  # so that offloading takes them


# --- what the cache is told ---


@pytest.mark.parametrize("name", ["falcon_h1", "zamba2", "zaya"])
def test_the_rope_is_that_of_the_model(name):
    rotary = build(name).model.rotary_emb
    found = 0
    for kind, layer in zip(build(name).config.layer_types, cache_of(name).layers, strict=True):
        if isinstance(layer, RotorQuantHybridLayer):
            frequencies = getattr(rotary, f"{kind}_inv_freq" if name == "zaya" else "inv_freq")
            torch.testing.assert_close(layer.rope.frequencies.flatten(), frequencies)
            found += 1
    assert found == 2


def test_bits_layer_by_layer():
    model = build("zaya")
    cache = RotorQuantCache(key_bits=(2, 4), value_bits=(8, 3), config=model.config, **SMALL)
    feed(model, cache, prompt(2, 40), (30, 1))
    bits = [tuple(side.quantizer.bits for side in x.store.sides) for x in cache.layers]
    assert bits == [(2, 8), (4, 3)]


def test_a_cuda_graph_is_refused():
    model = build("falcon_h1")
    cache = cache_of("falcon_h1")
    feed(model, cache, prompt(1, 40), (30, 1))
    with pytest.raises(ValueError, match="layer 0 of the cache has recurrent states beside"):
        DecodeGraph(cuda_graph.OnGPU(model), cache)
