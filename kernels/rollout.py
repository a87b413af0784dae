"""Perturbed rollouts in deviation form: the difference to the clean run is carried, no two runs are subtracted.

    delta_a_t = W_hh delta_h_{t-1} + xi_t
    delta_h_t = phi(a_t + delta_a_t) - phi(a_t)         exact for any sigma, computed without cancellation

`cell.py` holds the second equation of each cell, `loss.py` the loss differences of each step. Source: the update rule
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
    """(T, B, P, H) where it was asked for; its rows may be padded."""
    delta_h: Tensor
    """(B, P, H), the deviation of the state after the last step."""
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
        preact: clean pre-activations a, (T, B, H).
        hidden: clean hidden states h = phi(a), (T, B, H).
        weight_hh: recurrent matrix, (H, H).
        loss: what `delta_loss` measures; None where only the state is wanted.
        seed: 0-dim int64 tensor, the noise's key.
        options: number of rollouts P, standard deviation and kind of the noise, cell, operand precision, and
            whether delta_a is stored.
        counters: global indices of the block's first step, rollout and sample.
        delta_h0: deviation of the state before the first step, (B, P, H); None is zero.

    Returns:
        `Rollout`; loss differences carry the weight the step has in the reported loss.
    """
    time, batch, units = preact.shape
    rollouts, working = options.rollouts, preact.dtype
    product = RecurrentProduct(weight_hh, batch * rollouts, precision=options.precision, sigma=options.sigma)
    deviation = options.cell.torch(preact, hidden)
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
