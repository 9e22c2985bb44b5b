"""Transformers' cache protocol, with the layers and caches of Transformers as the oracle."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rotorquant_hf import RotorQuantCache, RotorQuantConfig, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.store.side import PackedSide
from tests.helpers import models
from tests.helpers.models import build, feed, prompt, same, snapshot, storages

SMALL = {"residual_length": 8, "statistics_length": 0, "query_aware": False, "block_length": 4}
TINY = {
    "residual_length": 3,
    "statistics_length": 0,
    "query_aware": False,
    "block_length": 2,
    "num_sink_tokens": 2,
}
EVERYTHING_EXACT = 10_000
CHUNKS = (9, 1, 1, 6, 1, 1, 1, 4, 2, 1)


class Source:
    """Keys and values that never repeat; rows, heads and channels differ in size and offset."""

    def __init__(self, rows: int = 2, heads: int = 2, d_key: int = 16, d_value: int = 12):
        self.rows, self.heads, self.dims = rows, heads, (d_key, d_value)
        self._seed = itertools.count()
        generator = torch.Generator().manual_seed(99)
        self._scale = [torch.randn(9, heads, 1, d, generator=generator).exp() for d in self.dims]
        self._shift = [torch.randn(9, heads, 1, d, generator=generator) for d in self.dims]

    def __call__(self, tokens: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(next(self._seed))
        row = torch.arange(self.rows) % 9
        keys, values = (
            torch.randn(self.rows, self.heads, tokens, d, generator=generator) * scale[row]
            + shift[row]
            for d, scale, shift in zip(self.dims, self._scale, self._shift, strict=True)
        )
        return keys, values


def plain(states: Tensor) -> Tensor:
    """Keys or values as an ordinary tensor."""
    return states.materialize() if isinstance(states, CompressedTensor) else states


def held(layer: Any) -> tuple[Tensor, Tensor]:
    """What the layer holds, as ordinary tensors."""
    return plain(layer.keys), plain(layer.values)


def assert_close(ours: Any, theirs: Any) -> None:
    """Equal but for the rounding of a matrix product of another size."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def full_layer(**options: Any) -> RotorQuantLayer:
    return RotorQuantLayer(RotorQuantConfig(**TINY | options))


def sliding_layer(window: int = 10, **options: Any) -> RotorQuantSlidingLayer:
    return RotorQuantSlidingLayer(RotorQuantConfig(**TINY | options), window)


LAYERS = {
    "full": full_layer,
    "sliding": functools.partial(sliding_layer, equalize_values=0.0),
    "signs": functools.partial(full_layer, key_quantizer="prod"),
    "centred": functools.partial(full_layer, center_keys=True, equalize_values=0.5),
    "sliding-centred": functools.partial(sliding_layer, center_keys=True, equalize_values=0.0),
}


# --- random operations, exact ---

_operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.one_of(st.integers(1, 4), st.integers(5, 25))),
        st.tuples(st.just("update"), st.one_of(st.integers(1, 4), st.integers(5, 25))),
        st.tuples(st.just("crop"), st.integers(0, 30)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("mask"), st.integers(0, 99)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("record"), st.just(0)),
    ),
    min_size=1,
    max_size=14,
)


