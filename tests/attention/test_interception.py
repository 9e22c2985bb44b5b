"""Attention calls reach the packed codes, through every model that lets them, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import repeat_kv

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention import tensor as tensor_module
from rotorquant_hf.attention import torch_attention
from rotorquant_hf.attention.head_view import HeadView
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.quant.packed import PackedSpan
from tests.helpers.models import MODELS, build, feed, prompt, relative_error

ROWS, HEADS, TOKENS, D = 2, 2, 41, 16
SMALL = {"residual_length": 8, "statistics_length": 0, "query_aware": False, "block_length": 4}

# Attention written out as products, or (deepseek_v3) keys and values computed from the cached
# ones: nothing that could be intercepted.
MATERIALISE = {
    "gptj",
    "codegen",
    "gpt_neo",
    "bloom",
    "mpt",
    "gemma2",
    "gpt_oss",
    "deepseek_v3",
}


@pytest.fixture
def materialised(monkeypatch) -> list[PackedSpan]:
    """The spans that were materialised, in order."""
    found, materialize = [], PackedSpan.materialize

    def remembering(self, out):
        found.append(self)
        materialize(self, out)

    monkeypatch.setattr(PackedSpan, "materialize", remembering)
    return found


@pytest.fixture
def not_fused(monkeypatch) -> Callable[[], None]:
    """Call it to have every later attention call materialise."""
    return lambda: monkeypatch.setattr(tensor_module, "_attend", lambda *args, **kwargs: None)


def pair(
    heads: int = HEADS, rows: int = ROWS, dtype: torch.dtype = torch.float32, gradient: bool = False
) -> tuple[CompressedTensor, CompressedTensor]:
    """Keys and values as attention gets them."""
    layer, generator = RotorQuantLayer(RotorQuantConfig(**SMALL)), torch.Generator().manual_seed(0)
    for count in (TOKENS - 1, 1):
        new = [torch.randn(rows, heads, count, D, generator=generator).to(dtype) for _ in range(2)]
        if gradient and count == 1:
            new = [x.requires_grad_() for x in new]
        keys, values = layer.update(*new)
    return keys, values


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- scaled_dot_product_attention ---

_mask = draw(ROWS, 4, 3, TOKENS, seed=2)

FUSED: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q[:, :2], k, v),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q[:, :2]),
    "positions": lambda q, k, v: F.scaled_dot_product_attention(q[:, :2], k, v, None, 0.0, False),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q[:, :2], k, v, scale=0.9),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "packed groups": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, :, :1].reshape(ROWS, HEADS, 2, D), k, v
    ),
    "2-D mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, _mask[0, 0], enable_gqa=True
    ),
    "3-D mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=_mask[0, :1], enable_gqa=True
    ),
    "4-D mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=_mask, enable_gqa=True
    ),
    "boolean mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=_mask[:, :1] > 0, enable_gqa=True
    ),
    "repeat_kv": lambda q, k, v: F.scaled_dot_product_attention(
        q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=_mask
    ),
    "repeated in part": lambda q, k, v: F.scaled_dot_product_attention(
        q.repeat(1, 2, 1, 1), repeat_kv(k, 2), repeat_kv(v, 2), enable_gqa=True
    ),
    "made contiguous": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, :2], k.contiguous(), v.to(torch.float32).detach()[:]
    ),
}


@pytest.mark.parametrize("attention", FUSED.values(), ids=FUSED)
def test_attention_reads_the_codes(attention, materialised):
    query, (keys, values) = draw(ROWS, 4, 3, D), pair()
    out = attention(query, keys, values)
    assert materialised == []
    assert type(out) is Tensor
    expected = attention(query, keys.materialize(), values.materialize())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_single_head_is_read_by_all(materialised):
    query, (keys, values) = draw(ROWS, 4, 3, D), pair(heads=1)
    out = F.scaled_dot_product_attention(query, keys, values)
    assert materialised == []
    expected = F.scaled_dot_product_attention(query, keys.materialize(), values.materialize())
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_dtype", ["the same", torch.float32, torch.bool], ids=str)
def test_half_precision(dtype, mask_dtype, materialised):
    query, (keys, values) = draw(ROWS, 2, 3, D).to(dtype), pair(dtype=dtype)
    mask = _mask[:, :2] > 0 if mask_dtype is torch.bool else _mask[:, :2]
    mask = mask.to(dtype if mask_dtype == "the same" else mask_dtype)
    out = F.scaled_dot_product_attention(query, keys, values, mask)
    assert materialised == []
    assert out.dtype == dtype
    plain = (x.materialize().float() for x in (keys, values))
    mask = mask if mask.dtype == torch.bool else mask.float()
    expected = F.scaled_dot_product_attention(query.float(), *plain, mask)
    assert relative_error(out.float(), expected) < 1e-2


def test_autocast_is_that_of_torch(materialised):
    query, (keys, values) = draw(ROWS, 2, 3, D), pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(query, keys, values, _mask[:, :2])
        assert materialised == []
        plain = keys.materialize(), values.materialize()
        expected = F.scaled_dot_product_attention(query, *plain, _mask[:, :2])
    assert out.dtype == expected.dtype == torch.bfloat16
    assert relative_error(out.float(), expected.float()) < 1e-2


LEFT_TO_TORCH: dict[str, Callable[..., Tensor]] = {
    "causal from the first key": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True
    ),
    "causal, one token": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, :, :1], k, v, is_causal=True
    ),
    "plain values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v * 1),
    "plain keys": lambda q, k, v: F.scaled_dot_product_attention(q, k * 1, v),
    "compressed query": lambda q, k, v: F.scaled_dot_product_attention(k, k, v),
    "a row for all": lambda q, k, v: F.scaled_dot_product_attention(q[:1], k, v),
    "a head for all": lambda q, k, v: F.scaled_dot_product_attention(q[:, :1], k, v),
    "an axis more": lambda q, k, v: F.scaled_dot_product_attention(
        q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
    ),
    "an axis more of keys and values": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.unsqueeze(2), v.unsqueeze(2)
    ),
}


@pytest.mark.parametrize("attention", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_other_calls_are_those_of_torch(attention, materialised):
    query, (keys, values) = draw(ROWS, 2, 3, D), pair()
    out = attention(query, keys, values)
    assert len(materialised) >= 2
    assert torch.equal(out, attention(query, keys.materialize(), values.materialize()))


def test_keys_and_values_of_different_repeats_are_those_of_torch(materialised):
    query, keys, values = draw(ROWS, 4, 3, D), repeat_kv(pair()[0], 2), pair(heads=4)[1]
    assert keys.shape == values.shape
    out = F.scaled_dot_product_attention(query, keys, values)
    assert len(materialised) == 2
    plain = keys.materialize(), values.materialize()
    assert torch.equal(out, F.scaled_dot_product_attention(query, *plain))


def test_dropout_is_that_of_torch(materialised):
    query, (keys, values) = draw(ROWS, 2, 3, D), pair()
    outs = []
    for k, v in ((keys, values), (keys.materialize(), values.materialize())):
        torch.manual_seed(0)
        outs.append(F.scaled_dot_product_attention(query, k, v, dropout_p=0.5))
    assert torch.equal(*outs)


ERRORS: dict[str, Callable[..., Tensor]] = {
    "heads": lambda q, k, v: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), k, v),
    "groups": lambda q, k, v: F.scaled_dot_product_attention(
        draw(ROWS, 3, 3, D), k, v, enable_gqa=True
    ),
    "groups of repeated heads": lambda q, k, v: F.scaled_dot_product_attention(
        draw(ROWS, 6, 3, D), repeat_kv(k, 2), repeat_kv(v, 2), enable_gqa=True
    ),
    "repeated keys alone": lambda q, k, v: F.scaled_dot_product_attention(
        q.repeat(1, 2, 1, 1), repeat_kv(k, 2), v
    ),
    "head dim": lambda q, k, v: F.scaled_dot_product_attention(q[..., 1:], k, v),
    "double": lambda q, k, v: F.scaled_dot_product_attention(q.double(), k, v),
    "bfloat16": lambda q, k, v: F.scaled_dot_product_attention(q.bfloat16(), k, v),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, draw(3, TOKENS + 1)),
    "integer mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, draw(3, TOKENS).long()),
    "mask dtype": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, draw(3, TOKENS).bfloat16()
    ),
}


@pytest.mark.parametrize("attention", ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_torch(attention):
    query, (keys, values) = draw(ROWS, 2, 3, D), pair()
    with pytest.raises((RuntimeError, ValueError)) as expected:
        attention(query, keys.materialize(), values.materialize())
    with pytest.raises(expected.type) as error:
        attention(query, keys, values)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("part", ["query", "tail", "mask"])
def test_gradients_are_those_of_torch(part, materialised):
    query, mask = draw(ROWS, 2, 3, D), _mask[:, :2].clone()
    keys, values = pair(gradient=part == "tail")
    leaves = {"query": [query], "mask": [mask], "tail": [keys.states.recent, values.states.recent]}
    for leaf in leaves[part]:
        leaf.requires_grad_() if leaf.is_leaf else leaf.retain_grad()
    gradients = []
    for k, v in ((keys, values), (keys.materialize(), values.materialize())):
        F.scaled_dot_product_attention(query, k, v, mask).square().sum().backward()
        gradients.append([leaf.grad.clone() for leaf in leaves[part]])
        for leaf in leaves[part]:
            leaf.grad = None
    assert all(bool((x != 0).any()) for x in gradients[0])
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        materialised.clear()
        F.scaled_dot_product_attention(query, keys, values, mask)
        assert materialised == []


def test_a_detached_view_gives_no_gradient():
    keys, _ = pair(gradient=True)
    assert not keys.detach().sum().requires_grad
    assert keys.sum().requires_grad


# --- head views ---

VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], HeadView]] = {
    "new axis": (lambda x: x[:, :, None], HeadView(1, True)),
    "new axis, all slices": (lambda x: x[:, :, None, :, :], HeadView(1, True)),
    "new axis, ellipsis": (lambda x: x[..., None, :, :], HeadView(1, True)),
    "unsqueeze": (lambda x: x.unsqueeze(2), HeadView(1, True)),
    "unsqueeze from the end": (lambda x: torch.unsqueeze(x, dim=-3), HeadView(1, True)),
    "reshape": (lambda x: x.reshape(ROWS, HEADS, 1, -1, D), HeadView(1, True)),
    "expand": (lambda x: x[:, :, None].expand(ROWS, HEADS, 3, TOKENS, D), HeadView(3, True)),
    "expand -1": (lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1), HeadView(3, True)),
    "repeat_kv": (lambda x: repeat_kv(x, 3), HeadView(3)),
    "repeat_kv of one": (lambda x: repeat_kv(x, 1), HeadView()),
    "reshape -1": (
        lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(ROWS, -1, TOKENS, D),
        HeadView(3),
    ),
    "flatten": (lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2), HeadView(3)),
    "torch.flatten": (
        lambda x: torch.flatten(x[:, :, None].expand(-1, -1, 3, -1, -1), 1, 2),
        HeadView(3),
    ),
    "view of one": (lambda x: x[:, :, None].view(ROWS, HEADS, TOKENS, D), HeadView()),
    "split again": (lambda x: repeat_kv(x, 3).view(ROWS, HEADS, 3, TOKENS, D), HeadView(3, True)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, dim=1), HeadView(3)),
    "repeat_interleave, keywords": (
        lambda x: torch.repeat_interleave(x, repeats=3, dim=-3),
        HeadView(3),
    ),
    "repeated twice": (lambda x: torch.repeat_interleave(repeat_kv(x, 2), 3, 1), HeadView(6)),
    "nothing": (lambda x: x[...], HeadView()),
    "all": (lambda x: x[:, :, :, :], HeadView()),
    "all by length": (lambda x: x[:ROWS, 0:HEADS, : 10 * TOKENS], HeadView()),
    "contiguous": (lambda x: x.contiguous(), HeadView()),
    "detach": (lambda x: x.detach(), HeadView()),
    "to dtype": (lambda x: x.to(torch.float32), HeadView()),
    "to device": (lambda x: x.to("cpu"), HeadView()),
    "to device and dtype": (lambda x: x.to(device="cpu", dtype=torch.float32), HeadView()),
    "float": (lambda x: x.float(), HeadView()),
    "cpu": (lambda x: x.cpu(), HeadView()),
    "no-ops on a view": (
        lambda x: repeat_kv(x, 2).contiguous().to(torch.float32).detach()[:],
        HeadView(2),
    ),
}


@pytest.mark.parametrize(("make", "view"), VIEWS.values(), ids=VIEWS)
def test_views_share_the_states(make, view, materialised):
    keys, _ = pair()
    made = make(keys)
    assert type(made) is CompressedTensor
    assert made.states is keys.states
    assert made.view_of_heads == view
    assert materialised == []
    expected = make(keys.materialize())
    assert made.shape == expected.shape
    assert torch.equal(made.materialize(), expected)
    assert torch.equal(made * 1, expected)


NO_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda x: x[:1],
    "tokens": lambda x: x[:, :, 1:],
    "step": lambda x: x[:, :, ::2],
    "index": lambda x: x[:, torch.tensor([1, 0])],
    "mask": lambda x: x[torch.tensor([True, True])],
    "list": lambda x: x[[1, 0]],
    "axis in front": lambda x: x[None],
    "axis at the end": lambda x: x.unsqueeze(-1),
    "more rows": lambda x: x.repeat_interleave(2, dim=0),
    "more tokens": lambda x: x.repeat_interleave(2, dim=2),
    "different repeats": lambda x: x.repeat_interleave(torch.tensor([1, 3]), dim=1),
    "different repeats, keywords": lambda x: x.repeat_interleave(
        repeats=torch.tensor([1, 3]), dim=1
    ),
    "repeats of numbers": lambda x: x.repeat_interleave(2),
    "tiled heads": lambda x: x.repeat(1, 2, 1, 1),
    "expanded in front": lambda x: x.expand(ROWS, -1, -1, -1, -1),
    "rows and heads": lambda x: x.reshape(ROWS * HEADS, TOKENS, D),
    "heads in the channels": lambda x: x.reshape(ROWS, HEADS, -1, D // 2),
    "flat": lambda x: x.flatten(),
    "other numbers": lambda x: x.view(torch.int32),
    "half": lambda x: x.half(),
    "double": lambda x: x.to(torch.float64),
    "copy": lambda x: x.to(torch.float32, copy=True),
    "heads and tokens exchanged": lambda x: x.transpose(1, 2),
    "of a split view": lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1)[:, 0],
    "of a repeated one": lambda x: repeat_kv(x, 2)[:, 1:3],
    "repeats first": lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(ROWS, -1, TOKENS, D),
}


@pytest.mark.parametrize("make", NO_VIEWS.values(), ids=NO_VIEWS)
def test_everything_else_is_right_too(make):
    keys, _ = pair()
    made = make(keys)
    assert type(made) is Tensor
    assert torch.equal(made, make(keys.materialize()))


def test_numbers_seen_as_others_are_not_mistaken():
    keys, _ = pair(dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(keys.view(dtype), keys.materialize().view(dtype))


@pytest.mark.parametrize("make", [make for make, _ in VIEWS.values()], ids=VIEWS)
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 2), (2, 1), (1, 3)])
def test_views_of_few_rows_and_heads_are_not_mistaken(make, rows, heads):
    keys, _ = pair(heads, rows)
    try:
        expected = make(keys.materialize())
    except RuntimeError:  # written for other sizes
        with pytest.raises(RuntimeError):
            make(keys)
        return
    assert torch.equal(make(keys), expected)


@pytest.mark.parametrize("shape", [(2, 2, 2, 41, 16), (2, 1, 2, 41, 16), (3, 1, 1, 41, 16)])
def test_expanding_in_front_is_no_repetition_of_heads(shape):
    keys, _ = pair(shape[2], shape[1])
    assert torch.equal(keys.expand(shape), keys.materialize().expand(shape))


# --- models ---


def steps(kind: str) -> dict[str, Any]:
    """Chunks after the prompt of 40 tokens, and the padding mask."""
    mask = None
    if kind == "padded":
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :11] = 0
    return {"chunks": (40, 5, 7) if kind == "chunks" else (40, 1, 1, 1), "mask": mask}


@pytest.mark.parametrize("kind", ["tokens", "padded", "chunks"])
@pytest.mark.parametrize("name", list(MODELS))
def test_which_models_decode_without_materialising(name, kind, materialised):
    model, ids = build(name), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, **steps(kind))
    packs = any(kind != "own" for kind in MODELS[name].layers)
    assert (cache.memory().packed_numbers > 0) == packs
    assert bool(materialised) == (name in MATERIALISE)


@pytest.mark.parametrize("kind", ["tokens", "padded", "chunks"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - MATERIALISE))
def test_models_compute_what_they_do_on_materialised_states(name, kind, not_fused, materialised):
    model, ids, options = build(name), prompt(2, 60), steps(kind)
    seen = slice(11 if kind == "padded" else 0, sum(options["chunks"]))
    logits = []
    for fused in (True, False):
        if not fused:
            not_fused()
        cache = RotorQuantCache("k8v8", config=model.config, **SMALL)
        logits.append(feed(model, cache, ids, **options)[:, seen])
    assert bool(materialised) == any(kind != "own" for kind in MODELS[name].layers)
    # Rounding may move a number of a later layer into the next bin, of 256.
    assert relative_error(*logits) < 2e-4


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
def test_generation_is_that_on_materialised_states(model, sampled, quantizer, not_fused):
    texts = []
    for fused in (True, False):
        if not fused:
            not_fused()
        cache = RotorQuantCache(
            key_bits=4,
            value_bits=4,
            key_quantizer=quantizer,
            residual_length=32,
            statistics_length=0,
            query_aware=False,
        )
        ids = model.generate(
            sampled[:, :120], past_key_values=cache, max_new_tokens=200, do_sample=False
        )
        assert cache.memory().packed_numbers > 0.8 * cache.memory().numbers
        texts.append(ids[0].tolist())
    assert len(texts[0]) == 320
    assert texts[0] == texts[1]


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in self._plain((args, kwargs))}
        for x in self._plain(out):
            if x.untyped_storage().data_ptr() not in given:  # no view of what there was
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out

    @staticmethod
    def _plain(tree: Any) -> list[Tensor]:
        return [x for x in tree_leaves(tree) if type(x) is Tensor and x.device.type == "cpu"]


def largest_of_a_step(history: int, n: int) -> int:
    """Bytes of the largest tensor made while a model reads `n` tokens after `history` others."""
    model = build("llama")
    cache = RotorQuantCache("k4v4", config=model.config)
    for layer in cache.layers:
        layer.update(draw(1, 2, history, D), draw(1, 2, history, D, seed=2))
        assert len(layer.store) > 0.9 * history
    with LargestTensor() as largest:
        feed(model, cache, prompt(1, n), (n,))
    return largest.nbytes


@pytest.mark.parametrize("n", [1, 20])
def test_no_tensor_of_a_step_grows_with_the_history(n, monkeypatch, not_fused):
    monkeypatch.setattr(torch_attention, "_TILE_ELEMENTS", 1 << 13)  # 256 tokens of this model
    monkeypatch.setattr(torch_attention, "_MAX_SCORES", 1 << 13)
    history = 8000
    mask = n * (history + n)  # boolean
    assert largest_of_a_step(history, n) <= max(largest_of_a_step(history // 4, n), mask)

    not_fused()
    keys = 2 * history * D * 4
    assert largest_of_a_step(history, n) >= keys > 4 * mask


@pytest.mark.parametrize("tail", [8, 4000])
def test_no_tensor_of_a_long_chunk_is_larger_than_its_output(tail, monkeypatch):
    """However many tokens ask, and whether what they read is packed or exact."""
    monkeypatch.setattr(torch_attention, "_TILE_ELEMENTS", 1 << 13)
    monkeypatch.setattr(torch_attention, "_MAX_SCORES", 1 << 13)
    layer = RotorQuantLayer(
        RotorQuantConfig(residual_length=8, statistics_length=0, query_aware=False, block_length=8)
    )
    layer.update(draw(1, 2, 4000, D), draw(1, 2, 4000, D))
    keys, values = layer.update(draw(1, 2, tail, D), draw(1, 2, tail, D))
    query = draw(1, 4, 300, D)
    with LargestTensor() as largest:
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert largest.nbytes == out.nbytes


def test_flex_attention_takes_it():
    """Compiled, as Transformers calls it, and without a break of the graph."""
    keys, values = pair()
    query = draw(ROWS, 4, 3, D)
    out = torch.compile(flex_attention, backend="eager")(query, keys, values, enable_gqa=True)
    exact = flex_attention(query, keys.materialize(), values.materialize(), enable_gqa=True)
    torch.testing.assert_close(out, exact)
