"""Packages beyond the base install, asked for before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import NotAvailableError
from .places import clone

_EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "gguf", "lm-eval", "scipy"), "eval"),
    **dict.fromkeys(("adjusttext", "jinja2", "matplotlib", "pandas"), "eval"),
    **dict.fromkeys(("hqq", "optimum-quanto"), "peers"),
    "pytest": "dev",
    "triton": "triton",
}
_MODULES = {
    "adjusttext": "adjustText",
    "llama-cpp-python": "llama_cpp",
    "lm-eval": "lm_eval",
    "optimum-quanto": "optimum.quanto",
}


def require_packages(purpose: str, packages: Iterable[str]) -> None:
    """Refuse work whose packages are not all installed.

    Args:
        purpose: what needs them, for the message.
        packages: their names on PyPI.

    Raises:
        NotAvailableError: naming every missing package and the command that installs it.
    """
    found = missing(packages)
    if found:
        are = "is" if len(found) == 1 else "are"
        raise NotAvailableError(
            f"{purpose} needs {', '.join(found)}, which {are} not installed: {install(found)}"
        )


def packages_of(*parts: Any) -> list[str]:
    """What options and caches need: their `packages`, if they have any, each once."""
    return list(dict.fromkeys(name for part in parts for name in getattr(part, "packages", ())))


def missing(packages: Iterable[str]) -> list[str]:
    """Those of some packages that are not installed."""
    return [name for name in packages if not _installed(_MODULES.get(name, name))]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent package is not installed
        return False


def install(packages: Iterable[str]) -> str:
    """The command that installs packages: by the extras that hold them, in a clone or from PyPI."""
    names = list(packages)
    if not all(name in _EXTRAS for name in names):
        return f"pip install {' '.join(names)}"
    extras = ",".join(sorted({_EXTRAS[name] for name in names}))
    root = clone()
    if root is None:
        return f"pip install 'rotorquant-hf[{extras}]'"
    return f"pip install -e '{'.' if root == Path.cwd() else root}[{extras}]'"
