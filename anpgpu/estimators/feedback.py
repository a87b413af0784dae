"""anp-feedback: least squares against a prior mean from a learned feedback matrix.

`anp-ls` with fewer rollouts than units projects each adjoint on P directions, and forgets what it learnt. Here the
residual of its regression teaches one matrix B for each layer and direction, from the same returns, pooled over steps,
samples and updates (`kernels/feedback.py` has the equations). B tends to W_hh; what it predicts is the prior mean of
the next regressions. Two more parts belong to the method:

    B moves with W   B <- B + (W_hh now - W_hh at the last update), the learner's own step, so that B does not lag
    warm-up          the first update repeats its estimate with fresh noise, so that B is learnt before weights move

Node perturbation teaches the feedback weights (Lansdell, Prakash, Kording 2020, arXiv:1906.00889); that they move with
the forward weights is Kolen and Pollack 1994; its limit without noise is the weight mirror (Akrout et al. 2019,
arXiv:1904.05391). The algorithm is derived here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anpgpu.kernels.feedback import Carry, Known
from anpgpu.kernels.feedback_matrix import (
    GAIN,
    GRAM_UP_TO,
    MEASURED,
    NUMBER,
    PREDICTED,
    Sums,
    curvature,
    direction,
    new_sums,
    pairs_of,
    step,
)
from anpgpu.network.stack import Network
from anpgpu.registry import ESTIMATORS
from anpgpu.runtime.dispatch import feedback_on
from anpgpu.runtime.processes import sum_over
from anpgpu.runtime.ranges import entered
from anpgpu.runtime.settings import Settings

from .by_layer import Backward, layers_backward, two_directions
from .by_segment import one_direction
from .found import Found
from .job import Extent, Job
from .kept import Kept, LayerState
from .rules import Rule
from .sweep import Block

FRESH_NOISE = -7046029254386353131
"""Odd, so that the seeds of a warm-up are all different: 2^64 divided by the golden ratio."""


class Learner:
    """What one layer and direction learns in one update.

    Args:
        settings: the resolved perturbation.
        state: of the layer; changed by `commit` alone. None where the prior is not learnt.
        weight_hh: of the layer, (G H, H), in the working type.
        extent: of the update.
    """

    def __init__(self, settings: Settings, state: LayerState | None, weight_hh: Tensor, extent: Extent) -> None:
        self.settings, self.state, self.weight = settings, state, weight_hh
        self.sums: Sums | None = None
        if state is None:
            self.matrix = torch.zeros_like(weight_hh)
            return
        follows = settings.follow_weights
        self.matrix = state.feedback + (weight_hh - state.weight) if follows else state.feedback
        self.sums = new_sums(weight_hh, extent.time, extent.batch, settings.options.rollouts, extent.lengths)

    def commit(self) -> None:
        """Move B, once all rollouts of an update have been credited, in all processes alike."""
        sums, state = self.sums, self.state
        if sums is None or state is None:
            return
        self._exchange(sums.relation, sums.gram, sums.slopes, sums.totals)
        towards, mean = direction(sums, state.gram)
        bend = curvature(sums, towards)
        self._exchange(bend)
        matrix, gram = step(self.matrix, sums, state.gram, mean, towards, bend)
        state.feedback.copy_(matrix)
        state.gram.copy_(gram)
        state.weight.copy_(self.weight)

    def _exchange(self, *sums: Tensor) -> None:
        """Sum over processes: those that share this update's samples, or the replicas of DistributedDataParallel."""
        if self.settings.kept.replicas is None:
            self.settings.share.sum_(*sums)
        else:
            sum_over(self.settings.kept.replicas, *sums)

    @property
    def report(self) -> Tensor:
        """Return the mean gain of the prior mean and the ratio of measured to predicted returns, (2,)."""
        if self.sums is None:
            return self.weight.new_full((2,), torch.nan)
        totals = self.sums.totals
        return torch.stack((totals[GAIN] / totals[NUMBER], totals[MEASURED] / totals[PREDICTED]))


LEARNED, KNOWN = "learned", "known"
"""Values of `prior`; the third is "none"."""


