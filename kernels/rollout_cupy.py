"""Perturbed rollouts in plain CUDA C: one thread per element, the oracle of the fast kernels.

The contract is `rollout.rollout`; its module holds the equations. Everything is computed in the dtype of `preact`,
float32 or float64, and `RolloutOptions.precision` is ignored: with float64 tensors this is the exact result that
results of rounded operands are compared with. Sums run in the order of their index.
"""

from __future__ import annotations

from torch import Tensor

from .cell_cupy import deviation
from .loss import Loss, check_loss
from .loss_cupy import loss_difference, output_deviation
from .noise import Counters
from .noise_cupy import THREAD_SOURCE, launch, noise as make_noise
from .rollout import Rollout, RolloutOptions

ROLLOUT_SOURCE = (
    THREAD_SOURCE
    + r"""
/* delta_a += W_hh delta_h, one thread per (b, p, unit). */
extern "C" __global__ void add_recurrent(
    REAL *delta_a,         /* (batch, rollouts, hidden), holds the noise */
    const REAL *delta_h,   /* (batch, rollouts, hidden), of the step before */
    const REAL *weight_hh, /* (hidden, hidden) */
    long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long unit = i % hidden, row = i / hidden;
    REAL sum = 0;
    for (long long k = 0; k < hidden; ++k)
        sum += weight_hh[unit * hidden + k] * delta_h[row * hidden + k];
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

    `hidden` is not read: tanh(a) is computed again.
    """
    check_loss(loss)
    cell: str = options.cell.on("cupy")
    time, batch, units = preact.shape
    working, state = preact.dtype, (batch, options.rollouts, units)
    preact, weight_hh = preact.contiguous(), weight_hh.to(working).contiguous()
    delta_h = None if delta_h0 is None else delta_h0.to(working).contiguous()
    stored = preact.new_empty((time, *state)) if options.store_delta_a else None
    delta_loss = delta_o = None
    if loss is not None and loss.measured:
        delta_loss = preact.new_empty((time, *state[:2]))
    elif loss is not None:
        outputs = units if loss.readout is None else loss.readout.shape[0]
        delta_o = preact.new_empty((time, *state[:2], outputs))
    for step in range(time):
        at_step = counters._replace(time=counters.time + step)
        (delta_a,) = make_noise(
            seed, (1, *state), sigma=options.sigma, kind=options.noise, counters=at_step, dtype=working
        )
        if delta_h is not None:
            arguments = (delta_a, delta_h, weight_hh, units)
            launch(ROLLOUT_SOURCE, "add_recurrent", working, delta_a.numel(), arguments)
        delta_h = deviation(cell, preact[step], delta_a)
        if stored is not None:
            stored[step] = delta_a
        if loss is not None and delta_o is not None:
            delta_o[step] = output_deviation(loss.readout, delta_h)
        if loss is not None and delta_loss is not None:
            delta_loss[step] = loss_difference(loss, step, delta_h)
    return Rollout(delta_loss, stored, preact.new_zeros(state) if delta_h is None else delta_h, delta_o)
