"""Where the `*_local` tasks find their files: a folder named by ROTORQUANT_TASK_DATA.

A YAML file's `dataset_kwargs: !function files.piqa` imports the attribute `piqa` of this module:
the arguments with which lm-eval's `dataset_path: json` loads `piqa_test.jsonl` of that folder.
`python -m evals.lm_eval run --data FOLDER` sets the variable; for `lm_eval run --include_path
evals/tasks` set it yourself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

try:
    from evals.errors import InputError
except ImportError:  # lm-eval's own command, started elsewhere
    InputError = ValueError

VARIABLE = "ROTORQUANT_TASK_DATA"

_CHOICES = ("question", "choices", "label")
FILES = {
    "arc_easy": ("ARC-Easy_test.jsonl", _CHOICES),
    "arc_challenge": ("ARC-Challenge_test.jsonl", _CHOICES),
    "piqa": ("piqa_test.jsonl", _CHOICES),
    "winogrande": ("winogrande_test.jsonl", _CHOICES),
    "openbookqa": ("openbookqa_test.jsonl", _CHOICES),
    "lambada": ("lambada_test.jsonl", ("text",)),
    "gsm8k": ("gsm8k_test.jsonl", ("question", "answer")),
}


def __getattr__(name: str) -> dict[str, dict[str, str]]:
    """`dataset_kwargs` of a task, looked up when the task is loaded, not when it is listed.

    Raises:
        InputError: if the folder or the file is not there, or its documents lack a field.
    """
    if name not in FILES:
        raise AttributeError(name)
    file, fields = FILES[name]
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise InputError(
            f"the task {name}_local reads {file} from a folder of yours: name it with --data "
            f"FOLDER (python -m evals.lm_eval), or set {VARIABLE}"
        )
    path = Path(folder).expanduser() / file
    if not path.is_file():
        raise InputError(f"the task {name}_local reads {file}, which is not in {folder}")
    _check(path, fields)
    return {"data_files": {"test": str(path)}}


def _check(path: Path, fields: tuple[str, ...]) -> None:
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    try:
        missing = [field for field in fields if field not in json.loads(first)]
    except ValueError as error:
        raise InputError(f"{path}: its first line is not JSON ({error})") from error
    if missing:
        raise InputError(f"{path}: documents need {', '.join(fields)}; missing {missing[0]!r}")
