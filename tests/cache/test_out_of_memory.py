"""For want of memory a pass stores nothing, wherever it runs out; the same again then goes on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.backend import backend
from rotorquant_hf.layers import RotorQuantSlidingLayer

LAYERS = 2
SETTINGS = RotorQuantConfig(
    residual_length=16, block_length=8, statistics_length=32, query_aware=False
)


class RunsOut(TorchDispatchMode):
    """The operation of this number fails."""

    def __init__(self, number):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*args, **(kwargs or {}))


def states(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, n, 32, generator=generator) for _ in range(2))


def read(cache, new):
    for layer, (keys, values) in enumerate(new):
        cache.update(keys, values, layer)


def passes(n, seed):
    return [states(n, 10 * seed + layer) for layer in range(LAYERS)]


def filled(lengths, window):
    cache = RotorQuantCache(SETTINGS)
    if window:
        cache.layers.extend(RotorQuantSlidingLayer(SETTINGS, window) for _ in range(LAYERS))
    for seed, n in enumerate(lengths):
        read(cache, passes(n, seed))
    return cache


def contents(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    ("lengths", "n", "window"),
    [
        ((), 10, 0),
        ((100,), 1, 0),
        ((100, *[1] * 7), 1, 0),  # a block is quantised
        ((100,), 50, 0),
        ((10,), 10, 40),
        ((30,), 9, 40),
        ((30,), 9, 100),
    ],
    ids=[
        *("the first", "a token", "a block", "many"),
        *("a window that fills up", "a full window's block", "a window's block"),
    ],
)
def test_a_pass_is_stored_or_not(lengths, n, window):
    new = passes(n, 50)
    with backend("torch"):
        expected = filled(lengths, window)
        read(expected, new)
        number = 0
        while True:
            number += 1
            cache = filled(lengths, window)
            try:
                with RunsOut(number):
                    read(cache, new)
                break
            except torch.OutOfMemoryError as error:
                notes = getattr(error, "__notes__", [])
            assert not notes
            assert [cache.get_seq_length(i) for i in range(len(cache.layers))] in (
                [sum(lengths)] * len(cache.layers),
                [],
            )
            read(cache, new)
            for found, wanted in zip(contents(cache), contents(expected), strict=True):
                assert torch.equal(found, wanted)
    assert number > 20  # operations


def test_a_window_that_has_moved_says_that_the_cache_is_spoilt():
    """Tokens that left the first layer's window are gone."""
    with backend("torch"):
        cache = filled((100,), 40)
        keys, values = states(9, 1)
        cache.update(keys, values, 0)
        with pytest.raises(torch.OutOfMemoryError) as caught, RunsOut(3):
            cache.update(keys, values, 1)
    (note,) = caught.value.__notes__
    assert note == "Parts of the cache hold the new tokens already: use cache.reset()."
