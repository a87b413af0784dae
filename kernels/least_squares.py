"""Least-squares ANP: the adjoint as the regression of returns on activity differences, with deflated returns.

    lam_t   = argmin_lam sum_p (c_tp - lam . delta_a_tp)^2 + r |lam|^2,   r = ridge * trace(D_t D_t^T) / P
    c_{t-1} = delta_loss_{t-1} + discount (c_t - Xi_t lam_t)

for each sample, with D_t = delta_a_t (P x H) and Xi_t its noise. To first order c_t = lam_t . delta_a_t plus the sum
over s > t of lam_s . xi_s: the return is linear in the activity difference, plus the effect of later noise, which each
step subtracts again. With P >= H and a small ridge this is the gradient that BPTT gives; with fewer rollouts the cosine
goes like sqrt(P / H) and does not fall with the length of the sequence. Source: derived here.

The regression is solved in its dual form, P x P, or its primal form, H x H, whichever is smaller. Gram matrices and
their factors are computed for a block of steps at once; only matrix-vector products follow one another in time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .adjoint import SAFE_TO_SQUARE
from .noise import Counters, noise
from .rollout import RolloutOptions

RIDGE_FLOOR = 8
"""The ridge is at least so many units of rounding, so that a singular system can be solved."""

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Activity that is regressed at once: as much as a core's cache holds, or enough systems to fill a GPU."""

SAFE_TRACES = (1e-26, 1e34)
"""Traces of Gram matrices whose entries, factors and solutions stay normal float32 numbers."""

LEAF = 32
"""Matrices up to this size are factored by LAPACK."""

BAND, MOST_BANDS = 32, 8
"""Rows of a band of a Gram matrix on the CPU, and the number of bands from where on they get wider."""


class LeastSquares(NamedTuple):
    """The estimate of a block of steps."""

    adjoint: Tensor
    """(3, T, B, H), whose sum is the estimate: half the estimate of the even rollouts alone, half that of the odd ones,
    both from the same deflated returns, and what is left of the estimate of all. (1, T, B, H) without halves."""
    carry: Tensor
    """Deflated return for the step before the first, (B, P)."""
    ridge_grown: Tensor
    """Systems that had no factor with the ridge that was asked for, and got one that outweighs the data; 0-dim
    int64."""


class Path(NamedTuple):
    """State that a step hands on elementwise beside h: an LSTM's c. Its gradient is known from that of h.

        kappa_t = gain_t lam_t + mu_t        mu_{t-1} = grad_{t-1} + keep_t kappa_t

    with kappa_t = dL/dc_t, and mu_t what of it does not go through h_t.
    """

    gain: Tensor
    """(T, B, H)."""
    keep: Tensor
    """(T, B, H), times the discount."""
    grad: Tensor | None = None
    """dL/dc_t that arrives from outside, (T, B, H); None is zero."""
    deviation: Tensor | None = None
    """delta_c of the rollouts, (T, B, P, H), where they store it."""

    def share(self, step: int, handed: Tensor | None) -> Tensor | None:
        """Return mu_t . delta_c_t, (B, P), from what later steps hand back, (B, H)."""
        if self.deviation is None or handed is None:
            return None
        arriving = handed if self.grad is None else handed + self.grad[step]
        return (self.deviation[step] @ arriving.unsqueeze(-1)).squeeze(-1)

    def hand_back_(self, step: int, adjoint: Tensor, handed: Tensor | None, shares: Tensor | float = 1.0) -> Tensor:
        """Return kappa_t, (..., B, H), from lam_t and what later steps hand back, which is overwritten.

        `shares`: what `grad` is multiplied by.
        """
        assert handed is not None  # noqa: S101  (for the type checker)
        kappa = torch.addcmul(handed, self.gain[step], adjoint)
        if self.grad is not None:
            kappa = kappa + self.grad[step] * shares
        torch.mul(self.keep[step], kappa, out=handed)
        return kappa

    def steps(self, steps: slice) -> Path:
        """Return the path of some steps."""
        return Path(*(None if value is None else value[steps] for value in self))  # type: ignore[arg-type]


