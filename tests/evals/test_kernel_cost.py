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

large = [
    dict(d=256, key_bits=3, value_bits=3, rows=64, MASK=1),
    dict(d=192, key_bits=4, value_bits=4, rows=512, MASK=1),
    dict(d=256, key_bits=3, value_bits=3, signs=256, rows=64, MASK=1),
    dict(d=128, key_bits=3, value_bits=4, rows=512, MASK=1, SOFTCAP=True),
    dict(d=576, key_bits=4, value_bits=4),
]
small = [
    *(dict(d=d, key_bits=b, value_bits=b)
      for d, b in ((64, 3), (80, 4), (96, 2), (128, 3), (256, 4), (256, 8))),
    dict(d=128, key_bits=2, value_bits=3, signs=128),
    dict(d=128, key_bits=3, value_bits=3, rows=512, CAUSAL=True),
    dict(d=128, key_bits=3, value_bits=3, dtype=torch.float32),
]
for options in large if {arch} == 89 else large[:1] + small:
    cost = attention_cost(**options, arch={arch})[0]
    check(options, cost)
    # The look-up by PTX is what was compiled.
    assert cost.loop["PRMT"] or options["key_bits"] == 8 or "dtype" in options
for d, signs in ((256, 256), (576, 0)) if {arch} == 89 else ((64, 64), (128, 0)):
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
    assert len(found.stdout.splitlines()) == (10 if arch == 90 else 5) + 2 * 3


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
