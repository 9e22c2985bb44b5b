"""Feeding a text through a cache, as decoding would.

A forward pass over a whole text shows no loss: a prompt's own attention is exact. Here a text goes
through the cache in passes of at most `chunk` tokens, each of which reads what is stored of the
tokens before it. A pass ends where the cache is about to quantise tokens, so that it reads just
what passes over one token at a time would read: the length of a chunk is a matter of speed. (fp8,
quanto and HQQ quantise their whole first pass, and fp8 takes its scale from it: there a longer
chunk is another prompt.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer

from rotorquant_hf import RotorQuantCache


def next_pass(cache: Cache, chunk: int, left: int) -> int:
    """Tokens of the next pass: `chunk`, or those left, or those until the cache quantises."""
    return max(1, min(chunk, left, _until_change(cache)))


def passes(cache: Cache, chunk: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First token, and the one after the last, of every pass over a text of so many tokens.

    The caller feeds each to the cache before it asks for the next.
    """
    start = 0
    while start < tokens:
        end = start + next_pass(cache, chunk, tokens - start)
        yield start, end
        start = end


def _until_change(cache: Cache) -> int:
    if isinstance(cache, RotorQuantCache):
        return cache.tokens_until_packing()
    quantized = [x for x in cache.layers if isinstance(x, QuantizedLayer) and x.is_initialized]
    return min((x.residual_length - _window(x) for x in quantized), default=sys.maxsize)


def _window(layer: QuantizedLayer) -> int:
    return layer.keys.shape[-2] if layer.keys.dim() == 4 else 0


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (n, vocabulary), float32, of the tokens after each of (1, n), through a cache."""
    return model(ids, past_key_values=cache, use_cache=True).logits[0].float()


@torch.no_grad()
def fill(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """One pass over a prompt (batch, n); logits (batch, vocabulary) of the token after it."""
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def feed(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int) -> None:
    """Feed a text (1, tokens) through a cache."""
    for start, end in passes(cache, chunk, ids.shape[1]):
        read(model, ids[:, start:end], cache)
