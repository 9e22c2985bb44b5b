"""The benchmarks report what they say they do; their times mean nothing here."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from evals import environment, failures, timing
from evals.bench import attention as bench_attention
from evals.bench import common, decode_step
from evals.bench import generate as bench_generate
from evals.bench import gpu as bench_gpu
from evals.bench import tune as bench_tune
from evals.errors import InputError
from evals.sweep.rows import JSONLines
from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.backend import backend
from rotorquant_hf.layers import RotorQuantLayer
from tests.conftest import ROOT
from tests.helpers import cuda_graph

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU run evals.bench.gpu itself", allow_module_level=True)

CPU = torch.device("cpu")
# 1 row, 2 kv heads of 16 numbers; of 215 tokens 4 are sinks, 64 packed and 147 in the window.
TINY = ["--batch", "1", "--context", "215", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
TINY += ["--dtype", "float32", "--repeats", "2", "--device", "cpu"]
PACKED, EXACT = 64, 151
MODEL = ["--layers", "2", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
MODEL += ["--intermediate", "32", "--vocab", "50", "--dtype", "float32", "--device", "cpu"]


def rows_of(path, kind):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture
def emulated_gpu(monkeypatch):
    """The CPU passes for a GPU: streams and events of nothing, emulated graphs."""
    with backend("triton"), cuda_graph.emulated(monkeypatch, lambda: []):
        emulated = torch.cuda.graph

        @contextlib.contextmanager
        def graph(cuda_graph, stream=None):
            with emulated(cuda_graph):
                yield

        def event(**_):
            return SimpleNamespace(
                record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 0.5
            )

        stream = SimpleNamespace(wait_stream=lambda other: None)
        free = 1 << 30
        for name, value in {
            "graph": graph,
            "Event": event,
            "Stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device: stream,
            "set_stream": lambda stream: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (free, free),
            "memory_allocated": lambda device=None: 1000,
            "memory_reserved": lambda device=None: 1000,
            "max_memory_allocated": lambda device=None: 1500,
            "reset_peak_memory_stats": lambda device=None: None,
            "get_device_properties": lambda device: SimpleNamespace(
                name="emulated", multi_processor_count=2, L2_cache_size=20000
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for module in (timing, common, bench_generate):
            monkeypatch.setattr(module, "on_gpu", lambda device: True)
        yield


# Timing


def test_timing_is_median_and_percentiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.median, found.p10, found.p90, found.samples) == (3.0, 1.4, 4.6, 5)
    assert found.row("ms") == {"ms": 3e3, "ms_p10": 1.4e3, "ms_p90": 4.6e3, "samples": 5}


def test_samples_interleave_rotate_and_report_failures() -> None:
    order, reasons = [], []

    def call(name):
        order.append(name)
        if name == "bad" and order.count("bad") == 2:
            raise RuntimeError("it broke\nhere")

    samplers = [
        timing.Sampler(
            timing.Variant("a", [lambda: call("a0"), lambda: call("a1")], 0), "eager", 1
        ),
        timing.Sampler(timing.Variant("bad", [lambda: call("bad")], 0), "eager", 1),
        timing.Sampler(timing.Variant("b", [lambda: call("b")], 0), "eager", 2),
    ]
    timed = timing.interleave(
        timing.Stopwatch(CPU), samplers, 4, 60, lambda s, why: reasons.append((s.variant.name, why))
    )
    assert order == ["a0", "bad", "b", "b", "a1", "bad", "b", "b", "a0", "b", "b", "a1", "b", "b"]
    assert [sampler.variant.name for sampler, _ in timed] == ["a", "b"]
    assert all(timing.samples == 4 for _, timing in timed)
    assert reasons == [("bad", "RuntimeError: it broke")]


def test_what_takes_more_than_its_share_of_time_is_sampled_less() -> None:
    variant = timing.Variant("slow", [lambda: None], 0)
    timed = timing.interleave(
        timing.Stopwatch(CPU), [timing.Sampler(variant, "eager", 1)], 50, 0.0, pytest.fail
    )
    assert timed[0][1].samples == timing.MIN_SAMPLES


def test_failures_free_their_tensors_and_a_lost_device_is_not_swallowed() -> None:
    alive = []

    class Held:
        def __del__(self):
            alive.remove(self.name)

    def fail():
        held = Held()
        held.name = "x"
        alive.append("x")
        raise MemoryError("full")

    reasons = []
    with failures.guarded(CPU, lambda why: reasons.append((why, list(alive)))) as faults:
        fail()
    assert faults == ["MemoryError: full"]
    assert reasons == [("MemoryError: full", [])]
    with pytest.raises(failures.DeviceLost), failures.guarded(CPU, pytest.fail):
        raise failures.DeviceLost("gone")


def test_copy_bandwidth_versions_and_chunks() -> None:
    assert timing.copy_bandwidth(timing.Stopwatch(CPU)) > 1e8
    versions = str(environment.Versions.of(CPU, "evals.x", ["--a", "1"]))
    for text in (torch.__version__, "python -m evals.x --a 1", "CPU"):
        assert text in versions
    assert common.chunks(10, 7, max_elements=30) == [4, 4, 2]
    assert common.chunks(1, 100, max_elements=30) == [1]


# Attention


def run_attention(tmp_path, *options):
    path = tmp_path / "rows.jsonl"
    status = bench_attention.main([*TINY, "--out", str(path), *options])
    return status, path


def test_attention_has_a_row_for_every_variant(tmp_path, capsys) -> None:
    status, path = run_attention(tmp_path, "--bits", "2", "3", "--prod", "--check")
    assert status == 0
    rows = rows_of(path, "attention")
    sdpa = [f"sdpa {x} {form}" for x in bench_attention.BACKENDS for form in bench_attention.FORMS]
    kernels = ["k2v2", "k3v3", "k3v3 prod"]
    found = {row["variant"]: row for row in rows}
    assert len(rows) == len(found)
    assert set(found) == {*kernels, "update k2v2", *sdpa, "cat"}
    refused = {name for name, row in found.items() if row["status"] == "refused"}
    assert refused == {x for x in sdpa if "efficient" in x or "cudnn" in x}  # they need CUDA
    assert all(row["status"] == "ok" for name, row in found.items() if name not in refused)
    assert all("backend" in found[name]["reason"] for name in refused)

    # Keys and values of 16 numbers in float32; a scale is 2 bytes, 16 signs are 2.
    plain = 2 * 215 * 2 * 16 * 4
    exact = 2 * EXACT * 2 * 16 * 4
    assert found["sdpa flash gqa"]["bytes"] == found["sdpa math packed"]["bytes"] == plain
    assert found["cat"]["bytes"] == 2 * (plain + 2 * 2 * 16 * 4)
    assert found["k2v2"]["bytes"] == exact + 2 * PACKED * 2 * (4 + 2)
    assert found["k3v3"]["bytes"] == exact + 2 * PACKED * 2 * (6 + 2)
    prod = (4 + 2 + 2 + 2) + (6 + 2)
    assert found["k3v3 prod"]["bytes"] == exact + 2 * PACKED * prod
    assert all(found[name]["error"] < 1e-5 for name in kernels)

    copy = rows_of(path, "versions")[0]["copy_gb_s"]
    best = min((found[x] for x in sdpa if x not in refused), key=lambda row: row["us"])
    out = capsys.readouterr().out
    for name in set(found) - refused:
        row = found[name]
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["of_copy"] == pytest.approx(row["gb_s"] / copy)
        assert row["best_sdpa"] == best["variant"]
        assert row["speedup"] == pytest.approx(best["us"] / row["us"])
        assert f"| 1 | 215 | 16 | {name} | eager | {row['us']:.1f} |" in out
    assert f"| {best['us']:.1f} ({best['variant'][5:]}) |" in out.split("eager: us, times")[1]
    assert "python -m evals.bench.attention --batch 1" in out


def test_bytes_read_are_those_that_the_layer_holds() -> None:
    shape = decode_step.AttentionShape(2, 215, 4, 2, 16, "float16")
    settings = RotorQuantConfig(key_bits=4, value_bits=3)
    with backend("triton"):
        step = decode_step.take_step(shape, settings, torch.Generator().manual_seed(0))
    held = step.layer.nbytes()
    window = 2 * 2 * 2 * step.keys.tail.shape[2] * 16 * 2  # without the ring's free slots
    packed = sum(size for name, size in held.items() if name.startswith(("key_", "value_")))
    assert step.nbytes == packed + held["sinks"] + window
    assert step.layer.get_seq_length() == shape.context
    assert step.keys.tail.std() > 0.5
    codes = step.keys.packed.rows["codes"]
    assert len(codes.unique()) > 50


def test_a_layer_without_packed_tokens_is_refused(tmp_path) -> None:
    _, path = run_attention(tmp_path, "--bits", "3", "--context", "100")
    row = next(row for row in rows_of(path, "attention") if row["variant"] == "k3v3")
    assert row["status"] == "failed"
    assert "nothing is packed of 100 tokens" in row["reason"]


def test_failing_and_wrong_variants_are_reported_and_the_others_timed(
    tmp_path, monkeypatch, capsys
) -> None:
    attend = decode_step.Step.attend

    def broken(self, tiling=None):
        if self.layer.config.key_bits == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return 1.01 * attend(self, tiling)

    monkeypatch.setattr(decode_step.Step, "attend", broken)
    status, path = run_attention(tmp_path, "--bits", "2", "3", "--check")
    assert status == 1
    found = {row["variant"]: row for row in rows_of(path, "attention")}
    assert found["k2v2"]["status"] == "out of memory"
    assert found["k3v3"]["status"] == "wrong"
    assert "relative error 1.00e-02" in found["k3v3"]["reason"]
    assert found["sdpa math packed"]["status"] == found["cat"]["status"] == "ok"
    out = capsys.readouterr().out
    assert "out of memory: OutOfMemoryError: CUDA out of memory." in out
    assert "| out of memory | wrong |" in out.split("eager: us, times")[1]

    # A run that goes on leaves out what failed and what is done.
    before = len(path.read_text().splitlines())
    assert run_attention(tmp_path, "--bits", "2", "3", "--resume")[0] == 1
    assert len(path.read_text().splitlines()) == before + 1  # its versions


def test_too_large_configurations_are_not_tried(tmp_path) -> None:
    _, path = run_attention(tmp_path, "--bits", "3", "--max-bytes", "1000")
    rows = rows_of(path, "attention")
    assert {row["status"] for row in rows} == {"out of memory"}
    assert all("--max-bytes 1,000" in row["reason"] for row in rows)
    run_attention(tmp_path, "--seconds", "-1")
    assert rows_of(path, "skipped")[0]["reason"] == "out of time"


def test_attention_on_an_emulated_gpu(tmp_path, emulated_gpu, monkeypatch) -> None:
    """Captured and called, checked after a replay; a capture that fails leaves the eager row."""
    capture = timing.Stopwatch.capture

    def failing(self, variant, calls, scratch=0):
        if variant.name == "cat":
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(self, variant, calls, scratch)

    monkeypatch.setattr(timing.Stopwatch, "capture", failing)
    flash = {"flash": bench_attention.BACKENDS["flash"]}
    monkeypatch.setattr(bench_attention, "BACKENDS", flash)
    status, path = run_attention(tmp_path, "--bits", "3", "--check", "--repeats", "1")
    assert status == 0
    found = {(row["variant"], row["mode"]): row for row in rows_of(path, "attention")}
    for name in ("k3v3", "sdpa flash gqa", "sdpa flash packed"):
        for mode in ("graph", "eager"):
            row = found[name, mode]
            assert row["status"] == "ok"
            assert row["us"] == pytest.approx(500 / row["calls"])
            assert row["sets"] == -(-3 * 20000 // row["bytes"])
            assert row["best_sdpa"].startswith("sdpa ")
    assert ("update k3v3", "graph") not in found  # it would outgrow the store
    assert found["cat", "graph"]["status"] == "failed"
    assert "not permitted" in found["cat", "graph"]["reason"]
    assert found["cat", "eager"]["status"] == "ok"


def test_a_replay_that_writes_nothing_is_wrong(emulated_gpu, monkeypatch) -> None:
    shape = decode_step.AttentionShape(1, 215, 4, 2, 16, "float32")
    generator = torch.Generator().manual_seed(0)
    step = decode_step.take_step(shape, RotorQuantConfig(), generator)
    stopwatch = timing.Stopwatch(CPU)
    assert decode_step.check_step(step, stopwatch) < 1e-5
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    with pytest.raises(decode_step.WrongResult, match="nan"):
        decode_step.check_step(step, stopwatch)


def test_tuning_compares_tilings_and_reports_those_that_fail(tmp_path, monkeypatch, capsys) -> None:
    attend = decode_step.Step.attend

    def broken(self, tiling=None):
        if tiling is not None and tiling.exact_n == 32:
            raise RuntimeError("out of resource: shared memory")
        out = attend(self, tiling)
        return out * 1.1 if tiling is not None and tiling.block_n == 32 else out

    monkeypatch.setattr(decode_step.Step, "attend", broken)
    path = tmp_path / "rows.jsonl"
    argv = [*TINY, "--dtype", "float16", "--bits", "3", "--limit", "2", "--repeats", "1"]
    assert bench_tune.main([*argv, "--out", str(path)]) == 1
    rows = rows_of(path, "tune")
    failed = [row for row in rows if row["status"] != "ok"]
    assert [row["tiling"]["block_n"] for row in failed if row["status"] == "wrong"] == [32]
    assert "shared memory" in failed[-1]["reason"]
    final = [row for row in rows if row.get("final")]
    assert sum(row["default"] for row in final) == 1
    assert [row["us"] for row in final] == sorted(row["us"] for row in final)
    assert bench_tune.tune_row(final[0]) in capsys.readouterr().out


def test_tilings_start_with_the_default_and_are_all_different() -> None:
    from rotorquant_hf.attention.triton_attention import choose_tiling

    default = choose_tiling(4, 8, 32768, 128, 132, torch.float16)
    found = bench_tune.tilings(default)
    assert found[0] == default
    assert len(set(found)) == len(found) > 30
    for name in ("block_m", "block_n", "exact_n", "warps", "stages"):
        assert len({getattr(tiling, name) for tiling in found}) > 1
    splits = [tiling.splits for tiling in bench_tune.variations(default, 32768)]
    assert len(set(splits)) == len(splits) > 3
    assert default.splits not in splits


def test_a_process_compiles_its_part_of_the_tilings(monkeypatch) -> None:
    tried = []
    attend = decode_step.Step.attend

    def recorded(self, tiling=None):
        tried.append(tiling)
        if tiling.exact_n == 32:
            raise RuntimeError("out of resource: shared memory")  # the run itself reports it
        return attend(self, tiling)

    monkeypatch.setattr(decode_step.Step, "attend", recorded)
    shape = decode_step.AttentionShape(1, 215, 4, 2, 16, "float32")
    every = [None] * 2
    for i in range(2):
        tried.clear()
        part = functools.partial(bench_tune.part_of_tilings, i, 2, 8)
        decode_step.compile_step(shape, RotorQuantConfig(), CPU, part)
        every[i] = set(tried)
        assert len(tried) == 4
    assert not every[0] & every[1]
    with backend("triton"):
        step = decode_step.take_step(shape, RotorQuantConfig(), torch.Generator().manual_seed(0))
        assert every[0] | every[1] == set(bench_tune.tilings(step.default_tiling())[:8])


def test_processes_work_through_their_jobs_and_are_ended_in_time(tmp_path) -> None:
    """One job writes a file, one never comes back."""
    begin = time.monotonic()
    path = tmp_path / "done"
    common.in_processes(os.system, [(f"touch {path}",), ("sleep 300",)], 2, 10)
    assert path.exists()
    assert time.monotonic() - begin < 60


def test_tuning_is_no_option_of_attention(capsys) -> None:
    with pytest.raises(SystemExit) as status:
        bench_attention.main([*TINY, "--tune"])
    assert status.value.code == 2
    assert "python -m evals.bench.tune" in capsys.readouterr().err


# Generation


def run_generate(tmp_path, *options):
    path = tmp_path / "rows.jsonl"
    argv = [*MODEL, "--batch", "2", "--context", "215", "--steps", "5", "--warm-up", "1"]
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
        assert f"| 2 | 215 | {name} | eager | {row['ms']:.2f} |" in out
    assert "needs a CUDA device" in found["k4v4", "graph"]["reason"] or (
        "need a CUDA device" in found["k4v4", "graph"]["reason"]
    )
    # After one step to warm up, 216 tokens in 2 layers of 2 heads, keys and values.
    assert base["cache_bytes"] == 2 * 2 * 2 * 2 * 216 * 16 * 4
    cache = RotorQuantCache("k4v4")
    for layer in range(2):
        cache.update(
            *common.random_states((2, 2, 215, 16), torch.float32, torch.Generator()), layer
        )
        cache.update(*common.random_states((2, 2, 1, 16), torch.float32, torch.Generator()), layer)
    assert found["k4v4", "eager"]["cache_bytes"] == cache.memory().total_bytes


def test_caches_that_do_not_fit_together_come_one_after_the_other(tmp_path) -> None:
    """The baseline is measured again at the end; what does not fit at all is reported."""
    dynamic = 2 * 2 * 2 * 2 * 215 * 16 * 4
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
        if self.is_initialized and self.get_seq_length() == 218:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return update(self, keys, values, *args, **kwargs)

    monkeypatch.setattr(RotorQuantLayer, "update", broken)
    monkeypatch.setattr(DynamicCache, "get_max_length", lambda self: -1, raising=False)
    _, path = run_generate(tmp_path, "--caches", "dynamic", "k3v3", "--no-graph")
    found = {row["cache"]: row for row in rows_of(path, "generate")}
    assert found["k3v3"]["status"] == "out of memory"
    assert found["dynamic"]["status"] == "ok"
    assert found["dynamic"]["samples"] == 5


def test_generation_on_an_emulated_gpu_counts_memory(tmp_path, emulated_gpu) -> None:
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


@pytest.mark.parametrize("most", [1, 7, 19, 100, 1000])
@pytest.mark.parametrize("start", [1, 10, 95, 3000])
def test_search_finds_the_largest_that_fits(most, start) -> None:
    found = bench_generate.search(lambda n: n <= most, start, 40)
    assert 0 <= most - found <= max(1, found // 20)
    tried = []
    bench_generate.search(lambda n: tried.append(n) or n <= most, start, 3)
    assert len(tried) <= 3


def test_largest_batch(tmp_path) -> None:
    one = 2 * 2 * 2 * 216 * 16 * 4  # bytes of a row after a step
    argv = ["--caches", "dynamic", "k2v2", "--largest-batch", "215", "--batch", "--memory"]
    _, path = run_generate(tmp_path, *argv, str(20 * one))
    found = {row["cache"]: row for row in rows_of(path, "largest_batch")}
    assert 19 <= found["dynamic"]["batch"] <= 20
    assert found["k2v2"]["batch"] > 0
    assert found["dynamic"]["cache_bytes"] == found["dynamic"]["batch"] * one
    row = found["dynamic"]
    assert row["tokens_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
    assert not rows_of(path, "generate")


# Rows


def test_rows_are_kept_and_read_again(tmp_path) -> None:
    """A row cut off in its middle is dropped; a file in use or damaged is refused."""
    path = tmp_path / "new" / "rows.jsonl"
    log = common.open_log(path, resume=False)
    log.write({"kind": "a", "us": float("nan")})
    with pytest.raises(InputError, match="another process is writing"):
        JSONLines(path)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "b"')
    log = common.open_log(path, resume=True)
    log.write({"kind": "c"})
    log.close()
    assert log.entries == [{"kind": "a", "us": None}, {"kind": "c"}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.entries
    log = common.open_log(path, resume=False)
    log.close()
    assert log.entries == []
    path.write_text('{"kind"\n')
    with pytest.raises(InputError, match="damaged in line 1"):
        JSONLines(path)
    memory = JSONLines(None)
    memory.write({"kind": "a"})
    assert memory.entries == [{"kind": "a"}]


def test_input_that_cannot_be_used_is_one_line(capsys) -> None:
    def main():
        raise InputError("the file is damaged: remove it")

    with pytest.raises(SystemExit) as status:
        common.exit_with(main)
    assert status.value.code == 2
    assert capsys.readouterr().err == "the file is damaged: remove it\n"


# Requirements and help


COMMANDS = ("attention", "cache_size", "cpu", "generate", "gpu", "kernel_cost", "tune")

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without(absent, code, **environment):
    """Run code where some packages are not installed."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent) + code],
        cwd=ROOT,
        env=keep | environment,
        capture_output=True,
        text=True,
    )


