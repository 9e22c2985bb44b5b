"""The registry of caches: every one is made, named, counted; what is missing is said."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest
import torch
from transformers import Cache, DynamicCache, cache_utils

from evals.caches.registry import KINDS, CacheSpec, kind_of, option_texts
from evals.caches.tensors import tensors_in
from evals.errors import InputError, NotAvailableError
from evals.probes.chunked import feed, next_pass
from evals.probes.footprint import footprint, quantised_tokens, reachable_bytes
from evals.requirements import install
from evals.subjects.twins import offset_keys
from rotorquant_hf import PRESETS, RotorQuantCache, RotorQuantConfig


def fed(model, ids, spec: CacheSpec, chunk: int = 50):
    cache = spec.make(model.config)
    feed(model, ids, cache, chunk)
    return cache


WITHOUT_FILES = [name for name in KINDS if name != "calibrated"]  # which test_calibrate.py has


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_every_kind_is_read_and_counted(model, sampled, name) -> None:
    ids = sampled[:, :300]
    if name == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers 5.17
        with pytest.raises(NotAvailableError, match="makes no fp8 cache"):
            CacheSpec.of(name).make(model.config)
        return
    cache = fed(model, ids, CacheSpec.of(name))
    assert cache.get_seq_length() == 300
    counted = footprint(cache, model.dtype)
    held, quantised = counted.elements
    assert held == 300 * 8 * 2 * 64 * 2  # tokens, layers, kv heads, head dim, keys and values
    assert counted.total_bytes == sum(counted.parts.values())
    # RotorQuant's caches share their tables, and report them.
    assert counted.total_bytes == reachable_bytes(cache) + counted.parts.get("tables", 0)
    if name == "dynamic":
        assert counted.total_bytes == 4 * held
        assert (quantised, counted.packed_bits_per_number) == (0, None)
        assert quantised_tokens(cache) == (0, 0)
    else:
        assert 0.3 * held < quantised <= held
        assert 3 < counted.packed_bits_per_number < 10
        first, last = quantised_tokens(cache)
        assert (last - first) * 8 * 2 * 64 * 2 == quantised


def test_bits_of_peers_are_those_of_their_formats(model, sampled) -> None:
    """Codes, and for each group of 64 a scale and a zero of the model's 32 bits."""
    for name in ("quanto", "hqq"):
        counted = footprint(fed(model, sampled[:, :256], CacheSpec.of(name)), model.dtype)
        assert counted.packed_bits_per_number == pytest.approx(4 + 64 / 64, abs=0.02)


def test_what_a_cache_reports_is_what_can_be_reached(model, sampled) -> None:
    """But for the tables, which caches share."""
    cache = fed(model, sampled[:, :300], CacheSpec.of("k3v3"))
    report = cache.memory()
    assert reachable_bytes(cache) == report.total_bytes - report.parts["tables"]
    cache.kept_aside = [torch.zeros(1000)]
    cache.layers[0].kept_aside = {"copy": [torch.zeros(500)]}
    assert reachable_bytes(cache) == report.total_bytes - report.parts["tables"] + 6000


def test_tensors_are_found_wherever_they_are() -> None:
    class Holder:
        __slots__ = ("inner",)

        def __init__(self, inner) -> None:
            self.inner = inner

    x, y, z = torch.zeros(1), torch.ones(2), torch.ones(3)
    module = torch.nn.Linear(2, 2)
    root = {"a": [x, (Holder(y),)], "b": {1: x.view(1)}, "c": z, "d": module, "f": print}
    assert {t.numel() for t in tensors_in(root)} == {1, 2, 3, 4}
    assert {t.numel() for t in tensors_in(root, modules=False)} == {1, 2, 3}
    loop: list = [x]
    loop.append(loop)
    assert len(list(tensors_in(loop))) == 1


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("dynamic", {}, "dynamic"),
        ("rotorquant", {}, "k4v4"),
        ("rotorquant", {"key_bits": 3, "value_bits": 3}, "k3v3"),
        ("rotorquant", {"preset": "turboquant"}, "turboquant"),
        ("k3v2", {"residual_length": 32, "statistics_length": 0}, "k3v2, statistics 0, window 32"),
        ("k3v3", {"center_keys": False, "exact_layers": [0, -1]},
         "k3v3, centred off, exact layers (0, -1)"),
        ("haar", {}, "haar k3v3"),
        ("hadamard", {"key_bits": 2, "value_bits": 2}, "hadamard k2v2"),
        ("quanto", {"nbits": 2}, "quanto 2 bits"),
        ("hqq", {"residual_length": 64}, "hqq 4 bits, window 64"),
        ("fp8", {}, "fp8"),
        ("k2v2", {"label": "mine"}, "mine"),
    ],
)  # fmt: skip
def test_labels(name, options, label) -> None:
    assert CacheSpec.of(name, options).label == label


def test_haar_and_hadamard_differ_from_the_default_by_rotation_and_scale_alone() -> None:
    for name, rotation in (("haar", "haar"), ("hadamard", "hadamard")):
        options = CacheSpec.of(name).options
        expected = RotorQuantConfig.from_options(
            "turboquant", rotation=rotation, num_sink_tokens=RotorQuantConfig().num_sink_tokens
        )
        assert options == expected
        assert options.residual_length == RotorQuantConfig().residual_length


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "rotorquants",
            {},
            "rotorquants: unknown cache; choose one of dynamic",
        ),
        (
            "rotorquant",
            {"key_bit": 3},
            "unknown option key_bit (did you mean key_bits?); there are key_bits",
        ),
        ("rotorquant", {"preset": "k9v9"}, "preset is 'k9v9'; choose one of"),
        ("haar", {"preset": "k3v3"}, "haar: unknown option preset"),
        ("k3v3", {"preset": "k2v2"}, "k3v3: preset is 'k2v2' too; give one of them"),
        ("k3v3", {"key_bits": 0}, "key_bits is 0"),
        ("dynamic", {"nbits": 2}, "dynamic: unknown key 'nbits'; it takes none"),
        ("hqq", {"nbits": "two"}, "nbits is 'two'; it takes a whole number"),
        ("k3v3", {"label": 3}, "label is 3; it takes a text"),
    ],
)
def test_bad_options_are_named(name, options, says) -> None:
    with pytest.raises(InputError) as error:
        CacheSpec.of(name, options)
    assert says in str(error.value)


