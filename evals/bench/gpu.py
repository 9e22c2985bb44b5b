"""All that is checked and measured on a GPU, in one command: is it right, which tilings, how fast.

    python -m evals.bench.gpu --out DIR
    python -m evals.bench.gpu --out DIR --part check --only "ring or prod"

Parts, each a process of its own that ends after its share of the minutes:

- check: the tests of the kernels (tests/kernels/test_on_device.py; where it is the only part, all
  tests of kernels, ring and graphs), by pytest, in several processes if pytest-xdist is there;
- kernels, tune, attention, generate: the commands evals.bench.kernels and so on.

What one part breaks, hangs in or has no time for leaves the others; a benchmark that loses the
device is started anew with what it had left. DIR gets the rows of each benchmark (PART.jsonl), the
checks (check.xml), and log.txt: the command, the versions, and all that the parts print. The exit
status is 0 if all parts ended well, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from ..environment import Versions, device_of
from .common import DEVICE_LOST, default_device, exit_with, new_parser, require_kernels

PARTS = {"check": 0.18, "kernels": 0.06, "tune": 0.2, "attention": 0.32, "generate": 0.24}
"""Parts, with their shares of the time where all are run."""

_ROOT = Path(__file__).parents[2]
_GRACE = 15  # seconds from the time a part is told to end in to the time it is made to
_STARTS = 4  # of a benchmark that loses the device
_TESTS = "tests/kernels/test_on_device.py"
_ARGUMENTS = {  # of a part where all have to fit into one call, and where it is the only one
    "check": (
        _TESTS,
        f"{_TESTS} tests/kernels tests/layers/test_ring.py tests/cache/test_graph.py",
    ),
    "kernels": (
        "--batch 1 8 32 --context 4096 32768 --head-dim 128 --bits 3 4 --repeats 9",
        "--prod --repeats 9",
    ),
    "tune": (
        "--batch 1 8 --context 32768 --head-dim 128 --bits 3 4 --config-seconds 12",
        "--batch 1 8 --context 4096 32768 --config-seconds 20 --prod",
    ),
    "attention": (
        "--context 1024 8192 32768 131072 --config-seconds 3 --check --prod",
        "--config-seconds 4 --check --prod",
    ),
    "generate": (
        "--batch 1 8 --context 32768 131072 --caches dynamic quanto hqq fp8 k4v4 k3v3",
        "--largest-batch 32768",
    ),
}


class Log:
    """Prints lines, and keeps them in a file of the folder."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "log.txt").open("a", encoding="utf-8")

    def say(self, line: str) -> None:
        """Print a line."""
        for file in (sys.stdout, self._file):
            print(line, file=file, flush=True)


def command(part: str, args: argparse.Namespace, seconds: float) -> list[str]:
    """A part as arguments of Python; benchmarks start nothing new after so many seconds."""
    alone = len(args.part) == 1
    given = (getattr(args, part, None) or _ARGUMENTS[part][alone]).split()
    if part == "check":
        xdist = importlib.util.find_spec("xdist") is not None
        given += ["-n", str(args.workers)] if xdist and args.workers > 1 else []
        report = f"--junitxml={args.out / 'check.xml'}"
        return ["-m", "pytest", *given, "-k", args.only, report, "-p", "no:cacheprovider"]
    given += [] if part == "generate" else ["--workers", str(args.workers)]
    given += ["--out", str(args.out / f"{part}.jsonl"), "--resume", "--seconds", f"{seconds:.0f}"]
    return ["-m", f"{__package__}.{part}", *given]


def run(arguments: list[str], seconds: float, log: Log) -> int:
    """Run Python for at most so long: interrupted then, and killed if that does not help.

    Returns:
        The exit status; 124 or 137 for want of time.
    """
    limit = ["timeout", "--signal=INT", f"--kill-after={_GRACE}", f"{max(seconds, 1):.0f}"]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*limit, sys.executable, *arguments],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.say(line.rstrip("\n"))
        except BaseException:
            process.terminate()  # `timeout` passes it on to all that the part started
            raise
    return process.returncode


def run_part(part: str, seconds: float, args: argparse.Namespace, log: Log) -> str:
    """Run a part, anew where a benchmark loses the device; how it ended."""
    until = time.monotonic() + seconds - _GRACE
    for _ in range(1 if part == "check" else _STARTS):
        left = until - time.monotonic()
        status = run(command(part, args, left - _GRACE), left, log)
        if status != DEVICE_LOST or until - time.monotonic() < 2 * _GRACE:
            break
    return {0: "ok", 124: "out of time", 137: "out of time"}.get(status, f"exit status {status}")


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print how they ended, and return the exit status."""
    args = _arguments(argv)
    begin = time.monotonic()
    log = Log(args.out)
    log.say(f"{Versions.of(device_of(default_device()), f'{__package__}.gpu', argv)}\n")
    ends: dict[str, str] = {}
    chosen = [part for part in PARTS if part in args.part]
    for i, part in enumerate(chosen):
        left = begin + 60 * args.minutes - time.monotonic()
        seconds = left * PARTS[part] / sum(PARTS[name] for name in chosen[i:])
        log.say(f"# {part}, at most {seconds:.0f} s\n")
        ends[part] = run_part(part, seconds, args, log)
    for part, end in ends.items():
        log.say(f"{part}: {end}")
    log.say(f"{time.monotonic() - begin:.0f} s in all; everything is in {args.out}")
    return int(any(end != "ok" for end in ends.values()))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    workers = min(12, os.cpu_count() or 1)
    add("--out", type=lambda x: Path(x).resolve(), required=True, help="folder of the results")
    add("--part", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    add("--minutes", type=float, default=9.0, help="for all parts together")
    add("--only", default="", help="the checks to run, as pytest's -k")
    add("--workers", type=int, default=workers, help="processes that check, or compile kernels")
    for part in (part for part in PARTS if part != "check"):
        add(f"--{part}", metavar="ARGUMENTS", help=f"arguments of {part}, in one string")
    args = parser.parse_args(argv)
    require_kernels(parser, default_device())
    if args.minutes <= 0 or args.workers < 1:
        parser.error("choose --minutes above 0 and --workers from 1")
    if "check" in args.part and importlib.util.find_spec("pytest") is None:
        parser.error("--part check needs pytest: install it, or choose other parts")
    if "check" in args.part and not (_ROOT / _TESTS).is_file():
        parser.error("--part check needs the tests of a clone: run it there, or choose other parts")
    return args


if __name__ == "__main__":
    exit_with(main)
