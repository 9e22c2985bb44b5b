"""What the README shows runs, and CI runs what the README says."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import rotorquant_hf
from evals import commands as commands_
from evals.__main__ import parser
from evals.options import from_arguments
from evals.verify import VerifyOptions
from rotorquant_hf import RotorQuantCache
from tests.conftest import ROOT
from tests.helpers import cuda_graph
from tests.helpers.models import narrow

README = (ROOT / "README.md").read_text(encoding="utf-8")
MANUAL = (ROOT / "evals" / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    "README.md": README,
    "evals/README.md": MANUAL,
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
}
RESULTS = [path.read_text(encoding="utf-8") for path in ROOT.glob("evals/results/*.md")]
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
    assert "bits per element" in output
    assert "torch.Size([1, 8, 100, 48]) torch.uint8" in output


def test_the_snippets_of_graphs_run(monkeypatch) -> None:
    """With the imports and names that snippets before them have brought."""
    generating, stepping = blocks("py")
    generating = generating.replace(": 200", ": 8")  # in Triton's interpreter a step is slow
    stepping = stepping.replace("range(100)", "range(8)")
    model = narrow("llama")
    prompt = torch.randint(1, model.config.vocab_size, (1, 300))
    if torch.cuda.is_available():
        model, prompt = model.cuda(), prompt.cuda()
    else:
        # Compiling is what tests/kernels/test_variants.py looks at; here it would compute.
        monkeypatch.setattr(rotorquant_hf, "warm_up", lambda model: None)
        on_gpu = cuda_graph.on_gpu(rotorquant_hf.decode_with_graph)
        monkeypatch.setattr(rotorquant_hf, "decode_with_graph", on_gpu)
    session = {"model": model, "prompt": prompt, "RotorQuantCache": RotorQuantCache}
    for snippet in (generating, stepping):
        if snippet is stepping and not torch.cuda.is_available():
            session["model"] = cuda_graph.OnGPU(model)
        with cuda_graph.decoding(monkeypatch, lambda: [session["cache"]]):
            exec(compile(snippet, "README's graphs", "exec"), session)
        assert session["cache"].get_seq_length() == 308 - (snippet is generating)
        assert cuda_graph.EmulatedGraph.captures > 0 or torch.cuda.is_available()
    assert session["output"].shape == (1, 308)


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
    commands(README) + commands(MANUAL) + commands(CARDS["books-7m"]),
    ids=lambda argv: " ".join(argv)[:40],
)
def test_commands_of_the_harness_are_such(argv) -> None:
    args = parser().parse_args(argv)
    if argv[0] == "sweep":
        assert (ROOT / args.config).is_file()
    if argv[0] == "verify":
        assert from_arguments(VerifyOptions, args).caches()
    elif "cache" in args:
        commands_.cache_of(args)


@pytest.mark.parametrize(
    "module",
    sorted(set(re.findall(r"python -m (evals\.[\w.]+)", "".join([README, MANUAL, *RESULTS])))),
)
def test_modules_named_as_commands_are_there(module: str) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert "def main(" in Path(found.origin).read_text(encoding="utf-8") or found.loader.is_package(
        module
    )


def test_ci_runs_the_commands_word_for_word() -> None:
    """CI takes them out of the README; what it takes is what stands there."""
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    take = re.search(r"readme_command\(\) \{.*?\n\}", run, re.S)[0]
    for number, block in enumerate(blocks("bash"), start=1):
        assert f'bash -euo pipefail -c "$(readme_command {number})"' in run
        taken = subprocess.run(
            ["bash", "-c", f"{take}; readme_command {number}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert taken == block
    first, second = blocks("bash")
    assert "-e . &&" in first
    assert first.rstrip().endswith("-m examples.generate")
    assert "pytest" in second


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("rotorquant_hf/quant/rotations.py", "Rotation ROTATIONS make_rotation"),
        ("rotorquant_hf/quant/quantizer.py", "Quantizer from_spec encode terms"),
        ("rotorquant_hf/quant/registry.py", "QUANTIZERS"),
        (
            "evals/caches/base.py",
            "Kind make cache_class elements quantised_states tokens_until_change period",
        ),
        ("evals/caches/__init__.py", "KINDS"),
        ("evals/measurements/base.py", "Measurement"),
        ("evals/measurements/registry.py", "MEASUREMENTS"),
    ],
)
def test_recipes_name_what_is_there(file: str, name: str) -> None:
    recipes = DOCUMENTS["CONTRIBUTING.md"]
    code = (ROOT / file).read_text(encoding="utf-8")
    assert file.removeprefix("rotorquant_hf/") in recipes
    for word in name.split():
        assert re.search(rf"\b{word}\b", code), word
        assert f"`{word}" in recipes or word == "MEASUREMENTS", word


LINKS = [
    (name, link)
    for name, document in DOCUMENTS.items()
    for link in re.findall(r"\]\(([^)#]+)\)", document)
]


@pytest.mark.parametrize(("name", "link"), LINKS, ids=lambda x: x)
def test_links_lead_somewhere(name: str, link: str) -> None:
    assert ((ROOT / name).parent / link).exists()


def test_public_files_name_no_machine() -> None:
    for path in [
        *ROOT.glob("*.md"),
        ROOT / "evals" / "README.md",
        *ROOT.glob(".github/**/*.yml"),
        *ROOT.glob("evals/results/**/*.*"),
        *ROOT.glob("examples/*/*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/root/|shared/data", text), path