class Twins:
    """A layer and its oracle, which every operation is done to."""

    def __init__(self, layer: Any, make_oracle: Any):
        self.layer, self.make_oracle = layer, make_oracle
        self.oracle = make_oracle()
        self.source = Source(rows=3)

    def run(self, operations: list[tuple[str, int]]) -> Any:
        """Do the operations; yields (returned, oracle's returned) after each, or (None, None)."""
        for name, argument in operations:
            yield getattr(self, name)(argument) or (None, None)

    def update(self, tokens: int) -> Any:
        states = self.source(tokens)
        visible, _ = self.oracle.get_mask_sizes(tokens)
        ours, theirs = self.layer.update(*states), self.oracle.update(*states)
        # Before transformers 5.18 a sliding layer that records returns more than its mask covers.
        return ours, tuple(x[:, :, x.shape[2] - visible :] for x in theirs)

    def crop(self, tokens: int) -> None:
        if not self.oracle.is_initialized:
            return
        length, kept = self.oracle.get_seq_length(), self.oracle.keys.shape[2]
        window = getattr(self.oracle, "sliding_window", length + 1)
        if length >= window and not self.oracle.record_past:
            before = snapshot(vars(self.layer))
            for twin in (self.layer, self.oracle):
                with pytest.raises(RuntimeError, match="activate_past_recording"):
                    twin.crop(-tokens)
            assert same(before, snapshot(vars(self.layer)))
            return
        # Tokens that have left a sliding window cannot be had back.
        most = length if kept == length else kept - (window - 1)
        for twin in (self.layer, self.oracle):
            twin.crop(-min(tokens, most))

    def _batch(self, operation: str, argument: Any) -> None:
        if self.oracle.get_seq_length():
            for twin in (self.layer, self.oracle):
                getattr(twin, operation)(argument)

    def reorder(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = self.source.rows
        self._batch("reorder_cache", torch.randint(0, rows, (rows,), generator=generator))

    def repeat(self, times: int) -> None:
        if self.oracle.get_seq_length() and self.source.rows <= 4:
            self._batch("batch_repeat_interleave", times)
            self.source.rows *= times

    def select(self, seed: int) -> None:
        if self.oracle.get_seq_length():
            generator = torch.Generator().manual_seed(seed)
            count = 1 + seed % self.source.rows
            indices = torch.randint(0, self.source.rows, (count,), generator=generator)
            self._batch("batch_select_indices", indices)
            self.source.rows = count

    def mask(self, seed: int) -> None:
        if self.oracle.get_seq_length():
            keep = torch.arange(self.source.rows) % 3 == seed % min(3, self.source.rows)
            self._batch("batch_select_indices", keep)
            self.source.rows = int(keep.sum())

    def reset(self, _: int) -> None:
        # A new oracle: before transformers 5.18 reset() only zeroed the states of a layer.
        recording = getattr(self.oracle, "record_past", False)
        self.layer.reset()
        self.oracle = self.make_oracle()
        if recording:
            self.oracle.activate_past_recording()

    def record(self, _: int) -> None:
        if hasattr(self.oracle, "activate_past_recording"):
            for twin in (self.layer, self.oracle):
                twin.activate_past_recording()

    def check_sizes(self) -> None:
        assert self.layer.is_initialized == self.oracle.is_initialized
        assert self.layer.get_seq_length() == self.oracle.get_seq_length()
        assert self.layer.get_max_length() == self.oracle.get_max_length()
        for queries in (1, 3, 40):
            assert self.layer.get_mask_sizes(queries) == self.oracle.get_mask_sizes(queries)
        if self.oracle.is_initialized:
            assert self.layer.keys.shape == self.oracle.keys.shape
            assert self.layer.values.shape == self.oracle.values.shape
            assert self.layer.batch_size == self.source.rows


def _exact_twins(window: int | None) -> Twins:
    config = RotorQuantConfig(
        residual_length=EVERYTHING_EXACT, statistics_length=0, query_aware=False
    )
    if window is None:
        return Twins(RotorQuantLayer(config), DynamicLayer)
    oracle = functools.partial(DynamicSlidingWindowLayer, window)
    return Twins(RotorQuantSlidingLayer(config, window), oracle)


@pytest.mark.parametrize("window", [None, 2, 7, 16])
def test_random_operations_leave_exactly_what_the_oracle_has(window):
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(_operations)
    def check(operations):
        twins = _exact_twins(window)
        for ours, theirs in twins.run(operations):
            twins.check_sizes()
            if ours is not None:
                assert all(type(x) is Tensor for x in ours)
                assert all(map(torch.equal, ours, theirs))
            if twins.oracle.is_initialized:
                assert torch.equal(twins.layer.keys, twins.oracle.keys)
                assert torch.equal(twins.layer.values, twins.oracle.values)

    check()


@pytest.mark.parametrize("window", [None, 2, 7, 16])
def test_random_operations_leave_nearly_what_the_oracle_has_in_8_bits(window):
    def error(ours: Tensor, theirs: Tensor) -> float:
        return float(((plain(ours) - theirs).norm() / theirs.norm().clamp(min=1e-9)).nan_to_num())

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(_operations, st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))
    def check(operations, residual, block, sinks):
        twins = _exact_twins(window)
        twins.layer.config = RotorQuantConfig.from_options(
            "k8v8",
            residual_length=residual,
            statistics_length=0,
            query_aware=False,
            block_length=block,
            num_sink_tokens=sinks,
        )
        for ours, theirs in twins.run(operations):
            twins.check_sizes()
            if ours is not None:
                assert [x.shape for x in ours] == [x.shape for x in theirs]
                assert max(map(error, ours, theirs)) < 0.03
            if twins.oracle.is_initialized:
                assert error(twins.layer.keys, twins.oracle.keys) < 0.03
                assert error(twins.layer.values, twins.oracle.values) < 0.03
                assert twins.layer.recent[0].shape[2] < residual + block

    check()


# --- which tokens are exact ---


@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, CHUNKS, (2, 1, 30, 1, 6)], ids=str)
@pytest.mark.parametrize(
    ("residual", "block", "sinks"), [(3, 2, 2), (8, 4, 4), (0, 1, 0), (5, 7, 3), (0, 5, 1)]
)
def test_sinks_and_window_are_exact_and_the_rest_is_quantised(residual, block, sinks, chunks):
    layer = full_layer(
        residual_length=residual,
        statistics_length=0,
        query_aware=False,
        block_length=block,
        num_sink_tokens=sinks,
    )
    source, seen, first, last = Source(), [], 0, 0
    for count in chunks:
        seen.append(source(count))
        layer.update(*seen[-1])
        # What the sizes must be, counted here independently.
        first_new = min(sinks - first, count)
        first, last = first + first_new, last + count - first_new
        while last >= residual + block:
            last -= block
        total = sum(x[0].shape[2] for x in seen)
        for side, states in enumerate(held(layer)):
            exact = torch.cat([x[side] for x in seen], dim=2)
            equal = (states == exact).all(dim=3).all(dim=1).all(dim=0)
            position = torch.arange(total)
            assert torch.equal(equal, (position < first) | (position >= total - last))
        assert (layer.sinks[0].shape[2], len(layer.store), layer.recent[0].shape[2]) == (
            first,
            total - first - last,
            last,
        )


@pytest.mark.parametrize("window", [4, 9, 20])
def test_sliding_layers_keep_recent_tokens_exact_and_have_no_sinks(window):
    layer, source = sliding_layer(window), Source()
    total, seen = 0, []
    for count in (*CHUNKS, 1, 1, 25, 1, 1, 1):
        seen.append(source(count))
        layer.update(*seen[-1])
        total += count
        kept = min(total, window - 1)
        exact = torch.cat([x[0] for x in seen], dim=2)[:, :, total - kept :]
        equal = (held(layer)[0] == exact).all(dim=3).all(dim=1).all(dim=0).tolist()
        tail = layer.recent[0].shape[2]
        assert equal == [False] * (kept - tail) + [True] * tail
        assert min(kept, TINY["residual_length"]) <= tail
        assert tail < TINY["residual_length"] + TINY["block_length"]


@pytest.mark.parametrize("kind", LAYERS)
def test_new_tokens_are_seen_exactly_and_older_ones_as_stored_before(kind):
    layer, source = LAYERS[kind](), Source()
    for count in (*CHUNKS, 30, 1):
        before = held(layer) if layer.is_initialized else None
        new = source(count)
        for side, visible in enumerate(layer.update(*new)):
            assert torch.equal(plain(visible)[:, :, -count:], new[side])
            if before is not None:
                assert torch.equal(plain(visible)[:, :, :-count], before[side])


