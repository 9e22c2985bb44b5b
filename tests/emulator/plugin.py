"""Pytest runs tests with Triton's kernels compiled, in the emulator.

    python -m pytest -p tests.emulator.plugin --emulate 90 tests/kernels

Every test is the same as in the interpreter, and fails too if the emulator saw a fault.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator

import pytest

# Before Triton is imported: its interpreter would put functions in the place of kernels.
os.environ["TRITON_INTERPRET"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    add = parser.addoption
    add("--emulate", type=int, metavar="ARCH", help="run kernels as PTX: 80, 89, 90, 100, 120")
    add("--seconds", type=float, metavar="N", help="tests by chance, and none after so much time")
    add("--seed", type=int, default=0, help="of the order of tests, and of programs of a grid")


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Emulates every launch of a test."""
    from tests.emulator.launch import emulation

    option = request.config.getoption
    with emulation(option("--emulate"), option("--seed")) as running:
        yield
    assert not running.faults, dict(running.faults)


def pytest_sessionstart(session: pytest.Session) -> None:
    """The time begins."""
    gc.set_threshold(200_000)  # machines are many small objects, which stay
    seconds = session.config.getoption("--seconds")
    session.config.stash[_END] = None if seconds is None else time.monotonic() + seconds


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """If not all can run, those that do are of every kind."""
    if config.getoption("--seconds") is not None:
        random.Random(config.getoption("--seed")).shuffle(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what comes after the end of the time."""
    end = item.config.stash[_END]
    if end is not None and time.monotonic() > end:
        pytest.skip("the time is over")


_END = pytest.StashKey[float | None]()
