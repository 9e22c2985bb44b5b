"""A text read through a cache in chunks, with the result of token-by-token decoding.

One forward pass over a whole text shows no loss: a prompt's own attention is in full precision.
Here a text goes through the cache in passes of at most `chunk` tokens, each of which reads the
tokens before it as they are stored. A pass ends where the cache is about to quantise tokens, so
that its tokens read just what they would read one at a time: the length of a chunk is a matter of
speed. (fp8, quanto and HQQ quantise their whole first pass, and fp8 takes its scale from it: with
them another chunk gives other figures.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rotorquant_hf.passing import cache_argument

from ..caches.registry import kind_of


def next_pass(cache: Cache, chunk: int, left: int) -> int:
    """Tokens of the next pass: `chunk`, or those left, or those until the cache quantises."""
    return max(1, min(chunk, left, kind_of(cache).tokens_until_change(cache)))


def passes(cache: Cache, chunk: int, tokens: int) -> Iterator[tuple[int, int]]:
    """First token, and the one after the last, of every pass over a text of so many tokens.

    The caller feeds each to the cache before it asks for the next.
    """
    start = 0
    while start < tokens:
        end = start + next_pass(cache, chunk, tokens - start)
        yield start, end
        start = end


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits (n, vocabulary), float32, of the tokens after each of (1, n), through a cache."""
    return model(ids, **cache_argument(model, cache), use_cache=True).logits[0].float()


@torch.no_grad()
def fill(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """One pass over a prompt (batch, n); logits (batch, vocabulary) of the token after it."""
    given = cache_argument(model, cache)
    return model(ids, **given, use_cache=True, logits_to_keep=1).logits[:, -1]


def feed(model: PreTrainedModel, ids: Tensor, cache: Cache, chunk: int) -> None:
    """Feed a text (1, tokens) through a cache."""
    for start, end in passes(cache, chunk, ids.shape[1]):
        read(model, ids[:, start:end], cache)
