"""The examples do what they say."""

from __future__ import annotations

import re

import pytest

from examples import generate, sample_text
from tests.conftest import MODEL, ROOT


def test_generate_streams_and_prints_the_table(capsys) -> None:
    generate.main(
        ["--prompt-tokens", "300", "--length", "320", "--max-new-tokens", "12",
         "--dtype", "float32", "--presets", "k2v2", "k8v8"]
    )  # fmt: skip
    output = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if re.match(r"\| (k\dv\d|ordinary)", line)
    ]
    assert [row[0] for row in rows] == ["ordinary (DynamicCache)", "k2v2", "k8v8"]
    ordinary, two, eight = rows
    # 8 layers, 2 heads of 64, keys and values, float32, all but the last of 312 tokens
    assert ordinary[1] == f"{8 * 2 * 64 * 2 * 4 * 311:,}"
    assert ordinary[2] == "1.00x"
    assert float(two[2][:-1]) > float(eight[2][:-1]) > 1
    assert eight[4] == "12 of 12 tokens"
    assert float(two[6]) > float(eight[6])
    assert "quantised tokens alone" in output


def test_a_missing_prompt_file_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--prompt-file", "absent.txt"])
    assert "there is no file absent.txt" in capsys.readouterr().err


def test_sampled_texts_are_the_models(tmp_path, tokenizer) -> None:
    """The committed texts start with our openings, and the command makes such texts."""
    for name, opening in sample_text.OPENINGS.items():
        text = (ROOT / "examples" / "sampled" / f"{name}.txt").read_text(encoding="utf-8")
        assert text.startswith(opening)
        assert len(tokenizer(text).input_ids) > 1500
    sample_text.main(["--model", str(MODEL), "--output", str(tmp_path), "--tokens", "30"])
    again = (tmp_path / "harbour.txt").read_text(encoding="utf-8")
    committed = (ROOT / "examples" / "sampled" / "harbour.txt").read_text(encoding="utf-8")
    assert committed.startswith(again[: len(sample_text.OPENINGS["harbour"]) + 40])


@pytest.mark.parametrize(
    ("option", "value"), [("--model", "no/such/model"), ("--device", "absent-device")]
)
def test_what_cannot_be_loaded_is_named(option: str, value: str) -> None:
    with pytest.raises(SystemExit, match=value):
        generate.main([option, value])
