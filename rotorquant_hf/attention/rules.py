"""What becomes of scores before the softmax: soft-capping, mask, causality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotorquant_hf.attention.options import AttentionOptions


class ScoreRules:
    """The rules for some rows (query tokens) of one attention call.

    Args:
        options: the settings of the call.
        shape: (batch, heads, groups, n, tokens) of all its scores, heads being kv heads.
        rows: which of the n query tokens.
    """

    def __init__(
        self, options: AttentionOptions, shape: tuple[int, int, int, int, int], rows: slice
    ) -> None:
        batch, heads, self._groups, n, tokens = shape
        self._softcap = options.softcap
        self._mask = options.mask
        if self._mask is not None:
            mask = self._mask.expand(batch, heads * self._groups, n, tokens)[:, :, rows]
            self._mask = mask.unflatten(1, (heads, self._groups))
        last = tokens - n + rows.start if options.causal else tokens  # that the first row sees
        self._first_hidden = last + 1  # each row sees one token more
        self.end = min(tokens, last + rows.stop - rows.start)  # of the tokens that some row sees

    def apply(self, scores: Tensor, tokens: slice) -> Tensor:
        """The scores that go into the softmax, -inf where a token is not seen.

        Args:
            scores: (batch, heads, groups * rows, tokens) float32; may be overwritten.
            tokens: which tokens.
        """
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_().mul_(self._softcap)
        scores = scores.unflatten(2, (self._groups, -1))
        if self._mask is not None:
            mask = self._mask[..., tokens]
            if mask.dtype == torch.bool:
                scores = torch.where(mask, scores, -math.inf)
            else:
                scores += mask
        if tokens.stop > self._first_hidden:
            hidden = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
            scores.masked_fill_(hidden.triu(self._first_hidden - tokens.start), -math.inf)
        return scores.flatten(2, 3)
