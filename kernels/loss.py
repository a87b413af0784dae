"""Loss differences: what a deviation of the states does to the loss of its step, computed without cancellation.

    linear         delta_loss = g . delta_h
    squared        delta_loss = weight * mean_o delta_o (2 e + delta_o)
    cross-entropy  delta_loss = weight * log1p(sum_o p_o expm1(delta_o - delta_o[target]))

with e = clean output - target, p = clean softmax and delta_o = W_o delta_h. Derived here.

Every loss has the same properties, so that no kernel asks which loss it has: `kind` names its device functions,
`measured` says whether a rollout computes loss differences at all, `grad` is dL/dh of a linear loss and None of any
other, `readout` is W_o or None, and `differences` holds the equation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WAITING_BYTES = 1 << 19
"""Output deviations that are collected before their loss differences are computed."""

PLAIN_FORM_ABOVE = 0.5
"""Difference of logits from which the plain form of the cross-entropy loses nothing to cancellation."""


class LinearLoss(NamedTuple):
    """Loss that is linear in the hidden state: the gradient that autograd sends back."""

    grad: Tensor
    """dL/dh, (T, B, H)."""

    @property
    def kind(self) -> str:
        """Name of the loss."""
        return "linear"

    @property
    def measured(self) -> bool:
        """Whether a rollout computes loss differences."""
        return True

    @property
    def readout(self) -> None:
        """The loss sees the states themselves."""
        return

    def state_gradient(self) -> Tensor:
        """Return dL/dh, (T, B, H)."""
        return self.grad

    def differences(self, steps: slice, deviation: Tensor) -> Tensor:
        """Return delta_loss of some steps, (L, B, P), from delta_h, (L, B, P, H)."""
        return (deviation @ self.grad[steps].unsqueeze(-1)).squeeze(-1)


class SquaredLoss(NamedTuple):
    """Mean over outputs of the squared error, times a weight per step and sample."""

    readout: Tensor | None
    """W_o, (O, H); None where the hidden state is the output."""
    error: Tensor
    """Clean output minus target, (T, B, O)."""
    weight: Tensor
    """Share of each step in the reported loss, (T, B); zero where a step has no loss."""

    @property
    def kind(self) -> str:
        """Name of the loss."""
        return "squared"

    @property
    def measured(self) -> bool:
        """Whether a rollout computes loss differences."""
        return True

    @property
    def grad(self) -> None:
        """The loss is not linear in the state."""
        return

    def state_gradient(self) -> Tensor:
        """Return dL/dh of each step's loss, (T, B, H)."""
        return _through(self.readout, self.error * (2 / self.error.shape[-1]), self.weight)

    def differences(self, steps: slice, deviation: Tensor) -> Tensor:
        """Return delta_loss of some steps, (L, B, P), from delta_o, (L, B, P, O)."""
        return _weighted(squared_difference(deviation, self.error[steps].unsqueeze(2)), self.weight[steps])


class CrossEntropyLoss(NamedTuple):
    """Cross-entropy with class indices, times a weight per step and sample."""

    readout: Tensor | None
    """W_o, (O, H); None where the hidden state holds the logits."""
    probs: Tensor
    """Clean softmax, (T, B, O)."""
    target: Tensor
    """Class indices, (T, B) int64, each in [0, O) also where the weight is zero."""
    weight: Tensor
    """Share of each step in the reported loss, (T, B); zero where a step has no loss."""

    @property
    def kind(self) -> str:
        """Name of the loss."""
        return "cross_entropy"

    @property
    def measured(self) -> bool:
        """Whether a rollout computes loss differences."""
        return True

    @property
    def grad(self) -> None:
        """The loss is not linear in the state."""
        return

    def state_gradient(self) -> Tensor:
        """Return dL/dh of each step's loss, (T, B, H)."""
        index = self.target.unsqueeze(-1)
        return _through(self.readout, self.probs.scatter_add(-1, index, -torch.ones_like(self.probs)), self.weight)

    def differences(self, steps: slice, deviation: Tensor) -> Tensor:
        """Return delta_loss of some steps, (L, B, P), from delta_o, (L, B, P, O)."""
        probs, target = self.probs[steps].unsqueeze(2), self.target[steps].unsqueeze(2)
        return _weighted(cross_entropy_difference(deviation, probs, target), self.weight[steps])


class OutputsOnly(NamedTuple):
    """A loss that only the caller can measure: the rollout returns delta_o for that."""

    readout: Tensor | None
    """W_o, (O, H); None where the hidden state is the output."""

    @property
    def kind(self) -> str:
        """Name of the loss."""
        return "outputs"

    @property
    def measured(self) -> bool:
        """Whether a rollout computes loss differences."""
        return False

    @property
    def grad(self) -> None:
        """The loss is not linear in the state."""
        return

    def state_gradient(self) -> Tensor:
        """Raise TypeError."""
        raise TypeError(f"only the caller can measure {type(self).__name__}")

    def differences(self, steps: slice, deviation: Tensor) -> Tensor:
        """Raise TypeError."""
        raise TypeError(f"only the caller can measure {type(self).__name__}")


Loss = LinearLoss | SquaredLoss | CrossEntropyLoss | OutputsOnly


