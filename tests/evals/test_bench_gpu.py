"""Everything on a GPU in one command, and what all benchmarks say of themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU run evals.bench.gpu itself", allow_module_level=True)

from evals.bench import common
from evals.bench import gpu as bench_gpu
from tests.conftest import ROOT
from tests.helpers.bench import MODEL, rows_of

# Requirements and help


COMMANDS = ("attention", "cache_size", "cpu", "generate", "gpu", "kernel_cost", "kernels", "tune")

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def run_without(absent, code, **environment):
    """Run code where some packages are not installed."""
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent) + code],
        cwd=ROOT,
        env=keep | environment,
        capture_output=True,
        text=True,
    )


def run_commands(modules, *arguments):
    """What commands print without Triton, one after the other, each with its exit status."""
    done = run_without(
        ["triton"],
        f"""
import runpy
sys.argv[1:] = {list(arguments)}
for module in {list(modules)}:
    try:
        runpy.run_module("evals.bench." + module, run_name="__main__")
    except SystemExit as end:
        print("ENDED", end.code, flush=True)
""",
    )
    assert done.returncode == 0, done.stderr
    return done


def test_help_is_complete_and_needs_no_triton() -> None:
    helps = run_commands(COMMANDS, "--help").stdout.split("ENDED 0\n")
    assert len(helps) == len(COMMANDS) + 1
    for module, text in zip(COMMANDS, helps, strict=False):
        assert f"python -m evals.bench.{module}" in text
        # An option without a help text is followed by the next option, or by the end.
        silent = re.findall(r"^  (--[\w-]+)(?: \S+)*\n(?! {10})", text, re.MULTILINE)
        assert not silent, module


def test_a_missing_triton_is_named_before_any_work(tmp_path) -> None:
    gpu = run_commands(["gpu"], "--out", str(tmp_path / "out"))
    others = run_commands(["attention", "kernel_cost", "kernels", "tune"])
    assert gpu.stdout + others.stdout == 5 * "ENDED 2\n"
    errors = (gpu.stderr + others.stderr).splitlines()
    says = "needs triton, which is not installed: pip install -e '.[triton]'"
    assert len([line for line in errors if says in line]) == 5
    assert not list(tmp_path.iterdir())


# Everything in one command


def gpu_args(out, *options):
    return bench_gpu._arguments(["--out", str(out), *options])


def test_one_command_runs_its_parts_and_keeps_all_they_say(tmp_path) -> None:
    small = " ".join([*MODEL, "--batch 1 --context 200 --steps 5 --caches dynamic k3v3 --no-graph"])
    argv = ["--out", str(tmp_path), "--part", "check", "generate", "--workers", "1"]
    argv += ["--minutes", "4", "--only", "test_append and 4-bits", "--generate", small]
    assert bench_gpu.main(argv) == 0
    log = (tmp_path / "log.txt").read_text()
    for text in (
        "# check, at most",
        "1 passed",
        "# generate, at most",
        "check: ok",
        "generate: ok",
    ):
        assert text in log
    assert "| 1 | 200 | k3v3 | eager |" in log
    assert "python -m evals.bench.gpu --out" in log
    assert torch.__version__ in log
    assert rows_of(tmp_path / "generate.jsonl", "generate")
    assert 'tests="1"' in (tmp_path / "check.xml").read_text()


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys) -> None:
    commands, ends = [], {"pytest": [1], "kernels": [0], "tune": [124]}
    ends |= {"attention": [75, 75, 0], "generate": [-11]}

    def run(arguments, seconds, log):
        commands.append(arguments)
        return ends[arguments[1].split(".")[-1]].pop(0)

    monkeypatch.setattr(bench_gpu, "run", run)
    assert bench_gpu.main(["--out", str(tmp_path), "--minutes", "9"]) == 1
    out = capsys.readouterr().out
    for text in ("check: exit status 1", "tune: out of time", "attention: ok", "status -11"):
        assert text in out
    assert not any(ends.values())
    benchmarks = [command for command in commands if command[1] != "pytest"]
    assert all("--resume" in command for command in benchmarks)  # the device was lost twice
    assert len(commands) == 7


def test_where_check_is_alone_it_runs_all_tests_of_kernels(tmp_path) -> None:
    few = bench_gpu.command("check", gpu_args(tmp_path), 60)
    everything = bench_gpu.command("check", gpu_args(tmp_path, "--part", "check"), 60)
    assert "tests/kernels" not in few
    assert "tests/kernels" in everything
    assert "-n" in everything or (os.cpu_count() or 1) == 1
    for command in (few, everything):
        files = [x for x in command if x.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)


def test_what_takes_too_long_is_ended_with_all_it_started(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_gpu, "_GRACE", 1)
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(marker)!r}).touch()"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True); "
        "time.sleep(60)"
    )
    begin = time.monotonic()
    assert bench_gpu.run(["-c", code], 2, bench_gpu.Log(tmp_path)) in (137, -9)
    assert time.monotonic() - begin < 6
    assert "begun" in capsys.readouterr().out
    time.sleep(max(0.0, begin + 8 - time.monotonic()))
    assert not marker.exists()


BROKEN = """
import torch
from tests.kernels.conftest import _device_answers

state = []

def synchronize():
    if state:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize

def pytest_runtest_call(item):
    assert not state, "the device was broken before"
    if item.name == "test_one[1]":
        state.append("broken")
        raise RuntimeError("CUDA error")
"""


@pytest.mark.parametrize("workers", [[], *([["-n", "1"]] if find_spec("xdist") else [])], ids=str)
def test_a_check_that_breaks_the_device_fails_no_other(workers, tmp_path) -> None:
    (tmp_path / "conftest.py").write_text(BROKEN)
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('i', range(9))\ndef test_one(i): pass\n"
    )
    command = ["-m", "pytest", str(tmp_path), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, *workers],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    if workers:
        assert "8 passed" in done.stdout.splitlines()[-1]
        assert done.returncode == 1
    else:
        assert "the device is lost: CUDA error: an illegal memory access" in done.stdout
        assert done.returncode == common.DEVICE_LOST


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes", "0"], "--minutes above 0"),
        (["--workers", "0"], "--workers from 1"),
        (["--part", "all"], "invalid choice: 'all'"),
    ],
    ids=["minutes", "workers", "part"],
)
def test_arguments_that_make_no_sense(options, says, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as status:
        gpu_args(tmp_path, *options)
    assert status.value.code == 2
    assert says in capsys.readouterr().err


def test_checks_need_no_package_beyond_those_of_a_gpu_machine() -> None:
    """From a plain copy of the tree: torch, triton, transformers and pytest alone."""
    absent = ["lm_eval", "datasets", "hypothesis", "scipy", "clifford", "accelerate", "matplotlib"]
    absent += ["pandas", "jinja2", "adjustText", "hqq", "optimum", "xdist"]
    arguments = ["--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += bench_gpu._ARGUMENTS["check"][1].split()
    code = f"import pytest\nsys.exit(pytest.main({arguments}))"
    done = run_without(absent, code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-2000:]
