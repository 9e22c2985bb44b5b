"""CompressedTensor: a tensor to everybody, dequantised only while it is used."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward, repeat_kv

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer

ROWS, HEADS, TOKENS, D = 2, 2, 21, 16


def visible(dtype: torch.dtype = torch.float32) -> tuple[CompressedTensor, CompressedTensor]:
    """Keys and values as attention gets them: 2 sinks, 14 packed, 4 of the window, 1 new."""
    config = RotorQuantConfig(
        residual_length=4, statistics_length=0, block_length=2, num_sink_tokens=2
    )
    layer, generator = RotorQuantLayer(config), torch.Generator().manual_seed(0)
    for count in (TOKENS - 1, 1):
        keys, values = layer.update(
            *(torch.randn(ROWS, HEADS, count, D, generator=generator).to(dtype) for _ in range(2))
        )
    return keys, values


@pytest.fixture
def keys() -> CompressedTensor:
    return visible()[0]


@pytest.fixture
def values() -> CompressedTensor:
    return visible()[1]


@pytest.fixture
def materialised(monkeypatch) -> list[CachedStates]:
    """The states that were materialised, in order."""
    found, materialize = [], CachedStates.materialize

    def remembering(self):
        found.append(self)
        return materialize(self)

    monkeypatch.setattr(CachedStates, "materialize", remembering)
    return found


def equal(a: Any, b: Any) -> bool:
    """Bitwise, also of tuples and of what is no tensor."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


# --- metadata ---

METADATA = {
    "shape": lambda x: x.shape,
    "size()": lambda x: x.size(),
    "size(-2)": lambda x: x.size(-2),
    "dim": lambda x: (x.dim(), x.ndim, x.ndimension()),
    "numel": lambda x: (x.numel(), x.nelement()),
    "len": len,
    "dtype": lambda x: x.dtype,
    "device": lambda x: (x.device, x.get_device(), x.is_cuda, x.is_cpu, x.is_meta, x.is_mps),
    "layout": lambda x: (x.layout, x.is_sparse, x.is_quantized, x.is_nested),
    "item size": lambda x: (x.itemsize, x.element_size()),
    "kind": lambda x: (x.is_floating_point(), x.is_complex(), torch.is_tensor(x)),
    "gradient": lambda x: (x.requires_grad, x.is_leaf, x.grad_fn),
}


