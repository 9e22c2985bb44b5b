"""Every kernel as compiled for GPUs, one small case each; `tests.emulator` runs all the others so.

In a process of its own, because in this one the interpreter has taken the compiler's place.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from tests.conftest import ROOT
from tests.emulator.__main__ import run

# Append, push, prepare, attend and combine, and the five of a first packing. Between them: look-ups
# by PTX, of integers too, and by loads, signs, masks, products by `mma` and `wgmma`, warps that
# share the tokens, the sweep (of rows that several warps hold too), empty splits in a graph that is
# replayed.
CASES = [
    "test_on_device.py::test_attend[k2v2-prod-d64]",
    "test_on_device.py::test_attend[k4v3]",
    "test_queries.py::test_digits_are_those_of_the_rotated_queries[128-3-outliers]",
    "test_on_device.py::test_attend[a-block-of-causal-tokens-boolean-mask]",
    "test_on_device.py::test_graph_against_eager[k3v3, query-aware]",
    "test_statistics_kernels.py::test_moment_before_rope[40-12-half]",
    "test_statistics_kernels.py::test_block_that_rope_turned[24-3-half-True]",
    "test_statistics_kernels.py::test_hessian[24-3-interleaved]",
    "test_statistics_kernels.py::test_feedback[24-3-half]",
    "test_attend_kernel.py::test_rows_that_are_combined_together[16-16-32-many-few splits]",
    "test_append_kernel.py::test_query_aware[320-3-mse]",
]
PLANTED = "test_planted_faults.py"


def compiling_environment() -> dict[str, str]:
    """This process's, but for what makes Triton interpret."""
    left_out = ("PYTEST", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if not k.startswith(left_out)}


def check(arch: int, expected: int, *cases: str) -> None:
    """Run cases in the emulator, of which none fails or is skipped."""
    environment = compiling_environment()
    found = run(arch, *(f"tests/kernels/{x}" for x in cases), capture_output=True, env=environment)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert f"{expected} passed" in found.stdout
    assert "skipped" not in found.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cases run on the GPU")
@pytest.mark.parametrize(("arch", "cases"), [(80, CASES), (90, CASES), (120, CASES[:2])])
def test_small_cases(arch: int, cases: list[str]) -> None:
    check(arch, len(cases), *cases)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_planted_faults_are_found() -> None:
    check(90, 19, PLANTED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_what_tokens_cost() -> None:
    """No bank conflicts, and no more wavefronts and barriers than when the page was made."""
    command = ["-m", "tests.emulator.costs", "--head-dim", "64", "--bits", "3"]
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=compiling_environment(),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    row = [float(x) for x in re.findall(r"[\d.]+", found.stdout.splitlines()[-1])]
    d, bits, instructions, issue, wavefronts, conflicts, barriers, fetched, ceiling = row
    assert (d, bits, conflicts) == (64, 3, 0)
    assert 100 < wavefronts <= 144
    assert barriers <= 6
    assert 0.99 < fetched < 1.1
    # Four instructions of a warp a cycle, or two of the integer pipe, whose share is 53%; the table
    # rounds.
    share = 0.53
    assert issue == pytest.approx(instructions * 64 * 2 * 64 / 32 * share / 2, rel=0.01)
    assert 20 < ceiling < 100
