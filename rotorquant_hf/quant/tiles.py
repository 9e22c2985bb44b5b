"""Walking over tokens in tiles, and samples of many tokens.

Float32 scratch is bounded by a tile, not by the history.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Elements of a tile: 8 MiB in float32, which stays in a CPU's cache and fills a GPU.
_TILE_ELEMENTS = 1 << 21
_GOLDEN = (5**0.5 - 1) / 2


def token_tiles(tokens: int, elements_per_token: int) -> Iterator[slice]:
    """Slices that cover the tokens [0, tokens), of about so many elements each."""
    size = max(1, _TILE_ELEMENTS // max(1, elements_per_token))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def segments(position: int, tokens: int, length: int) -> Iterator[slice]:
    """Slices that cover the tokens [0, tokens) of a text that goes on at `position`.

    None reaches over a multiple of `length` in the text.
    """
    start = 0
    while start < tokens:
        end = min(tokens, start + length - (position + start) % length)
        yield slice(start, end)
        start = end


def sampled(x: Tensor, count: int, axis: int = -2) -> Tensor:
    """Of more than `count` tokens along an axis, so many to take statistics from, spread.

    A mean of thousands is as good, and a long prompt costs no more than a short one.
    """
    tokens = x.shape[axis]
    if tokens <= count:
        return x
    return x.index_select(axis, _places(tokens, count, x.device))


@lru_cache(maxsize=16)
def _places(tokens: int, count: int, device: torch.device) -> Tensor:
    """Indices of the sample; kept, as every layer takes the same of a prompt."""
    with torch.inference_mode(False):
        i = torch.arange(count, dtype=torch.float32, device=device)
        # One token of each stretch, at another place every time: texts may be periodic.
        place = (i + (i * _GOLDEN).frac()) * (tokens / count)
        return place.long().clamp(max=tokens - 1)
