"""What an attention call asks for, beyond query, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """The settings of one attention call over `tokens` cached tokens.

    Attributes:
        scale: factor of the inner products, usually d^-1/2.
        mask: broadcastable to (batch, query heads, n, tokens): boolean (True is seen) or floating
            (added to the scaled scores). None: all tokens are seen, or see `causal`.
        causal: query i of n sees the tokens up to its own position, tokens - n + i. Holds in
            addition to `mask`.
        softcap: scores become softcap * tanh(scores / softcap) before the mask (gemma2).
        sink_logits: (query heads,), learned logits that take part in the softmax and bring no
            value (gpt_oss).
    """

    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sink_logits: Tensor | None = None
