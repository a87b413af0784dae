"""The walk by layers: last layer first over a whole clean run, one layer and direction perturbed at a time.

The last layer answers to the loss, every lower one to the gradient of the inputs of the layer above, a loss that is
linear in its states: L = sum_t g_t . h_t with g_t = dL/dh_t. It serves `RNN`'s backward pass, from dL/d(outputs) to
gradients, and `estimate_grad_` for networks of two directions, which meet at every step. Source: derived here.
"""

from __future__ import annotations

import functools
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
from .job import BlackBoxChange, Job, draw_masks
from .readout import perturb_readout
from .sweep import Chunk, Sweep

LossOf = Callable[[slice, slice], Loss]
"""Gives a layer's loss for some steps (in processing order) of some samples."""

Measure = Callable[[Tensor, slice], Tensor]
"""Turns delta_o of all steps, (T, b, p, O), of some samples into loss differences, (T, b, p)."""


class LayerLoss(NamedTuple):
    """What one layer and direction answers to."""

    of: LossOf
    measure: Measure | None = None
    """For a loss that only the caller can measure."""
    outputs: int = 0
    """O, where delta_o of all steps is kept for the caller."""


class Backward(NamedTuple):
    """What a backward pass works on."""

    settings: Settings
    max_memory: int | None
    lengths: Tensor | None
    lowest: int
    """The lowest layer of which a gradient is wanted; what lies below gets zeros."""
    network: Network
    run: CleanRun
    seed: Tensor
    grad_outputs: Tensor
    """dL/d(outputs), (T, B, D * H)."""
    grad_h_n: Tensor
    """dL/dh_n, (layers * D, B, H)."""

    @property
    def found(self) -> Found:
        """An empty container for what is found."""
        return Found(self.network, self.run.layers[0][0].inputs, self.grad_h_n, self.settings.estimator.parts)


def layers_backward(backward: Backward) -> Found:
    """Estimate all gradients from those of outputs and final states."""
    lengths, units = backward.lengths, backward.network.hidden_size

    def loss_of_layer(index: int, side: int, above: Tensor | None) -> LayerLoss:
        grad = _of_side(backward.grad_outputs if above is None else above, side, units, lengths)
        return LayerLoss(linear_loss(_with_final(grad, backward.grad_h_n[index], lengths)))

    found = backward.found
    _walk(found, backward, loss_of_layer)
    return found


def two_directions(job: Job) -> FoundOfProblem:
    """Estimate all gradients of a network of two directions."""
    problem, settings, loss = job.problem, job.settings, job.problem.loss
    found = FoundOfProblem(problem, settings.estimator.parts)
    masks = draw_masks(problem)
    job = job.agreed(*masks)
    drawn = iter(masks)
    run = run_network(
        problem.network, problem.inputs, problem.h_0, problem.lengths, (lambda _: next(drawn)) if masks else None
    )
    whole, everyone = slice(0, len(problem.inputs)), slice(0, problem.inputs.shape[1])
    found.outputs, found.h_n = problem.read(run.outputs), run.h_n
    change = BlackBoxChange(problem, found.outputs, everyone) if loss.black_box else None
    found.loss = (change.clean if change is not None else loss.values(found.outputs, whole, everyone)).sum()
    if problem.weight_o is not None:
        gradient_o = (
            perturb_readout(problem, found.outputs, settings, job.seed, everyone, job.max_memory)
            if job.perturb_readout
            else loss.output_gradient(found.outputs, whole, everyone)
        )
        found.add_readout(gradient_o, run.outputs)

    def loss_of_layer(index: int, side: int, above: Tensor | None) -> LayerLoss:
        del index
        if above is not None:
            return LayerLoss(linear_loss(_of_side(above, side, problem.network.hidden_size, problem.lengths)))
        spec = loss.spec(problem.readout_of(side), found.outputs, whole, everyone, bool(side), problem.lengths)
        if change is None:
            return LayerLoss(functools.partial(loss_of_steps, spec))
        measure = _measure_side(job, found.outputs, bool(side))
        return LayerLoss(lambda *_: spec, measure, problem.outputs_size)

    nothing = found.outputs.new_empty(0)
    walk = Backward(settings, job.max_memory, problem.lengths, 0, problem.network, run, job.seed, nothing, nothing)
    _walk(found, walk, loss_of_layer)
    return found