def test_names_with_settings() -> None:
    spec = CacheSpec.named("k3v3:residual_length=32,exact_layers=[0, -1],center_keys=false")
    options = {"residual_length": 32, "exact_layers": (0, -1), "center_keys": False}
    assert spec == CacheSpec.of("k3v3", options)
    assert CacheSpec.named("hqq") == CacheSpec.of("hqq")
    for bad in ("k3v3:", "k3v3:residual_length", "k3v3:=3", "k3v3:residual_length=[", "k3v3:a=1;b"):
        with pytest.raises(InputError, match=r"NAME:OPTION=VALUE|unknown option"):
            CacheSpec.named(bad)


def test_a_missing_package_is_named(model, monkeypatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(NotAvailableError, match=r"^hqq fails: .*hqq"):  # it is there, but too old
        CacheSpec.of("hqq").make(model.config)
    monkeypatch.setitem(sys.modules, "hqq", None)
    with pytest.raises(NotAvailableError) as refused:
        CacheSpec.of("hqq").make(model.config)
    assert str(refused.value) == f"hqq is not installed: {install(['hqq'])}"


def test_a_refused_model_is_said(monkeypatch) -> None:
    from tests.helpers.models import build

    with pytest.raises(NotAvailableError, match="no hqq cache for this model"):
        CacheSpec.of("hqq").make(build("gemma3").config)


def test_plain_values_make_the_cache_again() -> None:
    for name in [*WITHOUT_FILES, *PRESETS]:
        spec = CacheSpec.of(name)
        described = spec.to_dict()
        assert list(described["options"]) == [x.name for x in fields(spec.options)]
        again = CacheSpec.of(described["kind"], described["options"])
        assert again == spec


def test_passes_end_where_tokens_are_quantised() -> None:
    cache = RotorQuantCache(
        residual_length=10, statistics_length=0, block_length=4, num_sink_tokens=2
    )
    assert next_pass(cache, 100, 1000) == 16
    assert next_pass(cache, 5, 1000) == 5
    assert next_pass(cache, 5, 3) == 3
    states = torch.randn(1, 1, 16, 8)
    cache.update(states, states, 0)
    assert cache.layers[0].tokens_until_packing() == 4
    assert next_pass(cache, 100, 1000) == 4
    cache.update(states[:, :, :3], states[:, :, :3], 0)
    assert next_pass(cache, 100, 1000) == 1
    assert next_pass(DynamicCache(), 100, 1000) == 100


def test_the_kind_of_a_cache_is_that_of_its_nearest_known_class(model) -> None:
    class Mine(RotorQuantCache):
        pass

    class Unknown(Cache):
        pass

    def of(name: str) -> Cache:
        return CacheSpec.of(name).make(model.config)

    assert kind_of(Mine()) is kind_of(of("haar")) is KINDS["rotorquant"]
    assert kind_of(offset_keys(of("hqq"), 1.0)) is kind_of(of("quanto")) is KINDS["quanto"]
    assert kind_of(of("dynamic")) is kind_of(Unknown([])) is KINDS["dynamic"]


def test_an_unknown_cache_shows_what_it_stores_in_bytes(model, sampled) -> None:
    """It is charged for it, and what it says of itself is not taken on trust."""
    cache = DynamicCache(config=model.config)
    feed(model, sampled[:, :40], cache, 40)
    cache.layers[0].mine = [torch.zeros(1000, dtype=torch.int8), torch.zeros(9, dtype=torch.bool)]
    counted = footprint(cache, model.dtype)
    assert counted.parts == {"codes": 1000, "exact": 4 * counted.elements.held + 9}
    assert counted.elements.quantised == 0
    assert [x.numel() for x in kind_of(cache).codes(cache.layers[0])["states"]] == [1000]
    assert kind_of(cache).codes(cache.layers[1]) == {}


def test_every_option_is_named_once_with_its_meaning() -> None:
    texts = option_texts()
    rotorquant = {field.name: field.metadata["help"] for field in fields(RotorQuantConfig)}
    assert {name: texts[name] for name in rotorquant} == rotorquant
    others = {"nbits", "axis_key", "axis_value", "q_group_size", "file"}
    assert set(texts) - set(rotorquant) == others
    assert texts["nbits"] == "bits per element (quanto, hqq)"


@pytest.mark.parametrize(
    ("name", "options", "period"),
    [
        ("dynamic", {}, 1),
        ("k3v3", {"block_length": 16}, 16),
        ("haar", {}, 32),
        ("hqq", {}, 128),
        ("quanto", {"residual_length": 64}, 64),
        ("fp8", {}, 1),
    ],
)
def test_a_cache_says_when_it_quantises_and_what_to_beware_of(name, options, period) -> None:
    spec = CacheSpec.of(name, options)
    assert spec.period == period
    first_pass = [note for note in spec.notes if "quantises the whole first chunk" in note]
    assert len(first_pass) == len(spec.notes) == (name in ("hqq", "quanto", "fp8"))
