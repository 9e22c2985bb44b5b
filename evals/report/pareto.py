"""The Pareto front: what nothing else beats in both respects."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates, by their first number.

    Less is better in both. A point dominates another if it is nowhere worse and somewhere better;
    of equal points all stay.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        # In this order only what came before can dominate, and the last of the front does so
        # if anything does.
        if not found or points[i][1] < points[found[-1]][1] or points[i] == points[found[-1]]:
            found.append(i)
    return found
