"""Bits layer by layer: caches that have them, and how `allocate_bits` divides them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from evals.caches.registry import CacheSpec
from rotorquant_hf import (
    RotorQuantCache,
    RotorQuantConfig,
    RotorQuantKVCache,
    allocate_bits,
    calibrate,
)
from rotorquant_hf.allocating import divide
from rotorquant_hf.layers.full import RotorQuantLayer
from tests.helpers.models import build, feed, prompt, same, snapshot

SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4}
THREE = RotorQuantConfig(key_bits=3, value_bits=3, **SMALL)


def spec_bits(cache):
    """Bits of keys and values of the layers that are compressed."""
    layers = [x for x in cache.layers if isinstance(x, RotorQuantLayer)]
    return [(x.store.key_quantizer.bits, x.store.value_quantizer.bits) for x in layers]


# --- caches ---


@pytest.mark.parametrize("with_config", [True, False])
def test_layers_have_the_bits_that_are_theirs(with_config, tmp_path):
    model = build("llama")
    count, ids = model.config.num_hidden_layers, prompt(2, 60)
    keys = tuple(2 + i % 3 for i in range(count))
    config = model.config if with_config else None
    cache = RotorQuantCache(key_bits=list(keys), value_bits=5, config=config, **SMALL)
    feed(model, cache, ids, (40, 1))
    assert spec_bits(cache) == [(b, 5) for b in keys]
    assert "by layer/5" in repr(cache)
    even = RotorQuantCache(key_bits=3, value_bits=5, config=config, **SMALL)
    feed(model, even, ids, (40, 1))
    sizes = [x.layers[1].store.nbytes()["key_codes"] for x in (cache, even)]
    assert sizes[0] == sizes[1]  # of three bits both
    sizes = [x.layers[0].store.nbytes()["key_codes"] for x in (cache, even)]
    assert 3 * sizes[0] == 2 * sizes[1]
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", config=config)
    assert loaded.settings == cache.settings
    assert spec_bits(loaded) == spec_bits(cache)
    assert torch.equal(*(feed(model, x, ids[:, 41:], (9, 1)) for x in (cache, loaded)))


def test_rotations_are_one_for_all_bits():
    """A matrix is most of what a short text takes with wide heads."""

    def tables(keys, values):
        cache, x = RotorQuantCache(key_bits=keys, value_bits=values, **SMALL), states()
        for layer in range(3):
            cache.update(x, x, layer)
        return cache.memory().parts["tables"]

    def states() -> torch.Tensor:
        return torch.randn(1, 1, 60, 256)

    matrices = 2 * 256 * 256 * 4
    assert matrices < tables(3, 3) < matrices + 500
    assert matrices < tables((2, 3, 4), (5, 3, 2)) < matrices + 1000


def test_what_is_wrong_is_named():
    config = build("llama").config
    count = config.num_hidden_layers
    for bits, says in (
        ((), "key_bits is empty"),
        ((3, 9), "key_bits of a layer is 9"),
        ((3, 2.5), "key_bits of a layer is 2.5"),
        ("33", "key_bits is '33'"),
    ):
        with pytest.raises(ValueError, match=says):
            RotorQuantConfig(key_bits=bits)
    with pytest.raises(ValueError, match="key_bits of a layer is 1"):
        RotorQuantConfig(key_bits=(3, 1), key_quantizer="prod")
    with pytest.raises(ValueError, match=f"value_bits has 99 numbers, but the model has {count}"):
        RotorQuantCache(value_bits=(3,) * 99, config=config)
    cache, x = RotorQuantCache(key_bits=(3, 4)), torch.zeros(1, 2, 5, 16)
    cache.update(x, x, 0)
    cache.update(x, x, 1)
    with pytest.raises(ValueError, match="key_bits has 2 numbers, but the model has a layer 2"):
        cache.update(x, x, 2)
    assert len(cache.layers) == 2
    with pytest.raises(ValueError, match=r"key_bits is \(3, 4\), layer by layer; a single layer"):
        RotorQuantKVCache(16, 16, config=RotorQuantConfig(key_bits=(3, 4)))


def test_labels_and_code_of_the_harness():
    spec = CacheSpec.named("k3v3:residual_length=32,key_bits=[2,3,4,4],value_bits=[3,3,3,3]")
    assert spec.options.key_bits == (2, 3, 4, 4)
    assert spec.label == "k3.25v3, by layer, window 32"
    line, call = spec.code
    scope = {"model": build("llama")}
    exec(line, scope)
    made = eval(call.replace("config=model.config", "config=None"), scope)
    assert made.settings == spec.options


# --- dividing ---

COSTS = {
    ("key_bits", 0): 9.0,
    ("key_bits", 1): 0.01,
    ("key_bits", 2): 1.0,
    ("value_bits", 0): 0.3,
    ("value_bits", 1): 0.02,
}


def predicted(costs, bits, before):
    return sum(cost * 4.0 ** (before[side[0]] - bits[side]) for side, cost in costs.items())


@pytest.mark.parametrize(
    "before", [{"key_bits": 3, "value_bits": 3}, {"key_bits": 4, "value_bits": 2}]
)
def test_the_sum_of_errors_is_least(before):
    """Of all divisions of as many bits, by brute force."""
    found = divide(COSTS, before, THREE)
    total = sum(before[name] for name, _ in COSTS)
    assert sum(found.values()) == total
    best = min(
        predicted(COSTS, dict(zip(COSTS, bits, strict=True)), before)
        for bits in itertools.product(range(2, 9), repeat=len(COSTS))
        if sum(bits) == total
    )
    assert predicted(COSTS, found, before) == pytest.approx(best)


def test_bits_stay_in_their_limits():
    before = {"key_bits": 7, "value_bits": 7}
    costs = {("key_bits", 0): 1e9, ("key_bits", 1): 0.0, ("value_bits", 0): 1e3}
    assert divide(costs, before, THREE) == {
        ("key_bits", 0): 8,
        ("key_bits", 1): 5,
        ("value_bits", 0): 8,
    }
    one = {"key_bits": 1, "value_bits": 1}
    assert set(divide(costs, one, THREE).values()) == {1}  # fewer than two are not taken apart


# --- measuring ---


def test_layers_that_nothing_depends_on_get_fewest():
    model = copy.deepcopy(build("llama"))
    idle = 1
    model.model.layers[idle].self_attn.o_proj.weight.data.zero_()
    before = [x.clone() for x in model.parameters()]
    passes = []
    ids = torch.cat([prompt(1, 80), prompt(1, 80, seed=1)])
    made = allocate_bits(model, ids, THREE, lambda done, total: passes.append((done, total)))
    count = model.config.num_hidden_layers
    assert (made.key_bits[idle], made.value_bits[idle]) == (2, 2)
    assert len(made.key_bits) == len(made.value_bits) == count
    assert sum(made.key_bits + made.value_bits) == 6 * count
    assert made.of_layer(0).residual_length == THREE.residual_length
    assert passes == [(i + 1, 4 * count) for i in range(4 * count)]
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    cache = RotorQuantCache(made, config=model.config)
    feed(model, cache, ids, (40, 1))
    assert spec_bits(cache) == list(zip(made.key_bits, made.value_bits, strict=True))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "gpt2", "falcon_h1", "zamba2", "zaya"])
def test_layers_of_every_kind(name):
    """Each kind of layer keeps its bits: a token takes other memory in a sliding window."""
    model = build(name)
    made = allocate_bits(model, prompt(1, 80), THREE)
    cache = RotorQuantCache(made, config=model.config)
    logits = feed(model, cache, prompt(2, 60), (40, 1, 1))
    assert torch.isfinite(logits).all()
    pools: dict = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RotorQuantLayer):
            kind = getattr(layer, "sliding_window", None)
            pools.setdefault(kind, []).extend([made.key_bits[index], made.value_bits[index]])
        else:
            assert (made.key_bits[index], made.value_bits[index]) == (3, 3)
    assert all(sum(bits) == 3 * len(bits) for bits in pools.values())
    again = allocate_bits(model, prompt(1, 80), THREE)
    assert again == made


def test_a_calibration_takes_settings_layer_by_layer():
    model = build("llama")
    made = allocate_bits(model, prompt(1, 80), THREE)
    calibration = calibrate(model, prompt(2, 200), made)
    cache = RotorQuantCache(made, config=model.config, calibration=calibration)
    feed(model, cache, prompt(2, 60), (40, 1))
    assert spec_bits(cache) == list(zip(made.key_bits, made.value_bits, strict=True))


def test_what_cannot_be_divided_is_named():
    model = build("llama")
    with pytest.raises(ValueError, match="have 31 tokens; with these settings pass windows of 32"):
        allocate_bits(model, prompt(1, 31), THREE)
    with pytest.raises(ValueError, match="pass \\(windows, tokens\\)"):
        allocate_bits(model, prompt(1, 80)[0], THREE)
    with pytest.raises(ValueError, match=r"shape \(0, 80\)"):
        allocate_bits(model, prompt(1, 80)[:0], THREE)
    with pytest.raises(ValueError, match="layer by layer"):
        allocate_bits(model, prompt(1, 80), RotorQuantConfig(key_bits=(3, 3)))


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_the_caches_that_are_forked_stay_as_they_are(name):
    from rotorquant_hf.allocating import _Window

    with torch.no_grad():
        window = _Window(build(name), prompt(1, 80), THREE)
        before = snapshot([window.exact.layers, window.coded["key_bits"].layers])
        first = [window.divergence(side) for side in window.sides]
        assert [window.divergence(side) for side in window.sides] == first
        assert same(snapshot([window.exact.layers, window.coded["key_bits"].layers]), before)
    assert all(x > 0 for x in first)


def test_bits_do_not_flow_between_kinds_of_layers(monkeypatch):
    """However much more the errors of one kind cost."""
    from rotorquant_hf.allocating import _Window

    def divergence(self, side):
        return 1e6 if hasattr(self.exact.layers[side[1]], "sliding_window") else 1.0

    monkeypatch.setattr(_Window, "divergence", divergence)
    made = allocate_bits(build("gemma3"), prompt(1, 80), THREE)
    assert set(made.key_bits + made.value_bits) == {3}
