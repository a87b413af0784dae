"""The rollouts of one layer and direction for some samples, in blocks of rollouts and segments of time.

With one segment the rollouts run once. With several, `advance` first takes them through time and stores their
deviations at segment starts; then `credit` repeats each segment, last first. A rule (`rules.py`) turns blocks of
rollouts into an estimate of the adjoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.feedback import Known
from anpgpu.kernels.least_squares import Path
from anpgpu.kernels.loss import Loss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import Rollout, RolloutOptions
from anpgpu.kernels.scratch import give_back
from anpgpu.network.cells import Cell
from anpgpu.runtime.dispatch import implementation, marks_on
from anpgpu.runtime.memory import Division
from anpgpu.runtime.ranges import entered
from anpgpu.runtime.settings import Settings

from .found import raise_if_lost


class Chunk(NamedTuple):
    """The samples of a sweep, and their layer in the noise counters."""

    samples: slice
    layer: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.samples.stop - self.samples.start)


class Block(NamedTuple):
    """Some rollouts of all samples of a chunk, over a segment of steps."""

    rollouts: slice
    options: RolloutOptions
    counters: Counters
    """Counters of the first step, sample and rollout."""
    path: Path | None = None
    """Of an LSTM's c in the segment."""


class Sweep:
    """The rollouts of one layer and direction for one chunk of samples.

    Args:
        weight_hh: (G H, H), in the working type.
        seed: 0-dim int64 tensor.
        settings: the resolved perturbation, whose estimator is a rule.
        cell: of the layer.
        chunk: which samples, of which layer.
        division: number of rollouts at a time, and of segments.
        learner: what the layer learns in this update; None where the estimator keeps no state.
    """

    def __init__(
        self,
        weight_hh: Tensor,
        seed: Tensor,
        settings: Settings,
        cell: type[Cell],
        chunk: Chunk,
        division: Division,
        learner: Any = None,
    ) -> None:
        self.weight_hh, self.seed, self.settings, self.chunk = weight_hh, seed, settings, chunk
        self.cell, self.units = cell, weight_hh.shape[1]
        self.handed: Tensor | None = None
        """What the segment after hands back along the path, (parts, b, H)."""
        total = settings.options.rollouts
        step = division.rollouts
        self.blocks = [slice(first, min(first + step, total)) for first in range(0, total, step)]
        self.segmented = division.segments > 1
        self.starts: dict[int, Tensor] = {}
        self.finite = torch.empty((chunk.size, total), dtype=torch.bool, device=weight_hh.device)
        """Which rollouts count; those of a block once it has run."""
        self.counts: Tensor | None = None
        self.rollout = implementation("rollout", settings.backend)
        self.mark = marks_on(settings.backend)
        self.rule = settings.estimator.rule(settings, weight_hh, seed, self.finite)
        self.learner = learner

    def _block(self, rollouts: slice, time: int, *, store: bool) -> Block:
        counters = Counters(
            layer=self.chunk.layer,
            time=time,
            rollout=self.settings.share.own.start + rollouts.start,
            sample=self.chunk.samples.start,
            rank=self.settings.process_rank,
        )
        options = self.settings.options._replace(rollouts=rollouts.stop - rollouts.start, store_delta_a=store)
        return Block(rollouts, options, counters)

    def _start(self, rollouts: slice, time: int) -> Tensor | None:
        return self.starts[time][:, rollouts] if time else None

    def advance(self, rollouts: slice, steps: slice, preact: Tensor, hidden: Tensor, loss: Loss | None) -> Rollout:
        """Run a block of rollouts through a segment and store their deviations at its end."""
        block = self._block(rollouts, steps.start, store=False)
        with entered("rollout"):
            moved: Rollout = self.rollout(
                preact,
                hidden,
                self.weight_hh,
                loss,
                self.seed,
                options=block.options,
                counters=block.counters,
                delta_h0=self._start(rollouts, steps.start),
            )
        if steps.stop not in self.starts:
            shape = (self.chunk.size, self.settings.options.rollouts, hidden.shape[-1])
            self.starts[steps.stop] = self.weight_hh.new_empty(shape)
        self.starts[steps.stop][:, rollouts] = moved.delta_h
        self.mark(self.finite[:, rollouts], moved.delta_loss, moved.delta_h, first=not steps.start)
        return moved

    def check(self) -> None:
        """Count the finite rollouts of each sample over all processes; raise if a sample has none."""
        self.counts = self.settings.share.counted(self.finite)
        raise_if_lost(self.counts, self.chunk.samples.start, self.settings.options.sigma)

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
        gradient: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Run a segment's rollouts and return its adjoint estimate.

        Args:
            steps: the segment.
            preact: its clean pre-activations, (L, B, H).
            hidden: its clean states, (L, B, H).
            loss: the layer's loss in this segment; None where `measured` is given.
            measured: loss differences of the segment, (L, B, P), if they are already known.
            measure: turns delta_o into loss differences, for a black-box loss.
            trust: samples, (B,) bool, whose rollouts count even if not finite, because the incoming gradient is not.
            gradient: returns dL/dh of each step's own loss, (L, B, H), for a black-box loss; called once measured.

        Returns:
            Parts that sum to the estimate, (parts, L, B, S); see `registry.Estimator.parts`.
        """
        path = self._path(preact, hidden, loss)
        fused = self.rule.fused and loss is not None and loss.measured
        for rollouts in self.blocks:
            start = self._start(rollouts, steps.start)
            if fused:
                self._credit_fused(self._block(rollouts, steps.start, store=False), preact, hidden, loss, start)
                continue
            block = self._block(rollouts, steps.start, store=self.settings.estimator.stores_delta)
            with entered("rollout"):
                moved: Rollout = self.rollout(
                    preact,
                    hidden,
                    self.weight_hh,
                    loss,
                    self.seed,
                    options=block.options,
                    counters=block.counters,
                    delta_h0=start,
                )
            delta_loss = moved.delta_loss if measured is None else measured[..., rollouts]
            if measure is not None and moved.delta_o is not None:
                delta_loss = measure(moved.delta_o)
            assert delta_loss is not None  # noqa: S101  (for the type checker; somebody measured)
            if self.segmented:
                delta_loss = torch.where(self.finite[:, rollouts], delta_loss, 0)
            else:
                delta_loss = self.mark(self.finite[:, rollouts], delta_loss, moved.delta_h, first=True, trust=trust)
            activity = moved.delta_a
            if path is not None:
                # Regressed and averaged is h alone.
                delta_c = None if activity is None else activity[..., self.units :]
                block = block._replace(path=path._replace(deviation=delta_c))
                activity = None if activity is None else activity[..., : self.units]
            if self.learner is not None:
                # A loss or its gradient is given.
                of_loss: Any = gradient or getattr(loss, "state_gradient", None)
                slope = self.settings.options.cell.slope_of(preact, hidden)
                recurrence = self.cell.recurrence(preact, hidden, self.settings.discount)
                self.rule.expect(self.learner, Known(slope, of_loss()[..., : self.units], recurrence))
            self.rule.add(block, delta_loss, activity)
            give_back(moved.delta_a)
        if not self.segmented:
            self.check()
        parts: Tensor = self.rule.estimate(self.counts)
        return parts if path is None else self._with_path(parts, path)

    def _path(self, preact: Tensor, states: Tensor, loss: Loss | None) -> Path | None:
        """Return the path of a segment, with the part of dL/d(h, c), (L, B, S), that arrives at c."""
        if self.settings.options.cell.states == 1:
            return None
        path = self.cell.path(preact, states, self.settings.discount)
        grad = None if loss is None else loss.grad
        if path is None or grad is None or grad.shape[-1] == self.units:
            return path
        return path._replace(grad=grad[..., self.units :])

    def _with_path(self, parts: Tensor, path: Path) -> Tensor:
        """Return the estimates of dL/dh and of dL/dc that follow, (parts, L, B, 2 H), from (parts, L, B, H)."""
        if self.handed is None:
            self.handed = torch.zeros_like(parts[:, 0])
        whole = parts.new_empty((*parts.shape[:-1], 2 * self.units))
        whole[..., : self.units] = parts
        # The even and the odd rollouts' parts get half each of what no rollout measured; of processes that share the
        # rollouts one counts it.
        share = self.settings.share
        halves = parts.new_zeros((len(parts), 1, 1))
        halves[:2] = 1 / min(len(parts), 2) if share.by_samples or share.index == 0 else 0.0
        for step in range(parts.shape[1] - 1, -1, -1):
            whole[:, step, :, self.units :] = path.hand_back_(step, parts[:, step], self.handed, halves)
        return whole

    def _credit_fused(
        self, block: Block, preact: Tensor, hidden: Tensor, loss: Loss | None, start: Tensor | None
    ) -> None:
        """Run and credit a block in one kernel, where each step is credited with its own loss; stores no activity."""
        with entered("rollout_adjoint"):
            sums, delta_loss, delta_h = implementation("rollout_adjoint", self.settings.backend)(
                preact,
                hidden,
                self.weight_hh,
                loss,
                self.seed,
                weight_by=self.rule.weight_by,
                options=block.options,
                counters=block.counters,
                delta_h0=start,
                finite=self.finite[:, block.rollouts] if self.segmented else None,
            )
        self.mark(self.finite[:, block.rollouts], delta_loss, delta_h, first=not self.segmented)
        self.rule.add_sums(sums)

    @property
    def skipped(self) -> Tensor:
        """Number of rollouts left out so far, 0-dim int64 on the rollouts' device."""
        return (~self.finite).sum()

    @property
    def ridge_grown(self) -> Tensor | None:
        """Number of systems whose ridge had to grow so far, see `Estimate`; None without systems."""
        grown: Tensor | None = self.rule.ridge_grown
        return grown
