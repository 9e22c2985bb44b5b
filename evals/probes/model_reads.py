"""Does a model read some tokens at all? Told without the cache that is probed.

Layers of chunked attention (Llama 4) see nothing of an earlier chunk: just after its boundary no
stored code is read, by an honest cache either. Then a change of the same tokens in the uncompressed
cache changes nothing.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from .chunked import fill, read


class Stored(NamedTuple):
    """A part of a layer that is stored quantised: "keys", "values", or "states" of both."""

    part: str
    layer: int

    def __str__(self) -> str:
        return f"{self.part} of layer {self.layer}"


class ModelReads:
    """What a model reads of a text (1, tokens), at its last tokens, through the uncompressed cache.

    Args:
        model: in evaluation mode.
        text: the tokens before.
        rest: the last tokens.
    """

    def __init__(self, model: PreTrainedModel, text: Tensor, rest: Tensor) -> None:
        self.model, self.text, self.rest = model, text, rest

    @cached_property
    def _filled(self) -> tuple[Cache, Tensor]:
        cache = DynamicCache(config=self.model.config)
        fill(self.model, self.text, cache)
        return cache, read(self.model, self.rest, copy.deepcopy(cache))

    def notices(self, stored: Stored, span: tuple[int, int]) -> bool:
        """Whether it notices a change of the tokens span[0]..span[1]-1 of a layer.

        True too where that cannot be told: of a model that takes no such cache, or a layer that
        keeps other states than keys and values.
        """
        try:
            cache, expected = self._filled
            changed = copy.deepcopy(cache)
            layer = changed.layers[stored.layer]
            for name in ("keys", "values") if stored.part == "states" else (stored.part,):
                states = getattr(layer, name)
                gone = self.text.shape[1] - states.shape[-2]  # out of a sliding window
                states[..., max(0, span[0] - gone) : max(0, span[1] - gone), :].neg_()
            return not torch.equal(expected, read(self.model, self.rest, changed))
        except Exception:
            return True
