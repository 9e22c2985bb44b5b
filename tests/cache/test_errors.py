"""Errors name the value and the remedy, and leave the cache as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Mamba2Config, Qwen3NextConfig

from rotorquant_hf import (
    PRESETS,
    RotorQuantCache,
    RotorQuantConfig,
    RotorQuantKVCache,
    RotorQuantMSE,
)
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.native.library import library
from rotorquant_hf.quant import checks
from rotorquant_hf.store import side
from tests.helpers.models import build, feed, prompt, same, snapshot

ROWS, HEADS, D_KEY, D_VALUE = 2, 3, 16, 12
SMALL = RotorQuantConfig(
    residual_length=3, statistics_length=0, query_aware=False, block_length=2, num_sink_tokens=2
)
Pair = tuple[Tensor, Tensor]


def states(
    tokens: int = 5,
    rows: int = ROWS,
    heads: int = HEADS,
    d_key: int = D_KEY,
    d_value: int = D_VALUE,
    seed: int = 0,
) -> Pair:
    """Random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, heads, tokens, d_key, generator=generator),
        torch.randn(rows, heads, tokens, d_value, generator=generator),
    )


LAYERS: dict[str, Callable[[], RotorQuantLayer]] = {
    "full": functools.partial(RotorQuantLayer, SMALL),
    "sliding": functools.partial(RotorQuantSlidingLayer, SMALL, 9),
}
HISTORIES = {
    "unused": (),
    "window only": (2,),
    "packed": (15, 1, 1),
}


def layer_with(kind: str, history: str) -> RotorQuantLayer:
    layer = LAYERS[kind]()
    for seed, tokens in enumerate(HISTORIES[history]):
        layer.update(*states(tokens, seed=100 + seed))
    return layer


def message_of(error: type[Exception], action: Callable[[], Any]) -> str:
    """The message that a user reads."""
    with pytest.raises(error) as raised:
        action()
    return str(raised.value)


# --- keys and values that do not fit ---


def _with(pair: Pair, side: int, entry: float, position: tuple[int, ...] = (1, 2, 3, 4)) -> Pair:
    pair[side][position] = entry
    return pair


