"""Walking over tokens in tiles: float32 scratch is bounded by a tile, not by the history."""

from __future__ import annotations

from collections.abc import Iterator

# Elements of a tile: 8 MiB in float32, which stays in a CPU's cache and fills a GPU.
_TILE_ELEMENTS = 1 << 21
# Where a tile takes some hundred small launches, a GPU is filled by more.
_LARGE_TILE_ELEMENTS = 1 << 23


def token_tiles(tokens: int, elements_per_token: int, large: bool = False) -> Iterator[slice]:
    """Slices that cover the tokens [0, tokens), of about so many elements each."""
    elements = _LARGE_TILE_ELEMENTS if large else _TILE_ELEMENTS
    size = max(1, elements // max(1, elements_per_token))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))
