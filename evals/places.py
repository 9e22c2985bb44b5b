"""Where the harness is, how it was called, and the files that come with its clone.

The folder is `evals` in a clone and is installed as `rotorquant_evals`; both names, and the script
`rotorquant`, run the same commands.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .errors import require

PACKAGE = __name__.split(".")[0]
SCRIPT = "rotorquant"
_STARTED_AS = Path(sys.argv[0]).stem  # read once: lm-eval's command line replaces sys.argv
_ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = ("examples", "configs")  # folders of the clone that commands name


def called() -> str:
    """The command that started the harness, without its arguments."""
    return SCRIPT if _STARTED_AS == SCRIPT else f"python -m {PACKAGE}"


def clone() -> Path | None:
    """The clone that this harness belongs to; None for an installed copy."""
    return _ROOT if (_ROOT / "pyproject.toml").is_file() else None


def shipped(path: str) -> str:
    """The path itself, or the clone's file that it names: `examples/...` works from any folder.

    Args:
        path: of a file or folder, or a model's name on the Hub.

    Raises:
        InputError: if it begins with `examples/` or `configs/` and is in neither place.
    """
    folder = Path(path).parts[0] if Path(path).parts else ""
    if folder not in _SHIPPED or Path(path).exists():
        return path
    root = clone()
    why = "which has no such file" if root else "and this is an installed copy"
    require(
        root is not None and (root / path).exists(),
        f"{path} is not here: {folder}/ comes with the clone of rotorquant_hf, {why}; name a path "
        "of your own",
    )
    return str(_ROOT / path)
