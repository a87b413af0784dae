"""`estimate_grad_` by the methods that have no adjoint: weight perturbation, and backpropagation as the baseline."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from anpgpu.network.stack import CleanRun, run_network
from anpgpu.runtime.memory import Division, segments_of, within_memory
from anpgpu.task.problem import Problem

from .job import BlackBoxChange, CleanChunk, Found, Job, keep_final
from .readout import perturb_readout
from .weights import CleanSegment, divide_weights, estimate_weights, weights_bytes


def all_weights(job: Job) -> Found:
    """Weight perturbation: one forward pass, all layers at once.

    Raises:
        ValueError: there is dropout between layers.
    """
    if job.problem.dropout is not None:
        raise ValueError(
            "method='wp' in estimate_grad_ does not go with dropout between layers: call rnn.eval(), set "
            "rnn.dropout = 0, or use method='anp' or 'np'"
        )
    return within_memory(
        job.max_memory,
        job.problem.inputs.device,
        functools.partial(_divide, job),
        functools.partial(_needed_bytes, job),
        functools.partial(_divided_weights, job.agreed()),
        alone=job.settings.share.alone,
    )


def _divide(job: Job, max_memory: int) -> Division:
    """Return the fewest segments whose rollouts fill the device, and how many of these fit."""
    problem, settings = job.problem, job.settings
    time, batch, _ = problem.inputs.shape
    rows = min(64, max(batch, 1) * settings.share.most)
    segments = 1
    while True:
        last = problem.network.directions == 2 or problem.loss.black_box or segments == time
        try:
            samples, rollouts = divide_weights(
                problem.network,
                settings,
                batch=batch,
                steps=-(-time // segments),
                outputs=_outputs_each(problem, segments),
                max_memory=max_memory,
            )
        except MemoryError:
            if last:
                raise
        else:
            if last or samples * rollouts >= rows:
                return Division(samples, rollouts, segments)
        segments = min(2 * segments, time)


def _needed_bytes(job: Job, division: Division) -> int:
    time, outputs = len(job.problem.inputs), _outputs_each(job.problem, division.segments)
    steps = -(-time // division.segments)
    return weights_bytes(job.problem.network, job.settings, division[:2], steps=steps, outputs=outputs)


def _outputs_each(problem: Problem, segments: int) -> int:
    """Return the outputs kept per step of a segment: a black box sees all steps at once; ours take two copies."""
    return problem.outputs_size * (segments if problem.loss.black_box else 2)


def _divided_weights(job: Job, division: Division) -> Found:
    """Do all of the work, divided like that."""
    problem, loss = job.problem, job.problem.loss
    found = Found(problem)
    time, batch, _ = problem.inputs.shape
    both = problem.network.directions == 2
    segments = segments_of(time, division)

    def run_of(samples: slice) -> Iterable[tuple[slice, CleanRun]]:
        if both:
            lengths = None if problem.lengths is None else problem.lengths[samples]
            yield (
                segments[0],
                run_network(problem.network, problem.inputs[:, samples], problem.h_0[:, samples], lengths, None),
            )
            return
        clean = CleanChunk(problem, samples, len(segments))
        for steps in segments:
            yield steps, clean.run(steps)

    for first in range(0, batch, division.samples):
        samples = slice(first, min(first + division.samples, batch))
        for steps, run in run_of(samples):
            found.outputs[steps, samples] = problem.read(run.outputs)
            if both:
                found.h_n[:, samples] = run.h_n
            else:
                keep_final(found.h_n[:, samples], run, steps, loss.last_step[samples])
            if not loss.black_box:
                found.loss += loss.values(found.outputs[steps, samples], steps, samples).sum()
        gradient_o = None
        if loss.black_box:
            found.loss += BlackBoxChange(problem, found.outputs[:, samples], samples).clean.sum()
        if problem.weight_o is not None and job.perturb_readout:
            gradient_o = perturb_readout(
                problem, found.outputs[:, samples], job.settings, job.seed, samples, _needed_bytes(job, division)
            )
        for steps, run in run_of(samples) if problem.weight_o is not None else ():
            exact = (
                loss.output_gradient(found.outputs[steps, samples], steps, samples)
                if gradient_o is None
                else gradient_o[steps]
            )
            found.add_readout(exact, run.outputs)

    def clean_segments(samples: slice) -> Iterable[CleanSegment]:
        for steps, run in run_of(samples):
            spec = loss.spec(problem.weight_o, found.outputs[steps, samples], steps, samples, False, None)
            yield CleanSegment(run.layers, run.masks, spec)

    def measure(delta_o: Tensor, samples: slice) -> Tensor:
        return BlackBoxChange(problem, found.outputs[:, samples], samples).of(delta_o)

    estimate = estimate_weights(
        problem.network,
        clean_segments,
        job.seed,
        job.settings,
        batch=batch,
        block=division[:2],
        lengths=problem.lengths if both else None,
        measure=measure if loss.black_box else None,
    )
    found.layers = [one for layer in estimate.sums for one in layer]
    found.skipped = estimate.skipped
    return found


@torch.enable_grad()
def by_autograd(problem: Problem) -> Found:
    """True backpropagation through time, never truncated."""
    found = Found(problem)
    layers = tuple(
        tuple(one.map(lambda weight: weight.clone().requires_grad_()) for one in layer)
        for layer in problem.network.layers
    )
    problem = problem._replace(
        network=problem.network._replace(layers=layers),
        weight_o=None if problem.weight_o is None else problem.weight_o.clone().requires_grad_(),
        bias_o=None if problem.bias_o is None else problem.bias_o.clone().requires_grad_(),
        inputs=problem.inputs.clone().requires_grad_(),
        h_0=problem.h_0.clone().requires_grad_(),
    )
    run = run_network(problem.network, problem.inputs, problem.h_0, problem.lengths, problem.dropout)
    outputs = problem.read(run.outputs)
    whole, everyone = slice(0, outputs.shape[0]), slice(0, outputs.shape[1])
    if problem.loss.black_box:
        each = problem.loss.call(outputs.unsqueeze(2), everyone)
    else:
        each = problem.loss.values(outputs, whole, everyone)
    found.loss = each.sum()
    if not found.loss.requires_grad:
        raise ValueError("method='bptt' needs a differentiable loss, but the loss's values have no gradient")
    weights = [weight for layer in layers for one in layer for weight in one[:3] if weight is not None]
    others = [one for one in (problem.weight_o, problem.bias_o) if one is not None]
    wanted = [*weights, *others, problem.inputs, problem.h_0]
    grads = iter(torch.autograd.grad(found.loss, wanted, materialize_grads=True))
    for sums, one in zip(found.layers, (one for layer in layers for one in layer), strict=True):
        sums.weight_ih[0], sums.weight_hh[0] = next(grads), next(grads)
        if one.bias_ih is not None:
            sums.bias[0] = next(grads)
    found.weight_o = None if problem.weight_o is None else next(grads)
    found.bias_o = None if problem.bias_o is None else next(grads)
    found.inputs, found.h_0 = next(grads), next(grads)
    found.loss, found.outputs, found.h_n = found.loss.detach(), outputs.detach(), run.h_n.detach()
    return found
