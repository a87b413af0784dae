"""From loss differences to the adjoint: discounted returns, then a sum over rollouts.

    c_t   = delta_loss_t + discount c_{t+1}                     (0: the published rule, 1: full reward-to-go)
    by noise      lam_t = mean_p c_t xi_t / sigma^2                   node perturbation
    by activity   lam_t = mean_p c_t H delta_a_t / ||delta_a_t||^2    activity-based, norm over the H units

lam_t estimates dL/da_t. Source: Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967 (discount 0); Dalm, van Gerven,
Ahmad 2023, arXiv:2310.00965; the discounted return is derived in the README.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .loss import Loss, loss_of_steps
from .noise import Counters, NoiseSteps, padded
from .rollout import Rollout, RolloutOptions, rollout

STEPS_AT_A_TIME = 8
"""Steps of rollouts whose activity is stored until it is summed, at discount 0."""

BLOCK_BYTES = 1 << 21
"""Activity that is summed at once: few calls, and the sum finds in the cache what the norm has read."""

SAFE_TO_SQUARE = (1e-12, 1e12)
"""Range of sigma in which the square of delta_a stays a normal float32."""


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None) -> Tensor:
    """Return the credit c_t = delta_loss_t + discount c_{t+1}, (T, B, P).

    Args:
        delta_loss: loss difference of each step, (T, B, P).
        discount: gamma in [0, 1].
        carry: the return of the step after the last one, (B, P); None is zero.
    """
    credit = delta_loss.clone()
    following = carry
    for step in range(len(credit) - 1, -1, -1):
        if following is not None and discount:
            credit[step].add_(following, alpha=discount)
        following = credit[step]
    return credit


def by_activity(weight_by: str) -> bool:
    """Say whether returns weight activity differences (True) or the noise (False).

    Raises:
        ValueError: `weight_by` is neither "activity" nor "noise".
    """
    if weight_by not in {"noise", "activity"}:
        raise ValueError(f"weight_by must be 'noise' or 'activity', got {weight_by!r}")
    return weight_by == "activity"


def weighted_activity(weight_by: str, delta_a: Tensor | None) -> Tensor | None:
    """Return the activity differences that returns weight; None where they weight the noise.

    Raises:
        ValueError: `weight_by` is neither "activity" nor "noise", or there is no activity to weight.
    """
    if not by_activity(weight_by):
        return None
    if delta_a is None:
        raise ValueError("weight_by='activity' needs delta_a, got None")
    return delta_a


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
    """Sum over a block of rollouts the estimates of dL/da that each makes.

    Args:
        credit: returns c, (T, B, P). A rollout whose credit is exactly zero at a step adds nothing there, even where
            its delta_a is not finite.
        delta_a: activity differences, (T, B, P, H), read where they are weighted; the noise is generated again.
        seed: 0-dim int64 tensor, the noise's key.
        weight_by: what the return of a rollout weights: its "noise" or its "activity".
        units: H.
        options: as in the rollout.
        counters: as in the rollout.

    Returns:
        (2, T, B, H): the sums over the rollouts of even and of odd global number, in the dtype of `credit`. Their sum
        over P is the estimate; their angle tells its variance.

    Raises:
        ValueError: `weight_by` is neither, or there is no activity to weight.
    """
    time, batch, rollouts = credit.shape
    sums = credit.new_empty((2, time, batch, units))
    even = (torch.arange(rollouts, device=credit.device) + counters.rollout) % 2 == 0
    halves = torch.stack((even, ~even))
    stored, shape = weighted_activity(weight_by, delta_a), (time, batch, rollouts, units)
    length = max(1, min(time, BLOCK_BYTES // max(1, batch * rollouts * padded(units) * credit.itemsize)))
    if stored is None:
        injected = NoiseSteps(seed, shape, sigma=1.0, kind=options.noise, counters=counters, dtype=credit.dtype)
        room = credit.new_empty((length, batch, rollouts, padded(units)))
    for start in range(0, time, length):
        steps = slice(start, min(start + length, time))
        if stored is None:
            signal = injected.fill(start, room[: steps.stop - start])
            share = credit[steps] / options.sigma
        else:
            share, signal = _activity_share(credit[steps], stored[steps].to(credit.dtype), options.sigma)
        sums[:, steps] = (torch.where(halves, share.unsqueeze(2), 0) @ signal).permute(2, 0, 1, 3)
    return sums


def of_h(delta_a: Tensor | None, units: int) -> Tensor | None:
    """Return the part of stored deviations, (T, B, P, S), that an adjoint is of, (T, B, P, H); in an LSTM that of h."""
    return None if delta_a is None else delta_a[..., :units]


def finite_rollouts(delta_loss: Tensor, delta_h: Tensor) -> Tensor:
    """Return which rollouts, (B, P), have finite loss differences, (T, B, P), and a finite last delta_h, (B, P, H)."""
    return torch.isfinite(delta_h).all(-1) & torch.isfinite(delta_loss).all(0)


def run_finite(run: Callable[..., Rollout], *arguments: object, options: RolloutOptions, **named: object) -> Tensor:
    """Return `finite_rollouts` of rollouts that a backend's `rollout` runs for nothing else."""
    moved = run(*arguments, options=options._replace(store_delta_a=False), **named)
    assert moved.delta_loss is not None  # noqa: S101  (for the type checker; the loss is ours)
    return finite_rollouts(moved.delta_loss, moved.delta_h)


