"""Loss differences in Triton, as device functions: what a deviation of the outputs does to the loss of its step.

Contract and equations: `loss.py`. `LOSSES` says what each loss reads of a step and which device functions compute it;
kernels take those functions as constexprs and never ask which loss it is.

Where a program holds all outputs of its rollouts, one function does all of it (`LossForm.of_tile`), with the arguments

    delta_o         deviation of the outputs, or delta_h where there is no readout, (rows, o); SCALED: divided by scale
    loss            `LossRows`
    result_ptr      loss differences (time, batch, rollouts), or delta_o (time, batch, rollouts, outputs)
    step, place     number of the step, `Place` of the program
    outputs         number of outputs; FULL: all columns of delta_o are outputs
    scale           standard deviation of the noise
    SAMPLES         samples of the tile

Elsewhere outputs come in tiles: `LossForm.add` adds a tile to running sums, `LossForm.finish` makes the difference of
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .loss import PLAIN_FORM_ABOVE, Loss, check_loss
from .place_triton import Rows, Scalars, load_rows, load_scalars, rows_of, scalars_of

SERIES_UP_TO = tl.constexpr(PLAIN_FORM_ABOVE)


class LossRows(NamedTuple):
    """What a loss reads of the clean run; absent where it reads nothing."""

    signal: Rows
    """Gradient, error or probabilities, (time, batch, outputs)."""
    target: Scalars
    """Class indices, (time, batch)."""
    share: Scalars
    """Weight of each step in the reported loss, (time, batch); where it is 0, the step has no loss."""


@triton.jit
def _weighted(difference, share, weight):
    """Return weight times a difference, and exactly 0 where share is 0, because there 0 * NaN would be NaN."""
    return tl.where(share == 0, 0.0, difference * weight)


@triton.jit
def linear_sum(deviation, grad):
    """Return the sum over units of g . delta_h, (rows,); grad broadcasts to the deviation, (rows, units)."""
    return tl.sum(deviation * grad, 1)


@triton.jit
def _first_row(step, place):
    """Return the number of the program's first row at a step in a tensor (time, batch, rollouts)."""
    return place.first_row + tl.cast(step, tl.int64) * place.rows_of_step


