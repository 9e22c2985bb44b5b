"""The emulator's parts against something independent; `test_compiled.py` runs it on kernels."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tests.emulator import arithmetic
from tests.emulator.counts import Counts
from tests.emulator.inline import run
from tests.emulator.matrix import Descriptor
from tests.emulator.memory import Buffer, Clock, GlobalMemory, SharedMemory
from tests.emulator.parse import UnknownPtx, parse_assembly
from tests.emulator.registers import POISON, Array, Fault, Registers

LANES = np.arange(32)
ALL = np.ones(32, dtype=bool)
WORD = np.zeros((32, 4), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_floats_are_rounded_as_torch_does(kind: str, dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate((x[~np.isnan(x)], np.float32([0, -0.0, 1 + 2**-9, 1 + 3 * 2**-9, 65520])))
    with np.errstate(over="ignore"):
        found = arithmetic.bits_of(x, kind)
    wanted = torch.from_numpy(x).to(dtype)
    assert np.array_equal(found, wanted.view(torch.uint16).numpy())
    assert np.array_equal(arithmetic.floats(found, kind), wanted.float().numpy())


@pytest.mark.parametrize("a", [7, -7, 0, -(2**31)])
@pytest.mark.parametrize("b", [2, -2, 3])
def test_division_goes_towards_zero(a: int, b: int) -> None:
    found = run("div.s32 $0, $2, $3; rem.s32 $1, $2, $3;", [a, b], 2)
    wanted = [math.trunc(a / b), int(math.fmod(a, b))]
    assert found == [x & 0xFFFFFFFF for x in wanted]


def test_fields_and_shifts() -> None:
    assert run("bfe.u32 $0, $2, 4, 8; bfe.s32 $1, $2, 4, 8;", [0xABC5], 2) == [0xBC, 0xFFFFFFBC]
    assert run("bfi.b32 $0, $1, $2, 4, 8;", [0xFCD, 0x12345], 1) == [0x12CD5]
    assert run("mul.hi.u32 $0, $2, $3; mul.hi.s32 $1, $2, $3;", [1 << 31, 6], 2) == [3, 0xFFFFFFFD]
    assert run("abs.f16x2 $0, $1;", [0xBC00FE01], 1) == [0x3C007E01]
    assert run("add.s16x2 $0, $1, $2;", [0x0001FFFF, 0x00020002], 1) == [0x00030001]
    assert run("shl.b32 $0, $2, 40; shr.s32 $1, $2, 40;", [0x80000001], 2) == [0, 0xFFFFFFFF]


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UnknownPtx, match="sad"):
        run("sad.u32 $0, $1, $1, $1;", [1], 1)
    with pytest.raises(Fault, match="t is read and was never written"):
        run("{.reg .b32 t; add.u32 $0, $1, t;}", [1], 1)


def test_bytes_of_a_register_that_nobody_writes_are_poison() -> None:
    found = run("{.reg .b32 t; prmt.b32 $0, $1, t, 0x3340;}", [0x11223344], 1)
    assert found == [0x11110044 | POISON & 0xFF00]


def words(*values: float) -> list[int]:
    """The bits of float32."""
    return [int(x) for x in np.float32(values).view(np.uint32)]


PAIRS = """{{.reg .b64 a, b, c;
mov.b64 a, {{$2, $3}}; mov.b64 b, {{$4, $5}}; {} c, a, b; mov.b64 {{$0, $1}}, c;}}"""


@pytest.mark.parametrize(
    ("name", "wanted"), [("add", (5, -3)), ("sub", (-3, 7)), ("mul", (4, -10))]
)
def test_floats_by_twos(name: str, wanted: tuple[float, float]) -> None:
    assert run(PAIRS.format(f"{name}.rn.f32x2"), words(1, 2, 4, -5), 2) == words(*wanted)
    with pytest.raises(UnknownPtx, match="max"):
        run(PAIRS.format("max.f32x2"), words(1, 2, 4, -5), 2)


def test_the_neighbour_of_an_odd_float_spoils_what_reads_it() -> None:
    text = PAIRS.replace("$3", "t").replace("c;\n", "c; .reg .b32 t;\n")
    found = run(text.format("add.f32x2"), words(1, 0, 4, 5), 2)
    assert found[0] == words(5)[0]
    assert np.isnan(np.uint32(found[1]).view(np.float32))


@pytest.mark.parametrize("third", [-3.0, 2.0, 9.0])
def test_min_and_max_of_three(third: float) -> None:
    found = run("min.f32 $0, $2, $3, $4; max.f32 $1, $2, $3, $4;", words(1, 4, third), 2)
    assert found == words(min(1, third), max(4, third))
    with pytest.raises(UnknownPtx):
        run("add.f32 $0, $1, $2, $3;", words(1, 4, third), 1)


def test_floats_of_two_widths() -> None:
    text = "{.reg .b16 h; cvt.u16.u32 h, $3; add.rn.f32.f16 $0, h, $4; "
    text += "sub.rn.f32.f16 $1, h, $4; fma.rn.f32.f16 $2, h, h, $4;}"
    assert run(text, [0x3E00, *words(4)], 3) == words(5.5, -2.5, 6.25)


def test_reductions_of_a_warp() -> None:
    kernel, known = parse_assembly("redux.sync.max.f32 $0, $1, -1;", {"$0": 32, "$1": 32})
    registers = Registers(kernel, threads=64)
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    registers.writer(known["$1"])(x.view(np.uint32), registers.everyone)
    execute = arithmetic.build(kernel.statements[0], registers)
    assert execute is not None
    execute(registers.everyone)
    found = registers.reader(known["$0"], 32)().view(np.float32)
    assert np.array_equal(found, x.reshape(2, 32).max(axis=1).repeat(32))
    with pytest.raises(UnknownPtx, match="part of a warp"):
        execute(np.arange(64) < 48)


@pytest.mark.parametrize(
    ("places", "size", "wavefronts", "ideal"),
    [
        (4 * LANES, 4, 1, 1),
        (0 * LANES, 4, 1, 1),  # one word for all
        (2 * LANES, 2, 1, 1),
        (8 * LANES, 4, 2, 1),
        (128 * LANES, 4, 32, 1),
        (8 * LANES, 8, 2, 2),
        (16 * LANES, 16, 4, 4),
        (128 * LANES, 16, 32, 4),
    ],
)
def test_wavefronts(places: Array, size: int, wavefronts: int, ideal: int) -> None:
    counts = Counts()
    counts.shared("ld", places, ALL, size)
    assert (counts.wavefronts["ld"], counts.ideal["ld"]) == (wavefronts, ideal)


def test_sectors() -> None:
    counts = Counts()
    counts.of_global("ld", 1024 + 4 * LANES, ALL, 4)
    counts.of_global("ld", 4096 + 64 * LANES, LANES < 8, 4)
    assert counts.sectors["ld"] == 4 + 8
    assert counts.useful["ld"] == 4 * 40


@pytest.mark.parametrize(
    ("name", "sectors"),
    [("ld.global.b32", 4), ("cp.async.ca.shared.global", 4), ("cp.async.cg.shared.global", 8),
     ("st.global.b32", 8)],
)  # fmt: skip
def test_what_is_in_the_first_level_cache_is_not_asked_for_again(name: str, sectors: int) -> None:
    counts = Counts()
    for _ in range(2):
        counts.of_global(name, 1024 + 4 * LANES, ALL, 4)
    assert counts.sectors[name] == sectors
    counts.begin_program()
    counts.of_global(name, 1024 + 4 * LANES, ALL, 4)
    assert counts.sectors[name] == sectors + 4


def test_swizzled_lines_take_every_byte_once() -> None:
    for line in (16, 32, 64, 128):
        places = Descriptor(0, 128, 8 * line, line).places(16, min(2, line // 16), True)
        assert len(np.unique(places)) == places.size
        assert not (places % 16).any()


def shared() -> tuple[SharedMemory, Clock, Counter[str]]:
    clock, faults = Clock(), Counter[str]()
    return SharedMemory(1024, clock, faults), clock, faults


def test_a_barrier_ends_a_race() -> None:
    memory, clock, faults = shared()
    memory.store(4 * LANES, WORD, 0 * LANES, "st")
    memory.load(4 * LANES, 4, 0 * LANES, "ld")
    clock.barrier()
    memory.load(4 * LANES, 4, 0 * LANES + 1, "ld")
    assert not faults
    memory.store(4 * LANES, WORD + 1, 0 * LANES, "st")
    assert list(faults) == ["race: a write after another warp's read, shared memory: st"]


def test_memory_that_nobody_wrote() -> None:
    memory, _, faults = shared()
    memory.load(4 * LANES, 4, 0 * LANES, "ld")
    assert list(faults) == ["uninitialised read, shared memory: ld"]
    with pytest.raises(Fault, match="out of bounds"):
        memory.load(4 * LANES + 1020, 4, 0 * LANES, "ld")
    with pytest.raises(Fault, match="no multiple of 4"):
        memory.load(4 * LANES + 2, 4, 0 * LANES, "ld")


def test_copies_in_flight() -> None:
    memory, _, faults = shared()
    memory.copy_later(4 * LANES, WORD + 7, 0 * LANES, "cp")
    memory.commit()
    memory.wait(1)
    memory.load(4 * LANES, 4, 0 * LANES, "early")
    assert "read while cp.async is in flight, shared memory: early" in faults
    memory.wait(0)
    assert (memory.load(4 * LANES, 4, 0 * LANES, "late") == 7).all()
    assert not any("late" in fault for fault in faults)
    memory.finish()
    assert not any("at the end" in fault for fault in faults)


def test_programs_that_meet() -> None:
    clock, faults = Clock(), Counter[str]()
    data = np.zeros(256, dtype=np.uint8)
    memory = GlobalMemory([Buffer("x", 4096, data)], clock, faults)
    places = memory.places(4096 + 4 * LANES, 4)
    for value in (1, 1, 2):  # the same value again is no fault
        assert not faults
        clock.begin_program()
        memory.store(places, WORD + value, 0 * LANES, "st")
    assert list(faults) == ["two programs of a launch meet, global memory: st"]
    memory.finish()
    assert (data[:128] == 2).all()
    with pytest.raises(Fault, match="256 in x of 256 bytes"):
        memory.places(np.array([4096 + 256]), 8)
