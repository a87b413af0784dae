"""Rivals that go backward in time: whole sequences by autograd, and BPTT(h), each loss through its last h steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from rivals_cells import Linearised, State, linearised, structure
from torch import Tensor, nn

__all__ = ["LossOf", "Outcome", "Rival", "Truncated", "Whole", "add_gradients", "errors_of", "finish"]

LossOf = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of outputs (T, B, O) and targets."""


class Outcome(NamedTuple):
    """What an update found beside the gradients in `.grad`."""

    loss: float
    last: State
    """Final state, detached."""


class Rival(Protocol):
    """One way to the gradient of one network; it may keep something from a window to the next."""

    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        """Add the gradients of a window to `.grad`; a state says that it continues the last window."""
        ...


def detached(state: State) -> State:
    """Return a state without its graph."""
    return tuple(value.detach() for value in state) if isinstance(state, tuple) else state.detach()


class Whole:
    """Backpropagation through all steps of a window, by autograd."""

    def __init__(self, rnn: nn.RNNBase, readout: nn.Linear) -> None:
        self.rnn, self.readout = rnn, readout

    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        hidden, last = self.rnn(inputs, hx)
        loss = loss_of(self.readout(hidden), targets)
        loss.backward()
        return Outcome(float(loss.detach()), detached(last))


def errors_of(readout: nn.Linear, hidden: Tensor, targets: Tensor, loss_of: LossOf) -> tuple[float, Tensor]:
    """Add the readout's gradients to `.grad`; return the loss and dL/dh_t through step t's output alone, (T, B, H)."""
    leaf = hidden.detach().requires_grad_()
    loss = loss_of(readout(leaf), targets)
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad


def add_gradients(rnn: nn.RNNBase, by_name: dict[str, Tensor]) -> None:
    """Add to `.grad`."""
    for name, gradient in by_name.items():
        parameter = getattr(rnn, name)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class Truncated:
    """BPTT(h): the loss of each step goes back through the last `depth` steps, its own included, and no further.

    All steps' losses go back together: after j rounds row t is the adjoint of step t - j.
    """

    def __init__(self, rnn: nn.RNNBase, readout: nn.Linear, *, depth: int) -> None:
        structure(rnn)
        if depth < 1:
            raise ValueError(f"a loss goes back through at least its own step: depth must be at least 1, got {depth}")
        self.rnn, self.readout, self.depth = rnn, readout, depth

    @torch.no_grad()
    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        steps = linearised(self.rnn, inputs, hx)
        with torch.enable_grad():
            loss, errors = errors_of(self.readout, steps.hidden, targets, loss_of)
        adjoint = torch.zeros_like(steps.direct[:, :, 0])
        adjoint[:, :, 0] = errors
        by_input = torch.zeros_like(steps.by_input[:, :, 0])
        by_state = torch.zeros_like(steps.by_state[:, :, 0])
        for back in range(min(self.depth, len(errors))):
            # Row t of `adjoint` is of step t - back; rows before `back` have left the window.
            here = slice(0, len(errors) - back)
            by_input[here] += (adjoint.unsqueeze(3) * steps.by_input[here]).sum(2)
            recurrent = (adjoint.unsqueeze(3) * steps.by_state[here]).sum(2)
            by_state[here] += recurrent
            if back + 1 == self.depth:
                break
            earlier = torch.einsum("tbmh,tbmnh->tbnh", adjoint, steps.direct[here])
            earlier[:, :, 0] += torch.einsum("tbkh,khj->tbj", recurrent, steps.recurrent)
            adjoint = earlier[1:]
        finish(self.rnn, steps, by_input, by_state)
        return Outcome(loss, steps.last)


def finish(rnn: nn.RNNBase, steps: Linearised, by_input: Tensor, by_state: Tensor) -> None:
    """Add the gradients that follow from those of the gates' two sides, (T, B, K, H)."""
    by_input, by_state = by_input.flatten(2), by_state.flatten(2)
    gradients = {
        "weight_ih_l0": torch.einsum("tbg,tbi->gi", by_input, steps.inputs),
        "weight_hh_l0": torch.einsum("tbg,tbh->gh", by_state, steps.before),
        "bias_ih_l0": by_input.sum((0, 1)),
        "bias_hh_l0": by_state.sum((0, 1)),
    }
    add_gradients(rnn, gradients)
