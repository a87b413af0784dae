"""Backpropagation through time by autograd, never truncated: the baseline that estimates are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from anpgpu.network.stack import run_network
from anpgpu.registry import ESTIMATORS, Estimator
from anpgpu.task.problem import Problem

from .found import FoundOfProblem


@ESTIMATORS.add("bptt")
class Backpropagation(Estimator):
    """The exact gradient, by autograd."""

    exact = True

    @staticmethod
    def walk(directions: int) -> Callable[[Problem], FoundOfProblem]:
        """Return `by_autograd`, which takes a `Problem`, not a `Job`: there are no rollouts."""
        del directions
        return by_autograd


@torch.enable_grad()
def by_autograd(problem: Problem) -> FoundOfProblem:
    """Return all gradients, by autograd through all time steps.

    Raises:
        ValueError: the loss is not differentiable.
    """
    result = FoundOfProblem(problem)
    layers = tuple(
        tuple(side.map(lambda weight: weight.clone().requires_grad_()) for side in layer)
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
        losses = problem.loss.call(outputs.unsqueeze(2).clone(), everyone)
    else:
        losses = problem.loss.values(outputs, whole, everyone)
    result.loss = losses.sum()
    if not result.loss.requires_grad:
        raise ValueError("method='bptt' needs a differentiable loss, but the loss's values have no gradient")
    sides = [side for layer in layers for side in layer]
    weights = [weight for side in sides for weight in side if weight is not None]
    readout = [weight for weight in (problem.weight_o, problem.bias_o) if weight is not None]
    wanted = [*weights, *readout, problem.inputs, problem.h_0]
    grads = iter(torch.autograd.grad(result.loss, wanted, materialize_grads=True))
    for sums, side in zip(result.layers, sides, strict=True):
        sums.weight_ih[0], sums.weight_hh[0] = next(grads), next(grads)
        if side.bias_ih is not None:
            sums.bias_hh = torch.zeros_like(sums.bias_ih)
            sums.bias_ih[0], sums.bias_hh[0] = next(grads), next(grads)
    if problem.weight_o is not None:
        result.weight_o = next(grads)
    if problem.bias_o is not None:
        result.bias_o = next(grads)
    result.inputs, result.h_0 = next(grads), next(grads)
    result.loss, result.outputs, result.h_n = result.loss.detach(), outputs.detach(), run.h_n.detach()
    return result