@pytest.mark.parametrize("ask", METADATA.values(), ids=METADATA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metadata_is_that_of_the_tensor_and_reads_nothing(dtype, ask, materialised):
    for states in visible(dtype):
        answer = ask(states)
        assert materialised == []
        assert answer == ask(states.materialize())
        materialised.clear()


def test_repr_shows_what_is_packed_and_reads_nothing(keys, materialised):
    expected = "CompressedTensor(shape=(2, 2, 21, 16), dtype=torch.float32, packed=14)"
    assert [repr(keys), str(keys)] == [expected] * 2
    assert materialised == []


def test_it_is_a_tensor_of_its_own_class(keys, materialised):
    assert isinstance(keys, Tensor)
    assert type(keys) is CompressedTensor
    assert len({keys, keys}) == 1
    assert materialised == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_materialised_tensor_is_sinks_packed_and_tail(dtype):
    for states in visible(dtype):
        parts = states.states
        packed = torch.empty(parts.packed.shape, dtype=dtype)
        parts.packed.materialize(packed)
        whole = torch.cat((parts.sinks, packed, parts.recent), dim=2)
        assert whole.shape[2] == TOKENS
        assert equal(states.materialize(), whole)


# --- every operation is that on the materialised tensor ---

_query = torch.randn(ROWS, 2 * HEADS, 3, D, generator=torch.Generator().manual_seed(1))
_bias = torch.randn(ROWS, 1, 3, TOKENS, generator=torch.Generator().manual_seed(2))

OPERATIONS = {
    "matmul": lambda x: _query[:, :HEADS] @ x.transpose(-1, -2),
    "rmatmul": lambda x: x @ _query[:, :HEADS].mT,
    "torch.matmul": lambda x: torch.matmul(_query[:, :HEADS], x.mT),
    "einsum": lambda x: torch.einsum("bhqd,bhkd->bhqk", _query[:, :HEADS], x),
    "bmm": lambda x: torch.bmm(_query[:, :HEADS].flatten(0, 1), x.flatten(0, 1).mT),
    "cat": lambda x: torch.cat([x, x[:, :, :2]], dim=2),
    "cat after": lambda x: torch.cat([torch.zeros(ROWS, HEADS, 1, D), x], dim=2),
    "stack": lambda x: torch.stack([x, x]),
    "slice": lambda x: x[:, :, -5:],
    "step": lambda x: x[..., ::2],
    "index": lambda x: x[1, 0, 7],
    "gather": lambda x: x[:, :, torch.tensor([0, 20, 3])],
    "boolean mask": lambda x: x[x > 0],
    "new axis": lambda x: x[:, :, None],
    "repeat_kv": lambda x: repeat_kv(x, 2),
    "repeat_kv of one": lambda x: repeat_kv(x, 1) + 0,
    "expand and reshape": lambda x: (
        x[:, :, None].expand(ROWS, HEADS, 3, TOKENS, D).reshape(ROWS, -1, TOKENS, D)
    ),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3).contiguous().view(ROWS, TOKENS, -1),
    "T": lambda x: x.mT,
    "view": lambda x: x.view(ROWS * HEADS, TOKENS, D),
    "flatten": lambda x: x.flatten(2),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "to dtype": lambda x: x.to(torch.bfloat16),
    "to device": lambda x: x.to("cpu") + 0,
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "compare": lambda x: x > 0.5,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x * 1.0),
    "arithmetic": lambda x: 2 * x + x / 3 - x**2,
    "reflected": lambda x: (1 - x, 1 / x, -x, abs(x)),
    "sum": lambda x: x.sum(),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "max": lambda x: x.max(dim=-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "linear": lambda x: F.linear(x, torch.ones(3, D)),
    "split": lambda x: x.split(10, dim=2),
    "chunk and unbind": lambda x: (x.chunk(2, dim=-1), x.unbind(0)),
    "iteration": list,
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0, 0, 0, 0].item(),
    "bool": lambda x: bool((x == x).all()),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "new_zeros": lambda x: x.new_zeros(3),
    "zeros_like": lambda x: torch.zeros_like(x),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "stride": lambda x: (x.stride(), x.is_contiguous(), x.storage_offset()),
    "sdpa as key": lambda x: F.scaled_dot_product_attention(_query[:, :HEADS], x, x.clone()),
    "aten": lambda x: torch.ops.aten.mul(x, 2.0),
    "aten overload": lambda x: torch.ops.aten.add.Tensor(x, x),
    "aten on the right": lambda x: torch.ops.aten.cat([torch.zeros(ROWS, HEADS, 1, D), x], 2),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_are_those_on_the_materialised_tensor(operation, keys):
    assert equal(operation(keys), operation(keys.materialize()))


# They give the same numbers, presented otherwise.
STAY_COMPRESSED = {
    "new axis",
    "repeat_kv",
    "expand and reshape",
    "repeat_interleave",
    "float",
    "contiguous",
    "detach",
}


@pytest.mark.parametrize("name", sorted(STAY_COMPRESSED))
def test_results_that_only_present_the_numbers_otherwise_stay_compressed(name, keys, materialised):
    assert type(OPERATIONS[name](keys)) is CompressedTensor
    assert materialised == []


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - STAY_COMPRESSED))
def test_other_results_are_ordinary_tensors(name, keys):
    stack = [OPERATIONS[name](keys)]
    while stack:
        item = stack.pop()
        assert not isinstance(item, CompressedTensor)
        if isinstance(item, tuple | list):
            stack.extend(item)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.add(x, 1),
        lambda x: torch.ops.aten.add.Tensor(x, 1),
        lambda x: torch.ops.aten.bmm(x.flatten(0, 1), x.flatten(0, 1).mT),
        lambda x: torch.cat([x, x]),
        lambda x: F.scaled_dot_product_attention(_query[:, :HEADS], x, x),
    ],
)
def test_operators_called_past_torch_function_work_too(operation, keys, materialised):
    """As from C++: only `__torch_dispatch__` sees them."""
    with torch._C.DisableTorchFunctionSubclass():
        result = operation(keys)
    assert materialised
    assert type(result) is Tensor
    torch.testing.assert_close(result, operation(keys.materialize()))


# --- attention ---


