"""A text of 100,000 tokens: memory grows with its codes, and by little at a time."""

from __future__ import annotations

import torch

from evals.probes.footprint import peak_bytes
from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from tests.helpers.models import storages

TOKENS, PIECE, HEADS, D = 100_000, 1_000, 2, 16
SETTINGS = RotorQuantConfig(key_bits=3, value_bits=3, query_aware=False)

TOKEN = 2 * HEADS * (D * 3 // 8 + 2)
"""Bytes of a token: codes and a scale of its key and its value in every head."""

# Window, sinks, statistics and tables in float32, and what a growing buffer's last page has.
FIXED = 2 * HEADS * D * 4 * (128 + 32 + 4) + (1 << 16)


def test_memory_of_a_text_of_100_000_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    layer, curve = RotorQuantLayer(SETTINGS), {}

    def read() -> None:
        for end in range(PIECE, TOKENS + 1, PIECE):
            layer.update(*torch.randn(2, 1, HEADS, PIECE, D, generator=generator))
            curve[end] = sum(storages(layer).values())

    peak = peak_bytes(read, [torch.device("cpu")])
    assert layer.get_seq_length() == TOKENS
    assert len(layer.store) >= TOKENS - 4 - 128 - 32
    assert len(curve) == TOKENS // PIECE
    # Spare rows are 1.6% at most.
    assert all(held <= 1.016 * TOKEN * tokens + FIXED for tokens, held in curve.items())
    # While its buffers grow, a layer has the old rows beside the new ones; coding takes the rest.
    assert peak <= 2.1 * TOKEN * TOKENS + 4 * FIXED
