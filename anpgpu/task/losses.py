"""Losses of `estimate_grad_`: values, exact output gradients, and the form that rollouts use.

All tensors are time first and batched; padded and ignored steps have weight zero. A loss is the mean over the steps
that count, so the weights sum to one. There is a class per loss, in the table `registry.LOSSES`; a callable is a
`BlackBox`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.loss import CrossEntropyLoss, Loss, OutputsOnly, SquaredLoss
from anpgpu.network.weights import in_processing_order
from anpgpu.registry import LOSSES

IGNORE_INDEX = -100
"""Targets with this class have no cross-entropy, as in `torch.nn.CrossEntropyLoss`."""

LossFunction = Callable[[Tensor, "Tensor | None"], Tensor]
"""loss(outputs (T, B, p, O), targets with a rollout axis of size 1) -> (T, B, p) or (B, p)."""


Order = Callable[[Tensor], Tensor]
"""Brings values, (L, b, ...), from time order into the processing order of a layer's direction."""


class Targets(NamedTuple):
    """Targets in canonical form."""

    values: Tensor | None
    """mse: (T, B, O) or (B, O); cross-entropy: (T, B) or (B,); callable: any shape that begins with (T, B) or (B,)."""
    per_step: bool
    """Whether `values` has a time axis; without one only each sample's last valid step has a loss."""


