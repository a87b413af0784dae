"""Returns and the adjoint on the CPU: every activity difference is read once, for its norm and for the sum."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import adjoint as reference
from .adjoint import SAFE_TO_SQUARE, weighted_activity
from .compile_numba import inlined, kernel, rows_of, summing
from .noise import Counters, padded
from .noise_numba import packed_signs
from .rollout import RolloutOptions

SIGNS_BYTES = 1 << 20
"""Packed signs that are generated at once."""

_F = np.float32


@kernel
def _returns(credit: Any, discount: Any) -> None:
    steps, rows = credit.shape
    for block in numba.prange((rows + 255) // 256):
        for step in range(steps - 2, -1, -1):
            for row in range(256 * block, min(256 * block + 256, rows)):
                credit[step, row] += discount * credit[step + 1, row]


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None) -> Tensor:
    """Return the credit c_t = delta_loss_t + discount c_{t+1}, (T, B, P); see the reference."""
    credit = delta_loss.clone(memory_format=torch.contiguous_format)
    if not discount or not credit.numel():
        return credit
    if carry is not None:
        credit[-1].add_(carry, alpha=discount)
    _returns(credit.view(len(credit), -1).numpy(), np.float32(discount))
    return credit


@summing
def _squared_norm(activity: Any, row: Any, units: Any, scale: Any) -> Any:
    total = _F(0)
    for unit in range(units):
        scaled = scale * activity[row, unit]
        total += scaled * scaled
    return total


@inlined
def _add_row(
    sums: Any, half: Any, step: Any, sample: Any, share: Any, activity: Any, row: Any, units: Any, scale: Any
) -> None:
    for unit in range(units):
        sums[half, step, sample, unit] += share * (scale * activity[row, unit])


@inlined
def _add_signs(
    sums: Any, half: Any, step: Any, sample: Any, share: Any, words: Any, place: Any, rollout: Any, units: Any
) -> None:
    for number in range((units + 31) // 32):
        word, start = words[place, sample, rollout, number], 32 * number
        for i in range(min(32, units - start)):
            sums[half, step, sample, start + i] += share if (word >> np.uint32(i)) & np.uint32(1) else -share


@kernel
def _activity(sums: Any, credit: Any, activity: Any, first: Any, scale: Any) -> None:
    """Sum the rollouts of each step and sample: even global numbers, then odd ones, into sums, (2, T, B, H).

    credit: (T, B, P). activity: (T B P, padded). first: global number of the first rollout. scale: factor that brings
    activity into the range that may be squared.
    """
    time, batch, rollouts = credit.shape
    units = sums.shape[3]
    for task in numba.prange(time * batch):
        step, sample = task // batch, task % batch
        sums[0, step, sample], sums[1, step, sample] = _F(0), _F(0)
        for rollout in range(rollouts):
            row = task * rollouts + rollout
            own, squared = credit[step, sample, rollout], _squared_norm(activity, row, units, scale)
            # A NaN is not below infinity.
            if own != _F(0) and squared > _F(0) and squared < _F(np.inf):
                share = own * _F(units) / squared * scale
                _add_row(sums, (first + rollout) % 2, step, sample, share, activity, row, units, scale)


@kernel
def _signs(sums: Any, credit: Any, words: Any, first: Any, start: Any) -> None:
    """As `_activity`, with noise read from packed signs, (L, B, P, words), for the steps from `start` on."""
    length, batch, rollouts, _ = words.shape
    units = sums.shape[3]
    for task in numba.prange(length * batch):
        step, sample = start + task // batch, task % batch
        sums[0, step, sample], sums[1, step, sample] = _F(0), _F(0)
        for rollout in range(rollouts):
            own = credit[step, sample, rollout]
            if own != _F(0):
                _add_signs(sums, (first + rollout) % 2, step, sample, own, words, step - start, rollout, units)


def adjoint(
    credit: Tensor,
    delta_a: Tensor | None,
    seed: Tensor,
    *,
    weight_by: str,
    units: int,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
) -> Tensor:
    """Sum over a block of rollouts the estimates of dL/da that each makes, (2, T, B, H); see the reference."""
    time, batch, rollouts = credit.shape
    stored = weighted_activity(weight_by, delta_a)
    if stored is None and options.noise != "rademacher":
        return reference.adjoint(
            credit, None, seed, weight_by=weight_by, units=units, options=options, counters=counters
        )
    sums = credit.new_empty((2, time, batch, units))
    if stored is None:
        share = (credit / options.sigma).contiguous().numpy()
        length = max(1, SIGNS_BYTES // max(1, batch * rollouts * padded(units) // 8))
        for start in range(0, time, length):
            first = counters._replace(time=counters.time + start)
            words = packed_signs(seed, (min(length, time - start), batch, rollouts, units), first)
            _signs(sums.numpy(), share, words, counters.rollout, start)
        return sums
    scale = 1.0 if SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1] else 1 / options.sigma
    rows = rows_of(stored.to(credit.dtype)).numpy()
    _activity(sums.numpy(), credit.contiguous().numpy(), rows, counters.rollout, _F(scale))
    return sums
