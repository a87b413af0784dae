"""Least squares against a prior mean from a feedback matrix B, and the sums from which B is learnt.

    m_t   = phi'(a_t) (g_t + lam_{t+1} B)                          prior mean; lam = 0 after the last step
    c_t   = delta_loss_t + discount (c_{t+1} - Xi_{t+1} lam_{t+1})   as in least_squares.py
    kap_t = clamp(<c_t, D_t m_t> / |D_t m_t|^2, 0, 1)              measured gain of the prior mean
    lam_t = kap_t m_t + D_t^T G_t^-1 (c_t - kap_t D_t m_t),        G_t = D_t D_t^T + r I
    res_t = phi'(a_t) D_t^T G_t^-1 (c_t - D_t m_t)

for each sample, with D_t = delta_a_t (P x H) and Xi_t its noise. To first order c_t - D_t m_t is
delta_h_t . (W_hh^T - B^T) lam_{t+1}: P samples of the error of one matrix, which all steps and samples share. With
w_t = 1 / (|lam_{t+1}|^2 + 1e-4 s_{t+1}), s the largest |lam|^2 or |phi'(a) g|^2 of that step and all later ones (few
rollouts can be blind to a step's adjoint, which must not make its weight huge), the sums

    relation = sum w lam_{t+1}^T res_t        gram = sum w lam_{t+1}^T lam_{t+1}

over all steps, samples and processes give the direction in which B moves, once an update (`step`). The sums do not
depend on how time and samples are divided. Source: derived here; the gradient that node perturbation gives a feedback
weight is that of Lansdell, Prakash, Kording 2020 (arXiv:1906.00889).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .adjoint import SAFE_TO_SQUARE
from .least_squares import block_length, counted_activity, dual, factored, in_units, largest_of, power_of_two, solve
from .noise import Counters, noise
from .rollout import RolloutOptions

PAIRS = (32, 128)
"""Least and greatest number of pairs of a step and its successor on which the length of a step of B is measured. With
32 pairs 4 rollouts lose their way in the adding problem, with 64 they are late, with 128 they learn as with all."""

PAIR_FLOATS = 1 << 22
"""Between the two, the activity of the pairs has so many floats."""

WEIGHT_FLOOR = 1e-4
"""Of w, relative to the largest adjoint, or known part of one, of later steps."""

SHRINKAGE = 0.3
"""Added to the diagonal of the Gram matrix of adjoints, relative to its mean."""

SLOPE_FLOOR = 0.05
"""Added to the mean squared slope of a unit."""

DAMPING = 0.7
"""Of a step of B, relative to the step that explains the returns best."""

MEMORY = 0.9
"""Share of its past that the mean Gram matrix keeps in an update."""

POISONED_BELOW = 0.5
"""Ratio of the measured to the predicted returns below which B is shrunk instead of moved."""


class Carry(NamedTuple):
    """What a block of steps passes to the block before it."""

    returns: Tensor
    """Deflated return of the block's first step, (B, P)."""
    adjoint: Tensor
    """Adjoint of that step, (B, H)."""
    largest: Tensor
    """Largest norm of an adjoint, or of its known part, from that step on, (B,)."""

    @classmethod
    def zero(cls, like: Tensor, batch: int, rollouts: int, units: int) -> Carry:
        """Return what comes after the last step."""
        return cls(like.new_zeros((batch, rollouts)), like.new_zeros((batch, units)), like.new_zeros(batch))


class Pairs(NamedTuple):
    """Some steps, and what is needed there to predict the effect of a step of B; S pairs."""

    step: Tensor
    """(S,) int64, of the whole sequence; -1 for none."""
    sample: Tensor
    """(S,) int64, of the whole batch."""
    activity: Tensor
    """(S, P, H)."""
    factor: Tensor
    """Of its Gram matrix with the ridge, (S, n, n), n = min(P, H)."""
    slope: Tensor
    """(S, H)."""
    later: Tensor
    """Adjoint of the step after it, (S, H)."""
    weight: Tensor
    """w, (S,); 0 for steps that were not reached."""


