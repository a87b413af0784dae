"""Least squares on the CPU: Cholesky factors, and the recursion: solve, estimate and deflate, step after step.

Factors L are stored by columns: as rows they are U = L^T, on which all loops run. The noise that a step subtracts from
the return stays packed signs: no array of size (T, B, P, H) is made of it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .compile_numba import inlined, kernel, rows_of, summing
from .least_squares import RIDGE_FLOOR, Deflation
from .noise_numba import packed_signs

_F = np.float32
_LIMITS = np.finfo(np.float32)
_TINY, _MOST = _LIMITS.tiny, _LIMITS.max


PIVOTS = 4
"""Rows that are eliminated at once."""

ALIGNED = 16
"""Rows are worked on from a multiple of this on: what lies left of the diagonal is not read."""


@inlined
def _subtract(row: Any, share: Any, other: Any) -> None:
    for place in range(len(row)):
        row[place] -= share * other[place]


@inlined
def _scale(row: Any, share: Any, copy: Any) -> None:
    for place in range(len(row)):
        row[place] *= share
        copy[place] = row[place]


@inlined
def _eliminate(first: Any, second: Any, pivots: Any, row: Any, start: Any) -> None:
    """Subtract the pivot rows from two rows, the `row`-th and the one after it, from a column on."""
    a0, a1, a2, a3 = pivots[0, row], pivots[1, row], pivots[2, row], pivots[3, row]
    b0, b1, b2, b3 = pivots[0, row + 1], pivots[1, row + 1], pivots[2, row + 1], pivots[3, row + 1]
    # Slices, since an index that Numba cannot prove positive keeps a loop from being vectorised.
    top0, top1, top2, top3 = pivots[0, start:], pivots[1, start:], pivots[2, start:], pivots[3, start:]
    for place in range(len(first)):
        t0, t1, t2, t3 = top0[place], top1[place], top2[place], top3[place]
        first[place] -= a0 * t0 + a1 * t1 + a2 * t2 + a3 * t3
        second[place] -= b0 * t0 + b1 * t1 + b2 * t2 + b3 * t3


@inlined
def _factor_in_place(upper: Any, pivots: Any) -> Any:
    """Overwrite a matrix with U, U^T U being the matrix, and return whether it has one.

    Only what is on or above the diagonal is read and written for good. `pivots`: room for some rows, (PIVOTS, n).
    """
    size, fine = len(upper), True
    for first in range(0, size, PIVOTS):
        start = first // ALIGNED * ALIGNED
        for number in range(min(PIVOTS, size - first)):
            row = upper[first + number, start:]
            for before in range(number):
                _subtract(row, pivots[before, first + number], pivots[before, start:])
            pivot = upper[first + number, first + number]
            fine = fine and pivot > 0
            _scale(row, 1 / np.sqrt(pivot), pivots[number, start:])
        for pair in range(max(0, size - first - PIVOTS) // 2):
            row = first + PIVOTS + 2 * pair
            start = row // ALIGNED * ALIGNED
            _eliminate(upper[row, start:], upper[row + 1, start:], pivots, row, start)
        if size > first + PIVOTS and (size - first) % 2:
            for number in range(PIVOTS):
                upper[size - 1, size - 1] -= pivots[number, size - 1] * pivots[number, size - 1]
    return fine


@kernel
def _factored(upper: Any, ridge: Any, counts: Any, bad: Any) -> None:
    for system in numba.prange(len(upper)):
        matrix, size = upper[system], upper.shape[1]
        trace = _F(0)
        for place in range(size):
            trace += matrix[place, place]
        penalty = ridge * (trace / max(counts[system % len(counts)], _F(1))) + _TINY
        for place in range(size):
            matrix[place, place] += penalty
        if not _factor_in_place(matrix, np.empty((PIVOTS, size), np.float32)):
            bad[system] = True
            largest = min(np.sqrt(trace + _TINY), _MOST)
            for row in range(size):
                for place in range(size):
                    matrix[row, place] = largest if row == place else _F(0)


def factored(gram: Tensor, ridge: float, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Add the ridge to Gram matrices, (L, B, n, n), in place; return their Cholesky factors and how many had none.

    See the reference. LAPACK takes several times as long for many small matrices.
    """
    upper = gram.mT.contiguous()
    bad = torch.zeros(upper.shape[:2], dtype=torch.bool)
    share = max(ridge, RIDGE_FLOOR * float(_LIMITS.eps))
    counts = finite.sum(1, dtype=torch.float32)
    _factored(upper.flatten(0, 1).numpy(), _F(share), counts.numpy(), bad.flatten().numpy())
    return upper.mT, bad.sum()


