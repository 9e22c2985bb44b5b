"""The benchmarks report what they say they do; their times mean nothing here."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from evals import environment, failures, timing
from evals.bench import attention as bench_attention
from evals.bench import common
from evals.bench import generate as bench_generate
from evals.bench import gpu as bench_gpu
from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
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
    return [row for row in common.read_rows(path) if row["kind"] == kind]


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
        for module in (timing, bench_attention, bench_generate):
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
    assert timed[0][1].samples == timing.LEAST_SAMPLES


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
    assert common.chunks(10, 7, most=30) == [4, 4, 2]
    assert common.chunks(1, 100, most=30) == [1]


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
    shape = bench_attention.Shape(2, 215, 4, 2, 16, "float16")
    settings = RotorQuantConfig(key_bits=4, value_bits=3)
    with backend("triton"):
        step = bench_attention.take_step(shape, settings, torch.Generator().manual_seed(0))
    held = step.layer.nbytes()
    window = 2 * 2 * 2 * step.keys.recent.shape[2] * 16 * 2  # without the ring's free slots
    packed = sum(size for name, size in held.items() if name.startswith(("key_", "value_")))
    assert step.nbytes == packed + held["sinks"] + window
    assert step.layer.get_seq_length() == shape.context
    assert step.keys.recent.std() > 0.5
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
    attend = bench_attention.Step.attend

    def broken(self, tiling=None):
        if self.layer.config.key_bits == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return 1.01 * attend(self, tiling)

    monkeypatch.setattr(bench_attention.Step, "attend", broken)
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
    shape = bench_attention.Shape(1, 215, 4, 2, 16, "float32")
    generator = torch.Generator().manual_seed(0)
    step = bench_attention.take_step(shape, RotorQuantConfig(), generator)
    stopwatch = timing.Stopwatch(CPU)
    assert bench_attention.check_step(step, stopwatch) < 1e-5
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    with pytest.raises(bench_attention.WrongResult, match="nan"):
        bench_attention.check_step(step, stopwatch)


def test_tuning_compares_tilings_and_reports_those_that_fail(tmp_path, monkeypatch, capsys) -> None:
    attend = bench_attention.Step.attend

    def broken(self, tiling=None):
        if tiling is not None and tiling.exact_n == 32:
            raise RuntimeError("out of resource: shared memory")
        out = attend(self, tiling)
        return out * 1.1 if tiling is not None and tiling.block_n == 32 else out

    monkeypatch.setattr(bench_attention.Step, "attend", broken)
    status, path = run_attention(
        tmp_path, "--dtype", "float16", "--bits", "3", "--tune", "--limit", "2", "--repeats", "1"
    )
    assert status == 1
    rows = rows_of(path, "tune")
    failed = [row for row in rows if row["status"] != "ok"]
    assert [row["tiling"]["block_n"] for row in failed if row["status"] == "wrong"] == [32]
    assert "shared memory" in failed[-1]["reason"]
    final = [row for row in rows if row.get("final")]
    assert sum(row["default"] for row in final) == 1
    assert [row["us"] for row in final] == sorted(row["us"] for row in final)
    assert bench_attention.tune_row(final[0]) in capsys.readouterr().out


def test_tilings_start_with_the_default_and_are_all_different() -> None:
    from rotorquant_hf.attention.triton_attention import choose_tiling

    default = choose_tiling(4, 8, 32768, 128, 132, torch.float16)
    found = bench_attention.tilings(default)
    assert found[0] == default
    assert len(set(found)) == len(found) > 30
    for name in ("block_m", "block_n", "exact_n", "warps", "stages"):
        assert len({getattr(tiling, name) for tiling in found}) > 1
    splits = [tiling.splits for tiling in bench_attention.variations(default, 32768)]
    assert len(set(splits)) == len(splits) > 3
    assert default.splits not in splits


def test_compiling_a_share_launches_its_tilings_alone(monkeypatch) -> None:
    tried = []
    attend = bench_attention.Step.attend

    def recorded(self, tiling=None):
        tried.append(tiling)
        return attend(self, tiling)

    monkeypatch.setattr(bench_attention.Step, "attend", recorded)
    assert bench_attention.main(
        [*TINY, "--bits", "3", "--tune", "--limit", "4", "--share", "1/2"]
    ) == 0  # fmt: skip
    assert len(tried) == 3
    assert tried[0] is None
    assert None not in tried[1:]


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


# Everything in one command


def test_checks_have_names_of_their_own_and_cover_what_there_is() -> None:
    names = [case.name for case in bench_gpu.cases()]
    assert len(set(names)) == len(names) > 60
    for part in ("attend: ", "append: ", "ring: ", "model: ", "graph: "):
        assert any(name.startswith(part) for name in names)


def test_checks_find_planted_faults(monkeypatch) -> None:
    """A kernel that is a little off, codes that are a little off, a ring that lags."""
    from rotorquant_hf import RotorQuantMSE
    from rotorquant_hf.attention import triton_attention

    small = {"d": 16, "context": 200, "dtype": torch.float32, "batch": 1, "heads": 1}
    case = bench_gpu.AttendCase({"key_bits": 3}, mask="added", sinks=True, softcap=5.0, **small)
    append = bench_gpu.AppendCase({"key_bits": 3, "value_bits": 2}, 16, torch.float32)
    ring = bench_gpu.RingCase(
        {"residual_length": 16, "block_length": 8}, d=16, prompt=40, steps=9, every=9
    )
    with backend("triton"):
        assert case.run(CPU) < 1e-5
        assert append.run(CPU) < 1e-3
        assert ring.run(CPU) < 1e-4

        attend = triton_attention.attend_packed
        monkeypatch.setattr(triton_attention, "attend_packed", lambda *a: attend(*a) * (1 + 3e-5))
        with pytest.raises(bench_attention.WrongResult, match=r"error 3\.0.e-05"):
            case.run(CPU)
        monkeypatch.setattr(triton_attention, "attend_packed", lambda *a: attend(*a) * float("nan"))
        with pytest.raises(bench_attention.WrongResult, match="nan"):
            case.run(CPU)
        monkeypatch.undo()

        encode = RotorQuantMSE.encode
        monkeypatch.setattr(RotorQuantMSE, "encode", lambda self, u: encode(self, u * 1.01))
        with pytest.raises(bench_attention.WrongResult):
            append.run(CPU)
        monkeypatch.undo()

        push = "rotorquant_hf.kernels.push.push_tokens"
        monkeypatch.setattr(push, lambda *a, **k: None)
        with pytest.raises(bench_attention.WrongResult):
            ring.run(CPU)


def test_a_share_of_the_checks_prints_rows(capsys) -> None:
    argv = ["--out", "unused", "--device", "cpu", "--only", "append: * d [68]*"]  # d 64 and d 80
    assert bench_gpu.main([*argv, "--share", "1/2"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["case"], row["status"]) == ("append: 3 bits d 80", "ok")
    assert row["error"] < 1e-3
    assert bench_gpu.main([*argv, "--share", "0/2", "--minutes", "-1"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "skipped"


def test_one_command_runs_its_parts_and_sums_up(tmp_path) -> None:
    argv = ["--out", str(tmp_path), "--part", "generate", "--device", "cpu", "--workers", "1"]
    small = " ".join([*MODEL, "--batch 1 --context 200 --steps 5 --caches dynamic k3v3 --no-graph"])
    assert bench_gpu.main([*argv, "--minutes", "1.5", "--generate", small]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "| 1 | 200 | k3v3 | eager |" in text
    assert torch.__version__ in text
    log = (tmp_path / "log.txt").read_text()
    assert "# generate, at most" in log
    assert "python -m evals.bench.generate" in log
    assert rows_of(tmp_path / "generate.jsonl", "generate")


def session(tmp_path, **options):
    settings = {"out": tmp_path, "workers": 1, "only": "append: *", "device": "cpu", "minutes": 1}
    args = SimpleNamespace(**settings | options)
    return bench_gpu.Session(args, bench_gpu.Runner(tmp_path))


def test_a_part_whose_device_is_lost_is_started_anew(tmp_path, monkeypatch) -> None:
    commands, statuses = [], [common.DEVICE_LOST, common.DEVICE_LOST, 0]

    def run(commands_, seconds, take=None):
        commands.extend(commands_)
        return [statuses.pop(0)]

    found = session(tmp_path)
    monkeypatch.setattr(found.runner, "run", run)
    found._resumed("attention", ["-m", "x"], 100)
    assert len(commands) == 3
    assert all("--resume" in command for command in commands)


def test_checks_of_a_process_that_died_are_tried_alone_and_count(
    tmp_path, monkeypatch, capsys
) -> None:
    rounds = []

    def run(commands, seconds, take):
        rounds.append(commands)
        names = ("append: prod", "append: 1 bits") if len(rounds) == 1 else ("append: 4 bits",)
        for name in names:
            assert take(json.dumps({"kind": "check", "case": name, "status": "ok", "error": 0}))
        assert not take("some other line")
        return [-11] * len(commands)

    found = session(tmp_path, workers=3)
    monkeypatch.setattr(found.runner, "run", run)
    found.check(60)
    assert [command[-1] for command in rounds[0]] == ["append: *"] * found.workers
    assert rounds[1][0][-1] == "append: 2 bits"
    rows = {row["case"]: row for row in common.read_rows(found.path("check"))}
    assert rows["append: prod"]["status"] == rows["append: 4 bits"]["status"] == "ok"
    assert rows["append: 3 bits"]["status"] == "failed"
    assert "[-11]" in rows["append: 3 bits"]["reason"]
    assert f"3 of {len(rows)} checks passed" in capsys.readouterr().out


def test_what_takes_too_long_is_ended(tmp_path, capsys) -> None:
    runner = bench_gpu.Runner(tmp_path)
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert runner.run([["-c", code], ["-c", "print('done')"]], 2) == [-9, 0]
    out = capsys.readouterr().out
    assert "begun" in out
    assert "done" in out
    assert "ended after 2 s" in out
