"""What the benchmarks share: interleaved timing, copy bandwidth, faults, rows and versions.

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

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor

import rotorquant_hf

Device = torch.device

LEAST_SAMPLES = 5
DEVICE_LOST = 75  # exit status: start the command anew, with --resume

_SAMPLE_SECONDS = 1e-3  # a sample repeats its work for about so long, by the host's clock
_MOST_CALLS = 128
_SPACER_BYTES = 1 << 30
_COPY_BYTES = 4 << 30


class DeviceLost(RuntimeError):
    """The device, or this process's hold on it, is broken: only a new process helps."""


def device_of(name: str) -> torch.device:
    """A device by name, with its index."""
    return torch.empty(0, device=name).device


def require_kernels(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse to measure kernels where there is nothing to run them on."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {device}, but torch sees no CUDA device here")
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            f"--device is {device}: the kernels need a GPU; TRITON_INTERPRET=1 in the environment "
            "runs this command through Triton's interpreter, to check it"
        )


def on_gpu(device: torch.device) -> bool:
    """Whether a device has CUDA's streams, events and graphs."""
    return device.type == "cuda"


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
    """Times variants on one device."""

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

    def sets(self, moved: int, most: int = 64) -> int:
        """How many sets of tensors of `moved` bytes a variant should take in turn."""
        if not self.cuda:
            return 2
        return min(most, max(1, -(-3 * self.l2_bytes // max(moved, 1))))

    def prepare(self, variant: Variant) -> tuple[float, int]:
        """Warm a variant up; returns the seconds of a call and the bytes of its scratch."""
        call, scratch = variant.calls[0], 0
        with variant.around(), self._aside():
            if self.cuda:
                call()
                self.synchronize()
                scratch = self._scratch(call)
                self.synchronize()
            begin = time.perf_counter()
            call()
            self.synchronize()
            return time.perf_counter() - begin, scratch

    def sampler(self, variant: Variant, mode: str, estimate: float, scratch: int) -> Sampler:
        """Make a variant that `prepare` warmed up ready for `sample`.

        Raises:
            RuntimeError: if it cannot be captured.
        """
        wanted = int(_SAMPLE_SECONDS / max(estimate, 1e-7)) + 1
        if mode == "eager":
            least, most = (4, 32) if self.cuda and estimate < 5e-3 else (1, 1)
            return Sampler(variant, mode, min(max(wanted, least), most))
        calls = min(max(wanted, len(variant.calls)), _MOST_CALLS)
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
        self.synchronize()
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

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

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

    Each may take its share of `seconds`; slow ones then stop early, after `LEAST_SAMPLES`.

    Args:
        stopwatch, samplers, repeats, seconds: what, how and how long.
        report: told the reason where a sampler fails; it is then left out.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    spent, failed = [0.0] * len(samplers), set[int]()
    for _ in range(repeats):
        for i, sampler in enumerate(samplers):
            enough = len(samples[i]) >= LEAST_SAMPLES and spent[i] > seconds / len(samplers)
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


@contextmanager
def guarded(device: torch.device, report: Callable[[str], Any]) -> Iterator[list[str]]:
    """Report what goes wrong in the block, in one line, free its memory, and go on.

    Yields:
        A list, empty, that then holds that line.

    Raises:
        DeviceLost: if the device does not work any more.
    """
    faults: list[str] = []
    try:
        yield faults
    except DeviceLost:
        raise
    except Exception as error:
        faults.append(describe(error))
        release(error)
    if faults:
        report(faults[0])
        recover(device, faults[0])


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def release(error: BaseException | None) -> None:
    """Drop the tensors that the frames of an error hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def recover(device: torch.device, reason: str) -> None:
    """Free what a failure left, and see whether the device still works.

    Raises:
        DeviceLost: if not.
    """
    if not on_gpu(device):
        return
    try:
        torch.cuda.synchronize(device)
        if free_memory(device) < 64 << 20:
            return  # what fills the memory is still in use; it was no fault of the device
        x = torch.ones(1024, device=device)
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph):
                y = x + 1
        finally:
            torch.cuda.set_stream(before)
        graph.replay()
        if float(y.sum()) != 2048:
            raise RuntimeError("a sum of ones is wrong")
    except Exception as error:
        raise DeviceLost(f"after «{reason}»: {describe(error)}") from None


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU once what is not used any more has been given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status."""
    gc.freeze()  # a collection, one after each failure, then need not look at all that was imported
    try:
        status = main()
    finally:
        gc.unfreeze()
    sys.exit(status)


def copy_bandwidth(stopwatch: Stopwatch) -> float:
    """Bytes per second, read and written, of a large copy on the device: the ceiling."""
    device, size = stopwatch.device, 1 << 24
    if stopwatch.cuda:
        size = min(_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    # Random numbers, as real data: zeros may run faster.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sampler = Sampler(Variant("copy", [lambda: target.copy_(source)], 2 * size), "eager", 1)
    for _ in range(3):
        stopwatch.sample(sampler)
    return 2 * size / Timing.of([stopwatch.sample(sampler) for _ in range(20)]).median


def random_states(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys and values of independent normal numbers.

    From an own generator: a capture that fails may leave the default one unusable.
    """
    keys, values = (
        torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
        for _ in range(2)
    )
    return keys, values


def chunks(tokens: int, numbers_per_token: int, most: int = 1 << 30) -> list[int]:
    """Lengths that sum to `tokens`, of at most `most` numbers each."""
    size = max(1, most // max(1, numbers_per_token))
    return [min(size, tokens - start) for start in range(0, tokens, size)]


class RowLog:
    """Rows of a benchmark, appended to a JSON-lines file as they come.

    Args:
        path: the file, or None.
        resume: take the rows that are in the file as done.
    """

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = read_rows(path) if resume and path else []

    def write(self, row: dict[str, Any]) -> None:
        """Keep a row and write it at once."""
        self.rows.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


@dataclass(frozen=True)
class Versions:
    """What a measurement was made with."""

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    transformers: str
    rotorquant_hf: str
    python: str
    command: str

    @classmethod
    def of(cls, device: Device, module: str, argv: Sequence[str] | None) -> Versions:
        """Those of this process, whose command is `python -m module argv...`."""
        arguments = sys.argv[1:] if argv is None else argv
        return cls(
            device=_device_name(device),
            driver=_driver() if on_gpu(device) else "none",
            cuda=torch.version.cuda or "none",
            torch=torch.__version__,
            triton=_triton_version(),
            transformers=transformers.__version__,
            rotorquant_hf=rotorquant_hf.__version__,
            python=platform.python_version(),
            command=" ".join(["python -m", module, *arguments]),
        )

    def row(self) -> dict[str, Any]:
        """As a row of kind "versions"."""
        return {"kind": "versions", **asdict(self)}

    def __str__(self) -> str:
        return (
            f"{self.device}, driver {self.driver}, CUDA {self.cuda}, torch {self.torch}, triton "
            f"{self.triton}, transformers {self.transformers}, rotorquant_hf {self.rotorquant_hf}, "
            f"Python {self.python}\n\n    {self.command}"
        )


def _device_name(device: torch.device) -> str:
    if on_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.multi_processor_count} multiprocessors)"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
