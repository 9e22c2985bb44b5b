"""Decoding steps through a buffer of recent tokens, beside the same steps without one."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention.dispatch import attend
from rotorquant_hf.attention.native_attention import Plan, _native_terms
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import BufferStates, CachedStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.attention.torch_attention import attend_tiled
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.recent import RecentBuffer
from tests.helpers.models import same, snapshot

B, HEADS, D_KEY, D_VALUE = 2, 3, 32, 24
SMALL = {
    "residual_length": 8,
    "block_length": 4,
    "num_sink_tokens": 2,
    "statistics_length": 0,
    "query_aware": False,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def layer(**options):
    return RotorQuantLayer(RotorQuantConfig(**SMALL | options))


def tokens(n, seed=0, dtype=torch.float32):
    """Keys and values as a model's projections leave them: heads and tokens interleaved."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, n, HEADS, D_KEY), (B, n, HEADS, D_VALUE)
    return [torch.randn(x, generator=generator).to(dtype).transpose(1, 2) for x in shapes]


def started(**options):
    """A layer that has decoded through its buffer: sinks, packed tokens, and 9 recent ones."""
    target = layer(**options)
    target.update(*tokens(18, 100))
    target.update(*tokens(1, 101))
    assert target.buffer is not None
    assert (len(target.store), target.recent_length) == (8, 9)
    return target


def dense(x):
    return x.materialize() if isinstance(x, CompressedTensor) else x