@pytest.mark.parametrize("kind", LAYERS)
def test_update_returns_plain_tensors_until_something_is_packed(kind):
    layer, source = LAYERS[kind](), Source()
    packed = []
    for count in (2, 2, 2, 1, 1, 1):
        anything = layer.is_initialized and len(layer.store) > 0
        types = {type(x) for x in layer.update(*source(count))}
        assert types == {CompressedTensor if anything else Tensor}
        packed.append(anything)
    assert packed[0] is False
    assert packed[-1] is True


@pytest.mark.parametrize("kind", LAYERS)
def test_what_update_returned_stays_as_it_was(kind):
    layer, source = LAYERS[kind](), Source()
    layer.update(*source(20))
    returned = [layer.update(*source(1)) for _ in range(3)]
    before = [[plain(x).clone() for x in pair] for pair in returned]
    for count in (1, 1, 40, 1, 90, 1):  # past the capacity of the buffers
        layer.update(*source(count))
    after = [[plain(x) for x in pair] for pair in returned]
    assert same(before, after)


@pytest.mark.parametrize("kind", LAYERS)
def test_writing_into_what_was_given_or_returned_does_not_reach_the_cache(kind):
    layer, twin, source = LAYERS[kind](), LAYERS[kind](), Source()
    for count in (2, 1, *CHUNKS):
        states = source(count)
        twin.update(*(x.clone() for x in states))
        returned = layer.update(*states)
        for x in (*states, *returned):
            if not isinstance(x, CompressedTensor):
                x.zero_()
        assert same(snapshot(vars(layer)), snapshot(vars(twin)))


# --- each token is quantised once ---


@pytest.fixture
def quantised(monkeypatch):
    """Numbers of vectors that are coded, call by call."""
    counts, append = [], PackedSide.append

    def counting(self, x, *args):
        counts.append(x.shape[:-1].numel())
        return append(self, x, *args)

    monkeypatch.setattr(PackedSide, "append", counting)
    return counts


def test_every_token_is_quantised_once(quantised):
    layer, source = full_layer(), Source()
    total = 0
    for count in CHUNKS:
        layer.update(*source(count))
        total += count
        held(layer)
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.offload()
        layer.prefetch()
    left = total - TINY["num_sink_tokens"] - layer.recent[0].shape[2]
    assert len(layer.store) == left > 0
    assert sum(quantised) == 2 * source.rows * source.heads * left


def test_tokens_that_skip_the_sliding_window_are_never_quantised(quantised):
    layer, source = sliding_layer(10), Source()
    layer.update(*source(200))
    assert sum(quantised) == 2 * source.rows * source.heads * len(layer.store)
    layer.update(*source(150))
    assert sum(quantised) <= 2 * source.rows * source.heads * 2 * 10


@pytest.mark.parametrize("kind", ["full", "signs", "centred"])
def test_the_codes_of_a_token_never_change(kind):
    layer, source = LAYERS[kind](), Source()
    layer.update(*source(12))
    before = {name: x.clone() for name, x in layer.store.state().items()}
    count = len(layer.store)
    for new in (1, 3, 1, 70, 1):
        layer.update(*source(new))
    for name, rows in layer.store.state().items():
        now = rows if name.endswith(("weight", "mean")) else rows[:, :, :count]
        assert torch.equal(now, before[name]), name


def test_generation_quantises_every_token_once(quantised):
    model = build("llama")
    cache = RotorQuantCache(**SMALL)
    model.generate(prompt(2, 20), past_key_values=cache, max_new_tokens=20, do_sample=False)
    left = [len(layer.store) for layer in cache.layers]
    assert min(left) > 0
    assert sum(quantised) == 2 * 2 * model.config.num_key_value_heads * sum(left)


# --- batch operations ---

BATCH_OPERATIONS = {
    "reorder": ("reorder_cache", torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])),
    "reorder with copies": ("reorder_cache", torch.tensor([1, 1, 0]), torch.tensor([1, 1, 0])),
    "repeat": ("batch_repeat_interleave", 2, torch.tensor([0, 0, 1, 1, 2, 2])),
    "select": ("batch_select_indices", torch.tensor([2, 0]), torch.tensor([2, 0])),
    "select one": ("batch_select_indices", torch.tensor([1]), torch.tensor([1])),
    "select by mask": (
        "batch_select_indices",
        torch.tensor([True, False, True]),
        torch.tensor([0, 2]),
    ),
}