@summing
def _dot(first: Any, second: Any) -> Any:
    total = _F(0)
    for place in range(len(first)):
        total += first[place] * second[place]
    return total


@inlined
def solve_in_place(upper: Any, vector: Any) -> None:
    """Solve U^T U x = vector in place."""
    size = len(vector)
    for row in range(size):
        vector[row] /= upper[row, row]
        _subtract(vector[row + 1 :], vector[row], upper[row, row + 1 :])
    for row in range(size - 1, -1, -1):
        known = _dot(upper[row, row + 1 :], vector[row + 1 :])
        vector[row] = (vector[row] - known) / upper[row, row]


@inlined
def _add_rows(total: Any, shares: Any, activity: Any, first: Any) -> None:
    """Add shares times rows of activity, from the `first` on, four at a time."""
    fours = len(shares) // 4
    for four in range(fours):
        place = 4 * four
        row = first + place
        row0, row1, row2, row3 = activity[row], activity[row + 1], activity[row + 2], activity[row + 3]
        share0, share1, share2, share3 = shares[place], shares[place + 1], shares[place + 2], shares[place + 3]
        for unit in range(len(total)):
            total[unit] += (
                share0 * row0[unit] + share1 * row1[unit] + share2 * row2[unit] + share3 * row3[unit]
            )  # fmt: skip
    for place in range(4 * fours, len(shares)):
        _subtract(total, -shares[place], activity[first + place])


@summing
def signed_sum(words: Any, step: Any, sample: Any, rollout: Any, values: Any) -> Any:
    """Return the sum over units of the signs times the values."""
    total, units = _F(0), values.shape[2]
    signs, row = words[step, sample, rollout], values[step, sample]
    # Two words at a time, which halves the sums across a vector.
    for pair in range(units // 64):
        word, other, start = signs[2 * pair], signs[2 * pair + 1], 64 * pair
        first, second = row[start : start + 32], row[start + 32 : start + 64]
        for i in range(len(first)):
            value = first[i] if (word >> np.uint32(i)) & np.uint32(1) else -first[i]
            total += value + (second[i] if (other >> np.uint32(i)) & np.uint32(1) else -second[i])
    for number in range(units // 64 * 2, (units + 31) // 32):
        word, rest = signs[number], row[32 * number : 32 * number + 32]
        for i in range(len(rest)):
            total += rest[i] if (word >> np.uint32(i)) & np.uint32(1) else -rest[i]
    return total


@kernel
def _deflate(
    delta_loss: Any,
    activity: Any,
    upper: Any,
    words: Any,
    sigma: Any,
    unit: Any,
    carry: Any,
    finite: Any,
    discount: Any,
    baseline: Any,
    estimate: Any,
    credit: Any,
) -> None:
    steps, batch, rollouts = delta_loss.shape
    for sample in numba.prange(batch):
        weights = np.empty(rollouts, np.float32)
        for step in range(steps - 1, -1, -1):
            mean, counted = _F(0), 0
            if baseline:
                for rollout in range(rollouts):
                    if finite[sample, rollout]:
                        mean += delta_loss[step, sample, rollout] + carry[sample, rollout]
                        counted += 1
                mean /= _F(max(counted, 1))
            for rollout in range(rollouts):
                target = delta_loss[step, sample, rollout] + carry[sample, rollout] - mean
                credit[step, sample, rollout] = weights[rollout] = target
            solve_in_place(upper[step, sample], weights)
            estimate[step, sample] = _F(0)
            _add_rows(estimate[step, sample], weights, activity, (step * batch + sample) * rollouts)
            for place in range(estimate.shape[2]):
                estimate[step, sample, place] /= unit[step, sample]
            for rollout in range(rollouts):
                later = sigma * signed_sum(words, step, sample, rollout, estimate)
                carry[sample, rollout] = discount * (credit[step, sample, rollout] - later)


def deflate(
    delta_loss: Tensor,
    activity: Tensor,
    factor: Tensor,
    carry: Tensor,
    seed: Tensor,
    how: Deflation,
    *,
    estimate: Tensor,
    credit: Tensor,
) -> Tensor:
    """Go through a block of steps, last first, in the dual form with Rademacher noise; see the reference."""
    steps, batch, rollouts, units = activity.shape
    words = packed_signs(seed, (steps, batch, rollouts, units), how.counters)
    following = carry.clone(memory_format=torch.contiguous_format)
    _deflate(
        delta_loss.contiguous().numpy(),
        rows_of(activity).numpy(),
        factor.mT.contiguous().numpy(),
        words,
        _F(how.sigma),
        how.unit.numpy(),
        following.numpy(),
        how.finite.contiguous().numpy(),
        _F(how.discount),
        how.baseline,
        estimate.numpy(),
        credit.numpy(),
    )
    return following
