"""What the cache does with one family, measured: the cells of its row."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.attention import dispatch
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer
from tests.families.building import NotBuiltError, build
from tests.helpers.lossless import lossless
from tests.helpers.models import feed, prompt, relative_error
from tests.helpers.writing import NEW, PROMPT, WAYS, Written

ATTENTION = ("sdpa", "rotorquant", "eager")
TEXTS = ("greedy", "beams", "crop", "assisted", "padding")

YES, NO, NONE = "✓", "✗", "–"
WHOLE, BOTH = "○", "◐"

_IN_WORDS = {
    "does not support an attention implementation": "Transformers has no such attention for it",
    "KeyError: 'rotorquant'": "its code has classes for its own attention, and takes no other",
    "does not compute sinks": "has a sink for every query, which only eager attention computes",
    "not supported with stateful models": "Transformers does not assist models that have states",
    "['past_key_values']": "generation hands it a cache of another name",
}
"""Parts of errors that many families raise, and what is said of them."""

_SMALL = {"residual_length": 4, "statistics_length": 0, "block_length": 2}
_CHUNKS = (20, 1, 1, 3)  # after the first, all read packed tokens
_TOLERANCE = 1e-4  # of logits: float32 leaves 1e-6 at most


@dataclass(frozen=True)
class Cell:
    """A mark, and why it is no better."""

    mark: str
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured of a family, by column."""

    family: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks, in the order of the columns."""
        return tuple(cell.mark for cell in self.cells.values())


def measure(family: str) -> Row:
    """Measure a family.

    Raises:
        NotBuiltError: with the reason.
    """
    attention = {name: _attention(family, name) for name in ATTENTION}
    first = "sdpa" if attention["sdpa"].mark != NONE else "eager"
    model = build(family, first)
    cache = _quietly(lambda: _filled(model))
    compressed = _compresses(cache)
    cells = {"layers": _layers(cache.layers), "bits": _bits(cache) if compressed else Cell(NONE)}
    cells |= attention
    cells |= {way: _text(model, way, compressed) for way in TEXTS}
    return Row(family, cells)


def _filled(model: Any) -> RotorQuantCache:
    """A cache that has read a text: only then is it known which layers can be compressed."""
    cache = RotorQuantCache("k3v3", config=model.config, **_SMALL)
    feed(model, cache, prompt(2, 40), (40,))
    return cache


def _compresses(cache: RotorQuantCache) -> bool:
    return any(isinstance(layer, RotorQuantLayer) for layer in cache.layers)


def _layers(layers: list[Any]) -> Cell:
    """Compressed layers of those that hold something, and the kind of each."""
    held = [layer for layer in layers if type(layer).__name__ != "DummyLayer"]
    ours = sum(isinstance(layer, RotorQuantLayer) for layer in held)
    kinds = [_kind(layer) for layer in held]
    runs = sorted(set(kinds), key=kinds.index)
    return Cell(f"{ours}/{len(held)} {' '.join(runs)}")


def _kind(layer: Any) -> str:
    if not isinstance(layer, RotorQuantLayer):
        return "own"
    kind = "sliding" if layer.is_sliding else "full"
    return f"hybrid-{kind}" if isinstance(layer, RotorQuantHybridLayer) else kind


def _quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return call()


def _bits(cache: RotorQuantCache) -> Cell:
    """Bits of a packed element, scales included."""
    report = cache.memory()
    if not report.packed_numbers:
        return Cell(NO, "nothing was packed")
    return Cell(f"{8 * report.packed_bytes / report.packed_numbers:.2f}")


def _or_reason(call: Callable[[], Cell], mark: str) -> Cell:
    """A cell, or one of `mark` with the error as its reason."""
    try:
        return call()
    except NotBuiltError:
        raise
    except Exception as error:
        return Cell(mark, _in_short(error))


def _in_short(error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    known = (words for pattern, words in _IN_WORDS.items() if pattern in text)
    return next(known, f"`{text[:70]}`")


def _attention(family: str, attention: str) -> Cell:
    """Whether attention of a kind reads codes, or the cache is dequantised for it."""
    try:
        model = build(family, attention)
    except NotBuiltError:
        raise
    except (ValueError, KeyError, ImportError) as error:
        return Cell(NONE, _in_short(error))

    def call() -> Cell:
        chunks, ids = _CHUNKS, prompt(2, sum(_CHUNKS))
        if not _compresses(RotorQuantCache(config=model.config)):
            return Cell(NONE)
        try:
            expected = feed(model, DynamicCache(config=model.config), ids, chunks)
        except Exception as error:
            return Cell(NONE, _in_short(error))
        with lossless():
            cache = RotorQuantCache(config=model.config, **_SMALL)
            with _counted() as reads:
                logits = feed(model, cache, ids, chunks)
        if not relative_error(logits, expected) < _TOLERANCE:
            return Cell(NO, f"other logits, by {relative_error(logits, expected):.1g}")
        where = f"`{reads.dequantised_by}`" if reads.dequantised_by else ""
        if not reads.codes:
            noted = "" if attention == "eager" else where
            return Cell(WHOLE, noted) if where else Cell(NO, "packed tokens are not read")
        return Cell(BOTH, where) if where else Cell(YES)

    return _or_reason(lambda: _quietly(call), NO)


@dataclass
class _Reads:
    """How often packed tokens were read as codes, and a line of the model that dequantised them."""

    codes: int = 0
    dequantised_by: str = ""


@contextmanager
def _counted() -> Iterator[_Reads]:
    """What attention does within."""
    reads = _Reads()
    materialize = CompressedTensor.materialize

    def counting(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attending(*args: Any) -> Tensor:
            reads.codes += 1
            return attend(*args)

        return attending

    def materializing(x: CompressedTensor) -> Tensor:
        if x.packed_states is not None and not reads.dequantised_by:
            reads.dequantised_by = _line_of_transformers()
        return materialize(x)

    with (
        mock.patch.object(dispatch, "attend_native", counting(dispatch.attend_native)),
        mock.patch.object(dispatch, "attend_tiled", counting(dispatch.attend_tiled)),
        mock.patch.object(CompressedTensor, "materialize", materializing),
    ):
        yield reads


def _line_of_transformers() -> str:
    """The innermost line of Transformers that is being run."""
    lines = [x.line for x in traceback.extract_stack() if "/transformers/" in x.filename]
    return str(lines[-1])


def _text(model: Any, way: str, compressed: bool) -> Cell:
    """Whether a way of writing gives what it gives with `DynamicCache`."""

    def write(cache: Any) -> Written:
        return WAYS[way](model, cache)

    def call() -> Cell:
        try:
            expected = write(DynamicCache(config=model.config))
        except Exception as error:
            return Cell(NONE, _in_short(error))
        if way == "crop" and not _is_had_back(model, expected):
            return Cell(NONE, "a recurrent state is not had back")
        with lossless():
            found = write(RotorQuantCache(config=model.config, **_SMALL))
            if compressed and not found.cache.memory().packed_numbers:
                return Cell(NO, "nothing was packed")
        if not torch.equal(found.tokens, expected.tokens):
            return Cell(NO, "other tokens")
        off = relative_error(found.logits, expected.logits)
        return Cell(YES) if off < _TOLERANCE else Cell(NO, f"other logits, by {off:.1g}")

    return _or_reason(lambda: _quietly(call), NO)


def _is_had_back(model: Any, cropped: Written) -> bool:
    """Whether the cropped cache was as one that never read what was cropped.

    By its own word, and by what it gave. (A recurrent state of a tiny model forgets quickly.)
    """
    if not getattr(cropped.cache, "is_croppable", True):
        return False
    left = prompt(2, PROMPT)[:, : PROMPT - NEW]
    ids = torch.cat((left, prompt(2, 2 * NEW, seed=1)), dim=1)
    start = left.shape[1]
    anew = feed(model, DynamicCache(config=model.config), ids, (start, NEW) + (1,) * NEW)[:, start:]
    return relative_error(cropped.logits, anew) < _TOLERANCE
