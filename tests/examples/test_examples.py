"""The examples do what they say."""

from __future__ import annotations

import ast
import re

import pytest

from examples import generate, sample_text
from tests.conftest import MODEL, ROOT


def test_generate_streams_and_says_what_was_saved(capsys) -> None:
    generate.main(["--preset", "k3v3", "--prompt-tokens", "300", "--max-new-tokens", "12"])
    output = capsys.readouterr().out
    assert output.startswith("[...] ")
    # 8 layers, 2 heads of 64, keys and values, bfloat16, all but the last of 312 tokens
    uncompressed = 8 * 2 * 64 * 2 * 2 * 311
    total = int(re.search(r"^total +([\d,]+)", output, re.M)[1].replace(",", ""))
    assert total < uncompressed
    assert f"k3v3 saved {uncompressed - total:,} of {uncompressed:,} bytes, at 311 tokens" in output
    assert "quantised tokens alone: 4.92x" in output


def test_generate_says_where_nothing_was_quantised(capsys) -> None:
    generate.main(["--prompt", "Hello", "--max-new-tokens", "3"])
    output = capsys.readouterr().out
    assert "Nothing was quantised: all tokens are recent ones" in output
    assert "long texts come near" not in output


def test_generate_can_be_copied_out() -> None:
    """It imports nothing of this repository but the package."""
    source = (ROOT / "examples" / "generate.py").read_text(encoding="utf-8")
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"argparse", "pathlib", "torch", "transformers", "rotorquant_hf"}


def test_a_missing_prompt_file_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--prompt-file", "absent.txt"])
    assert "--prompt-file absent.txt: no such file" in capsys.readouterr().err


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


def test_a_model_that_cannot_be_loaded_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--model", "no/such/model"])
    assert "--model no/such/model: " in capsys.readouterr().err
