"""Losses that `estimate_grad_` measures: values, exact output gradients, and what the rollouts need to see of them.

Everything here is time first and batched; padded and ignored steps have weight zero. A loss is the mean over the steps
that count, so the weights sum to one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from .kernels.loss import CrossEntropyLoss, Loss, OutputsOnly, SquaredLoss
from .layers import in_processing_order

IGNORE_INDEX = -100
"""Targets with this class have no cross-entropy, as in `torch.nn.CrossEntropyLoss`."""

LossFunction = Callable[[Tensor, "Tensor | None"], Tensor]
"""loss(outputs (T, B, p, O), targets with a rollout axis of size 1) -> (T, B, p) or (B, p)."""


class Targets(NamedTuple):
    """Targets in canonical form."""

    values: Tensor | None
    """mse: (T, B, O) or (B, O); cross-entropy: (T, B) or (B,); a callable's: anything beginning with (T, B) or (B,)."""
    per_step: bool
    """Whether `values` has a time axis; without one only each sample's last valid step has a loss."""


class MeasuredLoss:
    """The loss of a batch of sequences, in pieces."""

    def __init__(self, loss: str | LossFunction, targets: Targets, valid: Tensor, last_step: Tensor) -> None:
        self.loss, self.targets, self.valid, self.last_step = loss, targets, valid, last_step
        # A callable tells by what it returns whether its value is the sequence's.
        self.per_sequence = not targets.per_step and not callable(loss)
        self.weight = torch.empty(0)
        self.dense = targets.values
        if not callable(loss):
            self._spread()

    def _spread(self) -> None:
        """Give every step a target and a weight."""
        values, counted = self.targets.values, self.valid
        time, batch = counted.shape
        assert values is not None  # noqa: S101  (for the type checker; named losses have targets)
        if self.per_sequence:
            counted = torch.arange(time, device=counted.device).unsqueeze(1) == self.last_step
            # Expanded, not copied: only the last step's is looked at.
            values = values.unsqueeze(0).expand(time, *values.shape)
        if self.loss == "cross_entropy":
            counted = counted & (values != IGNORE_INDEX)
        count = counted.sum()
        if batch and counted.device.type == "cpu" and not count:
            raise ValueError(f"no step has a loss: every target is ignore_index ({IGNORE_INDEX}) or beyond its length")
        self.weight = counted.to(torch.float64) / count
        self.dense = values

    @property
    def black_box(self) -> bool:
        """Whether only the caller can measure the loss."""
        return callable(self.loss)

    def values(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return each step's share of the reported loss, (L, b), from its outputs, (L, b, O)."""
        weight = self.weight[steps, samples].to(outputs.dtype)
        target = self._dense(steps, samples)
        if self.loss == "mse":
            each = (outputs - target).square().mean(-1)
        else:
            each = F.cross_entropy(
                outputs.flatten(0, 1), target.flatten(), reduction="none", ignore_index=IGNORE_INDEX
            ).view(target.shape)
        return torch.where(weight == 0, 0, each * weight)

    def _dense(self, steps: slice, samples: slice) -> Tensor:
        assert self.dense is not None  # noqa: S101  (for the type checker; named losses have targets)
        return self.dense[steps, samples]

    def output_gradient(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O)."""
        weight = self.weight[steps, samples].to(outputs.dtype).unsqueeze(-1)
        target = self._dense(steps, samples)
        if self.loss == "mse":
            gradient = (outputs - target) * (2 / outputs.shape[-1])
        else:
            gradient = torch.softmax(outputs, dim=-1)
            gradient.scatter_add_(-1, _safe(target).unsqueeze(-1), -torch.ones_like(gradient[..., :1]))
        return torch.where(weight == 0, 0, gradient * weight)

    def spec(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        steps: slice,
        samples: slice,
        reverse: bool,
        lengths: Tensor | None,
    ) -> Loss:
        """Return what the rollouts of a layer need to measure its loss differences.

        Args:
            readout: the readout's columns that see this layer, (O, H); None where its state is the output.
            outputs: clean outputs of the segment, (L, b, O), in time order.
            steps: the segment; all of time for a reverse direction.
            samples: its samples.
            reverse: whether the layer runs backwards in time.
            lengths: valid steps of these samples.
        """
        if self.black_box:
            return OutputsOnly(readout)
        weight = in_processing_order(self.weight[steps, samples].to(outputs.dtype), reverse, lengths)
        target = self._dense(steps, samples)
        if self.loss == "mse":
            return SquaredLoss(readout, in_processing_order(outputs - target, reverse, lengths), weight)
        probs = in_processing_order(torch.softmax(outputs, dim=-1), reverse, lengths)
        return CrossEntropyLoss(readout, probs, in_processing_order(_safe(target), reverse, lengths), weight)

    def call(self, outputs: Tensor, samples: slice) -> Tensor:
        """Call the caller's loss on outputs (T, b, p, O); return each step's share of the reported loss, (T, b, p)."""
        assert callable(self.loss)  # noqa: S101  (for the type checker; the caller looked)
        time, batch, rollouts, _ = outputs.shape
        targets = self._rollout_targets(samples)
        try:
            values = self.loss(outputs, targets)
        except RuntimeError as error:
            # As torch says it of shapes that do not go together; what the caller raises of its own passes as it is.
            if type(error) is not RuntimeError or targets is None:
                raise
            raise RuntimeError(
                f"{error}; the loss was called with outputs of shape {tuple(outputs.shape)} and targets of shape "
                f"{tuple(targets.shape)}, {targets.dtype}"
            ) from error
        if not isinstance(values, Tensor):
            raise TypeError(f"the loss must return a tensor, got {type(values).__name__}")
        if values.shape not in {(time, batch, rollouts), (batch, rollouts)}:
            raise ValueError(
                f"the loss must return shape (T, B, p) = {(time, batch, rollouts)} or (B, p) = {(batch, rollouts)}, "
                f"got {tuple(values.shape)}"
            )
        values = (values if torch.is_grad_enabled() else values.detach()).to(outputs.dtype)
        valid = self.valid[:, samples]
        if values.dim() == 3:
            return torch.where(valid.unsqueeze(-1), values / self.valid.sum(), 0)
        self.per_sequence = True
        shares = outputs.new_zeros((time, batch, rollouts))
        shares[self.last_step[samples], torch.arange(batch, device=outputs.device)] = values / self.valid.shape[1]
        return shares

    def _rollout_targets(self, samples: slice) -> Tensor | None:
        values = self.targets.values
        if values is None:
            return None
        return values[:, samples].unsqueeze(2) if self.targets.per_step else values[samples].unsqueeze(1)


def _safe(target: Tensor) -> Tensor:
    """Return class indices with the ignored ones moved into range; their weight is zero."""
    return target.clamp(min=0)