class Sums(NamedTuple):
    """What an update collects for B, summed over steps and samples."""

    relation: Tensor
    """(H, H)."""
    gram: Tensor
    """(H, H)."""
    slopes: Tensor
    """Sum of squared slopes, (H,)."""
    totals: Tensor
    """(4,), see `MEASURED` to `GAIN`."""
    pairs: Pairs
    available: Tensor
    """Number of pairs of a step and its successor in the batch, 0-dim."""


MEASURED, PREDICTED, NUMBER, GAIN = range(4)
"""Places in `Sums.totals`. With j = D (phi' lam B), what B predicts of a return, and y what was measured of it:
sum w y^T G^-1 j, sum w j^T G^-1 j, the number of pairs of a step and its successor, and sum kap."""


class Block(NamedTuple):
    """A block of steps."""

    delta_loss: Tensor
    """(L, B, P)."""
    activity: Tensor
    """D, (L, B, P, H)."""
    factor: Tensor
    """(L, B, n, n)."""
    slope: Tensor
    """phi'(a), (L, B, H)."""
    gradient: Tensor
    """g, dL/dh of the same step, (L, B, H)."""


class Written(NamedTuple):
    """What the recursion writes."""

    adjoint: Tensor
    """(L + 1, B, H); the last is given: that of the step after the block."""
    residual: Tensor
    """w res, (L, B, H)."""
    weight: Tensor
    """w, (L, B)."""
    totals: Tensor
    """Added to, (4,)."""


class How(NamedTuple):
    """The settings of a block of steps."""

    finite: Tensor
    """Rollouts that count, (B, P) bool."""
    discount: float
    baseline: bool
    sigma: float
    """Standard deviation of the noise, in the units of the activity differences."""
    kind: str
    """Of the noise: "rademacher" or "gaussian"."""
    unit: Tensor
    """In which the activity differences of each step and sample are given, (L, B); nothing below depends on it."""
    counters: Counters
    """Of the block's first step."""


