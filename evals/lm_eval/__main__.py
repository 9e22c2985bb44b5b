"""lm-eval's own command line, with the model `rotorquant` and this project's tasks.

Takes all that `lm_eval run` takes, and `--data FOLDER`: where the JSON files of the `*_local` tasks
are. In a clone also `python -m evals.lm_eval run ...`.

lm-eval (0.4.13) has no plugin hook for models: its registry reads no entry points, so its own
command does not find `rotorquant`. This command imports the model first and then hands over.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, NotAvailableError
from ..places import called
from ..requirements import install, require_packages
from .tasks import DATA_VARIABLE, TASKS, check_folder

_USAGE = "lm-eval run --model rotorquant --tasks TASK... --model_args pretrained=NAME,cache=k4v4"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, rest = _parser().parse_known_args(arguments)
    if {"-h", "--help"} & set(arguments):
        print(f"    {called()} {_USAGE}\n\n{__doc__}\nWhat follows is lm-eval's own help.\n")
    try:
        require_packages("scoring tasks", ["lm-eval"])
        if own.data is not None:
            os.environ[DATA_VARIABLE] = check_folder(own.data)
        _lm_eval(_with_tasks(rest))
    except (InputError, NotAvailableError, OSError, ValueError) as error:
        # Of lm-eval's own errors those that name what it was given; others are faults.
        if type(error) is ValueError and "not found" not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    return parser


def _with_tasks(arguments: list[str]) -> list[str]:
    """The arguments with `--include_path` for this project's tasks, if they name none."""
    named = {argument.split("=")[0] for argument in arguments}
    if len(arguments) < 2 or named & {"--include_path", "--config", "-C"}:
        return arguments
    return [*arguments, "--include_path", str(TASKS)]


def _lm_eval(arguments: list[str]) -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        from . import model  # noqa: F401 (registers the model)
    except ImportError as error:
        raise NotAvailableError(
            f"lm-eval does not load ({error}): {install(['lm-eval'])}"
        ) from error
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main()
