"""Commands under the module names that they had one release ago; these go with the next one."""

from __future__ import annotations

import runpy
import sys

from .places import PACKAGE


def run(old: str, new: str) -> None:
    """Run the module `new` as `python -m` does, after a line on stderr that names it.

    Args:
        old, new: names of modules within the harness, such as "bench_gpu" and "bench.gpu".
    """
    print(
        f"DeprecationWarning: {PACKAGE}.{old} has moved: python -m {PACKAGE}.{new}",
        file=sys.stderr,
    )
    runpy.run_module(f"{PACKAGE}.{new}", run_name="__main__", alter_sys=True)
