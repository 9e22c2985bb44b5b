"""Offloading on a machine without a GPU: the CPU computes, and a layer that is offloaded is marked.

Its tensors are of the class `OnHost`, which no operation takes together with others, as none takes
tensors of two devices. Streams do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.hybrid import RotorQuantHybridLayer


class OnHost(Tensor):
    """A tensor that is offloaded."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        others = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor and x.dim()]
        if others:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


class _Stream:
    """A stream that does nothing."""

    def wait_stream(self, _: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def is_away(layer: Any) -> bool:
    """Whether a layer is offloaded: all its tensors, or none."""
    tensors = [*layer._store.state().values(), *layer._sinks, *layer._recent]
    away = {isinstance(x, OnHost) for x in tensors}
    assert len(away) == 1, "parts of a layer are offloaded"
    return away.pop()


def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RotorQuantCache]:
    """Makes caches that are offloaded."""

    def moving(method: Callable[[Any], None], to: type[Tensor]) -> Callable[[Any], None]:
        def move(layer: Any, _: torch.device) -> None:
            if layer.is_initialized and is_away(layer) != (to is OnHost):
                layer._map(lambda x: x.as_subclass(to))

        def moved(layer: Any) -> None:
            with monkeypatch.context() as there:
                there.setattr(RotorQuantLayer, "_move", move)
                method(layer)

        return moved

    for kind in (RotorQuantLayer, RotorQuantHybridLayer):
        monkeypatch.setattr(kind, "offload", moving(kind.offload, OnHost))
        monkeypatch.setattr(kind, "prefetch", moving(kind.prefetch, Tensor))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream())

    def make(*args: Any, **options: Any) -> RotorQuantCache:
        with monkeypatch.context() as there:
            there.setattr(torch.cuda, "is_available", lambda: True)
            there.setattr(torch, "Stream", _Stream)
            return RotorQuantCache(*args, offloading=True, **options)

    return make
