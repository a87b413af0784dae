"""Rules: from the rollouts of one layer to an estimate of its adjoint, a class each.

    np      lam_t = mean_p c_t xi_t / sigma^2                     node perturbation
    anp     lam_t = mean_p c_t H delta_a_t / ||delta_a_t||^2      activity-based node perturbation
    anp-ls  lam_t = argmin sum_p (c_t - lam . delta_a_t)^2        least squares, c_t without the effect of later noise

with c_t = delta_loss_t + discount c_{t+1}. A rule receives the rollouts of a segment of steps block by block, last
segment first, and returns the segment's estimate; it never sees a network. Source: Dalm, van Gerven, Ahmad 2023,
arXiv:2310.00965 (np); Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967 (anp); anp-ls is derived in
`kernels/least_squares.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from anpgpu.kernels.tiles_least_squares import MOST_ROLLOUTS
from anpgpu.registry import BACKENDS, ESTIMATORS, Estimator
from anpgpu.runtime.dispatch import implementation, least_squares_on
from anpgpu.runtime.ranges import entered
from anpgpu.runtime.settings import Settings

from .by_layer import layers_backward, two_directions
from .by_segment import one_direction
from .sweep import Block


class Rule(Estimator):
    """How the rollouts of one layer are credited; an object serves the rollouts of some samples over all segments.

    A new rule overrides `add` and `estimate`; `docs/extending.md` shows how.

    Args:
        settings: the resolved perturbation.
        weight_hh: of the layer, (G H, H), for its size, type and device.
        seed: the noise's key, 0-dim int64.
        finite: rollouts that count, (b, P) bool; the sweep clears entries as rollouts turn out not finite.
    """

    weight_by: str | None = None
    """What multiplies a rollout's credit, "noise" or "activity", if the estimate is a mean of products."""
    backward = staticmethod(layers_backward)

    @staticmethod
    def walk(directions: int) -> Callable[[Any], Any]:
        """Return the walk by segments of time, or, for two directions, which need all of time, the walk by layers."""
        return one_direction if directions == 1 else two_directions

    @classmethod
    def rule(cls, settings: Settings, weight_hh: Tensor, seed: Tensor, finite: Tensor) -> Rule:
        """Return a rule for the rollouts of some samples."""
        return cls(settings, weight_hh, seed, finite)

    def __init__(self, settings: Settings, weight_hh: Tensor, seed: Tensor, finite: Tensor) -> None:
        self.settings, self.seed, self.finite = settings, seed, finite
        self.units = weight_hh.shape[1]
        self.like = weight_hh
        self.sums: Tensor | None = None
        self.ridge_grown: Tensor | None = None
        """Number of systems whose ridge had to grow, 0-dim int64; None without systems."""

    @functools.cached_property
    def carry(self) -> Tensor:
        """The return of the step after the segment, (b, P): zero at first."""
        return self.like.new_zeros(self.finite.shape)

    @property
    def fused(self) -> bool:
        """Whether the backend's `rollout_adjoint` replaces `add`: each step is then credited with its own loss."""
        settings = self.settings
        direct = self.weight_by is not None and settings.discount == 0 and not settings.baseline
        return direct and BACKENDS[settings.backend].fuses

    def add(self, block: Block, delta_loss: Tensor, delta_a: Tensor | None) -> None:
        """Take a block of rollouts of a segment.

        Args:
            block: which rollouts, and their counters.
            delta_loss: loss differences, (L, b, p); zero where a rollout does not count.
            delta_a: activity differences, (L, b, p, H), where the rule stores them.
        """
        raise NotImplementedError

    def add_sums(self, sums: Tensor) -> None:
        """Add the sums over a block's rollouts, (parts, L, b, H)."""
        self.sums = sums if self.sums is None else self.sums.add_(sums)

    def add_grown(self, number: Tensor) -> None:
        """Count systems whose ridge had to grow."""
        self.ridge_grown = number if self.ridge_grown is None else self.ridge_grown + number

    def estimate(self, counts: Tensor) -> Tensor:
        """Return the segment's estimate in parts, (parts, L, b, H), and clear the sums for the next segment.

        Args:
            counts: number of rollouts that count per sample, over all processes, (b,).
        """
        raise NotImplementedError

    def taken(self) -> Tensor:
        """Return the sums of the segment, and clear them."""
        sums, self.sums = self.sums, None
        assert sums is not None  # noqa: S101  (for the type checker; there is at least one block)
        return sums


