"""Plans of sweeps: grids, replacements, ids; what is wrong is refused before anything runs."""

from __future__ import annotations

import pytest
import yaml

from evals.errors import InputError
from evals.sweep.plan import plan_of, read_plan, summary
from tests.conftest import ROOT

TEXT = [str(ROOT / "examples" / "sampled")]
BASE = {
    "models": ["examples/books-7m"],
    "caches": ["dynamic", "k3v3"],
    "measurements": [{"measure": "perplexity", "text": TEXT}],
}


def planned(**changes):
    replaced = changes.pop("replaced", {})
    return plan_of({**BASE, **changes}, "sweep.yaml", "sweep", replaced)


def refusal(**changes) -> str:
    with pytest.raises(InputError) as error:
        planned(**changes)
    return str(error.value)


def labels(plan) -> list[str]:
    return [row.cache.label for row in plan.rows]


def test_lists_span_a_grid() -> None:
    caches = [
        "dynamic",
        {
            "cache": "rotorquant",
            "key_bits": [2, 3],
            "value_bits": [2, 4],
            "residual_length": 32,
            "statistics_length": 0,
        },
        {"cache": "k3v3", "exact_layers": [[0, -1], []]},
        {"cache": "k3v3", "exact_layers": [0, 1]},
    ]
    models = [{"model": "examples/books-7m", "outliers": [2.0, 10.0]}, "examples/books-7m"]
    plan = planned(caches=caches, models=models)
    assert labels(plan)[:8] == [
        "dynamic",
        "k2v2, statistics 0, window 32",
        "k2v4, statistics 0, window 32",
        "k3v2, statistics 0, window 32",
        "k3v4, statistics 0, window 32",
        "k3v3, exact layers (0, -1)",
        "k3v3",
        "k3v3, exact layers (0, 1)",
    ]
    assert len(plan.rows) == 3 * 8
    assert [plan.rows[i].model.outliers for i in (0, 8, 16)] == [2.0, 10.0, None]
    assert len({row.id for row in plan.rows}) == 24


def test_a_measurement_may_have_caches_and_models_of_its_own() -> None:
    plan = planned(
        measurements=[
            {"measure": "perplexity", "text": TEXT},
            {"measure": "memory", "caches": ["fp8"], "models": ["a", "b"]},
        ]
    )
    found = [(row.measure, row.model.model, row.cache.label) for row in plan.rows]
    assert found == [
        ("perplexity", "examples/books-7m", "dynamic"),
        ("perplexity", "examples/books-7m", "k3v3"),
        ("memory", "a", "fp8"),
        ("memory", "b", "fp8"),
    ]


def test_caches_of_one_run_are_one_job_and_a_model_is_loaded_once() -> None:
    plan = planned(models=["a", "b"], measurements=["speed", "memory"])
    assert [len(job.rows) for job in plan.jobs] == [2, 1, 1, 2, 1, 1]
    assert [job.rows[0].model.model for job in plan.jobs] == ["a"] * 3 + ["b"] * 3


def test_ids_follow_the_values() -> None:
    ids = {
        planned(**changes).rows[1].id
        for changes in (
            {},
            {"seed": 1},
            {"models": ["other"]},
            {"models": [{"model": "examples/books-7m", "dtype": "float16"}]},
            {"caches": ["dynamic", "k3v2"]},
            {"caches": ["dynamic", {"cache": "k3v3", "seed": 1}]},
            {"measurements": [{"measure": "perplexity", "text": TEXT, "chunk": 32}]},
        )
    }
    assert len(ids) == 7
    same = planned(caches=["dynamic", {"cache": "rotorquant", "key_bits": 3, "value_bits": 3}])
    assert same.rows[1].id == planned().rows[1].id
    assert same.fingerprint == planned().fingerprint
    assert planned(seed=1).fingerprint != planned().fingerprint


