"""What is being measured, and how long the rest will take: one line on stderr.

    for window in steps(windows, "k4v4: window {} of {}"):
        ...

A terminal shows the line and renews it: "k4v4: window 3 of 8, 2 min left". Elsewhere, in a log, a
line is written once a minute. Steps inside steps (the windows of a row of a sweep) share one line,
and the time left is that of the outermost.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_RENEWED = 0.2  # seconds between two lines on a terminal
_WRITTEN = 60.0  # elsewhere
_SURE = 2.0  # seconds before which nothing is said of the rest
_CLEAR = "\r\x1b[K"


class Task:
    """Work that is under way.

    Attributes:
        text: what it is at.
        done: the share of it that is done, 0 to 1, steps alone.
        step: the share that the next step makes.
        part: how much of that step is done, where no task inside it says so.
        shown: whether it is shown.
    """

    def __init__(self, text: str, shown: bool = True) -> None:
        self.text, self.shown = text, shown
        self.done = self.step = self.part = 0.0

    def at(self, done: float, text: str, step: float = 0.0) -> None:
        """Say how far it is."""
        self.text, self.done, self.step, self.part = text, done, step, 0.0
        _show()


_tasks: list[Task] = []  # outermost first
_begun = _shown = 0.0


@contextmanager
def task(text: str, shown: bool = True) -> Iterator[Task]:
    """A task, inside those that are under way.

    Args:
        text: what it is at.
        shown: False for a task that is silent, with all inside it: of several processes one speaks.
    """
    global _begun, _shown
    if not _tasks:
        _begun, _shown = time.monotonic(), 0.0 if sys.stderr.isatty() else time.monotonic()
    found = Task(text, shown)
    _tasks.append(found)
    try:
        yield found
    finally:
        _tasks.remove(found)
        if not _tasks:
            clear()


def steps(items: Sequence[T], text: str) -> Iterator[T]:
    """The items, one after the other.

    Args:
        items: each takes about as long.
        text: with `{}` for the number of the item, from 1, and `{}` for how many there are.
    """
    with task(text.format(1, len(items))) as found:
        for i, item in enumerate(items):
            found.at(i / len(items), text.format(i + 1, len(items)), 1 / len(items))
            yield item


def within(done: float) -> None:
    """Say how much of the innermost step is done, 0 to 1."""
    if _tasks:
        _tasks[-1].part = done
        _show()


def say(text: str) -> None:
    """Write a line of one's own to stderr, above the line that is shown."""
    clear()
    print(text, file=sys.stderr, flush=True)
    _show()


def clear() -> None:
    """Take the line away, before something else is written."""
    if sys.stderr.isatty():
        print(_CLEAR, end="", file=sys.stderr, flush=True)


def line(seconds: float) -> str:
    """The line, after so many seconds of the outermost task."""
    text = ": ".join(x.text for x in _tasks if x.text)
    done, step = 0.0, 1.0
    for each in _tasks:
        done += step * (each.done + each.step * each.part)
        step *= each.step
    if seconds < _SURE or done <= 0:
        return text
    return f"{text}, {duration(seconds * max(0.0, 1 - done) / done)} left"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 55:
        return f"{max(1, round(seconds))} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def _show() -> None:
    global _shown
    now, terminal = time.monotonic(), sys.stderr.isatty()
    if not _tasks or not all(x.shown for x in _tasks):
        return
    if now - _shown < (_RENEWED if terminal else _WRITTEN):
        return
    _shown = now
    text = line(now - _begun)
    if terminal:
        text = text[: shutil.get_terminal_size().columns - 1]
        print(f"{_CLEAR}{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
