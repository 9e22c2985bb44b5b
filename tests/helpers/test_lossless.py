"""The lossless mode loses nothing, and takes the project's own way."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rotorquant_hf import RotorQuantCache, RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.attention import tensor
from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.mse import RotorQuantMSE
from rotorquant_hf.quant.packed import PackedSpan
from tests.helpers.lossless import STEP, ULP, Lossless, lossless
from tests.helpers.models import build, feed, prompt

D = 24
CODES = ("highest", "high", "low", "lowest")
SMALLEST = 2.0**-149  # of float32


def hostile() -> dict[str, Tensor]:
    """Vectors (5, D) of every kind that float32 holds."""
    torch.manual_seed(0)
    x = torch.randn(5, D)
    wide = x * 2.0 ** torch.linspace(-100, 100, D)
    return {
        "ordinary": x,
        "zeros": torch.zeros(5, D),
        "one-hot": torch.eye(5, D) * torch.tensor([[1.0], [-1.0], [3e38], [1e-45], [0.1]]),
        "huge": x / x.abs().max() * torch.finfo(torch.float32).max,
        "tiny": x * 1e-38,
        "smallest": (x * 5).round() * SMALLEST,
        "of many magnitudes": wide,
        "a power of two": torch.full((5, D), -2.0),
        "just below one": torch.full((5, D), 1 - ULP),
        "bfloat16": x.bfloat16().float(),
    }


def allowed(x: Tensor) -> Tensor:
    """What may be lost of vectors, float64."""
    x = x.double().abs()
    return ULP * x + STEP * x.amax(dim=-1, keepdim=True) + SMALLEST


def read_back(rows: dict[str, Tensor]) -> Tensor:
    """Vectors (n, D) from their rows, as a span of the store reads them."""
    one = ChannelStatistics(torch.ones(1, 1, 1, 1))
    rows = {name: x[None, None] for name, x in rows.items()}
    span = PackedSpan(rows, one, Lossless(D, 4, torch.device("cpu")))
    out = torch.empty(span.shape)
    span.materialize(out)
    return out[0, 0]


@pytest.mark.parametrize("kind", hostile())
def test_codes_hold_the_vectors(kind: str) -> None:
    x = hostile()[kind]
    rows = Lossless(D, 4, torch.device("cpu")).encode(x)
    lost = (read_back(rows).double() - x.double()).abs()
    assert bool((lost <= allowed(x)).all())
    assert all(rows[name].dtype == torch.uint8 for name in CODES)


def test_what_has_one_magnitude_comes_back_bit_by_bit() -> None:
    torch.manual_seed(0)
    x = torch.rand(1000, D) + 1
    assert torch.equal(read_back(Lossless(D, 4, torch.device("cpu")).encode(x)), x)


@pytest.mark.parametrize("name", [*CODES, "scale"])
def test_every_row_is_read(name: str) -> None:
    rows = Lossless(D, 4, torch.device("cpu")).encode(hostile()["ordinary"])
    whole = read_back(rows)
    changed = rows[name] + 1 if name != "scale" else rows[name] * 2
    assert not torch.equal(read_back(rows | {name: changed}), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"center_keys": False, "equalize_keys": 0, "equalize_values": 0},
        {"center_keys": True, "equalize_keys": 1.0, "equalize_values": 1.0},
        {},
    ],
    ids=["plain", "centred and equalised", "default"],
)
def test_the_store_gives_back_what_it_was_given(options, dtype) -> None:
    """Keys with large constants in some channels, as biases make them, and others nearly silent."""
    torch.manual_seed(0)
    size = torch.logspace(-3, 3, D)
    keys, values = ((torch.randn(2, 3, 40, D) + 1) * size).to(dtype), torch.randn(2, 3, 40, D)
    with lossless():
        store = RotorQuantKVCache(D, D, config=RotorQuantConfig(**options))
        store.append(keys[:, :, :30], values[:, :, :30].to(dtype))
        store.append(keys[:, :, 30:], values[:, :, 30:].to(dtype))
        pairs = ((store.get_keys(), keys), (store.get_values(), values.to(dtype)))
    for found, given in pairs:
        given = given.float()
        # Centring and equalising round too, in units of a channel.
        of_a_channel = given.abs().amax(dim=2, keepdim=True)
        lost = (found.float() - given).abs()
        assert bool((lost <= 8 * ULP * of_a_channel + 2 * allowed(given)).all())


def test_attention_over_the_codes_is_attention_over_the_vectors() -> None:
    torch.manual_seed(0)
    keys, values, query = torch.randn(3, 2, 2, 50, D)
    with lossless():
        store = RotorQuantKVCache(D, D)
        store.append(keys, values)
        scores = store.attention_scores(query)
    torch.testing.assert_close(scores, query @ keys.mT, rtol=0, atol=1e-5)


def test_only_within_are_keys_and_values_stored_so() -> None:
    """The quantiser of a layer is looked up whenever it is used: caches must not outlive it."""
    cache = RotorQuantCache("k2v2", residual_length=4, block_length=2, statistics_length=0)
    model = build("llama")

    def classes() -> set[type]:
        return {type(side.quantizer) for x in cache.layers for side in x.store.sides}

    with lossless():
        feed(model, cache, prompt(1, 20), (20,))
        assert classes() == {Lossless}
    assert classes() == {RotorQuantMSE}


def test_attention_reads_the_codes(monkeypatch) -> None:
    seen = SimpleNamespace(calls=0)
    compute = tensor.compute

    def counted(query, keys, values, options):
        seen.calls += type(keys.packed.quantizer) is Lossless
        return compute(query, keys, values, options)

    monkeypatch.setattr(tensor, "compute", counted)
    with lossless():
        cache = RotorQuantCache(residual_length=4, block_length=2, statistics_length=0)
        feed(build("llama"), cache, prompt(1, 20), (18, 1, 1))
    assert seen.calls == 4
