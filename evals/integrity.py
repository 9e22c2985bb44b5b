"""Is the cache read, and is anything compressed? What a measurement must know of its subject.

A cache that keeps exact copies beside its codes shows no loss and saves nothing; one that packs
nothing shows no loss either. So the stored codes are scrambled, and the model must notice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from evals.feeding import next_pass, read
from evals.footprint import footprint, reachable_bytes, tensors_in

_SLACK = 1.01  # of the bytes that a cache reports; small state is not in every report


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
    probe = min(chunk, ids.shape[1] // 4 + 1)
    feed(model, ids[:, :-probe], cache, chunk)
    counted, reachable = footprint(cache, model.dtype), reachable_bytes(cache)
    found = []
    if cache.get_seq_length() != ids.shape[1] - probe:
        found.append(
            f"the cache holds {cache.get_seq_length()} tokens, but {ids.shape[1] - probe} went "
            "through the model: it is not used"
        )
    if not counted.packed_numbers:
        found.append(
            f"nothing is compressed after {ids.shape[1] - probe} tokens: the exact window holds "
            "them all; measure longer texts"
        )
    elif not _codes(cache):
        found.append("the cache says that tokens are quantised, but stores no codes")
    elif not _notices(model, ids, make_cache, chunk, probe, cache):
        found.append(
            "the stored codes are not read: the model gives the same logits when they are "
            "scrambled, so these figures say nothing about compression"
        )
    exact = counted.numbers * model.dtype.itemsize
    if counted.packed_numbers and counted.total_bytes >= exact:
        found.append(
            f"nothing is saved: the cache takes {counted.total_bytes:,} bytes, uncompressed it "
            f"would take {exact:,}"
        )
    if reachable > _SLACK * counted.total_bytes:
        found.append(
            f"the cache reports {counted.total_bytes:,} bytes, but holds tensors of {reachable:,}"
        )
    return found


def feed(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int) -> None:
    """Feed a text (1, tokens) through a cache."""
    start = 0
    while start < ids.shape[1]:
        n = next_pass(cache, chunk, ids.shape[1] - start)
        read(model, ids[:, start : start + n], cache)
        start += n


def _notices(
    model: PreTrainedModel,
    ids: Tensor,
    make_cache: Callable[[], Cache],
    chunk: int,
    probe: int,
    cache: Cache,
) -> bool:
    """Whether logits change when the codes do; `cache` holds all but the last `probe` tokens."""
    scrambled = make_cache()
    feed(model, ids[:, :-probe], scrambled, chunk)
    for codes in _codes(scrambled):
        codes.view(torch.uint8).bitwise_xor_(0x55)
    expected = read(model, ids[:, -probe:], cache)
    return not torch.equal(expected, read(model, ids[:, -probe:], scrambled))


def _codes(cache: Cache) -> list[Tensor]:
    """The tensors of a cache that hold codes: those of one byte an entry, tables apart."""
    tensors = tensors_in(cache.layers, modules=False)
    return [x for x in tensors if x.dtype.itemsize == 1 and x.dtype != torch.bool and x.numel()]
