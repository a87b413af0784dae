"""`estimate_grad_` for networks of one direction: time segments outside, layers inside, last segment first.

Nothing of size (T, B, H) is kept once time is cut: clean states, too, are run again from checkpoints.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .division import Division, Shape, divided, gram_floats, needed_bytes, one_after_another, segments_of
from .job import BlackBoxChange, CleanChunk, Found, Job, draw_masks, keep_final
from .kernels.loss import LinearLoss, Loss
from .layers import CleanRun, preactivations
from .readout import perturb_readout
from .sweep import Chunk, Sweep


def one_direction(job: Job) -> Found:
    """Estimate all gradients of a network of one direction."""
    problem, settings = job.problem, job.settings
    time, batch, features = problem.inputs.shape
    layers = len(problem.network.layers)
    shape = Shape(
        time=time,
        batch=batch,
        rollouts=settings.share.most,
        hidden=problem.network.hidden_size,
        outputs=problem.outputs_size if problem.loss.black_box or job.perturb_readout else 0,
        stores_delta_a=settings.method != "np",
        gram_floats=gram_floats(settings.method, settings.share.most, problem.network.hidden_size),
        clean_floats=3 * layers * problem.network.hidden_size + 2 * features + 4 * problem.outputs_size,
        layers=layers,
        itemsize=problem.inputs.element_size(),
    )
    masks = draw_masks(problem)
    work = functools.partial(_all_chunks, job.agreed(*masks), masks, shape)
    return divided(shape, job.max_memory, problem.inputs.device, work, alone=settings.share.alone)


def _all_chunks(job: Job, masks: tuple[Tensor, ...], shape: Shape, division: Division) -> Found:
    """Do all of the work, divided like that."""
    job = job._replace(max_memory=min(job.max_memory, needed_bytes(shape, division)))
    found = Found(job.problem, job.settings.parts)
    segments = segments_of(shape.time, division)
    own = job.settings.share.samples(shape.batch)
    for first in range(own.start, own.stop, max(division.samples, 1)):
        samples = slice(first, min(first + division.samples, own.stop))
        _ChunkOfSamples(job, found, division, segments, samples, masks).estimate()
    found.sum_(job.settings.share)
    return found


class _ChunkOfSamples:
    """The work on one chunk of samples."""

    def __init__(
        self,
        job: Job,
        found: Found,
        division: Division,
        segments: list[slice],
        samples: slice,
        masks: tuple[Tensor, ...],
    ) -> None:
        self.job, self.problem, self.loss = job, job.problem, job.problem.loss
        self.found, self.segments, self.samples = found, segments, samples
        self.outputs = found.outputs[:, samples]
        self.clean = CleanChunk(self.problem, samples, len(segments), masks)
        self.sweeps = [
            Sweep(layer[0].weight_hh, job.seed, job.settings, Chunk(samples, number), division)
            for number, layer in enumerate(self.problem.network.layers)
        ]
        self.top = self.sweeps[-1]
        self.change: BlackBoxChange | None = None
        self.measured: Tensor | None = None

    def estimate(self) -> None:
        """Run everything and add it to what has been found."""
        self._clean_pass()
        gradient_o = None
        if self.job.perturb_readout and self.problem.weight_o is not None:
            job = self.job
            gradient_o = perturb_readout(
                self.problem, self.outputs, job.settings, job.seed, self.samples, job.max_memory
            )
        # After the readout's rollouts, which need as much memory again.
        if self.loss.black_box:
            self._measure()
        if self.top.segmented:
            for sweep in self.sweeps:
                sweep.check()
        for steps in one_after_another(reversed(self.segments), self.outputs.device):
            run = self.clean.run(steps)
            if self.problem.weight_o is not None:
                here = self.outputs[steps]
                exact = (
                    self.loss.output_gradient(here, steps, self.samples) if gradient_o is None else gradient_o[steps]
                )
                self.found.add_readout(exact, run.outputs)
            self._credit(run, steps)
        for sweep in self.sweeps:
            self.found.skipped += sweep.skipped
            self.found.ridge_grown += sweep.ridge_grown

    def _spec(self, steps: slice) -> Loss:
        return self.loss.spec(self.problem.weight_o, self.outputs[steps], steps, self.samples, False, None)

    def _clean_pass(self) -> None:
        """Run the network; where time is cut and the loss is ours, take the rollouts along."""
        last = self.loss.last_step[self.samples]
        for steps in one_after_another(self.segments, self.outputs.device):
            run = self.clean.run(steps)
            self.outputs[steps] = self.problem.read(run.outputs)
            keep_final(self.found.h_n[:, self.samples], run, steps, last)
            if self.loss.black_box:
                continue
            self.found.loss += self.loss.values(self.outputs[steps], steps, self.samples).sum()
            if self.top.segmented:
                for block in self.top.blocks:
                    self._advance(run, steps, block)

    def _measure(self) -> None:
        """Have the caller measure the clean run and, where time is cut, the rollouts, a block at a time."""
        self.change = BlackBoxChange(self.problem, self.outputs, self.samples)
        self.found.loss += self.change.clean.sum()
        if not self.top.segmented:
            return
        parts = []
        for block in self.top.blocks:
            ordered = one_after_another(self.segments, self.outputs.device)
            moves = [self._advance(self.clean.run(steps), steps, block) for steps in ordered]
            parts.append(self.change.of(torch.cat([move for move in moves if move is not None])))
        self.measured = torch.cat(parts, dim=-1)
        self.top.finite &= torch.isfinite(self.measured).all(0)

    def _advance(self, run: CleanRun, steps: slice, block: slice) -> Tensor | None:
        """Take a block of every layer's rollouts through a segment; return the last layer's delta_o of a black box."""
        delta_o = None
        for number, sweep in enumerate(self.sweeps):
            one = run.layers[number][0]
            preact = preactivations(self.problem.network.layers[number][0], one.inputs, one.states)
            loss = self._spec(steps) if sweep is self.top else None
            delta_o = sweep.advance(block, steps, preact, one.states[1:], loss).delta_o
        return delta_o

    def _credit(self, run: CleanRun, steps: slice) -> None:
        """Credit a segment, last layer first; every lower layer answers to the gradient of its outputs."""
        above: Tensor | None = None
        for number in range(len(self.sweeps) - 1, -1, -1):
            one, weights = run.layers[number][0], self.problem.network.layers[number][0]
            loss: Loss | None = LinearLoss(above) if above is not None else self._spec(steps)
            known = self.measured[steps] if self.measured is not None and above is None else None
            halves = self.sweeps[number].credit(
                steps,
                preactivations(weights, one.inputs, one.states),
                one.states[1:],
                loss if known is None else None,
                measured=known,
                measure=self.change.of if self.change is not None and above is None else None,
            )
            self.found.layers[number].add(halves, one.inputs, one.states[:-1])
            adjoint = halves.sum(0)
            above = adjoint @ weights.weight_ih
            if number:
                # The layer below answers to what all rollouts of this one say.
                self.job.settings.share.complete_(above)
            mask = run.masks[number]
            above = above if mask is None else above * mask
            if steps.start == 0:
                self.found.h_0[number, self.samples] = adjoint[0] @ weights.weight_hh
            if not number:
                self.found.inputs[steps, self.samples] = above
