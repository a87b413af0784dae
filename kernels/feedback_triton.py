"""The recursion in time of learned feedback in Triton: one launch for all steps of a block, a program a sample.

Contract and equations: `feedback.py`, without gates and in the dual form. With X the noise in units of sigma, a program
goes back through time and takes each step in two passes over tiles of units, between which it holds only numbers of
rollouts:

    first    f = phi' (lam_{t+1} B),  m = phi' g + f,  D m,  D f
    between  target, gain, and three products with G^-1
    second   lam_t = gain m + D^T G^-1 (target - gain D m),  w res_t = w phi' D^T G^-1 (target - D m),  X lam_t

B is read from cache at every step: what a program can read in the time of the launches that it saves bounds H
(`tiles_least_squares.py`). Gram matrices are inverted by `inverse_triton.py`. Nothing makes the host wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import feedback as reference, inverse_triton
from .feedback import WEIGHT_FLOOR, Block, Carry, How, Known, Written
from .feedback_matrix import Sums
from .gram_triton import injected_in, signs_of
from .noise import Counters
from .noise_triton import noise
from .rollout import RolloutOptions
from .rollout_fused_triton import as_bytes
from .tiles_least_squares import feedback_launch, feedback_obstacle, row_width

FLOOR = tl.constexpr(WEIGHT_FLOOR)


class Regressed(NamedTuple):
    """What is regressed, and on what."""

    loss_ptr: Any
    """(time, batch, rollouts), contiguous, float32."""
    activity_ptr: Any
    """D, (time, batch, rollouts, units), contiguous, float32."""
    unit_ptr: Any
    """What D is in units of, (time, batch)."""
    finite_ptr: Any
    """(batch, rollouts) int8, 0 for rollouts that do not count."""
    inverse_ptr: Any
    """G^-1, (time, batch, rollouts, width)."""
    width: int
    rollouts: int


class Prior(NamedTuple):
    """What the prior mean is made of."""

    slope_ptr: Any
    """phi', (time, batch, units)."""
    gradient_ptr: Any
    """g, (time, batch, units)."""
    matrix_ptr: Any
    """B, (units, units)."""
    room_ptr: Any
    """Written, (batch, units): f of a step."""


class Ends(NamedTuple):
    """What a block receives or hands on."""

    returns_ptr: Any
    """(batch, rollouts)."""
    largest_ptr: Any
    """(batch,)."""


class Results(NamedTuple):
    """What the recursion writes."""

    adjoint_ptr: Any
    """(time + 1, batch, units); that of the step after the last is given."""
    residual_ptr: Any
    """(time, batch, units)."""
    weight_ptr: Any
    """(time, batch)."""
    totals_ptr: Any
    """(batch, 4), in the order of `feedback_matrix.MEASURED` to `GAIN`."""


@triton.jit
def _times_matrix(matrix_ptr, vector_ptr, unit, units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Return some units of a vector times a matrix, (units, units)."""
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for first in tl.range(0, units, ROWS, num_stages=1):
        row = first + tl.arange(0, ROWS)
        inside = (row < units)[:, None] & (unit < units)[None, :]
        tile = tl.load(matrix_ptr + row[:, None] * units + unit[None, :], inside, 0.0)
        total += tl.load(vector_ptr + row, row < units, 0.0)[:, None] * tile
    return tl.sum(total, 0)


@triton.jit
def _activity(regressed, system, unit, present, units):
    """Return a tile of D of a step and sample."""
    row = system * regressed.rollouts + tl.arange(0, present.shape[0])
    inside = present[:, None] & (unit < units)[None, :]
    return tl.load(regressed.activity_ptr + row[:, None] * units + unit[None, :], inside, 0.0)


@triton.jit
def _look(regressed, prior, system, after_ptr, room, present, units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Write f of a step; return D m, D f, and |phi' g|^2."""
    effect = tl.zeros(present.shape, tl.float32)
    predicted = tl.zeros(present.shape, tl.float32)
    blind = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, units, UNITS, num_stages=1):
        unit = first + tl.arange(0, UNITS)
        place, inside = system * units + unit, unit < units
        slope = tl.load(prior.slope_ptr + place, inside, 0.0)
        own = slope * tl.load(prior.gradient_ptr + place, inside, 0.0)
        fed_back = slope * _times_matrix(prior.matrix_ptr, after_ptr, unit, units, ROWS, UNITS)
        tl.store(room + unit, fed_back, inside)
        moved = _activity(regressed, system, unit, present, units)
        effect += tl.sum(moved * (own + fed_back)[None, :], 1)
        predicted += tl.sum(moved * fed_back[None, :], 1)
        blind += tl.sum(own * own, 0)
    return effect, predicted, blind