def run_commands(modules, *arguments):
    """What commands print without Triton, one after the other, each with its exit status."""
    done = run_without(
        ["triton"],
        f"""
import runpy
sys.argv[1:] = {list(arguments)}
for module in {list(modules)}:
    try:
        runpy.run_module("evals.bench." + module, run_name="__main__")
    except SystemExit as end:
        print("ENDED", end.code, flush=True)
""",
    )
    assert done.returncode == 0, done.stderr
    return done


def test_help_is_complete_and_needs_no_triton() -> None:
    helps = run_commands(COMMANDS, "--help").stdout.split("ENDED 0\n")
    assert len(helps) == len(COMMANDS) + 1
    for module, text in zip(COMMANDS, helps, strict=False):
        assert f"python -m evals.bench.{module}" in text
        # An option without a help text is followed by the next option, or by the end.
        silent = re.findall(r"^  (--[\w-]+)(?: \S+)*\n(?! {10})", text, re.MULTILINE)
        assert not silent, module


def test_a_missing_triton_is_named_before_any_work(tmp_path) -> None:
    gpu = run_commands(["gpu"], "--out", str(tmp_path / "out"))
    others = run_commands(["attention", "kernel_cost", "tune"])
    assert gpu.stdout + others.stdout == 4 * "ENDED 2\n"
    errors = (gpu.stderr + others.stderr).splitlines()
    assert len([line for line in errors if "rotorquant-hf[triton]" in line]) == 4
    assert not list(tmp_path.iterdir())


