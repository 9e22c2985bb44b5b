"""Safetensors files with a kind and a version: written whole or not at all, refused if not ours.

The metadata names the kind and has a JSON header, whose "version" says how to read the rest.
"""

from __future__ import annotations

import json
import os
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

Pathlike = str | os.PathLike[str]


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
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder {path.parent} does not exist; make it first")
        header = {"version": self.version, "rotorquant_hf": __version__, **header}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.touch()
            ordinary = partial.stat().st_mode  # safetensors' files only the owner can read
            named = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(named, partial, {"format": self.name, "header": json.dumps(header)})
            partial.chmod(ordinary)
            os.replace(partial, path)
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
        if not Path(path).is_file():
            raise FileNotFoundError(f"file {path} does not exist; {self.missing}")
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
            yield header, tensors
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} has an invalid header ({error!r}); {self.again}") from error
