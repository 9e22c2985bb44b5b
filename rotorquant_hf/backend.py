"""Which implementation computes: Triton kernels, or plain torch."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("triton", "torch")
_forced: str | None = None


def uses_triton(device: torch.device) -> bool:
    """Whether work on `device` goes through the Triton kernels: on CUDA devices with Triton."""
    if _forced is not None:
        return _forced == "triton"
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device(values: list[int], device: torch.device) -> torch.Tensor:
    """An int32 tensor on `device`, without waiting for it."""
    tensor = torch.tensor(values, dtype=torch.int32)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend whatever the device, for comparisons and tests.

    "torch" also works on a GPU. "triton" on a CPU needs Triton's interpreter
    (`TRITON_INTERPRET=1` in the environment before Triton is imported).

    Raises:
        ValueError: for an unknown name.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
