"""Results of sweeps: JSON lines, a header and then a row a line, written as they come.

A file belongs to one sweep, one version of the software and one device: rows that cannot be
compared never share a file. Several processes write a file each, into one folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

SCHEMA = 1
_SOFTWARE = ("rotorquant_hf", "torch", "transformers", "triton", "packages")
"""What of the versions must be the same in all files of a folder."""


class ResultsFile:
    """A results file open for writing; locked, so that no other process writes it too.

    Args:
        path: the file; created if missing, continued if it is of the same sweep.
        header: what the sweep is: `name`, `fingerprint`, `versions` and `config`.

    Raises:
        InputError: if the file is in use, damaged, of another sweep or of other versions.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path.parent} cannot be a folder: {error}") from error
        self._file = path.open("a+b")
        try:
            self._lock()
            self._continue(header)
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

    def _continue(self, header: Mapping[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote: that row is measured again
            self._file.truncate(len(whole))
        if not whole:
            self._write({"kind": "sweep", "schema": SCHEMA, **header})
            return
        head = _parse(whole.decode("utf-8", errors="replace"), self.path)[0]
        check_same(self.path, head, header, ("device",))

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, down to the disk."""
        self._write({"kind": "row", "schema": SCHEMA, **finite(row)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def check_same(
    path: Path, head: Mapping[str, Any], header: Mapping[str, Any], more: tuple[str, ...] = ()
) -> None:
    """Refuse a file that belongs to another sweep, or to other software.

    Args:
        path: of the file.
        head: its header.
        header: of the sweep that wants to go on with it.
        more: entries of the versions that must be the same too.

    Raises:
        InputError: naming what differs.
    """
    if head.get("fingerprint") != header["fingerprint"]:
        raise InputError(
            f"{path} holds the sweep {head.get('name')!r} with other settings, text or model "
            f"({head.get('fingerprint')}, not {header['fingerprint']}): choose another --out, or "
            "remove it"
        )
    for name in (*_SOFTWARE, *more):
        before, now = (x.get("versions", {}).get(name) for x in (head, header))
        if before != now:
            raise InputError(
                f"{path} was begun with {name} {before}, and this is {now}: choose another --out, "
                "or remove it"
            )


def finite(value: Any) -> Any:
    """The same with None for what JSON does not have: NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(
    paths: Iterable[str | Path],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Headers and rows of results files, or of all `rows*.jsonl` in folders.

    Of a row that was measured again the figures stand; of several, the latest.

    Raises:
        InputError: if a file is missing, damaged or of another schema.
    """
    headers: list[dict[str, Any]] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("rows*.jsonl")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(f"no results in {path}: name a folder or file of a sweep")
        for file in files:
            try:
                content = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file} is damaged ({error}): remove it") from error
            if not content.endswith("\n"):  # a sweep is still at it, or was killed
                content = content[: content.rfind("\n") + 1]
            if not content:
                continue
            head, *found = _parse(content, file)
            headers.append(head)
            for row in found:
                key = (row["sweep"], row["id"])
                if key not in rows or _weight(row) >= _weight(rows[key]):
                    rows.pop(key, None)
                    rows[key] = row
    return headers, list(rows.values())


def _weight(row: Mapping[str, Any]) -> tuple[bool, str]:
    return row["status"] == "ok", row["finished"]


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
            raise InputError(
                f"{path} is not a results file of a sweep (line {number}): name another"
            )
        if entry.get("schema") != SCHEMA:
            raise InputError(
                f"{path} is of another version of this program: its schema is "
                f"{entry.get('schema')}, not {SCHEMA}; run the sweep again into another --out"
            )
    return entries
