"""Runs the tests of the kernels as compiled PTX, without a GPU.

    python -m tests.emulator --arch 80 90 --seconds 600

All of tests/kernels, of every architecture in turn: bits, head dims, options, dtypes. What Triton
is installed compiles them. Of sm_100, kernels with tcgen05 instructions are skipped. With
`--seconds`, tests come in an order drawn by chance (`--seed`), for so long. More arguments are
pytest's: `-k prod`, `-x`, paths of other tests.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ARCHITECTURES = "80: A100, 89: RTX 4090 and L40S, 90: H100 and H200, 100: B200, 120: RTX 5090"


def main() -> int:
    """Run pytest once an architecture; the number of architectures that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", type=int, nargs="+", default=[80, 90], help=_ARCHITECTURES)
    add("--seconds", type=float, help="begin no test after so much time of an architecture")
    args, rest = parser.parse_known_args()
    tests = [] if any("tests/" in x for x in rest) else ["tests/kernels"]
    limit = [] if args.seconds is None else ["--seconds", str(args.seconds)]
    failed = 0
    for arch in args.arch:
        print(f"sm_{arch}", flush=True)
        failed += run(arch, *limit, *tests, *rest).returncode != 0
    return failed


def run(arch: int, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Pytest in a process of its own, with kernels emulated.

    Args:
        options: of `subprocess.run`.
    """
    command = ["-m", "pytest", "-p", "tests.emulator.plugin", "--emulate", str(arch), *arguments]
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False, text=True, **options)


if __name__ == "__main__":
    sys.exit(main())
