"""The native library as an ARM processor runs it: compiled by Clang, emulated by Unicorn.

The emulated processor sees this process's memory at its own addresses, a page at a time as it asks
for it, so that arguments and tensors are passed as they are.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import unicorn
from elftools.elf.elffile import ELFFile
from unicorn import arm64_const as registers

from rotorquant_hf.native.library import ARGUMENTS, Library
from tests.conftest import ROOT

_PAGE = mmap.PAGESIZE
_SIZE = 1 << 20  # of the stack, and of what a thread has of its own
_STACK, _THREAD, _END = 0x7000_0000, 0x7800_0000, 0x7F00_0000
_SYSTEM_CALL = 2
_FUNCTIONS = {
    1: lambda x, _: math.exp(min(x, 88.0)),
    2: lambda x, _: math.tanh(x),
    3: math.pow,
    4: lambda x, _: math.cos(x),
    5: lambda x, _: math.sin(x),
}
"""Of `arm.c`, by number."""


def compiled(folder: Path) -> Path:
    """The library for 64-bit ARM, linked to fixed addresses."""
    zig = [sys.executable, "-m", "ziglang"]
    native = sorted((ROOT / "rotorquant_hf" / "native").glob("*_portable.c"))
    sources = [*native, ROOT / "tests" / "helpers" / "arm.c"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    flags = ["-target", "aarch64-linux-musl", "-O3"]
    for source, object_ in zip(sources, objects, strict=True):
        subprocess.run([*zig, "cc", *flags, "-c", source, "-o", object_], check=True)
    path = folder / "library.elf"
    keep = [part for name in ARGUMENTS for part in ("-u", f"{name}_portable")]
    subprocess.run(
        [*zig, "ld.lld", *keep, "-e", "attend_portable", *objects, "-o", path], check=True
    )
    return path


class Arm(Library):
    """Functions run in the emulator, on one thread.

    Args:
        path: what `compiled` made.

    Attributes:
        calls: how often each function was called.
    """

    def __init__(self, path: Path) -> None:
        self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._uc.ctl_set_cpu_model(registers.UC_CPU_ARM64_MAX)  # of 48 address bits
        with path.open("rb") as file:
            elf = ELFFile(file)
            symbols = elf.get_section_by_name(".symtab")
            self._address = {
                name: symbols.get_symbol_by_name(f"{name}_portable")[0]["st_value"]
                for name in ARGUMENTS
            }
            self._load([x for x in elf.iter_segments() if x["p_type"] == "PT_LOAD"])
        for begin in (_STACK, _THREAD):
            self._uc.mem_map(begin, _SIZE)
        self._uc.mem_map(_END, _PAGE)
        self._uc.reg_write(registers.UC_ARM64_REG_TPIDR_EL0, _THREAD)
        with_floats = self._uc.reg_read(registers.UC_ARM64_REG_CPACR_EL1) | 3 << 20
        self._uc.reg_write(registers.UC_ARM64_REG_CPACR_EL1, with_floats)
        unmapped = unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED
        self._uc.hook_add(unmapped, self._share)
        self._uc.hook_add(unicorn.UC_HOOK_INTR, self._call)
        self._shared: set[int] = set()
        self.calls = Counter[str]()
        self.level, self._name, self._team = "portable", b"portable", None
        self._functions = {name: partial(self._emulate, name) for name in ARGUMENTS}

    def _load(self, segments: list) -> None:
        begin = segments[0]["p_vaddr"] // _PAGE * _PAGE
        end = max(x["p_vaddr"] + x["p_memsz"] for x in segments)
        self._uc.mem_map(begin, -(-(end - begin) // _PAGE) * _PAGE)
        for segment in segments:
            self._uc.mem_write(segment["p_vaddr"], segment.data())

    def _emulate(self, name: str, arguments: ctypes.Structure, *_: object) -> int:
        uc = self._uc
        uc.reg_write(registers.UC_ARM64_REG_SP, _STACK + _SIZE - 64)
        uc.reg_write(registers.UC_ARM64_REG_LR, _END)
        for i, x in enumerate((ctypes.addressof(arguments), 0, 1)):  # no team, one thread
            uc.reg_write(registers.UC_ARM64_REG_X0 + i, x)
        uc.emu_start(self._address[name], _END)
        self.calls[name] += 1
        # The allocator may give these pages to others.
        for page in self._shared:
            uc.mem_unmap(page, _PAGE)
        self._shared.clear()
        return ctypes.c_int32(uc.reg_read(registers.UC_ARM64_REG_X0)).value

    def _share(self, uc, access, address: int, size: int, value, data) -> bool:
        for page in {address // _PAGE * _PAGE, (address + size - 1) // _PAGE * _PAGE}:
            if page < 1 << 32:
                return False  # no pointer of this process
            if page not in self._shared:
                rights = unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE
                uc.mem_map_ptr(page, _PAGE, rights, ctypes.c_void_p(page))
                self._shared.add(page)
        return True

    def _call(self, uc, number: int, data) -> None:
        assert number == _SYSTEM_CALL, f"the processor stopped: exception {number}"
        before = uc.reg_read(registers.UC_ARM64_REG_PC) - 4
        instruction = int.from_bytes(uc.mem_read(before, 4), "little")
        x, y = (
            ctypes.c_float.from_buffer_copy(uc.reg_read(register).to_bytes(4, "little")).value
            for register in (registers.UC_ARM64_REG_S0, registers.UC_ARM64_REG_S1)
        )
        result = _FUNCTIONS[instruction >> 5 & 0xFFFF](x, y)
        uc.reg_write(
            registers.UC_ARM64_REG_S0, int.from_bytes(bytes(ctypes.c_float(result)), "little")
        )
