"""Perturbed rollouts in deviation form: the difference to the clean run is carried, no two runs are subtracted.

    delta_a_t = W_hh delta_h_{t-1} + xi_t
    delta_h_t = phi(a_t + delta_a_t) - phi(a_t)         exact for any sigma, computed without cancellation

In gated cells noise enters the state instead, behind the cell: S numbers are handed on, and the first H of them, h_t,
are perturbed. `cell.py` and `cell_gated.py` hold what a step does in each cell, `loss.py` the loss differences of each
step. Source: the update rule
these rollouts serve is activity-based node perturbation (Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967); the
deviation form is derived here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .cell import TANH, CellForms
from .loss import Loss, Measure
from .noise import Counters, NoiseSteps, padded
from .product import RecurrentProduct
from .scratch import spare_room

NOISE_BYTES = 1 << 17
"""Noise that is generated before its step."""


class Rollout(NamedTuple):
    """The results of a block of rollouts."""

    delta_loss: Tensor | None
    """(T, B, P), float32 or float64; None without a loss."""
    delta_a: Tensor | None
    """(T, B, P, H) where it was asked for; its rows may be padded. Of a gated cell the deviation of the states,
    (T, B, P, S)."""
    delta_h: Tensor
    """(B, P, S), the deviation of the state after the last step; S = H but in an LSTM."""
    delta_o: Tensor | None
    """(T, B, P, O) with `OutputsOnly`."""


class RolloutOptions(NamedTuple):
    """The scalars of a block of rollouts."""

    rollouts: int
    sigma: float
    noise: str = "rademacher"
    cell: CellForms = TANH
    precision: str = "fp32"
    """Operands of the recurrent product: "bf16", "fp16" (scaled by 1/sigma), "tf32", "fp32"; accumulation is float32.
    "fp64" with float64 tensors."""
    store_delta_a: bool = False


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
    """Run a block of perturbed rollouts through time.

    Args:
        preact: clean pre-activations a, (T, B, H); of a gated cell its clean values, see `cell_gated`.
        hidden: clean hidden states h = phi(a), (T, B, H); of an LSTM h and c, (T, B, 2 H).
        weight_hh: recurrent matrix, (G H, H).
        loss: what `delta_loss` measures; None where only the state is wanted.
        seed: 0-dim int64 tensor, the noise's key.
        options: number of rollouts P, standard deviation and kind of the noise, cell, operand precision, and
            whether delta_a is stored.
        counters: global indices of the block's first step, rollout and sample.
        delta_h0: deviation of the state before the first step, (B, P, S); None is zero.

    Returns:
        `Rollout`; loss differences carry the weight the step has in the reported loss.
    """
    if options.cell.noise_in_state:
        return _of_states(preact, hidden, weight_hh, loss, seed, options, counters, delta_h0)
    time, batch, units = preact.shape
    rollouts, working = options.rollouts, preact.dtype
    product = RecurrentProduct(weight_hh, batch * rollouts, precision=options.precision, sigma=options.sigma)
    rows = options.cell.rows(preact, hidden)
    deviation = options.cell.torch(preact, rows)
    delta_h = None if delta_h0 is None else delta_h0.to(working)
    scratch = (preact.new_empty((batch, rollouts, units)), preact.new_empty((batch, rollouts, units)))
    # Room for the noise of some steps, which becomes their delta_a; for that of all steps where delta_a is stored.
    ahead = min(time, max(1, NOISE_BYTES // max(1, batch * rollouts * padded(units) * preact.itemsize)))
    room = spare_room(preact, (time if options.store_delta_a else ahead, batch, rollouts, padded(units)))
    places = room[..., :units].unbind(0)
    measure = Measure(loss, preact, rollouts)
    injected = NoiseSteps(
        seed,
        (time, batch, rollouts, units),
        sigma=options.sigma,
        kind=options.noise,
        counters=counters,
        dtype=working,
    )
    for step in range(time):
        place = step if options.store_delta_a else step % ahead
        if step % ahead == 0:
            injected.fill(step, room[place : place + min(ahead, time - step)])
        delta_a = places[place]
        if delta_h is not None:
            product.add_to(delta_a, delta_h)
        delta_h = deviation.step(step, delta_a, delta_h, scratch)
        measure.step(step, delta_h)
    stored = room[..., :units] if options.store_delta_a else None
    # The scratch tensor is the caller's now; nothing else refers to it.
    final = preact.new_zeros((batch, rollouts, units)) if delta_h is None else delta_h
    return Rollout(measure.delta_loss, stored, final, measure.delta_o)


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
    rollouts, working = options.rollouts, preact.dtype
    rows, units = weight_hh.shape
    size = units * options.cell.states
    product = RecurrentProduct(weight_hh, batch * rollouts, precision=options.precision, sigma=options.sigma)
    deviation = options.cell.around(preact, hidden)
    state = None if delta_h0 is None else delta_h0.to(working)
    ahead = min(time, max(1, NOISE_BYTES // max(1, batch * rollouts * padded(units) * preact.itemsize)))
    room = preact.new_empty((ahead, batch, rollouts, padded(units)))
    stored = spare_room(preact, (time if options.store_delta_a else 2, batch, rollouts, size))
    gates = preact.new_empty((batch, rollouts, rows))
    measure = Measure(loss, preact[..., :units], rollouts)
    width = units if loss is None or loss.grad is None else loss.grad.shape[-1]
    injected = NoiseSteps(
        seed,
        (time, batch, rollouts, units),
        sigma=options.sigma,
        kind=options.noise,
        counters=counters,
        dtype=working,
    )
    for step in range(time):
        if step % ahead == 0:
            injected.fill(step, room[: min(ahead, time - step)])
        if state is None:
            gates.zero_()
        else:
            product.add_to(gates, state[..., :units], keep=0.0)
        # The state before stays whole while a step is computed.
        place = stored[step % len(stored)]
        state = deviation.step(step, gates, state, (place, gates))
        state[..., :units] += room[step % ahead, ..., :units]
        measure.step(step, state[..., :width])
    final = preact.new_zeros((batch, rollouts, size)) if state is None else state.clone()
    return Rollout(measure.delta_loss, stored if options.store_delta_a else None, final, measure.delta_o)
