"""The tensors that can be reached from an object: what caches are counted on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_LEAVES = (str, bytes, int, float, complex, type, torch.dtype, torch.device, torch.Generator)


def tensors_in(root: Any, modules: bool = True, wrappers: bool = False) -> Iterator[Tensor]:
    """Every plain tensor that can be reached from an object through its attributes.

    Wrapper tensors, such as quanto's, are opened. Functions and classes are not entered.

    Args:
        root: the object.
        modules: enter `nn.Module`s too: the tables of quantisers, which caches share.
        wrappers: give wrapper tensors themselves, instead of what is in them.
    """
    seen: set[int] = set()
    found: list[Any] = [root]
    while found:
        x = found.pop()
        if x is None or isinstance(x, _LEAVES) or (callable(x) and not hasattr(x, "parameters")):
            continue
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.nn.Module) and not modules:
            continue
        if isinstance(x, Tensor):
            if is_traceable_wrapper_subclass(x) and not wrappers:
                names, _ = x.__tensor_flatten__()
                found += [getattr(x, name) for name in names]
            else:
                yield x
        elif isinstance(x, dict):
            found += x.values()
        elif isinstance(x, list | tuple | set | frozenset):
            found += x
        elif hasattr(x, "__dict__"):
            found += vars(x).values()
            if isinstance(x, torch.nn.Module):
                found += [*x.buffers(), *x.parameters()]
        for name in getattr(type(x), "__slots__", ()):
            found.append(getattr(x, name, None))


def by_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor for every storage, so that views are not counted twice."""
    storages = {(str(x.device), x.untyped_storage().data_ptr()): x for x in tensors if x.numel()}
    return list(storages.values())


def is_code(tensor: Tensor) -> bool:
    """Whether a tensor of a quantised state holds codes rather than scales.

    Codes are integers (HQQ's of 3 bits are 32 bits wide) or 8-bit floats.
    """
    return tensor.dtype != torch.bool and (
        not tensor.is_floating_point() or tensor.dtype.itemsize == 1
    )
