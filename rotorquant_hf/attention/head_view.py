"""Head views: `repeat_kv` and its like on tensors that are stored once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotorquant_hf.attention.states import KVStates, PlainStates


@dataclass(frozen=True)
class HeadView:
    """How stored states (batch, heads, tokens, d) are viewed.

    Attributes:
        repeats: every head stands this many times, one after the other.
        split: whether the repeats have an axis of their own: (batch, heads, repeats, tokens, d)
            instead of (batch, heads * repeats, tokens, d).
    """

    repeats: int = 1
    split: bool = False

    def shape(self, states: tuple[int, int, int, int]) -> tuple[int, ...]:
        """The shape of the view of states of this shape."""
        batch, heads, tokens, d = states
        if self.split:
            return batch, heads, self.repeats, tokens, d
        return batch, heads * self.repeats, tokens, d

    def of(self, x: Tensor) -> Tensor:
        """The view of x (batch, heads, tokens, d)."""
        if self == AS_STORED:
            return x
        x = x.unsqueeze(2).expand(-1, -1, self.repeats, -1, -1)
        return x if self.split else x.flatten(1, 2)

    def after(
        self,
        func: Callable[..., Any],
        states: KVStates | PlainStates,
        args: Any,
        kwargs: dict[str, Any],
    ) -> HeadView | None:
        """What `func`, one of `VIEWS`, makes of this view; None if that is no head view.

        Args:
            func: a function of torch.
            states: what is viewed; only shape and dtype are read.
            args: the arguments after the tensor.
            kwargs: the keyword arguments.
        """
        if func is Tensor.__getitem__ and not _keeps_order(args[0]):
            return None
        if func in _REPEATING and not isinstance(kwargs.get("repeats", *args[:1]), int):
            return None
        stand_in = torch.empty(self.shape(states.shape), dtype=states.sinks.dtype, device="meta")
        result = func(stand_in, *args, **kwargs)
        # All functions of `VIEWS` keep the order of the elements, or repeat them along one axis
        # that they leave in its place: if the shapes are equal, so are the elements.
        ratio = result.numel() // max(1, stand_in.numel())
        views = HeadView(self.repeats * ratio, self.split), HeadView(self.repeats, not self.split)
        if result.dtype != stand_in.dtype:
            return None
        return next((v for v in views if v.shape(states.shape) == result.shape), None)


AS_STORED = HeadView()
"""Every head once."""


def _keeps_order(index: Any) -> bool:
    """Whether an index that drops no element keeps the elements in their order."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or isinstance(item, slice) for item in items)


_REPEATING = (Tensor.repeat_interleave, torch.repeat_interleave)

VIEWS = frozenset(
    [
        Tensor.__getitem__,
        Tensor.expand,
        Tensor.flatten,
        Tensor.reshape,
        Tensor.unsqueeze,
        Tensor.view,
        torch.flatten,
        torch.reshape,
        torch.unsqueeze,
        *_REPEATING,
    ]
)
"""Functions that may make one head view of another."""
