"""What a method of `estimate_grad_` works on, the dropout of an update, and losses that only the caller can measure."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem

EVERYONE = slice(None)
"""All samples, or all steps."""


class Job(NamedTuple):
    """What a method works on."""

    problem: Problem
    settings: Settings
    seed: Tensor
    max_memory: int
    perturb_readout: bool

    def agreed(self, *masks: Tensor) -> Job:
        """Return the job with the one seed of all processes that share its rollouts.

        Raises:
            RuntimeError: they do not hold the same batch, weights and dropout masks.
        """
        problem = self.problem
        weights = [
            weight for layer in problem.network.layers for side in layer for weight in side if weight is not None
        ]
        readout = (problem.weight_o, problem.bias_o, problem.loss.targets.values)
        optional = [tensor for tensor in readout if tensor is not None]
        seed = self.settings.share.agree(self.seed, problem.inputs, problem.h_0, *weights, *optional, *masks)
        return self._replace(seed=seed)


def draw_masks(problem: Problem) -> tuple[Tensor, ...]:
    """Draw the dropout of every layer but the first, (T, B, D * H): once, however the work is divided then."""
    if problem.dropout is None:
        return ()
    values = problem.inputs.new_empty((*problem.inputs.shape[:2], problem.width))
    return tuple(problem.dropout(values) for _ in problem.network.layers[1:])


class BlackBoxChange:
    """Loss differences that only the caller can measure: the perturbed call minus the clean one."""

    def __init__(self, problem: Problem, outputs: Tensor, samples: slice) -> None:
        self.problem, self.samples = problem, samples
        self.outputs = outputs.unsqueeze(2)
        self.clean = problem.loss.call(self.outputs.clone(), samples)

    def of(self, delta_o: Tensor) -> Tensor:
        """Return (T, b, p) loss differences of delta_o, (T, b, p, O)."""
        change = self.problem.loss.call(self.outputs + delta_o, self.samples) - self.clean
        if not change.is_cuda:
            self.problem.loss.moved |= bool((change != 0).any())
        return change
