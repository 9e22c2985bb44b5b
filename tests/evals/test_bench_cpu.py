"""The benchmarks that need no GPU measure what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from evals.bench import cache_size, prefill
from evals.bench import cpu as bench_cpu
from rotorquant_hf import RotorQuantCache
from rotorquant_hf.backend import running


def test_cache_sizes(capsys) -> None:
    cache_size.main(
        ["--tokens", "1000", "--heads", "2", "--head-dim", "64", "--presets", "k4v4", "k3v3"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| k4v4 ") for line in lines)
    ratios = [float(line.split("|")[3].strip().rstrip("x")) for line in lines if "| k" in line]
    assert 1.5 < ratios[0] < ratios[1] < 5


def test_cache_sizes_count_what_queries_leave_behind(capsys, monkeypatch) -> None:
    """Their Hessian, 2 heads of 64 x 16 in float16."""
    found, update = [], RotorQuantCache.update

    def observed(cache, *args, **kwargs):
        found.append(cache)
        return update(cache, *args, **kwargs)

    monkeypatch.setattr(RotorQuantCache, "update", observed)
    options = ["--tokens", "1000", "--heads", "2", "--head-dim", "64", "--presets"]
    cache_size.main([*options, "k4v4"])
    (cache,) = found
    seen = cache.memory().parts["statistics"]
    unseen = RotorQuantCache("k4v4")
    unseen.update(*torch.randn(2, 1, 2, 1000, 64).bfloat16(), 0)
    assert seen - unseen.memory().parts["statistics"] == 2 * 64 * 16 * 2
    assert f"| {cache.memory().total_bytes:,} |" in capsys.readouterr().out


def test_prefill(capsys, monkeypatch) -> None:
    """A row a cache; those of ours have coded the prompt, and rounded for its queries."""
    made, pass_over = [], prefill.prefill
    monkeypatch.setattr(prefill, "prefill", lambda *args: made.append(pass_over(*args)))
    shape = "--layers 1 --hidden 64 --heads 2 --kv-heads 1 --head-dim 32 --intermediate 64"
    run = "--tokens 400 --dtype float32 --device cpu --threads 1 --repeats 2"
    prefill.main([*shape.split(), *run.split(), "--caches", "k3v3", "k3v3:query_aware=false"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:]] == [
        "---",
        "dynamic",
        "k3v3",
        "k3v3, query-aware off",
    ]
    assert all("%" in line for line in lines[3:])
    assert len(made) == 3 * 3  # a round that does not count, and two
    for cache, aware in zip(made[1:3], (True, False), strict=True):
        assert cache.memory().packed_numbers > 0
        assert (cache.layers[0].store.keys.statistics.hessian is not None) == aware


def test_prefill_by_kernel(capsys) -> None:
    gpu, cpu = DeviceType.CUDA, DeviceType.CPU
    seen = [("append_kernel", gpu, 90.5), ("gemm", gpu, 700), ("append_kernel", gpu, 10)]
    seen += [("block_kernel", gpu, 4), ("copy", gpu, 3), ("cudaLaunchKernel", cpu, 5000)]
    events = [SimpleNamespace(name=x, device_type=y, device_time=z) for x, y, z in seen]
    assert prefill.by_kernel(events) == [
        "| all others | 2 | 703 |",
        "| append_kernel | 2 | 100 |",
        "| block_kernel | 1 | 4 |",
    ]
    with pytest.raises(SystemExit):
        prefill.main(["--by-kernel", "--device", "cpu"])
    assert "the device is cpu: kernels take time on a GPU alone" in capsys.readouterr().err


def test_prefill_refuses_nonsense(capsys) -> None:
    with pytest.raises(SystemExit):
        prefill.main(["--repeats", "1"])
    assert "--repeats from 2" in capsys.readouterr().err


def test_bench_cpu(capsys) -> None:
    """A row per width, whose ratio is that of its medians."""
    options = ["--context", "400", "--dtype", "float32", "--threads", "1", "--repeats", "3"]
    bench_cpu.main([*options, "--bits", "3", "4"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if "| float32" in line]
    assert [row[1] for row in rows] == ["3", "4"]
    for row in rows:
        packed, _, _, plain = (float(cell.split()[0]) for cell in row[3:7])
        assert float(row[7].rstrip("x")) == pytest.approx(plain / packed, rel=0.5)


def test_bench_cpu_times_both_ways_of_reading_codes(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(bench_cpu, "attend", lambda *args: seen.append(running("cpu")))
    options = ["--context", "400", "--dtype", "float32", "--threads", "1", "--repeats", "2"]
    bench_cpu.main([*options, "--bits", "3"])
    assert set(seen) == {running("cpu"), "torch"}
    assert f"packed codes by {running('cpu')}" in capsys.readouterr().out


def test_bench_cpu_reads_what_was_compressed() -> None:
    keys, values, plain_keys, _ = bench_cpu.cached(400, 2, 64, 3, torch.float32)
    assert keys.states.packed.shape == (1, 2, 256, 64)
    assert keys.shape == values.shape == plain_keys.shape
    assert 0 < (keys.materialize() - plain_keys).norm() < 0.2 * plain_keys.norm()
