"""Where the two kinds of device want other operations: a GPU few of them, a CPU short ones."""

from __future__ import annotations

from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether a tensor lies on the CPU. Tests that count what a GPU would be asked say no."""
    return x.device.type == "cpu"
