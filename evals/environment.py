"""Where a measurement runs: devices, and the versions that a row records."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import rotorquant_hf

_Device = torch.device  # `Versions` has a field of the name `torch`


def device_of(name: str) -> torch.device:
    """A device by name, with its index."""
    return torch.empty(0, device=name).device


def on_gpu(device: torch.device) -> bool:
    """Whether a device has CUDA's streams, events and graphs."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Versions:
    """What a measurement was made with."""

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    transformers: str
    rotorquant_hf: str
    python: str
    command: str

    @classmethod
    def of(cls, device: _Device, module: str, argv: Sequence[str] | None) -> Versions:
        """Those of this process, whose command is `python -m module argv...`."""
        arguments = sys.argv[1:] if argv is None else argv
        return cls(
            device=_device_name(device),
            driver=_driver() if on_gpu(device) else "none",
            cuda=torch.version.cuda or "none",
            torch=torch.__version__,
            triton=_triton_version(),
            transformers=transformers.__version__,
            rotorquant_hf=rotorquant_hf.__version__,
            python=platform.python_version(),
            command=" ".join(["python -m", module, *arguments]),
        )

    def row(self) -> dict[str, Any]:
        """As a row of kind "versions"."""
        return {"kind": "versions", **asdict(self)}

    def __str__(self) -> str:
        return (
            f"{self.device}, driver {self.driver}, CUDA {self.cuda}, torch {self.torch}, triton "
            f"{self.triton}, transformers {self.transformers}, rotorquant_hf {self.rotorquant_hf}, "
            f"Python {self.python}\n\n    {self.command}"
        )


def _device_name(device: torch.device) -> str:
    if on_gpu(device):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.multi_processor_count} multiprocessors)"
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU by name, as far as the system knows it, and its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else f'{platform.machine()} CPU'}, {os.cpu_count()} cores"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
