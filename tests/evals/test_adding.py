"""What it takes to add a cache or a measurement: a file of its own, and an entry in a registry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from evals.__main__ import main
from evals.caches import KINDS
from evals.caches.base import Elements, Kind
from evals.caches.registry import CacheSpec, kind_of
from evals.errors import InputError
from evals.measurements.base import Measurement, one_by_one
from evals.measurements.comparison import compare
from evals.measurements.memory import MemoryOptions
from evals.measurements.memory import measure as measure_memory
from evals.measurements.reference import SinglePass
from evals.measurements.registry import MEASUREMENTS
from evals.options import option
from evals.probes.footprint import footprint, quantised_tokens, reachable_bytes
from evals.probes.integrity import warnings_of
from evals.subjects.models import LoadedModel, ModelOptions
from tests.conftest import MODEL, ROOT

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")


# What caches/int8.py would hold, from here ...


class Int8Layer(DynamicLayer):
    """Stores every token in 8 bits, with a scale for each of its heads; no window."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.codes: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"keys": key_states, "values": value_states}
        seen = [torch.cat([*self.stored(part), x], dim=-2) for part, x in new.items()]
        for part, x in new.items():
            scale = x.abs().amax(-1, keepdim=True) / self.levels + 1e-12
            self.append(self.codes, part, (x / scale).round().to(torch.int8))
            self.append(self.scales, part, scale)
        return seen[0], seen[1]

    def stored(self, part: str) -> list[Tensor]:
        return [self.codes[part] * self.scales[part]] if part in self.codes else []

    @staticmethod
    def append(held: dict[str, Tensor], part: str, x: Tensor) -> None:
        held[part] = torch.cat([held[part], x], dim=-2) if part in held else x

    def get_seq_length(self) -> int:
        return self.codes["keys"].shape[-2] if self.codes else 0


class Int8Cache(Cache):
    """A cache of such layers."""

    layer = Int8Layer

    def __init__(self, layers: int, levels: int) -> None:
        super().__init__([self.layer(levels) for _ in range(layers)])


@dataclass(frozen=True)
class Int8Options:
    levels: int = option(127, "levels on each side of zero", min=1, max=127)


class Int8(Kind):
    cache_class = Int8Cache

    def make(self, options: Int8Options, config: Any) -> Cache:
        return Int8Cache(config.num_hidden_layers, options.levels)

    def elements(self, layer: Any) -> Elements:
        count = sum(x.numel() for x in layer.codes.values())
        return Elements(count, count)

    def quantised_states(self, layer: Any) -> dict[str, Any]:
        return {part: (layer.codes[part], layer.scales[part]) for part in layer.codes}


INT8 = Int8("int8", "plain 8-bit integers", Int8Options(), notes=("a toy",))

# ... to here; and the entry in caches/__init__.py is what this fixture sets.


@pytest.fixture(autouse=True)
def _registered(monkeypatch) -> None:
    monkeypatch.setitem(KINDS, "int8", INT8)


class KeepsCopies(Int8Layer):
    """Lets attention read what it was given, kept aside in full precision."""

    def stored(self, part: str) -> list[Tensor]:
        return [self.kept[part]] if part in self.codes else []

    def update(self, key_states, value_states, *args, **kwargs):
        seen = super().update(key_states, value_states)
        self.kept = dict(zip(("keys", "values"), seen, strict=True))
        return seen


class DishonestCache(Int8Cache):
    layer = KeepsCopies


def test_its_options_are_checked_and_named(model) -> None:
    spec = CacheSpec.of("int8", {"levels": 15})
    assert (spec.label, spec.notes, spec.period) == ("int8, levels 15", ("a toy",), 1)
    assert spec.to_dict() == {"kind": "int8", "label": spec.label, "options": {"levels": 15}}
    assert kind_of(spec.make(model.config)) is INT8
    with pytest.raises(InputError, match="int8: levels is 128; choose 127 or less"):
        CacheSpec.of("int8", {"levels": 128})
    with pytest.raises(InputError, match=r"unknown cache; choose one of dynamic, .*, int8, or a"):
        CacheSpec.of("int9")


def test_it_is_counted(model, sampled) -> None:
    cache = CacheSpec.of("int8").make(model.config)
    model(sampled[:, :100], past_key_values=cache)
    counted = footprint(cache, model.dtype)
    tokens = 100 * 8 * 2 * 2  # tokens, layers, kv heads, keys and values
    assert counted.elements == (64 * tokens, 64 * tokens)
    assert counted.parts == {"codes": 64 * tokens, "scales": 4 * tokens}
    assert counted.total_bytes == reachable_bytes(cache)
    assert counted.bits_per_number == counted.packed_bits_per_number == 8 + 32 / 64
    assert quantised_tokens(cache) == (0, 100)


