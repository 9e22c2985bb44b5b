"""Texts to measure on: files, folders, archives, data sets; their tokens in windows."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, require
from ..options import flag, option
from ..places import shipped


class TooShortError(InputError):
    """A text with too few tokens to be measured on, or an option that leaves too few of it.

    Attributes:
        found: what has too few.
        remedy: what is to be done, before the tokens that it takes.
        one_window: whether it limits a window alone, and not the text in all.
    """

    def __init__(self, found: str, remedy: str, least: int, one_window: bool = False) -> None:
        self.found, self.remedy, self.one_window = found, remedy, one_window
        super().__init__(self.asking(least))

    def asking(self, least: int) -> str:
        """The message, where at least so many tokens are needed."""
        return f"{self.found}; {self.remedy} at least {least:,}"


class Document(NamedTuple):
    """One text: its file name, or what it is of a data set, and its characters."""

    name: str
    text: str


class Window(NamedTuple):
    """A stretch of a document.

    Attributes:
        name: the document's.
        start: its first token's place there.
        ids: token ids (1, tokens), with the beginning-of-text token that the tokenizer sets.
    """

    name: str
    start: int
    ids: Tensor


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how much of it."""

    text: tuple[str, ...] | None = option(None, "text files, folders of .txt files, tar archives")
    exclude: tuple[str, ...] | None = option(None, "patterns of files to leave out")
    dataset: str | None = option(None, "a name for the datasets package instead, such as wikitext")
    dataset_config: str | None = option(None, "its configuration, such as wikitext-2-raw-v1")
    split: str = option("test", "its split")
    column: str = option("text", "its column")
    max_tokens: int = option(8192, "tokens to read in all", min=2)
    window: int = option(
        2048, "tokens of a document, read with a new cache; at most the model's context", min=2
    )
    place: str = option(
        "start",
        "'start': the first windows of each text; 'spread': evenly over it",
        choices=("start", "spread"),
    )

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install."""
        return ("datasets",) if self.dataset is not None else ()

    def documents(self) -> list[Document]:
        """The documents they name.

        Raises:
            InputError: if there are none, or one cannot be read.
        """
        require(
            (self.text is None) != (self.dataset is None),
            "no text to measure on: give --text FILE... (or --dataset NAME, when online)"
            if self.text is None
            else "both --text and --dataset are given: choose one",
        )
        if self.text is not None:
            return read_texts([Path(shipped(path)) for path in self.text], self.exclude or ())
        assert self.dataset is not None
        rows = read_dataset(self.dataset, self.dataset_config, self.split, self.column)
        # Rows of WikiText and the like are lines of one text.
        return [Document(f"{self.dataset} {self.split}", "\n\n".join(row.text for row in rows))]


def read_texts(paths: Sequence[Path], exclude: Sequence[str] = ()) -> list[Document]:
    """The .txt files of folders and tar archives, and single files, by name within each path.

    `exclude` holds shell patterns, matched with the file name and with the path inside its
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
    return [Document(name, _decode(name, content)) for name, content in kept]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        files = (p for p in path.rglob("*.txt") if p.is_file())
        yield from ((str(p.relative_to(path)), p.read_bytes()) for p in files)
    elif not path.is_file():
        raise InputError(f"{path} does not exist: name a folder, a .tar archive or a text file")
    elif tarfile.is_tarfile(path):
        yield from _members(path)
    else:
        yield path.name, path.read_bytes()


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


def read_dataset(name: str, config: str | None, split: str, column: str) -> list[Document]:
    """The non-empty rows of a text column of a `datasets` data set, one document a row."""
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
    books = [Document(f"row {i}", text) for i, text in enumerate(rows[column]) if text.strip()]
    require(bool(books), f"--column {column!r} of {name} holds no text: choose another")
    return books


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The tokens of one text, without special tokens around it: (tokens,), int32."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(ids, dtype=np.int32)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer sets before a text: a BOS token, or none."""
    with_special = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    return with_special[: with_special.index(plain[0])] if plain else []


def cut(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    options: TextOptions,
    context: int | None,
    min_tokens: int,
) -> tuple[list[Window], int]:
    """Windows of the documents, `max_tokens` in all; they do not overlap.

    Every document gives a window before one gives its second. A document shorter than a window
    is taken whole, if it has more than `min_tokens`.

    Args:
        tokenizer: the model's.
        documents: to cut.
        options: how much.
        context: maximum tokens of the model, or None.
        min_tokens: documents of so many tokens or fewer are left out.

    Returns:
        The windows, and how many documents were left out as too short.

    Raises:
        InputError: if there is no text, or the model's context is too short; TooShortError: if no
            document is long enough, or `max_tokens` or `window` is too small.
    """
    length = min(options.window, options.max_tokens, context or options.window)
    begin = beginning(tokenizer)
    own = length - len(begin)
    tokens = [encode(tokenizer, document.text) for document in documents]
    longest = max(len(x) for x in tokens)
    names = ", ".join(document.name for document in documents)
    require(longest > 0, f"no text in {names}: the files are empty")
    least = min_tokens + 1 + len(begin)
    for name in ("max_tokens", "window"):
        value = getattr(options, name)
        if value < least:
            raise TooShortError(f"{flag(name)} is {value}", "set it to", least, name == "window")
    smaller = "a smaller --chunk, or " if hasattr(options, "chunk") else ""
    require(
        length >= least,
        f"the model takes {context} tokens, and {least} are needed: choose {smaller}another model",
    )
    if longest <= min_tokens:
        several = f"the longest of {len(tokens)} texts" if len(tokens) > 1 else "the text"
        raise TooShortError(f"{several} has {longest} tokens", "give", min_tokens + 1)
    fitting = [i for i, x in enumerate(tokens) if len(x) > min_tokens]
    counts = dict.fromkeys(fitting, 0)
    budget, lengths = options.max_tokens, {i: min(own, len(tokens[i])) for i in fitting}
    while budget > 0:
        before = budget
        for i in fitting:
            more = (counts[i] + 1) * lengths[i] <= len(tokens[i])
            size = lengths[i] + len(begin)
            # The last window may be cut short to keep to max_tokens.
            if more and (budget >= size or not any(counts.values())):
                counts[i] += 1
                budget -= size
        if budget == before:
            break
    windows = []
    for i, count in counts.items():
        room = len(tokens[i]) - count * lengths[i] if options.place == "spread" else 0
        for k in range(count):
            start = k * lengths[i] + (room * k // (count - 1) if count > 1 else 0)
            ids = [*begin, *tokens[i][start : start + lengths[i]].tolist()]
            windows.append(Window(documents[i].name, start, torch.tensor(ids).unsqueeze(0)))
    return windows, len(tokens) - len(fitting)