def rollout_adjoint(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss,
    seed: Tensor,
    *,
    weight_by: str,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run rollouts and sum their adjoint at discount 0, where each step's credit is known at once.

    Nothing of size (T, B, P, H) is stored: what a rollout that overflows has added before cannot be taken out again, so
    rollouts run twice where that matters. Arguments as in `rollout` and `adjoint`; `finite` are the rollouts that
    count, (B, P) bool, or None: those that `finite_rollouts` finds in these steps.

    Returns:
        The sums of `adjoint`, (2, T, B, H), to which rollouts that do not count add nothing at any step; delta_loss,
        (T, B, P); the last delta_h, (B, P, S).
    """
    (time, batch, _), units = preact.shape, weight_hh.shape[1]
    sums = preact.new_empty((2, time, batch, units))
    delta_loss = preact.new_empty((time, batch, options.rollouts))
    storing = options._replace(store_delta_a=by_activity(weight_by))
    delta_h = delta_h0
    if finite is None:
        finite = run_finite(
            rollout, preact, hidden, weight_hh, loss, seed, options=options, counters=counters, delta_h0=delta_h0
        )
    for start in range(0, time, STEPS_AT_A_TIME):
        steps = slice(start, min(start + STEPS_AT_A_TIME, time))
        first = counters._replace(time=counters.time + start)
        block = rollout(
            preact[steps],
            hidden[steps],
            weight_hh,
            loss_of_steps(loss, steps),
            seed,
            options=storing,
            counters=first,
            delta_h0=delta_h,
        )
        assert block.delta_loss is not None  # noqa: S101  (for the type checker; the loss is ours)
        delta_h, delta_loss[steps] = block.delta_h, block.delta_loss
        credit = torch.where(finite, block.delta_loss, 0)
        sums[:, steps] = adjoint(
            credit, of_h(block.delta_a, units), seed, weight_by=weight_by, units=units, options=options, counters=first
        )
    assert delta_h is not None  # noqa: S101  (for the type checker; time is at least 1)
    return sums, delta_loss, delta_h


def _activity_share(credit: Tensor, delta_a: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Return c H / ||delta_a||^2, (..., P), and delta_a with rows that are not finite set to zero."""
    if not SAFE_TO_SQUARE[0] < sigma < SAFE_TO_SQUARE[1]:
        share, scaled = _activity_share(credit, delta_a / sigma, 1.0)
        return share / sigma, scaled
    squared = torch.linalg.vector_norm(delta_a, dim=-1).square_()
    usable = torch.isfinite(squared) & (squared > 0) & (credit != 0)
    share = torch.where(usable, credit * delta_a.shape[-1] / squared, 0)
    if delta_a.is_cuda or not bool(torch.isfinite(squared).all()):
        delta_a = torch.where(torch.isfinite(squared).unsqueeze(-1), delta_a, 0)
    return share, delta_a
