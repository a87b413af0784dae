"""The rollout on the CPU: torch's product, and everything else of a step in one compiled pass over its rollouts."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from .cell_gated_numba import GRU_BRANCH, LSTM_BRANCH, clean_values, gru_row, lstm_row
from .cell_numba import RELU_BRANCH, TANH_BRANCH, clean_rows, plain_row, relu_row, tanh_row
from .compile_numba import inlined, kernel
from .loss import Loss, Measure
from .loss_numba import linear_difference
from .noise import Counters, NoiseSteps, padded
from .noise_numba import packed_signs
from .product import RecurrentProduct
from .rollout import Rollout, RolloutOptions
from .scratch import spare_room

SIGNS_BYTES = 1 << 16
"""Packed signs that are generated before their step."""

SMALL_PRODUCT = 5 << 19
"""Multiplications of a step up to which calling torch takes longer than its faster products save."""

ROWS_TOGETHER = 8
"""Rollouts that one thread takes through their steps together."""

COLUMNS = 16
"""Columns of products are padded with zeros to a multiple of this, because masked vectors take longer."""

_NO_ROWS, _NO_WEIGHTS = np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.float32)

_F = np.float32


@inlined
def _add_signs(moved: Any, row: Any, words: Any, place: Any, sigma: Any, units: Any) -> None:
    for number in range((units + 31) // 32):
        word, start = words[place, row, number], 32 * number
        # The end is no constant, so that the loop is vectorised; with a constant end it is unrolled into scalars.
        for i in range(min(32, units - start)):
            moved[row, start + i] += sigma if (word >> np.uint32(i)) & np.uint32(1) else -sigma


@inlined
def _add_row(moved: Any, row: Any, noise: Any, units: Any) -> None:
    for unit in range(units):
        moved[row, unit] += noise[row, unit]


@inlined
def _copy_row(target: Any, place: Any, row: Any, source: Any, start: Any, length: Any) -> None:
    for number in range(length):
        target[place, row, number] = source[row, start + number]


@inlined
def _multiply(moved: Any, delta_h: Any, first: Any, last: Any, weights: Any, units: Any) -> None:
    """Write weights^T delta_h for some rows, two at a time: every weight that is read serves two products."""
    columns = weights.shape[1]
    for row in range(first, last):
        for column in range(columns):
            moved[row, column] = _F(0)
    for pair in range((last - first) // 2):
        row = first + 2 * pair
        for group in range(units // 4):
            k = 4 * group
            a0, a1, a2, a3 = delta_h[row, k], delta_h[row, k + 1], delta_h[row, k + 2], delta_h[row, k + 3]
            b0, b1, b2, b3 = (
                delta_h[row + 1, k],
                delta_h[row + 1, k + 1],
                delta_h[row + 1, k + 2],
                delta_h[row + 1, k + 3],
            )
            for column in range(columns):
                w0, w1, w2, w3 = (
                    weights[k, column],
                    weights[k + 1, column],
                    weights[k + 2, column],
                    weights[k + 3, column],
                )
                moved[row, column] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                moved[row + 1, column] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
        for k in range(units // 4 * 4, units):
            a0, b0 = delta_h[row, k], delta_h[row + 1, k]
            for column in range(columns):
                moved[row, column] += a0 * weights[k, column]
                moved[row + 1, column] += b0 * weights[k, column]
    if (last - first) % 2:
        row = last - 1
        for k in range(units):
            a0 = delta_h[row, k]
            for column in range(columns):
                moved[row, column] += a0 * weights[k, column]


@kernel
def _steps(
    branch: Any,
    start: Any,
    stop: Any,
    rollouts: Any,
    weights: Any,
    started: Any,
    moved: Any,
    delta_h: Any,
    words: Any,
    words_start: Any,
    noise: Any,
    sigma: Any,
    first: Any,
    second: Any,
    preact: Any,
    stored: Any,
    outputs: Any,
    grad: Any,
    delta_loss: Any,
) -> None:
    """Take all rollouts through some steps. An array of length 0 means that there is none.

    Args:
        branch: which cell.
        start: the first step.
        stop: the step after the last.
        rollouts: P.
        weights: W_hh^T, then, where there are outputs, W_o^T, (H, H + O or more); none where `moved` is computed
            already.
        started: whether the state before step 0 has a deviation.
        moved: W_hh delta_h of the step before, then W_o delta_h, (B P, H + O or more); delta_a is written over it.
        delta_h: (B P, H), of the step before, then of the last.
        words: packed signs of some steps, (L, B P, words).
        words_start: the first of these steps.
        noise: noise that is not packed, (B P, padded).
        sigma: standard deviation of the noise in packed signs.
        first: the first of the cell's `clean_rows`, (T, B, H).
        second: the second.
        preact: a, (T, B, H).
        stored: written, delta_a, (T, B P, padded).
        outputs: written, delta_o of the step before each of these, (L, B P, O); step t is at t modulo L.
        grad: gradient of a linear loss, (T, B, H).
        delta_loss: written, its differences, (T, B P).
    """
    rows, units = delta_h.shape
    for block in numba.prange((rows + ROWS_TOGETHER - 1) // ROWS_TOGETHER):
        top = block * ROWS_TOGETHER
        end = min(top + ROWS_TOGETHER, rows)
        for step in range(start, stop):
            if weights.shape[0] and (step or started):
                _multiply(moved, delta_h, top, end, weights, units)
            for row in range(top, end):
                sample = row // rollouts
                if words.shape[0]:
                    _add_signs(moved, row, words, step - words_start, sigma, units)
                else:
                    _add_row(moved, row, noise, units)
                # Through a function of their own in `cell_numba`, the same rows take a twentieth longer.
                if branch == TANH_BRANCH:
                    if tanh_row(moved, row, delta_h, first, second, step, sample, units):
                        plain_row(moved, row, delta_h, preact, step, sample, units)
                elif branch == RELU_BRANCH:
                    relu_row(moved, row, delta_h, first, second, step, sample, units)
                if stored.shape[0]:
                    _copy_row(stored, step, row, moved, 0, units)
                if outputs.shape[0] and step:
                    _copy_row(outputs, (step - 1) % outputs.shape[0], row, moved, units, outputs.shape[2])
                if grad.shape[0]:
                    delta_loss[step, row] = linear_difference(delta_h, row, grad, step, sample, units)


def rollout(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    *,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Run a block of perturbed rollouts through time; see the reference."""
    if options.cell.noise_in_state:
        return _of_states(preact, hidden, weight_hh, loss, seed, options, counters, delta_h0)
    time, batch, units = preact.shape
    rollouts, rows = options.rollouts, batch * options.rollouts
    measure = Measure(loss, preact, rollouts)
    linear, readout = (None, None) if loss is None else (loss.grad, loss.readout)
    outputs = 0 if readout is None else len(readout)
    # Where operands are not rounded, one product serves delta_o of a step and delta_a of the next.
    exact = options.precision == "fp32"
    # Small products are computed here, many steps in one call. Torch multiplies faster, but takes a call for each.
    small = exact and rows * units * (units + outputs) <= SMALL_PRODUCT and options.noise == "rademacher"
    resident = small and (loss is None or linear is not None or readout is not None)
    worth_a_copy = resident or 4 * units <= time * rows
    joined = readout if worth_a_copy and exact else None
    weight = _with_columns(weight_hh, joined) if worth_a_copy else weight_hh
    product = RecurrentProduct(weight, rows, precision=options.precision, sigma=options.sigma)
    weights = weight.t().contiguous().numpy() if resident else _NO_WEIGHTS
    moved = preact.new_zeros((rows, len(weight)))
    delta_h = preact.new_zeros((batch, rollouts, units))
    if delta_h0 is not None:
        delta_h.copy_(delta_h0)
    room = spare_room(preact, (time if options.store_delta_a else 0, batch, rollouts, padded(units)))
    draw = _Noise(seed, preact, options, counters)
    started = delta_h0 is not None
    branch, clean = clean_rows(options.cell, preact, hidden)
    activity = room.view(len(room), rows, padded(units)).numpy()
    fixed = (*(tensor.contiguous().numpy() for tensor in (*clean, preact)), activity)
    collected = _NO_ROWS if joined is None else measure.waiting.view(measure.length, rows, outputs).numpy()
    grad, delta_loss = _NO_ROWS, _NO_WEIGHTS
    if linear is not None and measure.delta_loss is not None:
        grad, delta_loss = linear.contiguous().numpy(), measure.delta_loss.view(time, rows).numpy()
    states = moved.numpy(), delta_h.view(rows, units).numpy()
    stop = 0
    while stop < time:
        start, stop = stop, stop + 1
        if resident:
            stop = min(time, start + draw.length)
            if joined is not None:
                # Up to the step that completes the block of outputs: each step reads out the step before it.
                stop = min(stop, max(1, -(-start // measure.length) * measure.length + 1))
        elif start or started:
            product.add_to(moved, delta_h, keep=0.0)
        _steps(
            branch,
            start,
            stop,
            rollouts,
            weights,
            started,
            *states,
            *draw.of(start, stop),
            *fixed,
            collected,
            grad,
            delta_loss,
        )
        if joined is not None and stop > 1:
            measure.taken(stop - 2)
        if linear is None and (joined is None or stop == time):
            measure.step(stop - 1, delta_h)
    stored = room[..., :units] if options.store_delta_a else None
    return Rollout(measure.delta_loss, stored, delta_h, measure.delta_o)


@kernel
def _state_step(
    branch: Any,
    step: Any,
    rollouts: Any,
    moved: Any,
    state: Any,
    words: Any,
    words_start: Any,
    noise: Any,
    sigma: Any,
    scratch: Any,
    clean: Any,
    stored: Any,
    grad: Any,
    delta_loss: Any,
) -> None:
    """Take all rollouts of a gated cell through a step. An array of length 0 means that there is none.

    Args:
        branch: which cell.
        step: the step.
        rollouts: P.
        moved: W_hh delta_h of the step before, (B P, G H), overwritten.
        state: (B P, S), of the step before, then of this one.
        words: packed signs of some steps, (L, B P, words).
        words_start: the first of these steps.
        noise: noise that is not packed, (B P, padded).
        sigma: standard deviation of the noise in packed signs.
        scratch: a row for each thread's block of rollouts, (blocks, G H).
        clean: the cell's `clean_values`, (T, B, n H).
        stored: written, the deviations of the states, (T, B P, S).
        grad: gradient of a linear loss, (T, B, H) or (T, B, S).
        delta_loss: written, its differences, (T, B P).
    """
    rows, size = state.shape
    units = moved.shape[1] // (3 if branch == GRU_BRANCH else 4)
    for block in numba.prange(scratch.shape[0]):
        top = block * ROWS_TOGETHER
        for row in range(top, min(top + ROWS_TOGETHER, rows)):
            sample = row // rollouts
            if branch == GRU_BRANCH:
                gru_row(moved, row, state, scratch, block, clean[step, sample], units)
            elif branch == LSTM_BRANCH:
                lstm_row(moved, row, state, scratch, block, clean[step, sample], units)
            if words.shape[0]:
                _add_signs(state, row, words, step - words_start, sigma, units)
            else:
                _add_row(state, row, noise, units)
            if stored.shape[0]:
                _copy_row(stored, step, row, state, 0, size)
            if grad.shape[0]:
                delta_loss[step, row] = linear_difference(state, row, grad, step, sample, grad.shape[2])


def _of_states(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
) -> Rollout:
    """Run a block of rollouts of a gated cell, whose noise enters the state; arguments as in `rollout`."""
    time, batch, _ = preact.shape
    (columns, units), rollouts = weight_hh.shape, options.rollouts
    rows, size = batch * rollouts, units * options.cell.states
    product = RecurrentProduct(weight_hh, rows, precision=options.precision, sigma=options.sigma)
    branch, clean = clean_values(options.cell, preact, hidden)
    measure = Measure(loss, preact[..., :units], rollouts)
    linear = None if loss is None else loss.grad
    moved = preact.new_zeros((rows, columns))
    state = preact.new_zeros((batch, rollouts, size))
    if delta_h0 is not None:
        state.copy_(delta_h0)
    room = spare_room(preact, (time if options.store_delta_a else 0, batch, rollouts, size))
    draw = _Noise(seed, preact[..., :units], options, counters)
    grad, delta_loss = _NO_ROWS, _NO_WEIGHTS
    if linear is not None and measure.delta_loss is not None:
        grad, delta_loss = linear.contiguous().numpy(), measure.delta_loss.view(time, rows).numpy()
    scratch = preact.new_empty((-(-rows // ROWS_TOGETHER), columns))
    for step in range(time):
        if step or delta_h0 is not None:
            product.add_to(moved, state[..., :units], keep=0.0)
        _state_step(
            branch,
            step,
            rollouts,
            moved.numpy(),
            state.view(rows, size).numpy(),
            *draw.of(step, step + 1),
            scratch.numpy(),
            clean.numpy(),
            room.view(len(room), rows, size).numpy(),
            grad,
            delta_loss,
        )
        if linear is None:
            measure.step(step, state[..., :units])
    return Rollout(measure.delta_loss, room if options.store_delta_a else None, state, measure.delta_o)


def _with_columns(weight_hh: Tensor, readout: Tensor | None) -> Tensor:
    """Return the rows of W_hh, of W_o where there is one, and zeros, (H + O or more, H)."""
    units = len(weight_hh)
    rows = units + (0 if readout is None else len(readout))
    if readout is None and rows % COLUMNS == 0:
        return weight_hh
    weight = weight_hh.new_zeros((COLUMNS * -(-rows // COLUMNS), units))
    weight[:units] = weight_hh
    if readout is not None:
        weight[units:rows] = readout
    return weight


class _Noise:
    """The noise of consecutive steps in the form that `_steps` takes."""

    def __init__(self, seed: Tensor, preact: Tensor, options: RolloutOptions, counters: Counters) -> None:
        time, batch, units = preact.shape
        self.shape, self.seed, self.counters = (time, batch, options.rollouts, units), seed, counters
        self.sigma = _F(options.sigma)
        self.first, self.words, self.noise = 0, np.empty((0, 0, 0), np.uint32), _NO_WEIGHTS
        step_bytes = batch * options.rollouts * padded(units) // 8
        self.length = max(1, SIGNS_BYTES // max(1, step_bytes))
        self.drawn: NoiseSteps | None = None
        if options.noise != "rademacher":
            sigma, kind = options.sigma, options.noise
            self.drawn = NoiseSteps(seed, self.shape, sigma=sigma, kind=kind, counters=counters, dtype=preact.dtype)
            self.room = preact.new_empty((1, batch, options.rollouts, padded(units)))
            self.noise = self.room.view(batch * options.rollouts, padded(units)).numpy()

    def of(self, start: int, stop: int) -> tuple[Any, int, Any, Any]:
        """Return packed signs, the first of their steps, noise that is not packed, and sigma, for some steps."""
        if self.drawn is not None:
            self.drawn.fill(start, self.room)
        elif not self.first <= start < stop <= self.first + len(self.words):
            time, batch, rollouts, units = self.shape
            shape = (min(self.length, time - start), batch, rollouts, units)
            words = packed_signs(self.seed, shape, self.counters._replace(time=self.counters.time + start))
            self.first, self.words = start, words.reshape(len(words), batch * rollouts, words.shape[-1])
        return self.words, self.first, self.noise, self.sigma
