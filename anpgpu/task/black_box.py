"""A loss of `estimate_grad_` that the caller computes: called with clean and with perturbed outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from anpgpu.kernels.loss import Loss, OutputsOnly

from .losses import LossOptions, MeasuredLoss, Steps, Targets

LossFunction = Callable[..., Tensor]
"""loss(outputs (T, B, p, O), targets with a rollout axis of size 1) -> (T, B, p) or (B, p); with `lengths=` (B,) if it
has a parameter of that name."""

NAMED_FORMS = (
    "loss='mse', loss='cross_entropy', torch.nn.MSELoss(...) and torch.nn.CrossEntropyLoss(...) take outputs and "
    "targets of every layout"
)
"""What an error suggests where a callable's shapes do not fit."""


class BlackBox(MeasuredLoss):
    """A loss that the caller computes, which need not be differentiable.

    Args:
        loss: see `LossFunction`.
        targets: in canonical form, or without values.
        steps: which steps are within each sample's length.
        step_weight: weight of each step's loss, (T, B) float64; None is 1.
        readout: a module without trainable parameters between the states and the loss.
    """

    black_box = True

    def __init__(
        self,
        loss: LossFunction,
        targets: Targets,
        steps: Steps,
        step_weight: Tensor | None = None,
        *,
        readout: nn.Module | None = None,
    ) -> None:
        self.loss, self.targets, self.steps, valid = loss, targets, steps, steps.valid
        self.padded = steps.lengths is not None
        self.readout, self.takes_lengths, self.weighted = readout, _takes_lengths(loss), step_weight is not None
        self.moved = torch.zeros((), dtype=torch.int64, device=valid.device)
        self.per_sequence = False
        """Set by the first call, from the shape of its result."""
        weight = valid.to(torch.float64) if step_weight is None else torch.where(valid, step_weight, 0)
        total = weight.sum()
        if valid.shape[1] and weight.device.type == "cpu" and not total:
            self.refuse_nothing(valid, weight)
        self.weight = weight / total

    @staticmethod
    def tail(outputs: int) -> None:
        """Return None: targets may have any shape after (T, B) or (B,)."""
        del outputs

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype, options: LossOptions) -> Tensor:
        """Return the targets as they are."""
        del outputs, dtype, options
        return targets

    def spec(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        steps: slice,
        samples: slice,
        reverse: bool,
        lengths: Tensor | None,
    ) -> Loss:
        """Return `OutputsOnly`, which makes rollouts return delta_o."""
        del outputs, steps, samples, reverse, lengths
        return OutputsOnly(readout)

    def call(self, outputs: Tensor, samples: slice) -> Tensor:
        """Call the caller's loss; return each step's share of the reported loss, (T, b, p).

        Args:
            outputs: (T, b, p, O), which the caller may overwrite. What stands past a sample's length becomes zero.
            samples: which.
        """
        time, batch, rollouts, _ = outputs.shape
        if self.padded:
            outputs = torch.where(self.valid[:, samples, None, None], outputs, 0)
        values = self._values(outputs if self.readout is None else self.readout(outputs), samples)
        if not isinstance(values, Tensor):
            raise TypeError(f"the loss must return a tensor, got {type(values).__name__}")
        if values.shape not in {(time, batch, rollouts), (batch, rollouts)}:
            raise ValueError(
                f"the loss must return shape (T, B, p) = {(time, batch, rollouts)} or (B, p) = {(batch, rollouts)}, "
                f"got {tuple(values.shape)}; {NAMED_FORMS}"
            )
        self.returned = values.dtype
        values = (values if torch.is_grad_enabled() else values.detach()).to(outputs.dtype)
        if values.dim() == 3:
            weight = self.weight[:, samples].to(values.dtype).unsqueeze(-1)
            return torch.where(weight == 0, 0, values * weight)
        if self.weighted:
            raise ValueError(
                "step_weight weighs a loss of each step, but the loss returns one of each sequence, shape (B, p) = "
                f"{tuple(values.shape)}"
            )
        self.per_sequence = True
        some = self.valid[0]
        values = torch.where(some[samples].unsqueeze(-1), values / some.sum(), 0)
        shares = outputs.new_zeros((time, batch, rollouts))
        shares[self.last_step[samples], torch.arange(batch, device=outputs.device)] = values
        return shares

    def _values(self, outputs: Tensor, samples: slice) -> Tensor:
        """Return what the caller's loss returns; where shapes do not fit, the error says which it was called with."""
        targets = self._rollout_targets(samples)
        named = {"lengths": self.last_step[samples] + 1} if self.takes_lengths else {}
        # Errors of a caller's own function pass unchanged, but for torch's; torch's modules are not the caller's.
        known = (RuntimeError, ValueError, IndexError) if isinstance(self.loss, _Loss) else (RuntimeError,)
        try:
            return self.loss(outputs, targets, **named)
        except known as error:
            if type(error) not in known or targets is None:
                raise
            raise type(error)(
                f"{error}; the loss was called with outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(targets.shape)}, {targets.dtype}; {NAMED_FORMS}"
            ) from error

    def _rollout_targets(self, samples: slice) -> Tensor | None:
        values = self.targets.values
        if values is None:
            return None
        # A copy: the caller may work in place.
        return (values[:, samples].unsqueeze(2) if self.targets.per_step else values[samples].unsqueeze(1)).clone()


def _takes_lengths(loss: Callable[..., object]) -> bool:
    """Say whether a callable has a parameter `lengths` that can be passed by name."""
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        # A function of a compiled language may have no signature.
        return False
    parameter = parameters.get("lengths")
    return parameter is not None and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
