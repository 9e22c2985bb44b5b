"""What the benchmarks of kernels share: random states, refusals, rows as they come."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

DEVICE_LOST = 75  # exit status: start the command anew, with --resume


def require_kernels(parser: argparse.ArgumentParser, device: str) -> None:
    """Refuse to measure kernels where there is nothing to run them on."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {device}, but torch sees no CUDA device here")
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            f"--device is {device}: the kernels need a GPU; TRITON_INTERPRET=1 in the environment "
            "runs this command through Triton's interpreter, to check it"
        )


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status."""
    gc.freeze()  # a collection, one after each failure, then need not look at all that was imported
    try:
        status = main()
    finally:
        gc.unfreeze()
    sys.exit(status)


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