@pytest.mark.parametrize("operation", BATCH_OPERATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_operations_permute_rows_exactly(kind, operation):
    method, argument, rows = BATCH_OPERATIONS[operation]
    source = Source(rows=3)
    first, later = [source(n) for n in CHUNKS], [source(n) for n in (1, 5, 1, 40, 1)]
    layer, fresh = LAYERS[kind](), LAYERS[kind]()
    for states in first:
        layer.update(*states)
        fresh.update(*(x[rows] for x in states))
    before, packed = held(layer), layer.store.state()
    assert len(layer.store) > 0
    getattr(layer, method)(argument)

    assert_close(held(layer), [x[rows] for x in before])
    assert same(snapshot(layer.store.state()), {name: x[rows] for name, x in packed.items()})
    # From here on it is as if the rows had always been these: later tokens too.
    assert same(snapshot(vars(layer)), snapshot(vars(fresh)))
    for states in later:
        ours = layer.update(*(x[rows] for x in states))
        theirs = fresh.update(*(x[rows] for x in states))
        assert all(torch.equal(plain(a), plain(b)) for a, b in zip(ours, theirs, strict=True))
    assert same(snapshot(vars(layer)), snapshot(vars(fresh)))


@pytest.mark.parametrize("operation", BATCH_OPERATIONS)
def test_batch_operations_of_the_cache_reach_every_layer(operation):
    method, argument, rows = BATCH_OPERATIONS[operation]
    model = build("gemma3")
    cache = RotorQuantCache(config=model.config, **SMALL)
    getattr(cache, method)(argument)  # before the first update: nothing to do
    feed(model, cache, prompt(3, 60), (50, 1))
    before = [held(layer) for layer in cache.layers]
    getattr(cache, method)(argument)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert_close(held(layer), (keys[rows], values[rows]))
    assert cache.batch_size == len(rows)


# --- crop ---


def _filled(kind: str = "full", **options: Any) -> tuple[RotorQuantLayer, Source]:
    layer, source = LAYERS[kind](**options), Source()
    for count in CHUNKS:
        layer.update(*source(count))
    return layer, source


@pytest.mark.parametrize("kind", ["full", "signs", "centred"])
@pytest.mark.parametrize(
    "part", ["nothing", "window", "whole window", "packed", "all packed", "sinks", "all", "more"]
)
def test_crop_takes_exactly_the_last_tokens(kind, part):
    layer, source = _filled(kind)
    total, tail, packed = sum(CHUNKS), layer.recent[0].shape[2], len(layer.store)
    assert (tail, packed) == (3, total - 5)
    count = {
        "nothing": 0,
        "window": tail - 1,
        "whole window": tail,
        "packed": tail + 3,
        "all packed": tail + packed,
        "sinks": tail + packed + 1,
        "all": total,
        "more": total + 5,
    }[part]
    before, kept = held(layer), max(0, total - count)
    codes = {name: x.clone() for name, x in layer.store.state().items()}
    layer.crop(-count)

    assert layer.get_seq_length() == kept
    assert layer.get_mask_sizes(2) == (kept + 2, 0)
    assert_close(held(layer), [x[:, :, :kept] for x in before])
    assert sum(storages(layer).values()) == sum(layer.nbytes().values())
    left = max(0, min(packed, packed + tail - count))
    assert len(layer.store) == left
    for name, x in layer.store.state().items():
        expected = codes[name] if name.endswith(("weight", "mean")) else codes[name][:, :, :left]
        assert torch.equal(x, expected)
    # What is stored stays as it is while new tokens come, which are seen exactly.
    new, stored = source(20), min(kept, TINY["num_sink_tokens"] + left)
    seen = layer.update(*new)
    now = held(layer)
    assert_close([plain(x)[:, :, :kept] for x in seen], [x[:, :, :kept] for x in before])
    assert all(torch.equal(plain(x)[:, :, kept:], y) for x, y in zip(seen, new, strict=True))
    assert_close([x[:, :, :stored] for x in now], [x[:, :, :stored] for x in before])
    assert layer.get_seq_length() == kept + 20


@pytest.mark.parametrize("count", [sum(CHUNKS), sum(CHUNKS) - 1, sum(CHUNKS) - 2])
def test_a_cache_cropped_into_its_sinks_goes_on_like_a_new_one(count):
    """Statistics of forgotten tokens are forgotten too."""
    layer, source = full_layer(center_keys=True), Source()
    first = source(9)
    layer.update(*first)
    for n in CHUNKS[1:]:
        layer.update(*source(n))
    layer.crop(-count)
    fresh = full_layer(center_keys=True)
    kept = sum(CHUNKS) - count
    if kept:
        fresh.update(*(x[:, :, :kept] for x in first))
    for n in (7, 1, 20, 1):
        states = source(n)
        ours, theirs = layer.update(*states), fresh.update(*states)
        assert all(torch.equal(plain(a), plain(b)) for a, b in zip(ours, theirs, strict=True))
    assert same(snapshot(vars(layer)), snapshot(vars(fresh)))


def test_the_window_fills_up_again_after_a_crop_into_the_packed_part():
    layer, source = _filled()
    layer.crop(-10)
    packed = len(layer.store)
    assert layer.recent[0].shape[2] == 0
    for count in range(1, 5):
        layer.update(*source(1))
        assert (len(layer.store), layer.recent[0].shape[2]) == (packed, count)
    layer.update(*source(1))
    assert (len(layer.store), layer.recent[0].shape[2]) == (packed + 2, 3)


@pytest.mark.parametrize("kind", LAYERS)
def test_crop_refuses_positive_numbers(kind):
    for layer in (LAYERS[kind](), _filled(kind)[0]):
        before = snapshot(vars(layer))
        with pytest.raises(ValueError, match=r"is 3; .* crop\(-3\) removes the last"):
            layer.crop(3)
        assert same(before, snapshot(vars(layer)))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_unused_layer_can_be_cropped_reordered_and_reset(kind):
    layer = LAYERS[kind]()
    before = snapshot(vars(layer))
    layer.crop(-3)
    layer.crop(0)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert same(before, snapshot(vars(layer)))
    assert (layer.keys, layer.values, layer.get_seq_length()) == (None, None, 0)
    assert not hasattr(layer, "batch_size")


@pytest.mark.parametrize("undone", range(1, 6))
def test_recorded_tokens_that_are_undone_leave_no_trace_in_a_sliding_layer(undone):
    """Assisted decoding: candidates are fed, and the rejected ones are cropped."""
    window, source = 12, Source()
    exact = RotorQuantSlidingLayer(
        RotorQuantConfig(residual_length=EVERYTHING_EXACT, statistics_length=0, query_aware=False),
        window,
    )
    oracle, packed = DynamicSlidingWindowLayer(window), sliding_layer(window, key_bits=8)
    for layer in (exact, oracle, packed):
        layer.activate_past_recording()
    for count in (20, 6, 6, 6, 6):
        states = source(count)
        for layer in (exact, oracle, packed):
            layer.update(*states)
            layer.crop(-undone)
        assert torch.equal(exact.keys, oracle.keys)
        assert torch.equal(exact.values, oracle.values)
        assert packed.keys.shape == oracle.keys.shape
        assert packed.get_seq_length() == oracle.get_seq_length()
        assert packed.get_mask_sizes(6) == oracle.get_mask_sizes(6)
        assert (plain(packed.keys) - oracle.keys).norm() < 0.05 * oracle.keys.norm()
    assert len(packed.store) > 0


# --- reset, reuse, copies ---


@pytest.mark.parametrize("kind", LAYERS)
def test_a_reset_layer_is_as_good_as_new(kind):
    layer, _ = _filled(kind)
    layer.reset()
    fresh = LAYERS[kind]()
    assert same(snapshot(vars(layer)), snapshot(vars(fresh)))
    source = Source(rows=1, heads=3, d_key=24, d_value=8)  # any shape again
    for count in CHUNKS:
        states = source(count)
        layer.update(*states)
        fresh.update(*states)
    assert same(snapshot(vars(layer)), snapshot(vars(fresh)))


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "qwen3_next", "falcon_h1", "zamba2", "zaya", "inkling"]
)
def test_a_reset_cache_generates_what_a_new_one_does(name):
    model, ids = build(name), prompt(2, 30)
    cache = RotorQuantCache(config=model.config, **SMALL)
    options = {"max_new_tokens": 20, "do_sample": False}
    first = model.generate(ids, past_key_values=cache, **options)
    assert cache.memory().packed_numbers > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), first)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("with_config", [True, False])
