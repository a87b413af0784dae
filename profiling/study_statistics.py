"""Statistics of the study's tables: means with bootstrap intervals, paired tests, and what a learning curve says.

Few seeds say little, and these say how little: the exact two-sided Wilcoxon test of n pairs has no p below 2^(1 - n),
.0625 for five seeds and .002 for ten.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "area", "holm", "interval", "nmse", "paired", "reached"]

LEVEL, DRAWS = 0.95, 10_000

MOST_COUNTED = 14
"""Pairs whose assignments of signs are counted; p of more is scipy's."""

WORST = 1e300
"""Stands for the loss of a run that broke off."""


class Interval(NamedTuple):
    """A mean with the percentile interval of its bootstrap."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS) -> Interval:
    """Return the mean of a sample and its bootstrap interval, from a fixed seed; NaN bounds for a single value.

    A value that is not finite, a run that broke off, makes all three infinite or NaN.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values have no mean")
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) == 1 or not np.isfinite(sample).all():
        return Interval(mean, math.nan, math.nan)
    chosen = np.random.default_rng(0).integers(len(sample), size=(draws, len(sample)))
    low, high = np.quantile(sample[chosen].mean(1), ((1 - level) / 2, (1 + level) / 2))
    return Interval(mean, float(low), float(high))


def paired(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test of pairs; 1 where all are equal.

    Pairs are of one seed: the same start and the same batches. An infinite loss is above every finite one.

    Raises:
        ValueError: the two are not of one length.
    """
    if len(left) != len(right):
        raise ValueError(f"pairs need two of one length, got {len(left)} and {len(right)}")
    from scipy.stats import rankdata, wilcoxon

    first, second = (np.nan_to_num(np.asarray(side, float), nan=WORST, posinf=WORST) for side in (left, right))
    differences = (first - second)[first != second]
    if not len(differences):
        return 1.0
    if len(differences) > MOST_COUNTED:
        return float(wilcoxon(differences).pvalue)
    # Counted, since scipy's exact distribution is that of ranks without ties.
    ranks = rankdata(np.abs(differences))
    signs = np.array(list(itertools.product((0, 1), repeat=len(ranks))))
    middle = ranks.sum() / 2
    distance = np.abs(signs @ ranks - middle)
    return float(np.mean(distance >= abs(ranks[differences > 0].sum() - middle) - 1e-9))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's step-down method (1979), in their order."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def area(updates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the mean height of a learning curve: its area by trapezia over its width; infinite where it broke off."""
    if len(updates) != len(losses):
        raise ValueError(f"a curve needs as many losses as updates, got {len(losses)} and {len(updates)}")
    if not losses or not np.isfinite(losses).all():
        return math.inf
    if len(losses) == 1:
        return float(losses[0])
    return float(np.trapezoid(losses, updates) / (updates[-1] - updates[0]))


def reached(cost: Sequence[float], losses: Sequence[float], stated: float) -> float | None:
    """Return the cost (seconds, updates) at the first evaluation from which two in a row are at most `stated`.

    The last evaluation needs no other after it. None if there is none.
    """
    below = [loss <= stated for loss in losses]
    lasting = [here and then for here, then in zip(below, [*below[1:], True], strict=True)]
    return next((spent for spent, there in zip(cost, lasting, strict=True) if there), None)


def nmse(records: Sequence[float]) -> float:
    """Return the sketched-RTRL release's figure of an online run: the mean of its last five records.

    A record is the mean squared error of the last 200 steps of a series of variance 1, made every 500 steps.
    """
    return float(np.mean(records[-5:])) if len(records) else math.inf