class MeasuredLoss:
    """The loss of a batch of sequences, for any of its steps and samples; base of every loss.

    Args:
        targets: in canonical form.
        valid: steps within each sample's length, (T, B) bool.
        last_step: each sample's last valid step, (B,) int64.
    """

    black_box = False
    """Whether only the caller can measure it."""
    moved = False
    """Whether some rollout changed a caller's loss; known on the CPU alone."""
    returned: torch.dtype | None = None
    """The type of a caller's values."""

    def __init__(self, targets: Targets, valid: Tensor, last_step: Tensor) -> None:
        self.targets, self.valid, self.last_step = targets, valid, last_step
        self.per_sequence = not targets.per_step
        values, counted = targets.values, valid
        time, batch = counted.shape
        assert values is not None  # noqa: S101  (for the type checker; named losses have targets)
        if self.per_sequence:
            counted = torch.arange(time, device=counted.device).unsqueeze(1) == last_step
            # Expanded without a copy: other steps have weight zero.
            values = values.unsqueeze(0).expand(time, *values.shape)
        counted = self.counted(counted, values)
        count = counted.sum()
        if batch and counted.device.type == "cpu" and not count:
            raise ValueError(f"no step has a loss: every target is ignore_index ({IGNORE_INDEX}) or beyond its length")
        self.weight = counted.to(torch.float64) / count
        """Weight of each step in the reported loss, (T, B) float64."""
        self.dense = values
        """Targets with a time axis, also where they are per sequence."""

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...] | None:
        """Return the shape of a target after (T, B), for O outputs; None if it is arbitrary."""
        raise NotImplementedError

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        """Return targets in the working type; raise TypeError or ValueError if they do not suit this loss."""
        raise NotImplementedError

    def counted(self, valid: Tensor, targets: Tensor) -> Tensor:
        """Return which of the valid steps, (T, B) bool, have a loss."""
        del targets
        return valid

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each step, (L, b), without its weight."""
        raise NotImplementedError

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of `each` with respect to the outputs, (L, b, O)."""
        raise NotImplementedError

    def rollout_loss(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        order: Order,
    ) -> Loss:
        """Return the loss in the kernels' form; `order` brings its tensors into processing order."""
        raise NotImplementedError

    def values(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return each step's weighted loss, (L, b), from outputs (L, b, O); the sum over all steps is the loss."""
        weight = self.weight[steps, samples].to(outputs.dtype)
        return torch.where(weight == 0, 0, self.each(outputs, self.dense[steps, samples]) * weight)

    def output_gradient(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O)."""
        weight = self.weight[steps, samples].to(outputs.dtype).unsqueeze(-1)
        return torch.where(weight == 0, 0, self.gradient(outputs, self.dense[steps, samples]) * weight)

    def spec(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        steps: slice,
        samples: slice,
        reverse: bool,
        lengths: Tensor | None,
    ) -> Loss:
        """Return the loss in the kernels' form, for the rollouts of the last layer.

        Args:
            readout: the readout's columns for this layer's direction, (O, H); None where its state is the output.
            outputs: clean outputs of the segment, (L, b, O), in time order.
            steps: the segment; all steps for a reverse direction.
            samples: which samples.
            reverse: whether the layer runs backwards in time.
            lengths: valid steps of these samples, (b,).
        """
        weight = in_processing_order(self.weight[steps, samples].to(outputs.dtype), reverse, lengths)
        targets = self.dense[steps, samples]
        return self.rollout_loss(
            readout, outputs, targets, weight, lambda values: in_processing_order(values, reverse, lengths)
        )

    def call(self, outputs: Tensor, samples: slice) -> Tensor:
        """Call the caller's loss on outputs (T, b, p, O); return each step's weighted loss, (T, b, p)."""
        raise NotImplementedError


@LOSSES.add("mse")
class MeanSquaredError(MeasuredLoss):
    """The squared error, averaged over outputs and over the steps that count."""

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...]:
        """Return (O,)."""
        return (outputs,)

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        """Return targets in the working type; raise TypeError unless they are floating."""
        del outputs
        if not targets.dtype.is_floating_point:
            raise TypeError(f"targets of loss='mse' must be floating, got {targets.dtype}")
        return targets.detach().to(dtype)

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of each step."""
        return (outputs - targets).square().mean(-1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 2 (o - y) / O."""
        return (outputs - targets) * (2 / outputs.shape[-1])

    def rollout_loss(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        order: Order,
    ) -> Loss:
        """Return the squared loss of the kernels."""
        return SquaredLoss(readout, order(outputs - targets), weight)


@LOSSES.add("cross_entropy")
class CrossEntropy(MeasuredLoss):
    """Cross-entropy with class indices, averaged over the steps that count; class -100 is ignored."""

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...]:
        """Return (): a target is a class index."""
        del outputs
        return ()

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        """Return the targets; raise TypeError unless they are int64, ValueError unless they are classes."""
        del dtype
        if targets.dtype != torch.int64:
            raise TypeError(
                f"targets of loss='cross_entropy' must be class indices of dtype int64, got {targets.dtype}"
            )
        if targets.is_cuda:
            # Reading values would make the host wait for the GPU.
            return targets
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= outputs))]
        if len(wrong):
            raise ValueError(f"class indices must be in [0, {outputs - 1}] or {IGNORE_INDEX}, got {int(wrong[0])}")
        return targets

    def counted(self, valid: Tensor, targets: Tensor) -> Tensor:
        """Leave out the steps whose class is ignored."""
        return valid & (targets != IGNORE_INDEX)

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each step."""
        flat = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
        return flat.view(targets.shape)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return softmax(o) minus the target's indicator."""
        gradient = torch.softmax(outputs, dim=-1)
        return gradient.scatter_add_(-1, _in_range(targets).unsqueeze(-1), -torch.ones_like(gradient[..., :1]))

    def rollout_loss(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        order: Order,
    ) -> Loss:
        """Return the cross-entropy of the kernels."""
        return CrossEntropyLoss(readout, order(torch.softmax(outputs, dim=-1)), order(_in_range(targets)), weight)


class BlackBox(MeasuredLoss):
    """A loss that the caller computes, which need not be differentiable.

    Args:
        loss: see `LossFunction`.
        targets: in canonical form, or without values.
        valid: steps within each sample's length, (T, B) bool.
        last_step: each sample's last valid step, (B,) int64.
        padded: whether some steps are not valid.
    """

    black_box = True

    def __init__(self, loss: LossFunction, targets: Targets, valid: Tensor, last_step: Tensor, *, padded: bool) -> None:
        self.loss, self.targets, self.valid, self.last_step, self.padded = loss, targets, valid, last_step, padded
        self.per_sequence = False
        """Set by the first call, from the shape of its result."""
        self.weight = torch.empty(0)

    @staticmethod
    def tail(outputs: int) -> None:
        """Return None: targets may have any shape after (T, B) or (B,)."""
        del outputs

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
        """Return the targets as they are."""
        del outputs, dtype
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
        targets, valid = self._rollout_targets(samples), self.valid[:, samples]
        if self.padded:
            outputs = torch.where(valid[..., None, None], outputs, 0)
        try:
            values = self.loss(outputs, targets)
        except RuntimeError as error:
            # Adds the shapes to torch's own errors; errors of the caller's pass unchanged.
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
        self.returned = values.dtype
        values = (values if torch.is_grad_enabled() else values.detach()).to(outputs.dtype)
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
        # A copy: the caller may work in place.
        return (values[:, samples].unsqueeze(2) if self.targets.per_step else values[samples].unsqueeze(1)).clone()


def loss_class(loss: object) -> type[MeasuredLoss]:
    """Return the class of a loss, from its name or a callable.

    Raises:
        TypeError: it is neither.
        ValueError: there is no loss of that name; the message lists those that exist.
    """
    if callable(loss):
        return BlackBox
    kind: type[MeasuredLoss] = LOSSES[loss] if isinstance(loss, str) else LOSSES.find(loss)
    return kind


def _in_range(target: Tensor) -> Tensor:
    """Return class indices with the ignored ones moved into range; their weight is zero."""
    return target.clamp(min=0)
