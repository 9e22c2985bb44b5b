"""Decode steps without a mask, as a graph captures them: the layers hide the padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rotorquant_hf.attention.registered import single_tokens_without_masks
from rotorquant_hf.layers.full import RotorQuantLayer


@contextmanager
def without_mask(layers: Sequence[RotorQuantLayer], mask: Tensor | None) -> Iterator[list[Tensor]]:
    """Let a step of one token run without a mask, which grows with the text, as no graph can.

    Args:
        layers: of the cache; each with a ring.
        mask: (batch, tokens) bool, false at padding; later tokens are seen by all. None if there is
            no padding.

    Yields:
        What attention reads instead of the mask, (batch, 1, 1, columns) bool, for a graph to keep.
    """
    made: list[tuple[Tensor | None, Tensor]] = []  # layers with the same stand-ins share one
    try:
        if mask is not None:
            for layer in layers:
                assert layer.ring is not None
                layer.ring.padding = _padding_of(layer, mask, made)
        with single_tokens_without_masks():
            yield [padding for _, padding in made]
    finally:
        for layer in layers if mask is not None else ():
            if layer.ring is not None:
                layer.ring.padding = None


def lengthened(mask: Tensor, tokens: int) -> Tensor:
    """A mask (batch, n) of so many tokens: later ones are seen."""
    return torch.cat((mask, mask.new_ones(mask.shape[0], tokens - mask.shape[1])), dim=1)


def _padding_of(
    layer: RotorQuantLayer, mask: Tensor, made: list[tuple[Tensor | None, Tensor]]
) -> Tensor:
    """`RingBuffer.padding` of a layer: one of those made before, if that is the same."""
    assert layer.ring is not None
    columns = layer.ring.columns
    tokens = None if layer.stand_ins is None else layer.stand_ins.tokens
    for others, padding in made:
        if padding.shape[3] == columns and _equal(others, tokens):
            return padding
    with torch.inference_mode(False):
        padding = lengthened(mask, columns)[:, None, None]
        if layer.stand_ins is not None:
            padding = layer.stand_ins.masked(padding, columns)
    made.append((tokens, padding))
    return padding


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
