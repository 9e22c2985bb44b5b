"""The comparison with llama.cpp, which has to be compiled and is not here: a model of Transformers
that reads the same file takes its part, and forgets some of what it read in formats of few bits."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import ClassVar

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from evals.bench import llama_cpp as bench
from evals.errors import InputError, NotAvailableError
from evals.subjects.gguf import read_model
from evals.subjects.llama_cpp import LlamaCpp, float32_copy
from tests.conftest import ROOT
from tests.helpers.gguf_file import write

NOISE = {0: 0.0, 1: 0.01, 2: 0.1}


@functools.cache
def model_of(path: str) -> PreTrainedModel:
    return read_model(path, dtype=torch.float32)


class Llama:
    """As of llama_cpp, as far as `LlamaCpp` uses it."""

    made: ClassVar[list[dict]] = []

    def __init__(self, path: str, **options) -> None:
        if options["n_ctx"] > 100_000:
            raise ValueError("Failed to create llama_context")
        self.made.append(options)
        self.model = model_of(path)
        self.cache, self.n_tokens, self.options = None, 0, options
        assert options["type_k"] == options["type_v"]
        self.scores = np.zeros((options["n_ctx"], self.n_vocab()), np.float32)
        self.ctx = self

    def n_vocab(self) -> int:
        return self.model.config.vocab_size

    @torch.no_grad()
    def eval(self, ids) -> None:
        for part in torch.tensor(ids).split(self.options["n_batch"]):
            out = self.model(part[None], past_key_values=self.cache, use_cache=True)
            self.cache, logits = out.past_key_values, out.logits[0]
            generator = torch.Generator().manual_seed(self.n_tokens)
            noise = torch.randn(logits.shape, generator=generator)
            end = self.n_tokens + len(part)
            self.scores[self.n_tokens : end] = logits + NOISE[self.options["type_k"]] * noise
            self.n_tokens = end


@pytest.fixture
def stand_in(monkeypatch) -> type[Llama]:
    module = ModuleType("llama_cpp")
    module.Llama = Llama
    module.llama_get_logits_ith = lambda ctx, i: np.ctypeslib.as_ctypes(
        ctx.scores[ctx.n_tokens + i]
    )
    for type_, name in enumerate(("F16", "Q8_0", "Q4_0")):
        setattr(module, f"GGML_TYPE_{name}", type_)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(bench, "require_packages", lambda *args: None)
    monkeypatch.setattr(bench, "version", lambda name: "0")
    monkeypatch.setattr(Llama, "made", [])
    return Llama


def table(lines: list[str], header: str) -> list[list[str]]:
    """Cells of the table with a header."""
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {header}")) + 2
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_both_engines(stand_in, model, tokenizer, tmp_path, capsys) -> None:
    path = write(tmp_path / "books.gguf", model, tokenizer)
    run = "--context 40 70 --steps 3 --warm-up 1 --window 128 --max-tokens 256"
    run += " --caches k3v3:residual_length=0,statistics_length=0 --formats q8_0 q4_0"
    bench.main(["--model", str(path), "--text", str(ROOT / "examples" / "sampled"), *run.split()])
    lines = capsys.readouterr().out.splitlines()
    caches = ["dynamic", "k3v3, statistics 0, window 0", "f16", "q8_0", "q4_0"]
    rows = table(lines, "tokens")
    assert [row[0] for row in rows] == ["40"] * 5 + ["70"] * 5
    assert [row[2] for row in rows] == 2 * caches
    assert [row[5] for row in rows if row[2] in ("dynamic", "f16")] == ["1.00x"] * 4
    assert all(float(row[3]) > 0 for row in rows)
    rows = table(lines, "engine")
    assert [row[1] for row in rows] == caches
    assert [row[2] for row in rows] == ["32.00", "3.25", "16.00", "8.50", "4.50"]
    divergence = [float(row[3]) for row in rows]
    assert divergence[0] == divergence[2] == 0
    assert 0 < divergence[1] < 0.1
    # Noise of variance s on logits costs s / 2 (1 - the sum of squared probabilities).
    assert 0.7 < divergence[3] / (NOISE[1] ** 2 / 2) < 1
    assert divergence[4] == pytest.approx(100 * divergence[3], rel=0.05)
    assert rows[0][4] == rows[2][4] == "100.00%"
    # The same weights, and the same text.
    assert float(rows[0][5]) == pytest.approx(float(rows[2][5]), rel=1e-4)
    assert {x["n_ctx"] for x in stand_in.made} == {44, 74, 128}


def test_a_copy_has_the_same_numbers_in_float32(tmp_path) -> None:
    path, folder = tmp_path / "a.gguf", tmp_path / "copy"
    folder.mkdir()
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    coded = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["a", "b\n"])
    writer.add_token_types([1, 3])
    writer.add_tensor("coded", coded, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("half", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, given = gguf.GGUFReader(float32_copy(str(path), folder)), gguf.GGUFReader(path)
    fields = [
        {name: x.contents() for name, x in read.fields.items() if not name.startswith("GGUF.")}
        for read in (found, given)
    ]
    assert fields[0].pop("general.file_type") == 0
    assert fields[1].pop("general.file_type") == 2
    assert fields[0] == fields[1]
    assert {x.tensor_type for x in found.tensors} == {gguf.GGMLQuantizationType.F32}
    wanted = [gguf.dequantize(x.data, x.tensor_type) for x in given.tensors]
    for tensor, values in zip(found.tensors, wanted, strict=True):
        assert np.array_equal(tensor.data, values)


def test_what_cannot_be_had_is_said(stand_in, model, tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match="no file"):
        float32_copy(str(tmp_path / "none.gguf"), tmp_path)
    with pytest.raises(NotAvailableError, match=r"q4_0.*context"):
        LlamaCpp(tmp_path / "a.gguf", "q4_0", 1 << 20, 1)


def test_input_is_looked_at_before_the_model_is_loaded(stand_in, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "load", lambda options: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"none\.gguf"):
        bench.main(["--model", str(tmp_path / "none.gguf")])
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="k9v9"):
        bench.main(["--model", str(path), "--caches", "k9v9"])


def test_the_package_is_asked_for(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(NotAvailableError, match="pip install llama-cpp-python"):
        bench.main(["--model", str(tmp_path / "a.gguf")])
