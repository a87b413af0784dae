"""The step of a network: a class per cell, in the table `registry.CELLS`.

A cell defines how a layer runs, which clean values its rollouts need, and how the gradients of weights, inputs and
first state follow from the adjoint, the estimate lam_t of dL/da_t. How a step changes a deviation is defined in
`kernels/cell*`, in one form per backend, which `Cell.forms` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.cell import RELU, TANH, CellForms
from anpgpu.registry import CELLS

from .weights import LayerWeights, in_processing_order, valid_steps


class LayerRun(NamedTuple):
    """Clean activity of one layer and direction over some steps, in processing order."""

    inputs: Tensor
    """(T, B, I)."""
    states: Tensor
    """(T + 1, B, H): the state before the first step, then after each; zero past a sample's length."""
    valid: Tensor | None = None
    """Steps within each sample's length, (T, B) bool; None where all are."""

    def segment(self, steps: slice, samples: slice) -> LayerRun:
        """Return the activity of some steps of some samples."""
        valid = None if self.valid is None else self.valid[steps, samples]
        return LayerRun(self.inputs[steps, samples], self.states[steps.start : steps.stop + 1, samples], valid)


class GateAdjoints(NamedTuple):
    """dL/d(W_ih x + b_ih) and dL/d(W_hh h + b_hh), (parts, T, B, G H); the same tensor where they are equal."""

    inputs: Tensor
    recurrent: Tensor


class Cell:
    """An Elman cell, h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), and the base of all others.

    A new cell overrides what differs; `docs/extending.md` shows how.
    """

    forms: CellForms
    """What a step does to a deviation, on each backend that has it."""
    resting: float | None = None
    """A pre-activation around which no deviation survives, for cells whose deviations could grow without bound in the
    padding; None where they cannot."""
    native: bool = True
    """Whether the torch module's own forward pass computes this cell; it then runs where no estimate is needed."""

    @classmethod
    def run_layer(cls, layer: Sequence[LayerWeights], inputs: Tensor, h_0: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run one layer without perturbation.

        Args:
            layer: the weights of its directions, one or two.
            inputs: (T, B, I), in time order.
            h_0: (directions, B, H).

        Returns:
            The outputs, (T, B, D * H), and each direction's states, (T + 1, B, H) in processing order.
        """
        raise NotImplementedError

    @classmethod
    def run_padded(cls, weights: LayerWeights, inputs: Tensor, h_0: Tensor, lengths: Tensor) -> Tensor:
        """Run one direction on samples of unequal length; return its states, (T + 1, B, H), zero past the length.

        Args:
            weights: of the direction.
            inputs: (T, B, I), in processing order.
            h_0: (B, H).
            lengths: (B,) int64 on the CPU, in [0, T].
        """
        _, (states,) = cls.run_layer((weights,), inputs, h_0.unsqueeze(0))
        valid = valid_steps(len(inputs), lengths, inputs.device).unsqueeze(-1)
        return torch.cat((states[:1], torch.where(valid, states[1:], 0)))

    @classmethod
    def preactivations(cls, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return a = W_ih x + b_ih + W_hh h_{t-1} + b_hh, (T, B, H), for all steps of a run at once."""
        preact = F.linear(run.inputs, weights.weight_ih, weights.bias_ih)
        preact += F.linear(run.states[:-1], weights.weight_hh, weights.bias_hh)
        if cls.resting is None or run.valid is None:
            return preact
        return torch.where(run.valid.unsqueeze(-1), preact, cls.resting)

    @classmethod
    def gate_adjoints(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> GateAdjoints:
        """Return the adjoints of a step's two matrix products from the adjoint dL/da, (parts, T, B, H)."""
        del weights, run
        return GateAdjoints(adjoint, adjoint)

    @classmethod
    def first_state_gradient(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return dL/dh_0, (B, H), from the adjoint of the first step, (B, H), and a run that begins there."""
        del run
        return adjoint @ weights.weight_hh


class _Elman(Cell):
    """An Elman cell that torch's own fused function runs."""

    torch_run: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def run_layer(cls, layer: Sequence[LayerWeights], inputs: Tensor, h_0: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run one layer by the function that `torch.nn.RNN` calls, with both directions in one call, as it does.

        Two calls would round differently: torch projects the inputs before it reverses them, and the rounding of a
        matrix product may depend on the order of rows.
        """
        flat = [weight for weights in layer for weight in weights if weight is not None]
        biases, both = layer[0].bias_ih is not None, len(layer) == 2
        # cuDNN differentiates what it ran in training mode alone; without dropout the mode changes nothing else.
        outputs, _ = cls.torch_run(inputs, h_0, flat, biases, 1, 0.0, torch.is_grad_enabled(), both, False)
        sides = outputs.chunk(len(layer), -1)
        states = [
            torch.cat((start.unsqueeze(0).to(side.dtype), in_processing_order(side, bool(number), None)))
            for number, (start, side) in enumerate(zip(h_0, sides, strict=True))
        ]
        return outputs, states

    @classmethod
    def run_padded(cls, weights: LayerWeights, inputs: Tensor, h_0: Tensor, lengths: Tensor) -> Tensor:
        """Run one direction as torch runs a packed sequence: nothing is computed past a sample's length."""
        longest_first = lengths.argsort(descending=True, stable=True)
        longest_first = longest_first[: int((lengths > 0).sum())]
        states = torch.cat((h_0.unsqueeze(0).to(inputs.dtype), inputs.new_zeros((len(inputs), *h_0.shape))))
        if not len(longest_first):
            return states
        order = longest_first.to(inputs.device)
        data, sizes = torch._VF._pack_padded_sequence(inputs[:, order], lengths[longest_first], False)
        flat = [weight for weight in weights if weight is not None]
        biases = weights.bias_ih is not None
        data, _ = cls.torch_run(
            data, sizes, h_0[order].unsqueeze(0), flat, biases, 1, 0.0, torch.is_grad_enabled(), False
        )
        padded, _ = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(inputs))
        return torch.cat((states[:1], torch.zeros_like(states[1:]).to(padded.dtype).index_copy(1, order, padded)))


@CELLS.add("tanh")
class Tanh(_Elman):
    """`torch.nn.RNN` with tanh."""

    forms = TANH

    @staticmethod
    def torch_run(*arguments: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function."""
        return torch._VF.rnn_tanh(*arguments)


@CELLS.add("relu")
class Relu(_Elman):
    """`torch.nn.RNN` with relu."""

    forms = RELU
    resting = -1e30

    @staticmethod
    def torch_run(*arguments: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function."""
        return torch._VF.rnn_relu(*arguments)


def cell_name(module: nn.Module) -> str:
    """Return the name in `CELLS` of a recurrent module's cell: its attribute `cell`, or else its nonlinearity."""
    name: str = getattr(module, "cell", None) or module.nonlinearity  # type: ignore[assignment]
    return name
