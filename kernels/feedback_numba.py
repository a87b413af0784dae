"""The recursion of learned feedback on the CPU: torch multiplies by B, a compiled loop does the rest of a step.

The noise that a step subtracts from the return stays packed signs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import feedback as reference
from .compile_numba import inlined, kernel, rows_of, summing
from .feedback import WEIGHT_FLOOR, Block, Carry, How, Written
from .feedback_matrix import GAIN, MEASURED, NUMBER, PREDICTED
from .least_squares_numba import signed_sum, solve_in_place
from .noise_numba import noise, packed_signs

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


@summing
def _dot(first: Any, second: Any) -> Any:
    total = _F(0)
    for place in range(len(first)):
        total += first[place] * second[place]
    return total


@inlined
def _gain(target: Any, effect: Any) -> Any:
    """Return <target, effect> / |effect|^2 within [0, 1]; NaN stays."""
    power = _dot(effect, effect)
    gain = _dot(target, effect) / power if power > 0 else _F(0)
    return _F(0) if gain < 0 else _F(1) if gain > 1 else gain


@inlined
def _prior(slope: Any, gradient: Any, fed_back: Any, step: Any, sample: Any, known: Any, prior: Any) -> None:
    for unit in range(len(known)):
        known[unit] = slope[step, sample, unit] * fed_back[sample, unit]
        prior[unit] = known[unit] + slope[step, sample, unit] * gradient[step, sample, unit]


@inlined
def _combine(activity: Any, first: Any, weights: Any, result: Any, others: Any, rest: Any) -> None:
    """Add the rows of activity from `first` on, times weights and times other weights, to two results."""
    for rollout in range(len(weights)):
        for unit in range(len(result)):
            result[unit] += weights[rollout] * activity[first + rollout, unit]
            rest[unit] += others[rollout] * activity[first + rollout, unit]


@kernel
def _step(
    step: Any,
    delta_loss: Any,
    activity: Any,
    upper: Any,
    slope: Any,
    gradient: Any,
    fed_back: Any,
    words: Any,
    divisor: Any,
    sigma: Any,
    finite: Any,
    discount: Any,
    baseline: Any,
    returns: Any,
    largest: Any,
    adjoint: Any,
    recurrent: Any,
    residual: Any,
    weight: Any,
    totals: Any,
) -> None:
    batch, rollouts = returns.shape
    units = slope.shape[2]
    for sample in numba.prange(batch):
        known, prior = np.empty(units, np.float32), np.empty(units, np.float32)
        target, effect = np.empty(rollouts, np.float32), np.empty(rollouts, np.float32)
        predicted, solved = np.empty(rollouts, np.float32), np.empty(rollouts, np.float32)
        first = (step * batch + sample) * rollouts
        _prior(slope, gradient, fed_back, step, sample, known, prior)
        for rollout in range(rollouts):
            effect[rollout], predicted[rollout] = _two_products(activity, first + rollout, prior, known)
            target[rollout] = (delta_loss[step, sample, rollout] + returns[sample, rollout]) / divisor[step, sample]
        if baseline:
            _centre(target, finite, sample)
        gain = _gain(target, effect)
        # What the prior mean leaves of the return, with its gain and whole.
        remaining, unexplained = target - gain * effect, target - effect
        bound, counted = largest[sample], _F(largest[sample] > 0)
        after = _dot(recurrent[step + 1, sample], recurrent[step + 1, sample])
        share = counted / (after + _FLOOR * bound * bound)
        share = share if counted else _F(0)
        solved[:] = predicted
        solve_in_place(upper[step, sample], solved)
        totals[sample, _MEASURED] += share * (_dot(unexplained, solved) + _dot(predicted, solved))
        totals[sample, _PREDICTED] += share * _dot(predicted, solved)
        totals[sample, _NUMBER] += counted
        totals[sample, _GAIN] += counted * gain
        solve_in_place(upper[step, sample], unexplained)
        solve_in_place(upper[step, sample], remaining)
        result, rest = adjoint[step, sample], residual[step, sample]
        result[:] = gain * prior
        rest[:] = _F(0)
        _combine(activity, first, remaining, result, unexplained, rest)
        for unit in range(units):
            rest[unit] *= share * slope[step, sample, unit]
        weight[step, sample] = share
        for rollout in range(rollouts):
            later = sigma * signed_sum(words, step, sample, rollout, adjoint)
            target[rollout] = target[rollout] * divisor[step, sample] - later
        returns[sample] = discount * target
        # What a gated cell makes of the adjoint, and its size, is not worked out here.
        if recurrent.shape[2] == units:
            for unit in range(units):
                known[unit] = slope[step, sample, unit] * gradient[step, sample, unit]
            size = np.sqrt(max(_dot(result, result), _dot(known, known)))
            # As torch.maximum: NaN wins.
            largest[sample] = bound if size <= bound else size


def descend(
    block: Block, matrix: Tensor, carry: Carry, seed: Tensor, how: How, written: Written
) -> tuple[Tensor, Tensor]:
    """Go through a block of steps, last first, in the dual form; see the reference, which Gaussian noise is left to."""
    if how.kind != "rademacher":
        return reference.descend(block, matrix, carry, seed, how, written, draw=noise)
    steps, batch, rollouts, units = block.activity.shape
    known, recurrent = block.known, written.recurrent
    words = packed_signs(seed, (steps, batch, rollouts, units), how.counters)
    returns, largest = carry.returns.contiguous(), carry.largest.contiguous()
    totals = recurrent.new_zeros((batch, len(written.totals)))
    fed_back = recurrent.new_empty((batch, units))
    delta_loss, gradient = block.delta_loss.contiguous(), known.gradient.contiguous()
    arrays = [
        tensor.contiguous().numpy() for tensor in (delta_loss, rows_of(block.activity), block.factor.mT, known.slope)
    ]
    arrays += [gradient.numpy(), fed_back.numpy(), words, how.unit.contiguous().numpy()]
    sigma, discount, finite = _F(how.sigma), _F(how.discount), how.finite.contiguous().numpy()
    results = [
        tensor.numpy()
        for tensor in (returns, largest, written.adjoint, recurrent, written.residual, written.weight, totals)
    ]
    for step in range(steps - 1, -1, -1):
        torch.mm(recurrent[step + 1], matrix, out=fed_back)
        if known.recurrence is None:
            _step(step, *arrays, sigma, finite, discount, how.baseline, *results)
            continue
        # The slope of a gated cell is 1: what is known besides B is one gradient, and what goes past h no return of it.
        own, around = known.own(step, carry.handed), known.around(step, carry.handed)
        gradient[step] = own
        if around is not None:
            delta_loss[step] -= around
        _step(step, *arrays, sigma, finite, discount, how.baseline, *results)
        if around is not None:
            returns.add_(around, alpha=how.discount)
        recurrent[step], size = known.hand_on_(step, written.adjoint[step], own, carry.handed)
        torch.maximum(largest, size, out=largest)
    written.totals.add_(totals.sum(0))
    return returns, largest
