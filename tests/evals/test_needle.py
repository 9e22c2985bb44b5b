"""Needles: hidden where they should be, asked for without being told, found by a model that can."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from evals.__main__ import main
from evals.caches.registry import CacheSpec
from evals.errors import InputError
from evals.measurements.needle import ANSWERS, QUESTION, SUBJECTS, NeedleMeasurement, NeedleOptions
from evals.probes.chunked import feed
from evals.probes.footprint import quantised_tokens
from evals.subjects.models import LoadedModel, ModelOptions
from tests.conftest import ROOT

RECALL = ROOT / "examples" / "recall-1m"
TEXT = str(ROOT / "examples" / "sampled")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The shipped model that finds facts in its context."""
    model = AutoModelForCausalLM.from_pretrained(RECALL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    return LoadedModel(model, tokenizer, ModelOptions(model=str(RECALL)))


@pytest.fixture(scope="module")
def measurement(loaded) -> NeedleMeasurement:
    options = NeedleOptions(text=(TEXT,), length=(256, 480), depth=(0.1, 0.3, 0.6), trials=3)
    return NeedleMeasurement(loaded, options)


def test_prompts_hide_the_fact_and_do_not_tell_it(measurement, tokenizer) -> None:
    assert len(measurement.prompts) == 2 * 3 * 3
    for prompt in measurement.prompts:
        first, last = prompt.span
        fact = tokenizer.decode(prompt.context[0, first:last])
        question = tokenizer.decode(prompt.question[0])
        answer = tokenizer.decode(prompt.answer)
        assert fact == question + answer + "."
        assert question in {QUESTION.format(subject=name) for name in SUBJECTS}
        assert answer.strip() in ANSWERS
        assert answer not in question
        assert fact != question
        text = tokenizer.decode(prompt.context[0])
        assert text.count(question) == 1  # asked for nowhere but at the end
        assert prompt.context.shape[1] + prompt.question.shape[1] == prompt.length
        room = prompt.length - 5 * (last - first)  # of the prose, about
        assert 0 <= first - 0.8 * prompt.depth * room <= 0.2 * prompt.length
        assert len(set(prompt.candidates)) == len(prompt.candidates) > 10
        assert prompt.candidates[0] == prompt.answer[0]


def test_prompts_follow_the_seed(loaded, measurement) -> None:
    options = measurement.options
    same = NeedleMeasurement(loaded, options).prompts
    other = NeedleMeasurement(loaded, options, seed=1).prompts
    for a, b in zip(measurement.prompts, same, strict=True):
        assert torch.equal(a.context, b.context)
        assert a.answer == b.answer
    assert any(a.answer != b.answer for a, b in zip(same, other, strict=True))


def test_the_model_finds_them_and_a_good_cache_too(measurement) -> None:
    baseline = measurement.run(CacheSpec.of("dynamic"))
    assert baseline["accuracy"] == baseline["baseline_accuracy"] > 0.85
    assert baseline["choice_accuracy"] >= baseline["accuracy"]
    assert (baseline["asked"], baseline["quantised"], baseline["warnings"]) == (18, 0, [])
    good = measurement.run(CacheSpec.of("k8v8", {"residual_length": 32, "statistics_length": 0}))
    assert good["accuracy"] == baseline["accuracy"]
    assert good["quantised"] == 18
    assert good["warnings"] == []


def test_a_cache_that_loses_the_fact_fails(measurement) -> None:
    options = {
        "key_bits": 1,
        "value_bits": 1,
        "residual_length": 16,
        "statistics_length": 0,
        "num_sink_tokens": 0,
    }
    lossy = measurement.run(CacheSpec.of("rotorquant", options))
    assert lossy["accuracy"] < 0.7 * lossy["baseline_accuracy"]
    cells = {(p["length"], p["depth"]): p for p in lossy["points"]}
    assert set(cells) == {(n, d) for n in (256, 480) for d in (0.1, 0.3, 0.6)}
    assert sum(p["passed"] for p in lossy["points"]) == round(18 * lossy["accuracy"])
    assert all(p["quantised"] for p in lossy["points"])


def test_a_fact_in_the_recent_window_does_not_count_as_quantised(measurement, loaded) -> None:
    options = {"residual_length": 100, "statistics_length": 0}
    for prompt in measurement.prompts:
        cache = loaded.new_cache(CacheSpec.of("k4v4", options))
        feed(loaded.model, prompt.context, cache, 64)
        first, last = quantised_tokens(cache)
        assert first == 4
        exact = cache.layers[0].recent_length
        assert last == prompt.context.shape[1] - exact
    wide = measurement.run(CacheSpec.of("k4v4", {"residual_length": 1000, "statistics_length": 0}))
    assert wide["quantised"] == 0
    assert "only 0 of 18 facts were stored quantised" in wide["warnings"][0]


def test_a_model_that_finds_nothing_is_said_to(model, tokenizer) -> None:
    """The shipped prose model cannot: then the test says nothing of a cache."""
    options = NeedleOptions(text=(TEXT,), length=(200,), depth=(0.5,), trials=3)
    blind = LoadedModel(model, tokenizer, ModelOptions())
    result = NeedleMeasurement(blind, options).run(CacheSpec.of("k4v4"))
    assert result["baseline_accuracy"] < 0.5
    assert "the model itself finds only" in result["warnings"][0]


def test_bad_lengths_are_refused(loaded) -> None:
    for options, says in (
        ({"length": (100_000,)}, "the longest text has"),
        ({"length": (64,), "others": 12}, "too short for 13 facts and a question"),
    ):
        with pytest.raises(InputError, match=says):
            NeedleMeasurement(loaded, NeedleOptions(text=(TEXT,), **options))


def test_an_answer_of_several_tokens_must_be_right_to_its_end(measurement, loaded) -> None:
    (prompt, *_) = [p for p in measurement.prompts if len(p.answer) > 1] or measurement.prompts[:1]
    passed, chosen, stored = measurement._ask(prompt, DynamicCache())
    assert not stored
    if passed:
        assert chosen
    wrong = type(prompt)(**{**vars(prompt), "answer": [*prompt.answer[:-1], 0]})
    assert not measurement._ask(wrong, DynamicCache())[0]


def test_command(capsys) -> None:
    grid = ["--length", "200", "--depth", "0.2", "0.5", "--trials", "2"]
    short = ["--cache", "k3v3", "--residual-length", "32"]
    main(["needle", "--model", str(RECALL), "--text", TEXT, "--json", *short, *grid])
    result = json.loads(capsys.readouterr().out)
    assert [(p["length"], p["depth"], p["asked"]) for p in result["points"]] == [
        (200, 0.2, 2),
        (200, 0.5, 2),
    ]