# Everything in one command


def gpu_args(out, *options):
    return bench_gpu._arguments(["--out", str(out), *options])


def test_one_command_runs_its_parts_and_keeps_all_they_say(tmp_path) -> None:
    small = " ".join([*MODEL, "--batch 1 --context 200 --steps 5 --caches dynamic k3v3 --no-graph"])
    argv = ["--out", str(tmp_path), "--part", "check", "generate", "--workers", "1"]
    argv += ["--minutes", "4", "--only", "test_append and 4-bits", "--generate", small]
    assert bench_gpu.main(argv) == 0
    log = (tmp_path / "log.txt").read_text()
    for text in (
        "# check, at most",
        "1 passed",
        "# generate, at most",
        "check: ok",
        "generate: ok",
    ):
        assert text in log
    assert "| 1 | 200 | k3v3 | eager |" in log
    assert "python -m evals.bench.gpu --out" in log
    assert torch.__version__ in log
    assert rows_of(tmp_path / "generate.jsonl", "generate")
    assert 'tests="1"' in (tmp_path / "check.xml").read_text()


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys) -> None:
    commands, ends = [], {"pytest": [1], "tune": [124], "attention": [75, 75, 0], "generate": [-11]}

    def run(arguments, seconds, log):
        commands.append(arguments)
        return ends[arguments[1].split(".")[-1]].pop(0)

    monkeypatch.setattr(bench_gpu, "run", run)
    assert bench_gpu.main(["--out", str(tmp_path), "--minutes", "9"]) == 1
    out = capsys.readouterr().out
    for text in ("check: exit status 1", "tune: out of time", "attention: ok", "status -11"):
        assert text in out
    assert not any(ends.values())
    benchmarks = [command for command in commands if command[1] != "pytest"]
    assert all("--resume" in command for command in benchmarks)  # the device was lost twice
    assert len(commands) == 6


