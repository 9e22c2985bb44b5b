"""Interleaved timing, and the bandwidth of a copy.

- Variants of one configuration are timed in turn, sample by sample, so that a drift of the clocks
  meets all of them alike; the median stands for a variant, p10 and p90 for its spread.
- A variant works on several sets of tensors in turn, together larger than the L2 cache, which
  would serve repeats on one.
- "graph": the work captured in a CUDA graph and replayed behind a queued copy, so that the device
  never waits for the host: time on the device. "eager": calls from Python, one after the other,
  the host's time included.
- A variant that fails is reported with its reason; its memory is freed and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .environment import on_gpu
from .failures import guarded

MIN_SAMPLES = 5

_SAMPLE_SECONDS = 1e-3  # a sample repeats its work for about so long, by the host's clock
_MAX_CALLS = 128
_SPACER_BYTES = 1 << 30
_COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile of the samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The statistics of some samples."""
        points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
        found = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
        return cls(found[0], found[1], found[2], len(seconds))

    def row(self, unit: str = "us") -> dict[str, float | int]:
        """Named values for a row, in "us" or "ms"."""
        factor = {"us": 1e6, "ms": 1e3}[unit]
        return {
            unit: self.median * factor,
            f"{unit}_p10": self.p10 * factor,
            f"{unit}_p90": self.p90 * factor,
            "samples": self.samples,
        }


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds on the host's clock until the device has done some work, and what the work gave."""
    synchronize(device)
    begin = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - begin, result


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Variant:
    """Work to be timed.

    Attributes:
        name: of the row.
        calls: the same work on different memory; called in turn.
        moved: bytes of stored keys and values that one call reads (and writes).
        around: makes the context in which calls run; entered once per sample, untimed.
        capturable: whether it can be captured in a CUDA graph.
        note: values to be added to its rows.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    moved: int
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    capturable: bool = True
    note: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sampler:
    """A variant made ready in one mode: warmed up, and captured if the mode is "graph".

    Attributes:
        variant, mode: what, and how it is run.
        calls: of one sample.
        graph: of that many calls.
        done: calls made, of which the next goes on to the next memory.
    """

    variant: Variant
    mode: str
    calls: int
    graph: torch.cuda.CUDAGraph | None = None
    done: int = 0


class Stopwatch:
    """Times variants on one device.

    `triton.testing.do_bench` and `do_bench_cudagraph` are not used. Neither takes turns between
    variants. `do_bench_cudagraph` never flushes the L2 cache, which then serves every replay;
    `do_bench` flushes it, but times calls from Python, the host's time included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = on_gpu(device)
        self.l2_bytes = 0
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            self.l2_bytes = int(getattr(properties, "L2_cache_size", 64 << 20))
            size = min(_SPACER_BYTES, torch.cuda.mem_get_info(device)[0] // 32)
            self._spacer = torch.empty(2, size, dtype=torch.uint8, device=device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
            self.stream = torch.cuda.Stream(device)  # of captures, and of the calls before them

    def modes(self, variant: Variant) -> tuple[str, ...]:
        """The modes in which a variant is timed here."""
        return ("graph", "eager") if self.cuda and variant.capturable else ("eager",)

    def sets(self, moved: int, max_sets: int = 64) -> int:
        """How many sets of tensors of `moved` bytes a variant should take in turn."""
        if not self.cuda:
            return 2
        return min(max_sets, max(1, -(-3 * self.l2_bytes // max(moved, 1))))

    def prepare(self, variant: Variant) -> tuple[float, int]:
        """Warm a variant up; returns the seconds of a call and the bytes of its scratch."""
        call, scratch = variant.calls[0], 0
        with variant.around(), self._aside():
            if self.cuda:
                call()
                synchronize(self.device)
                scratch = self._scratch(call)
            return timed(call, self.device)[0], scratch

    def sampler(self, variant: Variant, mode: str, estimate: float, scratch: int) -> Sampler:
        """Make a variant that `prepare` warmed up ready for `sample`.

        Raises:
            RuntimeError: if it cannot be captured.
        """
        wanted = int(_SAMPLE_SECONDS / max(estimate, 1e-7)) + 1
        if mode == "eager":
            low, high = (4, 32) if self.cuda and estimate < 5e-3 else (1, 1)
            return Sampler(variant, mode, min(max(wanted, low), high))
        calls = min(max(wanted, len(variant.calls)), _MAX_CALLS)
        return Sampler(variant, mode, calls, self.capture(variant, calls, scratch))

    def capture(self, variant: Variant, calls: int, scratch: int = 0) -> torch.cuda.CUDAGraph:
        """A CUDA graph of some calls, which take `scratch` bytes; replayed once.

        Raises:
            RuntimeError: if that fails, or if it might for want of memory.
        """
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        if free < 2.5 * scratch + (256 << 20):  # for the graph, and for calls beside it
            # An allocation that fails during a capture leaves the allocator in disorder.
            raise MemoryError(f"a call takes {scratch:,} bytes of scratch, {free:,} are free")
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        try:
            with variant.around(), torch.cuda.graph(graph, stream=self.stream):
                for i in range(calls):
                    variant.calls[i % len(variant.calls)]()
        finally:
            torch.cuda.set_stream(before)
        graph.replay()
        synchronize(self.device)
        return graph

    def sample(self, sampler: Sampler) -> float:
        """Seconds of one call, averaged over the calls of one sample."""
        with sampler.variant.around():
            if not self.cuda:
                begin = time.perf_counter()
                self._run(sampler)
                return (time.perf_counter() - begin) / sampler.calls
            if sampler.graph is not None:
                self._spacer[0].copy_(self._spacer[1])
            self._begin.record()
            self._run(sampler)
            self._end.record()
            self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3 / sampler.calls

    def _run(self, sampler: Sampler) -> None:
        if sampler.graph is not None:
            sampler.graph.replay()
            return
        calls = sampler.variant.calls
        for _ in range(sampler.calls):
            calls[sampler.done % len(calls)]()
            sampler.done += 1

    def _scratch(self, call: Callable[[], Any]) -> int:
        """Bytes that a call takes at its peak."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of captures, as they want the work before them."""
        if not self.cuda:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def interleave(
    stopwatch: Stopwatch,
    samplers: Sequence[Sampler],
    repeats: int,
    seconds: float,
    report: Callable[[Sampler, str], None],
) -> list[tuple[Sampler, Timing]]:
    """Sample all in turn, `repeats` times.

    Each may take its share of `seconds`; slow ones then stop early, after `MIN_SAMPLES`.

    Args:
        stopwatch, samplers, repeats, seconds: what, how and how long.
        report: told the reason where a sampler fails; it is then left out.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    spent, failed = [0.0] * len(samplers), set[int]()
    for _ in range(repeats):
        for i, sampler in enumerate(samplers):
            enough = len(samples[i]) >= MIN_SAMPLES and spent[i] > seconds / len(samplers)
            if enough or i in failed:
                continue
            begin = time.perf_counter()
            with guarded(stopwatch.device, partial(report, sampler)) as faults:
                samples[i].append(stopwatch.sample(sampler))
            spent[i] += time.perf_counter() - begin
            if faults:
                failed.add(i)
    timed = [i for i in range(len(samplers)) if i not in failed]
    return [(samplers[i], Timing.of(samples[i])) for i in timed]


def copy_bandwidth(stopwatch: Stopwatch) -> float:
    """Bytes per second, read and written, of a large copy on the device: the ceiling."""
    device, size = stopwatch.device, 1 << 24
    if stopwatch.cuda:
        size = min(_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    # Random bytes, as real data: zeros may run faster.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sampler = Sampler(Variant("copy", [lambda: target.copy_(source)], 2 * size), "eager", 1)
    for _ in range(3):
        stopwatch.sample(sampler)
    return 2 * size / Timing.of([stopwatch.sample(sampler) for _ in range(20)]).median