@triton.jit
def _linear_of_tile(
    delta_o, loss, result_ptr, step, place, outputs, scale,
    SCALED: tl.constexpr, FULL: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Store and return g . delta_o, (rows,)."""
    first_row = _first_row(step, place)
    grad = load_rows(loss.signal, step, place, outputs, FULL, SAMPLES, delta_o.shape[1])
    difference = linear_sum(delta_o, grad)
    if SCALED:
        difference = difference * scale
    tl.store(result_ptr + first_row + place.local, difference, place.exists)
    return difference


@triton.jit
def _squared_sum(delta_o, error, inside):
    """Return sum_o delta_o (2 e + delta_o), (rows,); error and inside (o < outputs) broadcast to delta_o, (rows, o)."""
    return tl.sum(tl.where(inside, delta_o * (2 * error + delta_o), 0.0), 1)


@triton.jit
def _squared_of_tile(
    delta_o, loss, result_ptr, step, place, outputs, scale,
    SCALED: tl.constexpr, FULL: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Store and return share * mean_o delta_o (2 e + delta_o), (rows,)."""
    first_row = _first_row(step, place)
    if SCALED:
        delta_o = delta_o * scale
    inside = tl.arange(0, delta_o.shape[1])[None, :] < outputs
    error = load_rows(loss.signal, step, place, outputs, FULL, SAMPLES, delta_o.shape[1])
    share = load_scalars(loss.share, step, place, SAMPLES).to(tl.float32)
    difference = _weighted(_squared_sum(delta_o, error, inside), share, share / outputs)
    tl.store(result_ptr + first_row + place.local, difference, place.exists)
    return difference


@triton.jit
def _squared_add(change, top, total, biggest, delta_o, of_target, error, inside, exists):
    """Add a tile of outputs to `change`, (rows,); arguments as in `_cross_entropy_add`."""
    return change + _squared_sum(delta_o, error, inside), top, total, biggest


@triton.jit
def _squared_finish(change, top, total, biggest, share, outputs):
    """Return share * mean_o delta_o (2 e + delta_o) from the sums of `_squared_add`."""
    return _weighted(change, share, share / outputs)


@triton.jit
def _exponential_sums(difference, probs, change, top, total, biggest):
    """Add some outputs to the four running sums of the cross-entropy difference, each (rows,).

    difference: d = delta_o - delta_o[target], (rows, o), zero outside; probs: p, broadcasting to it, zero outside.
    Sums: change = sum p expm1(d); top = max(d, 0); total = sum p exp(d - top); biggest = max |d|.
    """
    # expm1 by its series to degree 8: 1e-8 relative up to 0.5.
    growth = 1 + difference / 8
    for step in tl.static_range(6):
        growth = 1 + difference * growth * (1 / (7 - step))
    change += tl.sum(probs * (difference * growth), 1)
    higher = tl.maximum(top, tl.max(difference, 1))
    total = total * tl.exp(top - higher) + tl.sum(probs * tl.exp(difference - higher[:, None]), 1)
    return change, higher, total, tl.maximum(biggest, tl.max(tl.abs(difference), 1))


@triton.jit
def _cross_entropy_of_tile(
    delta_o, loss, result_ptr, step, place, outputs, scale,
    SCALED: tl.constexpr, FULL: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Store and return share * log sum_o p_o exp(d_o), (rows,)."""
    first_row = _first_row(step, place)
    if SCALED:
        delta_o = delta_o * scale
    output = tl.arange(0, delta_o.shape[1])[None, :]
    inside = output < outputs
    probs = load_rows(loss.signal, step, place, outputs, FULL, SAMPLES, delta_o.shape[1])
    share = load_scalars(loss.share, step, place, SAMPLES).to(tl.float32)
    target = load_scalars(loss.target, step, place, SAMPLES)
    if SAMPLES > 1:
        target = target[:, None]
    of_target = tl.sum(tl.where(output == target, delta_o, 0.0), 1)
    difference = tl.where(inside, delta_o - of_target[:, None], 0.0)
    none = tl.zeros_like(of_target)
    change, top, total, biggest = _exponential_sums(difference, probs, none, none, none, none)
    difference = _cross_entropy_finish(change, top, total, biggest, share, outputs)
    tl.store(result_ptr + first_row + place.local, difference, place.exists)
    return difference


@triton.jit
def _cross_entropy_add(change, top, total, biggest, delta_o, of_target, probs, inside, exists):
    """Add a tile of outputs to the running sums, (rows,) each; of_target: delta_o[target], (rows, 1).

    delta_o: (rows, o). Broadcasting to it: probs, (1, o) or (rows, o); inside, whether an output exists, (1, o);
    exists, whether a row does, (rows, 1).
    """
    difference = tl.where(inside & exists, delta_o - of_target, 0.0)
    return _exponential_sums(difference, probs, change, top, total, biggest)


@triton.jit
def _cross_entropy_finish(change, top, total, biggest, share, outputs):
    """Return share * log sum_o p_o exp(d_o) from the sums of `_exponential_sums`; zero where share is."""
    # log1p(x) = 2 artanh(x / (2 + x)), |x / (2 + x)| < 1/4 here.
    ratio = change / (2 + change)
    square = ratio * ratio
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11)))))
    # A step without a loss may have no probabilities either.
    large = tl.log(tl.where(share == 0, 1.0, total)) + top
    difference = tl.where(biggest <= SERIES_UP_TO, 2 * ratio * series, large)
    return _weighted(difference, share, share)


@triton.jit
def _outputs_of_tile(
    delta_o, loss, result_ptr, step, place, outputs, scale,
    SCALED: tl.constexpr, FULL: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Store delta_o, (rows, o), in a tensor (time, batch, rollouts, outputs), and return 0."""
    first_row = _first_row(step, place)
    if SCALED:
        delta_o = delta_o * scale
    output = tl.arange(0, delta_o.shape[1])[None, :]
    delta_o_ptr = result_ptr + first_row * outputs + (place.local[:, None] * outputs + output)
    tl.store(delta_o_ptr, delta_o, place.exists[:, None] & (output < outputs))
    return 0.0


class LossForm(NamedTuple):
    """How a loss is computed."""

    signal: str
    """Field of the loss that has a row per step; empty where it has none."""
    of_outputs: bool
    """Whether it is a loss of the outputs; otherwise the hidden units' parts of it are added up."""
    measured: bool
    """Whether rollouts compute loss differences."""
    of_tile: Any
    add: Any = None
    finish: Any = None

    @property
    def returned(self) -> bool:
        """Whether rollouts return the deviation of the outputs instead."""
        return self.of_outputs and not self.measured


LOSSES = {
    "linear": LossForm("grad", False, True, _linear_of_tile),
    "squared": LossForm("error", True, True, _squared_of_tile, _squared_add, _squared_finish),
    "cross_entropy": LossForm("probs", True, True, _cross_entropy_of_tile, _cross_entropy_add, _cross_entropy_finish),
    "outputs": LossForm("", True, False, _outputs_of_tile),
}
"""How each kind of loss is computed; "outputs" returns the deviation of the outputs, for the caller to measure."""

NO_LOSS = LossForm("", of_outputs=False, measured=False, of_tile=None)
NO_LOSS_ROWS = LossRows(rows_of(None), scalars_of(None), scalars_of(None))


class LossArguments(NamedTuple):
    """A loss as the launchers take it."""

    form: LossForm
    rows: LossRows
    readout: Tensor | None
    """W_o, (O, H); None where the loss sees the states."""

    def outputs(self, units: int) -> int:
        """Return the number of outputs, which are the hidden units where there is no readout."""
        return units if self.readout is None else self.readout.shape[0]


def loss_arguments(loss: Loss | None) -> LossArguments:
    """Return the loss as the launchers take it.

    Raises:
        TypeError: it is no loss.
        ValueError: there is no form of its kind.
    """
    check_loss(loss)
    if loss is None:
        return LossArguments(NO_LOSS, NO_LOSS_ROWS, None)
    if loss.kind not in LOSSES:
        raise ValueError(f"backend triton has no loss of kind {loss.kind!r}, only {sorted(LOSSES)}")
    form = LOSSES[loss.kind]
    signal = rows_of(getattr(loss, form.signal) if form.signal else None)
    target, share = getattr(loss, "target", None), getattr(loss, "weight", None)
    return LossArguments(form, LossRows(signal, scalars_of(target), scalars_of(share)), loss.readout)
