"""A cache that compresses nothing, or is not read, is caught."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache, cache_utils

from evals.caches.registry import CacheSpec
from evals.caches.tensors import tensors_in
from evals.measurements.comparison import compare
from evals.measurements.perplexity import PerplexityMeasurement, PerplexityOptions
from evals.measurements.reference import Reference, SinglePass
from evals.probes.chunked import feed
from evals.probes.integrity import warnings_of, warnings_of_filled
from evals.subjects.models import LoadedModel, ModelOptions
from rotorquant_hf import RotorQuantCache
from rotorquant_hf.passing import CACHE_NAME
from tests.conftest import ROOT
from tests.helpers.models import build

OPTIONS = {"residual_length": 32, "statistics_length": 0, "key_bits": 2, "value_bits": 2}


class KeepsCopies(RotorQuantCache):
    """Quantises, and lets attention read exact copies kept aside."""

    def __init__(self, hidden: dict | None = None) -> None:
        super().__init__(**OPTIONS)
        self.layers_kept = hidden if hidden is not None else {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        old = self.layers_kept.get(layer_idx)
        new = (key_states, value_states)
        if old is not None:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.layers_kept[layer_idx] = new
        self.layers[layer_idx].kept = new
        return new


class HidesCopies(KeepsCopies):
    """The same, with the copies where the cache's own tensors are not."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        del self.layers[layer_idx].kept
        return found


class ReadsSomeExactly(HidesCopies):
    """The same, but for one part or a layer, which is honest."""

    def __init__(self, honest: str) -> None:
        super().__init__()
        self.honest = honest

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = self.layers_kept.get(layer_idx)
        exact = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if before is None:
            return exact
        layer, new = self.layers[layer_idx], key_states.shape[2]
        seen = [x[:] for x in (layer.keys, layer.values)]  # with the new tokens packed, if any
        if self.honest == "values":
            return exact[0], seen[1]
        return tuple(seen) if layer_idx == 3 and new else exact


class SimulatesQuantisation(DynamicCache):
    """Rounds, and stores the result in full precision."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = (4 * key_states).round() / 4
        return super().update(rounded, value_states, layer_idx, *args, **kwargs)


class Ignored(RotorQuantCache):
    """A cache that the model is not given."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return key_states, value_states


def found(model, ids, make_cache) -> str:
    return "; ".join(warnings_of(model, ids, make_cache, 64))


@pytest.mark.parametrize(
    "options", [{}, {"key_quantizer": "prod"}, {"key_bits": 8, "value_bits": 8}]
)
def test_a_compressed_cache_is_found_sound(model, sampled, options) -> None:
    def make_cache():
        return RotorQuantCache(**{**OPTIONS, **options})

    assert found(model, sampled[:, :300], make_cache) == ""


def test_a_sound_cache_is_probed_by_one_pass(model, sampled) -> None:
    """The rest are calls of attention alone: whole passes would take longer than the text."""
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        cache = RotorQuantCache(**OPTIONS)
        feed(model, sampled[:, :292], cache, 64)
        passes.clear()
        before = cache.get_seq_length(), cache.layers[0].keys.clone()
        options = (sampled[:, :300], 292, cache, lambda: RotorQuantCache(**OPTIONS), 64)
        assert warnings_of_filled(model, *options) == []
    finally:
        handle.remove()
    assert len(passes) == 1
    assert cache.get_seq_length() == before[0]  # and the cache can go on
    assert torch.equal(cache.layers[0].keys.clone(), before[1])
    assert "update" not in vars(cache)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_change_that_is_not_of_the_codes_is_no_proof(model, sampled) -> None:
    """The attention of layer 7 gives something else at every call, and what follows ignores it."""

    def noise(module, args, output):
        return (output[0] + torch.randn_like(output[0]), *output[1:])

    layer = model.model.layers[7]
    handles = [layer.self_attn.register_forward_hook(noise)]
    handles.append(layer.register_forward_hook(lambda module, args, output: args[0]))
    try:
        warnings = found(model, sampled[:, :300], HidesCopies)
    finally:
        for handle in handles:
            handle.remove()
    assert "and 12 more)" in warnings  # 16 parts: those of layer 7 too


class ReadsTheFirstLayerExactly(RotorQuantCache):
    """Of the last 23 tokens, as this layer's window has them, copies that nobody sees."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.copies = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx:
            return states
        new = (key_states, value_states)
        old = self.copies or tuple(x[:, :, :0] for x in new)
        kept = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.copies = tuple(x[:, :, -23:] for x in kept)
        return tuple(x[:, :, -states[0].shape[2] :] for x in kept)


class ReadAlone(HidesCopies):
    """Reads its codes only where the attention is called alone: in a pass it reads copies."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = self.get_seq_length(layer_idx - 1) if layer_idx else None
        copies = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx and before != self.get_seq_length(layer_idx):  # layer 0 has not gone before
            return self.layers[layer_idx].keys[:], self.layers[layer_idx].values[:]
        return copies