class Deflation(NamedTuple):
    """The settings of a block of steps."""

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
    unit: Tensor
    """What the activity differences of each step and sample are given in units of, (L, B); the noise is not."""
    path: Path | None = None
    """Of the block, with its deviation; its part in the returns, mu_t . delta_c_t, is taken out of the regression."""


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
    counters: Counters,
    draw: Callable[..., Tensor],
    recursion: Callable[..., Tensor] | None,
    factors: Callable[..., tuple[Tensor, Tensor]] | None = None,
    halves: bool = True,
    path: Path | None = None,
    handed: Tensor | None = None,
) -> LeastSquares:
    """Estimate the adjoint of a block of steps from all rollouts of its samples.

    Loss differences are in units of a power of two of each sample, which is taken out again at the end: gradients of
    1e30 by noise of 1e-3 would otherwise leave float32's range on the way.

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
        counters: as in the rollout.
        draw: generates the noise again; a backend's `noise`.
        recursion: a backend's own `deflate` for the dual form with Rademacher noise; None where it has none.
        factors: a backend's own `factored`; None where it has none.
        halves: whether the estimates of the even and the odd rollouts alone are wanted, too.
        path: of an LSTM's c, with its deviation. Left in the returns it would bias the regression on delta_h, however
            many rollouts there are.
        handed: what later steps hand back along the path, (B, H), overwritten with what these do.
    """
    time, batch, _, units = delta_a.shape
    # Scaling delta_a and sigma by a constant scales nothing below but the result.
    scale = 1.0 if SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1] else 1 / options.sigma
    loss_unit = power_of_two(torch.maximum(largest_of(delta_loss, 0, 2), largest_of(carry, 1))).unsqueeze(-1)
    delta_loss, carry = delta_loss / loss_unit, carry / loss_unit
    own = recursion if options.noise == "rademacher" and path is None else None
    reached = None if path is None or handed is None else handed / loss_unit
    all_finite = not delta_a.is_cuda and bool(finite.all())
    adjoint = delta_loss.new_empty((3 if halves else 1, time, batch, units))
    credit = torch.empty_like(delta_loss)
    grown = torch.zeros((), dtype=torch.int64, device=delta_a.device)
    length = block_length(delta_a, delta_loss)
    factors = factors or factored
    room = gram_room(delta_a, delta_loss, length)
    for stop in range(time, 0, -length):
        start = max(0, stop - length)
        steps = slice(start, stop)
        activity = counted_activity(delta_a[steps], delta_loss.dtype, scale, None if all_finite else finite)
        activity, gram, unit = in_units(activity, room)
        half_grams = _half_grams(gram, activity) if halves else ()
        factor, bad = factors(gram, ridge, finite)
        grown += bad
        together = adjoint[-1, steps]
        how = Deflation(
            finite=finite,
            discount=discount,
            baseline=baseline,
            sigma=options.sigma * scale,
            kind=options.noise,
            counters=counters._replace(time=counters.time + start),
            unit=unit,
            path=None if path is None else _counted(path.steps(steps), finite, scale, loss_unit),
        )
        plain = functools.partial(deflate, draw=draw, handed=reached)
        run = own if own is not None and dual(activity) else plain
        carry = run(delta_loss[steps], activity, factor, carry, seed, how, estimate=together, credit=credit[steps])
        for half, gram in enumerate(half_grams):
            factor, _ = factors(gram, ridge, finite[:, half::2])
            sides = credit[steps, :, half::2].unsqueeze(-1)
            estimate = back(activity[..., half::2, :], factor, sides).squeeze(-1)
            adjoint[half, steps] = estimate.div_(2 * unit.unsqueeze(-1))
            together -= adjoint[half, steps]
    if handed is not None and reached is not None:
        torch.mul(reached, loss_unit, out=handed)
    # The two factors' product may leave the range of a result that does not.
    adjoint = adjoint if scale == 1.0 else adjoint.mul_(scale)
    return LeastSquares(adjoint.mul_(loss_unit), carry * loss_unit, grown)


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
    handed: Tensor | None = None,
) -> Tensor:
    """Go through a block of steps, last first; return the carry for the step before it, (B, P).

    Args:
        delta_loss: loss differences, (L, B, P).
        activity: activity differences, (L, B, P, H), in units of `how.unit`.
        factor: lower Cholesky factors of their Gram matrices with the ridge, of the dual or the primal form.
        carry: deflated return of the step after the last, (B, P).
        seed: 0-dim int64 tensor, the noise's key.
        how: the settings.
        estimate: written, (L, B, H), contiguous.
        credit: written, the returns that were regressed, (L, B, P), contiguous.
        draw: generates the noise.
        handed: what later steps hand back along `how.path`, (B, H), overwritten.
    """
    shape = tuple(activity.shape)
    later = draw(seed, shape, sigma=how.sigma, kind=how.kind, counters=how.counters, dtype=activity.dtype)
    for step in range(len(delta_loss) - 1, -1, -1):
        target = torch.add(delta_loss[step], carry, out=credit[step])
        if how.baseline:
            counted = how.finite.sum(-1, keepdim=True)
            target -= torch.where(how.finite, target, 0).sum(-1, keepdim=True) / counted
        around = None if how.path is None else how.path.share(step, handed)
        if around is not None:
            target -= around
        target = target.unsqueeze(-1)
        if dual(activity):
            solution = activity[step].mT @ solve(factor[step], target)
        else:
            solution = solve(factor[step], activity[step].mT @ target)
        solution /= how.unit[step, :, None, None]
        estimate[step] = solution.squeeze(-1)
        carry = (target - later[step] @ solution).squeeze(-1)
        if how.path is not None and around is not None:
            carry += around
            how.path.hand_back_(step, estimate[step], handed)
        carry.mul_(how.discount)
    return carry


