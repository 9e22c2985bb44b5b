"""The package stands as it is drawn: tiers, no cycles, few dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.imports import TIERS, cycles, levels, read_package

ROOT = Path(__file__).parent.parent
PACKAGE = read_package(ROOT / "rotorquant_hf")
HARNESS = read_package(ROOT / "evals")

# These modules are made of Triton's functions; nothing imports them before a kernel is launched.
TRITON_PARTS = (
    "rotorquant_hf.kernels",
    "rotorquant_hf.attention.triton_attention",
    "rotorquant_hf.store.kernel_statistics",
)
# Examples that train or draw read texts as the harness does; the others can be copied out.
COPIED = ("fetch_smollm2", "generate", "how_it_works", "sample_text")
WITH_HARNESS = ("text_data", "train_model", "train_recall")

# Modules of the harness that an extra is the point of; commands ask for it before they import them.
NEEDS_EXTRA = ("evals.lm_eval.model", "evals.report")


def test_every_part_has_a_tier() -> None:
    assert sorted(part for parts in TIERS for part in parts) == sorted(PACKAGE.parts)


def test_imports_run_downward() -> None:
    assert PACKAGE.upward(TIERS) == set()


def test_the_package_has_no_cycles() -> None:
    assert cycles(PACKAGE.parts) == []
    assert cycles(PACKAGE.modules) == []


def test_the_harness_has_no_cycles() -> None:
    assert cycles(HARNESS.parts) == []


def test_nothing_below_the_layers_knows_transformers_but_the_registration() -> None:
    below = [part for parts in TIERS[:4] for part in parts]
    knowing = [
        path.stem
        for part in below
        for path in (ROOT / "rotorquant_hf").glob(f"{part}/*.py")
        if "import transformers" in (text := path.read_text()) or "from transformers" in text
    ]
    assert knowing == ["registered"]


def test_a_planted_cycle_is_found(tmp_path: Path) -> None:
    """Imports in functions, under TYPE_CHECKING and relative ones count."""
    files = {
        "__init__.py": "from .roof import top",
        "roof.py": "import json\nfrom package.low import stone\n",
        "low/__init__.py": "",
        "low/stone.py": "def f():\n    from .. import roof\n",
        "low/sand.py": "if TYPE_CHECKING:\n    from .stone import f\n",
        "attic.py": "import package.low.sand as s\n",
    }
    for name, text in files.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = read_package(tmp_path / "package")
    assert package.dependencies == {
        ("package", "roof"),
        ("roof", "low"),
        ("low", "roof"),
        ("attic", "low"),
    }
    assert package.modules["package.low.sand"] == {"package.low.stone"}
    assert cycles(package.parts) == [["low", "roof"]]
    assert cycles(package.modules) == [["package.low.stone", "package.roof"]]
    assert levels(package.parts) == {"low": 1, "roof": 1, "package": 2, "attic": 2}
    assert package.upward([["low"], ["roof"], ["attic", "package"]]) == {("low", "roof")}


IMPORT_WITHOUT = """
import importlib, importlib.metadata as metadata, re, sys

def closure(names):
    found = set()
    while names:
        name = re.sub("[-_.]+", "-", names.pop()).lower()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            names += [re.match("[A-Za-z0-9._-]+", x)[0] for x in required if "extra ==" not in x]
    return found

found, modules = set(sys.argv[1].split(",")), sys.argv[2:]
allowed = closure(["torch", "transformers", "safetensors"]) | {"rotorquant-hf"} | found
hidden = {
    top
    for top, owners in metadata.packages_distributions().items()
    if not allowed & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}
}
hidden |= {"evals", "rotorquant_evals", "triton"} - found
assert "pytest" in hidden, hidden  # it is here, and not to be needed

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hide = name.partition(".")[0] in hidden
        return None if hide else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in modules:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, repr(error))
for name in sorted(hidden & set(sys.modules)):
    print("imported", name)
"""


def failures_of(modules: list[str], *found: str) -> list[str]:
    """What goes wrong in importing modules where nothing but the base dependencies is found.

    Args:
        found: what is found besides: "triton", "evals".
    """
    command = [sys.executable, "-c", IMPORT_WITHOUT, ",".join(found), *modules]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_the_package_needs_nothing_but_its_dependencies() -> None:
    plain = [name for name in PACKAGE.modules if not name.startswith(TRITON_PARTS)]
    assert failures_of(plain) == []
    kernels = [name for name in PACKAGE.modules if name not in plain]
    assert failures_of(kernels, "triton") == []


def test_examples_need_nothing_else_either() -> None:
    every = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__"}
    assert every == {*COPIED, *WITH_HARNESS}
    assert failures_of([f"examples.{name}" for name in COPIED]) == []
    assert failures_of([f"examples.{name}" for name in WITH_HARNESS], "evals") == []


def test_the_harness_is_imported_without_its_extras() -> None:
    """So that a command can say what is missing."""
    modules = [name for name in HARNESS.modules if not name.startswith(NEEDS_EXTRA)]
    assert len(modules) > 50
    assert failures_of(modules, "evals") == []
