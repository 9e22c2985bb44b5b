"""What a cache takes of a 16-bit model, when the model measured is in float32.

In float32 the full-precision tokens of every cache, and the scales of quanto and HQQ, take twice
what they take in the dtype that models are served in; codes do not. So as many random tokens go
into a second cache, in bfloat16. It is made so that its size does not depend on their values: see
`CacheSpec.as_stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from rotorquant_hf.attention.tensor import show_queries

from .chunked import passes, read
from .footprint import Footprint, footprint


class LayerShape(NamedTuple):
    """Shape of the states that one layer hands its cache."""

    layer: int
    heads: int
    key_dim: int
    value_dim: int


class _Recording(DynamicCache):
    """Notes the shapes of what it is given."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        self.__dict__.setdefault("seen", []).append(
            LayerShape(layer_idx, key_states.shape[1], key_states.shape[3], value_states.shape[3])
        )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def layer_shapes(model: PreTrainedModel, token: Tensor) -> list[LayerShape]:
    """Shapes of what the layers of a model hand to a cache, from a pass over a token id (1, 1)."""
    cache = _Recording(config=model.config)
    read(model, token, cache)
    return cache.__dict__.get("seen", [])


def half_footprint(
    shapes: list[LayerShape],
    make_cache: Callable[[], Cache],
    tokens: int,
    chunk: int,
    device: torch.device,
) -> Footprint:
    """Count a cache of a text of some tokens, in bfloat16.

    Args:
        shapes: of the model's layers.
        make_cache: makes an empty cache.
        tokens: of the text.
        chunk: tokens per pass.
        device: of the model.
    """
    cache = make_cache()
    return _filled(cache, shapes, passes(cache, chunk, tokens), 1, device)


def half_decoded_footprint(
    shapes: list[LayerShape],
    make_cache: Callable[[], Cache],
    prompt: int,
    new_tokens: int,
    batch: int,
    device: torch.device,
) -> Footprint:
    """As `half_footprint`, of rows whose prompt is one pass and whose new tokens one pass each."""
    decoded = [(i, i + 1) for i in range(prompt, prompt + new_tokens)]
    return _filled(make_cache(), shapes, [(0, prompt), *decoded], batch, device)


@torch.no_grad()
def _filled(
    cache: Cache,
    shapes: list[LayerShape],
    steps: Iterable[tuple[int, int]],
    batch: int,
    device: torch.device,
) -> Footprint:
    """Count a cache after random keys and values (batch, heads, end - start, dim) of every step."""
    generator = torch.Generator(device).manual_seed(0)
    for start, end in steps:
        for layer, heads, key_dim, value_dim in shapes:
            keys, values = (
                torch.randn(
                    batch, heads, end - start, dim, device=device, generator=generator
                ).bfloat16()
                for dim in (key_dim, value_dim)
            )
            visible, _ = cache.update(keys, values, layer)
            show_queries(visible, keys)  # as attention would: what a cache keeps of them counts
    return footprint(cache, torch.bfloat16)
