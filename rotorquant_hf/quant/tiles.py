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
    places = sampled_places(x.shape[axis], count, x.device)
    return x if places is None else x.index_select(axis, places)


def sampled_places(tokens: int, count: int, device: torch.device) -> Tensor | None:
    """Which of so many tokens `sampled` takes, (count,) int64; None for all."""
    return None if tokens <= count else _places(tokens, count, device)


@lru_cache(maxsize=16)
def all_sampled_places(tokens: int, count: int, device: torch.device) -> Tensor:
    """Which of so many tokens `sampled` takes, or all, int64; kept, as every layer asks."""
    places = sampled_places(tokens, count, device)
    if places is not None:
        return places
    with torch.inference_mode(False):
        return torch.arange(tokens, device=device)


def sampled_positions(positions: range | Tensor, count: int, device: torch.device) -> Tensor:
    """Where in the text the tokens are that `sampled` takes, (at most count,), on a device.

    Args:
        positions: of all the tokens, one after the other or (tokens,).
        count: of the sample.
        device: of the sample.
    """
    if isinstance(positions, Tensor):
        return sampled(positions, count, axis=0)
    if len(positions) <= count:
        return torch.arange(positions.start, positions.stop, device=device)
    return _places(len(positions), count, device) + positions.start


@lru_cache(maxsize=16)
def last_sampled(tokens: int, count: int) -> int:
    """The last of so many tokens that `sampled` takes, as the host knows it."""
    if tokens <= count:
        return tokens - 1
    return int(_places(tokens, count, torch.device("cpu"))[-1])


@lru_cache(maxsize=16)
def _places(tokens: int, count: int, device: torch.device) -> Tensor:
    """Indices of the sample; kept, as every layer takes the same of a prompt."""
    with torch.inference_mode(False):
        i = torch.arange(count, dtype=torch.float32, device=device)
        # One token of each stretch, at another place every time: texts may be periodic.
        place = (i + (i * _GOLDEN).frac()) * (tokens / count)
        return place.long().clamp(max=tokens - 1)
