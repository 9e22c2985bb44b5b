"""Is the cache read, and is anything compressed? Else its figures say nothing.

A cache that keeps full-precision copies beside its codes shows no loss and saves nothing; one that
quantises nothing shows no loss either. So the stored codes are scrambled, of the keys and of the
values of one layer after the other, and the model must notice each.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..caches.registry import kind_of
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
    text, rest = ids[:, :-probe], ids[:, -probe:]
    feed(model, text, cache, chunk)
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
        try:
            return copy.deepcopy(cache)
        except Exception:  # deepcopy may be unsupported
            again = make_cache()
            feed(model, text, again, chunk)
            return again

    kind, expected = kind_of(cache), read(model, rest, filled())
    for index, layer in enumerate(cache.layers):
        for part in kind.codes(layer):
            probed = filled()
            for codes in kind.codes(probed.layers[index])[part]:
                codes.view(torch.uint8).bitwise_xor_(0x55)
            if torch.equal(expected, read(model, rest, probed)):
                yield f"{part} of layer {index}"
