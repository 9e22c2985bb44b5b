"""The benchmarks of attention report what they say they do; their times mean nothing here."""

from __future__ import annotations

import functools
import json
import os
import time

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU run evals.bench.gpu itself", allow_module_level=True)

from evals import environment, failures, timing
from evals.bench import attention as bench_attention
from evals.bench import common, decode_step
from evals.bench import tune as bench_tune
from evals.errors import InputError, NotAvailableError
from evals.sweep.rows import JSONLines
from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.backend import backend
from tests.helpers.bench import CPU, emulated_gpu, rows_of  # noqa: F401 (a fixture)

# 1 row, 2 kv heads of 16 elements; of 311 tokens 4 are sinks, 160 packed and 147 in the window.
TINY = ["--batch", "1", "--context", "311", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"]
TINY += ["--dtype", "float32", "--repeats", "2", "--device", "cpu"]
PACKED, FULL = 160, 151


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
    for text in (torch.__version__, "python -m evals.x --a 1", environment.processor()):
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

    # Keys and values of 16 elements in float32; a scale is 2 bytes, 16 signs are 2.
    plain = 2 * 311 * 2 * 16 * 4
    full = 2 * FULL * 2 * 16 * 4
    assert found["sdpa flash gqa"]["bytes"] == found["sdpa math packed"]["bytes"] == plain
    assert found["cat"]["bytes"] == 2 * (plain + 2 * 2 * 16 * 4)
    assert found["k2v2"]["bytes"] == full + 2 * PACKED * 2 * (4 + 2)
    assert found["k3v3"]["bytes"] == full + 2 * PACKED * 2 * (6 + 2)
    prod = (4 + 2 + 2 + 2) + (6 + 2)
    assert found["k3v3 prod"]["bytes"] == full + 2 * PACKED * prod
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
        assert f"| 1 | 311 | 16 | {name} | eager | {row['us']:.1f} |" in out
    assert f"| {best['us']:.1f} ({best['variant'][5:]}) |" in out.split("eager: us, times")[1]
    assert "python -m evals.bench.attention --batch 1" in out


def test_bytes_read_are_those_that_the_layer_holds() -> None:
    shape = decode_step.AttentionShape(2, 311, 4, 2, 16, "float16")
    settings = RotorQuantConfig(key_bits=4, value_bits=3)
    with backend("triton"):
        step = decode_step.take_step(shape, settings, torch.Generator().manual_seed(0))
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


@pytest.mark.usefixtures("emulated_gpu")
def test_attention_on_an_emulated_gpu(tmp_path, monkeypatch) -> None:
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


@pytest.mark.usefixtures("emulated_gpu")
def test_a_replay_that_writes_nothing_is_wrong(monkeypatch) -> None:
    shape = decode_step.AttentionShape(1, 311, 4, 2, 16, "float32")
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
        return out * 1.1 if tiling is not None and tiling.stages == 1 else out

    monkeypatch.setattr(decode_step.Step, "attend", broken)
    path = tmp_path / "rows.jsonl"
    argv = [*TINY, "--dtype", "float16", "--bits", "3", "--limit", "4", "--repeats", "1"]
    argv += ["--config-seconds", "60"]
    assert bench_tune.main([*argv, "--out", str(path)]) == 1
    rows = rows_of(path, "tune")
    failed = [row for row in rows if row["status"] != "ok"]
    assert [row["tiling"]["stages"] for row in failed if row["status"] == "wrong"] == [1]
    assert "shared memory" in failed[-1]["reason"]
    final = [row for row in rows if row.get("final")]
    assert sum(row["default"] for row in final) == 1
    assert [row["us"] for row in final] == sorted(row["us"] for row in final)
    assert bench_tune.tune_row(final[0]) in capsys.readouterr().out


def test_tilings_start_with_the_default_and_are_all_different() -> None:
    from rotorquant_hf.attention.triton_attention import Device, choose_tiling

    device = Device(132, 228 << 10)
    default = choose_tiling(4, 8, 32768, (128, 128), (3, 3), device, torch.float16)
    found = bench_tune.tilings(default)
    assert found[0] == default
    assert len(set(found)) == len(found) > 30
    names = ("block_m", "block_n", "exact_n", "warps", "stages", "direct", "pairs", "registers")
    for name in names:
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
    shape = decode_step.AttentionShape(1, 311, 4, 2, 16, "float32")
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


@pytest.mark.parametrize("kind", [InputError, NotAvailableError])
def test_what_cannot_be_used_is_one_line(kind, capsys) -> None:
    def main():
        raise kind("the file is damaged: remove it")

    with pytest.raises(SystemExit) as status:
        common.exit_with(main)
    assert status.value.code == 2
    assert capsys.readouterr().err == "error: the file is damaged: remove it\n"
