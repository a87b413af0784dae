"""The walk by layers: over the clean run of all steps, last layer first, perturbing one layer and direction at a time.

The last layer's rollouts measure the loss. Those of a lower layer measure a loss that is linear in its states,
L = sum_t g_t . h_t, with g_t = dL/dh_t from the input gradient of the layer above. The walk serves `RNN`'s backward
pass, from dL/d(outputs) to gradients, and `estimate_grad_` for bidirectional networks, whose directions meet at every
step. Source: derived here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.loss import LinearLoss, Loss, loss_of_steps
from anpgpu.network.cells import LayerRun
from anpgpu.network.stack import CleanRun, Network, run_network
from anpgpu.network.weights import LayerWeights, in_processing_order
from anpgpu.runtime.memory import Division, one_after_another, segments_of, within_memory
from anpgpu.runtime.settings import Settings

from .found import Found, FoundOfProblem
from .job import BlackBoxChange, Extent, Job, draw_masks
from .readout import perturb_readout
from .sweep import Chunk, Sweep

LossOf = Callable[[slice, slice], Loss]
"""Returns a layer's loss for some steps (in processing order) of some samples."""

Measure = Callable[[Tensor, slice], Tensor]
"""Turns delta_o of all steps, (T, b, p, O), of some samples into loss differences, (T, b, p)."""


class LayerLoss(NamedTuple):
    """The loss that the rollouts of one layer and direction measure."""

    of: LossOf
    measure: Measure | None = None
    """For a black-box loss."""
    gradient: Callable[[slice], Tensor] | None = None
    """Returns a black-box loss's dL/dh of some steps, of the samples that were measured last."""
    outputs: int = 0
    """O, if delta_o of all steps is stored for a black-box loss; else 0."""


class Backward(NamedTuple):
    """The arguments of the walk, and of an estimator in a backward pass."""

    settings: Settings
    max_memory: int
    """Bytes."""
    lengths: Tensor | None
    lowest: int
    """The lowest layer that needs a gradient, -1 where inputs or first states do; layers below it get zeros."""
    network: Network
    run: CleanRun
    seed: Tensor
    grad_outputs: Tensor
    """dL/d(outputs), (T, B, D * H)."""
    grad_h_n: Tensor | None
    """dL/d(final states), (layers * D, B, S); None is zero."""

    @property
    def found(self) -> Found:
        """A new `Found`, filled with zeros."""
        first = self.run.layers[0][0]
        states = first.states.new_empty((self.network.directions * len(self.network.layers), *first.states.shape[1:]))
        return Found(self.network, first.inputs, states, self.settings)


def layers_backward(backward: Backward) -> Found:
    """`RNN`'s backward pass: from dL/d(outputs) and dL/dh_n to all gradients."""
    lengths, units = backward.lengths, backward.network.hidden_size

    def loss_of_layer(index: int, side: int, above: Tensor | None) -> LayerLoss:
        grad = _of_side(backward.grad_outputs if above is None else above, side, units, lengths)
        if backward.grad_h_n is not None:
            grad = _with_final(grad, backward.grad_h_n[index], lengths)
        return LayerLoss(linear_loss(grad))

    result = backward.found
    _walk(result, backward, loss_of_layer)
    return result


def two_directions(job: Job) -> FoundOfProblem:
    """Estimate all gradients of a bidirectional network, for `estimate_grad_`."""
    problem, settings, loss = job.problem, job.settings, job.problem.loss
    result = FoundOfProblem(problem, settings)
    masks = draw_masks(problem)
    job = job.agreed(*masks)
    drawn = iter(masks)
    run = run_network(
        problem.network, problem.inputs, problem.h_0, problem.lengths, (lambda _: next(drawn)) if masks else None
    )
    whole, everyone = slice(0, len(problem.inputs)), slice(0, problem.inputs.shape[1])
    result.outputs, result.h_n = problem.read(run.outputs), run.h_n
    change = BlackBoxChange(problem, result.outputs, everyone) if loss.black_box else None
    reads = problem.weight_o is not None and not job.perturb_readout
    at = loss.at(result.outputs, whole, everyone, backend=settings.backend, gradient=reads)
    result.loss = at.total if change is None else change.clean.sum()
    if problem.weight_o is not None:
        gradient_o = (
            at.gradient
            if reads
            else perturb_readout(problem, result.outputs, settings, job.seed, everyone, job.max_memory)
        )
        result.add_readout(gradient_o, run.outputs)

    def loss_of_layer(index: int, side: int, above: Tensor | None) -> LayerLoss:
        del index
        if above is not None:
            return LayerLoss(linear_loss(_of_side(above, side, problem.network.hidden_size, problem.lengths)))
        spec = at.spec(problem.readout_of(side), reverse=bool(side), lengths=problem.lengths)
        if change is None:
            return LayerLoss(functools.partial(loss_of_steps, spec))
        measure = _MeasureSide(job, result.outputs, bool(side), spec.readout)
        return LayerLoss(lambda *_: spec, measure, measure.gradient, problem.outputs_size)

    nothing = result.outputs.new_empty(0)
    lowest = -1 if job.of_inputs or job.of_h_0 else 0
    walk = Backward(settings, job.max_memory, problem.lengths, lowest, problem.network, run, job.seed, nothing, None)
    _walk(result, walk, loss_of_layer)
    return result