def test_models_and_text_can_be_replaced(tmp_path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text")
    plan = planned(
        measurements=[{"measure": "perplexity", "dataset": "wikitext"}, "memory"],
        replaced={"models": ["mine"], "text": [str(text)]},
    )
    assert {row.model.model for row in plan.rows} == {"mine"}
    assert plan.rows[0].options.text == (str(text),)
    assert plan.rows[0].options.dataset is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cachez": []}, "sweep.yaml: unknown key 'cachez'; choose from name, seed, models"),
        ({"seed": -1}, "seed is -1"),
        ({"name": 3}, "name is 3"),
        ({"models": None}, "perplexity: models is missing"),
        ({"models": "examples/books-7m"}, "models is 'examples/books-7m'; give a list"),
        ({"models": [3]}, "3 is not a model"),
        ({"models": ["/nowhere/model"]}, "no model in /nowhere/model: name a folder with a model"),
        ({"models": ["../nowhere"]}, "no model in ../nowhere"),
        ({"models": ["./nowhere"]}, "no model in ./nowhere"),
        ({"models": [{"model": "a", "dtyp": "x"}]}, "unknown key 'dtyp'"),
        ({"models": [{"model": "a", "dtype": "int8"}]}, "dtype is 'int8'; choose one of auto"),
        ({"caches": []}, "caches is []; give a list"),
        ({"caches": ["k3v9"]}, "k3v9: unknown cache"),
        ({"caches": [{"key_bits": 3}]}, "is not a cache: give a name, or a mapping"),
        ({"caches": [{"cache": "k3v3", "bits": 3}]}, "unknown option bits"),
        ({"caches": [{"cache": "nothing", "bits": 3}]}, "nothing: unknown cache"),
        ({"caches": [{"cache": "rotorquant", "key_bits": [3, 12]}]}, "key_bits is 12"),
        ({"caches": [{"cache": "k3v3", "seed": [1, 2], "label": "x"}]}, "label is 'x'"),
        ({"caches": ["dynamic", {"cache": "k3v3", "key_bits": []}]}, "key_bits is empty"),
        ({"models": [{"model": "a", "outliers": []}]}, "outliers is empty"),
        ({"models": [{"model": "a", "key_offset": float("nan")}]}, "it takes a finite number"),
        ({"caches": [{"cache": "quanto", "nbits": 3}]}, "nbits is 3; choose one of 2, 4"),
        ({"caches": [{"cache": "hqq", "axis_key": 7}]}, "axis_key is 7; choose one of 0, 1"),
        ({"caches": [{"cache": "rotorquant", "preset": None}]}, "preset is None; it takes a name"),
        ({"measurements": [{"measure": ["speed"]}]}, "unknown measurement ['speed']"),
        ({"caches": ["k3v3", "k3v3"]}, "a row occurs twice: perplexity of k3v3 on books-7m"),
        ({"measurements": None}, "measurements is missing"),
        ({"measurements": ["perplexities"]}, "unknown measurement 'perplexities'"),
        ({"measurements": [["perplexity"]]}, "is not a mapping with a key 'measure'"),
        ({"measurements": [{"measure": "speed", "chunk": 3}]}, "speed: unknown key 'chunk'"),
        ({"measurements": [{"measure": "speed", "repeats": 0}]}, "repeats is 0; choose 1 or more"),
        ({"measurements": [{"measure": "speed", "repeats": "5"}]}, "it takes a whole number"),
        ({"measurements": [{"measure": "perplexity"}]}, "no text to measure on"),
        (
            {"measurements": [{"measure": "perplexity", "text": ["absent.txt"]}]},
            "absent.txt does not exist",
        ),
        (
            {"measurements": [{"measure": "perplexity", "text": TEXT, "dataset": "x"}]},
            "both --text and --dataset are given",
        ),
    ],
)
def test_what_is_wrong_is_named(changes, says) -> None:
    assert says in refusal(**changes)


def test_files_that_are_no_plans_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no file .*absent\.yaml"):
        read_plan(tmp_path / "absent.yaml")
    path = tmp_path / "bad.yaml"
    for content, says in (
        ("a: [", "line 1: expected the node content"),
        ("# A title\n\nsome `code`: [", "line 3: "),
        ("a: `code`", "line 1: found character '`' that cannot start any token"),
        ("[1, 2]", "it takes a mapping with the keys name, seed"),
        ("", "it takes a mapping"),
        ("name: a\ncaches: [k3v3]\ncaches: [k4v4]", "line 3: the key 'caches' occurs again"),
        ("caches:\n  - {cache: k3v3, seed: 1, seed: 2}", "line 2: the key 'seed' occurs again"),
        ("a: \0", "unacceptable character"),
        (b"a: \xff", "'utf-8' codec can't decode"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError) as refused:
            read_plan(path)
        assert str(refused.value).startswith(f"{path} is not a YAML plan: {says}")
        assert "\n" not in str(refused.value)


def test_the_summary_names_every_row_and_its_state() -> None:
    plan = planned()
    text = summary(plan, {plan.rows[0].id: "ok"})
    lines = text.splitlines()
    assert lines[0] == f"sweep: 2 rows, fingerprint {plan.fingerprint}"
    assert lines[1].startswith("ok ")
    assert lines[2].startswith("to do ")
    assert "k3v3" in lines[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_committed_configs_are_plans(path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_plan(path)
    assert plan.name == path.stem
    assert len(plan.rows) > 2
    assert any(row.cache.is_baseline for row in plan.rows)
    assert "-m evals sweep configs/" in path.read_text()
    assert set(yaml.safe_load(path.read_text())) <= {
        *("name", "seed", "models", "caches", "measurements"),
    }
