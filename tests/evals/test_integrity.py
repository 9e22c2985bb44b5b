"""A cache that compresses nothing, or is not read, is caught."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, cache_utils

from evals.caches.registry import CacheSpec
from evals.measurements.perplexity import SinglePass, compare
from evals.probes.attention_calls import read_and_note
from evals.probes.chunked import feed
from evals.probes.integrity import warnings_of, warnings_of_filled
from rotorquant_hf import RotorQuantCache
from tests.helpers.models import build

OPTIONS = {"residual_length": 32, "key_bits": 2, "value_bits": 2}


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


def test_attention_that_is_not_repeatable_is_judged_by_whole_passes(model, sampled) -> None:
    """Noise in a layer's output is no proof that its codes are read."""

    def noise(module, args, output):
        return (output[0] + 1e-6 * torch.randn_like(output[0]), *output[1:])

    handle = model.model.layers[2].self_attn.register_forward_hook(noise)
    try:
        calls = read_and_note(model, sampled[:, :20], RotorQuantCache(**OPTIONS))[1]
        assert set(calls) == set(range(8))
        assert not calls[2].gives_the_same(RotorQuantCache(**OPTIONS))
    finally:
        handle.remove()


def test_a_window_that_holds_all_is_caught(model, sampled) -> None:
    ids = sampled[:, :150]
    warnings = found(model, ids, RotorQuantCache)
    assert "nothing is compressed after 142 tokens" in warnings
    result = compare(model, [ids], SinglePass(model, [ids]), RotorQuantCache, 64)
    assert result.compressed_share == 0
    assert result.kl_mean < 1e-10
    assert result.bits_per_number == 32


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
        options = {"residual_length": 8, "block_length": 4, "exact_layers": exact}
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
