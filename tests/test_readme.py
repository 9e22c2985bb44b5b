"""What the README shows runs, and CI runs what the README says."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


CARD = (ROOT / "examples" / "books-7m" / "README.md").read_text(encoding="utf-8")


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, flags=re.DOTALL)


def test_every_python_snippet_runs(tmp_path, monkeypatch, capsys) -> None:
    """In order, in one session, in a copy of the folder they name."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) >= 6
    namespace: dict = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), namespace)
    output = capsys.readouterr().out
    assert "It was a dark night, and" in output
    assert "bits per number" in output
    assert "torch.Size([1, 8, 100, 48]) torch.uint8" in output


def test_the_model_card_shows_what_runs(monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    for snippet in blocks("python", CARD):
        exec(compile(snippet, "model card", "exec"), {})
    assert "The lady of the house" in capsys.readouterr().out


def test_ci_runs_the_test_command() -> None:
    run, test = blocks("bash")
    assert "examples.generate" in run
    assert test.strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_public_files_name_no_machine() -> None:
    for path in [ROOT / "README.md", *ROOT.glob("evals/results/*"), *ROOT.glob("examples/*/*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/root/|shared/data", text), path
