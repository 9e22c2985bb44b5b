"""Plain attention, the reference for the fast implementations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotorquant_hf.attention.options import AttentionOptions


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """softmax(scale q k^T + mask) v on plain tensors, in their dtype.

    Args:
        query: (batch, query heads, n, key dim); heads g k ... g k + g - 1 read kv head k.
        key: (batch, heads, tokens, key dim).
        value: (batch, heads, tokens, value dim).
        options: the settings.

    Returns:
        (batch, query heads, n, value dim); zeros for a query that sees no token.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.mT * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if options.mask is not None and options.mask.dtype == torch.bool:
        scores = scores.masked_fill(~options.mask, -math.inf)
    elif options.mask is not None:
        scores = scores + options.mask
    if options.causal:
        n, tokens = scores.shape[-2:]
        seen = torch.ones(n, tokens, dtype=torch.bool, device=scores.device).tril(tokens - n)
        scores = scores.masked_fill(~seen, -math.inf)
    if options.sink_logits is not None:
        logits = options.sink_logits.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat((scores, logits.expand(*scores.shape[:3], 1)), dim=-1)
    shares = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # NaN where all scores are -inf
    return shares[..., : key.shape[2]] @ value
