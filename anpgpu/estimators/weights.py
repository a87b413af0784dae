"""Weight perturbation: noise on the weights, held for the whole sequence, its own for every sample and rollout.

    delta_a_t = W_hh delta_h_{t-1} + W_ih delta_x_t + sigma E z_t,  z_t = (x_t + delta_x_t, h_{t-1} + delta_h_{t-1}, 1)
    dW = sum_b mean_p (sum_t delta_loss_t) E / sigma                [W_ih | W_hh | b], unit-variance E

All layers are perturbed at once; delta_x is the deviation of the layer below. E is dense, (H, I + H + 1), or low-rank,
sum_r u_r v_r^T / sqrt(rank), whose product with z is two small products. A baseline, in torch operations on every
device. Source: the classical weight perturbation estimator (Jabri and Flower 1992) in deviation form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.loss import LinearLoss
from anpgpu.network.checkpoints import CheckpointedRun, keep_final
from anpgpu.network.stack import CleanRun, Network, run_network
from anpgpu.registry import ESTIMATORS, Estimator
from anpgpu.runtime.memory import FIXED_BYTES, Division, segments_of, within_memory
from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem

from .by_layer import Backward
from .found import Found, FoundOfProblem
from .job import BlackBoxChange, Job
from .readout import perturb_readout
from .weight_rollouts import CleanSegment, FinalGradients, estimate_weights


@ESTIMATORS.add("wp")
class WeightPerturbation(Estimator):
    """Weight perturbation: unbiased for small sigma, of high variance."""

    weights_only = True
    discounted = False

    @staticmethod
    def walk(directions: int) -> Callable[[Job], FoundOfProblem]:
        """Return `all_weights`, which serves networks of one and of two directions."""
        del directions
        return all_weights

    @staticmethod
    def backward(backward: Backward) -> Found:
        """`RNN`'s backward pass: from dL/d(outputs) and dL/dh_n to the gradients of all weights."""
        return weights_backward(backward)


