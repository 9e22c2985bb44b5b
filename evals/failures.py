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
    """

    status: str
    reason: str


def failure_of(error: BaseException) -> Failure:
    """What an error means for a row; the tensors that its frames hold are let go."""
    release(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if isinstance(error, NotAvailableError):
        return Failure("not run", str(error))
    return Failure("failed", describe(error))
