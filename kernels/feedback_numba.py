"""The recursion of learned feedback on the CPU: torch multiplies by B, a compiled loop does the rest of a step.

The noise that a step subtracts from the return stays packed signs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .compile_numba import inlined, kernel, rows_of, summing
from .feedback import GAIN, MEASURED, NUMBER, PREDICTED, WEIGHT_FLOOR, Block, Carry, How, Written
from .least_squares_numba import signed_sum, solve_in_place
from .noise_numba import packed_signs

_F = np.float32
_FLOOR = _F(WEIGHT_FLOOR)
_MEASURED, _PREDICTED, _NUMBER, _GAIN = MEASURED, PREDICTED, NUMBER, GAIN


@summing
def _two_products(activity: Any, row: Any, first: Any, second: Any) -> Any:
    one, two = _F(0), _F(0)
    for unit in range(len(first)):
        one += activity[row, unit] * first[unit]
        two += activity[row, unit] * second[unit]
    return one, two


@summing
def _square(values: Any) -> Any:
    total = _F(0)
    for place in range(len(values)):
        total += values[place] * values[place]
    return total


@inlined
def _centre(values: Any, finite: Any, sample: Any) -> None:
    mean, counted = _F(0), 0
    for rollout in range(len(values)):
        if finite[sample, rollout]:
            mean += values[rollout]
            counted += 1
    mean /= _F(max(counted, 1))
    for rollout in range(len(values)):
        values[rollout] = values[rollout] - mean if finite[sample, rollout] else _F(0)


@kernel
def _step(
    step: Any,
    delta_loss: Any,
    activity: Any,
    factor: Any,
    slope: Any,
    gradient: Any,
    fed_back: Any,
    words: Any,
    sigma: Any,
    finite: Any,
    discount: Any,
    baseline: Any,
    returns: Any,
    largest: Any,
    adjoint: Any,
    residual: Any,
    weight: Any,
    totals: Any,
) -> None:
    batch, rollouts = returns.shape
    units = slope.shape[2]
    for sample in numba.prange(batch):
        known, prior = np.empty(units, np.float32), np.empty(units, np.float32)
        for unit in range(units):
            known[unit] = slope[step, sample, unit] * fed_back[sample, unit]
            prior[unit] = known[unit] + slope[step, sample, unit] * gradient[step, sample, unit]
        # Right-hand sides: the return less the prior mean's part of it (with its gain, and whole), and B's part.
        target, effect, predicted = (
            np.empty(rollouts, np.float32),
            np.empty(rollouts, np.float32),
            np.empty(rollouts, np.float32),
        )
        for rollout in range(rollouts):
            row = (step * batch + sample) * rollouts + rollout
            effect[rollout], predicted[rollout] = _two_products(activity, row, prior, known)
            target[rollout] = delta_loss[step, sample, rollout] + returns[sample, rollout]
        if baseline:
            _centre(target, finite, sample)
        along, power = _F(0), _F(0)
        for rollout in range(rollouts):
            along += target[rollout] * effect[rollout]
            power += effect[rollout] * effect[rollout]
        gain = _F(0)
        if power > 0:
            gain = along / power
            # A NaN stays.
            if gain < 0:
                gain = _F(0)
            elif gain > 1:
                gain = _F(1)
        unexplained, remaining = np.empty(rollouts, np.float32), np.empty(rollouts, np.float32)
        solved = np.empty(rollouts, np.float32)
        for rollout in range(rollouts):
            unexplained[rollout] = target[rollout] - effect[rollout]
            remaining[rollout] = target[rollout] - gain * effect[rollout]
            solved[rollout] = predicted[rollout]
        after = adjoint[step + 1, sample]
        bound = largest[sample]
        counted = bound > 0
        share = _F(1) / (_square(after) + _FLOOR * bound * bound) if counted else _F(0)
        solve_in_place(factor, step, sample, solved)
        measured_part, predicted_part = _F(0), _F(0)
        for rollout in range(rollouts):
            measured_part += (unexplained[rollout] + predicted[rollout]) * solved[rollout]
            predicted_part += predicted[rollout] * solved[rollout]
        totals[sample, _MEASURED] += share * measured_part
        totals[sample, _PREDICTED] += share * predicted_part
        if counted:
            totals[sample, _NUMBER] += _F(1)
            totals[sample, _GAIN] += gain
        solve_in_place(factor, step, sample, unexplained)
        solve_in_place(factor, step, sample, remaining)
        result, rest = adjoint[step, sample], residual[step, sample]
        for unit in range(units):
            result[unit] = gain * prior[unit]
            rest[unit] = _F(0)
        for rollout in range(rollouts):
            row = (step * batch + sample) * rollouts + rollout
            for unit in range(units):
                result[unit] += remaining[rollout] * activity[row, unit]
                rest[unit] += unexplained[rollout] * activity[row, unit]
        for unit in range(units):
            rest[unit] *= share * slope[step, sample, unit]
        weight[step, sample] = share
        for rollout in range(rollouts):
            later = sigma * signed_sum(words, step, sample, rollout, adjoint)
            target[rollout] = discount * (target[rollout] - later)
        if baseline:
            _centre(target, finite, sample)
        for rollout in range(rollouts):
            returns[sample, rollout] = target[rollout]
        size = np.sqrt(_square(result))
        # As torch.maximum: NaN wins.
        if not size <= bound:
            largest[sample] = size


def descend(
    block: Block, matrix: Tensor, carry: Carry, seed: Tensor, how: How, written: Written
) -> tuple[Tensor, Tensor]:
    """Go through a block of steps, last first, in the dual form with Rademacher noise; see the reference."""
    steps, batch, rollouts, units = block.activity.shape
    words = packed_signs(seed, (steps, batch, rollouts, units), how.counters)
    returns, largest = carry.returns.contiguous(), carry.largest.contiguous()
    totals = block.slope.new_zeros((batch, len(written.totals)))
    fed_back = block.slope.new_empty((batch, units))
    arrays = [
        tensor.contiguous().numpy() for tensor in (block.delta_loss, rows_of(block.activity), block.factor, block.slope)
    ]
    arrays += [block.gradient.contiguous().numpy(), fed_back.numpy(), words]
    sigma, discount, finite = _F(how.sigma), _F(how.discount), how.finite.contiguous().numpy()
    results = [
        tensor.numpy() for tensor in (returns, largest, written.adjoint, written.residual, written.weight, totals)
    ]
    for step in range(steps - 1, -1, -1):
        torch.mm(written.adjoint[step + 1], matrix, out=fed_back)
        _step(step, *arrays, sigma, finite, discount, how.baseline, *results)
    written.totals.add_(totals.sum(0))
    return returns, largest
