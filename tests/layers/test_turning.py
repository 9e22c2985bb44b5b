"""Layers that know how RoPE turns their keys: rounding follows the text."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.backend import backend
from rotorquant_hf.layers import RotorQuantLayer, RotorQuantSlidingLayer
from rotorquant_hf.quant import channels
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from tests.helpers.models import build

HEADS, GROUP, D = 2, 3, 32
FREQUENCIES = 10_000.0 ** (-torch.arange(16) / 16)
ROPE = Rope(FREQUENCIES.view(1, 1, 1, -1), "half")
CONFIG = RotorQuantConfig(
    key_bits=3,
    value_bits=3,
    residual_length=8,
    block_length=4,
    num_sink_tokens=4,
    statistics_length=32,
)
MODULES = ("rotorquant_hf.quant.channels", "rotorquant_hf.store.side")
MODULES += ("rotorquant_hf.layers.ring",)


@pytest.fixture
def short_segments(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(f"{module}.SEGMENT", 16)


def states(tokens, seed=0):
    """Keys with a mean before RoPE, turned, and values."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(1, HEADS, 1, D, generator=generator)
    keys = mean + torch.randn(1, HEADS, tokens, D, generator=generator)
    values = torch.randn(1, HEADS, tokens, D, generator=generator)
    return ROPE.turn(keys, torch.arange(tokens)), values


def queries(first, tokens, seed=0):
    """Queries that look along few directions before RoPE, at positions from `first` on."""
    generator = torch.Generator().manual_seed(seed + 50)
    x = torch.randn(1, HEADS * GROUP, tokens, D, generator=generator)
    x = x * torch.logspace(0, -2, D)[torch.randperm(D, generator=generator)]
    return ROPE.turn(x, torch.arange(first, first + tokens))


def read(layer, states, sizes, start=0):
    for n in sizes:
        part = [x[:, :, start : start + n] for x in states]
        sdpa(queries(start, n), *layer.update(*part), enable_gqa=True)
        start += n


def error_of_scores(layer, keys, first, last):
    """Mean squared error of the scores of the keys [first, last), for queries that follow."""
    sinks = layer.sinks[0].shape[2]
    stored = layer.store.get_keys()[:, :, first - sinks : last - sinks]
    error = (stored - keys[:, :, first:last]).repeat_interleave(GROUP, dim=1)
    return float((queries(last, 300) @ error.mT).square().mean())


def test_late_keys_are_rounded_for_the_queries_that_follow_them():
    keys_and_values = states(6000)
    turning, frozen = RotorQuantLayer(CONFIG, rope=ROPE), RotorQuantLayer(CONFIG)
    nearest = RotorQuantLayer(RotorQuantConfig(**CONFIG.to_dict() | {"query_aware": False}))
    for layer in (turning, frozen, nearest):
        read(layer, keys_and_values, (300, *[300] * 19))
    keys = keys_and_values[0]
    late = [error_of_scores(x, keys, 5500, 5900) for x in (turning, frozen, nearest)]
    assert late[0] < 0.6 * min(late[1:])
    early = [error_of_scores(x, keys, 10, 290) for x in (turning, frozen, nearest)]
    assert max(early[:2]) < 0.6 * early[2]
    assert early[0] < 1.6 * early[1]  # frozen there, it fits there best


def last_packed(one, other, count):
    """Codes of the last tokens that both hold packed, as many of each."""
    ends = [x.get_seq_length() - x.recent_length for x in (one, other)]
    codes = []
    for layer, end in zip((one, other), ends, strict=True):
        packed = layer.store.state()["key_codes"]
        packed = packed[:, :, : packed.shape[2] - (end - min(ends))]
        assert packed.shape[2] >= count
        codes.append(packed[:, :, packed.shape[2] - count :])
    return codes