def _walk(found: Found, backward: Backward, loss_of_layer: Callable[[int, int, Tensor | None], LayerLoss]) -> None:
    """Perturb one layer and direction after another, the last layer first; fill in what is found."""
    network, run, settings, lengths = backward.network, backward.run, backward.settings, backward.lengths
    above: Tensor | None = None
    for number in range(len(network.layers) - 1, backward.lowest - 1, -1):
        d_inputs = torch.zeros_like(run.layers[number][0].inputs)
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
            layer = _Layer(weights, activity, loss, index)
            estimate = within_memory(
                shape,
                backward.max_memory,
                backward.seed.device,
                functools.partial(_estimate_layer, layer, backward),
                alone=settings.share.alone,
            )
            found.layers[index] = estimate.layers[0]
            found.h_0[index] = estimate.h_0[0]
            found.skipped += estimate.skipped
            found.ridge_grown += estimate.ridge_grown
            d_inputs += in_processing_order(estimate.inputs, bool(side), lengths)
        mask = run.masks[number]
        above = d_inputs if mask is None else d_inputs * mask
    if above is not None and not backward.lowest:
        found.inputs = above


class _Layer(NamedTuple):
    """One layer and direction to be estimated."""

    weights: LayerWeights
    run: LayerRun
    loss: LayerLoss
    number: int
    """In the counter space."""


def _estimate_layer(layer: _Layer, backward: Backward, division: Division) -> Found:
    """Estimate one layer's gradients, divided like that; processes that share rollouts all get their sum."""
    weights, settings, device = layer.weights, backward.settings, backward.seed.device
    network = backward.network._replace(layers=((weights,),))
    time, batch, _ = layer.run.inputs.shape
    found = Found(network, layer.run.inputs, layer.run.states[:1], settings.estimator.parts)
    segments = segments_of(time, division)
    own = settings.share.samples(batch)
    for first in range(own.start, own.stop, max(division.samples, 1)):
        samples = slice(first, min(first + division.samples, own.stop))
        sweep = Sweep(weights.weight_hh, backward.seed, settings, Chunk(samples, layer.number), division)
        grad = layer.loss.of(slice(0, time), samples).grad
        # Under a gradient that is not finite itself, rollouts that are not finite are no fault of theirs.
        trust = None if grad is None else ~torch.isfinite(grad).all(-1).all(0)
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
            )
            adjoint, found.inputs[steps, samples] = found.credit(0, parts, weights, run)
            if not steps.start:
                found.h_0[0, samples] = network.cell.first_state_gradient(adjoint[0], weights, run)
        found.skipped += sweep.skipped
        found.ridge_grown += sweep.ridge_grown
    settings.share.sum_(*found.weights, found.inputs, found.h_0)
    settings.share.sum_(found.skipped, found.ridge_grown)
    return found


def _first_pass(sweep: Sweep, layer: _Layer, network: Network, segments: list[slice]) -> Tensor | None:
    """Take all rollouts through time; return loss differences, (T, b, P), where only the caller can measure them."""
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
    """Return one direction's share of dL/d(outputs), (T, B, H), in its processing order."""
    return in_processing_order(above[..., side * units : (side + 1) * units], bool(side), lengths)


def _with_final(grad: Tensor, grad_h_n: Tensor, lengths: Tensor | None) -> Tensor:
    """Add dL/dh_n at each sample's last valid step (in processing order)."""
    if lengths is None:
        return torch.cat((grad[:-1], (grad[-1] + grad_h_n).unsqueeze(0)))
    last = (lengths - 1).to(grad.device).view(1, -1, 1).expand(1, -1, grad.shape[-1])
    return grad.scatter_add(0, last, grad_h_n.unsqueeze(0))


def _measure_side(job: Job, outputs: Tensor, reverse: bool) -> Measure:
    """Return what turns one direction's delta_o, in processing order, into loss differences in processing order."""

    def measure(delta_o: Tensor, samples: slice) -> Tensor:
        lengths = job.problem.lengths_of(samples)
        change = BlackBoxChange(job.problem, outputs[:, samples], samples, job.settings)
        delta_loss = change.of(in_processing_order(delta_o, reverse, lengths))
        if job.problem.loss.per_sequence and not change.spread:
            # One value per sequence is credited at the last valid step in either order: all before has part in it.
            return delta_loss
        return in_processing_order(delta_loss, reverse, lengths)

    return measure
