"""Rollouts of one layer, divided as memory allows, credited backwards in time: from a loss to the adjoint.

The segments of DESIGN's memory model are run here. With one segment the rollouts run once; with more, `advance` takes
them through time first and keeps their deviations at segment starts, then `credit` repeats each segment, last first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import implementation
from .division import Division, one_after_another, segments_of
from .kernels.loss import LinearLoss, Loss, OutputsOnly
from .kernels.noise import Counters
from .kernels.rollout import Rollout, RolloutOptions
from .kernels.scratch import give_back
from .layers import GradientSums, LayerRun, LayerWeights, preactivations
from .least_squares import least_squares
from .settings import WEIGHT_BY, Settings

LossOf = Callable[[slice, slice], Loss]
"""Gives a layer's loss for some steps (in processing order) of some samples."""


class Chunk(NamedTuple):
    """The samples a sweep takes, and where they stand in the counter space."""

    samples: slice
    layer: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.samples.stop - self.samples.start)


class NonFiniteRolloutsError(RuntimeError):
    """No rollout of some sample stayed finite, so there is nothing to estimate its gradient from."""


def raise_if_lost(finite: Tensor, first_sample: int, sigma: float) -> None:
    """Raise where no rollout of a sample is finite, given (b, P) bool.

    On CUDA the estimate becomes NaN instead, since looking would make the host wait.
    """
    if finite.is_cuda:
        return
    lost = (~finite.any(1)).nonzero().flatten() + first_sample
    if len(lost):
        raise NonFiniteRolloutsError(
            f"every rollout of sample {', '.join(map(str, lost[:8].tolist()))} is not finite ({len(lost)} such "
            f"samples, sigma={sigma!r}): look for NaN or inf in inputs and weights, or for a state that explodes"
        )