def _reference(keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of `_query`, two query heads per kv head, spelt out."""
    keys, values = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    scores = _query @ keys.mT / D**0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ values


@pytest.mark.parametrize(
    "mask",
    [None, _bias, _bias > 0, (_bias > 0).expand(ROWS, 2 * HEADS, 3, TOKENS)],
    ids=["none", "additive", "boolean", "boolean by head"],
)
def test_sdpa_reads_the_packed_codes(keys, values, mask, materialised):
    out = F.scaled_dot_product_attention(_query, keys, values, attn_mask=mask, enable_gqa=True)
    assert materialised == []

    plain = keys.materialize(), values.materialize()
    expected = F.scaled_dot_product_attention(_query, *plain, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(out, _reference(*plain, bias), rtol=1e-4, atol=1e-5)


def test_sdpa_takes_keywords_and_plain_values(keys, values, materialised):
    out = F.scaled_dot_product_attention(query=_query[:, :HEADS], key=keys, value=values, scale=0.1)
    assert materialised == []
    plain = values.materialize()
    expected = F.scaled_dot_product_attention(_query[:, :HEADS], keys, plain, scale=0.1)
    assert materialised == [values.states, keys.states]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_eager_attention_materialises_keys_and_values_once_each(keys, values, groups, materialised):
    module = torch.nn.Module().eval()
    module.num_key_value_groups = groups
    out = [
        eager_attention_forward(module, _query[:, : groups * HEADS], k, v, _bias, D**-0.5)[0]
        for k, v in ((keys, values), (keys.states.materialize(), values.states.materialize()))
    ]
    assert equal(*out)
    assert materialised == [keys.states, values.states] * 2


def test_the_two_of_an_update_are_not_confused(keys, values):
    assert not torch.equal(keys, values)
    assert keys.states.recent is not values.states.recent
    assert torch.equal(keys[:, :, -5:], keys.states.recent)
    assert torch.equal(values[:, :, -5:], values.states.recent)


def test_sliding_layers_hide_packed_tokens_that_are_kept_for_a_crop():
    config = RotorQuantConfig(residual_length=2, statistics_length=0, block_length=2)
    layer, window = RotorQuantSlidingLayer(config, 6), 6
    layer.activate_past_recording()
    for _ in range(4):
        keys, _ = layer.update(*(torch.randn(1, 1, 4, D) for _ in range(2)))
    assert isinstance(keys, CompressedTensor)
    assert keys.shape[2] == window - 1 + 4
    everything = layer.keys.materialize()
    assert everything.shape[2] == 16
    # It saw its own 4 exactly, before it 1 or 2 exactly, and before those what is packed.
    torch.testing.assert_close(keys[:, :, :3], everything[:, :, -9:-6])
    assert torch.equal(keys[:, :, -2:], everything[:, :, -2:])
    assert not torch.equal(keys[:, :, -4:-2], everything[:, :, -4:-2])


# --- writing ---

WRITES = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(2),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(1),
    "copy_": lambda x: x.copy_(torch.zeros(x.shape)),
    "clamp_": lambda x: x.clamp_(0, 1),
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(x.shape).bool(), 1),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([0]), torch.zeros(ROWS, HEADS, 1, D)),
    "transpose_": lambda x: x.transpose_(1, 2),
    "nn.init": lambda x: torch.nn.init.zeros_(x),
    "relu_": lambda x: F.relu_(x),
    "+=": lambda x: operator.iadd(x, 1),
    "*=": lambda x: operator.imul(x, 2),
    "item": lambda x: operator.setitem(x, (0, 0, 0), 1.0),
    "slice": lambda x: operator.setitem(x, slice(None), 1.0),
    "data": lambda x: setattr(x, "data", torch.zeros(x.shape)),
    "aten": lambda x: torch.ops.aten.add_(x, 1),
    "aten overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "out": lambda x: torch.add(torch.ones(x.shape), 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "inplace=True": lambda x: F.relu(x, inplace=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_is_refused(write, keys, materialised):
    """Not lost: it would go into a copy that nobody reads."""
    with pytest.raises(RuntimeError, match=r"stored quantised; write into a copy \(tensor.clone"):
        write(keys)
    assert materialised == []


@pytest.mark.parametrize(
    "write",
    [lambda x: x.add_(1), lambda x: torch.ops.aten.add_.Tensor(x, 1)],
)
def test_writing_past_torch_function_is_refused(write, keys):
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match="stored quantised"),
    ):
        write(keys)


def test_writing_into_other_tensors_is_not_refused(keys):
    expected = keys.materialize()
    buffer = torch.zeros(ROWS, HEADS, TOKENS, D)
    assert equal(buffer.copy_(keys), expected)
    buffer[:, :, :5] = keys[:, :, -5:]
    assert equal(buffer[:, :, :5], expected[:, :, -5:])
    assert equal(torch.add(keys, 1, out=buffer), expected + 1)
    assert equal(buffer.add_(keys), expected + 1 + expected)
    buffer -= keys
    assert equal(buffer, expected + 1 + expected - expected)


def test_a_clone_may_be_written(keys):
    before, copied = keys.materialize(), keys.clone()
    copied.zero_()
    assert equal(keys.materialize(), before)


# --- copies ---


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), _saved],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_are_ordinary_tensors_with_the_same_numbers(copied, keys):
    twin = copied(keys)
    assert type(twin) is Tensor
    assert equal(twin, keys.materialize())


def test_every_materialisation_is_a_tensor_of_its_own(keys):
    first, second = keys.materialize(), keys.materialize()
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert equal(keys.materialize(), second)


def by_passes(first: torch.Tensor, second: torch.Tensor, recorded: bool, **window):
    """The sum of what a query reads of keys and values from two passes."""
    config = RotorQuantConfig(**{**FEW, **window})
    layer = RotorQuantLayer(config)
    with torch.set_grad_enabled(recorded):
        layer.update(first, first)
    query = torch.randn(1, 1, 1, D, generator=torch.Generator().manual_seed(0))
    return F.scaled_dot_product_attention(query, *layer.update(second, second)).sum()


FEW = {"residual_length": 4, "statistics_length": 0, "block_length": 2, "num_sink_tokens": 0}


def test_gradients_flow_to_new_tokens():
    old = torch.randn(1, 1, 20, D)
    new = torch.randn(1, 1, 3, D, requires_grad=True)
    by_passes(old, new, True).backward()
    assert bool((new.grad != 0).all())


@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_that_quantised_tokens_would_lack_are_refused(recorded):
    """Not so where they were not wanted: a pass without them, or nothing quantised."""
    old, new = (torch.randn(1, 1, n, D, requires_grad=True) for n in (20, 3))
    if recorded:
        for window in ({}, {"residual_length": 0}):
            for then in (new, new.detach()):
                read = by_passes(old, then, True, **window)
                with pytest.raises(RuntimeError, match="quantised in an earlier pass"):
                    read.backward()
        assert old.grad is None
        by_passes(old, new, True, residual_length=40).backward()
        assert bool((old.grad != 0).all())
    by_passes(old.detach() if recorded else old, new, recorded).backward()
    assert bool((new.grad != 0).any())


def test_recorded_tokens_changed_in_inference_mode_are_read_and_refuse_gradients():
    """Autograd refuses tensors of that mode as such."""
    old, new = (torch.randn(2, 1, n, D, requires_grad=True) for n in (20, 3))
    layers = RotorQuantLayer(RotorQuantConfig(**FEW)), RotorQuantLayer(RotorQuantConfig(**FEW))
    read = []
    for layer, mode in zip(layers, (torch.no_grad, torch.inference_mode), strict=True):
        layer.update(old, old)
        with mode():
            layer.reorder_cache(torch.tensor([1, 0]))
        query = torch.randn(2, 1, 1, D, generator=torch.Generator().manual_seed(0))
        read.append(F.scaled_dot_product_attention(query, *layer.update(new, new)))
    assert torch.equal(*read)
    with pytest.raises(RuntimeError, match="quantised in an earlier pass"):
        read[1].sum().backward()


def test_gradients_come_back_when_the_tokens_that_lack_them_are_gone():
    layer = RotorQuantLayer(RotorQuantConfig(**FEW))
    old, new = (torch.randn(1, 1, n, D, requires_grad=True) for n in (20, 3))
    layer.update(old, old)
    layer.crop(-20)
    with torch.no_grad():
        layer.update(old, old)
    query = torch.randn(1, 1, 1, D)
    F.scaled_dot_product_attention(query, *layer.update(new, new)).sum().backward()
    assert bool((new.grad != 0).all())
