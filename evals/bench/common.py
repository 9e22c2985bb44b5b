"""What the benchmarks share: refusals, exit statuses, random states, processes that compile."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from rotorquant_hf.backend import backend

from ..environment import on_gpu
from ..errors import InputError, NotAvailableError
from ..processes import require_one
from ..requirements import require_packages
from ..sweep.rows import JSONLines
from ..timing import timed

DEVICE_LOST = 75  # exit status: start the command anew, with --resume


def default_device() -> str:
    """The GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring, for a command of one process."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        require_one(parser.prog)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return parser


def device_events(work: Callable[[], Any]) -> Iterable[Any]:
    """What torch's profiler sees a GPU do while `work` runs."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    return profiler.events()


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that writes rows."""
    add = parser.add_argument
    add(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of tensors"
    )
    add("--device", default=default_device(), help="cuda, cuda:1, ..., or cpu")
    add("--seconds", type=float, default=3600.0, help="start nothing new after so many seconds")
    add("--out", type=Path, help="file of JSON lines, appended to")
    add("--resume", action="store_true", help="leave out what --out has")


def require_triton(parser: argparse.ArgumentParser) -> None:
    """Refuse to go on without Triton."""
    try:
        require_packages("this", ["triton"])
    except NotAvailableError as error:
        parser.exit(2, f"error: {error}\n")


def require_kernels(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse to run kernels where there is nothing to run them on."""
    require_triton(parser)
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"the device is {device}, but torch sees no CUDA device here")
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            f"the device is {device}: the kernels need a GPU; TRITON_INTERPRET=1 in the "
            "environment runs this command through Triton's interpreter, to check it"
        )


def kernels(device: torch.device) -> AbstractContextManager[None]:
    """A context in which the kernels run: on a CPU in Triton's interpreter."""
    return nullcontext() if on_gpu(device) else backend("triton")


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its status: 2 for input or a machine that it cannot use."""
    gc.freeze()  # a collection, one after each failure, then need not look at all that was imported
    try:
        status = main()
    except (InputError, NotAvailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    finally:
        gc.unfreeze()
    sys.exit(status)


def open_log(path: Path | None, resume: bool) -> JSONLines:
    """The file that takes a benchmark's rows; with `resume` those in it count as done.

    Raises:
        InputError: if another process writes it, or it is damaged.
    """
    log = JSONLines(path)
    if not resume:
        log.entries.clear()
    return log


def in_processes(
    work: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int, seconds: float
) -> None:
    """Call `work` with every job, in several processes, for at most so long.

    What the calls compile is in Triton's cache afterwards; what they return is dropped.
    """
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap_async(work, jobs, chunksize=1).wait(seconds)


def in_turn(
    variants: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each variant, taking turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(repeats + 1):
        for name, run in variants.items():
            seconds, _ = timed(run, device)
            if round_:
                times[name].append(1e3 * seconds)
    return times


def middle_half(samples: Sequence[float], unit: str = "") -> str:
    """The median, and the middle half of the samples in brackets; signed, if with a unit."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    sign = "+" if unit else ""
    return f"{middle:{sign}.1f}{unit} [{low:{sign}.1f}, {high:{sign}.1f}]"


def random_states(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys and values with independent N(0, 1) elements.

    From an own generator: a capture that fails may leave the default one unusable.
    """
    keys, values = (
        torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
        for _ in range(2)
    )
    return keys, values


def chunks(tokens: int, elements_per_token: int, max_elements: int = 1 << 30) -> list[int]:
    """Lengths that sum to `tokens`, of at most `max_elements` elements each."""
    size = max(1, max_elements // max(1, elements_per_token))
    return [min(size, tokens - start) for start in range(0, tokens, size)]