class _WeightShape(NamedTuple):
    """Everything that the memory of rollouts with perturbed weights depends on."""

    network: Network
    settings: Settings
    batch: int
    steps: int
    """Steps of a segment."""
    outputs: int
    """Floats stored per step and rollout besides the states."""

    def divide(self, max_memory: int, device_type: str) -> tuple[int, int]:
        """Return the number of samples and of rollouts that fit at a time.

        Raises:
            MemoryError: one rollout of one sample needs more.
        """
        del device_type
        samples, rollouts = max(self.batch, 1), self.settings.share.most
        while True:
            needed = self.needed_bytes((samples, rollouts))
            if needed <= max_memory:
                return samples, rollouts
            if rollouts > 1:
                rollouts = -(-rollouts // 2)
            elif samples > 1:
                samples = -(-samples // 2)
            else:
                raise MemoryError(
                    f"max_memory={max_memory} bytes is too little for weight perturbation with T={self.steps}, "
                    f"H={self.network.hidden_size}, rank={self.settings.rank}: one rollout of one sample needs {needed}"
                )

    def needed_bytes(self, block: tuple[int, ...]) -> int:
        """Return the bytes that a block of samples and rollouts needs."""
        rank = self.settings.rank
        width = self.network.hidden_size * self.network.directions
        noise_floats = 0
        for weights in (weights for layer in self.network.layers for weights in layer):
            units, fan_in = weights.weight_hh.shape[0], weights.weight_ih.shape[1] + weights.weight_hh.shape[1] + 1
            noise_floats += 2 * (units * fan_in if rank is None else rank * (units + fan_in))
        cell = self.settings.options.cell
        floats = self.steps * (3 * cell.states * width + self.outputs) + noise_floats
        # Temporaries of a gated cell's step.
        floats += 6 * (cell.gates - 1) * width
        return FIXED_BYTES + block[0] * block[1] * self.network.layers[0][0].weight_hh.element_size() * floats


def weights_backward(backward: Backward) -> Found:
    """`RNN`'s backward pass: from dL/d(outputs) and dL/dh_n to gradients of all weights; inputs and h_0 get zeros."""
    network, run, settings = backward.network, backward.run, backward.settings
    grad_outputs, grad_h_n, lengths = backward.grad_outputs, backward.grad_h_n, backward.lengths
    time, batch, _ = grad_outputs.shape
    device = grad_outputs.device

    def activity(samples: slice) -> list[CleanSegment]:
        layers = tuple(tuple(side.segment(slice(0, time), samples) for side in layer) for layer in run.layers)
        masks = tuple(None if mask is None else mask[:, samples] for mask in run.masks)
        return [CleanSegment(layers, masks, LinearLoss(grad_outputs[:, samples]))]

    # Made on the device: copied there it would make the host wait, and could not be captured in a CUDA graph.
    last = torch.full((batch,), time - 1, device=device) if lengths is None else (lengths - 1).to(device)
    trust = ~torch.isfinite(grad_outputs).all(-1).all(0)
    if grad_h_n is not None:
        trust |= ~torch.isfinite(grad_h_n).all(-1).all(0)
    estimate = within_memory(
        _WeightShape(network, settings, batch, time, 0),
        backward.max_memory,
        device,
        lambda block: estimate_weights(
            network,
            activity,
            backward.seed,
            settings,
            batch=batch,
            block=block,
            lengths=lengths,
            final=None if grad_h_n is None else FinalGradients(grad_h_n, last),
            trust=trust,
        ),
        alone=settings.share.alone,
    )
    result = backward.found
    result.layers = [side for layer in estimate.sums for side in layer]
    result.skipped = estimate.skipped
    return result


def all_weights(job: Job) -> FoundOfProblem:
    """Estimate the gradients of all weights, perturbing all layers at once, for `estimate_grad_`.

    Raises:
        ValueError: there is dropout between layers.
    """
    if job.problem.dropout is not None:
        raise ValueError(
            "method='wp' in estimate_grad_ does not go with dropout between layers: call rnn.eval(), set "
            "rnn.dropout = 0, or use method='anp' or 'np'"
        )
    job = job.agreed()
    device, work = job.problem.inputs.device, functools.partial(_estimate, job)
    return within_memory(_WholeProblem(job), job.max_memory, device, work, alone=job.settings.share.alone)


class _WholeProblem(NamedTuple):
    """A problem that can be divided into samples, rollouts and segments."""

    job: Job

    def divide(self, max_memory: int, device_type: str) -> Division:
        """Return the fewest segments with which enough rollouts fit to fill the device, and how many fit."""
        del device_type
        problem, settings = self.job.problem, self.job.settings
        time, batch, _ = problem.inputs.shape
        rows = min(64, max(batch, 1) * settings.share.most)
        segments = 1
        while True:
            last = problem.network.directions == 2 or problem.loss.black_box or segments == time
            steps, outputs = -(-time // segments), _outputs_each(problem, segments)
            shape = _WeightShape(problem.network, settings, batch, steps, outputs)
            try:
                samples, rollouts = shape.divide(max_memory, "")
            except MemoryError:
                if last:
                    raise
            else:
                if last or samples * rollouts >= rows:
                    return Division(samples, rollouts, segments)
            segments = min(2 * segments, time)

    def needed_bytes(self, division: Division) -> int:
        """Return the bytes that a division needs."""
        problem = self.job.problem
        time, outputs = len(problem.inputs), _outputs_each(problem, division.segments)
        steps = -(-time // division.segments)
        shape = _WeightShape(problem.network, self.job.settings, problem.inputs.shape[1], steps, outputs)
        return shape.needed_bytes(division[:2])


def _outputs_each(problem: Problem, segments: int) -> int:
    """Return the output floats per step of a segment: a black box needs all steps at once, other losses two copies."""
    return problem.outputs_size * (segments if problem.loss.black_box else 2)


def _estimate(job: Job, division: Division) -> FoundOfProblem:
    """Estimate all gradients by a division."""
    problem, loss = job.problem, job.problem.loss
    result = FoundOfProblem(problem, job.settings)
    time, batch, _ = problem.inputs.shape
    both = problem.network.directions == 2
    segments = segments_of(time, division)

    for first in range(0, batch, division.samples):
        samples = slice(first, min(first + division.samples, batch))
        for steps, run in _clean_segments(problem, samples, segments):
            result.outputs[steps, samples] = problem.read(run.outputs)
            if both:
                result.h_n[:, samples] = run.h_n
            else:
                keep_final(result.h_n[:, samples], run, steps, loss.last_step[samples])
            if not loss.black_box:
                result.loss += loss.values(result.outputs[steps, samples], steps, samples).sum()
        gradient_o = None
        if loss.black_box:
            result.loss += BlackBoxChange(problem, result.outputs[:, samples], samples).clean.sum()
        if problem.weight_o is not None and job.perturb_readout:
            limit = _WholeProblem(job).needed_bytes(division)
            gradient_o = perturb_readout(problem, result.outputs[:, samples], job.settings, job.seed, samples, limit)
        for steps, run in _clean_segments(problem, samples, segments) if problem.weight_o is not None else ():
            exact = (
                loss.output_gradient(result.outputs[steps, samples], steps, samples)
                if gradient_o is None
                else gradient_o[steps]
            )
            result.add_readout(exact, run.outputs)

    def clean_activity(samples: slice) -> Iterable[CleanSegment]:
        for steps, run in _clean_segments(problem, samples, segments):
            spec = loss.spec(problem.weight_o, result.outputs[steps, samples], steps, samples, False, None)
            yield CleanSegment(run.layers, run.masks, spec)

    def measure(delta_o: Tensor, samples: slice) -> Tensor:
        return BlackBoxChange(problem, result.outputs[:, samples], samples).of(delta_o)

    estimate = estimate_weights(
        problem.network,
        clean_activity,
        job.seed,
        job.settings,
        batch=batch,
        block=division[:2],
        lengths=problem.lengths if both else None,
        measure=measure if loss.black_box else None,
    )
    result.layers = [side for layer in estimate.sums for side in layer]
    result.skipped = estimate.skipped
    if result.moved is not None:
        job.settings.share.sum_(result.moved)
    return result


def _clean_segments(problem: Problem, samples: slice, segments: list[slice]) -> Iterator[tuple[slice, CleanRun]]:
    """Yield the clean run of some samples, segment by segment; two directions have one segment."""
    inputs, h_0 = problem.inputs[:, samples], problem.h_0[:, samples]
    if problem.network.directions == 2:
        yield segments[0], run_network(problem.network, inputs, h_0, problem.lengths_of(samples), None)
        return
    clean = CheckpointedRun(problem.network, inputs, h_0, problem.lengths_of(samples), keep=len(segments) == 1)
    for steps in segments:
        yield steps, clean.segment(steps)