def _walk(result: Found, backward: Backward, loss_of_layer: Callable[[int, int, Tensor | None], LayerLoss]) -> None:
    """Perturb one layer and direction after another, last layer first, and write the gradients into `result`."""
    network, run, settings, lengths = backward.network, backward.run, backward.settings, backward.lengths
    result.learners = [None] * (len(result.layers) if settings.estimator.keeps_state else 0)
    above: Tensor | None = None
    for number in range(len(network.layers) - 1, max(backward.lowest, 0) - 1, -1):
        handed = []
        for side, weights in enumerate(network.layers[number]):
            index = number * network.directions + side
            activity, loss = run.layers[number][side], loss_of_layer(index, side, above)
            time, batch, _ = activity.inputs.shape
            shape = settings.shape(
                time=time,
                batch=batch,
                hidden=network.hidden_size,
                itemsize=activity.states.element_size(),
                outputs=loss.outputs,
                at_once=loss.measure is not None,
            )
            layer = _Layer(weights, activity, loss, index, number > backward.lowest)
            estimate = within_memory(
                shape,
                backward.max_memory,
                backward.seed.device,
                functools.partial(_estimate_layer, layer, backward),
                alone=settings.share.alone,
            )
            result.layers[index] = estimate.layers[0]
            if backward.lowest < 0:
                result.h_0[index] = estimate.h_0[0]
            result.count(estimate.skipped, estimate.made.get("ridge_grown"))
            if estimate.learners:
                result.learners[index] = estimate.learners[0]
            if layer.hands_down:
                handed.append(in_processing_order(estimate.inputs, bool(side), lengths))
        if handed:
            mask, d_inputs = run.masks[number], functools.reduce(torch.add, handed)
            above = d_inputs if mask is None else d_inputs * mask
    for learner in result.learners:
        # Only now: where a layer fails, none has learnt anything.
        if learner is not None:
            learner.commit()
    if above is not None and backward.lowest < 0:
        result.inputs = above


class _Layer(NamedTuple):
    """One layer and direction with its clean activity and loss."""

    weights: LayerWeights
    run: LayerRun
    loss: LayerLoss
    number: int
    """Layer field of the noise counters."""
    hands_down: bool
    """Whether the gradient of its inputs is wanted."""


def _estimate_layer(layer: _Layer, backward: Backward, division: Division) -> Found:
    """Estimate one layer's gradients by a division, summed over the processes that share the rollouts."""
    weights, settings, device = layer.weights, backward.settings, backward.seed.device
    network = backward.network._replace(layers=((weights,),))
    time, batch, _ = layer.run.inputs.shape
    result = Found(network, layer.run.inputs, layer.run.states[:1], settings)
    segments = segments_of(time, division)
    own = settings.share.samples(batch)
    if settings.estimator.keeps_state:
        extent = Extent(time, batch, backward.lengths)
        result.learners = [settings.estimator.new_learner(settings, layer.number, weights.weight_hh, extent)]
    for first in range(own.start, own.stop, max(division.samples, 1)):
        samples = slice(first, min(first + division.samples, own.stop))
        learner = result.learners[0] if result.learners else None
        chunk = Chunk(samples, layer.number)
        sweep = Sweep(weights.weight_hh, backward.seed, settings, network.cell, chunk, division, learner)
        grad = layer.loss.of(slice(0, time), samples).grad
        # An incoming gradient with NaN or inf makes every loss difference so: these rollouts count, and NaN propagates.
        trust = None if grad is None else ~(torch.linalg.vector_norm(grad, math.inf, (0, 2)) < math.inf)
        measured = None
        if sweep.segmented:
            measured = _first_pass(sweep, layer, network, segments)
            if trust is not None:
                sweep.finite |= trust.unsqueeze(1)
            sweep.check()
        for steps in one_after_another(reversed(segments), device):
            run = layer.run.segment(steps, samples)
            parts = sweep.credit(
                steps,
                network.cell.preactivations(weights, run),
                run.states[1:],
                layer.loss.of(steps, samples) if measured is None else None,
                measured=None if measured is None else measured[steps],
                measure=None if layer.loss.measure is None else _of_samples(layer.loss.measure, samples),
                trust=trust,
                gradient=None if layer.loss.gradient is None else functools.partial(layer.loss.gradient, steps),
            )
            start = backward.lowest < 0 and not steps.start
            d_inputs, d_start = result.credit(0, parts, weights, run, inputs=layer.hands_down, start=start)
            if d_inputs is not None:
                result.place("inputs", d_inputs, steps, samples)
            if d_start is not None:
                result.place("h_0", d_start.unsqueeze(0), slice(0, 1), samples)
        result.count(sweep.skipped, sweep.ridge_grown)
    result.sum_(settings.share)
    return result


