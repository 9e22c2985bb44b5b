"""A cache that compresses nothing, or is not read, is caught."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from evals.integrity import warnings_of
from evals.perplexity import SinglePass, compare
from rotorquant_hf import RotorQuantCache

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


def test_a_window_that_holds_all_is_caught(model, sampled) -> None:
    ids = sampled[:, :150]
    warnings = found(model, ids, RotorQuantCache)
    assert "nothing is compressed after 112 tokens" in warnings
    result = compare(model, [ids], SinglePass(model, [ids]), RotorQuantCache, 64)
    assert result.compressed_share == 0
    assert result.kl_mean < 1e-10
    assert result.bits_per_number == 32


def test_copies_kept_beside_the_codes_are_caught(model, sampled) -> None:
    warnings = found(model, sampled[:, :300], KeepsCopies)
    assert "the stored codes are not read" in warnings
    assert "but holds tensors of" in warnings


def test_copies_hidden_elsewhere_are_caught(model, sampled) -> None:
    assert "the stored codes are not read" in found(model, sampled[:, :300], HidesCopies)


def test_simulated_quantisation_is_caught(model, sampled) -> None:
    ids = sampled[:, :300]
    assert "nothing is compressed" in found(model, ids, SimulatesQuantisation)
    result = compare(model, [ids], SinglePass(model, [ids]), SimulatesQuantisation, 64)
    assert result.kl_mean > 1e-4  # it does lose
    assert result.bits_per_number == 32  # and saves nothing
    assert result.compressed_share == 0


def test_a_cache_that_is_not_used_is_caught(model, sampled) -> None:
    warnings = found(model, sampled[:, :300], Ignored)
    assert "the cache holds 0 tokens, but 236 went through the model" in warnings


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
