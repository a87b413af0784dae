"""What the methods of `estimate_grad_` share: the job, what they fill in, clean runs, black-box losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.network.stack import CleanRun, GradientSums, run_network
from anpgpu.runtime.processes import Share
from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem


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
        weights = [one for layer in problem.network.layers for side in layer for one in side if one is not None]
        given = [one for one in (problem.weight_o, problem.bias_o, problem.loss.targets.values) if one is not None]
        seed = self.settings.share.agree(self.seed, problem.inputs, problem.h_0, *weights, *given, *masks)
        return self._replace(seed=seed)


class Found:
    """What a method finds, filled in piece by piece: clean results and gradients, in canonical form.

    parts: of the gradients' estimates, as `GradientSums` has them.
    """

    def __init__(self, problem: Problem, parts: int = 2) -> None:
        time, batch, _ = problem.inputs.shape
        self.outputs = problem.inputs.new_zeros((time, batch, problem.outputs_size))
        self.h_n = torch.zeros_like(problem.h_0)
        self.loss = problem.inputs.new_zeros(())
        self.layers = [GradientSums(weights, parts) for layer in problem.network.layers for weights in layer]
        self.weight_o = None if problem.weight_o is None else torch.zeros_like(problem.weight_o)
        self.bias_o = None if problem.bias_o is None else torch.zeros_like(problem.bias_o)
        self.inputs = torch.zeros_like(problem.inputs)
        self.h_0 = torch.zeros_like(problem.h_0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=problem.inputs.device)
        self.ridge_grown = torch.zeros_like(self.skipped)

    def sum_(self, share: Share) -> None:
        """Add up what the processes that share the rollouts have found."""
        weights = [part for one in self.layers for part in (one.weight_ih, one.weight_hh, one.bias)]
        share.sum_(*weights, self.inputs, self.h_0)
        share.sum_(self.skipped, self.ridge_grown)
        if share.by_samples:
            # Nobody has run all samples, not even the clean network.
            readout = [part for part in (self.weight_o, self.bias_o) if part is not None]
            share.sum_(self.outputs, self.h_n, self.loss, *readout)

    def add_readout(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the readout's gradient from dL/do, (L, b, O), and the states it read, (L, b, D * H)."""
        if self.weight_o is not None:
            self.weight_o += gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)
        if self.bias_o is not None:
            self.bias_o += gradient.sum((0, 1))


class CleanChunk:
    """Clean activity of one chunk of samples of a one-directional network, segment by segment from checkpoints."""

    def __init__(self, problem: Problem, samples: slice, segments: int, masks: tuple[Tensor, ...] = ()) -> None:
        self.problem, self.samples, self.masks = problem, samples, masks
        self.starts = {0: problem.h_0[:, samples]}
        self.keep = segments == 1
        self.kept: CleanRun | None = None

    def run(self, steps: slice) -> CleanRun:
        """Return the clean run of a segment whose start has been reached before."""
        if self.kept is not None:
            return self.kept
        run = run_network(
            self.problem.network,
            self.problem.inputs[steps, self.samples],
            self.starts[steps.start],
            dropout=self._dropout(steps),
        )
        self.starts[steps.stop] = run.h_n
        self.kept = run if self.keep else None
        return run

    def _dropout(self, steps: slice) -> Callable[[Tensor], Tensor] | None:
        each = iter(self.masks)
        return (lambda _: next(each)[steps, self.samples]) if self.masks else None


def draw_masks(problem: Problem) -> tuple[Tensor, ...]:
    """Draw the dropout of every layer but the first, (T, B, H): once, however the work is divided then."""
    if problem.dropout is None:
        return ()
    values = problem.inputs.new_empty((*problem.inputs.shape[:2], problem.width))
    return tuple(problem.dropout(values) for _ in problem.network.layers[1:])


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
