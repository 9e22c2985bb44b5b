"""The kernels compile for GPUs, within what a GPU has; by Triton's own assembler, in a subprocess
because the interpreter has replaced the compiler in this one.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

# Shared memory that a program may take: an RTX 4090 (sm_89; as much on sm_86 and sm_120, more on an
# A100) and an H200 (sm_90).
SHARED = {89: 101_376, 90: 232_448}

CHECK = """
import torch
from evals.bench.kernel_cost import attention_cost, other_costs
from evals.bench import kernel_cost

def check(name, cost):
    assert cost.shared <= {shared}, (name, cost)
    print(name, cost.registers, cost.spilled, cost.shared)

for d, bits in ((64, 3), (80, 4), (96, 2), (128, 3), (256, 4), (256, 8)):
    cost, tiling = attention_cost(d, bits, bits, arch={arch})
    check(("attend", d, bits), cost)
    assert cost.loop["PRMT"] or bits == 8  # the look-up by PTX is what was compiled
check("signs", attention_cost(128, 2, 3, signs=128, arch={arch})[0])
check("many rows", attention_cost(128, 3, 3, rows=512, CAUSAL=True, arch={arch})[0])
check("mask", attention_cost(128, 3, 4, rows=16, MASK=1, SOFTCAP=True, arch={arch})[0])
check("float32", attention_cost(128, 3, 3, dtype=torch.float32, arch={arch})[0])
check("latent", attention_cost(576, 4, 4, arch={arch})[0])
for d, signs in ((64, 64), (128, 0), (256, 256), (576, 0)):
    for name, cost in other_costs(d, signs, {arch}).items():
        check((name, d), cost)
"""


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_and_fit(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    code = CHECK.format(arch=arch, shared=SHARED[arch])
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(found.stdout.splitlines()) == 6 + 5 + 4 * 3


def test_table(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = ["-m", "evals.bench.kernel_cost", "--head-dim", "128", "--bits", "3"]
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    row = [x.strip() for x in found.stdout.splitlines()[-1].split("|")]
    assert row[1:3] == ["128", "3"]
    # Four numbers and a half an instruction would be the end of the plan; see attend.py.
    assert float(row[3]) < 4.5
    assert torch.tensor(int(row[5])) <= 255
