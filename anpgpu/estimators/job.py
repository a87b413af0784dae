"""The job of an estimator in `estimate_grad_`, the dropout of an update, and loss differences of a black box."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem

EVERYONE = slice(None)
"""All samples, or all steps."""


class Job(NamedTuple):
    """The arguments of an estimator that runs rollouts."""

    problem: Problem
    settings: Settings
    seed: Tensor
    """Of the update, 0-dim int64."""
    max_memory: int
    """Bytes."""
    perturb_readout: bool
    """Whether the readout's gradient is estimated from perturbed outputs."""

    def agreed(self, *masks: Tensor) -> Job:
        """Return the job with the same seed in all processes that share its rollouts.

        Raises:
            RuntimeError: the processes do not hold the same batch, weights and dropout masks.
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
    """Draw the dropout masks of every layer but the first, (T, B, D * H), once for every division of the work."""
    if problem.dropout is None:
        return ()
    values = problem.inputs.new_empty((*problem.inputs.shape[:2], problem.width))
    return tuple(problem.dropout(values) for _ in problem.network.layers[1:])


class BlackBoxChange:
    """Loss differences of a black box: the caller's loss of perturbed outputs minus that of clean outputs."""

    def __init__(self, problem: Problem, outputs: Tensor, samples: slice) -> None:
        self.problem, self.samples = problem, samples
        self.outputs = outputs.unsqueeze(2)
        self.clean = problem.loss.call(self.outputs, samples)

    def of(self, delta_o: Tensor) -> Tensor:
        """Return loss differences, (T, b, p), from delta_o, (T, b, p, O)."""
        return self.problem.loss.call(self.outputs + delta_o, self.samples) - self.clean
