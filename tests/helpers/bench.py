"""What tests of the benchmarks share: small sizes, rows, and a CPU that passes for a GPU."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from evals import timing
from evals.bench import common
from evals.bench import generate as bench_generate
from rotorquant_hf.backend import backend
from tests.helpers import cuda_graph

CPU = torch.device("cpu")
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
