"""The host's part of a decode step, counted; in a subprocess because the interpreter has replaced
the compiler in this one.
"""

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_a_step_makes_few_calls(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = ["-m", "evals.bench.host", "--layers", "2", "--samples", "3", "--head-dim", "64"]
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    rows = re.findall(r"^\| (.*?) \| [\d.]+ \[.*?\] \| .*? \| (\d+) \|$", found.stdout, re.M)
    counted = {name: int(calls) for name, calls in rows}
    assert counted.keys() == {"sdpa", "rotorquant", "DynamicCache, sdpa"}
    # Of these 70 are Transformers'. With Triton's binder at every launch there are 900.
    assert 100 < counted["rotorquant"] < counted["sdpa"] < 360


def test_the_interpreter_is_refused():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "evals.bench.host"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert "TRITON_INTERPRET" in found.stderr
