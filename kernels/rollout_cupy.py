"""Perturbed rollouts in plain CUDA C: one thread per element, the oracle of the fast kernels.

The contract is `rollout.rollout`; its module holds the equations. Everything is computed in the dtype of `preact`,
float32 or float64, and `RolloutOptions.precision` is ignored: with float64 tensors this is the exact result that
results of rounded operands are compared with. Sums run in the order of their index.
"""

from __future__ import annotations

from torch import Tensor

from . import cell_gated_cupy
from .cell_cupy import deviation
from .loss import Loss, check_loss
from .loss_cupy import loss_difference, output_deviation
from .noise import Counters
from .noise_cupy import THREAD_SOURCE, launch, noise as make_noise
from .rollout import Rollout, RolloutOptions

ROLLOUT_SOURCE = (
    THREAD_SOURCE
    + r"""
/* delta_a += W_hh delta_h, one thread per (b, p, row of W_hh). */
extern "C" __global__ void add_recurrent(
    REAL *delta_a,         /* (batch, rollouts, columns), holds the noise, if it enters there */
    const REAL *delta_h,   /* (batch, rollouts, hidden), of the step before */
    const REAL *weight_hh, /* (columns, hidden) */
    long long columns, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long column = i % columns, row = i / columns;
    REAL sum = 0;
    for (long long k = 0; k < hidden; ++k)
        sum += weight_hh[column * hidden + k] * delta_h[row * hidden + k];
    delta_a[i] += sum;
}
"""
)


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
    """Run a block of perturbed rollouts through time; the contract is `rollout.rollout`.

    `hidden` is read for an LSTM's c alone: tanh(a) is computed again.
    """
    check_loss(loss)
    cell: str = options.cell.on("cupy")
    if options.cell.noise_in_state:
        return _of_states(cell, preact, hidden, weight_hh, loss, seed, options, counters, delta_h0)
    time, batch, units = preact.shape
    working, state = preact.dtype, (batch, options.rollouts, units)
    preact, weight_hh = preact.contiguous(), weight_hh.to(working).contiguous()
    delta_h = None if delta_h0 is None else delta_h0.to(working).contiguous()
    stored = preact.new_empty((time, *state)) if options.store_delta_a else None
    measure = _Measure(loss, preact, state)
    for step in range(time):
        at_step = counters._replace(time=counters.time + step)
        (delta_a,) = make_noise(
            seed, (1, *state), sigma=options.sigma, kind=options.noise, counters=at_step, dtype=working
        )
        if delta_h is not None:
            arguments = (delta_a, delta_h, weight_hh, units, units)
            launch(ROLLOUT_SOURCE, "add_recurrent", working, delta_a.numel(), arguments)
        delta_h = deviation(cell, preact[step], delta_a)
        if stored is not None:
            stored[step] = delta_a
        measure.step(step, delta_h)
    final = preact.new_zeros(state) if delta_h is None else delta_h
    return Rollout(measure.delta_loss, stored, final, measure.delta_o)


def _of_states(
    cell: str,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
) -> Rollout:
    """Run a block of rollouts of a gated cell, whose noise enters the state; `cell` is the name of its kernel."""
    (columns, units), working = weight_hh.shape, preact.dtype
    time, batch, _ = preact.shape
    rows = (batch, options.rollouts)
    size = units * options.cell.states
    preact, hidden, weight_hh = preact.contiguous(), hidden.to(working).contiguous(), weight_hh.to(working).contiguous()
    state = preact.new_zeros((*rows, size)) if delta_h0 is None else delta_h0.to(working).contiguous()
    stored = preact.new_empty((time, *rows, size)) if options.store_delta_a else None
    measure = _Measure(loss, preact, (*rows, units))
    for step in range(time):
        at_step = counters._replace(time=counters.time + step)
        (xi,) = make_noise(
            seed, (1, *rows, units), sigma=options.sigma, kind=options.noise, counters=at_step, dtype=working
        )
        moved = preact.new_zeros((*rows, columns))
        arguments = (moved, state[..., :units].contiguous(), weight_hh, columns, units)
        launch(ROLLOUT_SOURCE, "add_recurrent", working, moved.numel(), arguments)
        state = cell_gated_cupy.deviation(cell, preact[step], hidden[step], moved, state)
        state[..., :units] += xi
        if stored is not None:
            stored[step] = state
        measure.step(step, state)
    return Rollout(measure.delta_loss, stored, state, measure.delta_o)


class _Measure:
    """What the states of each step do to the outputs and the loss; `rows` is (B, P, H)."""

    def __init__(self, loss: Loss | None, preact: Tensor, rows: tuple[int, int, int]) -> None:
        time, self.loss, self.units = len(preact), loss, rows[-1]
        self.delta_loss: Tensor | None = None
        self.delta_o: Tensor | None = None
        if loss is not None and loss.measured:
            self.delta_loss = preact.new_empty((time, *rows[:2]))
        elif loss is not None:
            outputs = self.units if loss.readout is None else loss.readout.shape[0]
            self.delta_o = preact.new_empty((time, *rows[:2], outputs))

    def step(self, step: int, state: Tensor) -> None:
        """Take the deviation of a state, (B, P, S)."""
        if self.loss is None:
            return
        # The gradient of a linear loss may have a part for all of the state; other losses see h.
        width = self.units if self.loss.grad is None else self.loss.grad.shape[-1]
        seen = state[..., :width].contiguous()
        if self.delta_o is not None:
            self.delta_o[step] = output_deviation(self.loss.readout, seen)
        if self.delta_loss is not None:
            self.delta_loss[step] = loss_difference(self.loss, step, seen)