@triton.jit
def _return(regressed, system, size, returns, counted, BASELINE: tl.constexpr):
    """Return what is regressed at a step, in the units of its activity; 0 where a rollout does not count."""
    rollout = tl.arange(0, counted.shape[0])
    loss = tl.load(regressed.loss_ptr + system * regressed.rollouts + rollout, counted, 0.0)
    target = tl.where(counted, (loss + returns) / size, 0.0)
    if BASELINE:
        count = tl.maximum(tl.sum(counted.to(tl.float32), 0), 1.0)
        target = tl.where(counted, target - tl.sum(target, 0) / count, 0.0)
    return target


@triton.jit
def _gain(target, effect):
    """Return <target, effect> / |effect|^2 within [0, 1]; NaN stays."""
    power = tl.sum(effect * effect, 0)
    some = power > 0.0
    gain = tl.where(some, tl.sum(target * effect, 0) / tl.where(some, power, 1.0), 0.0)
    return tl.where(gain < 0.0, 0.0, tl.where(gain > 1.0, 1.0, gain))


@triton.jit
def _inverse(regressed, system, BLOCK: tl.constexpr):
    """Return G^-1 of a step and sample."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    rows = regressed.inverse_ptr + (system * regressed.rollouts + row) * regressed.width
    return tl.load(rows + column, (row < regressed.rollouts) & (column < regressed.width), 0.0)


@triton.jit
def _write(
    results, regressed, prior, injected, system, room, gain, weight, remaining, unexplained, units, UNITS: tl.constexpr
):
    """Write lam and w res of a step; return |lam|^2 and X lam."""
    rollout = tl.arange(0, remaining.shape[0])
    present, row = rollout < regressed.rollouts, system * regressed.rollouts + rollout
    power = tl.full((), 0.0, tl.float32)
    later = tl.zeros(remaining.shape, tl.float32)
    for first in tl.range(0, units, UNITS, num_stages=1):
        unit = first + tl.arange(0, UNITS)
        place, inside = system * units + unit, unit < units
        slope = tl.load(prior.slope_ptr + place, inside, 0.0)
        mean = slope * tl.load(prior.gradient_ptr + place, inside, 0.0) + tl.load(room + unit, inside, 0.0)
        moved = _activity(regressed, system, unit, present, units)
        adjoint = gain * mean + tl.sum(moved * remaining[:, None], 0)
        tl.store(results.adjoint_ptr + place, adjoint, inside)
        tl.store(results.residual_ptr + place, weight * slope * tl.sum(moved * unexplained[:, None], 0), inside)
        power += tl.sum(adjoint * adjoint, 0)
        if injected.words_ptr is not None:
            noise = signs_of(injected.words_ptr + row * (tl.cdiv(units, 128) * 4), present, first, UNITS)
        else:
            values = injected.values_ptr + row[:, None] * units + unit[None, :]
            noise = tl.load(values, present[:, None] & inside[None, :], 0.0)
        later += tl.sum(noise * adjoint[None, :], 1)
    return power, later


@triton.jit(do_not_specialize=["time", "batch", "discount", "sigma"])
def feedback_kernel(
    results,  # Results
    handed,  # Ends: for the step before the first
    prior,  # Prior
    regressed,  # Regressed
    injected,  # Injected
    start,  # Ends: of the step after the last
    time,
    batch,
    units,
    discount,
    sigma,
    BASELINE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Go back through time: a program owns a sample.

    An adjoint and f pass through memory between the threads of a program: hence the barriers.
    """
    sample = tl.program_id(0).to(tl.int64)
    rollout = tl.arange(0, BLOCK)
    row, present = sample * regressed.rollouts + rollout, rollout < regressed.rollouts
    counted = tl.load(regressed.finite_ptr + row, present, 0) != 0
    returns = tl.load(start.returns_ptr + row, counted, 0.0)
    largest = tl.load(start.largest_ptr + sample)
    room = prior.room_ptr + sample * units
    system = tl.cast(time, tl.int64) * batch + sample
    # |lam|^2 of the step after.
    power = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, units, UNITS, num_stages=1):
        unit = first + tl.arange(0, UNITS)
        after = tl.load(results.adjoint_ptr + system * units + unit, unit < units, 0.0)
        power += tl.sum(after * after, 0)
    measured = tl.full((), 0.0, tl.float32)
    expected = tl.full((), 0.0, tl.float32)
    number = tl.full((), 0.0, tl.float32)
    gains = tl.full((), 0.0, tl.float32)
    for _ in tl.range(0, time, num_stages=1):
        after_ptr = results.adjoint_ptr + system * units
        system -= batch
        tl.debug_barrier()
        effect, predicted, blind = _look(regressed, prior, system, after_ptr, room, present, units, ROWS, UNITS)
        size = tl.load(regressed.unit_ptr + system)
        target = _return(regressed, system, size, returns, counted, BASELINE)
        gain = _gain(target, effect)
        inverse = _inverse(regressed, system, BLOCK)
        remaining = tl.sum(inverse * (target - gain * effect)[:, None], 0)
        unexplained = tl.sum(inverse * (target - effect)[:, None], 0)
        solved = tl.sum(inverse * predicted[:, None], 0)
        reached = largest > 0.0
        weight = tl.where(reached, 1.0 / tl.where(reached, power + FLOOR * largest * largest, 1.0), 0.0)
        tl.store(results.weight_ptr + system, weight)
        measured += weight * tl.sum((target - effect + predicted) * solved, 0)
        expected += weight * tl.sum(predicted * solved, 0)
        number += reached.to(tl.float32)
        gains += tl.where(reached, gain, 0.0)
        tl.debug_barrier()
        power, later = _write(
            results, regressed, prior, injected, system, room, gain, weight, remaining, unexplained, units, UNITS
        )
        returns = tl.where(counted, discount * (target * size - sigma * later), 0.0)
        reach = tl.sqrt(tl.where(blind <= power, power, blind))
        # NaN wins.
        largest = tl.where(reach <= largest, largest, reach)
    tl.store(handed.returns_ptr + row, returns, present)
    tl.store(handed.largest_ptr + sample, largest)
    totals = results.totals_ptr + sample * 4
    tl.store(totals, measured)
    tl.store(totals + 1, expected)
    tl.store(totals + 2, number)
    tl.store(totals + 3, gains)


