"""Threads, each with a cache of its own, that share quantisers, ropes and the model."""

from __future__ import annotations

import threading

import pytest
import torch

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.quant.registry import shared_quantizer
from tests.helpers.models import build, feed, prompt

CASES = [("k3v3", 0, 8), ("k4v2", 1, 11), ("turboquant", 2, 5), ("k3v3", 3, 16)]
"""Settings, seed of the text, residual length."""


def read(name: str, case: tuple[str, int, int]) -> torch.Tensor:
    """Logits of a text in pieces, with what is shared made anew by whoever comes first."""
    settings, seed, residual = case
    model = build(name)
    options = {"residual_length": residual, "block_length": 4, "statistics_length": 0}
    if settings == "k4v2":
        options |= {"key_bits": 4, "value_bits": 2}
        settings = None
    cache = RotorQuantCache(settings, config=model.config, **options)
    return feed(model, cache, prompt(2, 60, seed=seed), (40, *(1,) * 20))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_threads_do_not_meet(name) -> None:
    alone = [read(name, case) for case in CASES]
    for _ in range(3):
        shared_quantizer.cache_clear()
        found: dict[int, torch.Tensor] = {}
        start = threading.Barrier(len(CASES))

        def run(index: int, start=start, found=found) -> None:
            start.wait()
            found[index] = read(name, CASES[index])

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(CASES))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(CASES)
        for index, logits in enumerate(alone):
            torch.testing.assert_close(found[index], logits, rtol=0, atol=1e-5)
