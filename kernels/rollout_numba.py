"""The rollout on the CPU: torch's product, and everything else of a step in one compiled pass over its rollouts.

For tanh the pass evaluates, x = delta_a with its noise, s = 1 - h^2,

    tanh x = n / d,  n = x (105 + 10 x^2),  d = 105 + x^2 (45 + x^2)    Lambert's continued fraction, four terms of it
    delta_h = n / (d / s + n h / s)                                     the quotient form with one division

whose relative error, x^8 / 99225, is below float32's rounding up to |x| = 0.5; beyond, the plain difference is taken as
in the reference, with tanh from the same fraction of x / 16 and four doublings.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from .noise import Counters, NoiseSteps, padded
from .noise_numba import packed_signs
from .rollout import (
    PLAIN_DIFFERENCE_ABOVE,
    LinearLoss,
    Loss,
    Measure,
    RecurrentProduct,
    Rollout,
    RolloutOptions,
    quotient_rows,
    spare_room,
)
from .threads_numba import inlined, kernel, summing

SIGNS_BYTES = 1 << 16
"""Packed signs that wait for their step."""

COLUMNS = 16
"""Products get zeros up to a multiple of so many columns: a vector that is masked takes longer than a whole one."""

_NO_ROWS, _NO_LOSS = np.empty((0, 0, 0), np.float32), np.empty((0, 0), np.float32)

_F = np.float32
_BOUND = _F(PLAIN_DIFFERENCE_ABOVE)
_SATURATED = _F(9.5)


@inlined
def _tanh(x: Any) -> Any:
    """Return tanh in float32, by the fraction of x / 16 and four doublings of n / d."""
    x = _SATURATED if x > _SATURATED else (-_SATURATED if x < -_SATURATED else x)
    x *= _F(1 / 16)
    square = x * x
    n = x * (_F(1) + square * _F(10 / 105))
    d = _F(1) + square * (_F(45 / 105) + square * _F(1 / 105))
    for _ in range(4):
        n, d = _F(2) * n * d, n * n + d * d
    return n / d


@inlined
def _add_signs(moved: Any, row: Any, words: Any, place: Any, sigma: Any, units: Any) -> None:
    for number in range((units + 31) // 32):
        word, start = words[place, row, number], 32 * number
        # With an end that is no constant the loop becomes one of vectors; with one it is unrolled into scalars.
        for i in range(min(32, units - start)):
            moved[row, start + i] += sigma if (word >> np.uint32(i)) & np.uint32(1) else -sigma


@inlined
def _add_row(moved: Any, row: Any, noise: Any, units: Any) -> None:
    for unit in range(units):
        moved[row, unit] += noise[row, unit]


@summing
def _tanh_row(moved: Any, row: Any, delta_h: Any, inverse: Any, ratio: Any, step: Any, sample: Any, units: Any) -> Any:
    """Write delta_h by the quotient; return how many units it does not hold for."""
    large = _F(0)
    for unit in range(units):
        x = moved[row, unit]
        square = x * x
        n = x * (_F(105) + _F(10) * square)
        d = _F(105) + square * (_F(45) + square)
        delta_h[row, unit] = n / (d * inverse[step, sample, unit] + n * ratio[step, sample, unit])
        # A NaN is not small either.
        large += _F(0) if abs(x) <= _BOUND else _F(1)
    return large


@inlined
def _plain_row(moved: Any, row: Any, delta_h: Any, preact: Any, step: Any, sample: Any, units: Any) -> None:
    """Write the plain difference where the quotient does not hold."""
    for unit in range(units):
        x, a = moved[row, unit], preact[step, sample, unit]
        plain = _tanh(a + x) - _tanh(a)
        delta_h[row, unit] = delta_h[row, unit] if abs(x) <= _BOUND else plain


@inlined
def _relu_row(moved: Any, row: Any, delta_h: Any, below: Any, above: Any, step: Any, sample: Any, units: Any) -> None:
    for unit in range(units):
        raised, least = moved[row, unit] + below[step, sample, unit], above[step, sample, unit]
        # Written so that a NaN stays one.
        delta_h[row, unit] = least if raised < least else raised


@inlined
def _copy_row(target: Any, place: Any, row: Any, source: Any, start: Any, length: Any) -> None:
    for number in range(length):
        target[place, row, number] = source[row, start + number]


@summing
def _product(delta_h: Any, row: Any, grad: Any, step: Any, sample: Any, units: Any) -> Any:
    total = _F(0)
    for unit in range(units):
        total += delta_h[row, unit] * grad[step, sample, unit]
    return total


@kernel
def _step(
    tanh: Any,
    step: Any,
    rollouts: Any,
    moved: Any,
    delta_h: Any,
    words: Any,
    place: Any,
    noise: Any,
    sigma: Any,
    first: Any,
    second: Any,
    preact: Any,
    kept: Any,
    outputs: Any,
    outputs_place: Any,
    grad: Any,
    delta_loss: Any,
) -> None:
    """Take all rollouts through what a step has besides its product. An array of length 0 is not there.

    Args:
        tanh: whether it is tanh, or else relu.
        step: the step.
        rollouts: P.
        moved: W_hh delta_h of the step before, then, where there are outputs, W_o delta_h; (B P, H + O). Gets delta_a.
        delta_h: (B P, H), written.
        words: packed signs of some steps, (L, B P, words).
        place: the step's place among them.
        noise: noise that is not packed, (B P, padded).
        sigma: of the packed signs.
        first: 1 / s, or min(a, 0) for relu, (T, B, H).
        second: h / s, or -max(a, 0).
        preact: a.
        kept: gets delta_a, (T, B P, padded).
        outputs: gets delta_o of the step before, (L, B P, O).
        outputs_place: where among them; negative for nowhere.
        grad: a linear loss's, (T, B, H).
        delta_loss: its differences, (T, B P), written.
    """
    rows, units = delta_h.shape
    for row in numba.prange(rows):
        sample = row // rollouts
        if words.shape[0]:
            _add_signs(moved, row, words, place, sigma, units)
        else:
            _add_row(moved, row, noise, units)
        if tanh:
            if _tanh_row(moved, row, delta_h, first, second, step, sample, units):
                _plain_row(moved, row, delta_h, preact, step, sample, units)
        else:
            _relu_row(moved, row, delta_h, first, second, step, sample, units)
        if kept.shape[0]:
            _copy_row(kept, step, row, moved, 0, units)
        if outputs_place >= 0:
            _copy_row(outputs, outputs_place, row, moved, units, outputs.shape[2])
        if grad.shape[0]:
            delta_loss[step, row] = _product(delta_h, row, grad, step, sample, units)


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
    time, batch, units = preact.shape
    rollouts, rows = options.rollouts, batch * options.rollouts
    # Where operands are not rounded, one product serves delta_o of a step and delta_a of the next.
    readout = None if loss is None or isinstance(loss, LinearLoss) else loss.readout
    worth_a_copy = 4 * units <= time * rows
    joined = readout if worth_a_copy and options.precision == "fp32" else None
    weight = _with_columns(weight_hh, joined) if worth_a_copy else weight_hh
    product = RecurrentProduct(weight, options, rows)
    moved = preact.new_zeros((rows, len(weight)))
    delta_h = preact.new_zeros((batch, rollouts, units))
    if delta_h0 is not None:
        delta_h.copy_(delta_h0)
    room = spare_room(preact, (time if options.store_delta_a else 0, batch, rollouts, padded(units)))
    measure, draw = Measure(loss, preact, rollouts), _Noise(seed, preact, options, counters)
    tanh = options.nonlinearity == "tanh"
    clean = quotient_rows(preact, hidden) if tanh else (preact.clamp(max=0), -hidden)
    fixed = (*(one.contiguous().numpy() for one in (*clean, preact)), room.view(len(room), rows, padded(units)).numpy())
    waiting = _NO_ROWS if joined is None else measure.waiting.view(measure.length, rows, len(joined)).numpy()
    grad, delta_loss = _NO_ROWS, _NO_LOSS
    if isinstance(loss, LinearLoss) and measure.delta_loss is not None:
        grad, delta_loss = loss.grad.contiguous().numpy(), measure.delta_loss.view(time, rows).numpy()
    states = moved.numpy(), delta_h.view(rows, units).numpy()
    for step in range(time):
        if step or delta_h0 is not None:
            product.add_to(moved, delta_h, keep=0.0)
        read = joined is not None and step > 0
        outputs = waiting, (step - 1) % measure.length if read else -1
        _step(tanh, step, rollouts, *states, *draw.of(step), *fixed, *outputs, grad, delta_loss)
        if read:
            measure.taken(step - 1)
        if not isinstance(loss, LinearLoss) and (joined is None or step + 1 == time):
            measure.step(step, delta_h)
    kept = room[..., :units] if options.store_delta_a else None
    return Rollout(measure.delta_loss, kept, delta_h, measure.delta_o)


def _with_columns(weight_hh: Tensor, readout: Tensor | None) -> Tensor:
    """Return the rows of W_hh, W_o where it is given, and zeros, (H + O or more, H)."""
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
    """The noise of consecutive steps as `_step` takes it."""

    def __init__(self, seed: Tensor, preact: Tensor, options: RolloutOptions, counters: Counters) -> None:
        time, batch, units = preact.shape
        self.shape, self.seed, self.counters = (time, batch, options.rollouts, units), seed, counters
        self.sigma = _F(options.sigma)
        self.words, self.noise = np.empty((0, 0, 0), np.uint32), np.empty((0, 0), np.float32)
        step_bytes = batch * options.rollouts * padded(units) // 8
        self.length = max(1, SIGNS_BYTES // max(1, step_bytes))
        self.drawn: NoiseSteps | None = None
        if options.noise != "rademacher":
            sigma, kind = options.sigma, options.noise
            self.drawn = NoiseSteps(seed, self.shape, sigma=sigma, kind=kind, counters=counters, dtype=preact.dtype)
            self.room = preact.new_empty((1, batch, options.rollouts, padded(units)))
            self.noise = self.room.view(batch * options.rollouts, padded(units)).numpy()

    def of(self, step: int) -> tuple[Any, int, Any, Any]:
        """Return words, the step's place among them, noise and sigma."""
        if self.drawn is not None:
            self.drawn.fill(step, self.room)
        elif step % self.length == 0:
            time, batch, rollouts, units = self.shape
            here = (min(self.length, time - step), batch, rollouts, units)
            words = packed_signs(self.seed, here, self.counters._replace(time=self.counters.time + step))
            self.words = words.reshape(len(words), batch * rollouts, words.shape[-1])
        return self.words, step % self.length, self.noise, self.sigma
