"""Where the project's own tasks find their documents: beside their YAML files.

A relative path in a YAML file would be looked for in the working directory.
"""

from __future__ import annotations

from pathlib import Path


def _test_split(name: str) -> dict[str, dict[str, str]]:
    """Arguments with which `dataset_path: json` loads a file of this folder."""
    return {"data_files": {"test": str(Path(__file__).resolve().parent / name)}}


facts = _test_split("facts.jsonl")
rhymes = _test_split("rhymes.jsonl")
recall = _test_split("recall.jsonl")
