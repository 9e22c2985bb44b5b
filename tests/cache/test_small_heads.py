"""Heads that cannot be quantised: their layers are Transformers' own, and a warning says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache, calibrate
from tests.helpers import models
from tests.helpers.models import build, feed, prompt

HEADS = {
    "llama": {"head_dim": 4},
    "mistral": {"head_dim": 4},
    "gemma3": {"head_dim": 6},
    "falcon_h1": {"head_dim": 4},
    "zaya": {"head_dim": 4},
    "gpt2": {"n_embd": 12},
}
CHUNKS = (30, 1, 1, 20)
WARNED = pytest.mark.filterwarnings("ignore:this model has heads of")


@pytest.fixture
def model(request, monkeypatch):
    tiny = models.MODELS[request.param]
    monkeypatch.setitem(
        models.MODELS, request.param, replace(tiny, options=tiny.options | HEADS[request.param])
    )
    build.cache_clear()
    yield build(request.param)
    build.cache_clear()


EACH = pytest.mark.parametrize("model", HEADS, indirect=True)


@EACH
def test_logits_are_those_of_dynamic_cache(model, tmp_path) -> None:
    ids, oracle = prompt(2, 60), DynamicCache(config=model.config)
    cache = RotorQuantCache("k3v3", config=model.config)
    with pytest.warns(UserWarning, match=r"heads of [346] elements; only heads of 8 to 576 can be"):
        found = feed(model, cache, ids, CHUNKS)
    assert torch.equal(found, feed(model, oracle, ids, CHUNKS))
    assert [type(x) for x in cache.layers] == [type(x) for x in oracle.layers]

    report = cache.memory()
    assert report.total_bytes == report.parts["exact_layers"] > 0
    assert report.packed_numbers == 0
    cache.save(tmp_path / "cache")
    twin = RotorQuantCache.load(tmp_path / "cache", config=model.config)
    rest = [feed(model, x, ids[:, sum(CHUNKS) :], (1, 7)) for x in (cache, twin, oracle)]
    assert torch.equal(rest[0], rest[1])
    assert torch.equal(rest[0], rest[2])


@WARNED
@EACH
def test_generation_by_beams(model) -> None:
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    found, wanted = (
        model.generate(prompt(2, 30), past_key_values=cache(config=model.config), **options)
        for cache in (RotorQuantCache, DynamicCache)
    )
    assert torch.equal(found, wanted)


@WARNED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_without_a_config(model, tmp_path) -> None:
    cache = RotorQuantCache()
    assert torch.equal(
        feed(model, cache, prompt(1, 60), CHUNKS),
        feed(model, DynamicCache(), prompt(1, 60), CHUNKS),
    )
    cache.save(tmp_path / "cache")
    assert RotorQuantCache.load(tmp_path / "cache").get_seq_length() == sum(CHUNKS)


@WARNED
@pytest.mark.parametrize("model", ["mistral"], indirect=True)
def test_a_window_that_is_recorded_can_be_cropped(model) -> None:
    """As assisted generation does."""
    lengths = []
    for kind in (DynamicCache, RotorQuantCache):
        cache = kind(config=model.config)
        for layer in cache.layers:
            layer.activate_past_recording()
        try:
            feed(model, cache, prompt(1, 60), (40, 5))
        except RuntimeError as error:  # Transformers 5.17 gives the mask another length
            if kind is RotorQuantCache:
                raise
            pytest.skip(f"DynamicCache of transformers {transformers.__version__}: {error}")
        cache.crop(-3)
        lengths.append((cache.get_seq_length(), cache.layers[0].keys.shape[2]))
    assert lengths[0] == lengths[1]


@WARNED
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_calibration_is_of_no_layer(model) -> None:
    made = calibrate(model, prompt(1, 300))
    assert made.layers == {}
    cache = RotorQuantCache(config=model.config, calibration=made)
    assert feed(model, cache, prompt(1, 60), CHUNKS).isfinite().all()


def test_heads_of_which_one_side_cannot_be() -> None:
    cache = RotorQuantCache()
    keys, values = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 7)
    with pytest.warns(UserWarning, match="heads of 7 and 16 elements"):
        cache.update(keys, values, 1)
    assert torch.equal(cache.layers[1].values, values)
    cache.update(keys, keys, 0)
    assert cache.memory().packed_numbers > 0