def _counted(path: Path, finite: Tensor, scale: float, loss_unit: Tensor) -> Path:
    """Return a path for estimates and losses in units, with the deviations of rollouts that do not count set to zero.

    `loss_unit`: of each sample's losses, (B, 1).
    """
    deviation = None if path.deviation is None else path.deviation.to(path.gain.dtype)
    if deviation is not None and (deviation.is_cuda or not bool(finite.all())):
        deviation = torch.where(finite.unsqueeze(-1), deviation, 0)
    return path._replace(
        gain=path.gain if scale == 1.0 else path.gain * scale,
        grad=None if path.grad is None else path.grad / loss_unit,
        deviation=deviation,
    )


def solve(factor: Tensor, target: Tensor) -> Tensor:
    """Solve L L^T x = target, (..., n, 1); torch.cholesky_solve would copy the factor first."""
    halfway = torch.linalg.solve_triangular(factor, target, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, halfway, upper=True)
    return solution


def back(activity: Tensor, factor: Tensor, sides: Tensor) -> Tensor:
    """Return D^T G^-1 y, (..., H, k), of right-hand sides y, (..., P, k); (D^T D + r I)^-1 D^T y in the primal form."""
    return activity.mT @ solve(factor, sides) if dual(activity) else solve(factor, activity.mT @ sides)


def dual(activity: Tensor) -> bool:
    """Say whether activity differences, (..., P, H), are regressed in the dual form, P x P."""
    return activity.shape[-2] <= activity.shape[-1]


