"""`allocate_bits`: more bits for layers in which an error costs much, fewer for the others.

Layers differ by a factor of a hundred in what the error of their keys, or values, does to the
model's output. Errors of different layers add up, and a bit more divides one by about four. So the
sum is smallest, at the same number of bits, if every bit goes where it takes most away.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.calibrating import check_model, check_windows, fill
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.passing import cache_argument
from rotorquant_hf.placement import input_device
from rotorquant_hf.quant.lloyd_max import MAX_BITS
from rotorquant_hf.quant.registry import QUANTIZERS

SIDES = ("key_bits", "value_bits")

_PER_BIT = 4.0
"""What a bit divides an error by. On SmolLM2 it is 5.6 for keys from 2 to 3 bits, 4.9 from 3 to 4,
and 4.0 for values (configs/choices.yaml)."""

_MIN_BITS = 2
"""With one bit the rounding has nothing to choose from but a sign."""

_ROWS = 64  # of logits that are compared at a time

Side = tuple[str, int]
"""Keys or values, by a name of `SIDES`, and the layer."""


@torch.no_grad()
def allocate_bits(
    model: PreTrainedModel,
    ids: Tensor,
    settings: RotorQuantConfig | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RotorQuantConfig:
    """Settings with the same bits in the mean, divided among layers by what errors cost there.

    The keys, then the values, of one layer at a time are quantised, and the second half of every
    window is read with the first so stored: what counts is how far its next-token distributions
    diverge from those of the exact cache. Takes a forward pass over half the text for every layer
    and side.

    Args:
        model: the model.
        ids: (windows, tokens) token ids: windows of text that are read on their own, some thousand
            tokens in all.
        settings: what is to be divided, with one number of bits for all keys, one for all values.
        progress: called with how many of how many passes are done.

    Returns:
        The settings with `key_bits` and `value_bits` as tuples. The sum of bits is kept among
        layers that hold equally many elements of a token and as many tokens: full attention and
        sliding windows are apart.

    Raises:
        TypeError, ValueError: for what is no causal language model or no token ids; if the windows
            are too short for anything to be quantised in their first half, or the settings go layer
            by layer already.
    """
    settings = RotorQuantConfig.from_options(settings)
    bits = settings.key_spec.bits, settings.value_spec.bits  # refuses bits layer by layer
    check_model(model)
    check_windows(ids, model)
    least = 2 * settings.tokens_before_packing
    if ids.shape[1] < least:
        raise ValueError(
            f"windows have {ids.shape[1]} tokens; with these settings pass windows of {least} at "
            "least, so that some of the first half is quantised"
        )
    costs: dict[Side, float] = {}
    for done, row in enumerate(ids):
        window = _Window(model, row[None].to(input_device(model)), settings)
        for index, side in enumerate(window.sides):
            costs[side] = costs.get(side, 0.0) + window.divergence(side)
            if progress is not None:
                progress(done * len(window.sides) + index + 1, len(ids) * len(window.sides))
    given = dict(zip(SIDES, bits, strict=True))
    divided = {side: given[side[0]] for side in costs}
    for pool in window.pools():
        divided |= divide({side: costs[side] for side in pool}, given, settings)
    layers = range(len(window.exact.layers))
    keys, values = (tuple(divided.get((x, i), given[x]) for i in layers) for x in SIDES)
    return dataclasses.replace(settings, key_bits=keys, value_bits=values)


def divide(
    costs: Mapping[Side, float], bits: Mapping[str, int], settings: RotorQuantConfig
) -> dict[Side, int]:
    """Bits for every side, of the same sum as before, that make the sum of errors least.

    Args:
        costs: the errors of the sides at `bits`.
        bits: those of keys and of values before.
        settings: whose quantiser limits the bits.
    """
    least = {
        "key_bits": max(_MIN_BITS, QUANTIZERS[settings.key_quantizer].min_bits),
        "value_bits": _MIN_BITS,
    }
    found = {side: min(least[side[0]], bits[side[0]]) for side in costs}
    spare = sum(bits[name] for name, _ in costs) - sum(found.values())

    def gain(side: Side) -> float:
        """What another bit takes away."""
        error = costs[side] * _PER_BIT ** (bits[side[0]] - found[side])
        return error * (1 - 1 / _PER_BIT)

    heap = [(-gain(side), side) for side in costs]
    heapq.heapify(heap)
    for _ in range(spare):
        _, side = heapq.heappop(heap)
        found[side] += 1
        if found[side] < MAX_BITS:
            heapq.heappush(heap, (-gain(side), side))
    return found


class _Window:
    """A window of text, whose first half is stored exactly and with each side quantised."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, settings: RotorQuantConfig) -> None:
        half = ids.shape[1] // 2
        self.model, self.rest = model, ids[:, half:]
        first = ids[:, :half]
        # A prompt's own attention is exact, so a layer holds the same whatever the others do.
        self.exact = self._filled(first, residual_length=ids.shape[1], settings=settings)
        # Layer by layer, so that none takes more by itself: what these bits cost is the question.
        kept = (settings.key_spec.bits,) * len(self.exact.layers)
        self.coded = {
            "key_bits": self._filled(first, value_bits=MAX_BITS, settings=settings, key_bits=kept),
            "value_bits": self._filled(first, key_bits=MAX_BITS, settings=settings),
        }
        self.expected = self._read(self._forked())

    def _filled(self, ids: Tensor, settings: RotorQuantConfig, **changes: Any) -> RotorQuantCache:
        cache = RotorQuantCache(dataclasses.replace(settings, **changes), config=self.model.config)
        fill(self.model, ids, cache)
        return cache

    @property
    def sides(self) -> list[Side]:
        """All that are quantised."""
        layers = self.coded["key_bits"].layers
        coded = [i for i, x in enumerate(layers) if _is_quantised(x)]
        return [(name, index) for name in SIDES for index in coded]

    def pools(self) -> Iterable[list[Side]]:
        """The sides of equal size, among which a bit costs the same memory."""
        found: dict[Any, list[Side]] = {}
        for name, index in self.sides:
            layer: Any = self.exact.layers[index]
            elements = layer.recent[SIDES.index(name)][:, :, :1].numel()
            window = getattr(layer, "sliding_window", None)
            found.setdefault((elements, window), []).append((name, index))
        return found.values()

    def divergence(self, side: Side) -> float:
        """KL of the rest's next-token distributions, summed, with one side quantised."""
        name, index = side
        read = self._read(self._forked({index: self.coded[name].layers[index]}))
        total = 0.0
        for a, b in zip(self.expected.split(_ROWS), read.split(_ROWS), strict=True):
            p, q = (x.float().log_softmax(dim=-1) for x in (a, b))
            total += float((p.exp() * (p - q)).sum())
        return max(total, 0.0)

    def _forked(self, replaced: Mapping[int, Any] | None = None) -> RotorQuantCache:
        """The exact cache with some layers replaced; the layers themselves stay as they are."""
        fork = copy.copy(self.exact)
        layers = {**dict(enumerate(self.exact.layers)), **(replaced or {})}
        # Only ours are independent when copied so: others may be written in place.
        fork.layers = [
            copy.copy(x) if isinstance(x, RotorQuantLayer) else copy.deepcopy(x)
            for x in layers.values()
        ]
        return fork

    def _read(self, cache: RotorQuantCache) -> Tensor:
        return self.model(self.rest, **cache_argument(self.model, cache)).logits[0]


def _is_quantised(layer: Any) -> bool:
    return isinstance(layer, RotorQuantLayer) and layer.is_initialized and len(layer.store) > 0