def feedback(
    delta_loss: Tensor,
    delta_a: Tensor,
    known: Known,
    matrix: Tensor,
    carry: Carry,
    seed: Tensor,
    sums: Sums | None,
    *,
    finite: Tensor,
    discount: float,
    ridge: float,
    baseline: bool,
    options: RolloutOptions,
    counters: Counters,
    first: tuple[int, int],
) -> tuple[Tensor, Carry, Tensor]:
    """Estimate the adjoint of a segment of steps from all rollouts of its samples, and add to the sums.

    See the reference, which runs with the kernels for its inverses and its recursion, or, where
    `tiles_least_squares.feedback_obstacle` names a reason, on torch's batched operations.
    """
    rollouts, units = delta_a.shape[2:]
    obstacle = feedback_obstacle(rollouts, units, gated=known.recurrence is not None)
    served = delta_loss.numel() > 0 and not obstacle
    return reference.feedback(
        delta_loss,
        delta_a,
        known,
        matrix,
        carry,
        seed,
        sums,
        finite=finite,
        discount=discount,
        ridge=ridge,
        baseline=baseline,
        options=options,
        counters=counters,
        first=first,
        draw=noise,
        recursion=descend if served else None,
        inverses=inverses if served else None,
    )


def inverses(gram: Tensor, ridge: float, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverses of Gram matrices, (L, B, P, P), with their ridge, and how many had none; see `factored`."""
    steps, batch, rollouts, _ = gram.shape
    result = gram.new_empty((steps * batch, rollouts, row_width(rollouts)))
    with torch.cuda.device_of(gram):
        bad = inverse_triton.inverses(result, gram.contiguous().flatten(0, 1), as_bytes(finite), ridge)
    return result.view(steps, batch, rollouts, -1), bad.sum()


def descend(
    block: Block, matrix: Tensor, carry: Carry, seed: Tensor, how: How, written: Written
) -> tuple[Tensor, Tensor]:
    """Go through a block of steps, last first, in the dual form without gates; see the reference.

    `block.factor` holds what `inverses` returned.
    """
    steps, batch, rollouts, units = block.activity.shape
    launch = feedback_launch(rollouts, units)
    handed = Ends(torch.empty_like(carry.returns), torch.empty_like(carry.largest))
    totals = matrix.new_empty((batch, len(written.totals)))
    known = block.known
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(matrix):
        feedback_kernel[(batch,)](
            Results(written.recurrent, written.residual, written.weight, totals),
            handed,
            Prior(
                known.slope.contiguous(),
                known.gradient.contiguous(),
                matrix.contiguous(),
                matrix.new_empty((batch, units)),
            ),
            Regressed(
                block.delta_loss.contiguous(),
                block.activity.contiguous(),
                how.unit.contiguous(),
                as_bytes(how.finite),
                block.factor,
                block.factor.shape[-1],
                rollouts,
            ),
            injected_in(seed, (steps, batch, rollouts, units), how.kind, how.counters),
            Ends(carry.returns.contiguous(), carry.largest.contiguous()),
            steps,
            batch,
            units,
            float(how.discount),
            float(how.sigma),
            BASELINE=how.baseline,
            BLOCK=launch.block,
            ROWS=launch.rows,
            UNITS=launch.units,
            num_warps=launch.warps,
        )
    written.totals.add_(totals.sum(0))
    return handed.returns_ptr, handed.largest_ptr
