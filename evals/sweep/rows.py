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
from typing import Any, BinaryIO

from ..errors import InputError

SCHEMA = 1
_SOFTWARE = ("rotorquant_hf", "torch", "transformers", "triton", "packages")
"""What of the versions must be the same in all files of a folder."""


class JSONLines:
    """A JSON-lines file open for appending; locked, so that no other process writes it too.

    A last line that a killed process left unfinished is cut off.

    Args:
        path: the file, made with its folder if there is none; None keeps the entries in memory.

    Attributes:
        entries: those of the file, and those written since.

    Raises:
        InputError: if the file is in use or damaged, or its folder cannot be one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {path.parent} cannot be a folder: {error}") from error
        self._file = path.open("a+b")
        try:
            _lock(self._file, path)
            self.entries = _entries(_whole_lines(self._file), path)
        except BaseException:
            self.close()
            raise

    def write(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry, and write it down to the disk at once."""
        kept: dict[str, Any] = finite(entry)
        self.entries.append(kept)
        if self._file is not None:
            self._file.write(json.dumps(kept).encode("utf-8") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another process is writing {path}: wait for it, or choose another --out"
        ) from None


def _whole_lines(file: BinaryIO) -> str:
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # killed while it wrote: that row is measured again
        file.truncate(len(whole))
    return whole.decode("utf-8", errors="replace")


class ResultsFile(JSONLines):
    """The results of one sweep.

    Args:
        path: the file; created if missing, continued if it is of the same sweep.
        header: what the sweep is: `name`, `fingerprint`, `versions` and `config`.

    Raises:
        InputError: if the file is in use, damaged, of another sweep or of other versions.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        super().__init__(path)
        self._added: dict[str, Any] = {}
        try:
            if self.entries:
                _check_schema(self.entries, path)
                check_same(path, self.entries[0], header, ("device",))
                self._added = _added_packages(self.entries[0], header)
            else:
                self.write({"kind": "sweep", "schema": SCHEMA, **header})
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, down to the disk; with packages that came after the header was written."""
        added = {"packages": self._added} if self._added else {}
        self.write({"kind": "row", "schema": SCHEMA, **row, **added})


def _added_packages(head: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, str]:
    """Packages, with their versions, that were not installed when a file was begun."""
    before, now = (x.get("versions", {}).get("packages") or {} for x in (head, header))
    return {name: version for name, version in now.items() if name not in before}


def check_same(
    path: Path, head: Mapping[str, Any], header: Mapping[str, Any], more: tuple[str, ...] = ()
) -> None:
    """Refuse a file that belongs to another sweep, or to other software.

    Packages that were missing before may be there now: rows that lacked them are measured then.

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
        if name == "packages" and before is not None:
            now = {package: (now or {}).get(package) for package in before}
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
            entries = _entries(content, file)
            _check_schema(entries, file)
            head, *found = entries
            headers.append(head)
            for row in found:
                key = (row["sweep"], row["id"])
                if key not in rows or _weight(row) >= _weight(rows[key]):
                    rows.pop(key, None)
                    rows[key] = row
    return headers, list(rows.values())


def _weight(row: Mapping[str, Any]) -> tuple[bool, str]:
    return row["status"] == "ok", row["finished"]


def _entries(content: str, path: Path) -> list[dict[str, Any]]:
    """What the lines of a file say."""
    entries = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == 1 and not line.startswith("{"):
                raise InputError(
                    f"{path} is not a results file of a sweep: name another"
                ) from error
            raise InputError(f"{path} is damaged in line {number} ({error}): remove it") from error
    return entries


def _check_schema(entries: list[dict[str, Any]], path: Path) -> None:
    """Refuse what is no results file of a sweep: a header, and then rows, of this schema.

    Raises:
        InputError: naming the line.
    """
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