BAD_ALONE: dict[str, tuple[Callable[[], Pair], type[Exception], tuple[str, ...]]] = {
    "integer keys": (
        lambda: (states()[0].int(), states()[1]),
        TypeError,
        ("keys", "torch.int32", "pass float16, bfloat16 or float32"),
    ),
    "integer values": (
        lambda: (states()[0], states()[1].long()),
        TypeError,
        ("values", "torch.int64", "pass float16, bfloat16 or float32"),
    ),
    "boolean keys": (
        lambda: (states()[0] > 0, states()[1]),
        TypeError,
        ("keys", "torch.bool", "pass float16"),
    ),
    "complex keys": (
        lambda: (states()[0].to(torch.complex64), states()[1]),
        TypeError,
        ("keys", "torch.complex64", "pass float16"),
    ),
    "NaN in keys": (
        lambda: _with(states(), 0, math.nan),
        ValueError,
        ("keys", "1 entries", "(1, 2, 3, 4)", "nan", "check the model's dtype"),
    ),
    "infinity in keys": (
        lambda: _with(states(), 0, math.inf, (0, 1, 0, 15)),
        ValueError,
        ("keys", "(0, 1, 0, 15)", "inf", "float16 overflows at 65504"),
    ),
    "NaN in values": (
        lambda: _with(states(), 1, math.nan),
        ValueError,
        ("values", "(1, 2, 3, 4)", "nan", "check the model's dtype"),
    ),
    "minus infinity in values": (
        lambda: _with(states(), 1, -math.inf, (0, 0, 4, 0)),
        ValueError,
        ("values", "(0, 0, 4, 0)", "-inf", "check the model's dtype"),
    ),
    "three axes": (
        lambda: tuple(x[0] for x in states()),
        ValueError,
        ("keys", f"({HEADS}, 5, {D_KEY})", "pass (batch, heads, tokens, head dim)"),
    ),
    "three axes of values": (
        lambda: (states()[0], states()[1][0]),
        ValueError,
        ("values", f"({HEADS}, 5, {D_VALUE})", "pass (batch, heads, tokens, head dim)"),
    ),
    "keys and values of other lengths": (
        lambda: (states(5)[0], states(6)[1]),
        ValueError,
        ("(2, 3, 5, 16)", "(2, 3, 6, 12)", "must agree in all but the last axis"),
    ),
    "keys and values of other batches": (
        lambda: (states()[0], states(rows=1)[1]),
        ValueError,
        ("(2, 3, 5, 16)", "(1, 3, 5, 12)", "must agree"),
    ),
    "keys and values of other heads": (
        lambda: (states()[0], states(heads=6)[1]),
        ValueError,
        ("(2, 3, 5, 16)", "(2, 6, 5, 12)", "must agree"),
    ),
}
BAD_AFTERWARDS: dict[str, tuple[Callable[[], Pair], type[Exception], tuple[str, ...]]] = {
    "more rows": (
        lambda: states(rows=4),
        ValueError,
        ("batch size 4", "batch size 2", "use a new cache, or cache.reset()"),
    ),
    "one row": (
        lambda: states(rows=1),
        ValueError,
        ("batch size 1", "batch size 2", "use a new cache, or cache.reset()"),
    ),
    "other heads": (
        lambda: states(heads=1),
        ValueError,
        ("number of heads 1", "number of heads 3", "use a new cache, or cache.reset()"),
    ),
    "other key dim": (
        lambda: states(d_key=32),
        ValueError,
        ("keys have head dim 32", "head dim 16", "use a new cache, or cache.reset()"),
    ),
    "other value dim": (
        lambda: states(d_value=32),
        ValueError,
        ("values have head dim 32", "head dim 12", "use a new cache, or cache.reset()"),
    ),
    "another device": (
        lambda: tuple(x.to("meta") for x in states()),
        ValueError,
        ("device meta", "device cpu", "use a new cache, or cache.reset()"),
    ),
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", BAD_ALONE)
def test_states_that_no_cache_can_hold(case, kind, history):
    make, error, parts = BAD_ALONE[case]
    layer, pair = layer_with(kind, history), make()
    before = snapshot(vars(layer))
    message = message_of(error, lambda: layer.update(*pair))
    assert [part for part in parts if part not in message] == [], message
    assert same(snapshot(vars(layer)), before)


@pytest.mark.parametrize("history", [h for h in HISTORIES if h != "unused"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", BAD_AFTERWARDS)
def test_states_that_do_not_fit_what_is_held(case, kind, history):
    make, error, parts = BAD_AFTERWARDS[case]
    layer, pair = layer_with(kind, history), make()
    before = snapshot(vars(layer))
    message = message_of(error, lambda: layer.update(*pair))
    assert f"from {layer.get_seq_length()} earlier tokens" in message
    assert [part for part in parts if part not in message] == [], message
    assert same(snapshot(vars(layer)), before)
    layer.reset()  # as the message says
    if case != "another device":
        layer.update(*pair)
        assert layer.get_seq_length() == 5


@pytest.mark.parametrize(("d_key", "d_value"), [(7, 16), (16, 7), (577, 16), (16, 577), (1, 1)])
@pytest.mark.parametrize("kind", LAYERS)
def test_head_dims_that_cannot_be_rotated(kind, d_key, d_value):
    layer = LAYERS[kind]()
    before = snapshot(vars(layer))
    pair = states(d_key=d_key, d_value=d_value)
    message = message_of(ValueError, lambda: layer.update(*pair))
    bad = d_key if not 8 <= d_key <= 576 else d_value
    assert f"is {bad}" in message
    assert "8 to 576" in message
    assert same(snapshot(vars(layer)), before)
    layer.update(*states())
    assert layer.get_seq_length() == 5


@pytest.mark.parametrize(("d_key", "d_value"), [(8, 576), (576, 8), (9, 31)])
def test_head_dims_at_the_ends_of_the_range(d_key, d_value):
    layer = LAYERS["full"]()
    for count in (12, 1):
        layer.update(*states(count, d_key=d_key, d_value=d_value))
    assert (layer.keys.shape[3], layer.values.shape[3]) == (d_key, d_value)
    assert len(layer.store) > 0


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("history", ["packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_vectors_too_large_for_their_scales(kind, history, side):
    """Coding fails after keys, or keys of some tokens, are done: nothing of it may stay."""
    layer = layer_with(kind, history)
    pair = states(8, seed=1)
    pair[side][:, :, 3] *= 1e9
    before, length = snapshot(vars(layer)), layer.get_seq_length()
    message = message_of(ValueError, lambda: layer.update(*pair))
    assert "too large for its scale in torch.float16" in message
    assert same(snapshot(vars(layer)), before)
    layer.update(*states(8, seed=1))
    assert layer.get_seq_length() == length + 8


@pytest.mark.parametrize("computes", ["torch", "native"])
@pytest.mark.parametrize("call", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", LAYERS)
def test_running_out_of_memory_while_coding(kind, history, call, computes, monkeypatch):
    if computes == "native" and library() is None:
        pytest.skip("no native library")
    layer = layer_with(kind, history)
    before, length, calls = snapshot(vars(layer)), layer.get_seq_length(), itertools.count()
    owner, name = (RotorQuantMSE, "encode") if computes == "torch" else (side, "encode_native")
    encode = getattr(owner, name)

    def failing(*args):
        if next(calls) == call:
            raise MemoryError("no memory")
        return encode(*args)

    with monkeypatch.context() as patch, backend(computes):
        patch.setattr(owner, name, failing)
        with pytest.raises(MemoryError, match="no memory"):
            layer.update(*states(8, seed=1))
    assert same(snapshot(vars(layer)), before)
    layer.update(*states(8, seed=1))
    assert layer.get_seq_length() == length + 8


def test_statistics_of_an_emptied_store_survive_an_error():
    """A sliding layer forgets all its packed tokens in a crop, but goes on with their scales."""
    layer = RotorQuantSlidingLayer(SMALL, 5)
    layer.activate_past_recording()
    layer.update(*states(10))
    layer.crop(0)
    assert len(layer.store) == 0
    assert layer.store.keys.statistics is not None
    before, (keys, values) = snapshot(vars(layer)), states(8, seed=1)
    message = message_of(ValueError, lambda: layer.update(keys * 1e9, values))
    assert "too large for its scale" in message
    assert same(snapshot(vars(layer)), before)


@pytest.mark.parametrize("entry", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4, 7], ids=["a sink", "to be packed", "in the window"])
def test_the_first_prompt_is_looked_at_wherever_its_tokens_go(at, entry):
    layer, pair = LAYERS["full"](), states(9)
    before = snapshot(vars(layer))
    pair[1][0, 0, at, 0] = entry
    message = message_of(ValueError, lambda: layer.update(*pair))
    assert f"(0, 0, {at}, 0)" in message
    assert same(snapshot(vars(layer)), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_goes_on_after_errors_as_if_there_had_been_none(kind):
    layer, untroubled = LAYERS[kind](), LAYERS[kind]()
    bad = [(make, error) for make, error, _ in BAD_ALONE.values()]
    later = [(make, error) for make, error, _ in BAD_AFTERWARDS.values()]
    for seed, count in enumerate((6, 1, 1, 12, 1, 3)):
        for make, error in bad + (later if seed else []):
            with pytest.raises(error):
                layer.update(*make())
        layer.update(*states(count, seed=seed))
        untroubled.update(*states(count, seed=seed))
        assert same(snapshot(vars(layer)), snapshot(vars(untroubled)))


# --- through the cache ---


@pytest.mark.parametrize("with_config", [True, False])
def test_a_cache_is_as_it_was_after_a_failed_update(with_config):
    model = build("llama")
    cache = RotorQuantCache(SMALL, config=model.config if with_config else None)
    feed(model, cache, prompt(2, 20), (20,))
    before, report = snapshot(cache.layers), cache.memory()
    keys = torch.full((2, 2, 1, 16), math.nan)
    for index in range(2):
        message = message_of(ValueError, lambda i=index: cache.update(keys, keys, i))
        assert "keys: 64 entries are NaN or infinite" in message
    assert same(snapshot(cache.layers), before)
    assert cache.memory() == report


@pytest.mark.parametrize("pair", [_with(states(), i, math.nan) for i in range(2)], ids=range(2))
def test_a_new_cache_is_usable_after_a_failed_first_update(pair):
    cache = RotorQuantCache(SMALL)
    with pytest.raises(ValueError):  # noqa: PT011  the messages are tested above
        cache.update(*pair, 0)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    assert cache.memory().total_bytes == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    cache.update(*states(), 0)
    assert cache.get_seq_length() == 5


def test_a_model_run_with_the_cache_of_another_batch():
    model = build("llama")
    cache = RotorQuantCache(SMALL)
    feed(model, cache, prompt(2, 21), (20, 1))
    before = snapshot(cache.layers)
    message = message_of(ValueError, lambda: feed(model, cache, prompt(3, 20), (1,)))
    assert "batch size 3" in message
    assert "batch size 2 from 21 earlier tokens; use a new cache, or cache.reset()" in message
    assert same(snapshot(cache.layers), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1", "lfm2"])
def test_a_new_cache_is_new_after_a_first_pass_that_failed(name):
    """Another batch fits it, though windows have moved and states have read."""
    model = build(name)
    cache = RotorQuantCache(SMALL, config=model.config)
    attention = [x for x in cache.layers if isinstance(x, RotorQuantLayer)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention[-1], "update", _out_of_memory)
        with pytest.raises(MemoryError) as caught, torch.no_grad():
            model(prompt(2, 40), past_key_values=cache)
    assert not hasattr(caught.value, "__notes__")
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == 0
    expected = feed(model, RotorQuantCache(SMALL, config=model.config), prompt(1, 50), (40, 10))
    assert torch.equal(feed(model, cache, prompt(1, 50), (40, 10)), expected)


def _out_of_memory(*args, **kwargs):
    raise MemoryError


@torch.no_grad()
def test_an_interrupted_update_leaves_a_cache_as_it_was(monkeypatch):
    """Control-C in a notebook, where the cache is used again."""
    model = build("llama")
    cache = RotorQuantCache(SMALL, config=model.config)
    feed(model, cache, prompt(1, 41), (41,))
    before = snapshot(cache.layers)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1, 1), past_key_values=cache)
    assert same(snapshot(cache.layers), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_a_reset_cache_is_new(name):
    model = build(name)
    make = functools.partial(RotorQuantCache, SMALL, exact_layers=(0,), config=model.config)
    cache = make()
    feed(model, cache, prompt(2, 40), (30, 10))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(
        feed(model, cache, prompt(1, 50), (40, 10)), feed(model, make(), prompt(1, 50), (40, 10))
    )


@torch.no_grad()
def test_a_pass_that_broke_off_is_taken_back_by_the_next():
    """Layers out of step would go on so without a word."""
    model = build("llama", "rotorquant")
    cache = RotorQuantCache(SMALL, config=model.config)
    feed(model, cache, prompt(1, 41), (41,))
    before = snapshot(cache.layers)
    with pytest.raises(ValueError, match="does not compute output_attentions"):
        model(prompt(1, 1), past_key_values=cache, output_attentions=True)
    assert [x.get_seq_length() for x in cache.layers] == [42, 41]
    message = message_of(RuntimeError, lambda: model(prompt(1, 1), past_key_values=cache))
    assert "broke off after layer 0, so that only some layers hold its 1 tokens" in message
    assert "repeat this pass" in message
    assert same(snapshot(cache.layers), before)
    model(prompt(1, 1), past_key_values=cache)
    assert [x.get_seq_length() for x in cache.layers] == [42, 42]


@torch.no_grad()
def test_a_pass_that_broke_off_and_cannot_be_taken_back_is_named():
    """Tokens have left the first layer's window."""
    model = build("gemma3", "rotorquant")
    cache = RotorQuantCache(SMALL, config=model.config)
    feed(model, cache, prompt(1, 60), (60,))
    with pytest.raises(ValueError, match="does not compute output_attentions"):
        model(prompt(1, 3), past_key_values=cache, output_attentions=True)
    for _ in range(2):
        message = message_of(RuntimeError, lambda: model(prompt(1, 3), past_key_values=cache))
        assert "use cache.reset()" in message
    cache.reset()
    feed(model, cache, prompt(1, 60), (60,))


@torch.no_grad()
def test_a_pass_that_broke_off_before_a_layer_without_attention():
    plain = build("lfm2", "rotorquant")
    config = copy.deepcopy(plain.config)
    config.layer_types = ["full_attention", "conv", "full_attention"]
    model = type(plain)(config).eval()

    def interrupt(*_):
        raise KeyboardInterrupt

    cache = RotorQuantCache(SMALL, config=model.config)
    feed(model, cache, prompt(1, 41), (41,))
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(1, 3), past_key_values=cache)
    hook.remove()
    for _ in range(2):
        message = message_of(RuntimeError, lambda: model(prompt(1, 3), past_key_values=cache))
        assert "broke off after layer 0" in message
        assert "use cache.reset()" in message  # convolution states have read the tokens


@pytest.mark.parametrize("exact", [(), (0,), (1,), (0, 1)], ids=str)
@torch.no_grad()
def test_a_pass_that_an_uncompressed_layer_refuses(exact):
    """Transformers' sliding layers count its tokens all the same."""
    model = build("mistral")
    cache = RotorQuantCache(SMALL, config=model.config, exact_layers=exact)
    feed(model, cache, prompt(1, 15), (15,))
    with pytest.raises((ValueError, RuntimeError)):
        model(prompt(2, 5), past_key_values=cache)
    assert [x.get_seq_length() for x in cache.layers] == [15, 15]
    feed(model, cache, prompt(1, 5), (5,))
    assert [x.get_seq_length() for x in cache.layers] == [20, 20]


@pytest.mark.parametrize("with_config", [True, False])
def test_layers_may_be_filled_one_after_the_other(with_config):
    """By a script: then layers of unequal lengths are no pass that broke off."""
    cache = RotorQuantCache(SMALL, config=build("llama").config if with_config else None)
    for index in range(2):
        for seed in range(3):
            cache.update(*states(5, heads=2, d_value=D_KEY, seed=seed), index)
    assert [x.get_seq_length() for x in cache.layers] == [15, 15]
    cache.update(*states(5, heads=2, d_value=D_KEY), 0)
    cache.update(*states(5, heads=2, d_value=D_KEY), 0)
    assert [x.get_seq_length() for x in cache.layers] == [25, 15]


def test_a_model_run_with_the_cache_of_another_model():
    cache = RotorQuantCache(SMALL)
    feed(build("llama"), cache, prompt(2, 21), (20, 1))
    before = snapshot(cache.layers)
    message = message_of(ValueError, lambda: feed(build("phi3"), cache, prompt(2, 20), (1,)))
    assert "number of heads 1" in message
    assert "use a new cache" in message
    assert same(snapshot(cache.layers), before)


# --- settings ---


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, True, "4", None])
@pytest.mark.parametrize("name", ["key_bits", "value_bits"])
@pytest.mark.parametrize("make", [RotorQuantCache, RotorQuantConfig])
def test_bits_out_of_range(make, name, bits):
    message = message_of(ValueError, lambda: make(**{name: bits}))
    assert message == f"{name} is {bits!r}; choose a whole number from 1 to 8"


def test_product_quantisers_need_two_bits():
    message = message_of(ValueError, lambda: RotorQuantCache(key_bits=1, key_quantizer="prod"))
    assert message == "key_bits is 1; choose a whole number from 2 to 8"


@pytest.mark.parametrize("bits", [0, 9, 2.5, True])
def test_bits_of_a_store_out_of_range(bits):
    message = message_of(ValueError, lambda: RotorQuantKVCache(16, 16, bits=bits))
    assert f"is {bits!r}; choose a whole number from 1 to 8" in message


@pytest.mark.parametrize("name", ["k5v5", "", "K4V4", "default"])
def test_unknown_presets(name):
    message = message_of(ValueError, lambda: RotorQuantCache(name))
    assert f"preset is {name!r}" in message
    assert all(preset in message for preset in PRESETS)


def test_unknown_options():
    message = message_of(ValueError, lambda: RotorQuantCache(bits=3, residual=8))
    assert "unknown option bits, residual" in message
    assert all(name in message for name in RotorQuantConfig().to_dict())


@pytest.mark.parametrize(
    ("option", "value", "remedies"),
    [
        ("key_quantizer", "MSE", ("mse", "prod")),
        ("rotation", "random", ("cascade", "rotors", "haar", "hadamard")),
        ("key_scale", "l2", ("norm", "matched", "least_squares", "unbiased")),
        ("value_scale", None, ("norm", "matched", "least_squares", "unbiased")),
        ("rope_layout", "neox", ("half", "interleaved", "none")),
        ("qjl_projection", "sparse", ("orthogonal", "gaussian")),
        ("residual_length", -1, ("at least 0",)),
        ("residual_length", 12.5, ("at least 0",)),
        ("block_length", 0, ("at least 1",)),
        ("num_sink_tokens", -4, ("at least 0",)),
        ("num_sink_tokens", True, ("at least 0",)),
        ("seed", -1, ("from 0 to 4294967295",)),
        ("rotor_layers", 0, ("from 1 to 64",)),
        ("qjl_dim", 0, ("from 1 to 4096",)),
        ("equalize_keys", 1.5, ("0 (off) to 1",)),
        ("equalize_values", -0.1, ("0 (off) to 1",)),
        ("equalize_keys", True, ("0 (off) to 1",)),
        ("equalize_keys", math.nan, ("0 (off) to 1",)),
        ("center_keys", "yes", ("True", "False", "auto")),
        ("check_finite", 1, ("True", "False")),
        ("exact_layers", "0", ("(0, -1)",)),
        ("exact_layers", 0, ("(0, -1)",)),
        ("exact_layers", (0.5,), ("(0, -1)",)),
    ],
)
def test_options_out_of_range(option, value, remedies):
    message = message_of(ValueError, lambda: RotorQuantCache(**{option: value}))
    assert f"{option} is {value!r}; " in message
    assert [remedy for remedy in remedies if remedy not in message] == [], message


def test_layers_of_a_rotation_that_has_none():
    message = message_of(ValueError, lambda: RotorQuantCache(rotation="haar", rotor_layers=3))
    assert message == (
        "rotor_layers is 3, but the rotation 'haar' has no layers; leave rotor_layers out"
    )


def test_the_config_of_a_model_in_the_place_of_the_settings():
    message = message_of(TypeError, lambda: RotorQuantCache(build("llama").config))
    assert "LlamaConfig" in message
    assert "config=" in message
    message = message_of(TypeError, lambda: RotorQuantCache(4))
    assert "int" in message
    assert "preset name or a RotorQuantConfig" in message


def test_a_third_positional_argument_is_refused():
    with pytest.raises(TypeError, match="positional"):
        RotorQuantCache("k4v4", build("llama").config)


def test_exact_layers_counted_from_the_last_without_a_config():
    message = message_of(ValueError, lambda: RotorQuantCache(exact_layers=(0, -1)))
    assert "exact_layers has -1" in message
    assert "config=model.config" in message


@pytest.mark.parametrize("index", [3, -4, 100])
def test_exact_layers_that_the_model_does_not_have(index):
    config = LlamaConfig(num_hidden_layers=3)
    message = message_of(ValueError, lambda: RotorQuantCache(config=config, exact_layers=(index,)))
    assert message.startswith(f"exact_layers has {index}, but the model has 3 layers")


@pytest.mark.parametrize("index", [2, -3])
def test_exact_layers_at_the_ends_of_the_model(index):
    cache = RotorQuantCache(config=LlamaConfig(num_hidden_layers=3), exact_layers=(index,))
    kept = [not isinstance(layer, RotorQuantLayer) for layer in cache.layers]
    assert kept == [i == index % 3 for i in range(3)]


def test_a_hybrid_model_without_a_config():
    model = build("qwen3_next")
    message = message_of(IndexError, lambda: feed(model, RotorQuantCache(), prompt(1, 9), (9,)))
    assert "no layer 0" in message
    assert "config=model.config" in message


# --- a store of its own ---


@pytest.fixture
def store() -> RotorQuantKVCache:
    store = RotorQuantKVCache(D_KEY, D_VALUE)
    store.append(*states())
    return store


@pytest.mark.parametrize(
    ("make", "error", "parts"),
    [
        (lambda: (states()[0].int(), states()[1]), TypeError, ("keys", "int32", "float32")),
        (lambda: states(d_key=8), ValueError, ("keys", "(2, 3, 5, 8)", "16 elements")),
        (lambda: states(d_value=8), ValueError, ("values", "(2, 3, 5, 8)", "12 elements")),
        (lambda: (states(5)[0], states(6)[1]), ValueError, ("(2, 3, 5, 16)", "(2, 3, 6, 12)")),
        (lambda: states(rows=1), ValueError, ("batch 1", "batch 2", "use a new store")),
        (lambda: states(heads=6), ValueError, ("6 heads", "3 heads", "use a new store")),
        (lambda: _with(states(), 0, math.nan), ValueError, ("keys", "(1, 2, 3, 4)", "check")),
        (lambda: _with(states(), 1, math.inf), ValueError, ("values", "(1, 2, 3, 4)", "check")),
        (lambda: _with(states(), 1, 1e9), ValueError, ("too large", "float16")),
    ],
)
def test_a_store_is_as_it_was_after_a_failed_append(store, make, error, parts):
    before = snapshot(vars(store))
    message = message_of(error, lambda: store.append(*make()))
    assert [part for part in parts if part not in message] == [], message
    assert same(snapshot(vars(store)), before)


@pytest.mark.parametrize("side", [0, 1])
def test_an_empty_store_stays_empty_after_a_failed_append(side):
    store = RotorQuantKVCache(D_KEY, D_VALUE)
    before = snapshot(vars(store))
    message = message_of(ValueError, lambda: store.append(*_with(states(), side, math.nan)))
    assert "(1, 2, 3, 4)" in message
    assert same(snapshot(vars(store)), before)
    store.append(*states(rows=1, heads=1))  # any batch and heads, as ever
    assert len(store) == 5


def test_an_empty_store_has_no_spans():
    message = message_of(ValueError, RotorQuantKVCache(D_KEY, D_VALUE).keys.span)
    assert message == "the store is empty; append keys and values first"


@pytest.mark.parametrize("count", [-3, 99])
@pytest.mark.parametrize("method", ["crop", "drop_front"])
def test_a_store_forgets_no_more_than_it_holds(store, method, count):
    before = snapshot(store)
    message = message_of(ValueError, lambda: getattr(store, method)(count))
    assert f"{method}({count}): the store holds {len(store)} tokens" in message
    assert same(snapshot(store), before)


def test_queries_that_do_not_fit(store):
    for queries, parts in (
        (torch.zeros(ROWS, HEADS, 1, 8), ("(2, 3, 1, 8)", "16 elements")),
        (torch.zeros(ROWS, 4, 1, D_KEY), ("(2, 4, 1, 16)", "a multiple of 3")),
        (torch.zeros(1, HEADS, 1, D_KEY), ("(1, 3, 1, 16)", "pass (2, ")),
        (torch.zeros(ROWS, HEADS, D_KEY), ("(2, 3, 16)", "pass (2, ")),
    ):
        message = message_of(ValueError, lambda q=queries: store.attention_scores(q))
        assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_large_entries_are_finite_though_their_sum_is_not(dtype):
    """And one that is not is found among them, also where it takes the sum with it."""
    largest = torch.finfo(dtype).max
    x = torch.full((2, 2, 30, D_KEY), largest, dtype=dtype)
    checks.check_finite("keys", x)
    x[1, 0, 7, 3] = -math.inf
    message = message_of(ValueError, lambda: checks.check_finite("keys", x))
    assert "1 entries" in message
    assert "(1, 0, 7, 3)" in message


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_finite_entries_are_looked_for_once(kind, quantizer, monkeypatch):
    """At the outermost door: the layer, or the store or the quantiser where it is used alone."""
    looked, real = [], checks._all_finite
    monkeypatch.setattr(checks, "_all_finite", lambda x: looked.append(x.shape) or real(x))
    config = dataclasses.replace(SMALL, key_quantizer=quantizer)
    layer = RotorQuantLayer(config) if kind == "full" else RotorQuantSlidingLayer(config, 9)
    for seed, tokens in enumerate((15, 1, 1, 1, 9)):
        keys, values = states(tokens, seed=seed)
        looked.clear()
        layer.update(keys, values)
        assert looked == [keys.shape, values.shape]
    assert len(layer.store) > 0

    store = RotorQuantKVCache(D_KEY, D_VALUE, config=config)
    looked.clear()
    store.append(keys, values)
    assert looked == [keys.shape, values.shape]
    looked.clear()
    store.key_quantizer.quantize(keys)
    assert looked == [keys.shape]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"layer_idx": -1}, ValueError, ("layer_idx is -1", "from 0 ")),
        ({"layer_idx": "0"}, TypeError, ("layer_idx is '0'", "from 0 on")),
        ({"layer_idx": True}, TypeError, ("layer_idx is True",)),
        ({"key_states": [[1.0]]}, TypeError, ("key_states is of type list", "torch.Tensor")),
        (
            {"value_states": torch.zeros(2, 2, 5, 16).numpy()},
            TypeError,
            ("value_states is of type ndarray", "(batch, kv heads, tokens, head dim)"),
        ),
        (
            {"key_states": torch.zeros(3)},
            ValueError,
            ("key_states have shape (3,)", "(batch, kv heads, tokens, head dim)"),
        ),
    ],
    ids=["negative layer", "layer in words", "layer that is a truth", "list", "numpy", "an axis"],
)
def test_arguments_of_update_in_the_wrong_place(change, error, parts, with_config):
    cache = RotorQuantCache(config=build("llama").config if with_config else None)
    right = {"key_states": torch.zeros(2, 2, 5, 16), "value_states": torch.zeros(2, 2, 5, 16)}
    message = message_of(error, lambda: cache.update(**{**right, "layer_idx": 0, **change}))
    assert [part for part in parts if part not in message] == [], message
    assert cache.get_seq_length() == 0
    cache.update(**right, layer_idx=0)


