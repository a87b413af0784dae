"""`estimate_grad_` by the methods that have no adjoint: weight perturbation, and backpropagation as the baseline."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .division import Division, segments_of
from .job import BlackBoxChange, CleanChunk, Found, Job, keep_final
from .layers import CleanRun, run_network
from .problem import Problem
from .readout import perturb_readout
from .weight_perturbation import CleanSegment, divide_weights, estimate_weights


def all_weights(job: Job) -> Found:
    """Weight perturbation: one forward pass, all layers at once."""
    problem, loss = job.problem, job.problem.loss
    found = Found(problem)
    time, batch, _ = problem.inputs.shape
    both = problem.network.directions == 2
    count = 1
    while True:
        steps_each = -(-time // count)
        block = divide_weights(
            problem.network,
            job.settings,
            batch=batch,
            steps=steps_each,
            # A black box sees the outputs of all steps at once; ours take two copies of a segment's.
            outputs=problem.outputs_size * (count if loss.black_box else 2),
            max_memory=job.max_memory,
        )
        rows = min(64, max(batch, 1) * job.settings.options.rollouts)
        if both or loss.black_box or steps_each == 1 or block[0] * block[1] >= rows:
            break
        count *= 2
    segments = segments_of(time, Division(block[0], block[1], count))

    def run_of(samples: slice) -> Iterable[tuple[slice, CleanRun]]:
        if both:
            lengths = None if problem.lengths is None else problem.lengths[samples]
            yield (
                segments[0],
                run_network(problem.network, problem.inputs[:, samples], problem.h_0[:, samples], lengths, None),
            )
            return
        clean = CleanChunk(problem._replace(dropout=None), samples, len(segments))
        for steps in segments:
            yield steps, clean.run(steps)

    if problem.dropout is not None:
        raise ValueError(
            "method='wp' in estimate_grad_ does not go with dropout between layers: call rnn.eval(), set "
            "rnn.dropout = 0, or use method='anp' or 'np'"
        )
    for first in range(0, batch, max(block[0], 1)):
        samples = slice(first, min(first + block[0], batch))
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
                problem, found.outputs[:, samples], job.settings, job.seed, samples, job.max_memory
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
        block=block,
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
