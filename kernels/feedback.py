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

over all steps, samples and processes give the direction in which B moves, once an update (`feedback_matrix.py`). The
sums do not depend on how time and samples are divided.

In a gated cell noise enters the state: D_t = delta_h_t and phi' is 1. B is (G H, H); in its product, in w, s and the
sums R_{t+1}, the adjoint of the recurrent product, takes the place of lam_{t+1}. Then

    GRU    m_t = g_t + discount z_{t+1} lam_{t+1} + R_{t+1} B
    LSTM   m_t = g_t + R_{t+1} B, and c_t - delta_c_t . mu_t stands for c_t but in the return that is handed on

with mu_t the part of dL/dc_t that does not go through h_t. Source: derived here; the gradient that node perturbation
gives a feedback weight is that of Lansdell, Prakash, Kording 2020 (arXiv:1906.00889).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .adjoint import SAFE_TO_SQUARE
from .cell_gated import Recurrence
from .feedback_matrix import Steps, Sums, collect
from .least_squares import (
    Path,
    back,
    block_length,
    counted_activity,
    factored,
    in_units,
    largest_of,
    power_of_two,
)
from .noise import Counters, noise
from .rollout import RolloutOptions

WEIGHT_FLOOR = 1e-4
"""Of w, relative to the largest adjoint, or known part of one, of later steps."""


class Carry(NamedTuple):
    """What a block of steps passes to the block before it."""

    returns: Tensor
    """Deflated return of the block's first step, (B, P)."""
    adjoint: Tensor
    """R of that step, (B, G H): the adjoint itself where there are no gates."""
    handed: Tensor
    """What that step hands on past the product, (B, H): discount z lam in a GRU, mu in an LSTM."""
    largest: Tensor
    """Largest norm of R, or of that of the known part of an adjoint, from that step on, (B,)."""

    @classmethod
    def zero(cls, weight_hh: Tensor, batch: int, rollouts: int) -> Carry:
        """Return what comes after the last step, for weights (G H, H)."""
        rows, units = weight_hh.shape
        sizes = ((batch, rollouts), (batch, rows), (batch, units), (batch,))
        return cls(*(weight_hh.new_zeros(size) for size in sizes))


class Known(NamedTuple):
    """What is known of some steps without rollouts."""

    slope: Tensor
    """phi'(a), (T, B, H)."""
    gradient: Tensor
    """g, dL/dh of each step's own loss, (T, B, H)."""
    recurrence: Recurrence | None = None
    """Of a gated cell."""
    path: Path | None = None
    """Of an LSTM's c, with the rollouts' delta_c."""

    def part(self, steps: slice, rows: Tensor, scale: float, finite: Tensor | None) -> Known:
        """Return what is known of some steps, with gradients times `rows`, (B, 1).

        delta_c is multiplied by `scale`, and zero for rollouts that do not count: `finite`, (B, P) bool; None is all.
        """
        path = self.path
        if path is not None:
            path = path.steps(steps)
            deviation = None if path.deviation is None else path.deviation.to(path.gain.dtype)
            if deviation is not None and scale != 1.0:
                deviation = deviation * scale
            if deviation is not None and finite is not None:
                deviation = torch.where(finite.unsqueeze(-1), deviation, 0)
            path = path._replace(grad=None if path.grad is None else path.grad * rows, deviation=deviation)
        recurrence = None if self.recurrence is None else self.recurrence.steps(steps)
        return Known(self.slope[steps], self.gradient[steps] * rows, recurrence, path)

    def own(self, step: int, handed: Tensor) -> Tensor:
        """Return the part of the prior mean of a step that needs no B, (B, H), from what the step after hands on."""
        own = self.slope[step] * self.gradient[step]
        return own if self.recurrence is None or self.recurrence.direct is None else own + handed

    def around(self, step: int, handed: Tensor) -> Tensor | None:
        """Return mu . delta_c of a step, (B, P), which is not h's doing."""
        return None if self.path is None else self.path.share(step, handed)

    def hand_on_(self, step: int, adjoint: Tensor, own: Tensor, handed: Tensor) -> tuple[Tensor, Tensor]:
        """Return R, (B, G H), and the larger of its norm and of that of the own part alone, (B,); overwrite `handed`.

        Args:
            step: number of the step.
            adjoint: lam, (B, H).
            own: its part that needs no B, (B, H).
            handed: by the step after, (B, H).
        """
        recurrent, alone = adjoint, own
        if self.recurrence is not None and self.path is not None:
            arriving = handed if self.path.grad is None else handed + self.path.grad[step]
            of_own = torch.addcmul(arriving, self.path.gain[step], own)
            alone = self.recurrence.adjoint(step, own, of_own)
            recurrent = self.recurrence.adjoint(step, adjoint, self.path.hand_back_(step, adjoint, handed))
        elif self.recurrence is not None:
            recurrent, alone = (self.recurrence.adjoint(step, value) for value in (adjoint, own))
            if self.recurrence.direct is not None:
                torch.mul(self.recurrence.direct[step], adjoint, out=handed)
        return recurrent, torch.linalg.vector_norm(torch.stack((recurrent, alone)), dim=-1).amax(0)