def test_it_is_compared(model, sampled) -> None:
    ids = sampled[:, :200]

    def kl(levels: int) -> float:
        spec = CacheSpec.of("int8", {"levels": levels})
        result = compare(
            model, [ids], SinglePass(model, [ids]), lambda: spec.make(model.config), 50
        )
        # Of passes of 50 tokens: those before the pass, of those before each token.
        assert result.compressed_share == pytest.approx(50 * (0 + 50 + 100 + 150) / sum(range(201)))
        assert result.bits_per_number == 8.5
        return result.kl_mean

    assert 0 < kl(127) < kl(15) < kl(3)


def test_the_probe_finds_it_sound_or_not(model, sampled) -> None:
    ids = sampled[:, :150]
    layers = model.config.num_hidden_layers
    assert warnings_of(model, ids, lambda: Int8Cache(layers, 127), 64) == []
    found = "; ".join(warnings_of(model, ids, lambda: DishonestCache(layers, 127), 64))
    assert "stored codes are not read (keys of layer 0, values of layer 0" in found
    assert "but holds tensors of" not in found  # they are in its layers, so it reports them
    assert "nothing is saved" in found


def test_its_memory_is_measured(model, tokenizer) -> None:
    loaded = LoadedModel(model, tokenizer, ModelOptions(model=str(MODEL)))
    options = MemoryOptions(context=(100,), new_tokens=2)
    found = measure_memory(loaded, CacheSpec.of("int8"), options)
    (point,) = found["points"]
    assert point["bits_per_number"] == 8.5
    assert point["cache_bytes"] == sum(point["parts"].values()) == 102 * 8 * 2 * 2 * 68
    assert found["warnings"] == []


def test_sweeps_and_commands_take_it(tmp_path, capsys) -> None:
    path, out = tmp_path / "toy.yaml", tmp_path / "out"
    text = {"text": [TEXT], "max_tokens": 200, "window": 200}
    spec = {
        "models": [str(MODEL)],
        "caches": ["dynamic", {"cache": "int8", "levels": [127, 7]}],
        "measurements": [{"measure": "perplexity", **text}, {"measure": "memory", "context": [50]}],
    }
    path.write_text(yaml.safe_dump(spec))
    main(["sweep", str(path), "--out", str(out)])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()][1:]
    assert [row["status"] for row in rows] == ["ok"] * 6
    found = {(row["measurement"], row["cache"]["label"]): row["result"] for row in rows}
    fine, coarse = found["perplexity", "int8"], found["perplexity", "int8, levels 7"]
    assert 0 < fine["kl_mean"] < coarse["kl_mean"]
    assert fine["bits_per_number_16bit"] == 8 + 16 / 64
    assert (fine["warnings"], fine["notes"]) == ([], ["a toy"])
    assert found["memory", "int8"]["points"][0]["bits_per_number"] == 8.5
    capsys.readouterr()
    argv = ["memory", "--model", str(MODEL), "--context", "40", "--json"]
    main([*argv, "--cache", "int8", "--levels", "63"])
    assert json.loads(capsys.readouterr().out)["cache"] == "int8, levels 63"
    main(["caches"])
    assert "int8        plain 8-bit integers" in capsys.readouterr().out


# What measurements/size.py would hold, from here ...


@dataclass(frozen=True)
class SizeOptions:
    tokens: int = option(32, "tokens to store", min=1)


def _size(loaded: LoadedModel, options: SizeOptions, spec: CacheSpec) -> dict[str, Any]:
    cache = loaded.new_cache(spec)
    ids = torch.arange(options.tokens, device=loaded.device).unsqueeze(0)
    loaded.model(ids, past_key_values=cache)
    return {"bytes": reachable_bytes(cache), "warnings": []}


SIZE = Measurement(
    name="size",
    text="bytes of a cache",
    meaning="Bytes of a cache of some tokens.",
    options=SizeOptions,
    prepare=lambda loaded, options, seed: one_by_one(lambda spec: _size(loaded, options, spec)),
)

# ... to here; and the entry in measurements/registry.py is what this test sets.


def test_a_new_measurement_is_a_command_and_a_row(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(MEASUREMENTS, "size", SIZE)
    main(["size", "--model", str(MODEL), "--cache", "int8", "--tokens", "10", "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"] == 10 * 8 * 2 * 2 * 68
    path, out = tmp_path / "toy.yaml", tmp_path / "out"
    spec = {
        "models": [str(MODEL)],
        "caches": ["dynamic", "int8", "quanto"],
        "measurements": [{"measure": "size", "tokens": 20}],
    }
    path.write_text(yaml.safe_dump(spec))
    main(["sweep", str(path), "--out", str(out)])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()][1:]
    assert [row["options"] for row in rows] == [{"tokens": 20}] * 3
    sizes = [row["result"]["bytes"] for row in rows]
    assert sizes[0] == 20 * 8 * 2 * 2 * 256 > sizes[1] == 20 * 8 * 2 * 2 * 68 > sizes[2]
    main(["report", str(out)])
    assert "size" in (out / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("measurement", MEASUREMENTS.values(), ids=MEASUREMENTS)
def test_every_measurement_says_what_it_is_for(measurement) -> None:
    assert MEASUREMENTS[measurement.name] is measurement
    assert measurement.text[0].islower()
    assert measurement.meaning.endswith(".")
    assert "\n" not in measurement.meaning