def test_copies_are_independent(copy_of, with_config):
    model, ids = build("llama"), prompt(2, 60)
    cache = RotorQuantCache(config=model.config if with_config else None, **SMALL)
    feed(model, cache, ids, (30, 1))
    twin, before = copy_of(cache), snapshot(cache.layers)
    assert same(snapshot(twin.layers), before)
    assert not set(storages(twin.layers)) & set(storages(cache.layers))
    logits = feed(model, twin, ids[:, 31:], (6, 1, 1))
    assert same(snapshot(cache.layers), before)
    assert torch.equal(feed(model, cache, ids[:, 31:], (6, 1, 1)), logits)
    assert twin.memory().parts == cache.memory().parts


def forked(cache):
    """A cache by a shallow copy of every layer, as prefixes are shared by hand."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1", "zaya", "inkling"])
def test_forks_go_their_own_ways(name, aware):
    """As those of a DynamicCache, with the codes of the shared prefix in memory once."""
    model, ids = build(name), prompt(2, 90)
    cache = RotorQuantCache(config=model.config, **SMALL | {"query_aware": aware})
    feed(model, cache, ids, (30, 1))
    forks = [forked(cache), forked(cache)]
    twin = copy.deepcopy(cache)
    codes = [x.store.keys.buffers.tensors["codes"].data_ptr() for x in cache.layers]
    for fork in forks:
        assert same(snapshot(fork.layers), snapshot(cache.layers))
        assert [x.store.keys.buffers.tensors["codes"].data_ptr() for x in fork.layers] == codes
    before = snapshot(twin.layers)
    other = feed(model, forks[0], ids[:, 50:], (11, 1, 1, 9, 1))
    assert same(snapshot(cache.layers), before)
    logits = feed(model, cache, ids[:, 31:], (6, 1, 1, 4, 1))
    assert torch.equal(feed(model, twin, ids[:, 31:], (6, 1, 1, 4, 1)), logits)
    assert same(snapshot(forks[1].layers), before)
    assert torch.equal(feed(model, forks[1], ids[:, 31:], (6, 1, 1, 4, 1)), logits)
    assert torch.equal(
        feed(model, forked(twin), ids[:, 50:], (1,)), feed(model, twin, ids[:, 50:], (1,))
    )
    assert not torch.equal(other, logits)


def test_a_fork_of_a_layer_that_is_cropped_is_not():
    layer, source = RotorQuantLayer(RotorQuantConfig(**TINY)), Source()
    layer.update(*source(20))
    fork, before = copy.copy(layer), plain(layer.keys).clone()
    layer.crop(-12)
    layer.update(*source(12))
    assert torch.equal(plain(fork.keys), before)
    fork.crop(-3)
    fork.update(*source(9))
    assert torch.equal(plain(fork.keys)[:, :, :14], before[:, :, :14])
    assert not torch.equal(plain(layer.keys)[:, :, 8:14], before[:, :, 8:14])


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_states_that_are_held_stay_as_they_were(kind):
    """Attention reads what it was handed, whatever has been done to the layer since."""
    config, source = RotorQuantConfig(**TINY), Source()
    layer = RotorQuantLayer(config) if kind == "full" else RotorQuantSlidingLayer(config, 50)
    layer.update(*source(20))
    held = [*layer.update(*source(9)), layer.keys, layer.values]
    before = [plain(x).clone() for x in held]
    assert len(layer.store) > 16
    for change in (
        lambda: layer.crop(-19),
        lambda: layer.update(*source(12)),
        lambda: layer.crop(-2),
        lambda: layer.update(*source(1)),
        lambda: layer.reset(),
        lambda: layer.update(*source(40)),
    ):
        change()
        assert all(torch.equal(plain(x), y) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")], ids="-".join)
def test_states_of_another_dtype_later(kind, dtypes):
    """A prompt under autocast: as `torch.cat` has it, the wider of both."""
    config, source = RotorQuantConfig(**TINY), Source()
    first, then = (getattr(torch, name) for name in dtypes)
    mixed, even = (
        RotorQuantLayer(config) if kind == "full" else RotorQuantSlidingLayer(config, 50)
        for _ in range(2)
    )
    prompted, new = source(20), source(3)
    mixed.update(*(x.to(first) for x in prompted))
    even.update(*(x.to(first).float() for x in prompted))
    seen = mixed.update(*(x.to(then) for x in new))
    wanted = even.update(*(x.to(then).float() for x in new))
    assert len(mixed.store) == 18 if kind == "full" else 20
    for x, y in zip(seen, wanted, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(plain(x), plain(y))


def test_a_prompt_under_autocast():
    model, ids = build("llama"), prompt(2, 60)
    logits = []
    for cache in (DynamicCache(), RotorQuantCache(residual_length=100), RotorQuantCache(**SMALL)):
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                model(ids[:, :50], past_key_values=cache)
            logits.append(model(ids[:, 50:], past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() < 0.3 * logits[0].abs().max()


def test_iterating_gives_keys_and_values():
    model, ids = build("llama"), prompt(2, 30)
    cache = RotorQuantCache(config=model.config, **SMALL)
    exact = DynamicCache(config=model.config)
    feed(model, cache, ids, (30,))
    feed(model, exact, ids, (30,))
    for (keys, values, _), (exact_keys, exact_values, _) in zip(cache, exact, strict=True):
        assert keys.shape == exact_keys.shape
        assert (plain(values) - exact_values).square().mean() < 0.02 * exact_values.square().mean()
    with_states = RotorQuantCache(config=build("qwen3_next").config)
    assert next(iter(with_states)) == (None, None, None)  # no attention over keys and values


def test_rows_by_a_slice():
    model, ids = build("llama"), prompt(4, 40)
    by_slice, by_numbers = (RotorQuantCache(config=model.config, **SMALL) for _ in range(2))
    for cache in (by_slice, by_numbers):
        feed(model, cache, ids, (30,))
    by_slice.batch_select_indices(slice(1, 3))
    by_numbers.batch_select_indices(torch.tensor([1, 2]))
    assert same(snapshot(by_slice.layers), snapshot(by_numbers.layers))
    assert torch.equal(*(feed(model, x, ids[1:3, 30:], (5, 1)) for x in (by_slice, by_numbers)))


# --- memory that is not kept ---


@pytest.fixture
def dequantised(monkeypatch):
    """Weak references to every dequantised tensor, and how many were alive at once at most."""
    found: list[weakref.ref] = []
    most = [0]
    materialize = CachedStates.materialize

    def remembering(self):
        out = materialize(self)
        found.append(weakref.ref(out))
        most[0] = max(most[0], sum(ref() is not None for ref in found))
        return out

    monkeypatch.setattr(CachedStates, "materialize", remembering)
    return found, most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_no_dequantised_copy_outlives_its_attention_call(name, attention, dequantised):
    found, most = dequantised
    model, ids = build(name, attention), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    gc.disable()  # nothing may wait for the collector either
    try:
        feed(model, cache, ids, (40, 1, 1, 5))
        assert len(found) == (3 * 2 * len(cache.layers) if attention == "eager" else 0)
        assert not any(ref() is not None for ref in found)
        assert most[0] <= 2  # keys and values of one layer
    finally:
        gc.enable()


def test_after_a_step_no_tensor_has_the_size_of_the_history():
    model, ids = build("llama"), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (40, 1, 1))
    report = cache.memory()
    held_bytes = sum(storages(cache.layers).values())
    assert held_bytes == report.total_bytes - report.parts["tables"]

    history = 2 * 2 * 42 * 16  # rows, heads, tokens, head dim
    floating = [
        x
        for x in gc.get_objects()
        if type(x) is Tensor and x.is_floating_point() and 42 in x.shape and x.numel() >= history
    ]
    assert [x.shape for x in floating] == []


def test_a_cache_is_freed_with_its_last_reference():
    """Without waiting for the collector: by then the next prompt may not fit."""
    for config in (build("llama").config, None):
        cache = RotorQuantCache(config=config, **SMALL)
        feed(build("llama"), cache, prompt(2, 60), (40, 1))
        gc.disable()
        try:
            layer = weakref.ref(cache.layers[0])
            del cache
            assert layer() is None
        finally:
            gc.enable()


# --- the cache's own protocol ---


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "mistral", "qwen3_next", "lfm2", "gemma4", "falcon_h1", "zamba2"]
)
def test_the_cache_reports_what_dynamic_cache_does(name):
    model, ids = build(name), prompt(2, 60)
    cache, oracle = (
        RotorQuantCache(config=model.config, **SMALL),
        DynamicCache(config=model.config),
    )
    for chunk in (0, 30, 1, 7):
        if chunk:
            feed(model, cache, ids, (chunk,))
            feed(model, oracle, ids, (chunk,))
        for attribute in ("is_sliding", "is_linear", "is_dummy", "is_initialized", "is_croppable"):
            ours, theirs = getattr(cache, attribute, None), getattr(oracle, attribute, None)
            assert ours == theirs, attribute
        assert len(cache) == len(oracle)
        assert cache.is_compileable is False
        assert cache.get_seq_length() == oracle.get_seq_length()
        assert cache.get_max_length() == oracle.get_max_length()
        for i, layer in enumerate(cache.layers):
            assert cache.get_max_length(i) == oracle.get_max_length(i)
            if isinstance(layer, RotorQuantLayer):
                assert cache.get_seq_length(i) == oracle.get_seq_length(i)
                for queries in (1, 9):
                    sizes = cache.get_mask_sizes(queries, i)
                    assert sizes == oracle.get_mask_sizes(queries, i)
    assert cache.batch_size == 2


def test_an_empty_cache_without_a_config_reports_what_dynamic_cache_does():
    cache, oracle = RotorQuantCache(), DynamicCache()
    for ask in (
        lambda c: c.get_seq_length(),
        lambda c: c.get_seq_length(5),
        lambda c: c.get_mask_sizes(7, 3),
        lambda c: c.get_max_length(2),
        lambda c: (len(c), c.is_sliding, c.is_initialized, c.is_compileable, c.batch_size),
        lambda c: (c.reset(), c.crop(-1), c.reorder_cache(torch.tensor([0]))),
    ):
        assert ask(cache) == ask(oracle)
    assert cache.memory().total_bytes == 0
    assert "layers=0, tokens=0" in repr(cache)


@pytest.mark.parametrize("kind", LAYERS)
def test_offload_and_prefetch_on_the_cpu_change_nothing(kind):
    layer, source = _filled(kind)
    before, addresses = snapshot(vars(layer)), set(storages(layer))
    layer.offload()
    layer.prefetch()
    assert same(before, snapshot(vars(layer)))
    assert set(storages(layer)) == addresses
    layer.update(*source(5))


@pytest.mark.parametrize("kind", LAYERS)
def test_prefetch_moves_every_tensor_to_the_device_of_the_layer(kind):
    layer, _ = _filled(kind)
    packed, shape = len(layer.store), layer.keys.shape
    layer.device = torch.device("meta")
    layer.prefetch()
    moved = [*layer.store.state().values(), *layer.sinks, *layer.recent]
    assert {x.device.type for x in moved} == {"meta"}
    assert layer.store.device.type == "meta"
    for side in layer.store.sides:  # its tables follow, and are not copied into the side
        assert side.span().quantizer is side.quantizer
        assert {x.device.type for x in side.quantizer.buffers()} == {"meta"}
    assert (len(layer.store), layer.keys.shape) == (packed, shape)


def test_offloading_layers_of_a_cache_on_the_cpu_changes_nothing():
    model, ids = build("gemma3"), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (40, 1))
    before = snapshot(cache.layers)
    for index, layer in enumerate(cache.layers):
        cache.offload(index, only_non_sliding=False)
        layer.prefetch()
    assert same(snapshot(cache.layers), before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_early_initialization(name):
    model, ids, chunks = build(name), prompt(2, 60), (40, 1, 1)
    cache = RotorQuantCache(config=model.config, **SMALL)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    assert cache.memory().total_bytes == cache.memory().numbers == 0
    late = RotorQuantCache(config=model.config, **SMALL)
    assert torch.equal(feed(model, cache, ids, chunks), feed(model, late, ids, chunks))
    assert cache.memory().packed_numbers > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_keys_and_values_may_require_gradients(kind):
    layer, source = LAYERS[kind](), Source()
    with torch.no_grad():
        layer.update(*(x.requires_grad_() for x in source(12)))
    new = [x.requires_grad_() for x in source(3)]
    keys, values = layer.update(*new)
    assert isinstance(keys, CompressedTensor)
    (keys[..., :12] * values).sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in new)
    for rows in layer.store.state().values():
        assert not rows.requires_grad


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("later", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_prompt_read_in_inference_mode_can_be_continued(kind, later):
    layer, twin, source = LAYERS[kind](), LAYERS[kind](), Source()
    first = source(20)
    with torch.inference_mode():
        layer.update(*first)
    twin.update(*first)
    with later():
        for count in (1, 1, 6, 1, 40, 1):
            states = source(count)
            ours, theirs = layer.update(*states), twin.update(*states)
            assert all(torch.equal(plain(a), plain(b)) for a, b in zip(ours, theirs, strict=True))


def test_the_default_device_does_not_matter():
    """As set by torch.set_default_device, which scripts do before they load a model."""
    source, fresh_seed = Source(), 987_654
    layer = full_layer(seed=fresh_seed)
    states = source(20)
    with torch.device("meta"):
        layer.update(*states)
        layer.update(*states)
    assert torch.isfinite(held(layer)[0]).all()


# --- generation with the shipped model ---

TEXTS = (
    "The old house stood at the end of the lane, and nobody had lived in it for many years. When "
    "the wind came from the sea the shutters beat against the wall, and the children of the "
    "village ran past the gate without looking up. One evening in the autumn a stranger came",
    "It was late when the captain came on deck. The wind had fallen, and the ship lay still upon "
    "the water; far away to the north a light was burning. He called the mate, and together they "
    "stood at the rail and looked at it without a word, until",
    "There was once a king who had three daughters. The eldest was proud, the second was vain, "
    "and the youngest was so kind that everybody who saw her loved her.",
)
GREEDY = {"max_new_tokens": 40, "do_sample": False}


def cache_of(kind: str) -> Any:
    """A new cache: "dynamic", or in 8 bits with a small exact window."""
    return DynamicCache() if kind == "dynamic" else RotorQuantCache("k8v8", **SMALL)


class Books:
    """The shipped model, and what it writes with Transformers' own cache."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.greedy = functools.cache(self._greedy)

    def read(self, text: str) -> Tensor:
        """Token ids (1, tokens)."""
        return self.tokenizer(text, return_tensors="pt").input_ids

    def write(self, ids: Tensor, cache: Any, **options: Any) -> Tensor:
        """The greedy continuation, (1, tokens)."""
        return self.model.generate(ids, past_key_values=cache, **GREEDY | options)

    def _greedy(self, text: str) -> Tensor:
        return self.write(self.read(text), cache_of("dynamic"))

    def assert_same_text(self, ids: Tensor, expected: Tensor) -> None:
        """Equal rows, unless they part where the model is undecided between two tokens."""
        assert ids.shape == expected.shape
        for row, other in zip(ids, expected, strict=True):
            differ = (row != other).nonzero()
            if len(differ):
                first = int(differ[0])
                with torch.no_grad():
                    logits = self.model(other[None, :first], use_cache=False).logits[0, -1]
                margin = float(logits[other[first]] - logits[row[first]])
                assert abs(margin) < 0.05, f"token {first} is {margin:.2f} less likely"


