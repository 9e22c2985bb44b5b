"""What ``train_model`` and ``perplexity`` share: books, tokenizers, token windows, the device."""

import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and END


class InputError(ValueError):
    """A value from the user that cannot be used; the message names it and the remedy."""


def require(condition: bool, problem: str) -> None:
    """Raises ``InputError(problem)`` unless the condition holds."""
    if not condition:
        raise InputError(problem)


class Book(NamedTuple):
    """One document: its file name, or number in a data set, and its text."""

    name: str
    text: str


def read_books(paths: Sequence[Path], exclude: Sequence[str] = ()) -> list[Book]:
    """The .txt files of folders, tar archives and single files, by name within each path.

    ``exclude`` holds shell patterns, matched with the file name and with the path inside its
    folder or archive. A pattern that matches nothing is an error: held-out text that slips into
    the training text through a misspelt name would never be noticed.
    """
    files = [file for path in paths for file in sorted(_files(path))]
    for pattern in exclude:
        used = any(_matches(name, pattern) for name, _ in files)
        require(used, f"--exclude {pattern!r} matches none of {len(files)} .txt files: correct it")
    kept = [file for file in files if not any(_matches(file[0], p) for p in exclude)]
    where = ", ".join(map(str, paths))
    left = f" outside --exclude {' '.join(exclude)}" if files else ""
    require(bool(kept), f"no .txt files in {where}{left}: name a folder or tar archive with some")
    return [Book(name, _decode(name, content)) for name, content in kept]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        yield from ((str(p.relative_to(path)), p.read_bytes()) for p in path.rglob("*.txt"))
    elif not path.is_file():
        raise InputError(f"{path} does not exist: name a folder, a .tar archive or a .txt file")
    elif tarfile.is_tarfile(path):
        yield from _members(path)
    elif path.suffix == ".txt":
        yield path.name, path.read_bytes()
    else:
        raise InputError(f"{path} is neither a folder, a tar archive nor a .txt file")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".txt") else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): fetch or pack it again") from error


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(Path(name).name, pattern)


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error}): convert it, or --exclude it") from error


def read_dataset(name: str, config: str | None, split: str, column: str) -> list[Book]:
    """The non-empty rows of a text column of a ``datasets`` data set, one document a row."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"--dataset {name} needs the datasets package: pip install datasets, or name a "
            "folder of .txt files with --text"
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--dataset {name} (configuration {config}, split {split}) does not load: {error}"
        ) from error
    columns = rows.column_names
    require(column in columns, f"--column {column!r} is not in {name}: choose from {columns}")
    books = [Book(f"row {i}", text) for i, text in enumerate(rows[column]) if text.strip()]
    require(bool(books), f"--column {column!r} of {name} holds no text: choose another")
    return books


def pick_device(name: str | None) -> torch.device:
    """The named device, or the accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator or torch.device("cpu")
    if name is None:
        return found
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        choices = " or ".join(dict.fromkeys([found.type, "cpu"]))
        raise InputError(f"--device {name} cannot be used here: choose {choices}") from error
    return device


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens; ``END`` is token 0."""
    require(
        vocab >= SMALLEST_VOCAB,
        f"--vocab {vocab} is too small: a byte-level tokenizer needs {SMALLEST_VOCAB} or more",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of a model."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer that loads: {error}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The tokens of one text, without special tokens around it: ``[tokens]``, int32."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(ids, dtype=np.int32)


def join(tokenizer: PreTrainedTokenizerBase, books: Iterable[Book]) -> np.ndarray:
    """All books as one stream, each followed by the end-of-text token: ``[tokens]``, int32."""
    marked = tokenizer.eos_token_id is not None
    require(
        marked, f"{tokenizer.name_or_path} has no end-of-text token: choose another --tokenizer"
    )
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    parts: list[np.ndarray] = []
    for book in tqdm(books, desc="tokens of the text", unit="book"):
        parts += encode(tokenizer, book.text), end
    return np.concatenate(parts)


def windows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The windows ``tokens[s : s + length]`` of all ``starts``: ``[starts, length]``, int64."""
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)
