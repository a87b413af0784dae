"""The recursion of least squares on the CPU: solve, estimate and deflate, step after step, for each sample on its own.

The noise that a step subtracts from the return stays packed signs: no array of size (T, B, P, H) is made of it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .compile_numba import inlined, kernel, rows_of, summing
from .least_squares import Deflation
from .noise_numba import packed_signs

_F = np.float32


@summing
def _dot(factor: Any, step: Any, sample: Any, row: Any, vector: Any, length: Any) -> Any:
    total = _F(0)
    for place in range(length):
        total += factor[step, sample, row, place] * vector[place]
    return total


@inlined
def solve_in_place(factor: Any, step: Any, sample: Any, vector: Any) -> None:
    """Solve L L^T x = vector in place."""
    size = len(vector)
    for row in range(size):
        known = _dot(factor, step, sample, row, vector, row)
        vector[row] = (vector[row] - known) / factor[step, sample, row, row]
    for row in range(size - 1, -1, -1):
        vector[row] /= factor[step, sample, row, row]
        solved = vector[row]
        for place in range(row):
            vector[place] -= solved * factor[step, sample, row, place]


@inlined
def _add_row(total: Any, step: Any, sample: Any, share: Any, activity: Any, row: Any) -> None:
    for unit in range(total.shape[2]):
        total[step, sample, unit] += share * activity[row, unit]


@summing
def signed_sum(words: Any, step: Any, sample: Any, rollout: Any, values: Any) -> Any:
    """Return the sum over units of the signs times the values."""
    total, units = _F(0), values.shape[2]
    for number in range((units + 31) // 32):
        word, start = words[step, sample, rollout, number], 32 * number
        for i in range(min(32, units - start)):
            value = values[step, sample, start + i]
            total += value if (word >> np.uint32(i)) & np.uint32(1) else -value
    return total


@kernel
def _deflate(
    delta_loss: Any,
    activity: Any,
    factor: Any,
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
            solve_in_place(factor, step, sample, weights)
            estimate[step, sample] = _F(0)
            for rollout in range(rollouts):
                row = (step * batch + sample) * rollouts + rollout
                _add_row(estimate, step, sample, weights[rollout], activity, row)
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
        factor.contiguous().numpy(),
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
