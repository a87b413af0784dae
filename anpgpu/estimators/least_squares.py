"""Least-squares ANP: the adjoint as the regression of returns on activity differences, with deflated returns.

    lam_t = argmin_lam sum_p (c_tp - lam . delta_a_tp)^2 + r |lam|^2,   r = ridge * trace(D_t D_t^T) / P
    c_{t-1} = delta_loss_{t-1} + discount (c_t - Xi_t lam_t)

for each sample, D_t = delta_a_t (P x H) and Xi_t its noise. To first order c_t = lam_t . delta_a_t plus the sum over
s > t of lam_s . xi_s: the return is linear in the activity difference, plus what later noise did, which each step takes
out again. With P >= H and a small ridge this is the gradient that BPTT gives; with fewer rollouts the cosine goes like
sqrt(P / H) and does not fall with the length of the sequence. Source: derived here.

The regression is solved in its dual form, P x P, or its primal form, H x H, whichever is smaller. Gram matrices and
their factors are made for a block of steps at once; only matrix-vector products follow one another in time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.adjoint import SAFE_TO_SQUARE
from anpgpu.kernels.least_squares import Deflation, deflate, dual, solve
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.runtime.dispatch import implementation, special_form
from anpgpu.runtime.ranges import within

RIDGE_FLOOR = 8
"""The ridge is at least so many units of rounding, which keeps a singular system solvable."""

BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Activity that is regressed at once: what a core's cache holds, or enough systems to fill a GPU."""

LEAF = 32
"""Matrices up to this size are factored by LAPACK."""


class LeastSquares(NamedTuple):
    """What a regression finds in a block of steps."""

    adjoint: Tensor
    """(3, T, B, H): the estimate is the sum of three parts, half of what the even rollouts give on their own, half of
    what the odd ones do, both from the same deflated returns, and what only all of them together show."""
    carry: Tensor
    """Deflated return for the step before the first, (B, P)."""
    ridge_grown: Tensor
    """Systems that had no factor with the ridge as given, and got one that outweighs the data; 0-dim int64."""


