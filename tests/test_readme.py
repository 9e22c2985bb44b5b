"""What the README shows runs, and CI runs what the README says."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from evals import commands as commands_
from evals.__main__ import parser
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


CARDS = {
    name: (ROOT / "examples" / name / "README.md").read_text(encoding="utf-8")
    for name in ("books-7m", "recall-1m")
}


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


@pytest.mark.parametrize(
    ("name", "says"),
    [("books-7m", "The lady of the house"), ("recall-1m", "of the soldier is river")],
)
def test_the_model_cards_show_what_runs(monkeypatch, capsys, name, says) -> None:
    monkeypatch.chdir(ROOT)
    for snippet in blocks("python", CARDS[name]):
        exec(compile(snippet, "model card", "exec"), {})
    assert says in capsys.readouterr().out


def commands(document: str) -> list[list[str]]:
    """The commands of the harness in a document, without their module."""
    lines = re.findall(r"^(?:    )?python -m evals (.*)$", document, flags=re.MULTILINE)
    return [shlex.split(line.split("#")[0]) for line in lines]


@pytest.mark.parametrize(
    "argv",
    commands(README) + commands(CARDS["books-7m"]),
    ids=lambda argv: " ".join(argv)[:40],
)
def test_commands_of_the_harness_are_such(argv) -> None:
    args = parser().parse_args(argv)
    if argv[0] == "sweep":
        assert (ROOT / args.config).is_file()
    if "cache" in args:
        commands_.cache_of(args)


def test_ci_runs_the_test_command() -> None:
    run, test = blocks("bash")
    assert "examples.generate" in run
    assert test.strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_public_files_name_no_machine() -> None:
    for path in [
        ROOT / "README.md",
        *ROOT.glob("evals/results/**/*.*"),
        *ROOT.glob("examples/*/*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/root/|shared/data", text), path
