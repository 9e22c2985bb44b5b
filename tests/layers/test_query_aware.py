"""Layers that quantise when attention has shown its queries, and take statistics from enough."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention.registered import rotorquant_attention
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.layers import RotorQuantLayer, RotorQuantSlidingLayer
from rotorquant_hf.layers.full import _in_one
from rotorquant_hf.quant.hessian import RANK
from rotorquant_hf.quant.moments import QueryMoment
from tests.helpers.models import build

HEADS, GROUP, D = 2, 3, 32
WINDOW = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2}
WINDOW |= {"statistics_length": 0, "query_aware": False}
BETTER = {"center_keys": True, "key_scale": "least_squares", "equalize_values": 0.5}
SMALL = WINDOW | BETTER | {"query_aware": True}
AWARE = RotorQuantConfig(key_bits=3, value_bits=3, **SMALL)
NEAREST = RotorQuantConfig(key_bits=3, value_bits=3, **WINDOW, **BETTER)
LAYERS = {
    "full": RotorQuantLayer,
    "sliding": lambda config: RotorQuantSlidingLayer(config, 40),
}


def states(tokens, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, tokens, D, generator=generator) for _ in range(2))


def queries(tokens, seed=0, batch=2):
    """Queries that look along few directions."""
    generator = torch.Generator().manual_seed(seed + 50)
    x = torch.randn(batch, HEADS * GROUP, tokens, D, generator=generator)
    return x * torch.logspace(0, -2, D)


def by_sdpa(query, keys, values):
    return sdpa(query, keys, values, enable_gqa=True)


def by_registered(query, keys, values):
    return rotorquant_attention(_grouped(), query, keys, values, None, is_causal=False)[0]


def _grouped():
    module = torch.nn.Module()
    module.num_key_value_groups = GROUP
    return module


def score_error(layer, exact_keys, seed=9):
    """Mean squared error of the scores of other queries with the packed keys."""
    first = layer.sinks[0].shape[2]
    count = len(layer.store)
    wanted = exact_keys[:, :, first : first + count]
    error = (layer.store.get_keys() - wanted).repeat_interleave(GROUP, dim=1)
    return float((queries(200, seed) @ error.mT).square().mean())


@pytest.mark.parametrize("attend", [by_sdpa, by_registered])
def test_keys_are_rounded_for_the_queries_of_their_own_prompt(attend):
    keys, values = states(80)
    aware, nearest = RotorQuantLayer(AWARE), RotorQuantLayer(NEAREST)
    nearest.update(keys, values)
    seen = aware.update(keys, values)
    assert aware.waits
    assert aware.get_seq_length() == 80
    attend(queries(80), *seen)
    assert not aware.waits
    assert len(aware.store) == len(nearest.store) == 68
    assert score_error(aware, keys) < 0.35 * score_error(nearest, keys)
    assert torch.equal(aware.store.get_values(), nearest.store.get_values())
    assert aware.nbytes()["statistics"] - nearest.nbytes()["statistics"] == 2 * HEADS * D * RANK * 2
    assert aware.moment is None


def test_later_blocks_too():
    """With the Hessian of the first, and without waiting."""
    keys, values = states(200)
    aware, nearest = RotorQuantLayer(AWARE), RotorQuantLayer(NEAREST)
    for start, end in ((0, 40), (40, 41), (41, 100), *((i, i + 1) for i in range(100, 200))):
        part = keys[:, :, start:end], values[:, :, start:end]
        nearest.update(*part)
        seen = aware.update(*part)
        assert aware.waits == (start == 0)
        by_sdpa(queries(end - start, seed=start), *seen)
        if start == 0:
            first = aware.store.keys.statistics.hessian.factor
    assert aware.store.keys.statistics.hessian.factor is first
    assert len(aware.store) == 188
    assert score_error(aware, keys) < 0.35 * score_error(nearest, keys)


@pytest.mark.parametrize("kind", LAYERS)
def test_all_queries_until_the_first_block_count(kind):
    """Whether the tokens come one by one, in chunks or at once."""
    config = RotorQuantConfig(key_bits=3, value_bits=3, **SMALL | {"statistics_length": 30})
    keys, values = states(36)
    query = queries(36)
    if kind == "sliding":
        expected = QueryMoment.of(query[:, :, :30], HEADS)
    else:
        expected = QueryMoment.of(query[:, :, :32], HEADS)  # two sinks
    for steps in ([1] * 36, [7, 1, 1, 5, 16, 1, 1, 4]):
        layer, start = LAYERS[kind](config), 0
        for n in steps:
            part = slice(start, start + n)
            by_sdpa(query[:, :, part], *layer.update(keys[:, :, part], values[:, :, part]))
            start += n
            if len(layer.store):
                break
            assert not layer.waits
            assert layer.nbytes()["statistics"] == layer.moment.nbytes
        assert start == expected.count // GROUP
        statistics = layer.store.keys.statistics
        wanted = statistics.read_by(expected).hessian
        torch.testing.assert_close(
            statistics.hessian.matrix(), wanted.matrix(), rtol=1e-2, atol=1e-2
        )


def test_an_emptied_store_looks_at_queries_again():
    keys, values = states(30)
    layer = RotorQuantLayer(AWARE)
    by_sdpa(queries(30), *layer.update(keys, values))
    layer.crop(-30)
    assert layer.moment is None
    seen = layer.update(keys, values)
    assert layer.waits
    by_sdpa(queries(30, seed=1), *seen)
    assert layer.store.keys.statistics.hessian is not None


@pytest.mark.parametrize("kind", LAYERS)
def test_a_prompt_is_read_exactly(kind):
    """What is returned is the plain prompt, whoever reads it, and however often."""
    keys, values = states(30)
    layer = LAYERS[kind](AWARE)
    seen = layer.update(keys, values)
    assert all(type(x) is CompressedTensor for x in seen)
    wanted = by_sdpa(queries(30), keys, values)
    assert torch.equal(by_sdpa(queries(30), *seen), wanted)
    assert torch.equal(by_sdpa(queries(30), *seen), wanted)  # again, the prompt being packed
    assert torch.equal(seen[0] * 1, keys)
    assert "packed=0" in repr(seen[0])
    repeated = (x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(2, -1, 30, D) for x in seen)
    assert torch.equal(sdpa(queries(30), *repeated), wanted)
    assert layer.moment is None


TOUCHES = {
    "store": lambda x: len(x.store),
    "sinks": lambda x: x.sinks,
    "recent": lambda x: x.recent,
    "keys": lambda x: x.keys,
    "nbytes": lambda x: x.nbytes(),
    "numbers": lambda x: x.numbers(),
    "tokens_until_packing": lambda x: x.tokens_until_packing(),
    "crop": lambda x: x.crop(0),
    "batch_repeat_interleave": lambda x: x.batch_repeat_interleave(1),
    "reorder_cache": lambda x: x.reorder_cache(torch.tensor([0, 1])),
    "update": lambda x: x.update(*states(1, seed=3)),
}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("kind", LAYERS)
def test_without_attention_a_touch_quantises_to_the_nearest(kind, touch):
    keys, values = states(30)
    aware, nearest = LAYERS[kind](AWARE), LAYERS[kind](NEAREST)
    for layer in (aware, nearest):
        layer.update(keys, values)
        TOUCHES[touch](layer)
    assert torch.equal(aware.store.get_keys(), nearest.store.get_keys())
    assert torch.equal(aware.recent[1], nearest.recent[1])
    assert aware.get_seq_length() == nearest.get_seq_length()
    assert aware.get_mask_sizes(1) == nearest.get_mask_sizes(1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("history", [0, 30])
def test_vectors_that_cannot_be_coded_are_taken_out_again(kind, history):
    layer = LAYERS[kind](AWARE)
    if history:
        by_sdpa(queries(history), *layer.update(*states(history)))
    else:
        by_sdpa(queries(20), *layer.update(*states(20)))
    before = copy.deepcopy((layer.get_seq_length(), layer.recent, layer.store.state()))
    keys, values = states(20, seed=1)
    keys[0, 0, 3] *= 1e30
    with pytest.raises(ValueError, match="too large for its scale"):
        by_sdpa(queries(20, seed=1), *layer.update(keys, values))
    assert layer.get_seq_length() == before[0]
    assert torch.equal(layer.recent[0], before[1][0])
    assert all(torch.equal(x, before[2][name]) for name, x in layer.store.state().items())
    by_sdpa(queries(20, seed=2), *layer.update(*states(20, seed=2)))


@pytest.mark.parametrize(
    ("attend", "scale"),
    [
        (lambda *x: sdpa(*x, enable_gqa=True), None),
        (lambda *x: sdpa(*x, scale=0.25, enable_gqa=True), 0.25),
        (lambda *x: sdpa(*x, None, 0.0, False, scale=1, enable_gqa=True), 1.0),
        (lambda *x: rotorquant_attention(_grouped(), *x, None, is_causal=False), D**-0.5),
        (lambda *x: rotorquant_attention(_grouped(), *x, None, 0.5, is_causal=False), 0.5),
    ],
)
def test_the_scale_of_scores_is_seen(attend, scale):
    layer = RotorQuantLayer(AWARE)
    attend(queries(6), *layer.update(*states(6)))
    layer.count_queries()
    assert layer.moment.scale == scale
    assert layer.moment.score_scale == (D**-0.5 if scale is None else scale)
    assert type(layer.moment.score_scale) is float


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_the_unit_of_keys_does_not_matter(unit):
    """Squares of it leave float32. (By layer: scores of such keys would ask for 8 bits.)"""
    keys, values = states(30)
    config = dataclasses.replace(AWARE, key_bits=(3,))
    layers = RotorQuantLayer(config), RotorQuantLayer(config)
    for layer, factor in zip(layers, (1, unit), strict=True):
        by_sdpa(queries(30), *layer.update(keys * factor, values))
    torch.testing.assert_close(layers[1].store.get_keys() / unit, layers[0].store.get_keys())


@pytest.mark.parametrize("kind", LAYERS)
def test_queries_of_a_pass_that_failed_do_not_count(kind):
    """It is fed again, and they with it."""
    layer = LAYERS[kind](AWARE)
    by_sdpa(queries(6), *layer.update(*states(6)))  # nothing is packed yet
    layer.count_queries()
    before = layer.moment
    seen = layer.update(*states(20, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer._store, "append_unchecked", _refuse)
        with pytest.raises(ValueError, match="too large"):
            sdpa(queries(20, seed=1), *seen, scale=0.25, enable_gqa=True)
    assert layer.get_seq_length() == 6
    assert layer.moment is before
    assert layer.moment.scale is None
    assert layer._queries == []


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_wait_on_if_a_touch_cannot_store_them(kind):
    layer = LAYERS[kind](AWARE)
    by_sdpa(queries(6), *layer.update(*states(6)))
    seen = layer.update(*states(20, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer._store, "append_unchecked", _refuse)
        with pytest.raises(ValueError, match="too large"):
            layer.nbytes()
    assert layer.waits
    assert layer.get_seq_length() == 26
    by_sdpa(queries(20, seed=1), *seen)
    untroubled = LAYERS[kind](AWARE)
    by_sdpa(queries(6), *untroubled.update(*states(6)))
    by_sdpa(queries(20, seed=1), *untroubled.update(*states(20, seed=1)))
    assert torch.equal(layer.store.get_keys(), untroubled.store.get_keys())
    assert layer.get_seq_length() == 26


@pytest.mark.parametrize("kind", LAYERS)
def test_a_fork_of_a_layer_that_waits_has_its_tokens(kind):
    layer = LAYERS[kind](AWARE)
    layer.update(*states(30))
    fork = copy.copy(layer)
    assert layer.get_seq_length() == fork.get_seq_length() == 30
    assert not fork.waits
    assert torch.equal(fork.keys.materialize(), layer.keys.materialize())


def test_queries_of_single_tokens_do_not_pile_up():
    """A layer that is far from quantising would hold more of them than keys and values."""
    layer = RotorQuantLayer(RotorQuantConfig(**SMALL | {"residual_length": 500}))
    at_once = RotorQuantLayer(RotorQuantConfig(**SMALL | {"residual_length": 500}))
    held = []
    for i in range(200):
        new = states(1, seed=i)
        by_sdpa(queries(1, seed=i), *layer.update(*new))
        at_once.update(*new)
        held.append(len(layer._queries))
    assert max(held) < 64 == held.count(0) * 64 // 3
    at_once.see_queries(torch.cat([queries(1, seed=i) for i in range(200)], dim=2))
    assert _in_one(layer._queries)[1] == range(192, 200)  # no operation for every position
    layer.count_queries()
    assert layer.moment.count == at_once.moment.count == 200 * GROUP
    torch.testing.assert_close(layer.moment.mean, at_once.moment.mean, rtol=1e-5, atol=1e-6)


def _refuse(*args):
    raise ValueError("x has a vector too large")


def test_rows_do_not_depend_on_each_other():
    keys, values = states(80)
    both, alone = RotorQuantLayer(AWARE), RotorQuantLayer(AWARE)
    by_sdpa(queries(80), *both.update(keys, values))
    by_sdpa(queries(80)[1:], *alone.update(keys[1:], values[1:]))
    both.batch_select_indices(torch.tensor([1]))
    more = [x[1:] for x in states(30, seed=4)]
    for layer in (both, alone):
        by_sdpa(queries(30)[1:], *layer.update(*more))
    torch.testing.assert_close(both.store.get_keys(), alone.store.get_keys())


def test_statistics_come_from_enough_tokens():
    config = RotorQuantConfig(key_bits=3, value_bits=3, **SMALL | {"statistics_length": 50})
    layer, keys, values = RotorQuantLayer(config), *states(60)
    layer.update(keys[:, :, :51], values[:, :, :51])  # sinks included: 49 for statistics
    assert len(layer.store) == 0
    assert layer.tokens_until_packing() == 1
    layer.update(keys[:, :, 51:52], values[:, :, 51:52])
    assert len(layer.store) == 40  # of 50, but for the recent window and less than a block
    mean = layer.store.keys.statistics.mean
    torch.testing.assert_close(mean, keys[:, :, 2:52].mean(dim=2, keepdim=True))
    for i in range(52, 60):
        layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    assert len(layer.store) == 48
    assert torch.equal(layer.store.keys.statistics.mean, mean)
    layer.crop(-60)
    layer.update(keys[:, :, :30], values[:, :, :30])
    assert len(layer.store) == 0


def test_a_short_sliding_window_does_not_wait_for_more_than_it_holds():
    config = RotorQuantConfig(**SMALL | {"statistics_length": 500})
    layer = RotorQuantSlidingLayer(config, 40)
    layer.update(*states(60))
    assert len(layer.store) == 28
    assert layer.get_seq_length() == 60


# Through models


def prompt(model, length=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size - 1, (2, length), generator=generator)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_no_layer_waits_after_its_attention(name):
    model = build(name)
    cache = RotorQuantCache(config=model.config, **SMALL)
    waiting = []
    settle = RotorQuantCache._settle

    def counted(self, last):
        waiting.extend(x.waits for x in self.layers[: last.layer + 1])
        settle(self, last)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(RotorQuantCache, "_settle", counted)
        logits = model(prompt(model), past_key_values=cache).logits
        exact = model(prompt(model), past_key_values=DynamicCache(config=model.config)).logits
    assert waiting
    assert not any(waiting)
    assert not any(layer.waits for layer in cache.layers)
    assert all(x.store.keys.statistics.hessian is not None for x in cache.layers)
    assert torch.equal(logits, exact)


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "hidden"])
def test_a_pass_that_a_layer_refuses_when_it_quantises_is_taken_back(shown):
    """Out of the layers before it too: when its queries are shown, or when the next is updated."""
    cache = RotorQuantCache(**SMALL)

    def feed(tokens, seed):
        for layer in range(4):
            seen = cache.update(*states(tokens, seed), layer)
            if shown:
                by_sdpa(queries(tokens, seed), *seen)

    feed(6, 0)  # nothing is packed yet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.layers[2]._store, "append_unchecked", _refuse)
        with pytest.raises(ValueError, match="too large") as caught:
            feed(20, 1)
    assert not hasattr(caught.value, "__notes__")
    assert [layer.get_seq_length() for layer in cache.layers] == [6] * 4
    feed(20, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [26] * 4


def test_queries_of_cropped_tokens_do_not_count():
    """Of a text that is taken back; of single tokens that are not yet counted."""
    layer = RotorQuantLayer(RotorQuantConfig(**SMALL | {"statistics_length": 100}))
    for i in range(5):
        by_sdpa(queries(1, seed=i), *layer.update(*states(1, seed=i)))
    layer.crop(-2)
    layer.count_queries()
    assert layer.moment.count == 3 * GROUP
    layer.crop(-3)
    assert layer.moment is None


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
def test_queries_of_single_tokens_with_a_mask(attention):
    """Transformers 5.24 hands some to torch with the query heads of a kv head as tokens."""
    model = build("llama", attention)
    ids, mask = prompt(model, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = RotorQuantCache(config=model.config, **SMALL | {"statistics_length": 100})
    plain = RotorQuantCache(config=model.config, **SMALL | {"statistics_length": 100})
    shown = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        see = RotorQuantLayer.see_queries

        def seeing(layer, query, mask=None, scale=None):
            shown.append((tuple(query.shape), None if mask is None else tuple(mask.shape)))
            see(layer, query, mask, scale)

        patch.setattr(RotorQuantLayer, "see_queries", seeing)
        for i in range(12):
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
        assert {x for x, _ in shown} == {(2, 4, 1, 16)}
        assert {x[2] for _, x in shown if x is not None} == {1}
        # A mask by heads comes folded too.
        keys, values = cache.update(*torch.zeros(2, 2, 2, 1, 16), len(cache.layers) - 1)
        sdpa(torch.zeros(2, 2, 2, 16), keys, values, torch.ones(2, 2, 2, 13).bool())
        assert shown.pop() == ((2, 4, 1, 16), (2, 1, 1, 13))
        cache.layers[-1].crop(-1)
        model(ids, attention_mask=mask, past_key_values=plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert len(ours._queries) == 12
        ours.count_queries()
        assert ours.moment.count == theirs.moment.count
    # The queries of the first layer depend on no earlier tokens.
    first, second = (x.layers[0].moment.pre_rope for x in (cache, plain))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_queries_of_earlier_tokens_are_enough():
    """Seen one by one, not yet counted: no warning if those of the block itself are hidden."""
    cache = RotorQuantCache(**SMALL)
    keys, values = states(15)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(15):
            for layer in range(2):
                part = keys[:, :, i : i + 1], values[:, :, i : i + 1]
                seen = cache.update(*part, layer)
                if i < 13:
                    by_sdpa(queries(1, seed=i), *seen)
    assert cache.layers[0].store.keys.statistics.hessian is not None


def test_attention_that_hides_its_queries_is_told_once():
    model = build("llama", "eager")
    cache = RotorQuantCache(config=model.config, **SMALL)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            model(prompt(model, 20), past_key_values=cache)
    assert len([x for x in caught if "does not show its queries" in str(x.message)]) == 1
    plain = RotorQuantCache(config=model.config, **WINDOW, **BETTER)
    with torch.no_grad():
        for _ in range(3):
            model(prompt(model, 20), past_key_values=plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.store.get_keys(), theirs.store.get_keys())


@pytest.mark.parametrize("length", [6, 60], ids=["before", "after"])
def test_saved_with_the_queries_seen(length, tmp_path):
    """Blocks coded after loading are those that would have been coded."""
    model = build("llama")
    ids = prompt(model, 100)
    cache = RotorQuantCache(config=model.config, **SMALL)
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded = RotorQuantCache.load(tmp_path / "cache", config=model.config)
        assert [x.moment is None for x in loaded.layers] == [length == 60] * len(loaded.layers)
        logits = [model(ids[:, length:], past_key_values=x).logits for x in (cache, loaded)]
    assert torch.equal(*logits)
    for ours, theirs in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(ours.store.get_keys(), theirs.store.get_keys())
        assert torch.equal(*(x.store.keys.statistics.hessian.factor for x in (ours, theirs)))
