"""Is the cache read, and is anything compressed? Else its figures say nothing.

A cache that keeps full-precision copies beside its codes shows no loss and saves nothing; one that
quantises nothing shows no loss either. So the stored codes are scrambled, of the keys and of the
values of one layer after the other, and the model must notice each.

To notice, no whole pass is needed: one pass notes what calls each layer's attention, and the same
call is then made once more with the codes of its layer scrambled. Only where that leaves the
attention's output as it was does a whole pass decide, by the logits. All calls read copies
(`copies.py`): the cache that is being measured stays as it is. Codes that the model itself would
not read where it is probed (`model_reads.py`) are probed again at earlier places of the text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..caches.registry import kind_of
from .attention_calls import AttentionCall, read_and_note
from .chunked import feed, read
from .copies import Copies
from .footprint import footprint, reachable_bytes
from .model_reads import ModelReads, Stored

_SLACK = 1.01  # of the bytes that a cache reports; small state is not in every report
_PROBE = 8  # tokens that read the scrambled codes
_PLACES = (7, 6, 5, 4)  # eighths of the text after which codes unread at its end are probed again


def warnings_of(
    model: PreTrainedModel, ids: Tensor, make_cache: Callable[[], Cache], chunk: int
) -> list[str]:
    """What is wrong with a compressed cache, in sentences; empty if nothing is.

    Args:
        model: in evaluation mode.
        ids: a text (1, tokens).
        make_cache: makes an empty cache.
        chunk: tokens per pass.
    """
    cache = make_cache()
    probe = min(_PROBE, ids.shape[1] // 2)
    text = ids.shape[1] - probe
    feed(model, ids[:, :text], cache, chunk)
    return warnings_of_filled(model, ids, text, cache, make_cache, chunk)


def warnings_of_filled(
    model: PreTrainedModel,
    ids: Tensor,
    start: int,
    cache: Cache,
    make_cache: Callable[[], Cache],
    chunk: int,
) -> list[str]:
    """`warnings_of` a cache that has taken the first `start` tokens of a text; it stays as it is.

    Args:
        model, ids, make_cache, chunk: as in `warnings_of`.
        start: at least 1, and less than the tokens of the text.
        cache: filled in passes of at most `chunk` tokens.
    """
    counted, reachable = footprint(cache, model.dtype), reachable_bytes(cache)
    held, quantised = counted.elements
    tokens, found = start, []
    if cache.get_seq_length() != tokens:
        found.append(
            f"the cache holds {cache.get_seq_length()} tokens, but {tokens} went through the "
            "model: it is not used"
        )
    if not quantised:
        found.append(_nothing_quantised(cache, tokens))
    elif not any(kind_of(cache).codes(layer) for layer in cache.layers):
        found.append("the cache says that tokens are quantised, but stores no codes")
    else:
        unread = _unread(model, ids, start, cache, make_cache, chunk)
        if unread:
            more = f" and {len(unread) - 4} more" if len(unread) > 4 else ""
            found.append(
                f"stored codes are not read ({', '.join(map(str, unread[:4]))}{more}): the model "
                "gives the same logits when they are scrambled, so these figures flatter the cache"
            )
    uncompressed = held * model.dtype.itemsize
    if quantised and counted.total_bytes >= uncompressed:
        found.append(
            f"nothing is saved: the cache takes {counted.total_bytes:,} bytes, uncompressed it "
            f"would take {uncompressed:,}"
        )
    if reachable > _SLACK * counted.total_bytes:
        found.append(
            f"the cache reports {counted.total_bytes:,} bytes, but holds tensors of {reachable:,}"
        )
    return found


NOTHING_COMPRESSED = (
    "nothing was compressed: all tokens were in the full-precision window; measure longer contexts"
)


def _nothing_quantised(cache: Cache, tokens: int) -> str:
    if kind_of(cache).tokens_until_change(cache) < sys.maxsize:
        return (
            f"nothing is compressed after {tokens} tokens: the full-precision window holds them "
            "all; measure longer texts"
        )
    return f"nothing is compressed after {tokens} tokens: the cache has no compressed layer"


def _unread(
    model: PreTrainedModel,
    ids: Tensor,
    start: int,
    cache: Cache,
    make_cache: Callable[[], Cache],
    chunk: int,
) -> list[Stored]:
    """What is stored quantised and not read, at any place where the model would notice it."""

    def filled(tokens: int) -> Cache:
        made = make_cache()
        feed(model, ids[:, :tokens], made, chunk)
        return made

    def unread_at(tokens: int, held: Cache, of: list[Stored]) -> tuple[list[Stored], list[Stored]]:
        """What is not read after some tokens; of it, what the model itself does not read there."""
        text, rest = ids[:, :tokens], ids[:, tokens : tokens + _PROBE]
        plain = ModelReads(model, text, rest)
        found = list(_unnoticed(model, rest, held, lambda: filled(tokens), of))
        spans = {x: kind_of(held).span(held.layers[x.layer]) for x in found}
        blind = [x for x in found if not plain.notices(x, spans[x])]
        return [x for x in found if x not in blind], blind

    unread, blind = unread_at(start, cache, _stored(cache))
    for eighths in _PLACES:
        tokens = start * eighths // 8
        if not blind or not tokens:
            break
        held = filled(tokens)
        there = [x for x in blind if x in _stored(held)]
        more, still = unread_at(tokens, held, there)
        unread += more
        blind = [x for x in blind if x not in there or x in still]
    return sorted([*unread, *blind], key=lambda x: x.layer)


def _stored(cache: Cache) -> list[Stored]:
    codes = kind_of(cache).codes
    return [Stored(part, i) for i, layer in enumerate(cache.layers) for part in codes(layer)]


def _unnoticed(
    model: PreTrainedModel,
    rest: Tensor,
    cache: Cache,
    refilled: Callable[[], Cache],
    of: list[Stored],
) -> Iterator[Stored]:
    """What of a filled cache may be scrambled without a change of the logits of `rest`."""
    copies = Copies(cache, refilled)
    expected, calls = read_and_note(model, rest, copies.whole())
    for index in dict.fromkeys(x.layer for x in of):
        parts = [x.part for x in of if x.layer == index]
        call = calls.get(index)
        noticed = _noticed(call, index, parts, copies) if call is not None else set()
        for part in parts:
            if part in noticed:
                continue
            probed = scramble(copies.whole(), index, part)
            if torch.equal(expected, read(model, rest, probed)):
                yield Stored(part, index)


def scramble(cache: Cache, index: int, part: str) -> Cache:
    """The cache, whose codes of a part of a layer are others now."""
    for codes in kind_of(cache).codes(cache.layers[index])[part]:
        codes.view(torch.uint8).bitwise_xor_(0x55)
    return cache


def _noticed(call: AttentionCall, index: int, parts: list[str], copies: Copies) -> set[str]:
    """The parts of a layer that change what a call gives when they are scrambled.

    None if a call with the codes as they are, before or after, does not give what it gave: then a
    change may come of something else.
    """
    try:
        if not call.gives_the_same(copies.of(call.layers)):
            return set()
        changed = {
            part
            for part in parts
            if not call.gives_the_same(scramble(copies.of(call.layers), index, part))
        }
        return changed if call.gives_the_same(copies.of(call.layers)) else set()
    except Exception:  # not to be called alone: a whole pass decides
        return set()
