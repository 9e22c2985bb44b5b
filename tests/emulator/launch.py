"""Triton's launches run in the emulator, with tensors of the CPU.

Everything of Triton but the GPU is the real thing: its binder, its specialisation and its compiler.
Only the driver is another one, whose binaries are texts of PTX and whose launches emulate them.
Triton must not be in its interpreter's mode, which puts functions in the place of kernels.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.backends.compiler import GPUTarget

from rotorquant_hf.attention import registered, triton_attention
from rotorquant_hf.backend import backend
from rotorquant_hf.kernels.launch import launch_of
from tests.emulator.counts import Counts
from tests.emulator.machine import Machine
from tests.emulator.memory import Buffer
from tests.emulator.registers import Array

SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes that a program may take, by the architectures that are emulated."""
_POISON = 0xFF  # bytes of NaN and of -1
_edited_devices = itertools.count(1000)


@functools.lru_cache(maxsize=24)
def _machine(text: str, shared: int) -> Machine:
    return Machine(text, shared)


Edit = Callable[[str, str], str]


class Emulation:
    """What runs while launches are emulated, and what was seen.

    Attributes:
        arch: of the GPU, one of SHARED.
        faults: by text, what a correct kernel does not do.
        counts: of every launch, with the kernel's name, in order.
        edit: changes a kernel's PTX before it runs: of its name and text, the new text. Or None.
    """

    def __init__(self, arch: int, seed: int, edit: Edit | None) -> None:
        self.arch, self.edit = arch, edit
        self.faults: Counter[str] = Counter()
        self.counts: list[tuple[str, Counts]] = []
        self._order = np.random.default_rng(seed)
        # Whether a byte was written, of storages that are handed out as they are, by address.
        self._written: dict[int, tuple[Any, Tensor]] = {}

    def launch(
        self, machine: Machine, grid: tuple[int, int, int], arguments: list[tuple[str, str, Any]]
    ) -> None:
        """Run a kernel, its programs in an order drawn by chance.

        Args:
            arguments: name, type and value of every one that is not a constant.
        """
        buffers: dict[int, Buffer] = {}
        for name, _, value in arguments:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                buffer = self._buffer(name, value)
                buffers.setdefault(buffer.address, buffer)
        words = [_word(kind, value) for _, kind, value in arguments]
        words += [0] * (len(machine.kernel.parameters) - len(words))  # scratch that is not used
        programs = grid[0] * grid[1] * grid[2]
        order = self._order.permutation(programs)
        faults: Counter[str] = Counter()
        counts = machine.launch(grid, words, list(buffers.values()), faults, order)
        name = machine.kernel.name
        self.faults.update({f"{name}: {fault}": count for fault, count in faults.items()})
        self.counts.append((name, counts))

    def _buffer(self, name: str, tensor: Tensor) -> Buffer:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        _, written = self._written.get(address, (None, None))
        mask = None if written is None else written.numpy()
        return Buffer(name, address, _bytes(storage), mask)

    def handed_out(self, tensor: Tensor) -> None:
        """Poison a tensor made by `empty` and its like, and follow what is written to it."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            ctypes.memset(storage.data_ptr(), _POISON, storage.nbytes())
            # The storage is kept, so that no other comes to lie there.
            written = torch.zeros(storage.nbytes(), dtype=torch.bool)
            self._written[storage.data_ptr()] = storage, written

    def filled(self, tensor: Tensor) -> None:
        """Torch has written to a tensor."""
        _, written = self._written.get(tensor.untyped_storage().data_ptr(), (None, None))
        if written is not None and tensor.numel():
            size = tensor.element_size()
            strides = [x * size for x in tensor.stride()]
            shape = (*tensor.shape, size)
            written.as_strided(shape, (*strides, 1), tensor.storage_offset() * size).fill_(True)


def _bytes(storage: Any) -> Array:
    kind = ctypes.c_uint8 * storage.nbytes()
    return np.frombuffer(kind.from_address(storage.data_ptr()), dtype=np.uint8)


def _word(kind: str, value: Any) -> int:
    """The bits of an argument."""
    if kind.startswith("*"):
        return value.data_ptr() if isinstance(value, Tensor) else 0
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if kind[0] in "iu":
        return int(value) & ((1 << max(int(kind[1:]), 8)) - 1)
    raise NotImplementedError(f"an argument of type {kind}")


class _Watch(TorchDispatchMode):
    """Sees which memory torch hands out, and what torch writes."""

    _EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self, emulation: Emulation) -> None:
        super().__init__()
        self.emulation = emulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket.__name__ in self._EMPTY:
            self.emulation.handed_out(out)
            return out
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        self.emulation.filled(tensor)
        return out


class Launcher:
    """What Triton calls to launch a kernel; in place of `CudaLauncher`."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature: dict[str, Any] = source.signature

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: tuple[str, int], *rest: Any
    ) -> None:
        """The last arguments are the kernel's; those before them a real launcher needs."""
        values = rest[-len(self.signature) :]
        arguments: list[tuple[str, str, Any]] = []
        for (name, kind), value in zip(self.signature.items(), values, strict=True):
            arguments += _flat(name, kind, value)
        emulation = triton.runtime.driver.active.emulation
        with torch.utils._python_dispatch._disable_current_modes():
            emulation.launch(_machine(*function), (x, y, z), arguments)


