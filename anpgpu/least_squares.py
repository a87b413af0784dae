"""Least-squares ANP: the adjoint as the regression of returns on activity differences, with deflated returns.

    lam_t = argmin_lam sum_p (c_tp - lam . delta_a_tp)^2 + r |lam|^2,   r = ridge * trace(D_t D_t^T) / P
    c_{t-1} = delta_loss_{t-1} + discount (c_t - Xi_t lam_t)

for each sample, D_t = delta_a_t (P x H) and Xi_t its noise. To first order c_t = lam_t . delta_a_t plus the sum over
s > t of lam_s . xi_s: the return is linear in the activity difference, plus what later noise did, which each step takes
out again. With P >= H and a small ridge this is the gradient that BPTT gives; with fewer rollouts the cosine goes like
sqrt(P / H) and does not fall with the length of the sequence. Source: derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.noise import Counters, NoiseSteps, padded
from .kernels.rollout import RolloutOptions

RIDGE_FLOOR = 8
"""The ridge is at least so many units of rounding, which keeps a singular system solvable."""


def least_squares(
    delta_loss: Tensor,
    delta_a: Tensor,
    carry: Tensor,
    seed: Tensor,
    *,
    discount: float,
    ridge: float,
    options: RolloutOptions,
    counters: Counters,
) -> tuple[Tensor, Tensor]:
    """Estimate the adjoint of a block of steps from all rollouts of its samples.

    Args:
        delta_loss: loss differences, (T, B, P); zero where a rollout does not count.
        delta_a: activity differences, (T, B, P, H); zero where a rollout does not count.
        carry: deflated return of the step after the last, (B, P).
        seed: 0-dim int64 tensor, the noise's key.
        discount: gamma in [0, 1].
        ridge: regularisation relative to the mean squared activity difference of a rollout.
        options: as in the rollout.
        counters: as in the rollout.

    Returns:
        The adjoint, (T, B, H), and the carry for the step before the first, (B, P).
    """
    time, batch, rollouts, units = delta_a.shape
    activity = delta_a / options.sigma
    dual = rollouts <= units
    gram = activity @ activity.mT if dual else activity.mT @ activity
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    floor = RIDGE_FLOOR * torch.finfo(gram.dtype).eps
    diagonal += (max(ridge, floor) / rollouts) * diagonal.sum(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(gram)
    injected = NoiseSteps(
        seed,
        (time, batch, rollouts, units),
        sigma=1.0,
        kind=options.noise,
        counters=counters,
        dtype=activity.dtype,
    )
    room = activity.new_empty((batch, rollouts, padded(units)))
    adjoint = activity.new_empty((time, batch, units))
    for step in range(time - 1, -1, -1):
        credit = (delta_loss[step] + carry).unsqueeze(-1)
        if dual:
            estimate = activity[step].mT @ torch.cholesky_solve(credit, factor[step])
        else:
            estimate = torch.cholesky_solve(activity[step].mT @ credit, factor[step])
        adjoint[step] = estimate.squeeze(-1)
        carry = discount * (credit - injected.fill(step, room) @ estimate).squeeze(-1)
    return adjoint / options.sigma, carry
