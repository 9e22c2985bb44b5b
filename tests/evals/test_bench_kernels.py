"""A decode step kernel by kernel: what a profiler saw is told apart; the command needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from evals.bench import kernels
from evals.bench.decode_step import AttentionShape, Run
from evals.sweep.rows import JSONLines
from rotorquant_hf.backend import backend
from tests.helpers.bench import CPU


def event(name: str, us: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_time=us)


def test_times_are_medians_by_kernel() -> None:
    steps = [("prepare", 5), ("attend", 9), ("combine", 3), ("attend", 30), ("attend", 11)]
    events = [event(f"{name}_kernel", us) for name, us in steps]
    events += [event("vectorized_elementwise_kernel", 80), event("cudaLaunchKernel", 2)]
    assert kernels.kernel_times(events) == {"prepare": 5, "attend": 11, "combine": 3}
    with pytest.raises(RuntimeError, match="the profiler saw no combine_kernel"):
        kernels.kernel_times(events[:2])


def test_a_row_for_each_setting(monkeypatch, capsys) -> None:
    args = SimpleNamespace(bits=[2, 3], prod=False, repeats=4)
    log = JSONLines(None)
    run = Run(args, SimpleNamespace(device=CPU, l2_bytes=64), log, copy=1.0, until=0.0)
    calls = []

    def profiled(step, between, samples):
        between()
        calls.append((step().shape, samples))
        if len(calls) == 2:
            raise RuntimeError("the profiler saw no attend_kernel")
        return {"prepare": 1.0, "attend": 2.5, "combine": 0.5}

    monkeypatch.setattr(kernels, "profiled", profiled)
    shape = AttentionShape(1, 420, 4, 2, 16, "float32")
    with backend("triton"):
        kernels.measure(shape, run)
    assert calls == [((1, 4, 1, 16), 4)] * 2
    good, bad = log.entries
    assert good["variant"] == "k2v2"
    assert (good["attend"], good["splits"], good["exact_splits"]) == (2.5, 1, 1)
    assert bad["status"] == "failed"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| 1 | 420 | 16 | k2v2 | 1.0 | 2.5 | 0.5 | 4.0 | 1 | 1 |"
    assert "| k3v3 | failed: RuntimeError: the profiler saw no attend_kernel |" in lines[1]

    with backend("triton"):  # resumed: what went well is not done again
        kernels.measure(shape, run)
    assert [row["variant"] for row in log.entries] == ["k2v2", "k3v3", "k3v3"]


def test_a_cpu_is_refused(capsys, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as error:
        kernels.main(["--device", "cpu"])
    assert error.value.code == 2
    assert "the device is cpu: kernels take time on a GPU alone" in capsys.readouterr().err
