"""What the harness says of input that it cannot use."""

from __future__ import annotations


class InputError(ValueError):
    """A value from the user that cannot be used; the message names it and the remedy."""


class NotAvailableError(RuntimeError):
    """This installation or device cannot do it; the message says what is missing."""


def require(condition: bool, problem: str) -> None:
    """Raises `InputError(problem)` unless the condition holds."""
    if not condition:
        raise InputError(problem)


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line of 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
