"""Pytest runs tests with Triton's kernels compiled, in the emulator.

    python -m pytest -p tests.emulator.plugin --emulate 90 tests/kernels

Every test is the same as in the interpreter, and fails too if the emulator saw a fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

# Before Triton is imported: its interpreter would put functions in the place of kernels.
os.environ["TRITON_INTERPRET"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    add = parser.addoption
    add("--emulate", type=int, metavar="ARCH", help="run kernels as PTX for a GPU: 80 or 90")
    add("--seconds", type=float, metavar="N", help="begin no test after so much time")


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Emulates every launch of a test."""
    from tests.emulator.launch import emulation

    with emulation(request.config.getoption("--emulate")) as running:
        yield
    assert not running.faults, dict(running.faults)


def pytest_sessionstart(session: pytest.Session) -> None:
    """The time begins."""
    seconds = session.config.getoption("--seconds")
    session.config.stash[_END] = None if seconds is None else time.monotonic() + seconds


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what comes after the end of the time."""
    end = item.config.stash[_END]
    if end is not None and time.monotonic() > end:
        pytest.skip("the time is over")


_END = pytest.StashKey[float | None]()
