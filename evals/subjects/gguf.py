"""Models in one file (GGUF, as llama.cpp takes them), read by Transformers into plain models.

Such a file holds config, tokenizer and weights, most of these in blocks of a few bits. They are
dequantised as they are read, so that the model is one like any other, in the dtype asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError, first_line, require

PACKAGES = ("accelerate", "gguf")
"""What Transformers reads such files with."""

_MAGIC = b"GGUF"
_UNREADABLE = (OSError, ValueError, ImportError, LookupError, NotImplementedError, struct.error)
"""What its reader raises for a file that is cut off, damaged or of an unknown architecture."""


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, be it there or not."""
    path = Path(name)
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def refuse_revision(name: str, revision: str | None) -> None:
    """A file has no revisions, as models on the Hub have.

    Raises:
        InputError: if a GGUF file is named with one.
    """
    require(
        revision is None or not is_gguf(name),
        f"revision is {revision!r}, but {name} is a file: leave the revision out",
    )


def check(name: str) -> None:
    """Refuse, before any work, a file that is missing or of another kind.

    Raises:
        InputError: if it is.
    """
    path = Path(name)
    require(
        path.is_file(),
        f"no file {name}: name a GGUF file, a folder with a model, or a model on the Hub",
    )
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
    require(begin == _MAGIC, f"{name} is not a GGUF file: it does not begin with GGUF")


@contextmanager
def opened(name: str) -> Iterator[tuple[str, str]]:
    """A folder with nothing but the file in it, and the file's name there, as Transformers asks.

    Of files that lie beside it in its own folder Transformers would take the tokenizer first.

    Raises:
        InputError: if the file cannot be read, be it here or inside the block.
    """
    check(name)
    with TemporaryDirectory() as folder:
        link = Path(folder, Path(name).name)
        link.symlink_to(Path(name).resolve())
        try:
            yield folder, link.name
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(
                f"could not read {name}: name a whole GGUF file of an architecture that "
                f"Transformers knows, or a folder with the model ({first_line(error)})"
            ) from error


def read_model(name: str, **options: Any) -> PreTrainedModel:
    """The model of a GGUF file.

    Args:
        name: of the file.
        **options: of `from_pretrained`, such as `dtype`.

    Raises:
        InputError: if the file cannot be read, or lacks a part of the weights.
    """
    with opened(name) as (folder, file):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, output_loading_info=True, **dequantised(), **options
        )
    model, found = loaded
    lacking = sorted(found["missing_keys"])  # Transformers would draw them at random
    require(
        not lacking,
        f"{name} lacks {len(lacking)} of the model's weights, such as {' '.join(lacking[:1])}: "
        "merge a model in several files into one",
    )
    return plain(model)


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file.

    Raises:
        InputError: if the file cannot be read.
    """
    with opened(name) as (folder, file):
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def dequantised() -> dict[str, Any]:
    """The option of `from_pretrained` without which weights may stay in their blocks.

    Versions of Transformers that do not have it dequantise all of them.
    """
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its quantiser, which has done its work and would forbid other dtypes."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    return model
