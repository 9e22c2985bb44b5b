"""Keys that few bits would spoil: the predicted shift of their scores, and who takes 8 bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotorquant_hf.quant.channels import ChannelStatistics
from rotorquant_hf.quant.lloyd_max import LloydMaxCodebook
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.mse import RotorQuantMSE
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.wide import MAX_SHIFT, needs_wide, product_shift

HEADS, D = 3, 64
FIRST, LAST = 256, 2048
"""Tokens that the statistics are taken from, and up to where the mean of keys is fitted."""

ROPE = Rope((10000.0 ** (-torch.arange(D // 2) / (D // 2))).view(1, 1, 1, -1), "half")


def keys_of(tokens: int, bias: float = 0.0) -> torch.Tensor:
    """(1, HEADS, tokens, D) before RoPE: channels of several sizes around a constant."""
    generator = torch.Generator().manual_seed(0)
    channels = (0.5 * torch.randn(HEADS, 1, D, generator=generator)).exp()
    constant = torch.randn(HEADS, 1, D, generator=generator)
    return (torch.randn(1, HEADS, tokens, D, generator=generator) * channels) + bias * constant


def queries_of(tokens: int, heads: int = HEADS) -> torch.Tensor:
    """(1, heads, tokens, D): as many query heads as kv heads, channels of several sizes."""
    generator = torch.Generator().manual_seed(50)
    channels = (0.5 * torch.randn(heads, 1, D, generator=generator)).exp()
    return torch.randn(1, heads, tokens, D, generator=generator) * channels


def taken(keys: torch.Tensor, center: bool = True) -> ChannelStatistics:
    """The statistics of the first tokens, at positions from 0 on."""
    first = keys[:, :, :FIRST]
    return ChannelStatistics.of_block(first, 0.5, center, "half", ROPE, range(FIRST))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("center", [True, False])
def test_the_predicted_shift_is_the_measured_one(bits: int, bias: float, center: bool) -> None:
    """Of keys coded to the nearest, at all positions up to where their mean is fitted.

    In the mean over rotations: a single one does not spread the errors quite evenly.
    """
    keys = ROPE.turn(keys_of(LAST, bias), torch.arange(LAST))
    queries = ROPE.turn(queries_of(LAST), torch.arange(LAST))
    statistics = taken(keys, center=center)
    moment = QueryMoment.of(queries, HEADS)
    keys, queries, measured = keys[:, :, ::4], queries[:, :, ::4], []
    u = statistics.normalize(keys)
    for seed in range(4):
        coded = statistics.denormalize(RotorQuantMSE(D, bits, seed=seed)(u)[0])
        shifts = queries @ (coded - keys).mT / math.sqrt(D)
        measured.append(shifts.double().square().mean(dim=(-2, -1)))
    wanted = torch.stack(measured).mean(dim=0).float()
    distortion = LloydMaxCodebook.for_dimension(D, bits).distortion
    found = product_shift(statistics, moment) * distortion / D
    torch.testing.assert_close(found, wanted, rtol=0.2, atol=0)


def test_without_rope_a_constant_costs_nothing() -> None:
    """It is subtracted, and stays. (With one scale for all channels: others grow with it.)"""
    moment = QueryMoment.of(queries_of(FIRST), HEADS)
    keys = [keys_of(FIRST, bias) for bias in (0.0, 10.0)]
    found = [product_shift(ChannelStatistics.of_block(x, 0.0, True), moment) for x in keys]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


def test_rope_makes_a_constant_cost() -> None:
    """The mean that is subtracted fits the fast pairs of channels at no position."""
    moment, found = QueryMoment.of(queries_of(FIRST), HEADS), []
    for bias in (0.0, 100.0):
        keys = ROPE.turn(keys_of(FIRST, bias), torch.arange(FIRST))
        found.append(product_shift(taken(keys), moment))
    assert (found[1] > 20 * found[0]).all()


def test_the_scale_of_scores_counts() -> None:
    """Not all models divide by sqrt(d)."""
    distortion = LloydMaxCodebook.for_dimension(D, 4).distortion
    shift = torch.full((1, 2), D * MAX_SHIFT / distortion)
    assert needs_wide(shift, 1.01 * D**-0.5)
    assert not needs_wide(shift, 0.99 * D**-0.5)
    assert not needs_wide(shift, 0.0)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_moments_keep_the_scale(scale: float | None) -> None:
    moment = QueryMoment.of(queries_of(FIRST), HEADS)
    found = moment.merged(replace(moment, scale=scale)).map(lambda x: x[:1])
    assert found.scale == scale
    assert found.score_scale == (D**-0.5 if scale is None else scale)


@given(unit=st.sampled_from([1e-15, 1e-3, 1e3, 1e15]), power=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=12, deadline=None)
def test_keys_and_queries_of_any_unit(unit: float, power: float) -> None:
    """Scores are products of both: what one gains and the other loses is the same."""
    keys, queries = keys_of(40, 1.0), queries_of(40)
    found = []
    for by in (1.0, unit):
        statistics = ChannelStatistics.of_block(keys * by, power, True)
        found.append(product_shift(statistics, QueryMoment.of(queries / by, HEADS)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("shift", "wide"),
    [
        ([[0.9, 0.9]], False),
        ([[0.1, 1.1]], True),  # one head is enough
        ([[0.1, 1.5], [0.1, 0.4]], True),  # and one row
        ([[math.nan, 0.9], [0.1, 1.1]], True),
        ([[0.0, math.inf]], True),
        ([[0.0, math.nan]], False),
    ],
)
def test_who_takes_wide_codes(shift: list[list[float]], wide: bool) -> None:
    """By what 4-bit codes would do, whatever the bits."""
    distortion = LloydMaxCodebook.for_dimension(D, 4).distortion
    assert needs_wide(MAX_SHIFT / distortion * torch.tensor(shift), 1.0) is wide


@pytest.mark.parametrize("keys", [torch.zeros(1, 2, 8, D), torch.full((1, 2, 8, D), math.nan)])
def test_zeros_and_nan_do_not_widen(keys: torch.Tensor) -> None:
    statistics = ChannelStatistics.of_block(keys, 0.5, True)
    seen = QueryMoment.of(queries_of(8, heads=2), 2)
    assert not needs_wide(product_shift(statistics, seen), seen.score_scale)


def test_huge_keys_do() -> None:
    """The squares of their scores leave float32."""
    statistics = ChannelStatistics.of_block(1e25 * keys_of(8), 0.5, True)
    seen = QueryMoment.of(1e10 * queries_of(8), HEADS)
    assert needs_wide(product_shift(statistics, seen), seen.score_scale)
