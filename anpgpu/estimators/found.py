"""What an update finds: gradients in parts, how well two halves of the rollouts agree, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.network.cells import Cell, GateAdjoints, LayerRun
from anpgpu.network.stack import Network
from anpgpu.network.weights import LayerWeights
from anpgpu.runtime.processes import Share
from anpgpu.runtime.ranges import within
from anpgpu.task.problem import Problem


class Estimate(NamedTuple):
    """What an estimate tells besides the gradients.

    `RNN.last_estimate` holds only what a backward pass knows: skipped, split_half and ridge_grown.
    """

    loss: Tensor | None
    """Clean loss, 0-dim."""
    outputs: Tensor | None
    """Clean outputs, laid out as the inputs are: (T, B, O), (B, T, O) with batch_first, (T, O) unbatched."""
    h_n: Tensor | None
    """Clean final states, as `torch.nn.RNN` returns them."""
    skipped: Tensor
    """Rollouts left out because they were not finite, counted over samples, layers and directions; 0-dim int64."""
    split_half: Tensor
    """Cosine between the estimates from the even and the odd rollouts, 0-dim. Near 1: more rollouts would change
    little. It shows variance, not bias: a discount of 0 looks perfect to it. NaN with one rollout."""
    ridge_grown: Tensor
    """Least-squares systems ("anp-ls") that no Cholesky factor was found for with the ridge as given, and that were
    solved with one as large as the system itself; 0-dim int64."""


class NonFiniteRolloutsError(RuntimeError):
    """No rollout of some sample stayed finite, so there is nothing to estimate its gradient from."""


def raise_if_lost(finite: Tensor, first_sample: int, sigma: float) -> None:
    """Raise where no rollout of a sample is finite, given (b, P) bool.

    On CUDA the estimate becomes NaN instead, since looking would make the host wait.
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
    """Gradients of one layer's weights in parts that add up to the estimate, (parts, ...) each.

    The first two are what the even and the odd rollouts say; a third is what only all of them together can.
    """

    def __init__(self, weights: LayerWeights, parts: int = 2) -> None:
        rows = weights.weight_hh.shape[0]
        self.weight_ih = weights.weight_ih.new_zeros((parts, *weights.weight_ih.shape))
        self.weight_hh = weights.weight_hh.new_zeros((parts, *weights.weight_hh.shape))
        self.bias_ih = weights.weight_hh.new_zeros((parts, rows))
        self.bias_hh = self.bias_ih
        """Another tensor only where the two biases have different gradients."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every sum, once."""
        biases = (self.bias_ih,) if self.bias_hh is self.bias_ih else (self.bias_ih, self.bias_hh)
        return self.weight_ih, self.weight_hh, *biases

    @within("weight_gradients")
    def add(self, gates: GateAdjoints, run: LayerRun) -> None:
        """Add sum_t A_t (x_t, 1)^T and sum_t R_t (h_{t-1}, 1)^T of some steps."""
        for total, adjoint, presynaptic in (
            (self.weight_ih, gates.inputs, run.inputs),
            (self.weight_hh, gates.recurrent, run.states[:-1]),
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

    It shows the estimate's variance, not its bias; NaN where a half is zero, as with one rollout.
    """
    parts = [tensor.flatten(1) for layer in sums for tensor in layer.tensors]
    dot, first, second = (
        torch.stack([part[left] @ part[right] for part in parts]).sum() for left, right in ((0, 1), (0, 0), (1, 1))
    )
    return dot / (first.sqrt() * second.sqrt())


class Found:
    """What an estimator finds, filled in piece by piece, in canonical form: gradients and counts.

    Args:
        network: in the working type.
        inputs: (T, B, I).
        h_0: (layers * D, B, H).
        parts: of the weights' gradients, as `GradientSums` has them.
    """

    def __init__(self, network: Network, inputs: Tensor, h_0: Tensor, parts: int = 2) -> None:
        self.cell: type[Cell] = network.cell
        self.layers = [GradientSums(weights, parts) for layer in network.layers for weights in layer]
        self.inputs = torch.zeros_like(inputs)
        self.h_0 = torch.zeros_like(h_0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=inputs.device)
        self.ridge_grown = torch.zeros_like(self.skipped)

    @property
    def split_half(self) -> Tensor:
        """The agreement of the halves, see `Estimate`."""
        return split_half(self.layers)

    @property
    def weights(self) -> list[Tensor]:
        """Every sum of the weights' gradients."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def credit(self, index: int, parts: Tensor, weights: LayerWeights, run: LayerRun) -> tuple[Tensor, Tensor]:
        """Add what an adjoint says of a layer's weights; return the adjoint's sum and dL/dx of these steps.

        Args:
            index: the layer and direction, as in `layers`.
            parts: the adjoint, (parts, L, b, H).
            weights: the layer's.
            run: its clean activity over these steps.

        Returns:
            The adjoint, (L, b, H), and dL/dx, (L, b, I).
        """
        gates = self.cell.gate_adjoints(parts, weights, run)
        self.layers[index].add(gates, run)
        adjoint = parts.sum(0)
        total = adjoint if gates.inputs is parts else gates.inputs.sum(0)
        return adjoint, total @ weights.weight_ih


class FoundOfProblem(Found):
    """What `estimate_grad_` finds: also clean results, and the readout's gradient."""

    def __init__(self, problem: Problem, parts: int = 2) -> None:
        super().__init__(problem.network, problem.inputs, problem.h_0, parts)
        time, batch, _ = problem.inputs.shape
        self.outputs = problem.inputs.new_zeros((time, batch, problem.outputs_size))
        self.h_n = torch.zeros_like(problem.h_0)
        self.loss = problem.inputs.new_zeros(())
        self.weight_o = None if problem.weight_o is None else torch.zeros_like(problem.weight_o)
        self.bias_o = None if problem.bias_o is None else torch.zeros_like(problem.bias_o)

    def sum_(self, share: Share) -> None:
        """Add up what the processes that share the rollouts have found."""
        share.sum_(*self.weights, self.inputs, self.h_0)
        share.sum_(self.skipped, self.ridge_grown)
        if share.by_samples:
            # Nobody has run all samples, not even the clean network.
            readout = [gradient for gradient in (self.weight_o, self.bias_o) if gradient is not None]
            share.sum_(self.outputs, self.h_n, self.loss, *readout)

    def add_readout(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add the readout's gradient from dL/do, (L, b, O), and the states it read, (L, b, D * H)."""
        if self.weight_o is not None:
            self.weight_o += gradient.flatten(0, 1).t() @ hidden.flatten(0, 1)
        if self.bias_o is not None:
            self.bias_o += gradient.sum((0, 1))
