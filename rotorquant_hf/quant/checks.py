"""Checks of what comes in, shared by the quantisers and the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_vectors(name: str, x: Tensor, d: int) -> None:
    """Raise unless `x` is a floating tensor whose last axis has d elements."""
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; pass a floating dtype such as float32")
    if x.dim() < 1 or x.shape[-1] != d:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; its last axis must hold {d} elements")


def check_finite(name: str, x: Tensor, on_gpu: bool = False) -> None:
    """Raise if `x` has NaN or infinite entries.

    Always looked at on the CPU; on other devices only with `on_gpu`, since reading the answer
    makes the host wait for the device.
    """
    if x.device.type != "cpu" and not on_gpu:
        return
    if not _all_finite(x):
        bad = ~torch.isfinite(x)
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: {int(bad.sum())} entries are NaN or infinite, the first at {first} "
            f"({float(x[first])}); check the model's dtype (float16 overflows at 65504) and weights"
        )


def _all_finite(x: Tensor) -> bool:
    if not x.numel():
        return True
    # One pass, of which NaN is the result if there is any; isfinite takes ten times as long. With
    # axes in the order in which they lie in memory, as aminmax copies what is not contiguous.
    in_order = x.detach().permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    low, high = torch.aminmax(in_order)
    return math.isfinite(low) and math.isfinite(high)


def check_hessian(hessian: Tensor, x: Tensor) -> None:
    """Raise unless `hessian` is (d, d) for vectors `x`, or has one such matrix per leading axis."""
    d, leading = x.shape[-1], x.shape[:-2]
    if not hessian.is_floating_point():
        raise TypeError(f"hessian has dtype {hessian.dtype}; pass a floating dtype")
    own = hessian.shape[:-2]
    fits = len(own) <= len(leading) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(leading), strict=False)
    )
    if hessian.shape[-2:] != (d, d) or not fits:
        raise ValueError(
            f"hessian has shape {tuple(hessian.shape)}; for x of shape {tuple(x.shape)} pass "
            f"({d}, {d}), or with leading axes that broadcast to {tuple(leading)}"
        )
    if hessian.device != x.device:
        raise ValueError(f"hessian is on {hessian.device}, x is on {x.device}; move one")
