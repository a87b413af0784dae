"""From the residuals of learned feedback to a step of its matrix B: sums over an update, direction, length.

With R_{n+1}, w_n, res_n, D_n and G_n of `feedback.py`, for all pairs n of a step and its successor,

    relation = sum w R_{n+1}^T res_n        gram = sum w R_{n+1}^T R_{n+1}
    V   = (gram + mean + .3 mean(diag) I)^-1 relation / (mean phi'^2 + .05),   mean: the mean gram of all updates
    eta = .7 <relation, V> / sum w v_n^T D_n^T G_n^-1 D_n v_n,                 v_n = phi'_n (R_{n+1} V)
    B  <- B + eta V

The denominator is estimated from some pairs. A gated cell of many rows keeps no gram: V is the relation. Derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .least_squares import back

PAIRS = (32, 128)
"""Least and greatest number of pairs of a step and its successor on which the length of a step of B is measured. With
32 pairs 4 rollouts lose their way in the adding problem, with 64 they are late, with 128 they learn as with all."""

PAIR_FLOATS = 1 << 22
"""Between the two, the activity of the pairs has so many floats."""

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

GRAM_UP_TO = 512
"""Rows of W_hh of a gated cell up to which the Gram matrix of R is taken out of the direction of B."""


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
    """R of the step after it, (S, G H)."""
    weight: Tensor
    """w, (S,); 0 for steps that were not reached."""


class Sums(NamedTuple):
    """What an update collects for B, summed over steps and samples."""

    relation: Tensor
    """(G H, H)."""
    gram: Tensor
    """(G H, G H); (0, 0) where none is kept."""
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


class Steps(NamedTuple):
    """What a block of steps adds."""

    activity: Tensor
    """D, (L, B, P, H)."""
    factors: Callable[[Tensor, Tensor], Tensor]
    """Returns the factors of some steps and samples, (S, n, n), from their numbers, (S,) int64 each."""
    slope: Tensor
    """phi'(a), (L, B, H)."""
    later: Tensor
    """R of the step after each, (L, B, G H)."""
    residual: Tensor
    """w res, (L, B, H)."""
    weight: Tensor
    """w, (L, B)."""

    def at(self, step: Tensor, sample: Tensor) -> tuple[Tensor, ...]:
        """Return activity, slope, R of the step after, w and factors of some steps and samples, (S,) int64 each."""
        rows = (self.activity, self.slope, self.later, self.weight)
        return (*(value[step, sample] for value in rows), self.factors(step, sample))


def pairs_of(rollouts: int, units: int) -> int:
    """Return S, the number of pairs that are kept."""
    least, most = PAIRS
    return max(least, min(most, PAIR_FLOATS // (rollouts * units)))


def gram_shape(weight_hh: Tensor) -> tuple[int, int]:
    """Return the shape of the Gram matrix of R that is kept for weights (G H, H), (0, 0) for none."""
    rows, units = weight_hh.shape
    side = rows if rows == units or rows <= GRAM_UP_TO else 0
    return side, side


def new_sums(weight_hh: Tensor, time: int, batch: int, rollouts: int, lengths: Tensor | None) -> Sums:
    """Return sums of zero for an update.

    The pairs are spread over all steps that have a successor, by their number alone, so that no division of the work
    changes them.

    Args:
        weight_hh: of the layer, (G H, H), for its size, type and device.
        time: T.
        batch: B.
        rollouts: P.
        lengths: valid steps of each sample, (B,); None is all.
    """
    (rows, units), device = weight_hh.shape, weight_hh.device
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
        weight_hh.new_zeros((pairs_kept, rows)),
        weight_hh.new_zeros(pairs_kept),
    )
    relation, gram = torch.zeros_like(weight_hh), weight_hh.new_zeros(gram_shape(weight_hh))
    return Sums(relation, gram, weight_hh.new_zeros(units), weight_hh.new_zeros(4), pairs, count)


def collect(sums: Sums, steps: Steps, first: tuple[int, int]) -> None:
    """Add a block of steps to the sums, and keep the pairs that lie in it.

    `first`: the block's first step and first sample in the whole batch.
    """
    later, weight, slope = steps.later, steps.weight, steps.slope
    rows = later.flatten(0, 1)
    sums.relation.addmm_(rows.t(), steps.residual.flatten(0, 1))
    if sums.gram.numel():
        sums.gram.addmm_((rows * weight.flatten().unsqueeze(-1)).t(), rows)
    counted = (weight > 0).to(weight.dtype).flatten()
    sums.slopes.addmv_(slope.flatten(0, 1).square().t(), counted)
    pairs = sums.pairs
    step, sample = pairs.step - first[0], pairs.sample - first[1]
    inside = (step >= 0) & (pairs.step >= 0) & (step < len(weight)) & (sample >= 0) & (sample < weight.shape[1])
    stored = (pairs.activity, pairs.slope, pairs.later, pairs.weight, pairs.factor)
    if not inside.is_cuda:
        step, sample = step[inside], sample[inside]
        for old, new in zip(stored, steps.at(step, sample), strict=True):
            old[inside] = new
        return
    # How many lie in the block is not asked: it would make the host wait.
    step, sample = step.clamp(0, len(weight) - 1), sample.clamp(0, weight.shape[1] - 1)
    for old, new in zip(stored, steps.at(step, sample), strict=True):
        old.copy_(torch.where(inside.view(-1, *[1] * (old.dim() - 1)), new, old))


def direction(sums: Sums, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return V, the direction in which B moves, (G H, H), and the mean Gram matrix of all updates, (G H, G H).

    Args:
        sums: over all steps, samples and processes.
        gram: the mean Gram matrix of earlier updates; zeros before the first, and (0, 0) where none is kept.
    """
    slopes = sums.slopes / sums.totals[NUMBER].clamp(min=1) + SLOPE_FLOOR
    if not gram.numel():
        return sums.relation / slopes, gram
    known = gram.diagonal().sum() > 0
    mean = torch.where(known, MEMORY * gram + (1 - MEMORY) * sums.gram, sums.gram)
    system = sums.gram + mean
    diagonal = system.diagonal()
    diagonal += SHRINKAGE * diagonal.mean() + torch.finfo(system.dtype).tiny
    factor, _ = torch.linalg.cholesky_ex(system)
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
        matrix: B, (G H, H).
        sums: over all steps, samples and processes.
        gram: the mean Gram matrix before.
        mean: and with this update.
        towards: V, (G H, H).
        bend: `curvature`, summed over processes.
    """
    length = DAMPING * (sums.relation * towards).sum() / bend
    ratio = sums.totals[MEASURED] / sums.totals[PREDICTED]
    poisoned = (sums.totals[PREDICTED] > 0) & (ratio < POISONED_BELOW)
    moved = torch.where(poisoned, ratio.clamp(min=0) * matrix, matrix + length * towards)
    sound = torch.isfinite(sums.relation).all() & torch.isfinite(sums.gram).all() & (torch.isfinite(length) | poisoned)
    moved, mean = torch.where(sound, moved, matrix), torch.where(sound, mean, gram)
    return torch.where(torch.isfinite(moved).all(), moved, 0), mean