def test_a_layer_that_the_model_does_not_have():
    config = build("llama").config
    cache = RotorQuantCache(config=config)
    count = config.num_hidden_layers
    states = torch.zeros(2, 2, 5, 16)
    message = message_of(ValueError, lambda: cache.update(states, states, count))
    assert f"layer_idx is {count}, but the config that this cache was made with has" in message
    assert "pass the config of the model that uses it" in message


def test_entries_that_overflow_on_the_way_are_refused():
    """Finite to the layer, not to the quantiser: float32 cannot hold them relative to the first."""
    layer = LAYERS["full"]()
    layer.update(*(1e-30 * x for x in states(15)))
    message = message_of(ValueError, lambda: layer.update(*(1e30 * x for x in states(15))))
    assert "too large for its scale" in message
    assert layer.get_seq_length() == 15


def test_keys_and_values_are_not_assigned():
    cache = RotorQuantCache()
    cache.update(*torch.randn(2, 1, 2, 300, 16), 0)
    before = cache.layers[0].keys.materialize()
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match=f"the {name} of a compressed layer are stored"):
            setattr(cache.layers[0], name, torch.zeros(1, 2, 300, 16))
    assert torch.equal(cache.layers[0].keys.materialize(), before)


def test_a_cache_without_attention_is_shown():
    with pytest.warns(UserWarning, match="no layer of this model"):
        cache = RotorQuantCache(config=Mamba2Config(num_hidden_layers=2))
    assert repr(cache) == "RotorQuantCache(key/value bits 4/4, layers=2, tokens=0)"


