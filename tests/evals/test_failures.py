"""Failures: their reason kept, their memory freed, a lost device told from a lost measurement."""

from __future__ import annotations

import pytest
import torch

from evals import failures
from evals.errors import InputError, NotAvailableError
from evals.failures import DeviceLost, FailedError, Failure, failure_of, guarded, raise_if_fatal

GPU = torch.device("cuda", 0)


def test_failures_free_what_their_frames_hold() -> None:
    freed = []

    class Big:
        def __del__(self) -> None:
            freed.append(True)

    def fail() -> None:
        big = Big()
        raise MemoryError(f"no room for {type(big).__name__}\nsecond line")

    try:
        fail()
    except MemoryError as error:
        found = failure_of(error)
        assert freed == [True]
    assert found == ("failed", "MemoryError: no room for Big", False)
    assert failure_of(NotAvailableError("no such thing")) == ("not run", "no such thing", False)
    assert failure_of(InputError("no file x: name one")) == ("failed", "no file x: name one", False)


@pytest.fixture
def broken(monkeypatch) -> None:
    """A GPU that answers no call any more."""

    def fail(*_):
        raise RuntimeError("CUDA error: device-side assert triggered\nmore of it")

    monkeypatch.setattr(failures.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(failures.torch.cuda, "synchronize", fail)


@pytest.mark.usefixtures("broken")
def test_a_broken_device_is_told_from_a_failed_measurement() -> None:
    """By the same trial, whichever way the error came in."""
    found = failure_of(ValueError("no such shape"))
    assert found == ("failed", "ValueError: no such shape", True)
    assert failure_of(NotAvailableError("no triton")) == ("not run", "no triton", True)
    reported: list[str] = []
    with pytest.raises(DeviceLost) as lost, guarded(GPU, reported.append):
        raise ValueError("no such shape")
    assert reported == ["ValueError: no such shape"]
    says = (
        "after «ValueError: no such shape»: RuntimeError: CUDA error: device-side assert triggered"
    )
    assert str(lost.value) == says
    assert failure_of(lost.value) == ("failed", says, True)


def test_a_lost_device_passes_through_everything() -> None:
    lost = DeviceLost("gone")
    assert isinstance(lost, FailedError)
    with pytest.raises(DeviceLost, match="gone"), guarded(torch.device("cpu"), pytest.fail):
        raise_if_fatal(failure_of(lost))
    raise_if_fatal(Failure("failed", "out of memory"))


def test_a_full_memory_is_no_lost_device(monkeypatch) -> None:
    """What fills it is still in use: the trial itself would have no room."""
    monkeypatch.setattr(failures.torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(failures, "free_memory", lambda device: 1 << 20)
    reported: list[str] = []
    with guarded(GPU, reported.append):
        raise MemoryError("no room")
    assert reported == ["MemoryError: no room"]
