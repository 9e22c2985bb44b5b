"""What torch is asked to do: operations that a GPU's host would have to dispatch, one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Memory that nobody writes to, and a view that torch does not call one.
_NOTHING_TO_DO = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "_unsafe_view",
}


class Operations(TorchDispatchMode):
    """Counts operations; views and allocations, which compute nothing, are left out.

    Attributes:
        names: of the operations, in their order.
        empty: names of those whose results have no elements.
        brought: names of those that take numbers of the host, or tensors of the CPU, and give
            tensors of another device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.empty: list[str] = []
        self.brought: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name == "lift_fresh":
            self.brought.append("tensor")
        if func.is_view or name in _NOTHING_TO_DO:
            return result
        self.names.append(name)
        given, made = (
            [x for x in tree_leaves(some) if isinstance(x, Tensor)] for some in (args, result)
        )
        if made and not any(x.numel() for x in made):
            self.empty.append(name)
        cpu = torch.device("cpu")
        if any(x.device == cpu for x in given) and any(x.device != cpu for x in made):
            self.brought.append(name)
        return result
