"""The command line: what it needs, the names it runs under, and the folders it runs from."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evals import moved, places, requirements
from evals.errors import InputError, NotAvailableError
from tests.conftest import MODEL, ROOT

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")
SWEEP = """
name: small
models: [{model}]
caches: [dynamic, k2v2, hqq]
measurements:
  - {{measure: memory, context: [200], new_tokens: 2}}
  - {{measure: perplexity, text: [{text}], max_tokens: 200, window: 100}}
"""


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return kept | {"HF_HUB_OFFLINE": "1"} | more


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """Exit status, stdout and stderr of commands where only the base install is there."""
    folder = tmp_path_factory.mktemp("base")
    config = folder / "small.yaml"
    config.write_text(SWEEP.format(model=MODEL, text=TEXT))
    out = str(folder / "out")
    commands = {
        "help": ["evals", "--help"],
        "caches": ["evals", "caches"],
        "perplexity": ["evals", "perplexity", "--text", TEXT],
        "data set": ["evals", "agreement", "--dataset", "wikitext"],
        "spread": ["evals", "memory", "--device", "auto"],
        "gguf": ["evals", "memory", "--model", "some.gguf"],
        "hqq": ["evals", "memory", "--cache", "hqq"],
        "quanto": ["evals", "speed", "--beside", "quanto"],
        "verify": ["evals", "verify", "--text", TEXT],
        "lm_eval": ["evals", "lm_eval"],
        "lm-eval": ["evals", "lm-eval", "run", "--tasks", "rotorquant_facts"],
        "memory": ["evals", "memory", "--context", "200", "--new-tokens", "2"],
        "agreement": [
            *("evals", "agreement", "--text", TEXT, "--max-tokens", "64", "--window", "64"),
            *("--new-tokens", "2"),
        ],
        "sweep": ["evals", "sweep", str(config), "--out", out],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.base_install"],
        input=json.dumps(list(commands.values())),
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True))
    rows = (folder / "out" / "rows.jsonl").read_text().splitlines()[1:]
    found["rows"] = [json.loads(row) for row in rows]
    return found


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("perplexity", "perplexity needs scipy, which is not installed: pip install -e '.[eval]'"),
        ("data set", "agreement needs datasets, which is not installed"),
        ("spread", "memory needs accelerate, which is not installed"),
        (
            "gguf",
            "memory needs accelerate, gguf, which are not installed: pip install -e '.[eval]'",
        ),
        ("hqq", "memory needs hqq, which is not installed: pip install -e '.[peers]'"),
        ("quanto", "speed needs optimum-quanto, which is not installed"),
        ("verify", "verify needs scipy, which is not installed: pip install -e '.[eval]'"),
        ("lm_eval", "lm_eval needs lm-eval, which is not installed"),
        ("lm-eval", "scoring tasks needs lm-eval, which is not installed"),
    ],
)
def test_a_package_that_is_missing_is_said_in_one_line(base, command, says) -> None:
    status, out, err = base[command]
    assert status == 2
    assert out == ""
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["help", "caches", "memory", "agreement"])
def test_the_base_install_is_enough_for(base, command) -> None:
    status, out, err = base[command]
    assert (status, err) == (0, "")
    assert out


def test_a_sweep_says_what_it_leaves_out_and_measures_the_rest(base) -> None:
    status, out, err = base["sweep"]
    assert status == 0, err
    assert err.splitlines()[0] == (
        "note: 4 of 6 rows will not be run, as hqq, scipy are not installed: "
        "pip install -e '.[eval,peers]', then --retry"
    )
    assert "2 ok" in out
    reasons = {(r["measurement"], r["cache"]["kind"]): r["error"] for r in base["rows"]}
    assert reasons["memory", "dynamic"] is reasons["memory", "rotorquant"] is None
    assert {row["status"] for row in base["rows"] if row["error"]} == {"not run"}
    assert all("scipy" in reasons["perplexity", kind] for kind in ("dynamic", "rotorquant", "hqq"))
    assert "pip install" in reasons["memory", "hqq"]


def test_what_installs_a_package(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert requirements.install(["scipy", "hqq"]) == "pip install -e '.[eval,peers]'"
    monkeypatch.chdir(ROOT / "tests")
    assert requirements.install(["scipy"]) == f"pip install -e '{ROOT}[eval]'"
    monkeypatch.setattr(places, "_ROOT", ROOT / "tests")
    assert requirements.install(["triton"]) == "pip install 'rotorquant-hf[triton]'"
    assert requirements.install(["a-package-of-ours"]) == "pip install a-package-of-ours"
    with pytest.raises(NotAvailableError, match="this needs nowhere, which is not installed: pip"):
        requirements.require_packages("this", ["torch", "nowhere"])


def test_files_of_the_clone_are_found_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places.shipped("examples/books-7m") == str(MODEL)
    assert places.shipped("configs/quick.yaml") == str(ROOT / "configs" / "quick.yaml")
    for other in ("Qwen/Qwen2.5-7B", "nowhere.txt", str(MODEL), "examples-of-mine/x"):
        assert places.shipped(other) == other
    with pytest.raises(InputError, match="which has no such file; name a path of your own"):
        places.shipped("examples/books-8m")
    (tmp_path / "examples").mkdir()
    assert places.shipped("examples") == "examples"  # what is here comes first


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # imported by other tests
def test_old_module_names_run_the_new_commands(capsys, monkeypatch) -> None:
    names = {
        "bench_gpu": "bench.gpu",
        "bench_attention": "bench.attention",
        "bench_generate": "bench.generate",
        "bench_cpu": "bench.cpu",
        "kernel_cost": "bench.kernel_cost",
        "cache_size": "bench.cache_size",
    }
    for old, new in names.items():
        monkeypatch.setattr(sys, "argv", [old, "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(f"evals.{old}", run_name="__main__")
        assert not stopped.value.code
        shown = capsys.readouterr()
        said = f"DeprecationWarning: evals.{old} has moved: python -m evals.{new}\n"
        assert shown.err.startswith(said)
        assert shown.out.startswith("usage: ")
    monkeypatch.setattr(sys, "argv", ["cache_size", "--tokens", "300", "--presets", "k4v4"])
    moved.run("cache_size", "bench.cache_size")
    assert "| k4v4 |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the harness as it is installed, its script, and no clone around it."""
    folder = tmp_path_factory.mktemp("installed")
    left_out = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "evals", folder / "rotorquant_evals", ignore=left_out)
    shutil.copytree(ROOT / "rotorquant_hf", folder / "rotorquant_hf", ignore=left_out)
    script = "from rotorquant_evals.__main__ import main\nmain()\n"
    script += "import sys\nassert 'evals' not in sys.modules\n"
    (folder / "rotorquant").write_text(script)
    (folder / "work").mkdir()
    return folder


