"""What the methods of `estimate_grad_` share: the job, what they fill in, clean runs, black-box losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import CleanRun, GradientSums, run_network
from .problem import Problem
from .settings import Settings


class Job(NamedTuple):
    """What a method works on."""

    problem: Problem
    settings: Settings
    seed: Tensor
    max_memory: int
    perturb_readout: bool


class Found:
    """What a method finds, filled in piece by piece: clean results and gradients, in canonical form."""

    def __init__(self, problem: Problem) -> None:
        time, batch, _ = problem.inputs.shape
        self.outputs = problem.inputs.new_empty((time, batch, problem.outputs_size))
        self.h_n = torch.empty_like(problem.h_0)
        self.loss = problem.inputs.new_zeros(())
        self.layers = [GradientSums(weights) for layer in problem.network.layers for weights in layer]
        self.weight_o = None if problem.weight_o is None else torch.zeros_like(problem.weight_o)
        self.bias_o = None if problem.bias_o is None else torch.zeros_like(problem.bias_o)
        self.inputs = torch.zeros_like(problem.inputs)
        self.h_0 = torch.zeros_like(problem.h_0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=problem.inputs.device)

    def add_readout(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the readout's gradient from dL/do, (L, b, O), and the states it read, (L, b, D * H)."""
        if self.weight_o is not None:
            self.weight_o += gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)
        if self.bias_o is not None:
            self.bias_o += gradient.sum((0, 1))


class CleanChunk:
    """Clean activity of one chunk of samples of a one-directional network, segment by segment from checkpoints."""

    def __init__(self, problem: Problem, samples: slice, segments: int) -> None:
        self.problem, self.samples = problem, samples
        self.starts = {0: problem.h_0[:, samples]}
        self.keep = segments == 1
        self.kept: CleanRun | None = None
        self.masks: dict[int, list[Tensor]] = {}

    def run(self, steps: slice) -> CleanRun:
        """Return the clean run of a segment whose start has been reached before."""
        if self.kept is not None:
            return self.kept
        run = run_network(
            self.problem.network,
            self.problem.inputs[steps, self.samples],
            self.starts[steps.start],
            dropout=self._dropout(steps.start),
        )
        self.starts[steps.stop] = run.h_n
        self.kept = run if self.keep else None
        return run

    def _dropout(self, start: int) -> Callable[[Tensor], Tensor] | None:
        """Return a dropout that repeats its masks whenever a segment is run again."""
        draw = self.problem.dropout
        if draw is None:
            return None
        if start not in self.masks:
            drawn = self.masks[start] = []

            def first(values: Tensor) -> Tensor:
                drawn.append(draw(values))
                return drawn[-1]

            return first
        again = iter(self.masks[start])
        return lambda values: next(again)


def keep_final(h_n: Tensor, run: CleanRun, steps: slice, last_step: Tensor) -> None:
    """Keep the state after each sample's last valid step, (layers, b, H), where it lies in this segment."""
    inside = ((last_step >= steps.start) & (last_step < steps.stop)).unsqueeze(-1)
    index = (last_step - steps.start + 1).clamp(0, steps.stop - steps.start)
    for number, layer in enumerate(run.layers):
        state = layer[0].states[index, torch.arange(len(index), device=index.device)]
        h_n[number] = torch.where(inside, state, h_n[number])


class BlackBoxChange:
    """Loss differences that only the caller can measure: the perturbed call minus the clean one."""

    def __init__(self, problem: Problem, outputs: Tensor, samples: slice) -> None:
        self.problem, self.samples = problem, samples
        self.outputs = outputs.unsqueeze(2)
        self.clean = problem.loss.call(self.outputs, samples)

    def of(self, delta_o: Tensor) -> Tensor:
        """Return (T, b, p) loss differences of delta_o, (T, b, p, O)."""
        return self.problem.loss.call(self.outputs + delta_o, self.samples) - self.clean
