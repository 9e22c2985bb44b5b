"""Measurements that come to nothing: their reason kept, their memory freed, the device tried.

Two ways in: `failure_of` makes an error the `Failure` of a row, `guarded` reports the error of a
block and goes on. Both let go of what the failed frames hold and then call `recover`, which alone
says whether the device still works.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .environment import on_gpu
from .errors import InputError, NotAvailableError

_SPARE = 64 << 20  # bytes that must be free for the device to be tried


class Failure(NamedTuple):
    """Why there are no figures.

    Attributes:
        status: "not run" if something that it needs is not here, else "failed".
        reason: in one line.
        fatal: whether the device does not answer any more.
    """

    status: str
    reason: str
    fatal: bool = False


class FailedError(RuntimeError):
    """A measurement of which no part came through."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class DeviceLost(FailedError):
    """The device, or this process's hold on it, is broken: only a new process helps."""

    def __init__(self, reason: str) -> None:
        super().__init__(Failure("failed", reason, fatal=True))


def failure_of(error: BaseException) -> Failure:
    """What an error means for a row; its memory is freed."""
    if isinstance(error, FailedError):
        return error.failure
    release(error)
    absent = isinstance(error, NotAvailableError)
    status, reason = ("not run", str(error)) if absent else ("failed", describe(error))
    try:
        recover(torch.device("cuda" if torch.cuda.is_available() else "cpu"), reason)
    except DeviceLost:
        return Failure(status, reason, fatal=True)
    return Failure(status, reason)


def raise_if_fatal(failure: Failure) -> None:
    """Go no further on a device that is broken.

    Raises:
        DeviceLost: if it is.
    """
    if failure.fatal:
        raise DeviceLost(failure.reason)


@contextmanager
def guarded(device: torch.device, report: Callable[[str], Any]) -> Iterator[list[str]]:
    """Report what goes wrong in the block, in one line, free its memory, and go on.

    Yields:
        A list, empty, that then holds that line.

    Raises:
        DeviceLost: if the device does not work any more.
    """
    faults: list[str] = []
    try:
        yield faults
    except DeviceLost:
        raise
    except Exception as error:
        faults.append(describe(error))
        release(error)
    if faults:
        report(faults[0])
        recover(device, faults[0])


def describe(error: BaseException) -> str:
    """An error in one line, with the name of its class unless it is bad input that it names."""
    line = (str(error).strip().splitlines() or [""])[0]
    own = isinstance(error, InputError)
    return (line if own else f"{type(error).__name__}: {line}")[:300]


def release(error: BaseException | None) -> None:
    """Drop the tensors that the frames of an error hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def recover(device: torch.device, reason: str) -> None:
    """Free what a failure left, and see whether the device still computes and captures graphs.

    Raises:
        DeviceLost: if not.
    """
    if not on_gpu(device):
        gc.collect()
        return
    try:
        torch.cuda.synchronize(device)  # after a failed assertion on the device all calls fail
        if free_memory(device) < _SPARE:
            return  # what fills the memory is still in use; it was no fault of the device
        x = torch.ones(1024, device=device)
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph):
                y = x + 1
        finally:
            torch.cuda.set_stream(before)
        graph.replay()
        if float(y.sum()) != 2048:
            raise RuntimeError("a sum of ones is wrong")
    except Exception as error:
        raise DeviceLost(f"after «{reason}»: {describe(error)}") from None


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU once what is not used any more has been given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
