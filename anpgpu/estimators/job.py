"""The job of an estimator in `estimate_grad_`, the dropout of an update, and loss differences of a black box."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem

EVERYONE = slice(None)
"""All samples, or all steps."""

SPREAD_RIDGE = 1e-6
"""Of the regression of whole sequences' values, relative to the mean squared output deviation of a rollout."""


class Extent(NamedTuple):
    """The size of an update."""

    time: int
    batch: int
    lengths: Tensor | None
    """Valid steps of each sample, (B,); None is all."""


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
    of_inputs: bool = True
    """Whether the inputs' gradient is wanted."""
    of_h_0: bool = True
    """Whether the first states' gradient is wanted."""

    def agreed(self, *masks: Tensor) -> Job:
        """Return the job with the same seed and memory limit in all processes that share its rollouts.

        Raises:
            RuntimeError: the processes do not hold the same batch, weights and dropout masks.
        """
        if self.settings.share.alone:
            return self
        problem = self.problem
        weights = [
            weight for layer in problem.network.layers for side in layer for weight in side if weight is not None
        ]
        readout = (problem.weight_o, problem.bias_o, problem.loss.targets.values, problem.loss.weight)
        optional = [tensor for tensor in readout if tensor is not None]
        held = (problem.inputs, problem.h_0, *weights, *optional, *masks)
        seed, max_memory = self.settings.share.agree(self.seed, self.max_memory, *held)
        return self._replace(seed=seed, max_memory=max_memory)


def draw_masks(problem: Problem) -> tuple[Tensor, ...]:
    """Draw the dropout masks of every layer but the first, (T, B, D * H), once for every division of the work."""
    if problem.dropout is None:
        return ()
    values = problem.inputs.new_empty((*problem.inputs.shape[:2], problem.width))
    return tuple(problem.dropout(values) for _ in problem.network.layers[1:])


class BlackBoxChange:
    """Loss differences that only the caller can measure: the perturbed call minus the clean one.

    A value of a whole sequence, v_p = sum_t dL/do_t . delta_o_tp to first order, is no loss of its last step: what
    earlier outputs caused is part of it, and activity of later steps goes along with that, so that to regress the value
    on activity is biased, however many rollouts there are. So dL/do of all valid steps is found first,

        g = argmin_g sum_p (v_p - sum_t g_t . delta_o_tp)^2 + r |g|^2,

    exact from P >= T O on, and below in the span of P directions; then delta_loss_tp = g_t . delta_o_tp, as of a linear
    loss. An estimator that weights credit by noise needs none of this: it is unbiased as it is. Derived here.

    Args:
        problem: with a loss of the caller's.
        outputs: clean outputs of some samples, (T, b, O).
        samples: which.
        settings: of rollouts whose activity is to be credited; None where it is not.
    """

    def __init__(self, problem: Problem, outputs: Tensor, samples: slice, settings: Settings | None = None) -> None:
        self.problem, self.samples = problem, samples
        self.outputs = outputs.unsqueeze(2)
        self.clean = problem.loss.call(self.outputs.clone(), samples)
        self.spread = problem.loss.per_sequence and settings is not None and settings.estimator.stores_delta
        """Whether a value of a whole sequence is spread over its steps."""
        self.finds_gradient = settings is not None and settings.estimator.keeps_state
        """Whether dL/do is needed for itself."""
        self.output_gradient = outputs.new_zeros(0)
        """dL/do, (T, b, O), once measured, if it is needed."""
        if self.spread and settings is not None and not settings.share.alone and not settings.share.by_samples:
            raise ValueError(
                f"method={settings.method!r} with shard_rollouts=True needs a loss of each step: one value of a whole "
                "sequence is regressed on all rollouts at once; return (T, B, p) values, or use method='np' or 'anp-ls'"
            )

    def of(self, delta_o: Tensor) -> Tensor:
        """Return (T, b, p) loss differences of delta_o, (T, b, p, O)."""
        change = self.problem.loss.call(self.outputs + delta_o, self.samples) - self.clean
        if self.problem.loss.moved is not None:
            self.problem.loss.moved += ((change != 0).any(0) & torch.isfinite(change).all(0)).sum()
        if self.finds_gradient and not self.spread:
            self.output_gradient = self._of_steps(delta_o, change)
        return self._spread(delta_o, change.sum(0)) if self.spread else change

    def _of_steps(self, delta_o: Tensor, change: Tensor) -> Tensor:
        """Return dL/do, (T, b, O), from each step's loss differences, (T, b, p)."""
        finite = torch.isfinite(change) & torch.isfinite(delta_o).all(-1)
        valid = self.problem.loss.valid[:, self.samples, None]
        counted = finite & valid
        return _regressed(torch.where(counted.unsqueeze(-1), delta_o, 0), torch.where(counted, change, 0))

    def _spread(self, delta_o: Tensor, values: Tensor) -> Tensor:
        """Return each step's share, (T, b, p), of the differences of whole sequences, (b, p); NaN where one is lost."""
        time, batch, _, outputs = delta_o.shape
        valid = self.problem.loss.valid[:, self.samples, None, None]
        finite = torch.isfinite(values) & torch.isfinite(delta_o).all(-1).all(0)
        rows = torch.where(valid & finite.unsqueeze(-1), delta_o, 0).permute(1, 2, 0, 3).flatten(2)
        gradient = _regressed(rows, torch.where(finite, values, 0)).view(batch, time, 1, outputs).transpose(0, 1)
        self.output_gradient = gradient.squeeze(2)
        return torch.where(finite, (torch.where(valid, delta_o, 0) * gradient).sum(-1), torch.nan)


def _regressed(rows: Tensor, targets: Tensor) -> Tensor:
    """Return g = argmin sum_p (targets_p - rows_p . g)^2 + r |g|^2, (..., n), of rows (..., p, n), targets (..., p)."""
    rollouts, width = rows.shape[-2:]
    scale = torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    rows = rows / scale
    dual = rollouts <= width
    gram = (rows @ rows.mT if dual else rows.mT @ rows).double()
    # The trace is 1.
    gram.diagonal(dim1=-2, dim2=-1).add_(SPREAD_RIDGE / max(rollouts, 1))
    factor = torch.linalg.cholesky_ex(gram)[0].to(rows.dtype)
    right = targets.unsqueeze(-1)
    solved = torch.cholesky_solve(right if dual else rows.mT @ right, factor)
    gradient: Tensor = (rows.mT @ solved if dual else solved) / scale
    return gradient.squeeze(-1)
