"""RotorQuantKVCache: the batched store of one layer."""

from __future__ import annotations

import pytest
import torch

from rotorquant_hf import RotorQuantConfig, RotorQuantKVCache

SETTINGS = {
    "mse": {},
    "prod": {"key_quantizer": "prod"},
    "prod, 24 gaussian projections": {
        "key_quantizer": "prod",
        "qjl_dim": 24,
        "qjl_projection": "gaussian",
    },
    "centred, equalised fully": {"center_keys": True, "equalize_keys": 1.0, "equalize_values": 0.5},
    "plain": {"center_keys": False, "equalize_keys": 0.0},
    "5 and 1 bits": {"key_bits": 5, "value_bits": 1},
}


def make_store(d_key: int = 32, d_value: int = 32, **options: object) -> RotorQuantKVCache:
    return RotorQuantKVCache(d_key, d_value, config=RotorQuantConfig.from_options(None, **options))


def states(tokens: int, batch: int = 2, heads: int = 3, d: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(d, generator=generator).exp()
    x = torch.randn(batch, heads, tokens, d, generator=generator) * channels
    x[..., 5] += 40.0
    return x


def test_seed_call_shape() -> None:
    store = RotorQuantKVCache(64, 48, bits=2, seed=7)
    store.append(states(5, d=64), states(5, d=48))
    assert len(store) == 5
    assert store.attention_scores(states(1, d=64)).shape == (2, 3, 1, 5)
    assert store.get_values().shape == (2, 3, 5, 48)
    assert store.config.key_bits == store.config.value_bits == 2


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_scores_are_those_of_the_reconstructed_keys(options: dict) -> None:
    """Folding equalisation, mean, rotation and QJL into the query changes nothing."""
    store = make_store(**options)
    store.append(states(40), states(40, seed=1))
    store.append(states(7, seed=2), states(7, seed=3))
    queries = states(3, heads=6, seed=4)  # grouped: two query heads per stored head
    keys = store.get_keys().double().repeat_interleave(2, dim=1)
    expected = queries.double() @ keys.mT
    actual = store.attention_scores(queries)
    assert actual.shape == (2, 6, 3, 47)
    tolerance = 2e-6 * queries.double().norm(dim=-1).max() * keys.norm(dim=-1).max()
    assert (actual - expected).abs().max() < tolerance


def test_scores_over_several_tiles() -> None:
    store = make_store()
    store.append(states(2500, 1, 1), states(2500, 1, 1))
    q = states(2, 1, 1, seed=9)
    expected = q.double() @ store.get_keys().double().mT
    torch.testing.assert_close(store.attention_scores(q).double(), expected, rtol=1e-4, atol=1e-2)


def test_error_falls_with_bits() -> None:
    keys, values = states(200), states(200, seed=1)
    errors = []
    for bits in (2, 3, 4, 6, 8):
        store = make_store(key_bits=bits, value_bits=bits, equalize_values=0.0)
        store.append(keys, values)
        errors.append(float((store.get_values() - values).square().sum() / values.square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-4 < 0.05 < errors[0]


def test_tokens_do_not_depend_on_later_ones() -> None:
    """Appending in pieces gives the same codes as the first block's statistics dictate."""
    keys, values = states(100), states(100, seed=1)
    pieces = make_store()
    pieces.append(keys[:, :, :40], values[:, :, :40])
    before = pieces.get_keys(), pieces.get_values()
    for start in range(40, 100, 7):
        pieces.append(keys[:, :, start : start + 7], values[:, :, start : start + 7])
    assert len(pieces) == 100
    assert torch.equal(pieces.get_keys()[:, :, :40], before[0])
    assert torch.equal(pieces.get_values()[:, :, :40], before[1])
    late = make_store()
    late.append(keys[:, :, :40], values[:, :, :40])
    late.append(keys[:, :, 40:], values[:, :, 40:])
    for name, tensor in pieces.state().items():
        assert torch.equal(tensor, late.state()[name]), name


def test_rows_of_the_batch_are_independent() -> None:
    keys, values = states(50), states(50, seed=1)
    both = make_store()
    both.append(keys, values)
    one = make_store()
    one.append(keys[1:], values[1:])
    torch.testing.assert_close(both.get_keys()[1:], one.get_keys(), rtol=0, atol=1e-5)
    torch.testing.assert_close(both.get_values()[1:], one.get_values(), rtol=0, atol=1e-5)


def test_crop_and_append_again() -> None:
    keys, values = states(90), states(90, seed=1)
    store = make_store()
    store.append(keys[:, :, :60], values[:, :, :60])
    store.append(keys[:, :, 60:], values[:, :, 60:])
    full = store.get_keys()
    store.crop(50)
    assert torch.equal(store.get_keys(), full[:, :, :40])
    store.append(keys[:, :, 40:], values[:, :, 40:])
    assert torch.equal(store.get_keys(), full)
    store.crop(90)
    assert len(store) == 0
    assert store.keys.statistics is None
    store.append(keys[:1], values[:1])  # another batch size: as good as new
    assert store.get_keys().shape[0] == 1


def test_drop_front_keeps_statistics() -> None:
    keys, values = states(90), states(90, seed=1)
    store = make_store()
    store.append(keys, values)
    full = store.get_keys()
    store.drop_front(30)
    assert torch.equal(store.get_keys(), full[:, :, 30:])
    store.append(keys[:, :, :70], values[:, :, :70])  # grows: the rows in front are reused
    assert torch.equal(store.get_keys()[:, :, :60], full[:, :, 30:])
    assert torch.equal(store.get_keys()[:, :, 60:], full[:, :, :70])


def test_growth_copies_history_rarely_and_wastes_little() -> None:
    store = make_store()
    block = states(32, 1, 1)
    capacities, copied = [], 0
    for _ in range(400):
        store.append(block, block)
        if not capacities or store.keys.buffers.capacity != capacities[-1]:
            capacities.append(store.keys.buffers.capacity)
            copied += len(store)
        assert store.keys.buffers.capacity - len(store) <= len(store) / 64 + 32
    assert copied / len(store) < 64
    parts = store.nbytes()
    assert parts["spare"] < 0.02 * sum(parts.values())


def test_space_given_up_is_freed() -> None:
    """After a deep crop, and where a sliding window moves on by more than its length."""
    x = states(4000, 1, 1)
    for give_up in (RotorQuantKVCache.crop, RotorQuantKVCache.drop_front):
        store = make_store()
        store.append(x, x)
        kept = store.get_keys()[:, :, :100] if give_up is RotorQuantKVCache.crop else None
        give_up(store, 3900)
        assert len(store) == 100
        assert store.nbytes()["spare"] < 0.5 * sum(store.nbytes().values())
        if kept is not None:
            assert torch.equal(store.get_keys(), kept)


def test_bytes_are_those_of_the_tensors() -> None:
    store = make_store(128, 64, key_bits=3, value_bits=4, key_quantizer="prod")
    store.append(states(100, d=128), states(100, d=64))
    vectors = 2 * 3 * 100
    parts = store.nbytes()
    assert parts["key_codes"] == vectors * 32  # 2 bits of stage 1
    assert parts["key_signs"] == vectors * 16
    assert parts["key_scale"] == parts["key_residual_norm"] == vectors * 2
    assert parts["value_codes"] == vectors * 32
    real = sum(t.untyped_storage().nbytes() for t in store.keys.buffers.tensors.values())
    real += sum(t.untyped_storage().nbytes() for t in store.values.buffers.tensors.values())
    assert sum(parts.values()) - parts["statistics"] == real


@pytest.mark.parametrize(("bits", "least"), [(3, 5.1), (4, 3.87), (2, 7.5)], ids=lambda v: str(v))
def test_packed_region_at_128(bits: int, least: float) -> None:
    store = make_store(128, 128, key_bits=bits, value_bits=bits)
    x = states(64, d=128).bfloat16()
    store.append(x, x)
    codes = {k: v for k, v in store.nbytes().items() if k.endswith(("_codes", "_scale"))}
    assert 2 * x.nbytes / sum(codes.values()) >= least


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (states(4, d=31), states(4), "31"),
        (states(4)[0], states(4)[0], "batch, heads, tokens"),
        (states(4), states(5), "differ"),
        (states(4).int(), states(4).int(), "int32"),
        (states(4, heads=2), states(4, heads=2), "2 heads"),
        (states(4).log(), states(4), "NaN or infinite"),
    ],
    ids=["head dim", "3 axes", "tokens differ", "dtype", "heads", "nan"],
)
def test_refused_input_changes_nothing(
    keys: torch.Tensor, values: torch.Tensor, message: str
) -> None:
    store = make_store()
    store.append(states(10), states(10, seed=1))
    before = {name: tensor.clone() for name, tensor in store.state().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        store.append(keys, values)
    after = store.state()
    assert len(store) == 10
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_empty_store() -> None:
    store = make_store()
    assert len(store) == 0
    with pytest.raises(ValueError, match="empty"):
        store.get_values()
    store.append(states(0), states(0))
    assert len(store) == 0
    with pytest.raises(ValueError, match="d is 7"):
        make_store(7)


def test_queries_must_fit() -> None:
    store = make_store()
    store.append(states(4), states(4))
    with pytest.raises(ValueError, match="multiple of 3"):
        store.attention_scores(states(1, heads=4))
    with pytest.raises(ValueError, match="32 elements"):
        store.attention_scores(states(1, d=16))


def test_huge_and_tiny_blocks() -> None:
    """16-bit scales hold any unit, as the statistics take it out."""
    for factor in (1e-30, 1e30):
        store = make_store(center_keys="auto")
        keys = states(64) * factor
        store.append(keys, keys)
        error = (store.get_values() / factor - keys / factor).square().sum()
        assert error / (keys / factor).square().sum() < 0.02
        assert torch.isfinite(store.get_keys()).all()


def test_constant_channels_do_not_drown_the_others() -> None:
    """A key bias of 200 in four channels: 'auto' centring takes it out, nothing else does."""

    def error(center: bool | str) -> float:
        generator = torch.Generator().manual_seed(3)
        keys = torch.randn(1, 2, 128, 64, generator=generator)
        spread = keys.square().mean()
        keys[..., [10, 20, 42, 52]] += 200.0
        store = make_store(64, 64, key_bits=3, center_keys=center)
        store.append(keys, keys)
        return float((store.get_keys() - keys).square().mean() / spread)

    assert error("auto") < 0.5
    assert error(False) > 10 * error("auto")


@pytest.mark.parametrize("pair", [8, 16, 18, 20, 22, 24, 28, 31])
def test_a_constant_that_rope_turns_does_no_harm(pair: int) -> None:
    """A key bias comes before RoPE: what a short first block takes for a constant turns later."""
    generator = torch.Generator().manual_seed(pair)
    keys = torch.randn(1, 2, 1024, 64, generator=generator)
    spread = keys.square().mean()
    angle = torch.arange(1024) * 10000 ** (-pair / 32)
    keys[..., pair] += 100 * angle.cos()
    keys[..., pair + 32] += 100 * angle.sin()

    def error(center: bool | str) -> float:
        """Of the other channels, which the queries that meet such keys read."""
        store = make_store(64, 64, key_bits=3, center_keys=center)
        store.append(keys[:, :, :32], keys[:, :, :32])
        store.append(keys[:, :, 32:], keys[:, :, 32:])
        wrong = (store.get_keys() - keys).square()
        wrong[..., [pair, pair + 32]] = 0
        return float(wrong.mean() / spread)

    assert error("auto") < 1.6 * error(False)


def test_auto_centring_leaves_ordinary_channels_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(1, 2, 64, 64, generator=generator) + 1.0
    store = make_store(64, 64, center_keys="auto")
    store.append(keys, keys)
    assert store.keys.statistics is not None
    assert store.keys.statistics.mean is not None
    assert not store.keys.statistics.mean.any()
