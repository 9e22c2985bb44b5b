"""Launching a kernel again and again with arguments of which most stay the same."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Products and sums become one instruction, unless a kernel asks for another. Said here because the
# default changes with Triton 3.10.
FUSED = {"enable_fp_fusion": True}


class Launch:
    """A kernel, bound to the arguments that stay from launch to launch.

    At every launch Triton looks at each argument's type, alignment and divisibility to find what it
    has compiled for such arguments. For a kernel of sixty that takes the host longer than all else
    in a decode step. Here it does so once for every kind of the changing arguments; what it hands
    back is then called directly.

    Args:
        kernel: a function of `triton.jit`, whose changing arguments come first.
        **bound: all its other arguments by name, and options of the compiler.
    """

    def __init__(self, kernel: Any, **bound: Any) -> None:
        self._kernel, self._bound = kernel, FUSED | bound
        first = next(i for i, name in enumerate(kernel.arg_names) if name in bound)
        self._values = [bound[name] for name in kernel.arg_names[first:]]
        self._compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], *changing: Any) -> None:
        """Launch it on a grid. A changing tensor is of the same dtype and device every time."""
        kind = _kind(changing)
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*changing, *self._values)
            return
        compiled = self._kernel[grid](*changing, **self._bound)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[kind] = compiled


def _kind(arguments: tuple[Any, ...]) -> Hashable:
    """What Triton compiles for.

    Of an integer whether it is 1, divisible by 16, or takes 64 bits; of a tensor whether 16 divides
    its address; of tuples this of their parts; of None that it is.
    """
    return tuple(  # in one line, as it is the most expensive part of a launch
        [
            (x == 1) + 2 * (x % 16 == 0) + 4 * (x >> 31)
            if type(x) is int
            else x.data_ptr() % 16
            if type(x) is Tensor
            else _kind_of_other(x)
            for x in arguments
        ]
    )


def _kind_of_other(x: Any) -> Hashable:
    if x is None:
        return None
    return _kind(x) if isinstance(x, tuple) else x.data_ptr() % 16


@lru_cache(maxsize=256)
def launch_of(kernel: Any, dtype: Hashable, device: torch.device, **bound: Any) -> Launch:
    """A `Launch` bound to constants and options alone, for all layers that compute the same.

    `enable_fp_fusion=False` is for sums of products across threads: where a lane adds another's
    product, which is rounded, to its own, which is not, each has another sum, and which of them is
    stored is chance.

    Args:
        dtype: of the changing tensors that are not of one dtype everywhere; several in a tuple.
        device: of all tensors.
    """
    return Launch(kernel, **bound)