@within("least_squares")
def least_squares(
    delta_loss: Tensor,
    delta_a: Tensor,
    carry: Tensor,
    seed: Tensor,
    *,
    finite: Tensor,
    discount: float,
    ridge: float,
    baseline: bool,
    options: RolloutOptions,
    backend: str,
    counters: Counters,
) -> LeastSquares:
    """Estimate the adjoint of a block of steps from all rollouts of its samples.

    Args:
        delta_loss: loss differences, (T, B, P); zero where a rollout does not count.
        delta_a: activity differences, (T, B, P, H).
        carry: deflated return of the step after the last, (B, P).
        seed: 0-dim int64 tensor, the noise's key.
        finite: rollouts that count, (B, P) bool.
        discount: gamma in [0, 1].
        ridge: regularisation relative to the mean squared activity difference of a rollout.
        baseline: whether the mean return of the rollouts that count is taken off first.
        options: as in the rollout.
        backend: what makes the noise again.
        counters: as in the rollout.
    """
    time, batch, rollouts, units = delta_a.shape
    draw = implementation("noise", backend)
    compiled = special_form("deflate", backend) if options.noise == "rademacher" else None
    # Everything below is the same for delta_a and sigma times a constant, the result aside.
    scale = 1.0 if SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1] else 1 / options.sigma
    every = not delta_a.is_cuda and bool(finite.all())
    adjoint = delta_loss.new_empty((3, time, batch, units))
    credit = torch.empty_like(delta_loss)
    grown = torch.zeros((), dtype=torch.int64, device=delta_a.device)
    step_bytes = batch * rollouts * units * delta_loss.itemsize
    length = max(1, min(time, BLOCK_BYTES.get(delta_a.device.type, BLOCK_BYTES["cuda"]) // step_bytes))
    for stop in range(time, 0, -length):
        start = max(0, stop - length)
        steps = slice(start, stop)
        activity = delta_a[steps].to(delta_loss.dtype)
        activity = activity if scale == 1.0 else activity * scale
        activity = activity if every else torch.where(finite.unsqueeze(-1), activity, 0)
        gram = _smaller_gram(activity)
        parts = _parts(gram, activity)
        factor, bad = _factored(gram, ridge, finite)
        grown += bad
        together = adjoint[2, steps]
        how = Deflation(
            finite=finite,
            discount=discount,
            baseline=baseline,
            sigma=options.sigma * scale,
            kind=options.noise,
            counters=counters._replace(time=counters.time + start),
        )
        run = compiled if compiled is not None and dual(activity) else functools.partial(deflate, draw=draw)
        carry = run(delta_loss[steps], activity, factor, carry, seed, how, estimate=together, credit=credit[steps])
        for half, gram in enumerate(parts):
            mine = _half(activity[..., half::2, :], gram, credit[steps, :, half::2], ridge, finite[:, half::2])
            adjoint[half, steps] = mine / 2
            together -= adjoint[half, steps]
    return LeastSquares(adjoint.mul_(scale), carry, grown)


def _factored(gram: Tensor, ridge: float, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Add the ridge to Gram matrices, (L, B, n, n), in place; return their Cholesky factors and how many had none.

    `finite` tells which rollouts they were made of, (B, p) bool.
    """
    limits = torch.finfo(gram.dtype)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    mean = trace / finite.sum(1).clamp(min=1)
    diagonal += max(ridge, RIDGE_FLOOR * limits.eps) * mean.unsqueeze(-1) + limits.tiny
    factor, bad = _cholesky(gram)
    if gram.is_cuda or bool(bad.any()):
        # A ridge as large as the trace leaves nothing else of the system. To look whether one is needed would make a
        # CUDA host wait.
        largest = torch.sqrt(trace + limits.tiny).clamp(max=limits.max)[..., None, None]
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = torch.where(bad[..., None, None], torch.where(unit > 0, largest, 0), factor)
    return factor, bad.sum()


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors of matrices, (..., n, n), and which have none, (...) bool.

    On the CPU, LAPACK's own blocks leave most of the work of many small matrices to one element at a time, and torch
    clears the upper triangles as slowly: halving them turns all that into products, in half the time at n = 128.
    """
    size = gram.shape[-1]
    if gram.is_cuda or size <= LEAF:
        factor, info = torch.linalg.cholesky_ex(gram)
        return factor, info != 0
    half = size // 2
    factor = torch.zeros_like(gram)
    upper_left, bad = _cholesky(gram[..., :half, :half])
    below = torch.linalg.solve_triangular(upper_left.mT, gram[..., half:, :half], upper=True, left=False)
    lower_right, worse = _cholesky(gram[..., half:, half:] - below @ below.mT)
    factor[..., :half, :half], factor[..., half:, :half], factor[..., half:, half:] = upper_left, below, lower_right
    return factor, bad | worse


def _parts(gram: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd rollouts' own Gram matrices, each in its smaller form."""
    if dual(activity):
        return gram[..., ::2, ::2].clone(), gram[..., 1::2, 1::2].clone()
    first, second = (_smaller_gram(activity[..., half::2, :]) for half in (0, 1))
    return first, second


def _smaller_gram(activity: Tensor) -> Tensor:
    return activity @ activity.mT if dual(activity) else activity.mT @ activity


def _half(activity: Tensor, gram: Tensor, credit: Tensor, ridge: float, finite: Tensor) -> Tensor:
    """Return the estimate, (L, B, H), of some rollouts, (L, B, p, H), from their deflated returns, (L, B, p)."""
    factor, _ = _factored(gram, ridge, finite)
    target = credit.unsqueeze(-1)
    if dual(activity):
        return (activity.mT @ solve(factor, target)).squeeze(-1)
    return solve(factor, activity.mT @ target).squeeze(-1)
