"""Results of sweeps: JSON lines, a header and then a row a line, written as they come.

A file belongs to one sweep, one version of the software and one device: rows that cannot be
compared never stand in it together. Several processes write a file each, into one folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evals.errors import InputError

SCHEMA = 1
_SAME = ("rotorquant_hf", "torch", "transformers", "triton", "device")
"""What of the versions must not change within a file."""


class ResultsFile:
    """A results file open for writing; locked, so that no other process writes it too.

    Args:
        path: the file; made if there is none, continued if it is of the same sweep.
        header: what the sweep is: `name`, `fingerprint`, `versions` and `config`.

    Raises:
        InputError: if the file is in use, damaged, of another sweep or of other versions.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
            self.rows = self._continue(header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another sweep is writing {self.path}: wait for it, or choose another --out"
            ) from None

    def _continue(self, header: Mapping[str, Any]) -> list[dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote: that row is measured again
            self._file.truncate(len(whole))
        if not whole:
            self._write({"kind": "sweep", "schema": SCHEMA, **header})
            return []
        head, *rows = _parse(whole.decode("utf-8"), self.path)
        for name in ("name", "fingerprint"):
            if head.get(name) != header[name]:
                raise InputError(
                    f"{self.path} holds the sweep {head.get('name')!r} with other settings "
                    f"({head.get('fingerprint')}, not {header['fingerprint']}): choose another "
                    "--out, or remove it"
                )
        for name in _SAME:
            before, now = head["versions"].get(name), header["versions"].get(name)
            if before != now:
                raise InputError(
                    f"{self.path} was begun with {name} {before}, and this is {now}: choose "
                    "another --out, or remove it"
                )
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, down to the disk."""
        self._write({"kind": "row", "schema": SCHEMA, **row})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def read_results(
    paths: Iterable[str | Path],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Headers and rows of results files, or of all `rows*.jsonl` in folders.

    A row that was measured again stands for its earlier one.

    Raises:
        InputError: if there is no such file, or one is damaged or of another schema.
    """
    headers: list[dict[str, Any]] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("rows*.jsonl")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(f"there are no results in {path}: name a folder or file of a sweep")
        for file in files:
            content = file.read_text(encoding="utf-8")
            if not content.endswith("\n"):  # a sweep is still at it, or was killed
                content = content[: content.rfind("\n") + 1]
            if not content:
                continue
            head, *found = _parse(content, file)
            headers.append(head)
            for row in found:
                rows.pop((row["sweep"], row["id"]), None)
                rows[row["sweep"], row["id"]] = row
    return headers, list(rows.values())


def _parse(content: str, path: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged in line {number} ({error}): remove it") from error
    for number, entry in enumerate(entries, 1):
        kind = "sweep" if number == 1 else "row"
        if not isinstance(entry, dict) or entry.get("kind") != kind:
            raise InputError(f"{path} is no results file of a sweep (line {number}): name another")
        if entry.get("schema") != SCHEMA:
            raise InputError(
                f"{path} is of another version of this program: its schema is "
                f"{entry.get('schema')}, not {SCHEMA}; run the sweep again into another --out"
            )
    return entries