def check_loss(loss: Loss | None) -> None:
    """Raise TypeError unless `loss` is a loss or None."""
    if loss is not None and not isinstance(loss, Loss):
        raise TypeError(
            f"loss must be a LinearLoss, SquaredLoss, CrossEntropyLoss, OutputsOnly or None, got {type(loss).__name__}"
        )


def loss_of_steps(loss: Loss, steps: slice, samples: slice = slice(None)) -> Loss:
    """Return the loss restricted to some time steps and samples: every field but the readout is (T, B, ...)."""
    return loss._replace(**{name: field[steps, samples] for name, field in step_fields(loss).items()})


def step_fields(loss: Loss) -> dict[str, Tensor]:
    """Return the fields of a loss that have steps, each (T, B, ...)."""
    return {name: field for name, field in loss._asdict().items() if name != "readout"}


def loss_differences(loss: Loss, steps: slice, deviation: Tensor) -> Tensor:
    """Return delta_loss of some steps, (L, B, P), from delta_h of a linear loss or delta_o of another, (L, B, P, .).

    Raises:
        TypeError: only the caller can measure the loss, or it is none.
    """
    check_loss(loss)
    return loss.differences(steps, deviation)


class Measure:
    """Collects what the states of each step do to the outputs and the loss.

    Output deviations are collected for a block of steps, whose loss differences are then computed at once.
    """

    def __init__(self, loss: Loss | None, preact: Tensor, rollouts: int) -> None:
        check_loss(loss)
        time, batch, units = preact.shape
        self.loss, self.time = loss, time
        self.delta_loss: Tensor | None = None
        self.delta_o: Tensor | None = None
        if loss is None:
            return
        if loss.measured:
            self.delta_loss = preact.new_empty((time, batch, rollouts))
        if loss.grad is not None:
            return
        outputs = units if loss.readout is None else loss.readout.shape[0]
        step_bytes = max(1, batch * rollouts * outputs * preact.itemsize)
        self.length = min(time, max(1, WAITING_BYTES // step_bytes)) if loss.measured else time
        self.waiting = preact.new_empty((self.length, batch, rollouts, outputs))
        if not loss.measured:
            self.delta_o = self.waiting

    def step(self, step: int, delta_h: Tensor) -> None:
        """Take the deviation of a state, (B, P, H)."""
        if self.loss is None:
            return
        if self.loss.grad is not None:
            if self.delta_loss is not None:
                torch.matmul(delta_h, self.loss.grad[step].unsqueeze(-1), out=self.delta_loss[step].unsqueeze(-1))
            return
        place = step % self.length
        if self.loss.readout is None:
            self.waiting[place] = delta_h
        else:
            torch.matmul(delta_h, self.loss.readout.t(), out=self.waiting[place])
        self.taken(step)

    def taken(self, step: int) -> None:
        """Compute the loss differences of the collected deviations once those of `step` complete their block."""
        place = step % self.length
        if self.delta_loss is not None and (place + 1 == self.length or step + 1 == self.time):
            assert self.loss is not None  # noqa: S101  (for the type checker; without a loss there is no delta_loss)
            steps = slice(step - place, step + 1)
            self.delta_loss[steps] = self.loss.differences(steps, self.waiting[: place + 1])


def output_deviation(readout: Tensor | None, delta_h: Tensor) -> Tensor:
    """Return delta_o = W_o delta_h, (..., O); the readout's bias cancels."""
    return delta_h if readout is None else delta_h @ readout.t()


def squared_difference(delta_o: Tensor, error: Tensor) -> Tensor:
    """Return mean_o delta_o (2 e + delta_o), (..., P), from (..., P, O) and (..., 1, O)."""
    return (delta_o * (2 * error + delta_o)).mean(-1)


def cross_entropy_difference(delta_o: Tensor, probs: Tensor, target: Tensor) -> Tensor:
    """Return log sum_o p_o exp(d_o), d_o = delta_o - delta_o[target], (..., P).

    delta_o is (..., P, O), probs (..., 1, O), target (..., 1).
    """
    index = target.unsqueeze(-1).expand(*delta_o.shape[:-1], 1)
    difference = delta_o - delta_o.gather(-1, index)
    small = torch.log1p((probs * torch.expm1(difference)).sum(-1))
    # For large deviations expm1 overflows, or its sum nears -1; there nothing cancels in the plain form.
    top = difference.amax(-1, keepdim=True)
    large = torch.log((probs * torch.exp(difference - top)).sum(-1)) + top.squeeze(-1)
    return torch.where(difference.abs().amax(-1) > PLAIN_FORM_ABOVE, large, small)


def _through(readout: Tensor | None, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return dL/dh, (T, B, H), from a step's dL/do without its weight, (T, B, O), and the weight, (T, B)."""
    weight = weight.unsqueeze(-1)
    gradient = torch.where(weight == 0, 0, gradient * weight)
    return gradient if readout is None else gradient @ readout


def _weighted(difference: Tensor, weight: Tensor) -> Tensor:
    """Return differences, (L, B, P), times the weight of their step, (L, B)."""
    weight = weight.unsqueeze(-1)
    # A step without a loss has a difference of zero, because 0 * inf is NaN.
    return torch.where(weight == 0, 0, difference * weight)
