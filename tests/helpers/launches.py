"""What Triton would compile: the variants of kernels that are launched, without a GPU.

Triton compiles a kernel anew for other constants, other dtypes, and integers and pointers of
another kind: 1, divisible by 16, or neither. `recorded` asks Triton's own code for that key of
every launch, as it would be made for an H100.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from rotorquant_hf.attention import triton_attention
from rotorquant_hf.backend import backend
from rotorquant_hf.kernels.attend import attend_kernel
from rotorquant_hf.warming import _kernels

Variant = tuple[str, tuple[tuple[str, str], ...]]
"""A kernel's name, and what it is compiled for: names and values of arguments and options."""

H100 = triton_attention.Device(132, 228 << 10)


Kernel = JITFunction | InterpretedFunction


@functools.cache
def _binder(kernel: Kernel) -> tuple[list[str], Any]:
    interpreted = isinstance(kernel, InterpretedFunction)
    compiled = JITFunction(kernel.fn, **kernel.kwargs) if interpreted else kernel
    target = make_backend(GPUTarget("cuda", 90, 32))
    names = [param.name for param in compiled.params]
    return names, create_function_from_signature(compiled.signature, compiled.params, target)


def variant_of(kernel: Kernel, args: Any, kwargs: Any) -> Variant:
    """What a launch of a kernel is compiled for."""
    names, bind = _binder(kernel)
    _, kinds, options = bind(*args, **kwargs)
    key = dict(zip(names, kinds, strict=True)) | options
    return kernel.fn.__name__, tuple((name, str(value)) for name, value in key.items())


@contextmanager
def recorded(monkeypatch: Any) -> Iterator[list[Variant]]:
    """The variants of all launches within, in their order, of work on the CPU.

    Nothing is computed: what kernels would write stays as it was made, and hundreds of steps take a
    second. Kernels have `device_caches` as if these were all that had been compiled.
    """
    variants: list[Variant] = []

    def recording(self: Kernel, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variant = variant_of(self, args, kwargs)
        self.device_caches[0][0][variant] = None
        variants.append(variant)

    with monkeypatch.context() as patch, backend("triton"):
        for kernel in _kernels():
            patch.setattr(kernel, "device_caches", {0: ({},)}, raising=False)
        patch.setattr(type(attend_kernel), "run", recording)
        patch.setattr(triton_attention.Device, "of", lambda device: H100)
        # Entries that are looked at, and here nobody has written them.
        patch.setattr("rotorquant_hf.layers.full.check_finite", lambda *a, **k: None)
        patch.setattr("rotorquant_hf.store.statistics.needs_wide", lambda *shift: False)
        yield variants


def differences(variants: list[Variant]) -> dict[str, dict[str, set[str]]]:
    """By kernel, the arguments that it was compiled for more than one value of."""
    values: dict[str, dict[str, set[str]]] = {}
    for kernel, key in variants:
        for name, value in key:
            values.setdefault(kernel, {}).setdefault(name, set()).add(value)
    return {
        kernel: {name: found for name, found in names.items() if len(found) > 1}
        for kernel, names in values.items()
    }
