"""Commands of the harness where only the base install is there, run in one process.

    python -m tests.helpers.base_install < commands.json

Reads a list of command lines (a module and its arguments), runs each, and prints a list of
`[exit status, stdout, stderr]`.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from typing import Any

EXTRAS = (
    *("accelerate", "datasets", "gguf", "hqq", "lm_eval", "matplotlib", "optimum", "scipy"),
    "triton",
)
"""Top-level modules of the extras, which are hidden."""


class Hidden:
    """A finder of modules that does not find those of the extras."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As the finder's."""
        if name.split(".")[0] in EXTRAS:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def run(command: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a module run with arguments."""
    module, *arguments = command
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = [module, *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return status, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
    commands = json.load(sys.stdin)
    print(json.dumps([run(command) for command in commands]))