def _flat(name: str, kind: Any, value: Any) -> list[tuple[str, str, Any]]:
    """An argument without its constants; a tuple's elements one by one."""
    if isinstance(kind, tuple | list):
        pairs = zip(kind, value, strict=True)
        return [each for k, v in pairs for each in _flat(name, k, v)]
    return [] if kind == "constexpr" else [(name, kind, value)]


class _Driver:
    """A driver of Triton without a GPU. Triton keeps what it compiled by the device's number."""

    launcher_cls = Launcher

    def __init__(self, emulation: Emulation) -> None:
        self.emulation, self.utils = emulation, self
        # Edited kernels are not for others.
        self._device = emulation.arch if emulation.edit is None else next(_edited_devices)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.emulation.arch, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.emulation.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Module, function, registers, spilled registers and the most threads of a program."""
        edit, text = self.emulation.edit, binary.decode()
        if "tcgen05" in text:
            pytest.skip(f"{name} has tcgen05 instructions, which the emulator does not know")
        return name, (text if edit is None else edit(name, text), shared), 0, 0, 1024

    def unload_module(self, module: str) -> None:
        """Nothing to unload."""


def _unwatched(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a tensor of a class of its own, which torch cannot while it is watched."""

    def call(*args: Any) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return make(*args)

    return call


def _stop_at_ptx(
    self: Any = None,
    stages: Any = None,
    options: Any = None,
    language: Any = None,
    arch: Any = None,
) -> tuple[str, str] | None:
    """Triton asks for a key of the changed stages, or has them changed."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda source, metadata: source.encode()
    return None


@contextmanager
def emulation(arch: int, seed: int = 0, edit: Edit | None = None) -> Iterator[Emulation]:
    """Triton's kernels are compiled for a GPU of `arch` and run in the emulator.

    Args:
        seed: of the order in which the programs of a grid run. edit: see `Emulation`.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET replaces the compiler: run this without it")
    running = Emulation(arch, seed, edit)
    with pytest.MonkeyPatch.context() as patch, backend("triton"):
        patch.setattr(triton.runtime.driver, "_active", _Driver(running))
        patch.setattr(knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx)
        patch.setattr(knobs.compilation, "disable_line_info", True)  # half of the text
        patch.setattr(triton_attention, "runs_ptx", lambda device: True)
        patch.setattr(registered, "causal_lower_right", _unwatched(causal_lower_right))
        launch_of.cache_clear()  # kernels that another driver launches
        try:
            with _Watch(running):
                yield running
        finally:
            launch_of.cache_clear()
