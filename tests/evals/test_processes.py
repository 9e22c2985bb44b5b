"""Commands that are started by several processes: some share their work, the others refuse."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from evals import bench
from evals.__main__ import main
from evals.errors import InputError
from evals.processes import Share
from evals.sweep import runner as sweep
from evals.sweep.plan import plan_of
from tests.conftest import MODEL

BENCHMARKS = [
    module
    for name in sorted(x.name for x in pkgutil.iter_modules(bench.__path__))
    if hasattr(module := importlib.import_module(f"evals.bench.{name}"), "main")
]


@pytest.fixture
def two(monkeypatch) -> None:
    """The first of two processes, as torchrun starts it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    "arguments",
    [
        ["verify"],
        ["perplexity"],
        ["speed"],
        ["calibrate", "--out", "made.safetensors"],
        ["allocate"],
        ["report", "results"],
    ],
    ids=lambda x: x[0],
)
def test_commands_that_share_nothing_refuse(arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        f"evals {arguments[0]} is run by 2 processes (accelerate launch, torchrun, mpirun)" in said
    )
    assert "start it once, without the launcher" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("module", BENCHMARKS, ids=lambda x: x.__name__)
def test_benchmarks_refuse(module, capsys) -> None:
    assert len(BENCHMARKS) > 8
    with pytest.raises(SystemExit) as stopped:
        module.main([])
    assert stopped.value.code == 2
    assert " is run by 2 processes " in capsys.readouterr().err


def test_processes_on_one_cpu_do_not_time_each_other(tmp_path, monkeypatch) -> None:
    spec = {
        "models": [str(MODEL)],
        "caches": ["dynamic", "k4v4"],
        "measurements": ["memory", "speed"],
    }
    plan = plan_of(spec, "here", "name", {})
    monkeypatch.setattr(sweep, "pick_device", lambda name: sweep.torch.device("cpu"))
    with pytest.raises(InputError, match="2 rows of this sweep are timed, and 2 processes on one"):
        sweep.run(plan, tmp_path, ["sweep"], share=Share(1, 2, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, Share()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Share(5, 8, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            Share(1, 2, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, Share(1, 2, 0)),
    ],
    ids=["alone", "torchrun", "Open MPI", "Intel MPI"],
)
def test_a_launcher_tells_the_share(variables, share, monkeypatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Share.of_environment() == share


def test_processes_that_meet_nowhere_are_not_waited_for(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert Share(1, 2, 1).gather("mine") == ["mine"]
