"""What tests of kernels share: their order, and that a broken GPU fails no other test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evals.bench.common import DEVICE_LOST


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The kernels as a whole come first, for a GPU that is lent for minutes."""
    items.sort(key=lambda item: item.path.name != "test_on_device.py")


@pytest.fixture(autouse=True)
def _device_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a fault in a kernel every call fails in this process: another one goes on.

    A worker of pytest-xdist ends at once, and is replaced; without workers pytest ends.
    """
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not hasattr(request.config, "workerinput"):
            pytest.exit(f"the device is lost: {error}", returncode=DEVICE_LOST)
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what runs in the emulator alone (`test_compiled.py` starts it), or not in it."""
    emulates = config.getoption("--emulate", None) is not None
    # These record launches in the place of Triton's own, or take memory that is never touched.
    not_emulated = {"test_variants.py", "test_large_offsets.py"}
    left_out = not_emulated if emulates else {"test_planted_faults.py"}
    return True if collection_path.name in left_out else None
