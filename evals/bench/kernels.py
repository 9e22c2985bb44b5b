"""A decode step's attention on a GPU, kernel by kernel.

    python -m evals.bench.kernels --batch 1 8 32 --context 4096 32768

Microseconds of the device in each kernel (`prepare`, `attend`, `combine`), by torch's profiler:
medians of the samples, before each of which the second-level cache is overwritten. What lies
between the kernels does not count; `evals.bench.attention` times the whole.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..environment import device_of, on_gpu
from ..failures import guarded
from .common import device_events, exit_with, new_parser
from .decode_step import (
    AttentionShape,
    Run,
    add_options,
    compile_jobs,
    kinds,
    parse,
    run,
    say,
    status_of,
    take_step,
)

KERNELS = ("prepare", "attend", "combine")
_OVERWRITTEN = 2  # times the size of the second-level cache


def kernel_times(events: Iterable[Any]) -> dict[str, float]:
    """Median microseconds of each kernel among a profiler's events, by its short name.

    Raises:
        RuntimeError: if there is none of a kernel.
    """
    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    for event in events:
        name = event.name.removesuffix("_kernel")
        if name in times:
            times[name].append(event.device_time)
    for name, found in times.items():
        if not found:
            raise RuntimeError(f"the profiler saw no {name}_kernel")
    return {name: statistics.median(found) for name, found in times.items()}


def profiled(step: Callable[[], Any], between: Callable[[], Any], samples: int) -> dict[str, float]:
    """`kernel_times` of so many calls of a step, each after a call of `between`."""

    def sample() -> None:
        for _ in range(samples):
            between()
            step()

    return kernel_times(device_events(sample))


def measure(shape: AttentionShape, run: Run) -> None:
    """Write a row for each of the settings at one shape."""
    device = run.stopwatch.device
    generator = torch.Generator(device).manual_seed(0)
    size = _OVERWRITTEN * run.stopwatch.l2_bytes
    overwritten = torch.empty(size, dtype=torch.uint8, device=device)
    for name, settings in kinds(run.args).items():
        key = {"kind": "kernels", **asdict(shape), "variant": name}
        if run.has(key | {"status": "ok"}):
            continue
        with guarded(device, partial(_report, run, key)):
            step = take_step(shape, settings, generator)
            step.attend()  # compiles
            tiling = step.default_tiling()
            times = profiled(step.attend, overwritten.zero_, run.args.repeats)
            row = {"status": "ok", "splits": tiling.splits, "exact_splits": tiling.exact_splits}
            run.log.write(key | row | times)
            say(_table_row(run.log.entries[-1]))


def _report(run: Run, key: dict[str, Any], reason: str) -> None:
    run.log.write(key | {"status": status_of(reason), "reason": reason})
    say(_table_row(run.log.entries[-1]))


HEADER = ("batch", "context", "d", "variant", *KERNELS, "together", "splits", "exact splits")


def _table_row(row: dict[str, Any]) -> str:
    """A row as a line of a Markdown table under `HEADER`."""
    cells = [str(row[name]) for name in ("batch", "context", "head_dim", "variant")]
    if row["status"] != "ok":
        reason = row["reason"].replace("|", "/")
        cells += [f"{row['status']}: {reason}", *[""] * (len(HEADER) - 5)]
    else:
        times = [row[name] for name in KERNELS]
        cells += [f"{us:.1f}" for us in (*times, sum(times))]
        cells += [str(row["splits"]), str(row["exact_splits"])]
    return f"| {' | '.join(cells)} |"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_options(parser)
    args = parse(parser, argv)
    if not on_gpu(device_of(args.device)):
        parser.error(f"the device is {args.device}: kernels take time on a GPU alone")
    return args


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table, and return the exit status."""
    args = _arguments(argv)
    return run("kernels", measure, HEADER, compile_jobs(args), args, argv)


if __name__ == "__main__":
    exit_with(main)
