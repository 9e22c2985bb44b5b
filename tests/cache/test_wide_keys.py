"""Layers that take 8-bit keys by themselves: when, what for, and that all else stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from rotorquant_hf import Calibration, RotorQuantCache, RotorQuantConfig, allocate_bits, calibrate
from rotorquant_hf.layers.full import RotorQuantLayer
from tests.helpers.models import MODELS, biased, build, feed, prompt, same, snapshot
from tests.helpers.saved_files import rewrite

SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4}
WIDE = 1  # of `biased`


@pytest.fixture(scope="module")
def model():
    return biased()


def cache_of(model, settings="k3v3", **options) -> RotorQuantCache:
    return RotorQuantCache(settings, config=model.config, **SMALL | options)


def filled(model, settings="k3v3", ids=None, **options) -> RotorQuantCache:
    cache = cache_of(model, settings, **options)
    feed(model, cache, prompt(2, 60) if ids is None else ids, (40, 1))
    return cache


def key_bits(cache: RotorQuantCache) -> list[int]:
    return [x.store.key_quantizer.bits for x in cache.layers if isinstance(x, RotorQuantLayer)]


# --- when ---


@pytest.mark.parametrize("settings", ["k2v2", "k3v3", "k4v4"])
def test_the_layer_with_large_biases(model, settings) -> None:
    cache = filled(model, settings)
    base = cache.settings.key_bits
    assert key_bits(cache) == [base, 8]
    assert cache.wide_layers == (WIDE,)
    assert f"{base}/{base} (8-bit keys in layers 1)" in repr(cache)
    sizes = [layer.store.nbytes() for layer in cache.layers]
    assert base * sizes[1]["key_codes"] == 8 * sizes[0]["key_codes"]
    assert sizes[1]["value_codes"] == sizes[0]["value_codes"]
    assert all(len(x.store) == len(cache.layers[0].store) > 0 for x in cache.layers)


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_of_the_models_drawn_at_random(name) -> None:
    model = build(name)
    cache = RotorQuantCache("k2v2", config=model.config, **SMALL)
    with torch.no_grad():
        feed(model, cache, prompt(2, 60), (40, 1))
    assert cache.wide_layers == ()


@pytest.mark.parametrize(
    "options",
    [
        {"key_bits": (3, 3)},  # the user has chosen
        {"query_aware": False},
        {"key_bits": 8},
        {"exact_layers": (WIDE,)},
    ],
    ids=str,
)
def test_not_where_it_cannot_or_shall_not(model, options) -> None:
    cache = filled(model, **options)
    given = cache.settings.by_layer.get("key_bits") or (cache.settings.key_bits,) * 2
    assert key_bits(cache) == list(given[: len(key_bits(cache))])
    assert cache.wide_layers == ()


def test_not_where_the_model_scales_its_scores_down(tmp_path) -> None:
    """As Granite does. A cache that is saved before it has seen enough remembers."""
    model, ids = biased(), prompt(2, 60)
    model.model.layers[WIDE].self_attn.scaling = 1e-3
    assert filled(model, ids=ids).wide_layers == ()
    cache = cache_of(model)
    feed(model, cache, ids, (6,))
    cache.save(tmp_path / "cache")
    cache = RotorQuantCache.load(tmp_path / "cache", config=model.config)
    assert cache.layers[WIDE].moment.scale == 1e-3

    def change(header, tensors):
        header["layers"][WIDE]["attributes"]["score_scale"] = "much"

    rewrite(tmp_path / "cache", change)
    with pytest.raises(ValueError, match="score_scale 'much', not a number"):
        RotorQuantCache.load(tmp_path / "cache", config=model.config)


def test_the_published_methods_stay_as_they_are(model) -> None:
    for name in ("turboquant", "rotorquant-reference"):
        assert filled(model, name).wide_layers == ()


# --- what for ---


def test_scores_are_better(model) -> None:
    """Than with the same bits for all layers, by the divergence of the next tokens."""
    # 8-bit values, so that the keys alone count.
    ids, found = prompt(2, 200), []
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(dim=-1)
        for bits in (4, (4, 4)):
            cache = cache_of(model, key_bits=bits, value_bits=8)
            read = feed(model, cache, ids, (60, *[4] * 35)).log_softmax(dim=-1)
            found.append(float((exact.exp() * (exact - read)).sum(dim=-1)[:, 60:].mean()))
    assert found[0] < found[1] / 10


# --- as before ---


def test_it_is_forgotten_with_the_text(model) -> None:
    cache = filled(model)
    cache.reset()
    assert cache.wide_layers == ()
    feed(build("qwen2"), cache, prompt(2, 60), (40, 1))  # the same shape, without biases
    assert key_bits(cache) == [3, 3]
    cache.crop(-41)
    feed(model, cache, prompt(2, 60), (40, 1))
    assert key_bits(cache) == [3, 8]
    cache.crop(-37)  # nothing packed is left
    assert cache.wide_layers == ()


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
def test_saved_and_loaded(model, tmp_path, quantizer) -> None:
    ids = prompt(2, 60)
    cache = filled(model, ids=ids, key_quantizer=quantizer)
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", config=model.config)
    assert loaded.wide_layers == (WIDE,)
    assert loaded.memory().packed_bytes == cache.memory().packed_bytes
    read = [feed(model, x, ids[:, 41:], (9, 1)) for x in (cache, loaded)]
    assert torch.equal(*read)
    assert key_bits(loaded) == [3, 8]


@pytest.mark.parametrize("value", [False, 1, "yes", None])
def test_a_file_that_says_something_else_is_refused(model, tmp_path, value) -> None:
    path = tmp_path / "cache"
    filled(model).save(path)

    def change(header, tensors):
        header["layers"][WIDE]["attributes"]["wide_keys"] = value

    rewrite(path, change)
    expected = "key_codes" if value is False else "wide_keys"
    with pytest.raises(ValueError, match=f"layer {WIDE} of .*{expected}"):
        RotorQuantCache.load(path, config=model.config)


def test_rows_are_selected_copied_and_reordered(model) -> None:
    ids = prompt(2, 60)
    cache = filled(model, ids=ids)
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    assert one.wide_layers == (WIDE,)
    whole = feed(model, copy.deepcopy(cache), ids[:, 41:], (9, 1))
    torch.testing.assert_close(feed(model, one, ids[1:, 41:], (9, 1)), whole[1:])
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(feed(model, cache, ids.flip(0)[:, 41:], (9, 1)), whole.flip(0))


def test_a_block_that_fails_leaves_the_layer_as_it_was(model, monkeypatch) -> None:
    cache = cache_of(model)
    feed(model, cache, prompt(2, 60), (6,))
    before = snapshot(cache.layers)

    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("rotorquant_hf.store.side.PackedSide.append", fails)
    with pytest.raises(MemoryError):
        feed(model, cache, prompt(2, 60)[:, 6:], (40,))
    assert same(snapshot(cache.layers), before)
    assert cache.wide_layers == ()
    monkeypatch.undo()
    feed(model, cache, prompt(2, 60)[:, 6:], (40,))
    assert cache.wide_layers == (WIDE,)


# --- calibrations, and bits by layer ---


@pytest.mark.parametrize("settings", [None, RotorQuantConfig(key_bits=(2, 2))], ids=["one", "each"])
def test_a_calibration_knows(model, tmp_path, settings) -> None:
    """Whatever the bits of the caches that it is made for."""
    made = calibrate(model, prompt(3, 100), settings)
    assert [keys.needs_wide for keys, _ in made.layers.values()] == [False, True]
    made.save(tmp_path / "calibration")
    read = Calibration.load(tmp_path / "calibration")
    assert [keys.needs_wide for keys, _ in read.layers.values()] == [False, True]
    assert not any(values.needs_wide for _, values in read.layers.values())
    cache = filled(model, calibration=read)
    assert key_bits(cache) == [3, 8]
    cache.reset()
    feed(model, cache, prompt(2, 60), (40, 1))
    assert key_bits(cache) == [3, 8]
    assert key_bits(filled(model, calibration=read, key_bits=(3, 4))) == [3, 4]


def test_a_calibrated_cache_is_saved(model, tmp_path) -> None:
    cache = filled(model, calibration=calibrate(model, prompt(3, 100)))
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", config=model.config)
    assert key_bits(loaded) == [3, 8]
    loaded.reset()
    feed(model, loaded, prompt(2, 60), (40, 1))
    assert key_bits(loaded) == [3, 8]


def test_allocated_bits_are_what_the_layer_needs(model) -> None:
    """The costs are those of the bits asked about, not of 8."""
    made = allocate_bits(model, prompt(1, 120), RotorQuantConfig(key_bits=4, value_bits=4, **SMALL))
    assert made.key_bits[WIDE] > 4
    assert filled(model, made).wide_layers == ()
