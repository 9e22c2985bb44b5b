"""Copies of a filled cache, made to be spoilt: the cache itself, which is measured, is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache

from ..caches.tensors import tensors_in


class Copies:
    """Copies of a cache.

    Args:
        cache: filled; only read.
        refilled: makes the same cache anew, where `copy.deepcopy` has none to give: it is not
            supported, or its copy shares memory.
    """

    def __init__(self, cache: Cache, refilled: Callable[[], Cache]) -> None:
        self.cache, self.refilled = cache, refilled
        self.spare = _copy_of(cache)

    def whole(self) -> Cache:
        """A copy that shares nothing with the cache, nor with another copy."""
        if self.spare is None:
            return self.refilled()
        return _copy_of(self.cache) or self.refilled()

    def of(self, layers: Collection[int]) -> Cache:
        """A copy that is of its own in some layers, for what neither reads nor writes the others.

        These are those of a spare copy, not of the cache itself. A copy of all layers for every
        call would take longer than the calls.
        """
        if self.spare is None:
            return self.refilled()
        others = [x for i, x in enumerate(self.spare.layers) if i not in layers]
        own = [x for i, x in enumerate(self.spare.layers) if i in layers]
        return copy.deepcopy(self.spare, {id(x): x for x in others} | _wrappers_copied(own))


def _copy_of(cache: Cache) -> Cache | None:
    """A copy that shares no memory with the cache; None if none is had."""
    try:
        copied = copy.deepcopy(cache, _wrappers_copied(cache.layers))
    except Exception:  # deepcopy may be unsupported
        return None
    return copied if _addresses(cache.layers).isdisjoint(_addresses(copied.layers)) else None


def _wrappers_copied(layers: Any) -> dict[int, Any]:
    """Copies of the wrapper tensors in layers by their identity, as `copy.deepcopy` takes them.

    Quanto's cannot be copied by themselves.
    """
    found = tensors_in(layers, modules=False, wrappers=True)
    return {id(x): _copied(x) for x in found if is_traceable_wrapper_subclass(x)}


def _copied(x: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(x):
        return x.clone()
    names, context = x.__tensor_flatten__()
    inner = {name: _copied(getattr(x, name)) for name in names}
    return type(x).__tensor_unflatten__(inner, context, x.size(), x.stride())


def _addresses(layers: Any) -> set[int]:
    return {x.data_ptr() for x in tensors_in(layers, modules=False) if x.numel()}
