"""Faults put into the compiled text of a kernel are found by the emulator.

Runs there only; `test_compiled.py` starts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest

pytest.importorskip("triton")

from evals.bench.decode_step import WrongResult
from tests.emulator.launch import emulation
from tests.emulator.registers import Fault
from tests.kernels import test_append_kernel, test_statistics_kernels
from tests.kernels.test_on_device import ATTEND, Attend, bits

Edit = Callable[[str], str]


@pytest.fixture
def arch(request: pytest.FixtureRequest) -> int:
    """The architecture that is emulated."""
    return int(request.config.getoption("--emulate"))


def outcome(arch: int, kernel: str, edit: Edit, check: Callable[[], None]) -> str:
    """What is found with a kernel's text edited; empty if nothing is."""
    edited = []

    def change(name: str, text: str) -> str:
        if name != kernel:
            return text
        edited.append(edit(text))
        assert edited[-1] != text, "nothing to plant the fault in"
        return edited[-1]

    found = []
    with emulation(arch, edit=change) as running:
        try:
            check()
        except (Fault, WrongResult) as error:
            found.append(str(error))
    assert edited, "the kernel did not run"
    return "; ".join([*found, *running.faults])


def nth(pattern: str, replacement: str, n: int = 0) -> Edit:
    """Replaces the n-th match, -1 for the last."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))
        where = found[n]
        return text[: where.start()] + where.expand(replacement) + text[where.end() :]

    return edit


def without(pattern: str) -> Edit:
    """Takes all matches out."""
    return lambda text: re.sub(pattern, "", text)


def allow_one_more(text: str) -> str:
    """The first wait lets one more copy be under way."""
    allow = re.compile(r"(cp\.async\.wait_group\s+)(\d+);")
    return allow.sub(lambda found: f"{found[1]}{int(found[2]) + 1};", text, count=1)


STEP = Attend(bits(3), 64, context=170, heads=2)
BARRIER = r"bar\.sync\s+0;"
# Threads from 41 on go where the program would go in another case.
LEAVES = "{.reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.gt.u32 q, t, 40; @q bra \\1;}"
PLANTED: dict[str, tuple[str, Edit, str]] = {
    "a-barrier-taken-out": ("attend_kernel", nth(BARRIER, "", 1), "race"),
    "all-barriers-taken-out": ("attend_kernel", without(BARRIER), "race"),
    "a-wait-taken-out": ("attend_kernel", nth(r"cp\.async\.wait_group\s+\d+;", ""), "in flight"),
    "a-wait-that-allows-one-more": ("attend_kernel", allow_one_more, "in flight"),
    "no-wait-at-the-end": (
        "attend_kernel",
        without(r"cp\.async\.wait_group\s+0;"),
        "cp.async in flight at the end",
    ),
    "another-selector": (
        "attend_kernel",
        nth(r"(prmt\.b32 %r\d+, b, a, )0x6240", r"\g<1>0x6250"),
        "error",
    ),
    "two-registers-swapped": (
        "attend_kernel",
        nth(r"(mma\.sync\S+\s+\{[^}]*\}, \{ *)(%r\d+), (%r\d+)", r"\1\3, \2"),
        "error",
    ),
    "a-register-not-written": (
        "push_kernel",
        nth(r"mov\.u32\s+%r\d+, %tid\.x;", ""),
        "never written",
    ),
    "rows-beyond-the-queries": (
        "prepare_kernel",
        nth(r"@%p\d+ (ld\.global\.v\S+)", r"\1"),
        "out of bounds",
    ),
    "tokens-beyond-the-last": (
        "attend_kernel",
        nth(r"@%p\d+ (ld\.global\.b16)", r"\1", -1),
        "uninitialised read, global|out of bounds",
    ),
    "half-a-program-leaves": (
        "attend_kernel",
        nth(r"@!?%p\d+ bra\s+(\S+);", LEAVES),
        "different ways",
    ),
    "an-address-off-by-two": (
        "combine_kernel",
        nth(r"(ld\.global\.\S+ \{[^}]*\}, \[ %rd\d+ \+ )\d+", r"\g<1>2"),
        "no multiple",
    ),
}


@pytest.mark.parametrize(("kernel", "edit", "found"), PLANTED.values(), ids=PLANTED)
def test_faults_in_a_step_are_found(arch: int, kernel: str, edit: Edit, found: str) -> None:
    assert re.search(found, outcome(arch, kernel, edit, STEP.check))


def test_a_sweep_without_barriers_races_in_global_memory(arch: int) -> None:
    check = partial(test_append_kernel.test_query_aware, 64, 2, "mse")
    found = outcome(arch, "append_kernel", without(BARRIER), check)
    assert "race: a read after another warp's write, global memory" in found


def test_programs_that_do_not_wait_for_the_last_are_found(arch: int) -> None:
    """Of `push`, which advances the state once all programs have read it."""
    edit = nth(r"setp\.ne\.b32(\s+%p\d+, )(%r\d+), %r\d+;", r"setp.ne.b32\1\2, \2;", -1)
    found = outcome(arch, "push_kernel", edit, STEP.check)
    assert "two programs of a launch meet" in found


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "while a wgmma (writes|uses) it"),
        (r"fence\.proxy\.async\.shared::cta;", "written without a fence"),
    ],
    ids=["wait", "fence"],
)
def test_faults_around_wgmma_are_found(arch: int, pattern: str, found: str) -> None:
    if arch != 90:
        pytest.skip("wgmma is of sm_90")
    check = ATTEND["a-block-of-causal-tokens-boolean-mask"].check
    assert re.search(found, outcome(arch, "attend_kernel", without(pattern), check))


def test_a_product_that_is_not_waited_for_is_found(arch: int) -> None:
    """Of `moment`, where a product may be under way while the next is made ready."""
    if arch != 90:
        pytest.skip("wgmma is of sm_90")
    wait = re.compile(r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+);")
    later = partial(wait.sub, lambda x: f"{x[1]}{int(x[2]) + 1};")
    check = partial(test_statistics_kernels.test_moment, 128)
    assert "while a wgmma" in outcome(arch, "moment_kernel", later, check)


def test_channels_beyond_the_last_are_found(arch: int) -> None:
    edit = nth(r"@%p\d+ (ld\.global\.b32)", r"\1", -1)
    check = partial(test_statistics_kernels.test_block, 24)
    found = outcome(arch, "block_kernel", edit, check)
    assert re.search("uninitialised read, global|out of bounds|error", found)


def test_a_basis_without_barriers_races(arch: int) -> None:
    check = partial(test_statistics_kernels.test_hessian, 40, 12, "half")
    assert "race" in outcome(arch, "hessian_kernel", without(BARRIER), check)