class Sweep:
    """The rollouts of one layer and direction for one chunk of samples."""

    def __init__(self, weight_hh: Tensor, seed: Tensor, settings: Settings, chunk: Chunk, division: Division) -> None:
        self.weight_hh, self.seed, self.settings, self.chunk = weight_hh, seed, settings, chunk
        total = settings.options.rollouts
        step = division.rollouts
        self.blocks = [slice(first, min(first + step, total)) for first in range(0, total, step)]
        self.segmented = division.segments > 1
        self.starts: dict[int, Tensor] = {}
        self.finite = torch.ones((chunk.size, total), dtype=torch.bool, device=weight_hh.device)
        self.counts = self.finite.sum(1)
        self.carry = weight_hh.new_zeros((chunk.size, total))
        self.ridge_grown = torch.zeros((), dtype=torch.int64, device=weight_hh.device)

    def _counters(self, block: slice, time: int) -> Counters:
        return Counters(
            layer=self.chunk.layer,
            time=time,
            rollout=self.settings.share.own.start + block.start,
            sample=self.chunk.samples.start,
            rank=self.settings.process_rank,
        )

    def _options(self, block: slice, *, store: bool) -> RolloutOptions:
        return self.settings.options._replace(rollouts=block.stop - block.start, store_delta_a=store)

    def _start(self, block: slice, time: int) -> Tensor | None:
        return self.starts[time][:, block] if time else None

    def advance(self, block: slice, steps: slice, preact: Tensor, hidden: Tensor, loss: Loss | None) -> Rollout:
        """Take a block of rollouts through a segment and keep their deviations at its end."""
        part: Rollout = implementation("rollout", self.settings.backend)(
            preact,
            hidden,
            self.weight_hh,
            loss,
            self.seed,
            options=self._options(block, store=False),
            counters=self._counters(block, steps.start),
            delta_h0=self._start(block, steps.start),
        )
        if steps.stop not in self.starts:
            shape = (self.chunk.size, self.settings.options.rollouts, self.weight_hh.shape[0])
            self.starts[steps.stop] = self.weight_hh.new_empty(shape)
        self.starts[steps.stop][:, block] = part.delta_h
        self.mark(block, part)
        return part

    def mark(self, block: slice, part: Rollout) -> None:
        """Note which rollouts of a block are not finite."""
        self.finite[:, block] &= torch.isfinite(part.delta_h).all(-1)
        if part.delta_loss is not None:
            self.finite[:, block] &= torch.isfinite(part.delta_loss).all(0)

    def check(self) -> None:
        """Count the finite rollouts of every sample, over all processes; raise where none is left."""
        self.counts = self.settings.share.counted(self.finite)
        raise_if_lost(self.counts.unsqueeze(1) > 0, self.chunk.samples.start, self.settings.options.sigma)

    def credit(
        self,
        steps: slice,
        preact: Tensor,
        hidden: Tensor,
        loss: Loss | None,
        *,
        measured: Tensor | None = None,
        measure: Callable[[Tensor], Tensor] | None = None,
        trust: Tensor | None = None,
    ) -> Tensor:
        """Run a segment's rollouts and return its adjoint estimate.

        Args:
            steps: the segment.
            preact: its clean pre-activations, (L, B, H).
            hidden: its clean states, (L, B, H).
            loss: what its steps lose.
            measured: its loss differences, (L, B, P), where they are known already.
            measure: turns delta_o into loss differences where only the caller can.
            trust: samples, (B,) bool, whose rollouts count even if not finite, since the incoming gradient is not.

        Returns:
            Parts of the estimate, which is their sum over the first dimension: (2, L, B, H), what the even and the odd
            rollouts contribute to the mean over finite rollouts; or (3, L, B, H) as `least_squares` has them.
        """
        settings = self.settings
        length, batch, _ = preact.shape
        sums = unit_credit = None
        total = preact.new_zeros((length, batch))
        for block in self.blocks:
            counters = self._counters(block, steps.start)
            fused = settings.discount == 0 and settings.backend == "triton" and settings.method in {"np", "anp"}
            if fused and not settings.baseline and measured is None and not isinstance(loss, OutputsOnly):
                halves, delta_loss, delta_h = implementation("rollout_adjoint", settings.backend)(
                    preact,
                    hidden,
                    self.weight_hh,
                    loss,
                    self.seed,
                    weight_by=WEIGHT_BY[settings.method],
                    options=self._options(block, store=False),
                    counters=counters,
                    delta_h0=self._start(block, steps.start),
                )
                self.mark(block, Rollout(delta_loss, None, delta_h, None))
                sums = _added(sums, halves)
                continue
            part: Rollout = implementation("rollout", settings.backend)(
                preact,
                hidden,
                self.weight_hh,
                loss,
                self.seed,
                options=self._options(block, store=settings.method != "np"),
                counters=counters,
                delta_h0=self._start(block, steps.start),
            )
            delta_loss = part.delta_loss if measured is None else measured[..., block]
            if measure is not None and part.delta_o is not None:
                delta_loss = measure(part.delta_o)
            if not self.segmented:
                self.mark(block, part._replace(delta_loss=delta_loss))
                if trust is not None:
                    self.finite[:, block] |= trust.unsqueeze(1)
            delta_loss = torch.where(self.finite[:, block], delta_loss, 0)
            if settings.method == "anp-ls" and part.delta_a is not None:
                sums, self.carry, grown = least_squares(
                    delta_loss,
                    part.delta_a,
                    self.carry,
                    self.seed,
                    finite=self.finite,
                    discount=settings.discount,
                    ridge=settings.ridge,
                    baseline=settings.baseline,
                    options=settings.options,
                    backend=settings.backend,
                    counters=counters,
                )
                self.ridge_grown += grown
                give_back(part.delta_a)
                break
            credit = implementation("returns", settings.backend)(
                delta_loss, settings.discount, carry=self.carry[:, block]
            )
            self.carry[:, block] = credit[0]
            sums = _added(sums, self._adjoint(credit, part.delta_a, block, counters))
            if settings.baseline:
                total += credit.sum(-1)
                counted = self.finite[:, block].to(credit.dtype).expand_as(credit)
                unit_credit = _added(unit_credit, self._adjoint(counted, part.delta_a, block, counters))
            give_back(part.delta_a)
        if not self.segmented:
            self.check()
        assert sums is not None  # noqa: S101  (for the type checker; there is at least one block)
        if settings.method == "anp-ls":
            return sums
        if settings.baseline:
            assert unit_credit is not None  # noqa: S101  (for the type checker)
            # sum_p (c_p - mean of the other c) f_p / n = (sum_p c_p f_p - mean c sum_p f_p) / (n - 1): rollouts may
            # come in blocks.
            sums -= (total / self.counts).unsqueeze(-1) * unit_credit
            return sums.div_((self.counts - 1).clamp(min=1).view(1, 1, -1, 1))
        return sums.div_(self.counts.view(1, 1, -1, 1))

    def _adjoint(self, credit: Tensor, delta_a: Tensor | None, block: slice, counters: Counters) -> Tensor:
        sums: Tensor = implementation("adjoint", self.settings.backend)(
            credit,
            delta_a,
            self.seed,
            weight_by=WEIGHT_BY[self.settings.method],
            units=self.weight_hh.shape[0],
            options=self._options(block, store=False),
            counters=counters,
        )
        return sums

    @property
    def skipped(self) -> Tensor:
        """Number of rollouts left out so far, a 0-dim tensor on the rollouts' device."""
        return (~self.finite).sum()


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum so far; the first part becomes it."""
    return part if total is None else total.add_(part)


class LayerEstimate(NamedTuple):
    """What perturbing one layer and direction tells."""

    sums: GradientSums
    inputs: Tensor
    """dL/dx, (T, B, I), in processing order."""
    h_0: Tensor
    """dL/dh_0, (B, H)."""
    skipped: Tensor
    ridge_grown: Tensor


def estimate_layer(
    weights: LayerWeights,
    run: LayerRun,
    loss_of: LossOf,
    seed: Tensor,
    settings: Settings,
    division: Division,
    *,
    layer: int,
    measure: Callable[[Tensor, slice], Tensor] | None = None,
) -> LayerEstimate:
    """Estimate one layer's gradients from its whole clean run; processes that share rollouts all get their sum.

    Args:
        weights: the layer's parameters, in the working type.
        run: its clean activity.
        loss_of: its loss.
        seed: 0-dim int64 tensor.
        settings: the resolved perturbation.
        division: samples, rollouts and segments at a time.
        layer: the layer's number in the counter space.
        measure: for `OutputsOnly` losses: delta_o of a block of all steps, (T, b, p, O), and its samples, to loss
            differences, (T, b, p).
    """
    time, batch, _ = run.inputs.shape
    sums = GradientSums(weights, settings.parts)
    d_inputs = torch.zeros_like(run.inputs)
    d_h_0 = torch.zeros_like(run.states[0])
    skipped = torch.zeros((), dtype=torch.int64, device=seed.device)
    ridge_grown = torch.zeros_like(skipped)
    segments = segments_of(time, division)
    own = settings.share.samples(batch)
    for first in range(own.start, own.stop, max(division.samples, 1)):
        samples = slice(first, min(first + division.samples, own.stop))
        sweep = Sweep(weights.weight_hh, seed, settings, Chunk(samples, layer), division)
        loss = loss_of(slice(0, time), samples)
        trust = ~torch.isfinite(loss.grad).all(-1).all(0) if isinstance(loss, LinearLoss) else None
        measured = _first_pass(sweep, weights, run, segments, loss_of, measure) if sweep.segmented else None
        if sweep.segmented and trust is not None:
            sweep.finite |= trust.unsqueeze(1)
        if sweep.segmented:
            sweep.check()
        for steps in one_after_another(reversed(segments), seed.device):
            inputs, states = _part(run, steps, samples)
            halves = sweep.credit(
                steps,
                preactivations(weights, inputs, states),
                states[1:],
                loss_of(steps, samples) if measured is None else None,
                measured=None if measured is None else measured[steps],
                measure=None if measure is None else _for_samples(measure, samples),
                trust=trust,
            )
            sums.add(halves, inputs, states[:-1])
            adjoint = halves.sum(0)
            d_inputs[steps, samples] = adjoint @ weights.weight_ih
            d_h_0[samples] = adjoint[0] @ weights.weight_hh
        skipped += sweep.skipped
        ridge_grown += sweep.ridge_grown
    settings.share.sum_(sums.weight_ih, sums.weight_hh, sums.bias, d_inputs, d_h_0)
    settings.share.sum_(skipped, ridge_grown)
    return LayerEstimate(sums, d_inputs, d_h_0, skipped, ridge_grown)


def _for_samples(measure: Callable[[Tensor, slice], Tensor], samples: slice) -> Callable[[Tensor], Tensor]:
    return lambda delta_o: measure(delta_o, samples)


def _part(run: LayerRun, steps: slice, samples: slice) -> tuple[Tensor, Tensor]:
    """Return the inputs of some steps, (L, b, I), and the states around them, (L + 1, b, H)."""
    return run.inputs[steps, samples], run.states[steps.start : steps.stop + 1, samples]


def _first_pass(
    sweep: Sweep,
    weights: LayerWeights,
    run: LayerRun,
    segments: list[slice],
    loss_of: LossOf,
    measure: Callable[[Tensor, slice], Tensor] | None,
) -> Tensor | None:
    """Take all rollouts through time; return loss differences, (T, b, P), where only the caller can measure them."""
    samples = sweep.chunk.samples
    measured = []
    for block in sweep.blocks:
        deviations = []
        for steps in one_after_another(segments, run.inputs.device):
            inputs, states = _part(run, steps, samples)
            preact = preactivations(weights, inputs, states)
            part = sweep.advance(block, steps, preact, states[1:], loss_of(steps, samples))
            if part.delta_o is not None:
                deviations.append(part.delta_o)
        if measure is not None:
            delta_loss = measure(torch.cat(deviations), samples)
            sweep.finite[:, block] &= torch.isfinite(delta_loss).all(0)
            measured.append(delta_loss)
    return torch.cat(measured, dim=-1) if measured else None
