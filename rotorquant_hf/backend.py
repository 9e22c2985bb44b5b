"""Which implementation computes: Triton kernels, the native library of a CPU, or plain torch."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rotorquant_hf.native.library import library
from rotorquant_hf.quant.mse import RotorQuantMSE
from rotorquant_hf.quant.prod import RotorQuantProd
from rotorquant_hf.quant.quantizer import Quantizer

BACKENDS = ("triton", "native", "torch")
_forced: str | None = None

# In float32, larger tiles do not fit the shared memory of most GPUs.
MAX_FLOAT32_DIM = 512


def kernels_take(device: torch.device, dtype: torch.dtype, *quantizers: Quantizer) -> bool:
    """Whether the Triton kernels do this work, or else plain torch: the one answer for all.

    Args:
        device: where the tensors lie.
        dtype: of the keys and values to be coded, or of the queries. Float64 is torch's.
        quantizers: of the packed keys and values. The kernels take the classes they know, with
            16-bit scales and whole bytes in every slot of a plane (d a multiple of 8).
    """
    if not uses_triton(device) or dtype == torch.float64:
        return False
    max_dim = max(quantizer.d for quantizer in quantizers)
    if dtype == torch.float32 and max_dim > MAX_FLOAT32_DIM:
        return False
    return all(is_known(quantizer) and quantizer.d % 8 == 0 for quantizer in quantizers)


def is_known(quantizer: Quantizer) -> bool:
    """Whether kernels and the native library know how a quantiser codes, with 16-bit scales.

    The very classes: a subclass may code in a way of its own.
    """
    if type(quantizer) not in (RotorQuantMSE, RotorQuantProd):
        return False
    return quantizer.stage_one.scale_dtype == torch.float16


def uses_triton(device: torch.device) -> bool:
    """Whether work on `device` goes through the Triton kernels."""
    if _forced is not None:
        return _forced == "triton"
    return device.type == "cuda" and _runs_kernels(device)


def uses_native(device: torch.device) -> bool:
    """Whether the native library codes and attends on `device`, where it takes the numbers."""
    return _forced in (None, "native") and device.type == "cpu" and library() is not None


def running(device: torch.device | str) -> str:
    """What computes on a device: "triton", "native", with what the library is for, or "torch"."""
    device = torch.device(device)
    loaded = library()
    if uses_triton(device):
        return "triton"
    if uses_native(device) and loaded is not None:
        return f"native ({loaded.level})"
    return "torch"


def runs_ptx(device: torch.device) -> bool:
    """Whether kernels on `device` may hold PTX assembly: on CUDA devices of NVIDIA."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    """Whether a GPU runs the kernels: with Triton, on NVIDIA's GPUs from Ampere (sm_80) on.

    They copy to shared memory and multiply in ways that older ones lack. On AMD's, which torch
    calls "cuda" too, nobody has run them. For B200 and B300 (sm_100, sm_103) Triton 3.6 fails to
    compile some of them, and 3.9 compiles all.
    """
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and (capability[0] != 10 or _triton_version() >= (3, 9))


def _triton_version() -> tuple[int, ...]:
    return tuple(int(x) for x in importlib.metadata.version("triton").split(".")[:2])


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph of the work on `device` is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(values: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    """An int32 tensor on `device`, without waiting for it."""
    return brought(torch.tensor(values, dtype=torch.int32, device="cpu"), device)


def brought(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; the host does not wait for the work that a GPU has still to do."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def recordable(x: torch.Tensor) -> torch.Tensor:
    """A tensor, or a copy of one made in inference mode, which autograd refuses outside of it."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend on every device, for comparisons and tests.

    "torch" also works on a GPU. "native" is of CPUs, and leaves what it does not take to torch.
    "triton" on a CPU needs Triton's interpreter (`TRITON_INTERPRET=1` in the environment before
    Triton is imported).

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "native" where the library was not compiled.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "native" and library() is None:
        raise RuntimeError(
            "there is no native library: install the package where a C compiler is found, and "
            "leave ROTORQUANT_NATIVE=0 out of the environment"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