class Block(NamedTuple):
    """A block of steps."""

    delta_loss: Tensor
    """(L, B, P)."""
    activity: Tensor
    """D, (L, B, P, H)."""
    factor: Tensor
    """(L, B, n, n)."""
    known: Known


class Written(NamedTuple):
    """What the recursion writes."""

    adjoint: Tensor
    """(L, B, H)."""
    recurrent: Tensor
    """R, (L + 1, B, G H); the last is given: that of the step after the block. Without gates it holds `adjoint`."""
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


def feedback(
    delta_loss: Tensor,
    delta_a: Tensor,
    known: Known,
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
    factors: Callable[..., tuple[Tensor, Tensor]] | None = None,
    inverses: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Carry, Tensor]:
    """Estimate the adjoint of a segment of steps from all rollouts of its samples, and add to the sums.

    Each sample is scaled by a power of two near its largest gradient, so that squares neither overflow nor vanish; no
    sum depends on it.

    Args:
        delta_loss: loss differences, (T, B, P); zero where a rollout does not count.
        delta_a: activity differences, (T, B, P, H).
        known: what is known of the segment without rollouts.
        matrix: B, (G H, H).
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
        recursion: a backend's own `descend` for the dual form; None where it has none.
        factors: a backend's own `least_squares.factored`; None where it has none.
        inverses: as `factors`, but returns inverses, which `recursion` takes in place of factors, and leaves the Gram
            matrices as they are; None where `recursion` takes factors.

    Returns:
        The estimate, (T, B, H); the carry for the step before the first; and the number of systems that had no factor
        with the ridge that was asked for.
    """
    time, _, rollouts, units = delta_a.shape
    # Scaling delta_a, sigma and delta_loss by a constant scales nothing below.
    scale = 1.0 if SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1] else 1 / options.sigma
    all_finite = not delta_a.is_cuda and bool(finite.all())
    adjoint = torch.empty_like(known.gradient)
    grown = torch.zeros((), dtype=torch.int64, device=delta_a.device)
    length = block_length(delta_a, delta_loss)
    own = recursion if rollouts <= units else None
    of_systems = (own and inverses) or factors or factored
    for stop in range(time, 0, -length):
        start = max(0, stop - length)
        steps = slice(start, stop)
        activity = counted_activity(delta_a[steps], delta_loss.dtype, scale, None if all_finite else finite)
        if baseline:
            activity = _centred(activity, finite.unsqueeze(-1), -2)
        activity, gram, size_of = in_units(activity)
        factor, bad = of_systems(gram, ridge, finite)
        grown += bad
        unit = _unit(delta_loss[steps] / options.sigma, known.gradient[steps], carry)
        rows = unit.unsqueeze(-1)
        part = known.part(steps, rows, scale, None if all_finite else finite)
        block = Block(delta_loss[steps] * (scale * rows), activity, factor, part)
        written = _new_written(part.gradient, carry.adjoint * rows, sums)
        how = How(
            finite=finite,
            discount=discount,
            baseline=baseline,
            sigma=options.sigma * scale,
            kind=options.noise,
            unit=size_of,
            counters=counters._replace(time=counters.time + start),
        )
        scaled = carry._replace(
            returns=carry.returns * (scale * rows), handed=carry.handed * rows, largest=carry.largest * unit
        )
        returns, largest = (own or _with_noise(draw))(block, matrix, scaled, seed, how, written)
        torch.div(written.adjoint, rows, out=adjoint[steps])
        carry = Carry(returns / (scale * rows), written.recurrent[0] / rows, scaled.handed / rows, largest / unit)
        if sums is not None:
            kept = _factors_from(gram, ridge, finite) if of_systems is inverses else _factors_of(factor)
            later = Steps(activity, kept, part.slope, written.recurrent[1:], written.residual, written.weight)
            collect(sums, later, (first[0] + start, first[1]))
    return adjoint, carry, grown


