"""A measurement that came to nothing: recorded with its reason, and its memory freed."""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch

from evals.errors import NotAvailableError
from evals.timing import describe, release


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


def failure_of(error: BaseException) -> Failure:
    """What an error means for a row; the tensors that its frames hold are let go."""
    if isinstance(error, FailedError):
        return error.failure
    release(error)
    fatal = not _freed()
    if isinstance(error, NotAvailableError):
        return Failure("not run", str(error), fatal)
    return Failure("failed", describe(error), fatal)


def _freed() -> bool:
    """Give back what is not used any more; False if the device does not answer."""
    gc.collect()
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # after a failed assertion on the device all calls fail
        return False
    return True


def raise_if_fatal(failure: Failure) -> None:
    """Go no further on a device that is broken.

    Raises:
        FailedError: if it is.
    """
    if failure.fatal:
        raise FailedError(failure)
