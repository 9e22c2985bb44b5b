"""Cosines and sines of the angles of a pass, kept: every layer asks for those of its tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.tiles import sampled_positions


def sampled_sines(rope: Rope, positions: range | Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of the positions that `sampled` takes of a pass: (batch or 1, 1, at most count, r) float32.

    Args:
        positions: of all its tokens, one after the other or (tokens,).
    """
    if isinstance(positions, range):
        return _of_range(rope, positions, count)
    return rope.sines(sampled_positions(positions, count, rope.frequencies.device))


@lru_cache(maxsize=4)
def _of_range(rope: Rope, positions: range, count: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return rope.sines(sampled_positions(positions, count, rope.frequencies.device))
