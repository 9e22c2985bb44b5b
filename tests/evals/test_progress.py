"""Progress: one line on a terminal, a line now and then elsewhere, and the time left."""

from __future__ import annotations

import pytest

from evals import progress
from evals.__main__ import main
from evals.progress import duration, line, say, steps, task, within
from tests.conftest import MODEL, ROOT


class Terminal:
    """A stderr that keeps what is written."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_the_step_and_the_time_left(monkeypatch, clock) -> None:
    monkeypatch.setattr("sys.stderr", Terminal(True))
    import sys

    for _ in steps(range(8), "k4v4: window {} of {}"):
        clock[0] += 30
    shown = sys.stderr.text.split("\r\x1b[K")
    assert shown[1] == "k4v4: window 1 of 8"
    assert shown[3] == "k4v4: window 3 of 8, 3 min left"  # 60 s for two: 180 s for six
    assert shown[8] == "k4v4: window 8 of 8, 30 s left"
    assert shown[-1] == ""  # and in the end it is gone
    assert "\n" not in sys.stderr.text


def test_a_log_gets_a_line_a_minute(monkeypatch, clock) -> None:
    monkeypatch.setattr("sys.stderr", Terminal(False))
    import sys

    for _ in steps(range(3), "window {} of {}"):
        clock[0] += 1
    assert sys.stderr.text == ""  # what is short is quiet
    for _ in steps(range(100), "window {} of {}"):
        clock[0] += 13
    lines = sys.stderr.text.splitlines()
    assert 19 <= len(lines) <= 21
    assert lines[0] == "window 6 of 100, 21 min left"
    assert "\r" not in sys.stderr.text


def test_steps_inside_steps_share_the_line_and_the_time(clock) -> None:
    """Half of the second of four rows: 3/8 of all are done."""
    with task("a sweep") as outer:
        outer.at(0.25, "row 2 of 4", step=0.25)
        for i, _ in enumerate(steps(range(4), "window {} of {}")):
            if i == 2:
                assert line(30.0) == "row 2 of 4: window 3 of 4, 50 s left"
                within(0.5)  # of the window
                assert line(7 * 30.0) == "row 2 of 4: window 3 of 4, 5 min left"
            clock[0] += 1
        assert line(1.0) == "row 2 of 4"  # too early to tell


def test_work_that_fails_or_stops_leaves_no_line(monkeypatch, clock) -> None:
    def fails() -> None:
        with task("x"):
            for _ in steps(range(3), "{} of {}"):
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    for _ in steps(range(3), "{} of {}"):
        break
    assert progress._tasks == []


def test_lines_of_others_stand_above(monkeypatch, clock) -> None:
    monkeypatch.setattr("sys.stderr", Terminal(True))
    import sys

    with task("x") as found:
        found.at(0.5, "half")
        clock[0] += 10
        say("k4v4: safe")
    assert sys.stderr.text == "\r\x1b[Khalf\r\x1b[Kk4v4: safe\n\r\x1b[Khalf, 10 s left\r\x1b[K"


TEXT = ["--text", str(ROOT / "examples" / "sampled" / "clock.txt")]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["perplexity", *TEXT, "--max-tokens", "300", "--window", "150"], "k4v4: window 2 of 2, "),
        (
            ["agreement", *TEXT, "--max-tokens", "64", "--window", "32", "--new-tokens", "2"],
            "k4v4: prompt 2 of 2, ",
        ),
        (
            ["needle", *TEXT, "--length", "120", "--depth", "0.5", "--trials", "2"],
            "k4v4: question 2 of 2, ",
        ),
        (["memory", "--context", "40", "60"], "k4v4: size 2 of 2, "),
        (
            ["speed", "--context", "40", "--new-tokens", "2", "--repeats", "1"],
            "size 1 of 1: round 2 of 2, ",
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_commands_that_take_long_say_how_long(monkeypatch, clock, argv, said) -> None:
    """On a clock that runs three seconds at every look."""
    monkeypatch.setattr("sys.stderr", Terminal(True))
    import sys

    def look() -> float:
        clock[0] += 3
        return clock[0]

    monkeypatch.setattr(progress.time, "monotonic", look)
    main([argv[0], "--model", str(MODEL), *argv[1:]])
    assert f"\r\x1b[K{said}" in sys.stderr.text
    assert " left\r" in sys.stderr.text
    assert sys.stderr.text.endswith("\r\x1b[K")


def test_one_of_several_processes_speaks(monkeypatch, clock) -> None:
    monkeypatch.setattr("sys.stderr", Terminal(True))
    import sys

    with task("sweep", shown=False):
        for _ in steps(range(3), "{} of {}"):
            clock[0] += 100
    assert sys.stderr.text.replace("\r\x1b[K", "") == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (40, "40 s"),
        (80, "1 min"),
        (3540, "59 min"),
        (3600, "1 h"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text
