"""Stand-ins: the first tokens of a padded row, in the places of sinks that are its padding.

With left padding the first tokens of the shorter rows of a batch are padding, which nobody reads.
To keep them in full precision, and quantise the row's own first tokens, would cost the row much of
its quality: models look at their first tokens all the time. So the places j < min(S, p) of the S
sinks of a row with p tokens of padding hold tokens max(S, p) + j instead. These are quantised where
they are as all others are, and attention reads them in the places of the padding: it sees there
what the mask has for them, and nothing where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf.backend import recordable


@dataclass(frozen=True)
class StandIns:
    """Which tokens are in the places of the sinks.

    Attributes:
        tokens: (batch, S) int64; j in place j where that holds its own token.
    """

    tokens: Tensor

    @classmethod
    def of(cls, mask: Tensor, batch: int, sinks: int) -> StandIns:
        """Those of the rows that a mask shows to be padded on the left; the host does not wait.

        Args:
            mask: broadcastable to (batch, query heads, n, tokens), of the last n tokens as queries:
                boolean (True is seen) or floating (added).
            batch: rows. sinks: S.
        """
        mask = mask[(None,) * (4 - mask.dim())][:, 0]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        n, tokens = seen.shape[1:]
        padding = seen[:, -1].int().argmax(dim=-1, keepdim=True)  # (batch or 1, 1)
        # What a sliding window hides is no padding: the first query after it sees other tokens.
        query = (padding - (tokens - n)).clamp(min=0)[..., None]
        first_seen = seen.gather(1, query.expand(-1, 1, tokens)).int().argmax(dim=-1)
        slides = first_seen != padding
        places = torch.arange(sinks, device=mask.device)
        first = padding.clamp(min=sinks) + places
        stands_in = (places < padding) & (first < tokens) & ~slides
        return cls(torch.where(stands_in, first, places).expand(batch, -1).contiguous())

    def placed(self, states: Tensor) -> Tensor:
        """The sinks (batch, heads, S, d) of states (batch, heads, tokens, d)."""
        return states.gather(2, self._like(states))

    def put_back(self, states: Tensor, sinks: Tensor) -> None:
        """Write sinks (batch, heads, S, d) to where their tokens are in the states."""
        states.scatter_(2, self._like(states), sinks)

    def _like(self, states: Tensor) -> Tensor:
        heads, d = states.shape[1], states.shape[3]
        return recordable(self.tokens)[:, None, :, None].expand(-1, heads, -1, d)

    def masked(self, mask: Tensor, tokens: int) -> Tensor:
        """A mask that sees the tokens in the places of the sinks, and not where they are.

        Args:
            mask: broadcastable to (batch, query heads, n, tokens), boolean or floating.
        """
        mask = mask[(None,) * (4 - mask.dim())]
        batch, sinks = self.tokens.shape
        mask = mask.expand(batch, -1, -1, tokens).clone()
        columns = self.tokens[:, None, None].expand(*mask.shape[:3], -1)
        in_places = mask.gather(3, columns)
        mask.scatter_(3, columns, False if mask.dtype == torch.bool else float("-inf"))
        mask[..., :sinks] = in_places
        return mask

    def needed(self) -> bool:
        """Whether any stands in; waits for the device."""
        return bool((self.tokens >= self.tokens.shape[1]).any())

    def within(self, tokens: int) -> StandIns:
        """Those that are among the first `tokens`.

        What is left in the places of the others is padding, which nobody reads.
        """
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return StandIns(torch.where(self.tokens < tokens, self.tokens, places))

    def map(self, fn: Callable[[Tensor], Tensor]) -> StandIns:
        """The same with `fn` applied to the tensor (a batch selection, a move to a device)."""
        return StandIns(fn(self.tokens))
