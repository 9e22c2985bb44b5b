"""The benchmark of whole models reports what it says it does; its times mean nothing here."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU run evals.bench.gpu itself", allow_module_level=True)

from evals.bench import common
from evals.bench import generate as bench_generate
from rotorquant_hf import RotorQuantCache
from rotorquant_hf.backend import backend
from rotorquant_hf.layers import RotorQuantLayer
from tests.helpers.bench import MODEL, emulated_gpu, rows_of  # noqa: F401 (a fixture)


def run_generate(tmp_path, *options):
    path = tmp_path / "rows.jsonl"
    argv = [*MODEL, "--batch", "2", "--context", "311", "--steps", "5", "--warm-up", "1"]
    status = bench_generate.main([*argv, "--out", str(path), *options])
    return status, path


def test_generation_has_a_row_for_every_cache(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    status, path = run_generate(tmp_path, "--caches", "dynamic", "quanto", "fp8", "k4v4")
    assert status == 0
    found = {(row["cache"], row["mode"]): row for row in rows_of(path, "generate")}
    assert set(found) == {(x, "eager") for x in ("dynamic", "quanto", "fp8", "k4v4")} | {
        ("k4v4", "graph")
    }
    base = found["dynamic", "eager"]
    out = capsys.readouterr().out
    for (name, _), row in found.items():
        if row["status"] != "ok":
            assert row["status"] == "not available"
            assert row["reason"] in out
            continue
        assert row["samples"] == 5
        assert row["interleaved"]
        assert row["tokens_s"] == pytest.approx(2 / row["ms"] * 1e3)
        assert row["speedup"] == pytest.approx(base["ms"] / row["ms"])
        assert f"| 2 | 311 | {name} | eager | {row['ms']:.2f} |" in out
    assert "needs a CUDA device" in found["k4v4", "graph"]["reason"] or (
        "need a CUDA device" in found["k4v4", "graph"]["reason"]
    )
    # After one step to warm up, 312 tokens in 2 layers of 2 heads, keys and values.
    assert base["cache_bytes"] == 2 * 2 * 2 * 2 * 312 * 16 * 4
    cache = RotorQuantCache("k4v4")
    for layer in range(2):
        for n in (311, 1):
            states = common.random_states((2, 2, n, 16), torch.float32, torch.Generator())
            with torch.no_grad():
                cache.update(*states, layer)
    hessian = 2 * 2 * 2 * 16 * 16 * 2  # of queries, of which `cache` has seen none
    frequencies = (1 + 2 * 2) * 8 * 4  # of RoPE, for all layers and for each row of a layer
    known = hessian + frequencies  # with the model's config
    assert found["k4v4", "eager"]["cache_bytes"] == cache.memory().total_bytes + known


def test_caches_that_do_not_fit_together_come_one_after_the_other(tmp_path) -> None:
    """The baseline is measured again at the end; what does not fit at all is reported."""
    dynamic = 2 * 2 * 2 * 2 * 311 * 16 * 4
    options = ["--caches", "k3v3", "dynamic", "--no-graph", "--memory"]
    _, path = run_generate(tmp_path, *options, str(dynamic + 1))
    rows = rows_of(path, "generate")
    assert [(row["cache"], row["pass"]) for row in rows] == [
        ("k3v3", 1), ("dynamic", 1), ("dynamic", 2)
    ]  # fmt: skip
    assert not any(row["interleaved"] for row in rows)
    path.unlink()
    _, path = run_generate(tmp_path, *options, str(dynamic - 1))
    rows = rows_of(path, "generate")
    assert [row["status"] for row in rows] == ["ok", "out of memory", "out of memory"]
    assert f"{dynamic:,} bytes" in rows[1]["reason"]
    before = len(path.read_text().splitlines())
    run_generate(tmp_path, *options, str(dynamic - 1), "--resume")
    assert len(path.read_text().splitlines()) == before + 1  # its versions


def test_a_cache_that_breaks_while_decoding_leaves_the_others(tmp_path, monkeypatch) -> None:
    update = RotorQuantLayer.update

    def broken(self, keys, values, *args, **kwargs):
        if self.is_initialized and self.get_seq_length() == 314:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(RotorQuantLayer, "update", broken)
    monkeypatch.setattr(DynamicCache, "get_max_length", lambda self: -1, raising=False)
    _, path = run_generate(tmp_path, "--caches", "dynamic", "k3v3", "--no-graph")
    found = {row["cache"]: row for row in rows_of(path, "generate")}
    assert found["k3v3"]["status"] == "out of memory"
    assert found["dynamic"]["status"] == "ok"
    assert found["dynamic"]["samples"] == 5


@pytest.mark.usefixtures("emulated_gpu")
def test_generation_on_an_emulated_gpu_counts_memory(tmp_path) -> None:
    with backend("torch"):
        _, path = run_generate(tmp_path, "--caches", "dynamic", "k3v3")
    found = {(row["cache"], row["mode"]): row for row in rows_of(path, "generate")}
    weights = 4 * (2 * 50 * 32 + 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 32 + 64) + 32 + 2 * 8)
    for name in ("dynamic", "k3v3"):
        row = found[name, "eager"]
        assert row["cache_bytes"] == 0  # memory_allocated does not change there
        assert row["scratch_bytes"] == 500
        assert row["peak_bytes"] == weights + 500
    assert found["k3v3", "graph"]["status"] == "not available"


@pytest.mark.parametrize("largest", [1, 7, 19, 100, 1000])
@pytest.mark.parametrize("start", [1, 10, 95, 3000])
def test_search_finds_the_largest_that_fits(largest, start) -> None:
    found = bench_generate.search(lambda n: n <= largest, start, 40)
    assert 0 <= largest - found <= max(1, found // 20)
    tried = []
    bench_generate.search(lambda n: tried.append(n) or n <= largest, start, 3)
    assert len(tried) <= 3


def test_largest_batch(tmp_path) -> None:
    one = 2 * 2 * 2 * 312 * 16 * 4  # bytes of a row after a step
    argv = ["--caches", "dynamic", "k2v2", "--largest-batch", "311", "--batch", "--memory"]
    _, path = run_generate(tmp_path, *argv, str(20 * one))
    found = {row["cache"]: row for row in rows_of(path, "largest_batch")}
    assert 19 <= found["dynamic"]["batch"] <= 20
    assert found["k2v2"]["batch"] > 0
    assert found["dynamic"]["cache_bytes"] == found["dynamic"]["batch"] * one
    row = found["dynamic"]
    assert row["tokens_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    assert not rows_of(path, "generate")
