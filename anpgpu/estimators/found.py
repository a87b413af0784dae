"""The result of an update: gradients in parts, agreement of two halves of the rollouts, counts of skipped rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anpgpu.network.cells import Cell, GateAdjoints, LayerRun
from anpgpu.network.stack import Network
from anpgpu.network.weights import LayerWeights
from anpgpu.runtime.processes import Share
from anpgpu.runtime.ranges import within
from anpgpu.task.problem import Problem


class Estimate(NamedTuple):
    """The report of an update, besides the gradients.

    `RNN.last_estimate` has only `skipped`, `split_half`, `ridge_grown` and `prior`; the other fields are then None.
    """

    loss: Tensor | None
    """Clean loss, 0-dim."""
    outputs: Tensor | None
    """Clean outputs in the layout of the inputs: (T, B, O), (B, T, O) with batch_first, (T, O) unbatched."""
    h_n: Tensor | tuple[Tensor, ...] | None
    """Clean final states, as torch's modules return them: of an LSTM (h_n, c_n)."""
    skipped: Tensor
    """Number of rollouts left out because they were not finite, over samples, layers and directions; 0-dim int64."""
    split_half: Tensor
    """Cosine between the estimates from the even and the odd rollouts, 0-dim. Near 1, more rollouts would change
    little. It shows variance, not bias: a discount of 0 can look perfect. NaN with one rollout, for "anp-ls" unless
    `Perturbation(split_half=True)` asks for it, and for "anp-feedback"."""
    ridge_grown: Tensor
    """Number of least-squares systems ("anp-ls") whose Cholesky factorisation failed with the given ridge; they were
    solved with a ridge as large as the system itself. 0-dim int64."""
    moved: Tensor | None = None
    """Number of rollouts that changed a callable loss, over samples, the last layer's directions, and the readout's
    rollouts; 0-dim int64. At 0 every gradient is zero: on the CPU a warning says so, on CUDA, where nothing makes the
    host wait, this number alone. None for other losses, and with method "bptt"."""
    prior: Tensor | None = None
    """How good the prior mean of "anp-feedback" was, (layers * D, 2); (0, 2) for other methods. First the mean gain
    with which the returns confirm it, in [0, 1]; then the ratio of what the returns show of the feedback's part to what
    the feedback matrix predicts. Both near 1 once it has converged; NaN where nothing was predicted or learnt, as in
    layers that need no gradient."""


class NonFiniteRolloutsError(RuntimeError):
    """No rollout of some sample stayed finite, so its gradient cannot be estimated."""


def raise_if_lost(finite: Tensor, first_sample: int, sigma: float) -> None:
    """Raise NonFiniteRolloutsError if a sample has no finite rollout; `finite` is (b, P) bool.

    On CUDA the estimate becomes NaN instead, because reading `finite` would make the host wait.
    """
    if finite.is_cuda:
        return
    lost = (~finite.any(1)).nonzero().flatten() + first_sample
    if len(lost):
        raise NonFiniteRolloutsError(
            f"every rollout of sample {', '.join(map(str, lost[:8].tolist()))} is not finite ({len(lost)} such "
            f"samples, sigma={sigma!r}): look for NaN or inf in inputs and weights, or for a state that explodes"
        )


class GradientSums:
    """Gradients of one layer's weights, in parts that add up to the estimate, (parts, ...) each.

    The first two parts come from the even and from the odd rollouts, a third from all rollouts together.
    """

    def __init__(self, weights: LayerWeights, parts: int = 2) -> None:
        rows = weights.weight_hh.shape[0]
        self.weight_ih = weights.weight_ih.new_zeros((parts, *weights.weight_ih.shape))
        self.weight_hh = weights.weight_hh.new_zeros((parts, *weights.weight_hh.shape))
        self.bias_ih = weights.weight_hh.new_zeros((parts, rows))
        self.bias_hh = self.bias_ih
        """The same tensor as `bias_ih` unless the two biases have different gradients."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All distinct sums."""
        biases = (self.bias_ih,) if self.bias_hh is self.bias_ih else (self.bias_ih, self.bias_hh)
        return self.weight_ih, self.weight_hh, *biases

    @within("weight_gradients")
    def add(self, gates: GateAdjoints, run: LayerRun) -> None:
        """Add sum_t A_t (x_t, 1)^T and sum_t R_t (h_{t-1}, 1)^T of some steps, A and R the fields of `gates`."""
        for total, adjoint, presynaptic in (
            (self.weight_ih, gates.inputs, run.inputs),
            (self.weight_hh, gates.recurrent, run.states[:-1, :, : self.weight_hh.shape[2]]),
        ):
            rows = adjoint.flatten(1, 2).transpose(1, 2)
            total.baddbmm_(rows, presynaptic.flatten(0, 1).expand(len(rows), -1, -1))
        if gates.recurrent is not gates.inputs:
            self.bias_hh = self.bias_hh + gates.recurrent.sum((1, 2))
        self.bias_ih += gates.inputs.sum((1, 2))

    def totals(self, *, biases: bool) -> tuple[Tensor, ...]:
        """Return the gradients in the order of the layer's parameters."""
        both = (self.bias_ih.sum(0), self.bias_hh.sum(0)) if biases else ()
        return self.weight_ih.sum(0), self.weight_hh.sum(0), *both