@pytest.fixture(scope="module")
def books(model, tokenizer):
    return Books(model, tokenizer)


@pytest.fixture(scope="module")
def stranger(model):
    """A model with the same vocabulary whose guesses are nearly always wrong."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 32, 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model)(config).eval()


@pytest.mark.parametrize("text", TEXTS, ids=range(3))
def test_greedy_text_in_8_bits_is_that_of_dynamic_cache(books, text):
    cache = cache_of("8 bits")
    books.assert_same_text(books.write(books.read(text), cache), books.greedy(text))
    report = cache.memory()
    assert report.packed_numbers > 0.7 * report.numbers


@pytest.mark.parametrize("text", TEXTS, ids=range(3))
def test_beam_search_in_8_bits_finds_the_beams_of_dynamic_cache(books, text):
    found = {}
    for kind in ("dynamic", "8 bits"):
        found[kind] = books.model.generate(
            books.read(text),
            past_key_values=cache_of(kind),
            max_new_tokens=24,
            num_beams=4,
            num_return_sequences=3,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    ours, theirs = found["8 bits"], found["dynamic"]
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=0, atol=5e-3)
    assert torch.equal(ours.sequences, theirs.sequences)
    # The beams were in truth reordered, or this would prove nothing.
    assert len(theirs.beam_indices[0, :20].unique()) > 1


def test_sampling_several_sequences_draws_those_of_dynamic_cache(books):
    drawn = {}
    for kind in ("dynamic", "8 bits"):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            drawn[kind] = books.model.generate(
                books.read(TEXTS[0]),
                past_key_values=cache_of(kind),
                max_new_tokens=16,
                num_return_sequences=4,
                do_sample=True,
                temperature=0.7,
            )
    assert drawn["dynamic"].unique(dim=0).shape[0] == 4
    assert torch.equal(drawn["8 bits"], drawn["dynamic"])


@pytest.mark.parametrize("helper", ["the model itself", "a stranger", "the prompt"])
@pytest.mark.parametrize("text", TEXTS[:2], ids=range(2))
def test_assisted_decoding_in_8_bits_writes_the_greedy_text(books, stranger, text, helper):
    options = {
        "the model itself": {"assistant_model": books.model},
        "a stranger": {"assistant_model": stranger},
        "the prompt": {"prompt_lookup_num_tokens": 5},
    }[helper]
    cache = cache_of("8 bits")
    out = books.write(books.read(text), cache, **options)
    books.assert_same_text(out, books.greedy(text))
    assert cache.memory().packed_numbers > 0
    assert cache.get_seq_length() < out.shape[1]


@pytest.mark.parametrize("residual", [EVERYTHING_EXACT, 4])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2", "llama4"])
def test_assisted_decoding_of_sliding_models_writes_the_greedy_text(name, residual):
    """Rejected tokens are taken back out of the windows that have moved on."""
    model = build(name)
    ids = prompt(1, 8).repeat(1, 5)  # repeats, so that there is something to look up
    options = {"max_new_tokens": 30, "do_sample": False}
    plainly = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    cache = RotorQuantCache(
        "k8v8",
        config=model.config,
        residual_length=residual,
        statistics_length=0,
        query_aware=False,
        block_length=2,
    )
    out = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert all(layer.record_past for layer in cache.layers if layer.is_sliding)
    if residual == EVERYTHING_EXACT:
        assert torch.equal(out, plainly)
        return
    # Random models nearly tie: what must agree is what the caches then make of the text.
    assert cache.memory().packed_numbers > 0
    kept, more = cache.get_seq_length(), prompt(1, 6, seed=1)
    ids = torch.cat((out[:, :kept], more), dim=1)
    oracle = DynamicCache(config=model.config)
    expected = feed(model, oracle, ids, (kept,) + (1,) * 6)[:, kept:]
    cache.crop(0)
    logits = feed(model, cache, more, (1,) * 6)
    assert models.relative_error(logits, expected) < 0.03


@pytest.mark.parametrize("chunk", [7, 16, 64])
def test_chunked_prefill(books, chunk):
    ids = books.read(TEXTS[0])
    exact, cache = (
        RotorQuantCache(residual_length=EVERYTHING_EXACT, statistics_length=0, query_aware=False),
        cache_of("8 bits"),
    )
    options = {"prefill_chunk_size": chunk, "max_new_tokens": 20}
    expected = books.write(ids, cache_of("dynamic"), **options)
    assert torch.equal(books.write(ids, exact, **options), expected)
    books.assert_same_text(books.write(ids, cache, **options), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


def test_generation_goes_on_with_the_same_cache(books):
    ids, cache, oracle = books.read(TEXTS[0]), cache_of("8 bits"), cache_of("dynamic")
    for _ in range(3):
        expected = books.write(ids, oracle, max_new_tokens=12)
        books.assert_same_text(books.write(ids, cache, max_new_tokens=12), expected)
        assert cache.get_seq_length() == oracle.get_seq_length() == expected.shape[1] - 1
        ids = torch.cat((expected, books.read(" But the next morning")), dim=1)


def test_one_prompt_serves_several_continuations(books):
    start = books.read(TEXTS[0])
    read = {kind: cache_of(kind) for kind in ("dynamic", "8 bits")}
    for cache in read.values():
        feed(books.model, cache, start, (start.shape[1],))
    before = snapshot(read["8 bits"].layers)
    for suffix in (" to the door", " and asked for", ", whom nobody knew,"):
        ids = torch.cat((start, books.read(suffix)), dim=1)
        out, expected = (
            books.write(ids, copy.deepcopy(read[kind]), max_new_tokens=20)
            for kind in ("8 bits", "dynamic")
        )
        books.assert_same_text(out, expected)
        assert same(snapshot(read["8 bits"].layers), before)


def test_rows_of_a_padded_batch_write_what_they_write_alone(books):
    batch = books.tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="left")
    assert bool((batch.attention_mask == 0).any())
    cache = cache_of("8 bits")
    out = books.model.generate(**batch, past_key_values=cache, **GREEDY)
    assert cache.memory().packed_numbers > 0
    for row, mask, text in zip(out, batch.attention_mask, TEXTS, strict=True):
        books.assert_same_text(row[None, int((mask == 0).sum()) :], books.greedy(text))


def test_sliding_crop_beyond_the_recorded_past_is_refused():
    """Rather than a window with a hole that the mask does not know of."""
    layer = RotorQuantSlidingLayer(
        RotorQuantConfig(residual_length=4, statistics_length=0, query_aware=False, block_length=2),
        10,
    )
    source = Source()
    layer.update(*source(30))
    layer.activate_past_recording()
    layer.update(*source(5))
    held = layer.keys
    with pytest.raises(RuntimeError, match=r"crop\(-6\) goes back further than the recorded past"):
        layer.crop(-6)
    assert layer.get_seq_length() == 35
    assert torch.equal(plain(layer.keys), plain(held))
    layer.crop(-5)
    assert layer.get_seq_length() == 30
    assert layer.keys.shape[2] == 9


def test_batch_rows_may_be_a_plain_list():
    layer = full_layer()
    layer.update(*Source()(20))
    expected = plain(layer.keys)[[0]]
    layer.batch_select_indices([0])
    assert torch.equal(plain(layer.keys), expected)


@pytest.mark.parametrize("quantizer", [RotorQuantMSE, RotorQuantProd])
@pytest.mark.parametrize("rotation", ["cascade", "rotors", "haar", "hadamard"])
def test_quantizers_do_not_mind_the_default_device(quantizer, rotation):
    with torch.device("meta"):
        made = quantizer(19, 3, rotation=rotation)
    expected = quantizer(19, 3, rotation=rotation)
    assert torch.equal(made.rotation.matrix(), expected.rotation.matrix())