def test_what_differs_when_called_alone_is_no_proof(model, sampled) -> None:
    assert "and 12 more)" in found(model, sampled[:, :300], ReadAlone)


class ReadByTheNextLayer(RotorQuantCache):
    """Layer 4 reads what layer 3 has stored, and nobody what layer 4 has (keys are shared so)."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == 3:
            return tuple(torch.zeros(x.shape) for x in states)
        if layer_idx == 4:
            return self.layers[3].keys, self.layers[3].values
        return states


def test_codes_that_a_later_layer_reads_are_read(model, sampled) -> None:
    """The attention of their own layer, called alone, does not tell: a whole pass does."""
    warnings = found(model, sampled[:, :300], lambda: ReadByTheNextLayer(**OPTIONS))
    assert "stored codes are not read (keys of layer 4, values of layer 4)" in warnings
    assert "layer 3" not in warnings


def test_layers_that_hide_the_cache_are_judged_by_whole_passes(model, sampled) -> None:
    """The call cannot be made with another cache, nor be made again."""
    attention = model.model.layers[3].self_attn
    forward = attention.forward

    def hidden(*args, **kwargs):
        return forward(*args, **kwargs | {CACHE_NAME: hidden.cache})

    def keep(module, args, kwargs):
        hidden.cache = kwargs[CACHE_NAME]

    def drop(module, args, kwargs):
        return args, kwargs | {CACHE_NAME: None}

    handles = [model.model.layers[3].register_forward_pre_hook(keep, with_kwargs=True)]
    handles.append(attention.register_forward_pre_hook(drop, with_kwargs=True, prepend=True))
    attention.forward = hidden
    try:
        assert found(model, sampled[:, :300], lambda: RotorQuantCache(**OPTIONS)) == ""
        assert "and 12 more)" in found(model, sampled[:, :300], HidesCopies)
    finally:
        del attention.forward
        for handle in handles:
            handle.remove()


class HidesInTheLastLayer(RotorQuantCache):
    """Exact copies of the newest tokens of every layer, kept with the last one."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        copies = vars(self.layers[-1]).setdefault("copies", {})
        new = (key_states, value_states)
        old = copies.get(layer_idx, tuple(x[:, :, :0] for x in new))
        kept = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        copies[layer_idx] = kept
        return tuple(x[:, :, -states[0].shape[2] :] for x in kept)


def test_what_another_layer_keeps_does_not_pass_for_codes(model, sampled) -> None:
    """Copies of one layer share the others: a call leaves its tokens there, and the next differs.

    The last layer alone is copied with what it keeps.
    """
    warnings = found(
        model, sampled[:, :300], lambda: HidesInTheLastLayer(config=model.config, **OPTIONS)
    )
    assert "stored codes are not read" in warnings
    assert "and 12 more)" in warnings


@pytest.mark.parametrize("name", ["rotorquant", "hqq", "quanto"])
def test_the_cache_that_is_measured_stays_as_it_is(model, sampled, name) -> None:
    """Bit by bit, and all that can be reached from it; and the text is not fed again for copies."""
    wait = {"statistics_length": 0} if name == "rotorquant" else {}
    spec = CacheSpec.of(name, {"residual_length": 32} | wait)
    cache = spec.make(model.config)
    feed(model, sampled[:, :292], cache, 64)
    before = [x.clone() for x in tensors_in(cache)]  # spare capacity may hold NaN
    made = []

    def make():
        made.append(spec.make(model.config))
        return made[-1]

    assert warnings_of_filled(model, sampled[:, :300], 292, cache, make, 64) == []
    assert not made
    after = list(tensors_in(cache))
    assert len(after) == len(before) > 8
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("start", [96, 101, 107, 108, 119])
def test_chunked_attention_is_not_accused_at_a_boundary(start) -> None:
    """After 96 tokens the first layer of this Llama 4 reads none of those before."""
    model = build("llama4")
    ids = (torch.arange(3, 163) * 7 % 90 + 3).unsqueeze(0)

    def warnings(cls) -> str:
        def make_cache():
            return cls(residual_length=8, statistics_length=0, block_length=4, config=model.config)

        cache = make_cache()
        feed(model, ids[:, :start], cache, 64)
        options = (ids, start, cache, make_cache, 64)
        return "; ".join(warnings_of_filled(model, *options))

    assert "not read" not in warnings(RotorQuantCache)
    assert "(keys of layer 0, values of layer 0)" in warnings(ReadsTheFirstLayerExactly)


