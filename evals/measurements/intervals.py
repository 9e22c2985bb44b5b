"""Confidence intervals of what reading a cache changed.

The tokens of a text are not independent, nor are the windows of one document; so the sample is the
documents, or the windows where there is but one document (the interval then speaks of texts like
that one). Each is a cluster of tokens, weighed by how many it has:

- the mean of something positive (KL divergence): Student's t with the clusters' variance (the
  linearised ratio estimator: Cochran, Sampling Techniques, 1977, section 6.3), on a logarithmic
  scale (the delta method), as the means of clusters are skewed;
- a share (of tokens whose likeliest successor changed): Korn and Graubard, "Confidence intervals
  for proportions with small expected number of positive counts estimated from survey data", Survey
  Methodology 24, 1998: Clopper and Pearson's interval for the number of independent tokens that
  would have the same variance. It holds for few changes too, and for none;
- a quantile (KL p99): all thresholds of which that interval does not exclude that the right share
  of the tokens is above (Francisco and Fuller, Annals of Statistics 19, 1991; Woodruff, JASA 47,
  1952). The 99th percentile is within a limit if at most 1% of the tokens are above;
- a perplexity's change: Student's t of the paired differences of mean log-likelihoods.

On WikiText-2 and SmolLM2, with 8 windows of 1,024 tokens drawn from 31, the upper ends at 95% miss
in 1 to 7 cases of 100 instead of 2.5, and the lower ones in 1 to 2. What a sample does not hold no
interval knows: the 32nd window there, the beginning of the file, diverges three times as far as the
others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Clusters = Sequence[NDArray]
"""What was found of each token, by document or window."""


def mean_interval(clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Interval of the mean of positive values over all tokens; None for a single cluster."""
    if len(clusters) < 2:
        return None
    mean, error = _mean_and_error(clusters)
    if not mean > 0:  # nothing differs at all, or it is not finite
        return mean, mean
    factor = math.exp(min(_student(level, len(clusters)) * error / mean, 700.0))
    return mean / factor, mean * factor


def share_interval(clusters: Clusters, level: float = 0.95) -> Interval | None:
    """Interval of the share of tokens that are true; None for a single cluster."""
    if len(clusters) < 2:
        return None
    from scipy.stats import beta

    tokens, (share, error) = sum(map(len, clusters)), _mean_and_error(clusters)
    independent = min(tokens, share * (1 - share) / error**2) if error else tokens
    # Fewer clusters, longer tails: as if there were still fewer tokens.
    independent *= (_student(level, tokens) / _student(level, len(clusters))) ** 2
    true, tail = share * independent, (1 - level) / 2
    low = float(beta.ppf(tail, true, independent - true + 1)) if share > 0 else 0.0
    high = float(beta.ppf(1 - tail, true + 1, independent - true)) if share < 1 else 1.0
    return low, high


def quantile_interval(clusters: Clusters, q: float, level: float = 0.95) -> Interval | None:
    """Interval of a quantile over all tokens; None for a single cluster.

    The upper end is infinite where so few tokens do not tell.
    """
    if len(clusters) < 2:
        return None
    values = np.unique(np.concatenate(list(clusters)))

    def above(index: int) -> Interval:
        found = share_interval([x > values[index] for x in clusters], level)
        assert found is not None
        return found

    # The further up the threshold, the fewer tokens are above: both ends are found by bisection.
    low = _first(len(values), lambda i: above(i)[0] <= 1 - q)
    high = _first(len(values), lambda i: above(i)[1] <= 1 - q)
    return (
        float(values[min(low, len(values) - 1)]),
        float(values[high]) if high < len(values) else math.inf,
    )


def interval(
    differences: Sequence[tuple[int, float]], baseline: float, level: float = 0.95
) -> Interval | None:
    """Interval of a perplexity's difference to `baseline`; None for a single document.

    Args:
        differences: of every document, its tokens and the difference of its mean losses, nats.
        baseline: the perplexity compared with, taken as known.
        level: of confidence.
    """
    count = len(differences)
    if count < 2:
        return None
    total = sum(n for n, _ in differences)
    mean = sum(n * d for n, d in differences) / total
    square = sum((n / total) ** 2 * (d - mean) ** 2 for n, d in differences)
    half = _student(level, count) * math.sqrt(square * count / (count - 1))
    low, high = (baseline * math.expm1(mean + sign * half) for sign in (-1, 1))
    return low, high


def _mean_and_error(clusters: Clusters) -> tuple[float, float]:
    """The mean over all tokens, and its standard error by the clusters."""
    sizes = np.array([len(x) for x in clusters], dtype=float)
    means = np.array([x.mean() for x in clusters])
    weights = sizes / sizes.sum()
    mean, count = float(weights @ means), len(clusters)
    square = float(np.square(weights * (means - mean)).sum())
    return mean, math.sqrt(square * count / (count - 1))


def _student(level: float, count: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, count - 1))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of `count` indices from which on something holds; `count` if it never does."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
