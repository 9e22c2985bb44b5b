"""Is the cache read, and is anything compressed? Else its figures say nothing.

A cache that keeps full-precision copies beside its codes shows no loss and saves nothing; one that
quantises nothing shows no loss either. So the stored codes are scrambled, of the keys and of the
values of one layer after the other, and the model must notice each.

To notice, no whole pass is needed: one pass notes what calls each layer's attention, and the same
call is then made once more with the codes of its layer scrambled. Only where that leaves the
attention's output as it was does a whole pass decide, by the logits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..caches.registry import kind_of
from ..caches.tensors import tensors_in
from .attention_calls import AttentionCall, read_and_note
from .chunked import feed, read
from .footprint import footprint, reachable_bytes

_SLACK = 1.01  # of the bytes that a cache reports; small state is not in every report
_PROBE = 8  # tokens that read the scrambled codes


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
    text, rest = ids[:, :start], ids[:, start : start + _PROBE]
    counted, reachable = footprint(cache, model.dtype), reachable_bytes(cache)
    held, quantised = counted.elements
    tokens, found = text.shape[1], []
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
        unread = list(_unread(model, text, rest, make_cache, chunk, cache))
        if unread:
            more = f" and {len(unread) - 4} more" if len(unread) > 4 else ""
            found.append(
                f"stored codes are not read ({', '.join(unread[:4])}{more}): the model gives the "
                "same logits when they are scrambled, so these figures flatter the cache"
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
    text: Tensor,
    rest: Tensor,
    make_cache: Callable[[], Cache],
    chunk: int,
    cache: Cache,
) -> Iterator[str]:
    """Layers and parts whose codes do not change the logits; `cache` holds `text`."""

    def filled() -> Cache:
        copied = _copy_of(cache)
        if copied is None:
            copied = make_cache()
            feed(model, text, copied, chunk)
        return copied

    def scrambled(index: int, part: str) -> Cache:
        probed = filled()
        for codes in kind.codes(probed.layers[index])[part]:
            codes.view(torch.uint8).bitwise_xor_(0x55)
        return probed

    kind = kind_of(cache)
    expected, calls = read_and_note(model, rest, filled())
    for index, layer in enumerate(cache.layers):
        parts = kind.codes(layer)
        call = _sound(calls.get(index), filled) if parts else None
        for part in parts:
            if call is not None and not call.gives_the_same(scrambled(index, part)):
                continue
            if torch.equal(expected, read(model, rest, scrambled(index, part))):
                yield f"{part} of layer {index}"


def _copy_of(cache: Cache) -> Cache | None:
    """A copy that shares no memory with the cache, which is being measured; None if none is had."""
    try:
        copied = copy.deepcopy(cache)
    except Exception:  # deepcopy may be unsupported
        return None
    ours, theirs = (
        {x.data_ptr() for x in tensors_in(each.layers, modules=False) if x.numel()}
        for each in (cache, copied)
    )
    return copied if ours.isdisjoint(theirs) else None


def _sound(call: AttentionCall | None, filled: Callable[[], Cache]) -> AttentionCall | None:
    """The call, if making it once more gives what it gave, so that a change means the codes."""
    try:
        return call if call is not None and call.gives_the_same(filled()) else None
    except Exception:  # not to be called alone: a whole pass decides
        return None