class MeanOfProducts(Rule):
    """A rule whose estimate is the mean over rollouts of credit c_p times a factor f_p, from noise or activity.

    `baseline` subtracts the mean credit of the other rollouts. By
    sum_p (c_p - mean of the other c) f_p / n = (sum_p c_p f_p - mean c sum_p f_p) / (n - 1) blocks need only be summed.
    """

    def __init__(self, settings: Settings, weight_hh: Tensor, seed: Tensor, finite: Tensor) -> None:
        super().__init__(settings, weight_hh, seed, finite)
        self.carries: dict[int, Tensor] = {}
        """The return of the step after the segment, (b, p), by the first rollout of a block."""
        self.total: Tensor | None = None
        """sum_p c_p, (L, b)."""
        self.unit_sums: Tensor | None = None
        """sum_p f_p, (parts, L, b, H)."""

    def add(self, block: Block, delta_loss: Tensor, delta_a: Tensor | None) -> None:
        """Add credit times noise or activity."""
        with entered("returns"):
            credit = implementation("returns", self.settings.backend)(
                delta_loss, self.settings.discount, carry=self.carries.get(block.rollouts.start)
            )
        if block.counters.time:
            # A segment before this one needs it.
            self.carries[block.rollouts.start] = credit[0].clone()
        self.add_sums(self._products(credit, block, delta_a))
        if self.settings.baseline:
            total = credit.sum(-1)
            self.total = total if self.total is None else self.total.add_(total)
            counted = self.finite[:, block.rollouts].to(credit.dtype).expand_as(credit)
            sums = self._products(counted, block, delta_a)
            self.unit_sums = sums if self.unit_sums is None else self.unit_sums.add_(sums)

    def _products(self, credit: Tensor, block: Block, delta_a: Tensor | None) -> Tensor:
        with entered("adjoint"):
            sums: Tensor = implementation("adjoint", self.settings.backend)(
                credit,
                delta_a,
                self.seed,
                weight_by=self.weight_by,
                units=self.units,
                options=block.options,
                counters=block.counters,
            )
        return sums

    def estimate(self, counts: Tensor) -> Tensor:
        """Return the mean."""
        sums = self.taken()
        if self.total is None or self.unit_sums is None:
            return sums.div_(counts.view(1, 1, -1, 1))
        sums -= (self.total / counts).unsqueeze(-1) * self.unit_sums
        self.total = self.unit_sums = None
        return sums.div_((counts - 1).clamp(min=1).view(1, 1, -1, 1))


@ESTIMATORS.add("anp")
class ActivityNodePerturbation(MeanOfProducts):
    """Activity-based node perturbation: lower variance than np at the lowest cost, but biased."""

    weight_by = "activity"


@ESTIMATORS.add("np")
class NodePerturbation(MeanOfProducts):
    """Node perturbation: unbiased at discount 1 for small sigma; the noise is regenerated, not stored."""

    weight_by = "noise"
    stores_delta = False


@ESTIMATORS.add("anp-ls")
class LeastSquares(Rule):
    """Ridge regression of the return on the activity differences, with the effect of later noise removed."""

    whole_samples = True
    halves_on_demand = True
    parts = 3
    handed: Tensor | None = None
    """What the steps after the segment hand back along an LSTM's c, (b, H)."""

    @classmethod
    def extra_floats(cls, rollouts: int, hidden: int, gates: int = 1) -> int:
        """Return the floats of a copy of delta_a and the Gram matrix and its factor, or P x P noise products."""
        del gates
        products = rollouts**2 if rollouts <= MOST_ROLLOUTS else 0
        return rollouts * hidden + max(2 * min(rollouts, hidden) ** 2, products)

    @classmethod
    def cost(cls, rollouts: int, hidden: int) -> float:
        """Return P rollouts, plus m H each for the Gram products, m = min(P, H), plus m^3 / 6 for the factor."""
        side = min(rollouts, hidden)
        return rollouts * (1 + side / hidden) + side**3 / (6 * hidden**2)

    def add(self, block: Block, delta_loss: Tensor, delta_a: Tensor | None) -> None:
        """Solve the regression; the block holds all rollouts of its samples."""
        settings = self.settings
        assert delta_a is not None  # noqa: S101  (for the type checker; the rule stores it)
        if block.path is not None and self.handed is None:
            self.handed = self.carry.new_zeros((len(self.finite), self.units))
        carry = self.carry
        with entered("least_squares"):
            sums, self.carry, grown = least_squares_on(settings.backend)(
                delta_loss,
                delta_a,
                carry,
                self.seed,
                finite=self.finite,
                discount=settings.discount,
                ridge=settings.ridge,
                baseline=settings.baseline,
                options=block.options,
                counters=block.counters,
                halves=settings.parts > 1,
                path=block.path,
                handed=self.handed,
            )
        self.add_sums(sums)
        self.add_grown(grown)

    def estimate(self, counts: Tensor) -> Tensor:
        """Return the solution, which is not divided by counts."""
        del counts
        return self.taken()
