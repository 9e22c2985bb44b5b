"""The calls in which a model's layers update a cache, noted in one pass, to be made once more.

Nothing is assumed about the architecture: of every layer of the cache the module is noted that was
running when the layer was updated, with its arguments and its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .chunked import read


@dataclass
class AttentionCall:
    """A call of the module that updates a layer of the cache.

    Attributes:
        module: the innermost one that was running.
        args, kwargs: what it was called with; tensors are copies.
        cache: the one among them.
        layers: of the cache that were updated meanwhile, in order.
        output: what it returned.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: Cache
    layers: list[int] = field(default_factory=list)
    output: Any = None

    @property
    def names_the_cache(self) -> bool:
        """Whether the cache is among the arguments, so that another can take its place."""
        return _holds((self.args, self.kwargs), self.cache)

    @torch.no_grad()
    def gives_the_same(self, cache: Cache) -> bool:
        """Whether the same call with another cache returns the same numbers."""
        args, kwargs = (_replaced(x, self.cache, cache) for x in (self.args, self.kwargs))
        found, expected = _tensors(self.module(*args, **kwargs)), _tensors(self.output)
        return len(found) == len(expected) and all(map(torch.equal, found, expected))


def read_and_note(
    model: PreTrainedModel, ids: Tensor, cache: Cache
) -> tuple[Tensor, dict[int, AttentionCall]]:
    """`read`, and by layer of the cache the call that updated it, where it can be made again.

    That is a call which was given the cache, and the only one that updated the layer.

    Args:
        model: in evaluation mode.
        ids: (1, n).
        cache: takes the tokens.
    """
    running: list[AttentionCall] = []
    noted: list[AttentionCall] = []
    with _hooks(model, cache, running, noted):
        logits = read(model, ids, cache)
    indices = [index for call in noted for index in call.layers]
    once = {index for index in indices if indices.count(index) == 1}
    sound = [call for call in noted if call.names_the_cache]
    return logits, {i: call for call in sound for i in call.layers if i in once}


@contextmanager
def _hooks(
    model: nn.Module, cache: Cache, running: list[AttentionCall], noted: list[AttentionCall]
) -> Iterator[None]:
    """Keep `running` the calls of modules that are not done, innermost last."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: layers add to their inputs in place.
        running.append(AttentionCall(module, _copied(args), _copied(kwargs), cache))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = running.pop()
        if call.layers:
            call.output = _copied(output)
            noted.append(call)

    update = cache.update

    def noting(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        running[-1].layers.append(layer_idx)
        return update(keys, values, layer_idx, *args, **kwargs)

    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        cache.update = noting  # type: ignore[method-assign, assignment]
        yield
    finally:
        cache.__dict__.pop("update", None)
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:  # other mappings (a ModelOutput) are handed on as they are
        return {name: _copied(x) for name, x in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (tuple, list) else value


def _holds(value: Any, wanted: Any) -> bool:
    values = value.values() if type(value) is dict else value
    nested = type(value) in (dict, tuple, list)
    return value is wanted or (nested and any(_holds(x, wanted) for x in values))


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """The value with `new` wherever it holds `old`; tensors are copied once more."""
    if value is old:
        return new
    if type(value) is dict:
        return {name: _replaced(x, old, new) for name, x in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replaced(x, old, new) for x in value)
    return _copied(value)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | tuple | list)
    return [x for item in values for x in _tensors(item)] if nested else []