@pytest.mark.parametrize("sliding", [0, 60])
def test_queries_are_turned_back_from_where_they_are(sliding):
    keys_and_values = states(30)
    whole = QueryMoment.of(queries(0, 30), HEADS, ROPE, torch.arange(30))
    for sizes in ([1] * 30, [7, 1, 1, 20, 1]):
        layer = RotorQuantSlidingLayer(CONFIG, sliding, rope=ROPE) if sliding else None
        layer = layer or RotorQuantLayer(CONFIG, rope=ROPE)
        start = 0
        for n in sizes:
            part = [x[:, :, start : start + n] for x in keys_and_values]
            sdpa(queries(0, 30)[:, :, start : start + n], *layer.update(*part), enable_gqa=True)
            start += n
        layer.count_queries()
        torch.testing.assert_close(layer.moment.pre_rope, whole.pre_rope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sliding", [0, 60])
def test_codes_do_not_depend_on_how_the_text_comes(sliding, short_segments):
    """Each token is coded with the Hessian of its segment, whatever comes with it."""
    keys_and_values = states(200)
    layers = []
    for sizes in ([1] * 160, [33, 1, 50, 26, 50], [4] * 40):
        if sliding:
            layer = RotorQuantSlidingLayer(CONFIG, sliding, rope=ROPE)
        else:
            layer = RotorQuantLayer(CONFIG, rope=ROPE)
        read(layer, keys_and_values, (40, *sizes))
        layers.append(layer)
    for layer in layers[1:]:
        assert torch.equal(*last_packed(layers[0], layer, 40 if sliding else 184))
    statistics = layers[0].store.keys.statistics
    segments = [statistics.hessian_at(p).factor for p in range(0, 200, 16)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(segments))


@pytest.mark.parametrize("sliding", [0, 60])
def test_cropping_goes_back_to_the_position_too(sliding, short_segments):
    keys_and_values = states(200)
    cropped, straight = (
        RotorQuantSlidingLayer(CONFIG, sliding, rope=ROPE)
        if sliding
        else RotorQuantLayer(CONFIG, rope=ROPE)
        for _ in range(2)
    )
    if sliding:
        cropped.activate_past_recording()
    read(cropped, keys_and_values, (50, 50, 40))
    cropped.crop(-40)
    read(straight, keys_and_values, (50, 50))
    for layer in (cropped, straight):
        read(layer, keys_and_values, (20, 20, 20), start=100)
    assert torch.equal(*last_packed(cropped, straight, 40 if sliding else 140))


@pytest.mark.parametrize("sliding", [0, 60])
def test_the_ring_turns_with_the_text(sliding, short_segments):
    """Blocks coded by the kernel are those of the torch path, segment after segment."""
    keys_and_values = states(110)
    layers = []
    for name in ("torch", "triton"):
        if sliding:
            layer = RotorQuantSlidingLayer(CONFIG, sliding, rope=ROPE)
        else:
            layer = RotorQuantLayer(CONFIG, rope=ROPE)
        with backend("torch"):
            read(layer, keys_and_values, (40,))
        with backend(name):
            for start in range(40, 110, 2):
                layer.update(*(x[:, :, start : start + 2] for x in keys_and_values))
        layers.append(layer)
    assert layers[0].ring is None
    assert layers[1].ring is not None
    wanted, found = (x.store.get_keys()[:, :, -45:] for x in layers)
    off = (wanted - found).abs().amax(dim=-1) > 1e-4
    assert off.float().mean() < 0.02  # a coordinate near a boundary
    frozen = RotorQuantLayer(CONFIG, rope=ROPE)
    frozen.lazy_initialization(*(x[:, :, :0] for x in keys_and_values))
    statistics = layers[0].store.keys.statistics
    frozen.store.keys.statistics = statistics
    frozen.store.keys.append(keys_and_values[0][:, :, 80:96], position=0)
    there = layers[1].store.get_keys()[:, :, -20:-4]  # packed up to 100
    assert layers[1].get_seq_length() - layers[1].recent_length == 100
    assert (frozen.store.keys.reconstructed() - there).abs().max() > 0.1


def test_keys_without_rope_are_left_alone():
    """A model's config may promise RoPE to layers that have none."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.linspace(-3, 3, D) + torch.randn(1, HEADS, 400, D, generator=generator)
    values = torch.randn(1, HEADS, 400, D, generator=generator)
    told, untold = RotorQuantLayer(CONFIG, rope=ROPE), RotorQuantLayer(CONFIG)
    for layer in (told, untold):
        read(layer, (keys, values), (300, 50, 50))
    assert not told.store.keys.statistics.rope.turns.any()
    found, wanted = (x.store.state() for x in (told, untold))
    assert found.keys() - wanted.keys() == {"key_frequencies"}
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)


def test_frequencies_of_larger_heads_are_not_used():
    keys, values = states(60)
    small = keys[..., :24], values
    layers = RotorQuantLayer(CONFIG, rope=ROPE), RotorQuantLayer(CONFIG)
    for layer in layers:
        for start, end in ((0, 40), (40, 60)):
            layer.update(*(x[:, :, start:end] for x in small))
    found, wanted = (x.store.state() for x in layers)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_config_tells(tmp_path):
    """From the model's config to the layers, and through a file, also without the config."""
    llama = build("llama")
    settings = RotorQuantConfig(residual_length=8, block_length=4, statistics_length=32)
    ids = torch.randint(1, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    told = RotorQuantCache(settings, config=llama.config)
    untold = RotorQuantCache(settings)
    for cache in (told, untold):
        llama(ids, past_key_values=cache)
    assert all(x.rope is not None for x in told.layers)
    assert all(x.rope is None for x in untold.layers)
    told.save(tmp_path / "cache.safetensors")
    loaded = RotorQuantCache.load(tmp_path / "cache.safetensors")
    for ours, theirs in zip(told.layers, loaded.layers, strict=True):
        a, b = (x.store.keys.statistics for x in (ours, theirs))
        assert torch.equal(a.rope.frequencies, b.rope.frequencies)
        position = 5 * channels.SEGMENT
        assert torch.equal(a.hessian_at(position).factor, b.hessian_at(position).factor)


def test_queries_before_rope_go_into_files(tmp_path):
    llama = build("llama")
    ids = torch.randint(1, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    cache = RotorQuantCache(config=llama.config, statistics_length=64)
    llama(ids[:, :30], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = RotorQuantCache.load(tmp_path / "cache.safetensors", config=llama.config)
    for ours, theirs in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(ours.moment.pre_rope, theirs.moment.pre_rope)
        assert ours.moment.count == theirs.moment.count