def split_half(sums: Sequence[GradientSums]) -> Tensor:
    """Return the cosine between the two halves' gradients over all weights and biases, a 0-dim tensor.

    It shows the estimate's variance, not its bias; NaN where a half is zero, as with one rollout, and where halves are
    not told apart.
    """
    if len(sums[0].weight_hh) == 1:
        return torch.full((), torch.nan, dtype=sums[0].weight_hh.dtype, device=sums[0].weight_hh.device)
    dot, first, second = torch.stack([_products(tensor[:2]) for layer in sums for tensor in layer.tensors]).sum(0)
    cosine: Tensor = dot / (first * second).sqrt()
    return cosine.to(sums[0].weight_hh.dtype)


def _products(halves: Tensor) -> Tensor:
    """Return the product of two halves, (2, ...), and each half's square, (3,) float64.

    The squares of gradients of 1e20 or 1e-23 leave float32's range.
    """
    left, right = halves.flatten(1).double().unbind()
    return torch.stack([left @ right, left @ left, right @ right])


class Found:
    """The result of an estimator, filled in step by step, in canonical form: gradients and counts.

    Args:
        network: in the working type.
        inputs: (T, B, I).
        h_0: (layers * D, B, S).
        parts: number of parts of the weights' gradients, see `GradientSums`.
    """

    def __init__(self, network: Network, inputs: Tensor, h_0: Tensor, parts: int = 2) -> None:
        self.cell: type[Cell] = network.cell
        self.layers = [GradientSums(weights, parts) for layer in network.layers for weights in layer]
        self.inputs = torch.zeros_like(inputs)
        self.h_0 = torch.zeros_like(h_0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=inputs.device)
        self.ridge_grown = torch.zeros_like(self.skipped)
        self.learners: list[Any] = []
        """What each layer and direction has learnt, of an estimator that keeps a state; None where it did not run."""

    @property
    def prior(self) -> Tensor:
        """How good the prior means were, see `Estimate`, (layers * D, 2); (0, 2) without a prior."""
        nothing = self.h_0.new_full((2,), torch.nan)
        reports = [nothing if learner is None else learner.report for learner in self.learners]
        return torch.stack(reports) if reports else self.h_0.new_empty((0, 2))

    @property
    def split_half(self) -> Tensor:
        """Cosine between the two halves' gradients, see `Estimate`."""
        return split_half(self.layers)

    @property
    def weights(self) -> list[Tensor]:
        """Every sum of the weights' gradients."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def credit(self, index: int, parts: Tensor, weights: LayerWeights, run: LayerRun) -> tuple[Tensor, Tensor]:
        """Add the gradients of a layer's weights that follow from an adjoint; return the adjoint and dL/dx.

        Args:
            index: of the layer and direction in `layers`.
            parts: the adjoint in parts, (parts, L, b, S).
            weights: of the layer.
            run: its clean activity over these steps.

        Returns:
            The adjoint, (L, b, S), and dL/dx, (L, b, I).
        """
        gates = self.cell.gate_adjoints(parts, weights, run)
        self.layers[index].add(gates, run)
        adjoint = parts.sum(0)
        total = adjoint if gates.inputs is parts else gates.inputs.sum(0)
        return adjoint, total @ weights.weight_ih


class FoundOfProblem(Found):
    """The result in `estimate_grad_`: also clean results, and the readout's gradient."""

    def __init__(self, problem: Problem, parts: int = 2) -> None:
        super().__init__(problem.network, problem.inputs, problem.h_0, parts)
        time, batch, _ = problem.inputs.shape
        self.outputs = problem.inputs.new_zeros((time, batch, problem.outputs_size))
        self.h_n = torch.zeros_like(problem.h_0)
        self.loss = problem.inputs.new_zeros(())
        self.moved = None if problem.loss.moved is None else problem.loss.moved.zero_()
        self.weight_o = None if problem.weight_o is None else torch.zeros_like(problem.weight_o)
        self.bias_o = None if problem.bias_o is None else torch.zeros_like(problem.bias_o)

    def sum_(self, share: Share) -> None:
        """Sum the results of the processes that share the rollouts."""
        share.sum_(*self.weights, self.inputs, self.h_0)
        share.sum_(self.skipped, self.ridge_grown, *(() if self.moved is None else (self.moved,)))
        if share.by_samples:
            # Each process has run only its samples, of the clean network, too.
            readout = [gradient for gradient in (self.weight_o, self.bias_o) if gradient is not None]
            share.sum_(self.outputs, self.h_n, self.loss, *readout)

    def add_readout(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the readout's gradient from dL/do, (L, b, O), and the states it read, (L, b, D * H)."""
        if self.weight_o is not None:
            self.weight_o += gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)
        if self.bias_o is not None:
            self.bias_o += gradient.sum((0, 1))
