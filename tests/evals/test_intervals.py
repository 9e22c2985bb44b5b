"""Intervals hold what they promise: exact cases, and their coverage on synthetic texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, binom
from scipy.stats import t as student

from evals.measurements.intervals import (
    interval,
    mean_interval,
    quantile_interval,
    share_interval,
)


def test_one_cluster_gives_no_interval() -> None:
    one = [np.array([0.1, 0.2])]
    assert mean_interval(one) is None
    assert share_interval([np.array([True, False])]) is None
    assert quantile_interval(one, 0.99) is None
    assert interval([(100, 0.01)], 50.0) is None


def test_the_mean_is_students_on_a_logarithmic_scale() -> None:
    clusters = [np.full(100, x) for x in (0.01, 0.03, 0.02, 0.02)]
    low, high = mean_interval(clusters)
    error = np.std([0.01, 0.03, 0.02, 0.02], ddof=1) / 2
    factor = math.exp(student.ppf(0.975, 3) * error / 0.02)
    assert (low, high) == pytest.approx((0.02 / factor, 0.02 * factor))
    wider = mean_interval(clusters, 0.99)
    assert wider[0] < low < high < wider[1]
    # A window counts by its tokens.
    skewed = mean_interval([np.full(10_000, 0.01), np.full(10_000, 0.01), np.full(1, 5.0)])
    assert skewed[1] < 0.013
    assert mean_interval([np.zeros(5), np.zeros(5)]) == (0, 0)
    assert all(map(math.isnan, mean_interval([np.full(5, np.nan), np.zeros(5)])))


def test_the_share_of_independent_tokens_is_clopper_and_pearsons() -> None:
    """As many clusters as tokens: then every token is a sample of its own."""
    tokens = [np.array([i < 8]) for i in range(400)]
    low, high = share_interval(tokens)
    # The variance by clusters is that of independent tokens, but for n - 1 instead of n.
    n = 399
    x = 8 / 400 * n
    exact = beta.ppf(0.025, x, n - x + 1), beta.ppf(0.975, x + 1, n - x)
    assert (low, high) == pytest.approx(exact, rel=1e-6)


def test_no_changes_are_not_certainty() -> None:
    """The rule of three: of n tokens without one, at most 3.7 / n at 97.5%; more by clusters."""
    low, high = share_interval([np.zeros(50, bool)] * 200)
    assert low == 0
    assert high == pytest.approx(3.69 / 10_000, rel=0.03)
    few = share_interval([np.zeros(2500, bool)] * 4)
    assert few[1] > 2 * high
    assert share_interval([np.ones(50, bool)] * 200) == pytest.approx((1 - high, 1.0))


def test_tokens_that_go_together_count_less() -> None:
    spread = [np.arange(1000) % 50 == 0] * 8
    apart = [np.arange(1000) < n for n in (0, 0, 0, 0, 40, 40, 40, 40)]
    assert np.mean(spread) == np.mean(apart) == 0.02
    (low, high), (lower, higher) = share_interval(spread), share_interval(apart)
    assert lower < low / 2
    assert higher > 2 * high - 0.02


def test_the_quantile_of_independent_tokens_is_the_binomials() -> None:
    """Order statistics: the probability that the quantile is beyond them is at most 2.5%."""
    values = np.random.default_rng(0).permutation(2000).astype(float)
    low, high = quantile_interval([values[i : i + 1] for i in range(2000)], 0.99)
    below = binom(2000, 0.99)
    assert low < 1979.5 < high
    assert below.sf(high) <= 0.026  # so many or more tokens below the quantile
    assert below.sf(high - 2) > 0.024
    assert below.cdf(low) <= 0.026
    assert below.cdf(low + 2) > 0.024


def test_too_few_tokens_leave_the_quantile_open() -> None:
    """Of 200 tokens the largest is under the 99th percentile in one text of eight."""
    values = np.random.default_rng(0).permutation(200).astype(float)
    low, high = quantile_interval(np.split(values, 20), 0.99)
    assert high == math.inf
    assert 150 < low < 198


def texts(seed: int, clusters: int, tokens: int = 700) -> tuple[list, list, list, float, float]:
    """KL of tokens, whether the likeliest successor changed, and losses, by window; the truth.

    Windows differ, and within each both go on for some tokens: a hard passage is hard for longer.
    """
    rng = np.random.default_rng(seed)
    kl, changed, losses = [], [], []
    for _ in range(clusters):
        level = rng.normal(0, 0.25)
        noise = np.repeat(rng.normal(0, 1, tokens // 5 + 1), 5)[:tokens] + rng.normal(0, 1, tokens)
        kl.append(np.exp(level + noise))
        changed.append(noise + level > 2.6)
        losses.append((tokens, float(rng.normal(0.002, 0.004))))
    total = 0.25**2 + 2
    mean, share = math.exp(total / 2), 0.5 * math.erfc(2.6 / math.sqrt(2 * total))
    return kl, changed, losses, mean, share


@pytest.mark.parametrize("clusters", [4, 8, 16])
def test_coverage(clusters) -> None:
    """Of 600 synthetic texts at a fixed seed: each end misses about 2.5%, none much more."""
    missed = {name: [0, 0] for name in ("mean", "share", "quantile", "perplexity")}
    runs = 600
    for seed in range(runs):
        kl, changed, losses, mean, share = texts(1000 * clusters + seed, clusters)
        p99 = math.exp(2.3263 * math.sqrt(0.25**2 + 2))
        truths = {
            "mean": (mean, mean_interval(kl)),
            "share": (share, share_interval(changed)),
            "perplexity": (10 * math.expm1(0.002), interval(losses, 10.0)),
        }
        if seed < 200:
            truths["quantile"] = (p99, quantile_interval(kl, 0.99))
        for name, (truth, (low, high)) in truths.items():
            missed[name][0] += low > truth
            missed[name][1] += high < truth
    for name, (low, high) in missed.items():
        count = 200 if name == "quantile" else runs
        assert low / count <= 0.05, (name, low)
        assert high / count <= 0.06, (name, high)
    assert sum(missed["perplexity"]) >= 0.02 * runs  # and they are no wider than they need be
    assert sum(missed["mean"]) >= 0.02 * runs
