"""`estimate_grad_` for networks of two directions: layer by layer over the whole clean run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .division import Shape, divided, gram_floats
from .gradients import linear_loss
from .job import BlackBoxChange, Found, Job, draw_masks
from .kernels.loss import Loss, OutputsOnly, loss_of_steps
from .layers import in_processing_order, run_network
from .problem import Problem
from .readout import perturb_readout
from .sweep import estimate_layer


def two_directions(job: Job) -> Found:
    """Estimate all gradients of a network of two directions, which meet each other at every step."""
    problem, settings, loss = job.problem, job.settings, job.problem.loss
    found = Found(problem, settings.parts)
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
    units = problem.network.hidden_size
    above: Tensor | None = None
    for number in range(len(problem.network.layers) - 1, -1, -1):
        d_inputs = torch.zeros_like(run.layers[number][0].inputs)
        for side, weights in enumerate(problem.network.layers[number]):
            one, index = run.layers[number][side], 2 * number + side
            measure = None
            if above is None:
                spec = loss.spec(problem.readout_of(side), found.outputs, whole, everyone, bool(side), problem.lengths)
                loss_of = _sliced(spec)
                measure = _measure_side(problem, found.outputs, bool(side)) if change is not None else None
            else:
                above_here = above[..., side * units : (side + 1) * units]
                loss_of = linear_loss(in_processing_order(above_here, bool(side), problem.lengths))
            shape = Shape(
                time=whole.stop,
                batch=everyone.stop,
                rollouts=settings.share.most,
                hidden=units,
                outputs=problem.outputs_size if measure is not None else 0,
                stores_delta_a=settings.method != "np",
                gram_floats=gram_floats(settings.method, settings.share.most, units),
                clean_floats=0,
                layers=1,
                itemsize=problem.inputs.element_size(),
            )
            estimate = divided(
                shape,
                job.max_memory,
                problem.inputs.device,
                functools.partial(
                    estimate_layer, weights, one, loss_of, job.seed, settings, layer=index, measure=measure
                ),
                alone=settings.share.alone,
            )
            found.layers[index] = estimate.sums
            found.h_0[index] = estimate.h_0
            found.skipped += estimate.skipped
            found.ridge_grown += estimate.ridge_grown
            d_inputs += in_processing_order(estimate.inputs, bool(side), problem.lengths)
        mask = run.masks[number]
        above = d_inputs if mask is None else d_inputs * mask
        if not number:
            found.inputs = above
    return found


def _sliced(loss: Loss) -> Callable[[slice, slice], Loss]:
    return lambda steps, samples: loss if isinstance(loss, OutputsOnly) else loss_of_steps(loss, steps, samples)


def _measure_side(problem: Problem, outputs: Tensor, reverse: bool) -> Callable[[Tensor, slice], Tensor]:
    """Return what turns one direction's delta_o, in processing order, into loss differences in processing order."""

    def measure(delta_o: Tensor, samples: slice) -> Tensor:
        lengths = None if problem.lengths is None else problem.lengths[samples]
        change = BlackBoxChange(problem, outputs[:, samples], samples)
        delta_loss = change.of(in_processing_order(delta_o, reverse, lengths))
        # One value per sequence is credited at the last valid step in either order: all before has part in it.
        return delta_loss if problem.loss.per_sequence else in_processing_order(delta_loss, reverse, lengths)

    return measure
