"""Where the `*_local` tasks find their files: a folder named by ROTORQUANT_TASK_DATA.

A YAML file's `dataset_kwargs: !function files.piqa` imports the attribute `piqa` of this module:
the arguments with which lm-eval's `dataset_path: json` loads `piqa_test.jsonl` of that folder.
`rotorquant lm-eval run --data FOLDER` sets the variable; for lm-eval's own command with this folder
as its `--include_path` set it yourself.

lm-eval loads this file by its path, so it imports nothing of the package, whose name differs
between a clone and an installation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

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


class DataError(ValueError):
    """Documents that a task cannot use; the message names them and the remedy."""


def __getattr__(name: str) -> dict[str, dict[str, str]]:
    """`dataset_kwargs` of a task, looked up when the task is loaded, not when it is listed.

    Raises:
        DataError: if the folder or the file is not there, or its documents lack a field.
    """
    if name not in FILES:
        raise AttributeError(name)
    file, fields = FILES[name]
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise DataError(
            f"the task {name}_local reads {file} from a folder of yours: name it with --data "
            f"FOLDER, or set {VARIABLE}"
        )
    path = Path(folder).expanduser() / file
    if not path.is_file():
        raise DataError(f"the task {name}_local reads {file}, which is not in {folder}")
    _check(path, fields)
    return {"data_files": {"test": str(path)}}


def _check(path: Path, fields: tuple[str, ...]) -> None:
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    try:
        missing = [field for field in fields if field not in json.loads(first)]
    except ValueError as error:
        raise DataError(f"{path}: its first line is not JSON ({error})") from error
    if missing:
        raise DataError(f"{path}: documents need {', '.join(fields)}; missing {missing[0]!r}")
