"""What is installed is what is here: packages, their data, the command."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_folder_with_code_is_a_package_that_is_installed() -> None:
    """`evals/tasks` is data: lm-eval reads its files by their paths."""
    found = []
    for folder, name in (("rotorquant_hf", "rotorquant_hf"), ("evals", "rotorquant_evals")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).parent.parts
            if inside[:1] != ("tasks",):
                found.append(".".join((name, *inside)))
                assert path.with_name("__init__.py").is_file(), path
    assert set(SETUPTOOLS["packages"]) == set(found)


def test_data_files_are_named() -> None:
    """All that is neither code, nor a result, nor the manual travels in the wheel."""
    for folder, name in (("rotorquant_hf", "rotorquant_hf"), ("evals", "rotorquant_evals")):
        named = {
            path for pattern in SETUPTOOLS["package-data"][name]
            for path in (ROOT / folder).glob(pattern)
        }  # fmt: skip
        for pattern in SETUPTOOLS["package-data"][name]:
            assert list((ROOT / folder).glob(pattern)), pattern
        for path in (ROOT / folder).rglob("*"):
            skipped = (
                path.suffix in (".py", ".pyc", ".md", ".c", ".h", ".so") or "results" in path.parts
            )
            if path.is_file() and not skipped:
                assert path in named, path


def test_the_harness_runs_under_its_installed_name(tmp_path) -> None:
    """As installed, the folder is `rotorquant_evals`: nothing inside may say `evals`."""
    (tmp_path / "rotorquant_evals").symlink_to(ROOT / "evals")
    (tmp_path / "rotorquant_hf").symlink_to(ROOT / "rotorquant_hf")
    script = PYPROJECT["project"]["scripts"]["rotorquant"]
    module, function = script.split(":")
    code = f"import sys; from {module} import {function}; {function}(['caches']); "
    code += "sys.exit('evals' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "presets of rotorquant: k8v8" in done.stdout