def _first_pass(sweep: Sweep, layer: _Layer, network: Network, segments: list[slice]) -> Tensor | None:
    """Run all rollouts through time; return the loss differences, (T, b, P), of a black-box loss, else None."""
    samples, loss = sweep.chunk.samples, layer.loss
    measured = []
    for block in sweep.blocks:
        deviations = []
        for steps in one_after_another(segments, layer.run.inputs.device):
            run = layer.run.segment(steps, samples)
            preact = network.cell.preactivations(layer.weights, run)
            moved = sweep.advance(block, steps, preact, run.states[1:], loss.of(steps, samples))
            if moved.delta_o is not None:
                deviations.append(moved.delta_o)
        if loss.measure is not None:
            delta_loss = loss.measure(torch.cat(deviations), samples)
            sweep.finite[:, block] &= torch.isfinite(delta_loss).all(0)
            measured.append(delta_loss)
    return torch.cat(measured, dim=-1) if measured else None


def linear_loss(grad: Tensor) -> LossOf:
    """Return the loss that is linear in the states, from dL/dh, (T, B, H)."""
    return lambda steps, samples: LinearLoss(grad[steps, samples])


def _of_samples(measure: Measure, samples: slice) -> Callable[[Tensor], Tensor]:
    return lambda delta_o: measure(delta_o, samples)


def _of_side(above: Tensor, side: int, units: int, lengths: Tensor | None) -> Tensor:
    """Return one direction's columns of dL/d(outputs), (T, B, H), in its processing order."""
    return in_processing_order(above[..., side * units : (side + 1) * units], bool(side), lengths)


def _with_final(grad: Tensor, grad_h_n: Tensor, lengths: Tensor | None) -> Tensor:
    """Add dL/d(final state) at each sample's last valid step (in processing order); return dL/d(states), (T, B, S)."""
    if grad_h_n.shape[-1] != grad.shape[-1]:
        grad = torch.nn.functional.pad(grad, (0, grad_h_n.shape[-1] - grad.shape[-1]))
    if lengths is None:
        return torch.cat((grad[:-1], (grad[-1] + grad_h_n).unsqueeze(0)))
    last = (lengths - 1).to(grad.device).view(1, -1, 1).expand(1, -1, grad.shape[-1])
    return grad.scatter_add(0, last, grad_h_n.unsqueeze(0))


class _MeasureSide:
    """Turns one direction's delta_o, in processing order, into loss differences in processing order."""

    def __init__(self, job: Job, outputs: Tensor, reverse: bool, readout: Tensor | None) -> None:
        self.job, self.outputs, self.reverse, self.readout = job, outputs, reverse, readout
        self.output_gradient = outputs
        """dL/do in processing order, (T, b, O), where the estimator needs it."""

    def __call__(self, delta_o: Tensor, samples: slice) -> Tensor:
        problem = self.job.problem
        lengths = problem.lengths_of(samples)
        change = BlackBoxChange(problem, self.outputs[:, samples], samples, self.job.settings)
        delta_loss = change.of(in_processing_order(delta_o, self.reverse, lengths))
        if change.finds_gradient:
            self.output_gradient = in_processing_order(change.output_gradient, self.reverse, lengths)
        if problem.loss.per_sequence and not change.spread:
            # One value per sequence is credited at the last valid step in either order: all before has part in it.
            return delta_loss
        return in_processing_order(delta_loss, self.reverse, lengths)

    def gradient(self, steps: slice) -> Tensor:
        """Return dL/dh of some steps, (L, b, H)."""
        gradient = self.output_gradient[steps]
        return gradient if self.readout is None else gradient @ self.readout