@ESTIMATORS.add("anp-feedback")
class LearnedFeedback(Rule):
    """Ridge regression of the return on the activity differences, against a prior mean from learned feedback."""

    whole_samples = True
    keeps_state = True
    parts = 1

    learner: Learner
    known: Known

    def __init__(self, settings: Settings, weight_hh: Tensor, seed: Tensor, finite: Tensor) -> None:
        super().__init__(settings, weight_hh, seed, finite)
        batch, rollouts = finite.shape
        self.after = Carry.zero(weight_hh, batch, rollouts)

    @classmethod
    def check(cls, perturbation: Any) -> None:
        """Warn of a single rollout."""
        super().check(perturbation)
        if perturbation.rollouts == 1:
            warnings.warn(
                f"method={perturbation.method!r} with rollouts=1 learns its feedback matrix slowly; 4 are much better",
                UserWarning,
                stacklevel=4,
            )

    @classmethod
    def extra_floats(cls, rollouts: int, hidden: int, gates: int = 1) -> int:
        """Return the floats of a copy of delta_a, the Gram matrix and its factor, and rows of clean activity."""
        # Of a gated cell also the coefficients of R and what they are made of, R, and a copy of it with weights.
        rows = 6 + (6 * gates + 6 if gates > 1 else 0)
        return rollouts * hidden + 2 * min(rollouts, hidden) ** 2 + rows * hidden

    @classmethod
    def state_floats(cls, rollouts: int, hidden: int, gates: int = 1) -> int:
        """Return the floats of sums, new matrices and their factor, and of the pairs of the line search."""
        rows = gates * hidden
        square = rows**2 if gates == 1 or rows <= GRAM_UP_TO else 0
        return (
            4 * rows * hidden
            + 4 * square
            + pairs_of(rollouts, hidden) * (rollouts * hidden + min(rollouts, hidden) ** 2 + hidden + rows)
        )

    @classmethod
    def cost(cls, rollouts: int, hidden: int) -> float:
        """Return P rollouts, the product with B and the two sums, and P H for each of five passes over activity."""
        side = min(rollouts, hidden)
        return rollouts * (1 + (5 + side) / hidden) + 3 + side**3 / (6 * hidden**2)

    @staticmethod
    def walk(directions: int) -> Callable[[Job], Any]:
        """Return the walk, repeated while B warms up."""
        estimate = one_direction if directions == 1 else two_directions
        return lambda job: _warmed_up(estimate, job, job.problem.network)

    @staticmethod
    def backward(backward: Backward) -> Found:
        """`RNN`'s backward pass, repeated while B warms up."""
        found: Found = _warmed_up(layers_backward, backward, backward.network)
        return found

    @classmethod
    def new_learner(cls, settings: Settings, number: int, weight_hh: Tensor, extent: Extent) -> Learner:
        """Return what a layer and direction learns in this update."""
        state = settings.kept.layers[number] if settings.prior == LEARNED else None
        return Learner(settings, state, weight_hh, extent)

    def add(self, block: Block, delta_loss: Tensor, delta_a: Tensor | None) -> None:
        """Solve the regression; the block holds all rollouts of its samples."""
        settings = self.settings
        assert delta_a is not None  # noqa: S101  (for the type checker; the rule stores it)
        known = self.known._replace(path=block.path)
        if settings.prior not in {LEARNED, KNOWN}:
            recurrence = None if known.recurrence is None else known.recurrence._replace(direct=None)
            known = known._replace(gradient=torch.zeros_like(known.gradient), recurrence=recurrence)
        with entered("feedback"):
            estimate, self.after, grown = feedback_on(settings.backend)(
                delta_loss,
                delta_a,
                known,
                self.learner.matrix,
                self.after,
                self.seed,
                self.learner.sums,
                finite=self.finite,
                discount=settings.discount,
                ridge=settings.ridge,
                baseline=settings.baseline,
                options=block.options,
                counters=block.counters,
                first=(block.counters.time, block.counters.sample),
            )
        self.add_sums(estimate.unsqueeze(0))
        self.add_grown(grown)

    def expect(self, learner: Learner, known: Known) -> None:
        """Take what a segment's steps need besides their rollouts."""
        self.learner, self.known = learner, known

    def estimate(self, counts: Tensor) -> Tensor:
        """Return the solution, which is not divided by counts."""
        del counts
        return self.taken()


def _warmed_up(estimate: Callable[[Any], Any], work: Any, network: Network) -> Any:
    """Return an estimate; before a module's first update, repeat it with fresh noise, to learn B before weights move.

    Args:
        estimate: takes `work`.
        work: has `settings` and a `seed`.
        network: in the working type.
    """
    settings: Settings = work.settings
    if settings.prior != LEARNED:
        return estimate(work)
    kept: Kept = settings.kept
    weights = [side.weight_hh for layer in network.layers for side in layer]
    kept.begin(weights, follows=settings.follow_weights)
    if not kept.updates:
        for number in range(settings.warmup):
            estimate(work._replace(seed=work.seed + (number + 1) * FRESH_NOISE % 2**63))
    result = estimate(work)
    kept.updates += 1
    return result