def pairs_of(rollouts: int, units: int) -> int:
    """Return S, the number of pairs that are kept."""
    least, most = PAIRS
    return max(least, min(most, PAIR_FLOATS // (rollouts * units)))


def new_sums(weight_hh: Tensor, time: int, batch: int, rollouts: int, lengths: Tensor | None) -> Sums:
    """Return sums of zero for an update.

    The pairs are spread over all steps that have a successor, by their number alone, so that no division of the work
    changes them.

    Args:
        weight_hh: of the layer, (H, H), for its size, type and device.
        time: T.
        batch: B.
        rollouts: P.
        lengths: valid steps of each sample, (B,); None is all.
    """
    units, device = weight_hh.shape[1], weight_hh.device
    side, pairs_kept = min(rollouts, units), pairs_of(rollouts, units)
    if lengths is None:
        lengths = torch.full((batch,), time, dtype=torch.int64, device=device)
    ends = (lengths.to(device) - 1).clamp(min=0).cumsum(0)
    count = ends[-1] if batch else ends.sum()
    # A pair in each of S equal parts, at places that follow no period of the task.
    number = torch.arange(pairs_kept, device=device)
    offset = (number * 0.6180339887498949) % 1
    start, stop = number * count // pairs_kept, (number + 1) * count // pairs_kept
    place = start + (offset * (stop - start)).long()
    place = torch.where(count > pairs_kept, place, number)
    sample = torch.searchsorted(ends, place, right=True).clamp(max=max(batch - 1, 0))
    before = ends[sample] - (lengths.to(device)[sample] - 1).clamp(min=0) if batch else place
    step = torch.where(place < count, place - before, -1)
    pairs = Pairs(
        step,
        sample,
        weight_hh.new_zeros((pairs_kept, rollouts, units)),
        torch.eye(side, dtype=weight_hh.dtype, device=device).repeat(pairs_kept, 1, 1),
        weight_hh.new_zeros((pairs_kept, units)),
        weight_hh.new_zeros((pairs_kept, units)),
        weight_hh.new_zeros(pairs_kept),
    )
    square = weight_hh.new_zeros((2, units, units))
    return Sums(square[0], square[1], weight_hh.new_zeros(units), weight_hh.new_zeros(4), pairs, count)


def feedback(
    delta_loss: Tensor,
    delta_a: Tensor,
    slope: Tensor,
    gradient: Tensor,
    matrix: Tensor,
    carry: Carry,
    seed: Tensor,
    sums: Sums | None,
    *,
    finite: Tensor,
    discount: float,
    ridge: float,
    baseline: bool,
    options: RolloutOptions,
    counters: Counters,
    first: tuple[int, int],
    draw: Callable[..., Tensor],
    recursion: Callable[..., tuple[Tensor, Tensor]] | None,
) -> tuple[Tensor, Carry, Tensor]:
    """Estimate the adjoint of a segment of steps from all rollouts of its samples, and add to the sums.

    Each sample is scaled by a power of two near its largest gradient, so that squares neither overflow nor vanish; no
    sum depends on it.

    Args:
        delta_loss: loss differences, (T, B, P); zero where a rollout does not count.
        delta_a: activity differences, (T, B, P, H).
        slope: phi'(a), (T, B, H).
        gradient: dL/dh of each step's own loss, (T, B, H).
        matrix: B, (H, H).
        carry: of the step after the last.
        seed: 0-dim int64 tensor, the noise's key.
        sums: added to; None where nothing is learnt.
        finite: rollouts that count, (B, P) bool.
        discount: gamma in [0, 1].
        ridge: regularisation relative to the mean squared activity difference of a rollout.
        baseline: whether returns, activity and noise are centred over the rollouts that count.
        options: as in the rollout.
        counters: as in the rollout.
        first: the segment's first step and first sample in the whole batch.
        draw: generates the noise again; a backend's `noise`.
        recursion: a backend's own `descend` for the dual form with Rademacher noise; None where it has none.

    Returns:
        The estimate, (T, B, H); the carry for the step before the first; and the number of systems that had no factor
        with the ridge that was asked for.
    """
    time, _, rollouts, units = delta_a.shape
    # Scaling delta_a, sigma and delta_loss by a constant scales nothing below.
    scale = 1.0 if SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1] else 1 / options.sigma
    all_finite = not delta_a.is_cuda and bool(finite.all())
    adjoint = torch.empty_like(gradient)
    grown = torch.zeros((), dtype=torch.int64, device=delta_a.device)
    length = block_length(delta_a, delta_loss)
    own = recursion if options.noise == "rademacher" and rollouts <= units else None
    for stop in range(time, 0, -length):
        start = max(0, stop - length)
        steps = slice(start, stop)
        activity = counted_activity(delta_a[steps], delta_loss.dtype, scale, None if all_finite else finite)
        if baseline:
            activity = _centred(activity, finite.unsqueeze(-1), -2)
        activity, gram, size_of = in_units(activity)
        factor, bad = factored(gram, ridge, finite)
        grown += bad
        unit = _unit(delta_loss[steps] / options.sigma, gradient[steps], carry)
        rows = unit.unsqueeze(-1)
        block = Block(delta_loss[steps] * (scale * rows), activity, factor, slope[steps], gradient[steps] * rows)
        size = (stop - start, *gradient.shape[1:])
        written = Written(
            gradient.new_empty((size[0] + 1, *size[1:])),
            gradient.new_empty(size),
            gradient.new_empty(size[:2]),
            gradient.new_zeros(4) if sums is None else sums.totals,
        )
        written.adjoint[-1] = carry.adjoint * rows
        how = How(
            finite=finite,
            discount=discount,
            baseline=baseline,
            sigma=options.sigma * scale,
            kind=options.noise,
            unit=size_of,
            counters=counters._replace(time=counters.time + start),
        )
        scaled = carry._replace(returns=carry.returns * (scale * rows), largest=carry.largest * unit)
        returns, largest = (own or _with_noise(draw))(block, matrix, scaled, seed, how, written)
        torch.div(written.adjoint[:-1], rows, out=adjoint[steps])
        carry = Carry(returns / (scale * rows), adjoint[start], largest / unit)
        if sums is not None:
            collect(sums, block, written, (first[0] + start, first[1]))
    return adjoint, carry, grown


def _with_noise(draw: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *arguments: descend(*arguments, draw=draw)


def _unit(delta_loss: Tensor, gradient: Tensor, carry: Carry) -> Tensor:
    """Return for each sample, (B,), the inverse of a power of two near its largest gradient; 1 where that is 0."""
    size = torch.maximum(largest_of(delta_loss, 0, 2), largest_of(gradient, 0, 2))
    return 1 / power_of_two(torch.maximum(size, carry.largest))


def _centred(values: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Return values minus their mean over the rollouts that count; zero for the others."""
    values = torch.where(counted, values, 0)
    return torch.where(counted, values - values.sum(dim, keepdim=True) / counted.sum(dim, keepdim=True).clamp(min=1), 0)


def descend(
    block: Block,
    matrix: Tensor,
    carry: Carry,
    seed: Tensor,
    how: How,
    written: Written,
    *,
    draw: Callable[..., Tensor] = noise,
) -> tuple[Tensor, Tensor]:
    """Go through a block of steps, last first; return the deflated return, (B, P), and the largest norm, (B,)."""
    activity, totals = block.activity, written.totals
    shape = tuple(activity.shape)
    later = draw(seed, shape, sigma=how.sigma, kind=how.kind, counters=how.counters, dtype=activity.dtype)
    returns, largest = carry.returns, carry.largest
    for step in range(len(activity) - 1, -1, -1):
        rows, slope, after = activity[step], block.slope[step], written.adjoint[step + 1]
        known = slope * (after @ matrix)
        prior = torch.addcmul(known, slope, block.gradient[step])
        effect, predicted = (rows @ torch.stack((prior, known), -1)).unbind(-1)
        unit = how.unit[step].unsqueeze(-1)
        target = (block.delta_loss[step] + returns) / unit
        if how.baseline:
            target = _centred(target, how.finite, -1)
        power = effect.square().sum(-1)
        gain = torch.where(power > 0, (effect * target).sum(-1) / power, 0).clamp(0, 1).unsqueeze(-1)
        solved = back(rows, block.factor[step], torch.stack((target, effect, predicted), -1))
        of_target, of_effect, of_predicted = solved.unbind(-1)
        adjoint = gain * (prior - of_effect) + of_target
        weight = _weight(after, largest)
        # j^T G^-1 y = (phi' lam B) . D^T G^-1 y
        measured = (known * (of_target - of_effect + of_predicted)).sum(-1)
        predicted = (known * of_predicted).sum(-1)
        counted = weight > 0
        sizes = (weight * measured, weight * predicted, counted, torch.where(counted, gain.squeeze(-1), 0))
        totals += torch.stack([size.sum() for size in sizes])
        written.residual[step] = weight.unsqueeze(-1) * slope * (of_target - of_effect)
        written.weight[step] = weight
        written.adjoint[step] = adjoint
        injected = (later[step] @ adjoint.unsqueeze(-1)).squeeze(-1)
        returns = (target * unit - injected) * how.discount
        sizes = torch.linalg.vector_norm(torch.stack((adjoint, prior - known)), dim=-1)
        largest = torch.maximum(largest, sizes.amax(0))
    return returns, largest


def _weight(after: Tensor, largest: Tensor) -> Tensor:
    """Return w, (B,); 0 where no later step has an adjoint."""
    size = after.square().sum(-1) + WEIGHT_FLOOR * largest.square()
    return torch.where(largest > 0, 1 / size, 0)


def back(activity: Tensor, factor: Tensor, sides: Tensor) -> Tensor:
    """Return D^T G^-1 y, (..., H, k), of right-hand sides y, (..., P, k); (D^T D + r I)^-1 D^T y in the primal form."""
    return activity.mT @ solve(factor, sides) if dual(activity) else solve(factor, activity.mT @ sides)


def collect(sums: Sums, block: Block, written: Written, first: tuple[int, int]) -> None:
    """Add a block's steps to the sums, and keep the pairs that lie in it."""
    later, residual, weight = written.adjoint[1:], written.residual, written.weight
    rows = later.flatten(0, 1)
    sums.relation.addmm_(rows.t(), residual.flatten(0, 1))
    sums.gram.addmm_((rows * weight.flatten().unsqueeze(-1)).t(), rows)
    counted = (weight > 0).to(weight.dtype).flatten()
    sums.slopes.addmv_(block.slope.flatten(0, 1).square().t(), counted)
    pairs = sums.pairs
    step, sample = pairs.step - first[0], pairs.sample - first[1]
    inside = (step >= 0) & (pairs.step >= 0) & (step < len(weight)) & (sample >= 0) & (sample < weight.shape[1])
    kept = (
        (pairs.activity, block.activity),
        (pairs.factor, block.factor),
        (pairs.slope, block.slope),
        (pairs.later, later),
        (pairs.weight, weight),
    )
    if not inside.is_cuda:
        for stored, value in kept:
            stored[inside] = value[step[inside], sample[inside]]
        return
    # How many lie in the block is not asked: it would make the host wait.
    step, sample = step.clamp(0, len(weight) - 1), sample.clamp(0, weight.shape[1] - 1)
    for stored, value in kept:
        place = inside.view(-1, *[1] * (stored.dim() - 1))
        stored.copy_(torch.where(place, value[step, sample], stored))


def direction(sums: Sums, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return V, the direction in which B moves, (H, H), and the mean Gram matrix of all updates, (H, H).

    Args:
        sums: over all steps, samples and processes.
        gram: the mean Gram matrix of earlier updates; zeros before the first.
    """
    known = gram.diagonal().sum() > 0
    mean = torch.where(known, MEMORY * gram + (1 - MEMORY) * sums.gram, sums.gram)
    system = sums.gram + mean
    diagonal = system.diagonal()
    diagonal += SHRINKAGE * diagonal.mean() + torch.finfo(system.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(system)
    slopes = sums.slopes / sums.totals[NUMBER].clamp(min=1) + SLOPE_FLOOR
    return torch.cholesky_solve(sums.relation, factor) / slopes, mean


def curvature(sums: Sums, towards: Tensor) -> Tensor:
    """Return the estimate of sum w v^T D^T G^-1 D v, 0-dim, v = phi' (lam V), from the pairs of one process."""
    pairs = sums.pairs
    effect = (pairs.slope * (pairs.later @ towards)).unsqueeze(-1)
    moved = pairs.activity @ effect
    energy = (effect * back(pairs.activity, pairs.factor, moved)).sum((1, 2))
    share = sums.available / sums.available.clamp(max=len(pairs.step)).clamp(min=1)
    return share * (pairs.weight * energy).sum()


def step(
    matrix: Tensor, sums: Sums, gram: Tensor, mean: Tensor, towards: Tensor, bend: Tensor
) -> tuple[Tensor, Tensor]:
    """Return B and the mean Gram matrix after an update.

    A step's length is the one that explains the returns best, damped. Where B predicts more than twice what the returns
    show, it is shrunk to what they show, and not moved. Where anything is not finite, both keep their values.

    Args:
        matrix: B, (H, H).
        sums: over all steps, samples and processes.
        gram: the mean Gram matrix before.
        mean: and with this update.
        towards: V, (H, H).
        bend: `curvature`, summed over processes.
    """
    length = DAMPING * (sums.relation * towards).sum() / bend
    ratio = sums.totals[MEASURED] / sums.totals[PREDICTED]
    poisoned = (sums.totals[PREDICTED] > 0) & (ratio < POISONED_BELOW)
    moved = torch.where(poisoned, ratio.clamp(min=0) * matrix, matrix + length * towards)
    sound = torch.isfinite(sums.relation).all() & torch.isfinite(sums.gram).all() & (torch.isfinite(length) | poisoned)
    moved, mean = torch.where(sound, moved, matrix), torch.where(sound, mean, gram)
    return torch.where(torch.isfinite(moved).all(), moved, 0), mean