def test_a_model_of_which_nothing_is_compressed_is_named():
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    message = r"no layer of this model \(qwen3_next\) .* type linear_attention"
    with pytest.warns(UserWarning, match=message):
        RotorQuantCache(config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RotorQuantCache(config=config, exact_layers=tuple(range(config.num_hidden_layers)))
        RotorQuantCache(config=build("llama").config)
        RotorQuantCache(config=build("falcon_h1").config)


# --- a crop of some layers alone ---


@pytest.mark.parametrize("exact", [(), (0,), (1,), (0, 1)], ids=str)
def test_if_a_layer_refuses_a_crop_no_layer_is_cropped(exact):
    """A sliding window that has not recorded its past, after a full layer, which could."""
    config = copy.deepcopy(build("ministral").config)
    config.layer_types = ["full_attention", "sliding_attention"]
    options = {"residual_length": 4, "block_length": 2, "statistics_length": 0}
    cache = RotorQuantCache(config=config, exact_layers=exact, query_aware=False, **options)

    def read(tokens: int) -> None:
        for layer in (0, 1):
            cache.update(*states(tokens), layer)

    read(40)
    before = snapshot([vars(layer) for layer in cache.layers])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    assert same(snapshot([vars(layer) for layer in cache.layers]), before)
    cache.activate_past_recording()
    read(5)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [42, 42]


@pytest.mark.parametrize("name", ["mistral", "llama", "gemma3"])
def test_a_crop_by_a_tensor(name, tmp_path):
    """As Transformers 5.17 does in assisted decoding: lengths stay Python's."""
    model = build(name)
    cache = RotorQuantCache(SMALL, config=model.config)
    feed(model, cache, prompt(1, 20), (20,))
    cache.crop(torch.tensor(-3))
    assert [type(x.get_seq_length()) for x in cache.layers] == [int] * len(cache.layers)
    cache.save(tmp_path / "cache")
    with pytest.raises(TypeError, match=r"tokens_to_remove is -1\.0; pass an integer"):
        cache.crop(-1.0)
    assert cache.get_seq_length() == 17


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "zamba2", "jamba"])
def test_a_cache_with_recurrent_states_is_not_cropped(name):
    """`DynamicCache` crops the rest, and goes on with states that have read the cropped tokens."""
    model = build(name)
    cache = RotorQuantCache(config=model.config, residual_length=4, statistics_length=0)
    feed(model, cache, prompt(2, 40), (40,))
    cache.activate_past_recording()
    before = snapshot([vars(layer) for layer in cache.layers])
    with pytest.raises(RuntimeError, match=r"crop\(-3\) of a layer with a recurrent state"):
        cache.crop(-3)
    assert same(snapshot([vars(layer) for layer in cache.layers]), before)
