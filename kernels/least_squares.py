"""The recursion of least squares: from returns and factored Gram matrices to estimates and deflated returns.

    lam_t   = argmin_lam sum_p (c_tp - lam . delta_a_tp)^2 + r |lam|^2      solved with a factor made beforehand
    c_{t-1} = delta_loss_{t-1} + discount (c_t - Xi_t lam_t)

Source: derived in `anpgpu.least_squares`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import Counters, noise


class Deflation(NamedTuple):
    """What a block of steps is deflated with."""

    finite: Tensor
    """Rollouts that count, (B, P) bool."""
    discount: float
    """gamma in [0, 1]."""
    baseline: bool
    """Whether the mean return of the rollouts that count is taken off first."""
    sigma: float
    """Standard deviation of the noise, in the units of the activity differences."""
    kind: str
    """Of the noise: "rademacher" or "gaussian"."""
    counters: Counters
    """Of the block's first step."""


def deflate(
    delta_loss: Tensor,
    activity: Tensor,
    factor: Tensor,
    carry: Tensor,
    seed: Tensor,
    how: Deflation,
    *,
    estimate: Tensor,
    credit: Tensor,
    draw: Callable[..., Tensor] = noise,
) -> Tensor:
    """Go through a block of steps, last first; return the carry for the step before it, (B, P).

    Args:
        delta_loss: loss differences, (L, B, P).
        activity: activity differences, (L, B, P, H).
        factor: lower Cholesky factors of their Gram matrices with the ridge, in the smaller form.
        carry: deflated return of the step after the last, (B, P).
        seed: 0-dim int64 tensor, the noise's key.
        how: the rest.
        estimate: written, (L, B, H), contiguous.
        credit: written, the returns that were regressed, (L, B, P), contiguous.
        draw: what makes the noise.
    """
    shape = tuple(activity.shape)
    later = draw(seed, shape, sigma=how.sigma, kind=how.kind, counters=how.counters, dtype=activity.dtype)
    for step in range(len(delta_loss) - 1, -1, -1):
        target = torch.add(delta_loss[step], carry, out=credit[step])
        if how.baseline:
            counted = how.finite.sum(-1, keepdim=True)
            target -= torch.where(how.finite, target, 0).sum(-1, keepdim=True) / counted
        target = target.unsqueeze(-1)
        if dual(activity):
            found = activity[step].mT @ solve(factor[step], target)
        else:
            found = solve(factor[step], activity[step].mT @ target)
        estimate[step] = found.squeeze(-1)
        carry = (target - later[step] @ found).squeeze(-1).mul_(how.discount)
    return carry


def solve(factor: Tensor, target: Tensor) -> Tensor:
    """Solve L L^T x = target, (..., n, 1); torch.cholesky_solve would copy the factor first."""
    halfway = torch.linalg.solve_triangular(factor, target, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, halfway, upper=True)
    return solution


def dual(activity: Tensor) -> bool:
    """Say whether activity differences, (..., P, H), are regressed in the dual form, P x P."""
    return activity.shape[-2] <= activity.shape[-1]
