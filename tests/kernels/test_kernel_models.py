"""Models decode through the Triton kernels and agree with the same cache dequantised."""

import pytest
import torch

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.attention import triton_attention
from rotorquant_hf.attention.states import RingStates
from rotorquant_hf.backend import backend
from tests.helpers.models import COMMON, build, feed, prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2}
SMALL |= {"statistics_length": 0, "query_aware": False}  # "eager" shows no queries


@pytest.mark.parametrize("name", COMMON)
def test_decode(name, monkeypatch):
    """Prompt, single tokens and a chunk, through the kernels and through eager attention."""
    calls = []
    real = triton_attention.attend_packed

    def counted(query, keys, *args):
        calls.append(isinstance(keys, RingStates))
        return real(query, keys, *args)

    monkeypatch.setattr(triton_attention, "attend_packed", counted)
    logits = []
    for attention in ("rotorquant", "eager"):
        if name == "falcon" and attention == "rotorquant":
            attention = "sdpa"  # it has a class for each of a few implementations
        model = build(name, attention).to(DEVICE)
        cache = RotorQuantCache(config=model.config, **SMALL)
        with backend("triton"):
            logits.append(feed(model, cache, prompt(1, 25).to(DEVICE), (20, 1, 1, 3)))
    if name == "deepseek_v3":  # projects its cached latents before any attention function
        assert not calls
    else:
        assert calls.count(True) >= len(cache.layers)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