class Shared(RotorQuantCache):
    """A handle on a pool: a copy is the same."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("lengths", [(300,), (60, 300, 200)], ids=str)
def test_a_measurement_says_what_the_probe_finds_and_is_not_spoilt(
    model, tokenizer, sampled, monkeypatch, lengths
) -> None:
    """In the longest window, wherever it stands, also of a cache whose copies are itself."""
    results = {}
    for cache in (RotorQuantCache, Shared, HidesCopies):
        make = cache if cache is HidesCopies else functools.partial(cache, **OPTIONS)
        loaded = LoadedModel(model, tokenizer, ModelOptions())
        monkeypatch.setattr(LoadedModel, "new_cache", lambda self, spec, make=make: (
            DynamicCache() if spec.is_baseline else make()
        ))  # fmt: skip
        path = ROOT / "examples" / "sampled" / "clock.txt"
        options = PerplexityOptions(text=(str(path),), window=256, max_tokens=512)
        measurement = PerplexityMeasurement(loaded, options)
        measurement.ids = [sampled[:, :n] for n in lengths]
        measurement.windows = [measurement.windows[0]] * len(lengths)
        measurement.reference = Reference(model, measurement.ids)
        results[cache] = measurement.run(CacheSpec.of("k2v2"))
    assert results[RotorQuantCache]["warnings"] == []
    assert results[Shared] == results[RotorQuantCache]
    assert "codes are not read" in "; ".join(results[HidesCopies]["warnings"])


def test_a_window_that_holds_all_is_caught(model, sampled) -> None:
    ids = sampled[:, :150]
    warnings = found(model, ids, RotorQuantCache)
    assert "nothing is compressed after 142 tokens" in warnings
    result = compare(model, [ids], SinglePass(model, [ids]), RotorQuantCache, 64)
    assert result.compressed_share == 0
    assert result.kl_mean < 1e-10
    # The keys and values, and the second moment of the queries: 2 heads of 64 x 64 for 150 tokens.
    assert result.bits_per_number == 32 * (1 + 64 * 64 / (2 * 64 * 150))


def test_copies_kept_beside_the_codes_are_caught(model, sampled) -> None:
    warnings = found(model, sampled[:, :300], KeepsCopies)
    assert "stored codes are not read (keys of layer 0, values of layer 0, keys" in warnings
    assert "and 12 more" in warnings
    assert "but holds tensors of" in warnings


def test_layers_or_parts_that_are_read_exactly_are_caught(model, sampled) -> None:
    warnings = found(model, sampled[:, :300], lambda: ReadsSomeExactly("values"))
    assert "(keys of layer 0, keys of layer 1, keys of layer 2, keys of layer 3 and 4 more)" in (
        warnings
    )
    warnings = found(model, sampled[:, :300], lambda: ReadsSomeExactly("layer 3"))
    assert "values of layer 1 and 10 more)" in warnings
    assert "of layer 3" not in warnings


@pytest.mark.parametrize("name", ["hqq", "quanto", "fp8"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_transformers_caches_are_found_sound(model, sampled, name, bits) -> None:
    """HQQ packs 3 bits into 32-bit integers."""
    if (name == "quanto" and bits not in (2, 4)) or (name == "fp8" and bits != 8):
        return
    spec = CacheSpec.of(name, {} if name == "fp8" else {"nbits": bits})
    if name == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers 5.17
        return
    assert found(model, sampled[:, :300], lambda: spec.make(model.config)) == ""


@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_caches_of_other_models_are_found_sound(name, dtype) -> None:
    """Sliding layers, exact layers, bfloat16, keys and values of different dims."""
    other = build(name, dtype=dtype)
    ids = (torch.arange(3, 163) * 7 % 90 + 3).unsqueeze(0)
    for exact in ((), (0,)):
        options = {
            "residual_length": 8,
            "statistics_length": 0,
            "block_length": 4,
            "exact_layers": exact,
        }
        warnings = found(
            other, ids, lambda o=options: RotorQuantCache("k4v4", config=other.config, **o)
        )
        # Of a window of 24 tiny heads it is true that the tables take more than is saved.
        assert warnings == "" or (name == "mistral" and warnings.startswith("nothing is saved"))
        assert "not read" not in warnings
        assert "holds tensors" not in warnings


def test_copies_hidden_elsewhere_are_caught(model, sampled) -> None:
    assert "stored codes are not read" in found(model, sampled[:, :300], HidesCopies)


def test_simulated_quantisation_is_caught(model, sampled) -> None:
    ids = sampled[:, :300]
    assert "nothing is compressed" in found(model, ids, SimulatesQuantisation)
    result = compare(model, [ids], SinglePass(model, [ids]), SimulatesQuantisation, 64)
    assert result.kl_mean > 1e-4  # it does lose
    assert result.bits_per_number == 32  # and saves nothing
    assert result.compressed_share == 0


def test_a_cache_that_is_not_used_is_caught(model, sampled) -> None:
    warnings = found(model, sampled[:, :300], Ignored)
    assert "the cache holds 0 tokens, but 292 went through the model" in warnings


def test_scrambling_spoils_no_later_measurement(model, sampled) -> None:
    """Quantisers' tables are shared by all caches of a process: they must not be touched."""
    ids = sampled[:, :200]

    def kl() -> float:
        def make_cache():
            return RotorQuantCache(**OPTIONS)

        return compare(model, [ids], SinglePass(model, [ids]), make_cache, 64).kl_mean

    before = kl()
    found(model, ids, lambda: RotorQuantCache(**OPTIONS))
    assert kl() == before
