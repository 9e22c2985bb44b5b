"""The script that trains the model of the retrieval test."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.subjects.texts import encode
from examples import train_recall
from examples.train_recall import FACTS, Windows, stage, words_of
from tests.conftest import MODEL, ROOT

SAMPLED = ROOT / "examples" / "sampled"


@pytest.fixture(scope="module")
def windows(tokenizer) -> Windows:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SAMPLED.glob("*.txt")))
    return Windows(encode(tokenizer, text), words_of(text, min_count=3), tokenizer, seed=0)


def test_words_are_those_that_come_often() -> None:
    text = "candle candle Candle mice mice mice an an an extraordinarily " * 2
    assert words_of(text, min_count=4) == ["candle", "mice"]


def test_every_answer_learned_stands_in_the_window_before(windows, tokenizer) -> None:
    """So that it can be found, and after the same question."""
    forms = [form[: form.index("{subject}")] for form in FACTS]
    for _ in range(20):
        ids, learned = windows.draw(256, 6)
        assert len(ids) == len(learned) == 256
        assert sum(learned) >= 3
        at = 0
        while at < 256:
            if not learned[at]:
                at += 1
                continue
            end = next((i for i in range(at, 256) if not learned[i]), 256)
            before, answer = tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:end])
            start = max(before.rfind(form) for form in forms)
            question = before[start:]
            assert question + answer + "." in before[:start]
            at = end


def test_windows_follow_the_seed(windows, tokenizer) -> None:
    def drawn(seed: int):
        words = [word for word, _ in windows.words]
        return Windows(windows.tokens, words, tokenizer, seed).batch(2, 128, 4)

    for a, b in zip(drawn(1), drawn(1), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn(1)[0], drawn(2)[0])


def test_windows_grow_up_to_the_context() -> None:
    assert [stage(part, 1024)[0] for part in (0, 0.3, 0.6, 0.9)] == [128, 256, 512, 1024]
    assert [stage(part, 256)[0] for part in (0, 0.3, 0.6, 0.9)] == [128, 256, 256, 256]


def test_a_model_is_trained_and_saved(tmp_path, capsys) -> None:
    options = ["--tokenizer", str(MODEL), "--context", "128", "--batch-tokens", "256"]
    output = ["--output", str(tmp_path / "model"), "--every", "10"]
    train_recall.main(["--text", str(SAMPLED), "--steps", "20", *options, *output])
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 128


def test_missing_text_is_named(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*absent does not exist"):
        train_recall.main(["--text", "absent", "--output", str(tmp_path / "model")])
