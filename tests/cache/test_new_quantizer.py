"""A quantiser that the package does not know: one class and a line in the registry are enough."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from rotorquant_hf import RotorQuantCache, RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.attention.torch_attention import attend_tiled
from rotorquant_hf.backend import backend
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.packing import pack
from rotorquant_hf.quant.quantizer import Quantizer, QuantizerSpec, Term
from rotorquant_hf.quant.registry import QUANTIZERS, shared_quantizer
from tests.helpers.models import build, prompt

SMALL = {
    "residual_length": 8,
    "statistics_length": 0,
    "query_aware": False,
    "block_length": 4,
    "num_sink_tokens": 2,
}


class UniformGrid(Quantizer):
    """Asymmetric rounding to 2^bits steps between the smallest and largest entry: no rotation."""

    min_bits = 3

    def __init__(self, d: int, bits: int, device: torch.device) -> None:
        super().__init__()
        self.d, self.bits = d, bits
        self.register_buffer("steps", torch.arange(2.0**bits, device=device), persistent=False)

    @classmethod
    def from_spec(cls, spec: QuantizerSpec, d: int, device: torch.device) -> Self:
        return cls(d, spec.bits, device)

    def encode(self, u: Tensor, hessian: Tensor | None = None) -> dict[str, Tensor]:
        low, high = u.amin(dim=-1, keepdim=True), u.amax(dim=-1, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=1e-12)
        codes = ((u - low) / step).round()
        return {
            "codes": pack(codes, self.bits),
            "step": step.squeeze(-1),
            "one": torch.zeros(*u.shape[:-1], 1, dtype=torch.uint8, device=u.device),
            "low": low.squeeze(-1),
        }

    def terms(self) -> tuple[Term, ...]:
        eye = torch.eye(self.d, device=self.steps.device)
        ones = torch.ones(8, self.d, device=self.steps.device) / 8
        always_one = CodeTable.of(torch.ones(2, device=self.steps.device), 1, 8)
        return (
            Term.of("codes", "step", CodeTable.of(self.steps, self.bits, self.d), eye),
            Term.of("one", "low", always_one, ones),
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "uniform", UniformGrid)
    shared_quantizer.cache_clear()


def test_the_settings_take_its_name_and_its_bits() -> None:
    assert RotorQuantConfig(key_quantizer="uniform").key_spec.name == "uniform"
    with pytest.raises(ValueError, match="key_bits is 2; choose a whole number from 3 to 8"):
        RotorQuantConfig(key_quantizer="uniform", key_bits=2)
    with pytest.raises(ValueError, match="choose one of mse, prod, uniform"):
        RotorQuantConfig(key_quantizer="grid")


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_store_codes_and_attention_reads(name: str) -> None:
    """Where the kernels would run, torch takes over."""
    torch.manual_seed(0)
    config = RotorQuantConfig(key_quantizer="uniform", key_bits=8, center_keys=True)
    store = RotorQuantKVCache(32, 32, config=config)
    keys, values, query = torch.randn(3, 2, 2, 50, 32)
    with backend(name):
        store.append(keys[:, :, :30], values[:, :, :30])
        store.append(keys[:, :, 30:], values[:, :, 30:])
    torch.testing.assert_close(store.get_keys(), keys, rtol=0, atol=0.02)
    parts = [
        CachedStates(x[:, :, :4], side.span(), x[:, :, :3])
        for x, side in ((keys, store.keys), (values, store.values))
    ]
    options = AttentionOptions(scale=32**-0.5)
    expected = attention_reference(query, *(x.materialize() for x in parts), options)
    torch.testing.assert_close(attend_tiled(query, *parts, options), expected)
    with backend(name):
        compressed = [CompressedTensor(x) for x in parts]
        found = torch.nn.functional.scaled_dot_product_attention(query, *compressed)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        store.attention_scores(query), query @ store.get_keys().mT, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["mse", "prod", "uniform"])
@pytest.mark.parametrize(
    "mode",
    [nullcontext, torch.inference_mode, partial(torch.autocast, "cpu")],
    ids=["plain", "inference", "autocast"],
)
def test_rows_are_known_without_coding(name: str, mode: Any, monkeypatch: Any) -> None:
    """What `encode` would make of no tokens is learned once, whatever it is first asked in."""
    side = RotorQuantKVCache(32, 32, config=RotorQuantConfig(key_quantizer=name)).keys
    coded = side.quantizer.encode(torch.randn(2, 3, 5, 32))
    wanted = {name: (x.shape[3:], x.dtype) for name, x in coded.items()}
    with mode():
        side.empty_rows(1, 1)
    monkeypatch.setattr(type(side.quantizer), "encode", None)
    rows = side.empty_rows(2, 3)
    assert {name: (x.shape[3:], x.dtype) for name, x in rows.items()} == wanted
    assert all(x.shape[:3] == (2, 3, 0) for x in rows.values())
    assert not any(x.is_inference() for x in rows.values())
    assert copy.deepcopy(side.quantizer).row_kinds(side.device) == wanted


def test_a_model_runs_saves_and_goes_on(tmp_path) -> None:
    model, ids = build("llama"), prompt(2, 60)
    cache = RotorQuantCache(key_quantizer="uniform", key_bits=8, value_bits=8, **SMALL)
    with torch.no_grad(), backend("triton"):
        exact = model(ids, use_cache=False).logits[:, 40:]
        model(ids[:, :40], past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        twin = RotorQuantCache.load(tmp_path / "cache.safetensors")
        logits = [model(ids[:, 40:], past_key_values=x).logits for x in (cache, twin)]
    assert torch.equal(*logits)
    assert (logits[0] - exact).abs().max() < 0.05 * exact.abs().max()
    assert isinstance(twin.layers[0].store.key_quantizer, UniformGrid)

    report = cache.memory()
    assert report.parts["key_step"] == report.parts["key_low"] > 0
    held = [layer.store.keys.buffers for layer in cache.layers]
    assert report.parts["key_low"] == sum(x.rows(0, len(x))["low"].nbytes for x in held)
    assert report.packed_bytes > report.parts["key_codes"] + report.parts["value_codes"]
    assert "key_low" in str(report)
    steps = len(UniformGrid(8, 8, torch.device("cpu")).steps)
    assert report.parts["tables"] > 4 * steps

    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-20)
    assert cache.get_seq_length() == 40