def test_where_check_is_alone_it_runs_all_tests_of_kernels(tmp_path) -> None:
    few = bench_gpu.command("check", gpu_args(tmp_path), 60)
    everything = bench_gpu.command("check", gpu_args(tmp_path, "--part", "check"), 60)
    assert "tests/kernels" not in few
    assert "tests/kernels" in everything
    assert "-n" in everything or (os.cpu_count() or 1) == 1
    for command in (few, everything):
        files = [x for x in command if x.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_gpu, "_GRACE", 1)
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(marker)!r}).touch()"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True); "
        "time.sleep(60)"
    )
    begin = time.monotonic()
    assert bench_gpu.run(["-c", code], 2, bench_gpu.Log(tmp_path)) in (137, -9)
    assert time.monotonic() - begin < 6
    assert "begun" in capsys.readouterr().out
    time.sleep(max(0.0, begin + 8 - time.monotonic()))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes", "0"], "--minutes above 0"),
        (["--workers", "0"], "--workers from 1"),
        (["--part", "all"], "invalid choice: 'all'"),
    ],
    ids=["minutes", "workers", "part"],
)
def test_arguments_that_make_no_sense(options, says, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as status:
        gpu_args(tmp_path, *options)
    assert status.value.code == 2
    assert says in capsys.readouterr().err


def test_checks_need_no_package_beyond_those_of_a_gpu_machine() -> None:
    """From a plain copy of the tree: torch, triton, transformers and pytest alone."""
    absent = ["lm_eval", "datasets", "hypothesis", "scipy", "clifford", "accelerate", "matplotlib"]
    absent += ["pandas", "jinja2", "adjustText", "hqq", "optimum", "xdist"]
    arguments = ["--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += bench_gpu._ARGUMENTS["check"][1].split()
    code = f"import pytest\nsys.exit(pytest.main({arguments}))"
    done = run_without(absent, code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
