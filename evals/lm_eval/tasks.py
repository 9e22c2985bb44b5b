"""Where this project's tasks are, and the folder from which the `*_local` tasks read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import require

TASKS = Path(__file__).resolve().parents[1] / "tasks"
DATA_VARIABLE = "ROTORQUANT_TASK_DATA"  # read by tasks/local/files.py


def check_folder(folder: str | Path) -> str:
    """The folder as an absolute path.

    Raises:
        InputError: if there is none.
    """
    path = Path(folder).expanduser()
    require(path.is_dir(), f"--data {folder} is not a folder: name one with the tasks' JSON files")
    return str(path.resolve())


@contextlib.contextmanager
def data_folder(folder: str | None) -> Iterator[None]:
    """Set the folder of the `*_local` tasks within the block; None leaves it unchanged."""
    if folder is None:
        yield
        return
    before = os.environ.get(DATA_VARIABLE)
    os.environ[DATA_VARIABLE] = check_folder(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[DATA_VARIABLE]
        else:
            os.environ[DATA_VARIABLE] = before
