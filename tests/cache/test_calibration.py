"""Calibrations: what a cache learns of a model, taken once and kept in a file."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from rotorquant_hf import Calibration, RotorQuantCache, RotorQuantConfig, calibrate
from rotorquant_hf.calibration import CALIBRATION_FILE
from rotorquant_hf.layers import RotorQuantLayer
from rotorquant_hf.passing import cache_argument
from rotorquant_hf.store.side import PackedSide
from tests.helpers.models import build, same, snapshot
from tests.helpers.saved_files import rewrite

SMALL = {"residual_length": 8, "block_length": 4}


def text(model, windows=3, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size - 1, (windows, tokens), generator=generator)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "falcon_h1"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def calibration(model):
    return calibrate(model, text(model))


def cache_of(model, calibration, **options):
    return RotorQuantCache("k3v3", config=model.config, calibration=calibration, **SMALL | options)


def test_it_is_what_a_cache_takes_from_the_text(model):
    """Of one window: the statistics of a cache that has read the same."""
    ids = text(model, 1, 300)
    made = calibrate(model, ids)
    cache = RotorQuantCache("k3v3", config=model.config, statistics_length=290, **SMALL)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert made.tokens == 300
    assert sorted(made.layers) == list(range(len(cache.layers)))
    for index, layer in enumerate(cache.layers):
        if layer.is_sliding:  # holds another part of the text
            continue
        for side, statistics in zip(layer.store.sides, made.layers[index], strict=True):
            found = side.statistics.tensors()
            for name, tensor in statistics.tensors().items():
                torch.testing.assert_close(tensor, found[name], rtol=1e-2, atol=1e-2)
        assert made.layers[index][0].hessian is not None
        assert made.layers[index][1].hessian is None


def test_quantising_begins_at_once(model, calibration):
    """After the recent window, and whatever the attention shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for attention in ("eager", "sdpa"):
            other = copy.deepcopy(model)
            other.set_attn_implementation(attention)
            cache = cache_of(model, calibration)
            assert cache.tokens_until_packing() <= 4 + 8 + 4
            with torch.no_grad():
                other(text(model, 2, 30), **cache_argument(other, cache))
            for layer in cache.layers:
                assert len(layer.store) > 0
                assert layer.moment is None
                assert not layer.waits


def test_keys_are_rounded_for_the_queries(model, calibration):
    """The Hessian of the calibration is that of the codes: another one gives others."""
    plain = {
        i: (k.map(lambda x: x) if k.hessian is None else type(k)(k.scale, k.mean), v)
        for i, (k, v) in calibration.layers.items()
    }
    without = Calibration(calibration.model, calibration.settings, calibration.tokens, plain)
    codes = []
    for known in (calibration, without):
        cache = cache_of(model, known)
        with torch.no_grad():
            model(text(model, 1, 60), past_key_values=cache)
        codes.append(cache.layers[0].store.keys.span().rows["codes"])
    assert not torch.equal(*codes)


