"""The walk by segments, for networks of one direction: segments of time in the outer loop, last first, layers inside.

With more than one segment nothing of size (T, B, H) is stored: clean states, too, are recomputed from checkpoints.
"""

from __future__ import annotations

import functools
from itertools import repeat

import torch
from torch import Tensor

from anpgpu.kernels.loss import LinearLoss, Loss, OutputsOnly
from anpgpu.network.checkpoints import CheckpointedRun, keep_final
from anpgpu.network.stack import CleanRun
from anpgpu.runtime.memory import Division, Shape, one_after_another, segments_of, within_memory
from anpgpu.task.losses import AtOutputs

from .found import FoundOfProblem
from .job import BlackBoxChange, Extent, Job, draw_masks
from .readout import perturb_readout
from .sweep import Chunk, Sweep


def one_direction(job: Job) -> FoundOfProblem:
    """Estimate all gradients of a network of one direction."""
    problem, settings = job.problem, job.settings
    time, batch, features = problem.inputs.shape
    layers, hidden = len(problem.network.layers), problem.network.hidden_size
    shape = settings.shape(
        time=time,
        batch=batch,
        hidden=hidden,
        itemsize=problem.inputs.element_size(),
        outputs=problem.outputs_size if problem.loss.black_box or job.perturb_readout else 0,
        clean_floats=3 * layers * hidden + 2 * features + 4 * problem.outputs_size * problem.loss.rows_per_output,
        layers=layers,
        at_once=problem.loss.black_box,
    )
    masks = draw_masks(problem)
    job = job.agreed(*masks)
    work = functools.partial(_estimate, job, masks, shape)
    result = within_memory(shape, job.max_memory, problem.inputs.device, work, alone=settings.share.alone)
    for learner in result.learners:
        learner.commit()
    return result


def _estimate(job: Job, masks: tuple[Tensor, ...], shape: Shape, division: Division) -> FoundOfProblem:
    """Estimate all gradients by a division."""
    job = job._replace(max_memory=min(job.max_memory, shape.needed_bytes(division)))
    result = FoundOfProblem(job.problem, job.settings)
    segments = segments_of(shape.time, division)
    own = job.settings.share.samples(shape.batch)
    if job.settings.estimator.keeps_state:
        extent = Extent(shape.time, shape.batch, job.problem.lengths)
        result.learners = [
            job.settings.estimator.new_learner(job.settings, number, layer[0].weight_hh, extent)
            for number, layer in enumerate(job.problem.network.layers)
        ]
    for first in range(own.start, own.stop, max(division.samples, 1)):
        samples = slice(first, min(first + division.samples, own.stop))
        chunk = _ChunkOfSamples(job, result, division, segments, samples, masks)
        chunk.prepare()
        for steps in one_after_another(reversed(segments), job.problem.inputs.device):
            chunk.credit(steps)
        chunk.count()
    result.sum_(job.settings.share)
    return result