def in_units(activity: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return activity differences, (L, B, P, H), in units whose squares fit, Gram matrices, and the units, (L, B).

    The units are powers of two of the size of each step and sample. On the CPU they are 1 where all fits as it is; on
    CUDA asking would make the host wait.
    """
    if not activity.is_cuda:
        gram = smaller_gram(activity, room)
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        if bool(((trace > SAFE_TRACES[0]) & (trace < SAFE_TRACES[1])).all()):
            return activity, gram, torch.ones_like(trace)
    unit = power_of_two(largest_of(activity, 2, 3))
    # On CUDA leaving out rollouts has made a copy; on the CPU this may be the caller's tensor.
    activity = activity.div_(unit[..., None, None]) if activity.is_cuda else activity / unit[..., None, None]
    return activity, smaller_gram(activity, room), unit


def largest_of(values: Tensor, *dims: int) -> Tensor:
    """Return the largest magnitude along some axes, which are not empty."""
    largest: Tensor = torch.linalg.vector_norm(values, math.inf, dims)
    return largest


def power_of_two(size: Tensor) -> Tensor:
    """Return a power of two of about that size whose inverse is a normal number; 1 where it is 0 or not finite."""
    tiny = torch.finfo(size.dtype).tiny
    power = (size / torch.frexp(size).mantissa).clamp(tiny, 1 / tiny)
    return torch.where(torch.isfinite(power), power, 1)


def block_length(delta_a: Tensor, delta_loss: Tensor) -> int:
    """Return the number of steps that are regressed at once."""
    time, batch, rollouts, units = delta_a.shape
    step_bytes = max(1, batch) * rollouts * units * delta_loss.itemsize
    return max(1, min(time, BLOCK_BYTES.get(delta_a.device.type, BLOCK_BYTES["cuda"]) // step_bytes))


def counted_activity(delta_a: Tensor, dtype: torch.dtype, scale: float, finite: Tensor | None) -> Tensor:
    """Return activity differences, (L, B, P, H), times `scale`; zero for rollouts that do not count.

    `finite`: rollouts that count, (B, P) bool; None where all do, so that nothing need be copied.
    """
    activity = delta_a.to(dtype)
    activity = activity if scale == 1.0 else activity * scale
    return activity if finite is None else torch.where(finite.unsqueeze(-1), activity, 0)


def factored(gram: Tensor, ridge: float, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Add the ridge to Gram matrices, (L, B, n, n), in place; return their Cholesky factors and how many had none.

    Only lower triangles are read, of `gram` here and of the factors by callers. `finite`: the rollouts that the
    matrices were computed from, (B, p) bool.
    """
    limits = torch.finfo(gram.dtype)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    mean = trace / finite.sum(1).clamp(min=1)
    diagonal += max(ridge, RIDGE_FLOOR * limits.eps) * mean.unsqueeze(-1) + limits.tiny
    factor, bad = _cholesky(gram)
    if gram.is_cuda or bool(bad.any()):
        # A ridge as large as the trace leaves nothing else of the system. On CUDA every system is replaced or not by
        # `where`: asking whether any needs it would make the host wait.
        largest = torch.sqrt(trace + limits.tiny).clamp(max=limits.max)[..., None, None]
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = torch.where(bad[..., None, None], torch.where(unit > 0, largest, 0), factor)
    return factor, bad.sum()


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower Cholesky factors of matrices, (..., n, n), and which have none, (...) bool.

    On the CPU, LAPACK does most of the work of many small matrices one element at a time, and torch clears the upper
    triangles as slowly. Halving the matrices turns all of it into products, in half the time at n = 128.
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


def _half_grams(gram: Tensor, activity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even and the odd rollouts' own Gram matrices, each in its smaller form."""
    if dual(activity):
        return gram[..., ::2, ::2].clone(), gram[..., 1::2, 1::2].clone()
    first, second = (smaller_gram(activity[..., half::2, :]) for half in (0, 1))
    return first, second


def smaller_gram(activity: Tensor, room: Tensor | None = None) -> Tensor:
    """Return D D^T, (..., P, P), or D^T D, (..., H, H), whichever is smaller.

    On the CPU only the lower triangle counts: larger matrices are computed in bands of rows up to the diagonal, which
    saves up to 7/16 of the operations. `room`: memory for as many matrices or more.
    """
    rows = activity if dual(activity) else activity.mT
    size = rows.shape[-2]
    if rows.is_cuda:
        return rows @ rows.mT
    gram = rows.new_empty((*rows.shape[:-2], size, size)) if room is None else room[: len(rows)]
    band = max(BAND, -(-size // MOST_BANDS)) if size >= 2 * BAND else size
    if band == size:
        return torch.matmul(rows, rows.mT, out=gram).mT
    # Stored by columns, as factors are.
    for start in range(0, size, band):
        gram[..., start : start + band, start:] = rows[..., start : start + band, :] @ rows[..., start:, :].mT
    return gram.mT


def gram_room(delta_a: Tensor, like: Tensor, length: int) -> Tensor | None:
    """Return memory for the Gram matrices of a block of steps, of the type of `like`; None on CUDA.

    New memory for every block would cost the CPU a page fault for every 4 KB.
    """
    size = min(delta_a.shape[2:])
    return None if like.is_cuda else like.new_empty((length, delta_a.shape[1], size, size))
