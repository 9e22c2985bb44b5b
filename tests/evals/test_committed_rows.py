"""Committed results belong to the sweeps that their configs give today: they would still resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evals.errors import InputError
from evals.sweep.plan import Plan, plan_of, read_plan
from evals.sweep.rows import read_results
from evals.sweep.runner import check_out, statuses
from tests.conftest import ROOT

RESULTS = [
    path
    for path in sorted((ROOT / "evals" / "results").iterdir())
    if (path / "rows.jsonl").is_file()
]


@pytest.fixture(params=RESULTS, ids=lambda path: path.name)
def committed(request, tmp_path, monkeypatch) -> tuple[Path, dict, list[dict], Plan]:
    """A results folder with its header and rows, and the plan that its config gives today.

    The texts that were read are not committed, nor are pretrained models: a text of their name
    takes their place, and the digests are the recorded ones.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (header,), rows = read_results([request.param])
    recorded = header["config"]
    text = recorded.get("text", [])  # tasks read none
    for name in text:
        path = tmp_path / name if Path(name).suffix else tmp_path / name / "book.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a book", encoding="utf-8")
    for name in recorded["models"]:
        if name.endswith(".gguf"):  # which a plan looks at, as it does at texts
            (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / f"{header['name']}.yaml"
    shipped = all(name.startswith("examples/") for name in recorded["models"])
    models = {} if shipped else {"models": recorded["models"]}
    plan = read_plan(config, ({"text": text} if text else {}) | models)
    absent = text if shipped else [*text, *recorded["models"]]
    sources = {name: recorded["sources"][name] for name in absent}
    return request.param, header, rows, replace(plan, sources=plan.sources | sources)


def test_ids_and_fingerprint_are_those_of_the_config(committed) -> None:
    _, header, rows, plan = committed
    assert {row["id"] for row in rows} == {row.id for row in plan.rows}
    assert len(rows) == len(plan.rows)
    assert plan.fingerprint == header["fingerprint"]
    by_id = {row.id: row.to_dict() for row in plan.rows}
    for row in rows:
        planned = by_id[row["id"]]
        for part in ("cache", "measurement", "options", "seed"):
            assert row[part] == planned[part]


def test_the_recorded_config_gives_the_same_plan(committed) -> None:
    _, header, rows, _ = committed
    config = {name: value for name, value in header["config"].items() if name != "sources"}
    text = config.pop("text", None)
    plan = plan_of(config, "the header", header["name"], {"text": text} if text else {})
    assert {row["id"] for row in rows} == {row.id for row in plan.rows}


def test_the_same_sweep_would_go_on(committed) -> None:
    """Nothing of it is left to measure; another sweep is refused."""
    folder, header, rows, plan = committed
    check_out(plan, folder, header["versions"])
    assert statuses(plan, folder) == {row["id"]: row["status"] for row in rows}
    with pytest.raises(InputError, match="with other settings, text or model"):
        check_out(replace(plan, name="another"), folder, header["versions"])