class _ChunkOfSamples:
    """The rollouts of all layers for one chunk of samples."""

    def __init__(
        self,
        job: Job,
        result: FoundOfProblem,
        division: Division,
        segments: list[slice],
        samples: slice,
        masks: tuple[Tensor, ...],
    ) -> None:
        self.job, self.problem, self.loss = job, job.problem, job.problem.loss
        self.result, self.segments, self.samples = result, segments, samples
        self.outputs = job.problem.inputs.new_empty(0)
        """Clean outputs, (T, b, O), once they are there."""
        self.clean = CheckpointedRun(
            self.problem.network,
            self.problem.inputs[:, samples],
            self.problem.h_0[:, samples],
            None if self.problem.lengths is None else self.problem.lengths[samples],
            keep=len(segments) == 1,
            masks=tuple(mask[:, samples] for mask in masks),
        )
        self.sweeps = [
            Sweep(
                layer[0].weight_hh,
                job.seed,
                job.settings,
                job.problem.network.cell,
                Chunk(samples, number),
                division,
                learner,
            )
            for (number, layer), learner in zip(
                enumerate(self.problem.network.layers), result.learners or repeat(None), strict=False
            )
        ]
        self.top = self.sweeps[-1]
        self.reads = job.problem.weight_o is not None and not job.perturb_readout
        """Whether the readout's gradient is the loss's at the clean outputs."""
        self.at: AtOutputs | None = None
        """The loss at the clean outputs, where there is one segment."""
        self.gradient_o: Tensor | None = None
        """The estimate of dL/do, (T, b, O), if the readout is perturbed."""
        self.change: BlackBoxChange | None = None
        self.measured: Tensor | None = None

    def prepare(self) -> None:
        """Run the clean network, and, if time is cut, all rollouts through time; perturb the readout."""
        self._clean_pass()
        job = self.job
        if job.perturb_readout and self.problem.weight_o is not None:
            self.gradient_o = perturb_readout(
                self.problem, self.outputs, job.settings, job.seed, self.samples, job.max_memory
            )
        # Only now, because the readout's rollouts need as much memory as this.
        if self.loss.black_box:
            self._measure()
        if self.top.segmented:
            for sweep in self.sweeps:
                sweep.check()

    def count(self) -> None:
        """Add the counts of skipped rollouts and of systems with a grown ridge."""
        for sweep in self.sweeps:
            self.result.count(sweep.skipped, sweep.ridge_grown)

    def _at(self, steps: slice, *, gradient: bool) -> AtOutputs:
        """Return the loss at the clean outputs of a segment; that of a single one is kept."""
        alone = not self.top.segmented
        at = self.loss.at(
            self.outputs[steps],
            steps,
            self.samples,
            backend=self.job.settings.backend,
            gradient=self.reads and (gradient or alone),
        )
        self.at = at if alone else None
        return at

    def _clean_pass(self) -> None:
        """Run the clean network and, if time is cut, the rollouts of a loss that kernels compute, next to it."""
        result, samples, time = self.result, self.samples, len(self.problem.inputs)
        for steps in one_after_another(self.segments, self.problem.inputs.device):
            run = self.clean.segment(steps)
            result.place("outputs", self.problem.read(run.outputs), steps, samples)
            self.outputs = result.outputs[:, samples]
            if self.problem.lengths is not None:
                keep_final(result.h_n[:, samples], run, steps, self.loss.last_step[samples])
            elif steps.stop == time:
                result.place("h_n", run.h_n, slice(None), samples)
            if self.loss.black_box:
                continue
            at = self._at(steps, gradient=False)
            result.add("loss", at.total)
            if self.top.segmented:
                spec = at.spec(self.problem.weight_o)
                for block in self.top.blocks:
                    self._advance(run, steps, block, spec)

    def _measure(self) -> None:
        """Have the caller measure the clean run and, where time is cut, the rollouts, a block at a time."""
        self.change = BlackBoxChange(self.problem, self.outputs, self.samples, self.job.settings)
        self.result.add("loss", self.change.clean.sum())
        if not self.top.segmented:
            return
        blocks, spec = [], OutputsOnly(self.problem.weight_o)
        for block in self.top.blocks:
            ordered = one_after_another(self.segments, self.outputs.device)
            moves = [self._advance(self.clean.segment(steps), steps, block, spec) for steps in ordered]
            blocks.append(self.change.of(torch.cat([move for move in moves if move is not None])))
        self.measured = torch.cat(blocks, dim=-1)
        self.top.finite &= torch.isfinite(self.measured).all(0)

    def _advance(self, run: CleanRun, steps: slice, block: slice, spec: Loss) -> Tensor | None:
        """Run a block of each layer's rollouts through a segment; return the last layer's delta_o for a black box.

        spec: the last layer's loss in this segment.
        """
        delta_o = None
        network = self.problem.network
        for sweep, (weights,), (layer,) in zip(self.sweeps, network.layers, run.layers, strict=True):
            preact = network.cell.preactivations(weights, layer)
            loss = spec if sweep is self.top else None
            delta_o = sweep.advance(block, steps, preact, layer.states[1:], loss).delta_o
        return delta_o

    def credit(self, steps: slice) -> None:
        """Credit a segment, last layer first; the loss of a lower layer is linear, from its output gradient."""
        result, cell = self.result, self.problem.network.cell
        run = self.clean.segment(steps)
        at = self._at(steps, gradient=True) if self.at is None else self.at
        spec = at.spec(self.problem.weight_o)
        self._credit_readout(run, steps, at)
        above: Tensor | None = self.outputs
        for number in range(len(self.sweeps) - 1, -1, -1):
            (layer,), (weights,) = run.layers[number], self.problem.network.layers[number]
            top = self.sweeps[number] is self.top
            assert above is not None  # noqa: S101  (for the type checker; only the lowest layer hands nothing down)
            loss = spec if top else LinearLoss(above)
            known = self.measured[steps] if top and self.measured is not None else None
            parts = self.sweeps[number].credit(
                steps,
                cell.preactivations(weights, layer),
                layer.states[1:],
                loss if known is None else None,
                measured=known,
                measure=self.change.of if top and self.change is not None else None,
                gradient=functools.partial(self._measured_gradient, steps) if top and self.change is not None else None,
            )
            start = self.job.of_h_0 and not steps.start
            hands_down = number > 0 or self.job.of_inputs
            above, d_start = result.credit(number, parts, weights, layer, inputs=hands_down, start=start)
            if number and above is not None:
                # The layer below needs the sum over all processes' rollouts of this layer.
                self.job.settings.share.complete_(above)
            mask = run.masks[number]
            above = above if mask is None or above is None else above * mask
            if d_start is not None:
                result.place("h_0", d_start.unsqueeze(0), slice(number, number + 1), self.samples)
        if above is not None:
            result.place("inputs", above, steps, self.samples)

    def _measured_gradient(self, steps: slice) -> Tensor:
        """Return dL/dh of a segment from a black box's measured dL/do."""
        assert self.change is not None  # noqa: S101  (for the type checker; only a black box is asked)
        gradient = self.change.output_gradient[steps]
        return gradient if self.problem.weight_o is None else gradient @ self.problem.weight_o

    def _credit_readout(self, run: CleanRun, steps: slice, at: AtOutputs) -> None:
        """Add the readout's gradient of a segment."""
        if self.problem.weight_o is None:
            return
        gradient = at.gradient if self.gradient_o is None else self.gradient_o[steps]
        self.result.add_readout(gradient, run.outputs)
