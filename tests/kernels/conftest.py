"""What tests of kernels share: a broken GPU does not fail the tests after the one that broke it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

from evals.bench.common import DEVICE_LOST


@pytest.fixture(autouse=True)
def _device_answers() -> Iterator[None]:
    """After a fault in a kernel every call fails in this process: another one goes on.

    A worker of pytest-xdist ends at once, and is replaced; without workers pytest ends.
    """
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(f"the device is lost: {error}", returncode=DEVICE_LOST)
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)