def test_saved_and_loaded(model, calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    read = Calibration.load(path)
    assert (read.model, read.settings, read.tokens) == (
        calibration.model,
        calibration.settings,
        300,
    )
    ids = text(model, 2, 50)
    rows = []
    for given in (calibration, read, path, str(path)):
        cache = cache_of(model, given)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        rows.append(cache)
    assert all(same(snapshot(rows[0]), snapshot(other)) for other in rows[1:])
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_a_saved_cache_goes_on(model, calibration, tmp_path):
    """Whether it was saved before anything was packed or after."""
    ids = text(model, 2, 80)
    for length in (5, 40):
        cache = cache_of(model, calibration)
        with torch.no_grad():
            model(ids[:, :length], past_key_values=cache)
            cache.save(tmp_path / "cache")
            loaded = RotorQuantCache.load(tmp_path / "cache", config=model.config)
            logits = [model(ids[:, length:], past_key_values=x).logits for x in (cache, loaded)]
        assert torch.equal(*logits)
        assert same(*(snapshot([layer.store for layer in x.layers]) for x in (cache, loaded)))
        assert all(layer.store.calibrated for layer in loaded.layers)
        loaded.reset()
        anew = cache_of(model, calibration)
        with torch.no_grad():
            logits = [model(ids[:1, :50], past_key_values=x).logits for x in (loaded, anew)]
        assert torch.equal(*logits)
        assert all(layer.store.calibrated and len(layer.store) for layer in loaded.layers)


def test_statistics_stay_when_the_tokens_go(model, calibration):
    cache = cache_of(model, calibration)
    wanted = calibration.layers[0][0]
    with torch.no_grad():
        model(text(model, 2, 40), past_key_values=cache)
        for layer in cache.layers:
            if layer.is_sliding or not layer.is_croppable:
                layer.reset()
            else:
                layer.crop(-40)
        assert cache.get_seq_length() == 0
        model(text(model, 2, 40), past_key_values=cache)
    statistics = cache.layers[0].store.keys.statistics
    assert torch.equal(statistics.scale[:1], wanted.scale)
    assert torch.equal(statistics.hessian.factor[:1], wanted.hessian.factor)


def test_rows_of_a_batch(model, calibration):
    """Every row has the statistics, also after beams were reordered."""
    ids = text(model, 3, 40)
    together = cache_of(model, calibration)
    with torch.no_grad():
        model(ids, past_key_values=together)
    together.reorder_cache(torch.tensor([2, 0, 1]))
    alone = cache_of(model, calibration)
    with torch.no_grad():
        model(ids[2:], past_key_values=alone)
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        torch.testing.assert_close(ours.store.get_keys()[:1], theirs.store.get_keys())


def test_another_model_is_refused(calibration, model):
    other = copy.deepcopy(model.config)
    other.get_text_config().vocab_size += 1
    with pytest.raises(ValueError, match=r"another model: its vocab_size is \d+"):
        RotorQuantCache(config=other, calibration=calibration)
    with pytest.raises(ValueError, match=r"pass|needs config=model\.config"):
        RotorQuantCache(calibration=calibration)


def test_other_settings_are_refused(calibration, model):
    with pytest.raises(ValueError, match=r"equalize_keys is 0.25, but the calibration was made"):
        cache_of(model, calibration, equalize_keys=0.25)
    with pytest.raises(ValueError, match="center_keys is 'auto'"):
        cache_of(model, calibration, center_keys="auto")
    with pytest.raises(ValueError, match="query_aware is False, but the calibration was made"):
        cache_of(model, calibration, query_aware=False)
    nearest = calibrate(model, text(model), RotorQuantConfig(query_aware=False))
    with pytest.raises(ValueError, match="query_aware is True, but the calibration was made"):
        cache_of(model, nearest)
    cache_of(model, nearest, query_aware=False)
    cache_of(model, calibration, key_bits=2, seed=7)  # these do not matter


@pytest.mark.parametrize("changed", [{"factor": 4.0, "rope_type": "linear"}, {"rope_theta": 5e5}])
def test_another_rope_is_refused(changed, tmp_path):
    """By a calibration, and by a cache in a file: the Hessian turns as where it was taken."""
    llama = build("llama")
    made = calibrate(llama, text(llama))
    other = copy.deepcopy(llama.config)
    other.rope_parameters = {**llama.config.rope_parameters, **changed}
    with pytest.raises(ValueError, match="in layer 0 the calibration was made where RoPE turns"):
        RotorQuantCache(config=other, calibration=made)
    cache = cache_of(llama, made)
    with torch.no_grad():
        llama(text(llama, 1), past_key_values=cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"layer 0 of .* was saved where RoPE turns keys"):
        RotorQuantCache.load(tmp_path / "cache", config=other)


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant", "eager"])
@torch.no_grad()
def test_padded_rows_keep_their_own_first_tokens(attention):
    """As without a calibration: the first block waits for the mask, where attention shows it."""
    llama = build("llama", attention)
    made = calibrate(build("llama"), text(llama))
    ids = text(llama, 2, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cache, alone = cache_of(llama, made), cache_of(llama, made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        llama(ids, past_key_values=cache, **given)
        llama(ids[1:, 20:], past_key_values=alone)
    for layer, single in zip(cache.layers, alone.layers, strict=True):
        assert len(layer.store) == 48
        assert len(single.store) == 28
        if attention == "eager":
            assert layer.stand_ins is None
            continue
        assert layer.stand_ins.tokens.tolist() == [[0, 1, 2, 3], [20, 21, 22, 23]]
        for ours, theirs in zip(layer.sinks, single.sinks, strict=True):
            torch.testing.assert_close(ours[1:], theirs, rtol=0, atol=1e-5)


def test_sinks_longer_than_a_window():
    llama = build("llama")
    with pytest.raises(ValueError, match="of which 0 are not among the first 300 of a window"):
        calibrate(llama, text(llama), RotorQuantConfig(num_sink_tokens=300))


@pytest.mark.parametrize("index", [7, "1", None, [1]])
def test_wide_keys_of_no_layer(index, tmp_path):
    llama = build("llama")
    calibrate(llama, text(llama)).save(tmp_path / "calibration")

    def change(header, tensors):
        header["wide_keys"] = [index]

    rewrite(tmp_path / "calibration", change)
    with pytest.raises(ValueError, match=r"wide_keys|invalid header"):
        Calibration.load(tmp_path / "calibration")


def test_layers_of_another_shape_are_refused():
    llama = build("llama")
    made = calibrate(llama, text(llama))
    layer = RotorQuantLayer(RotorQuantConfig(**SMALL), made.layers[0])
    with pytest.raises(
        ValueError, match=r"another model: weight .*(1, 2, 1, 16).* 3 heads of 16 elements"
    ):
        layer.update(torch.randn(1, 3, 5, 16), torch.randn(1, 3, 5, 16))
    assert layer.get_seq_length() == 0
    layer.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))


def test_settings_of_the_cache_that_will_use_it():
    llama = build("llama")
    made = calibrate(llama, text(llama), "turboquant")
    keys, values = made.layers[0]
    assert keys.hessian is None
    assert keys.mean is None
    assert keys.scale.shape[-1] == values.scale.shape[-1] == 1
    RotorQuantCache("turboquant", config=llama.config, calibration=made)


def test_every_window_counts():
    llama = build("llama")
    ids = text(llama, 2, 256)
    both, turned = calibrate(llama, ids), calibrate(llama, ids.flip(0))
    apart = [calibrate(llama, row[None]) for row in ids]
    for index, (keys, values) in both.layers.items():
        means = torch.stack([made.layers[index][0].mean for made in apart])
        sinks = 1e-5 * means.abs().max()
        torch.testing.assert_close(keys.mean, means.mean(dim=0), rtol=1e-3, atol=float(sinks))
        torch.testing.assert_close(values.scale, turned.layers[index][1].scale)
        hessian = keys.hessian.matrix()
        torch.testing.assert_close(
            hessian, turned.layers[index][0].hessian.matrix(), rtol=1e-2, atol=1e-2
        )
        for made in apart:
            assert (hessian - made.layers[index][0].hessian.matrix()).abs().max() > 0.03


def test_windows_longer_than_a_sliding_layer_s(monkeypatch):
    """Such a layer has the last tokens of every window, and all of its queries."""
    gemma = build("gemma3")  # its sliding window has 24 tokens
    settings = RotorQuantConfig(residual_length=8, block_length=4)
    positions, take = [], PackedSide.take_statistics

    def noting(self, block, at=None, queries=None):
        positions.append(at)
        take(self, block, at, queries)

    monkeypatch.setattr(PackedSide, "take_statistics", noting)
    ids = text(gemma)
    made = calibrate(gemma, ids, settings)
    cache = RotorQuantCache(settings, config=gemma.config)
    assert any(layer.is_sliding for layer in cache.layers)
    assert sorted(made.layers) == list(range(len(cache.layers)))
    assert all(keys.hessian is not None for keys, _ in made.layers.values())
    windows, tokens = ids.shape
    for layer, at in zip(cache.layers, positions[::2], strict=True):  # of keys; values need none
        first = tokens - 23 if layer.is_sliding else settings.num_sink_tokens
        assert at.tolist() == list(range(first, tokens)) * windows


def test_bad_texts_and_attention():
    llama = build("llama")
    with pytest.raises(ValueError, match=r"100 tokens, of which 96 .*; statistics take 252"):
        calibrate(llama, text(llama, 1))
    with pytest.raises(ValueError, match=r"400 tokens, of which 0 are not among the first 4 of a"):
        calibrate(llama, text(llama, 100, 4))
    with pytest.raises(ValueError, match=r"ids have shape \(300,\); .* pass ids\[None\]"):
        calibrate(llama, text(llama, 1, 300)[0])
    with pytest.raises(TypeError, match="ids are of type dict; pass a tensor"):
        calibrate(llama, {"input_ids": text(llama)})
    with pytest.raises(ValueError, match=r"ids have dtype torch.float32; pass token ids"):
        calibrate(llama, text(llama).float())
    with pytest.raises(ValueError, match=r"ids go from \d+ to 500, and the model knows 0 to 96"):
        calibrate(llama, text(llama).index_fill(1, torch.tensor([50]), 500))
    with pytest.raises(TypeError, match="model is of type LlamaConfig; pass the model itself"):
        calibrate(llama.config, text(llama))
    with pytest.raises(ValueError, match="LlamaModel is no causal language model"):
        calibrate(llama.model, text(llama))
    with pytest.raises(ValueError, match="does not show its queries"):
        calibrate(build("llama", "eager"), text(llama))
    calibrate(build("llama", "eager"), text(llama), RotorQuantConfig(query_aware=False))


def test_folders_and_files_of_caches_are_named(model, calibration, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        calibration.save(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        RotorQuantCache.load(tmp_path)
    calibration.save(tmp_path / "file")
    with pytest.raises(ValueError, match="a calibration goes into calibration="):
        RotorQuantCache.load(tmp_path / "file", config=model.config)


def test_bad_files(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="make it with calibrate"):
        Calibration.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(path)
    header = json.dumps({"version": 99})
    ours = {"format": CALIBRATION_FILE.name}
    save_file({"x": torch.zeros(1)}, path, metadata=ours | {"header": header})
    with pytest.raises(ValueError, match="format version 99"):
        Calibration.load(path)
    for damaged in ("{", "[]", json.dumps({"version": CALIBRATION_FILE.version})):
        save_file({"0.key.weight": torch.zeros(1)}, path, metadata=ours | {"header": damaged})
        with pytest.raises(ValueError, match=r"invalid header .*; calibrate again"):
            Calibration.load(path)
    llama = build("llama")
    with pytest.raises(FileNotFoundError, match="folder"):
        calibrate(llama, text(llama)).save(tmp_path / "none" / "file")
