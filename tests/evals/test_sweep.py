"""Sweeps: rows written at once, resumed, never mixed; failures recorded; several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml

from evals.__main__ import main
from evals.errors import InputError
from evals.processes import Share
from evals.sweep import runner as sweep
from evals.sweep.plan import read_plan
from evals.sweep.rows import SCHEMA, ResultsFile, finite, read_results
from rotorquant_hf import RotorQuantCache
from tests.conftest import MODEL, ROOT

TEXT = str(ROOT / "examples" / "sampled" / "clock.txt")
PERPLEXITY = {"measure": "perplexity", "text": [TEXT], "max_tokens": 220, "window": 220}


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        path = tmp_path / "small.yaml"
        short = {"cache": "k2v2", "residual_length": 32, "statistics_length": 0}
        spec = {
            "models": [str(MODEL)],
            "caches": ["dynamic", short, {**short, "cache": "k3v3"}],
            "measurements": [PERPLEXITY],
            **changes,
        }
        path.write_text(yaml.safe_dump(spec))
        return path

    return write


def lines(out, file="rows.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / file).read_text().splitlines()]


def run(config, out, *options: str) -> None:
    main(["sweep", str(config), "--out", str(out), *options])


def test_rows_hold_all_that_made_them(config, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    run(config(seed=3), out)
    assert "3 ok" in capsys.readouterr().out
    header, *rows = lines(out)
    assert (header["kind"], header["schema"], header["name"]) == ("sweep", SCHEMA, "small")
    assert [row["cache"]["label"] for row in rows] == ["dynamic", "k2v2, statistics 0, window 32",
                                                      "k3v3, statistics 0, window 32"]  # fmt: skip
    row = rows[1]
    assert row["status"] == "ok"
    assert row["sweep"] == header["fingerprint"]
    assert row["cache"]["options"]["key_bits"] == 2
    assert row["cache"]["options"]["rotation"] == "cascade"  # defaults are recorded too
    assert row["model"]["dtype"] == "float32"
    assert row["options"]["chunk"] == 64
    assert row["seed"] == 3
    assert row["versions"]["torch"] == torch.__version__
    assert row["command"] == f"python -m evals sweep {config()} --out {out}"
    assert row["versions"]["packages"]["hqq"]
    assert row["result"]["kl_mean"] > rows[2]["result"]["kl_mean"] > 0
    assert row["result"]["warnings"] == []
    assert row["finished"].endswith("Z")
    assert row["seconds"] > 0


def test_a_finished_sweep_measures_nothing_again(config, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    run(config(), out)
    before = (out / "rows.jsonl").read_bytes()
    monkeypatch.setattr(sweep, "load", None)  # would fail
    run(config(), out)
    assert (out / "rows.jsonl").read_bytes() == before


def test_a_stopped_sweep_goes_on_where_it_stopped(config, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    run(config(), out)
    path = out / "rows.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    path.write_bytes(whole[: second + 40])  # killed while it wrote its second row
    capsys.readouterr()
    run(config(), out, "--dry-run")
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert states == ["ok", "to", "to"]
    run(config(), out)
    assert path.read_bytes()[:second] == whole[:second]
    again = lines(out)
    for old, new in zip(map(json.loads, whole.splitlines()), again, strict=True):
        assert old.get("result") == new.get("result")


def test_a_process_that_is_killed_loses_no_row(config, tmp_path) -> None:
    """A real kill, in the middle of a row."""
    out, path = tmp_path / "out", config()
    command = [sys.executable, "-m", "evals", "sweep", str(path), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "rows.jsonl").exists() and len((out / "rows.jsonl").read_bytes()) > 0:
            content = (out / "rows.jsonl").read_text()
            if content.count('"kind": "row"') >= 1:
                break
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = read_results([out])[1]
    assert kept
    run(path, out)
    rows = lines(out)[1:]
    assert len(rows) == 3
    assert rows[: len(kept)] == kept


def test_packages_may_come_later(config, tmp_path) -> None:
    """What a package was missing for is measured once it is there; other versions are refused."""
    out, versions = tmp_path / "out", dict(sweep.versions_of(torch.device("cpu"), []))
    installed = versions["packages"]
    had = {name: version for name, version in installed.items() if name != "hqq"}
    plan = read_plan(config())
    header = {"name": plan.name, "fingerprint": plan.fingerprint, "config": {}}
    file = ResultsFile(out / "rows.jsonl", header | {"versions": versions | {"packages": had}})
    file.append({"id": "a"})
    file.close()
    file = ResultsFile(out / "rows.jsonl", header | {"versions": versions})
    file.append({"id": "b"})
    file.close()
    first, second = lines(out)[1:]
    assert "packages" not in first
    assert second["packages"] == {"hqq": installed["hqq"]}
    other = versions | {"packages": installed | {"lm-eval": "0.0"}}
    for refused in (other, versions | {"packages": {}}):
        with pytest.raises(InputError, match="was begun with packages"):
            ResultsFile(out / "rows.jsonl", header | {"versions": refused})


def test_two_sweeps_never_mix(config, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    run(config(), out)
    before = (out / "rows.jsonl").read_bytes()
    for options in ((), ("--dry-run",)):
        with pytest.raises(SystemExit):
            run(config(seed=1), out, *options)
        assert "holds the sweep 'small' with other settings" in capsys.readouterr().err
    assert (out / "rows.jsonl").read_bytes() == before


def test_two_processes_do_not_write_one_file(config, tmp_path) -> None:
    plan = read_plan(config())
    header = {"name": "a", "fingerprint": plan.fingerprint, "versions": {}, "config": {}}
    file = ResultsFile(tmp_path / "rows.jsonl", header)
    with pytest.raises(InputError, match="another process is writing"):
        ResultsFile(tmp_path / "rows.jsonl", header)
    file.close()
    ResultsFile(tmp_path / "rows.jsonl", header).close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda head: head.update(schema=0), "of another version of this program: its schema is 0"),
        (lambda head: head["versions"].update(rotorquant_hf="0.0.1"), "begun with rotorquant_hf"),
        (lambda head: head["versions"].update(torch="1.0"), "begun with torch 1.0"),
        (lambda head: head["versions"].update(device="abacus"), "begun with device abacus"),
        (lambda head: head.update(kind="row"), "is not a results file of a sweep"),
    ],
)
def test_results_of_other_versions_are_refused(config, tmp_path, capsys, change, says) -> None:
    out = tmp_path / "out"
    run(config(caches=["dynamic"]), out)
    head, row = lines(out)
    change(head)
    (out / "rows.jsonl").write_text(json.dumps(head) + "\n" + json.dumps(row) + "\n")
    before = (out / "rows.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        run(config(caches=["dynamic"]), out)
    assert says in capsys.readouterr().err
    assert (out / "rows.jsonl").read_bytes() == before


def test_rows_of_other_software_in_any_file_of_the_folder_are_refused(config, tmp_path, capsys):
    plan, out = read_plan(config()), tmp_path / "out"
    sweep.run(plan, out, ["sweep"], share=Share(0, 2, 0))
    head, *rows = lines(out, "rows-0.jsonl")
    head["versions"]["packages"]["hqq"] = "0.0.1"
    text = "".join(json.dumps(entry) + "\n" for entry in (head, *rows))
    (out / "rows-0.jsonl").write_text(text)
    for options in ((), ("--dry-run",)):
        with pytest.raises(SystemExit):
            run(config(), out, *options)
        assert "was begun with packages" in capsys.readouterr().err
    assert not (out / "rows.jsonl").exists()


def test_a_text_that_has_changed_is_another_sweep(config, tmp_path, capsys) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    words = (ROOT / "examples" / "sampled" / "clock.txt").read_text(encoding="utf-8")
    text.write_text(words, encoding="utf-8")
    path = config(caches=["dynamic"], measurements=[{**PERPLEXITY, "text": [str(text)]}])
    run(path, out)
    text.write_text(words[1000:], encoding="utf-8")
    with pytest.raises(SystemExit):
        run(path, out)
    assert "with other settings, text or model" in capsys.readouterr().err


def test_a_model_that_has_changed_is_another_sweep(config, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    before = read_plan(config(models=[str(folder)])).fingerprint
    assert read_plan(config(models=[str(folder)])).fingerprint == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"x")
    assert read_plan(config(models=[str(folder)])).fingerprint != before


def test_damaged_files_are_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"kind": "sweep", "schema": 1}\nnot json\n')
    with pytest.raises(InputError, match=r"rows\.jsonl is damaged in line 2"):
        read_results([path])
    with pytest.raises(InputError, match="no results in"):
        read_results([tmp_path / "absent"])
    path.write_text("# A page\n")
    with pytest.raises(InputError, match=r"rows\.jsonl is not a results file of a sweep: name an"):
        read_results([path])


def test_failures_are_recorded_and_the_sweep_goes_on(config, tmp_path, monkeypatch, capsys) -> None:
    from evals.measurements.perplexity import PerplexityMeasurement

    out, measured = tmp_path / "out", PerplexityMeasurement.run

    def failing(self, spec):
        if "k2v2" in spec.label:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return measured(self, spec)

    monkeypatch.setattr(PerplexityMeasurement, "run", failing)
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    path = config(
        caches=[
            "dynamic",
            {"cache": "k2v2", "residual_length": 32, "statistics_length": 0},
            "hqq",
            "k4v4",
        ],
        measurements=[PERPLEXITY, {"measure": "memory", "context": [40], "models": ["no/model"]}],
    )
    with pytest.raises(SystemExit) as stopped:
        run(path, out)
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "5 failed, 1 not run, 2 ok" in said.out
    assert "perplexity of hqq 4 bits on books-7m: not run: " in said.err
    assert "memory of k4v4 on model: failed: " in said.err
    assert "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in said.err
    rows = lines(out)[1:]
    by_label = {(row["measurement"], row["cache"]["label"]): row for row in rows}
    failed = by_label["perplexity", "k2v2, statistics 0, window 32"]
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    absent = by_label["perplexity", "hqq 4 bits"]
    assert absent["status"] == "not run"
    assert "pip install hqq" in absent["error"]
    assert by_label["perplexity", "k4v4"]["status"] == "ok"
    assert "no/model" in by_label["memory", "k4v4"]["error"]

    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run(path, out)  # what failed stays so
    assert len(lines(out)) == len(rows) + 1
    with pytest.raises(SystemExit):
        run(path, out, "--retry")
    _, latest = read_results([out])
    assert len(latest) == 8
    statuses = {(row["measurement"], row["cache"]["label"]): row["status"] for row in latest}
    assert statuses["perplexity", "k2v2, statistics 0, window 32"] == "ok"
    assert statuses["perplexity", "hqq 4 bits"] == "ok"
    assert statuses["memory", "dynamic"] == "failed"


def test_a_row_that_came_through_stands_whatever_file_it_is_in(config, tmp_path) -> None:
    plan, out = read_plan(config(caches=["dynamic"])), tmp_path / "out"
    sweep.run(plan, out, ["sweep"], share=Share(0, 2, 0))
    head, row = lines(out, "rows-0.jsonl")
    failed = row | {"status": "failed", "result": None, "error": "x", "finished": "2999"}
    text = "".join(json.dumps(entry) + "\n" for entry in (head, failed))
    (out / "rows.jsonl").write_text(text)
    assert read_results([out])[1] == [row]
    (out / "rows.jsonl").write_text(text.replace("failed", "ok"))
    assert read_results([out])[1][0]["finished"] == "2999"


def test_a_reference_is_right_after_a_row_that_failed(config, tmp_path, monkeypatch) -> None:
    """Out of memory in the middle of a pass of the baseline: the next row starts it anew."""
    from evals.measurements import reference

    def figures(out) -> dict:
        return {row["cache"]["label"]: row["result"] for row in read_results([out])[1]}

    path = config(caches=[{"cache": "k2v2", "residual_length": 32, "statistics_length": 0}, "k4v4"])
    run(path, tmp_path / "sound")
    passes, read = [], reference.read

    def failing(model, ids, cache):
        found = read(model, ids, cache)
        passes.append(cache)
        if len(passes) == 6:
            assert not isinstance(cache, RotorQuantCache)
            raise torch.cuda.OutOfMemoryError("no room for the logits")
        return found

    monkeypatch.setattr(reference, "read", failing)
    with pytest.raises(SystemExit):
        run(path, tmp_path / "failing")
    rows = figures(tmp_path / "failing")
    assert rows["k2v2, statistics 0, window 32"] is None
    expected = figures(tmp_path / "sound")["k4v4"]
    for name in ("kl_mean", "baseline_perplexity"):
        assert rows["k4v4"][name] == pytest.approx(expected[name], rel=1e-3)


def test_points_that_fail_leave_the_others(config, tmp_path, monkeypatch) -> None:
    from evals.measurements import memory, speed

    fill = memory.fill

    def small(model, ids, cache):
        if ids.shape[1] > 100:
            raise torch.cuda.OutOfMemoryError("no room")
        return fill(model, ids, cache)

    for module in (memory, speed):
        monkeypatch.setattr(module, "fill", small)
    measurements = [
        {"measure": "memory", "context": [60, 120], "new_tokens": 2},
        {"measure": "speed", "context": [60, 120], "new_tokens": 2, "repeats": 1},
        {"measure": "memory", "context": [120], "new_tokens": 2},
    ]
    with pytest.raises(SystemExit):
        run(config(measurements=measurements, caches=["dynamic"]), tmp_path / "out")
    rows = lines(tmp_path / "out")[1:]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    for row in rows[:2]:
        good, bad = row["result"]["points"]
        assert bad == {"batch": 1, "context": 120, "error": "OutOfMemoryError: no room"}
        assert good["context"] == 60
    assert rows[2]["error"] == "OutOfMemoryError: no room"


def test_a_broken_device_stops_the_sweep_behind_the_row(config, tmp_path, monkeypatch, capsys):
    from evals import failures
    from evals.measurements import memory

    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(memory, "fill", broken)
    monkeypatch.setattr(failures.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(failures.torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit) as stopped:
        run(config(measurements=["memory"]), tmp_path / "out")
    assert stopped.value.code == 2
    assert "the device does not answer any more" in capsys.readouterr().err
    rows = lines(tmp_path / "out")[1:]
    assert [row["status"] for row in rows] == ["failed"]


def test_figures_that_are_not_finite_are_null() -> None:
    value = {"a": [float("nan"), 1.0, float("inf")], "b": (1, "x")}
    assert finite(value) == {"a": [None, 1.0, None], "b": [1, "x"]}


def test_processes_share_the_rows(config, tmp_path) -> None:
    plan, out = read_plan(config()), tmp_path / "out"
    for rank in (0, 1):
        sweep.run(plan, out, ["sweep"], share=Share(rank, 2, rank))
    assert sorted(path.name for path in out.iterdir()) == ["rows-0.jsonl", "rows-1.jsonl"]
    assert [len(lines(out, f"rows-{rank}.jsonl")) - 1 for rank in (0, 1)] == [2, 1]
    headers, rows = read_results([out])
    assert len(headers) == 2
    assert {row["id"] for row in rows} == {row.id for row in plan.rows}
    # One process goes on with what two began.
    sweep.run(plan, out, ["sweep"], share=Share())
    assert lines(out)[1:] == []


def test_accelerate_launch_spreads_the_rows(config, tmp_path) -> None:
    """A row that fails on one process, at once, ends no other; the figures are those of one."""
    out = tmp_path / "out"
    short = {"cache": "k3v3", "residual_length": 32, "statistics_length": 0}
    twin = {"model": str(MODEL), "outliers": 10}
    path = config(models=[str(MODEL), "no/model", twin, "no/other"], caches=[short])
    command = [
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
        ),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "evals", "sweep", str(path), "--out", str(out)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr[-2000:]  # as that of one process whose rows fail
    _, rows = read_results([out])
    by_status = {"ok": [], "failed": []}
    for row in rows:
        by_status[row["status"]].append(row["model"]["model"])
    assert by_status["ok"] == [str(MODEL)] * 2
    assert sorted(by_status["failed"]) == ["no/model", "no/other"]
    for rank, said in enumerate(("2 ok", "2 failed")):
        assert f"process {rank + 1} of 2: {said} of 4 rows" in done.stdout
    with pytest.raises(SystemExit):
        run(path, tmp_path / "one")
    one = {row["id"]: row["result"] for row in read_results([tmp_path / "one"])[1]}
    assert {row["id"]: row["result"] for row in rows} == one
    assert sorted(path.name for path in out.iterdir()) == ["rows-0.jsonl", "rows-1.jsonl"]


def test_speed_of_all_caches_is_of_one_run(config, tmp_path) -> None:
    """Also after a row is lost: both are measured again, and the later rows stand."""
    out = tmp_path / "out"
    speed = {"measure": "speed", "context": [40, 70], "new_tokens": 2, "repeats": 3}
    path = config(measurements=[speed], caches=["dynamic", "k4v4"])
    run(path, out)
    rows = lines(out)[1:]
    for row in rows:
        points = row["result"]["points"]
        assert [point["context"] for point in points] == [40, 70]
        for point in points:
            assert point["samples"] == 3
            assert 0 < point["decode_p10"] <= point["decode_tokens_per_s"] <= point["decode_p90"]
            assert 0 < point["prefill_p10"] <= point["prefill_tokens_per_s"]
    content = (out / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (out / "rows.jsonl").write_bytes(b"".join(content[:2]))
    run(path, out)
    assert (out / "rows.jsonl").read_bytes().splitlines(keepends=True)[:2] == content[:2]
    labels = [row["cache"]["label"] for row in lines(out)[1:]]
    assert labels == ["dynamic", "dynamic", "k4v4"]
    assert read_results([out])[1] == lines(out)[2:]
