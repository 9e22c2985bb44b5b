"""Rows beyond the reach of 32 bits: few tokens, in buffers that are made for many millions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer

ROOM = 31_000_000
"""Tokens. Nothing of the memory for them is touched, so that the system gives none on a CPU."""

D_KEY, D_VALUE = 64, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = RotorQuantConfig(
    key_bits=3,
    value_bits=3,
    residual_length=16,
    block_length=8,
    statistics_length=0,
    query_aware=False,
)


def read(name: str, room: int, batch: int, heads: int) -> tuple[RotorQuantLayer, list[Tensor]]:
    """Outputs of attention to a prompt, to steps in which blocks are quantised, and to more."""
    generator = torch.Generator().manual_seed(0)
    layer, outputs = RotorQuantLayer(SETTINGS), []
    with torch.no_grad(), backend(name):
        for n in (40, 1, 7):
            query, keys, values = (
                torch.randn(batch, heads, n, d, generator=generator).to(DEVICE)
                for d in (D_KEY, D_KEY, D_VALUE)
            )
            outputs.append(scaled_dot_product_attention(query, *layer.update(keys, values)))
            if n == 40:
                layer.store.reserve(room)
    return layer, outputs


@pytest.fixture
def no_copies(monkeypatch):
    """Triton's interpreter copies all memory that a kernel is given, there and back."""
    copy = torch.UntypedStorage.copy_
    monkeypatch.setattr(
        torch.UntypedStorage,
        "copy_",
        lambda x, y, *args: x if x.data_ptr() == y.data_ptr() else copy(x, y, *args),
    )
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.UntypedStorage, "cpu", lambda x: x)


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("axis", [0, 1], ids=["row", "head"])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_last_is_beyond_32_bits(name, axis) -> None:
    count = (1, 4) if axis else (4, 1)
    layer, outputs = read(name, ROOM, *count)
    assert 3 * layer.store.keys.buffers.tensors["codes"].stride(axis) > 2**31
    assert len(layer.store) == 24
    for found, wanted in zip(outputs, read(name, 0, *count)[1], strict=True):
        assert torch.equal(found, wanted)