SIZES = {
    "one by one": [20, *[1] * 21],
    "few at a time": [20, *[1, 3, 2] * 5],
    "from the first token": [3, *[1] * 30],
    "blocks and more": [20, 3, 1, 4, 1, 1, 13, 2, 1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_steps_hold_what_they_hold_without_a_buffer(sizes, dtype, monkeypatch):
    """Bit by bit, packed rows included; and what attention was handed stays as it was."""
    with_buffer, without, held = layer(), layer(), []
    for seed, n in enumerate(sizes):
        new = tokens(n, seed, dtype)
        seen = with_buffer.update(*new)
        with monkeypatch.context() as patched:
            patched.setattr(RecentBuffer, "step", lambda *_: None)
            wanted = without.update(*new)
        assert without.buffer is None
        held.append([*seen, *(dense(x).clone() for x in wanted)])
        assert same(snapshot(with_buffer), snapshot(without))
    for keys, values, wanted_keys, wanted_values in held:
        assert torch.equal(dense(keys), wanted_keys)
        assert torch.equal(dense(values), wanted_values)
    through = [isinstance(x.states, BufferStates) for x, *_ in held if type(x) is not torch.Tensor]
    assert through.count(True) >= 3


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sinks": {"sink_logits": torch.linspace(-2, 2, 2 * HEADS)},
    "mask": {"mask": torch.rand(B, 1, 1, 64, generator=torch.Generator().manual_seed(5)) > 0.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_goes_by_one_plan_until_a_block_leaves(options, quantizer, dtype):
    target, plans = layer(key_quantizer=quantizer), []
    target.update(*tokens(21, 100, dtype))
    for step in range(9):
        keys, values = (x.states for x in target.update(*tokens(1 + step % 2, step, dtype)))
        query = torch.randn(B, 2 * HEADS, 1, D_KEY).to(dtype)
        mask = options.get("mask")
        own = options if mask is None else {"mask": mask[..., : keys.shape[2]]}
        asked = AttentionOptions(scale=0.3, **own)
        plain = [CachedStates(x.sinks, x.packed, x.recent) for x in (keys, values)]
        wanted = attend_tiled(query, *plain, asked)
        found = attend(query, keys, values, asked)
        assert found.dtype == dtype
        exact = dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6 if exact else 2e-2)
        if isinstance(keys, BufferStates):
            plans.append(keys.plans[Plan])
    assert len(plans) > len({id(x) for x in plans}) > 1


def test_a_plan_is_of_the_keys_and_values_that_it_was_made_of():
    first, second = started(), started()
    a, b = first.update(*tokens(1, 1)), second.update(*tokens(1, 2))
    query, options = torch.randn(B, HEADS, 1, D_KEY), AttentionOptions(scale=1.0)
    for keys, values in ((a[0], a[1]), (b[0], b[1]), (a[0], b[1]), (b[0], a[1])):
        wanted = attend_tiled(query, keys.states, values.states, options)
        found = attend(query, keys.states, values.states, options)
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)


def test_a_plan_keeps_the_tables_that_it_points_to():
    """Of which there is otherwise only a cache, that forgets."""
    keys, values = (x.states for x in started().update(*tokens(1, 1)))
    attend(torch.randn(B, HEADS, 1, D_KEY), keys, values, AttentionOptions(scale=1.0))
    terms = [*_native_terms(keys.packed.quantizer), *_native_terms(values.packed.quantizer)]
    held = [weakref.ref(x.basis) for x in terms]
    del terms
    _native_terms.cache_clear()
    gc.collect()
    assert all(ref() is not None for ref in held)
    keys.plans.clear()
    gc.collect()
    assert all(ref() is None for ref in held)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused_and_nothing_changes(side, dtype, value):
    target = layer()
    for n, seed in ((18, 0), (1, 1)):
        target.update(*tokens(n, seed, dtype))
    before, buffer = snapshot(target), target.buffer
    new = tokens(2, 2, dtype)
    new[side][1, 2, 1, 7] = value
    with pytest.raises(ValueError, match=f"{('keys', 'values')[side]}: 1 entries are NaN"):
        target.update(*new)
    assert same(snapshot(target), before)
    largest = tokens(1, 3, dtype)
    largest[side][0, 0, 0, 0] = torch.finfo(dtype).max
    target.update(*largest)
    assert target.buffer is buffer
    for x, y in zip(target.recent, largest, strict=True):
        assert torch.equal(x[:, :, -1:], y)


def test_tokens_of_another_kind_are_none_of_the_buffers():
    """What cannot just be copied goes the long way, and is refused or taken there."""
    for new, message in (
        (tokens(1)[::-1], "head dim"),
        ([x[:1] for x in tokens(1)], "batch size"),
        ([x[:, :2] for x in tokens(1)], "number of heads"),
        ([tokens(1)[0], tokens(2)[1]], "must agree"),
        ([x[0] for x in tokens(1)], "pass \\(batch, heads"),
    ):
        target = started()
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            target.update(*new)
        assert same(snapshot(target), before)
    target = started()
    keys, _ = target.update(*tokens(1, dtype=torch.float64))
    assert (keys.dtype, target.recent[0].dtype, target.recent_length) == (*[torch.float64] * 2, 10)
    target = started()
    new = [x.mT.contiguous().mT for x in tokens(1, 5)]  # channels apart
    target.update(*new)
    assert target.buffer is not None
    assert torch.equal(target.recent[0][:, :, -1:], new[0])


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.crop(-3),
        lambda x: x.crop(-11),  # packed tokens too
        lambda x: x.reorder_cache(torch.tensor([1, 0])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: setattr(x, "sinks", tuple(2 * part for part in x.sinks)),
        lambda x: x.store.crop(2),
        lambda x: x.store.drop_front(2),
        lambda x: x.store.append(*tokens(3, 9)),
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_whatever_is_done_to_a_layer_its_next_step_reads_it(act):
    """Beside a layer without a buffer to which the same is done."""
    target, plain = started(), started()
    plain.recent = tuple(x.clone() for x in plain.recent)
    assert plain.buffer is None
    changed = [act(x) or x for x in (target, plain)]
    for seed in (1, 2):
        new = [x.repeat(changed[0].batch_size // B, 1, 1, 1) for x in tokens(1, seed)]
        found, wanted = (x.update(*new) for x in changed)
        assert torch.equal(dense(found[0]), dense(wanted[0]))
        assert torch.equal(dense(found[1]), dense(wanted[1]))
    assert all(x.buffer is not None for x in changed)


def test_a_fork_writes_into_a_buffer_of_its_own():
    target = started()
    fork, before = copy.copy(target), [dense(target.keys).clone(), dense(target.values).clone()]
    seen = [x.update(*tokens(1, seed)) for seed, x in enumerate((target, fork))]
    for seed, found in enumerate(seen):
        for x, old, new in zip(found, before, tokens(1, seed), strict=True):
            assert torch.equal(dense(x), torch.cat((old, new), dim=2))


def test_other_ways_of_computing_go_on_from_the_buffer():
    for enter in (lambda: backend("torch"), torch.enable_grad):
        target, plain = started(), started()
        plain.recent = tuple(x.clone() for x in plain.recent)
        new = tokens(1, 1)
        with enter():
            found, wanted = target.update(*new), plain.update(*new)
        assert target.buffer is None
        assert torch.equal(dense(found[0]), dense(wanted[0]))
    with torch.enable_grad():
        target, (keys, values) = started_without_gradients(), tokens(1, 1)
        target.update(keys.requires_grad_(), values)[0].materialize().sum().backward()
    assert target.recent[0].requires_grad


def started_without_gradients():
    with torch.no_grad():
        return started()


def test_steps_in_inference_mode_and_outside_share_a_buffer():
    target = layer()
    with torch.inference_mode():
        target.update(*tokens(18))
        target.update(*tokens(1, 1))
    buffer = target.buffer
    target.update(*tokens(1, 2))
    with torch.inference_mode():
        keys, _ = target.update(*tokens(1, 3))
    assert target.buffer is buffer is not None
    assert torch.equal(dense(keys)[:, :, -2:-1], tokens(1, 2)[0])


def test_a_step_makes_few_calls():
    """Of Python, from the cache's update to the end of attention; and none takes more with time."""
    cache = RotorQuantCache(**SMALL | {"block_length": 16})
    cache.update(*tokens(60), 0)
    counts = []

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    for step in range(3):
        new, calls = tokens(1, step), 0
        query = torch.randn(B, HEADS, 1, D_KEY)
        sys.setprofile(count)
        keys, values = cache.update(*new, 0)
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        sys.setprofile(None)
        counts.append(calls)
    assert counts[1] == counts[2] <= 60


def test_the_kernels_take_over_what_is_in_the_buffer():
    target, twin = started(), started()
    twin.update(*tokens(1, 1))
    with backend("triton"):
        keys, values = target.update(*tokens(1, 1))
        assert target.buffer is None
        assert target.ring is not None
        assert torch.equal(dense(keys), dense(twin.keys))
        assert torch.equal(dense(values), dense(twin.values))
    new = tokens(1, 2)
    keys, values = target.update(*new)
    assert target.ring is None
    assert target.buffer is not None
    assert torch.equal(dense(keys), dense(twin.update(*new)[0]))