def _factors_of(factor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda step, sample: factor[step, sample]


def _factors_from(gram: Tensor, ridge: float, finite: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what factors the Gram matrices, (L, B, P, P), of some steps and samples."""
    return lambda step, sample: factored(gram[step, sample], ridge, finite[sample])[0]


def _with_noise(draw: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *arguments: descend(*arguments, draw=draw)


def _new_written(like: Tensor, later: Tensor, sums: Sums | None) -> Written:
    """Return what a block of steps, (L, B, H), is to write; `later` is R of the step after it, (B, G H)."""
    recurrent = like.new_empty((len(like) + 1, *later.shape))
    recurrent[-1] = later
    adjoint = recurrent[:-1] if later.shape == like.shape[1:] else torch.empty_like(like)
    totals = like.new_zeros(4) if sums is None else sums.totals
    return Written(adjoint, recurrent, torch.empty_like(like), like.new_empty(like.shape[:2]), totals)


def _unit(delta_loss: Tensor, gradient: Tensor, carry: Carry) -> Tensor:
    """Return for each sample, (B,), the inverse of a power of two near its largest gradient; 1 where that is 0."""
    size = torch.maximum(largest_of(delta_loss, 0, 2), largest_of(gradient, 0, 2))
    size = torch.maximum(size, largest_of(carry.handed, 1))
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
    """Go through a block of steps, last first; return the deflated return, (B, P), and the largest norm, (B,).

    `carry.handed` is overwritten with what the block hands on.
    """
    activity, totals, known = block.activity, written.totals, block.known
    shape = tuple(activity.shape)
    later = draw(seed, shape, sigma=how.sigma, kind=how.kind, counters=how.counters, dtype=activity.dtype)
    returns, largest = carry.returns, carry.largest
    for step in range(len(activity) - 1, -1, -1):
        rows, slope, after = activity[step], known.slope[step], written.recurrent[step + 1]
        fed_back, own = slope * (after @ matrix), known.own(step, carry.handed)
        prior = own + fed_back
        effect, predicted = (rows @ torch.stack((prior, fed_back), -1)).unbind(-1)
        unit = how.unit[step].unsqueeze(-1)
        around = known.around(step, carry.handed)
        target = block.delta_loss[step] + returns
        target = (target if around is None else target - around) / unit
        if how.baseline:
            target = _centred(target, how.finite, -1)
        power = effect.square().sum(-1)
        gain = torch.where(power > 0, (effect * target).sum(-1) / power, 0).clamp(0, 1).unsqueeze(-1)
        solved = back(rows, block.factor[step], torch.stack((target, effect, predicted), -1))
        of_target, of_effect, of_predicted = solved.unbind(-1)
        adjoint = gain * (prior - of_effect) + of_target
        weight = _weight(after, largest)
        # j^T G^-1 y = (phi' lam B) . D^T G^-1 y
        measured = (fed_back * (of_target - of_effect + of_predicted)).sum(-1)
        predicted = (fed_back * of_predicted).sum(-1)
        counted = weight > 0
        sizes = (weight * measured, weight * predicted, counted, torch.where(counted, gain.squeeze(-1), 0))
        totals += torch.stack([size.sum() for size in sizes])
        written.residual[step] = weight.unsqueeze(-1) * slope * (of_target - of_effect)
        written.weight[step] = weight
        written.adjoint[step] = adjoint
        injected = (later[step] @ adjoint.unsqueeze(-1)).squeeze(-1)
        returns = target * unit - injected
        returns = (returns if around is None else returns + around) * how.discount
        written.recurrent[step], size = known.hand_on_(step, adjoint, own, carry.handed)
        largest = torch.maximum(largest, size)
    return returns, largest


def _weight(after: Tensor, largest: Tensor) -> Tensor:
    """Return w, (B,); 0 where no later step has an adjoint."""
    size = after.square().sum(-1) + WEIGHT_FLOOR * largest.square()
    return torch.where(largest > 0, 1 / size, 0)
