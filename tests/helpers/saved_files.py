"""Changing what a file of ours has, with a checksum that is right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotorquant_hf.files import seal


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    to: Path | None = None,
) -> None:
    """Let `change` alter the header and the tensors of a file, in place or into another file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    change(header, tensors)
    to = path if to is None else to
    save_file(tensors, to, metadata | {"header": json.dumps(header), "crc32": "0" * 8})
    seal(to)
