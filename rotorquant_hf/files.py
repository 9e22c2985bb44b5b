"""Safetensors files with a kind and a version: written whole or not at all, refused if not ours.

The metadata names the kind and has a JSON header, whose "version" says how to read the rest. A
checksum in it, over every byte of the file, tells a damaged one.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotorquant_hf.version import __version__

UNEXPECTED = (
    *(KeyError, IndexError, AttributeError, TypeError, OverflowError, RuntimeError),
    json.JSONDecodeError,
)
"""What reading a header raises that is not as it should be, `ValueError`s with messages aside."""

Pathlike = str | os.PathLike[str]

_CHECKSUM = b'"crc32":"'
_UNSEALED = "0" * 8
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: by which its metadata name it.
        version: of its header.
        missing: what to do where there is no file, for the message.
        foreign: what a file of another kind is not, likewise.
        again: how to make another one.
    """

    name: str
    version: int
    missing: str
    foreign: str
    again: str

    def write(self, path: Pathlike, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a file (atomically: an old one stays if this fails).

        Raises:
            FileNotFoundError: if its folder does not exist.
            OSError: if it cannot be written, as where the disk is full.
        """
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder {path.parent} does not exist; make it first")
        header = {"version": self.version, "rotorquant_hf": __version__, **header}
        # A name of its own: processes and threads may write to one path at the same time.
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            partial.touch()
            ordinary = partial.stat().st_mode  # safetensors' files only the owner can read
            named = {name: tensor.contiguous() for name, tensor in tensors.items()}
            metadata = {"format": self.name, "header": json.dumps(header), "crc32": _UNSEALED}
            save_file(named, partial, metadata)
            seal(partial)
            partial.chmod(ordinary)
            os.replace(partial, path)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}); it is as it was") from error
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def read(
        self, path: Pathlike, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        """The header of a file, and its tensors on `device`, to be parsed within the context.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is damaged, or of another kind or version; also where parsing finds
                that the header lacks something.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if not Path(path).is_file():
            raise FileNotFoundError(f"file {path} does not exist; {self.missing}")
        _check_device(device)
        opened = _identity(path)
        try:
            with safe_open(path, framework="pt", device=str(torch.device(device))) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}); {self.again}"
            ) from error
        if metadata.get("format") != self.name:
            raise ValueError(f"{path} {self.foreign}")
        try:
            header = json.loads(metadata["header"])
            if header["version"] != self.version:
                raise ValueError(
                    f"{path} has format version {header['version']} (rotorquant_hf "
                    f"{header.get('rotorquant_hf', 'unknown')}), this is version {self.version}; "
                    f"{self.again}"
                )
            if metadata["crc32"] != _checksum(Path(path))[1]:
                if _identity(path) != opened:
                    raise ValueError(f"{path} was replaced while it was read; read it again")
                raise ValueError(f"{path} is damaged: its checksum is not right; {self.again}")
            yield header, tensors
        except UNEXPECTED as error:
            raise ValueError(f"{path} has an invalid header ({error!r}); {self.again}") from error


def _identity(path: Pathlike) -> tuple[int, int]:
    """What tells a file from another that has taken its name."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def seal(path: Path) -> None:
    """Write the checksum of a file into it, in the place that its metadata have for it."""
    place, checksum = _checksum(path)
    assert place is not None
    with path.open("r+b") as file:
        file.seek(place)
        file.write(checksum.encode())
        file.flush()
        os.fsync(file.fileno())  # before the name is its: the machine may stop, too


def _checksum(path: Path) -> tuple[int | None, str]:
    """Where a file has its checksum, and what it should be: that of the file with zeros there."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        at = header.find(_CHECKSUM)
        begin = at + len(_CHECKSUM)
        end = begin + len(_UNSEALED)
        found = zlib.crc32(size + header[:begin] + _UNSEALED.encode() + header[end:])
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return None if at < 0 else len(size) + begin, f"{found:08x}"


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({reason}); load on 'cpu'"
        ) from error