def _call(installed: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=installed / "work",
        env=_environment(PYTHONPATH=str(installed), HF_HOME=str(installed / "home")),
        capture_output=True,
        text=True,
    )


SEVERAL = """
import json, sys
sys.path.append({root!r})
from tests.helpers.base_install import run
sys.path.remove({root!r})
print(json.dumps([run(command) for command in {commands}]))
"""


def _call_several(installed: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of modules, run in one process: to start takes seconds."""
    done = _call(installed, "-c", SEVERAL.format(root=str(ROOT), commands=commands))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_script_measures_from_any_folder(installed) -> None:
    """And its rows name the command as it was given."""
    config = installed / "sweep.yaml"
    config.write_text(
        f"models: [{MODEL}]\ncaches: [{{cache: k2v2, residual_length: 16}}]\n"
        "measurements: [{measure: lm_eval, tasks: [rotorquant_facts], limit: 1}]\n"
    )
    script = str(installed / "rotorquant")
    done = _call(installed, script, "sweep", str(config), "--out", "out")
    assert done.returncode == 0, done.stderr
    row = json.loads((installed / "work" / "out" / "rows.jsonl").read_text().splitlines()[1])
    assert row["status"] == "ok", row["error"]  # the tasks' files are found beside the package
    assert row["command"] == f"rotorquant sweep {config} --out out"


def test_the_installed_module_names_itself_and_what_is_not_there(installed) -> None:
    paths = ("examples/books-7m", "configs/quick.yaml")
    shown, *absent, untold = _call_several(
        installed,
        ["rotorquant_evals", "--help"],
        ["rotorquant_evals", "memory"],
        ["rotorquant_evals", "sweep", "configs/quick.yaml"],
        ["rotorquant_evals", "verify", "--model", str(MODEL)],
    )
    assert shown[1].startswith("usage: python -m rotorquant_evals "), shown[2]
    assert "it has no hook for plugins" in " ".join(shown[1].split())
    for (status, _, err), path in zip(absent, paths, strict=True):
        assert status == 2
        assert err == (
            f"error: {path} is not here: {path.split('/')[0]}/ comes with the clone of "
            "rotorquant_hf, and this is an installed copy; name a path of your own\n"
        )
    assert untold[0] == 2
    assert "verify needs a text like yours: --text FILE" in untold[2]


def test_lm_eval_from_the_script(installed) -> None:
    """Its tasks with files of the user's name what is missing, though imported by their path."""
    script = str(installed / "rotorquant")
    run = ("run", "--model", "rotorquant", "--model_args", f"pretrained={MODEL},cache=k2v2")
    done = _call(installed, script, "lm-eval", *run, "--tasks", "piqa_local")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the task piqa_local reads piqa_test")
