"""Losses of `estimate_grad_`: what all have (weights of the steps, values, what rollouts use), and the squared error.

All tensors are time first and batched; padded and ignored steps have weight zero. A loss is a weighted sum over the
steps that count, by default their mean. There is a class per loss, in the table `registry.LOSSES`; torch's loss modules
are these losses with `LossOptions`. Cross-entropy: `cross_entropy.py`; any other callable is a `black_box.BlackBox`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.loss import Loss, SquaredLoss
from anpgpu.network.weights import in_processing_order, valid_steps
from anpgpu.registry import LOSSES

IGNORE_INDEX = -100
"""Targets with this class have no cross-entropy, as in `torch.nn.CrossEntropyLoss`."""

Order = Callable[[Tensor], Tensor]
"""Brings values, (L, b, ...), from time order into the processing order of a layer's direction."""


class Targets(NamedTuple):
    """Targets in canonical form."""

    values: Tensor | None
    """mse: (T, B, O) or (B, O); cross-entropy: (T, B) or (B,); callable: any shape that begins with (T, B) or (B,)."""
    per_step: bool
    """Whether `values` has a time axis; without one only each sample's last valid step has a loss."""


class LossOptions(NamedTuple):
    """The options of torch's loss modules; the defaults are those of a loss given by name."""

    summed: bool = False
    """reduction="sum" instead of "mean"."""
    class_weight: Tensor | None = None
    """Weight of each class, (O,)."""
    ignore_index: int = IGNORE_INDEX
    """Class without a loss."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in [0, 1]."""


class Steps:
    """Which steps of a batch count.

    Args:
        time: T.
        batch: B.
        lengths: valid steps of each sample, (B,) int64; None where all are.
        device: of the batch.
    """

    def __init__(self, time: int, batch: int, lengths: Tensor | None, device: torch.device) -> None:
        self.time, self.batch, self.lengths, self.device = time, batch, lengths, device

    @functools.cached_property
    def valid(self) -> Tensor:
        """Steps within each sample's length, (T, B) bool."""
        if self.lengths is None:
            return torch.ones((self.time, self.batch), dtype=torch.bool, device=self.device)
        return valid_steps(self.time, self.lengths, self.device)

    @functools.cached_property
    def last(self) -> Tensor:
        """Each sample's last valid step, (B,) int64; -1 without one."""
        if self.lengths is None:
            return torch.full((self.batch,), self.time - 1, device=self.device)
        return (self.lengths - 1).to(self.device)


class AtOutputs:
    """A loss at clean outputs of some steps and samples: its value, its gradient, and what rollouts need of it.

    Each is computed where it is asked for. A loss whose parts have work in common derives a class from this one.

    Args:
        loss: the loss of the batch.
        outputs: (L, b, O), in time order.
        steps: which steps these are.
        samples: which samples.
    """

    def __init__(self, loss: Any, outputs: Tensor, steps: slice, samples: slice) -> None:
        self.loss, self.outputs, self.steps, self.samples = loss, outputs, steps, samples

    @property
    def targets(self) -> Tensor:
        """Of these steps and samples, (L, b, ...)."""
        targets: Tensor = self.loss.dense[self.steps, self.samples]
        return targets

    @functools.cached_property
    def weight(self) -> Tensor:
        """Of each step, (L, b)."""
        weight: Tensor = self.loss.weights_as(self.outputs, self.steps, self.samples)
        return weight

    @property
    def total(self) -> Tensor:
        """The loss of these steps, 0-dim."""
        values: Tensor = self.loss.values(self.outputs, self.steps, self.samples)
        return values.sum()

    @property
    def gradient(self) -> Tensor:
        """dL/do, (L, b, O)."""
        gradient: Tensor = self.loss.output_gradient(self.outputs, self.steps, self.samples)
        return gradient

    def spec(self, readout: Tensor | None, *, reverse: bool = False, lengths: Tensor | None = None) -> Loss:
        """Return the loss in the kernels' form; see `MeasuredLoss.spec`."""
        spec: Loss = self.loss.spec(readout, self.outputs, self.steps, self.samples, reverse, lengths)
        return spec


class MeasuredLoss:
    """The loss of a batch of sequences, for any of its steps and samples; base of every loss.

    Args:
        targets: in canonical form.
        steps: which steps are within each sample's length.
        options: of torch's loss module.
        step_weight: weight of each step's loss, (T, B) float64; None is 1.
    """

    module: type[nn.Module] | None = None
    """torch's module that is this loss."""
    black_box = False
    """Whether only the caller can measure it."""
    moved: Tensor | None = None
    """Number of rollouts that changed a caller's loss so far, 0-dim int64, see `Estimate`."""
    rows_per_output = 1
    """Rows of the rollouts' readout for each output."""
    returned: torch.dtype | None = None
    """The type of a caller's values."""
    alike: float | None = None
    """The weight of every step in the reported loss, where all have the same, whatever the targets are."""

    def __init__(self, targets: Targets, steps: Steps, options: LossOptions, step_weight: Tensor | None = None) -> None:
        self.targets, self.steps, self.options = targets, steps, options
        self.per_sequence = not targets.per_step
        self.rows_per_output = 2 if options.label_smoothing else 1
        values, time, batch = targets.values, steps.time, steps.batch
        assert values is not None  # noqa: S101  (for the type checker; named losses have targets)
        if self.per_sequence:
            # Expanded without a copy: other steps have weight zero.
            values = values.unsqueeze(0).expand(time, *values.shape)
        self.dense = values
        """Targets with a time axis, also where they are per sequence."""
        self.whole = not self.per_sequence and steps.lengths is None and step_weight is None
        """Whether every step counts alike, but for what the targets say."""
        factor, share = self.factors(values)
        constant = not isinstance(factor, Tensor) and not isinstance(share, Tensor)
        if self.whole and constant and batch and type(self).counted is MeasuredLoss.counted:
            self.alike = float(factor) if options.summed else float(factor) / (time * batch * float(share))
        else:
            self.weight = self._weights(step_weight, factor, share)

    def _weights(self, step_weight: Tensor | None, factor: Tensor | float, share: Tensor | float) -> Tensor:
        """Return the weight of each step in the reported loss, (T, B) float64; other arguments are `factors`."""
        steps, summed = self.steps, self.options.summed
        valid = None if self.whole else steps.valid
        if self.per_sequence:
            valid = torch.arange(steps.time, device=self.device).unsqueeze(1) == steps.last
        counted = self.counted(valid, self.dense)
        counted = steps.valid if counted is None else counted
        weight = counted.to(torch.float64) if step_weight is None else torch.where(counted, step_weight, 0)
        self.counting = _times(weight, share).sum()
        """What a mean divides by, 0-dim float64."""
        if steps.batch and not weight.is_cuda and not (self.counting if not summed else weight.sum()):
            self.refuse_nothing(counted, weight)
        weight = _times(weight, factor)
        return weight if summed else weight / self.counting

    @functools.cached_property
    def weight(self) -> Tensor:
        """Weight of each step in the reported loss, (T, B) float64."""
        return torch.full((self.steps.time, self.steps.batch), self.alike or 0, dtype=torch.float64, device=self.device)

    def weights_as(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return the weight of some steps, (L, b), in the type of their outputs, (L, b, O)."""
        if self.alike is not None:
            return outputs.new_full(outputs.shape[:2], self.alike)
        return self.weight[steps, samples].to(outputs.dtype)

    @property
    def device(self) -> torch.device:
        """Where the targets are."""
        return self.steps.device

    @property
    def valid(self) -> Tensor:
        """Steps within each sample's length, (T, B) bool."""
        return self.steps.valid

    @property
    def last_step(self) -> Tensor:
        """Each sample's last valid step, (B,) int64."""
        return self.steps.last

    @classmethod
    def options_of(cls, loss: object) -> LossOptions:
        """Return the options of a loss module, or the defaults of a name.

        Raises:
            ValueError: an option that no loss of a whole batch has; the message quotes it.
        """
        if cls.module is None or not isinstance(loss, cls.module):
            return LossOptions()
        reduction = loss.reduction
        if reduction not in {"mean", "sum"}:
            raise ValueError(
                f"loss must have reduction='mean' or 'sum', got reduction={reduction!r}: an update needs one number; "
                "weigh steps with step_weight"
            )
        return LossOptions(summed=reduction == "sum")

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...] | None:
        """Return the shape of a target after (T, B), for O outputs; None if it is arbitrary."""
        raise NotImplementedError

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype, options: LossOptions) -> Tensor:
        """Return targets in the working type; raise TypeError or ValueError if they do not suit this loss."""
        raise NotImplementedError

    def counted(self, valid: Tensor | None, targets: Tensor) -> Tensor | None:
        """Return which of the valid steps, (T, B) bool, have a loss; None is all."""
        del targets
        return valid

    def factors(self, targets: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return what multiplies a step's loss in torch's sum, and what it counts for in torch's mean, (T, B) each."""
        del targets
        return 1.0, 1.0

    def refuse_nothing(self, counted: Tensor, weight: Tensor) -> None:
        """Raise ValueError where no step, of those that are counted, has a weight; the message names what took it."""
        if not counted.any():
            ignored = self.options.ignore_index
            raise ValueError(f"no step has a loss: every target is ignore_index ({ignored}) or beyond its length")
        if not weight.any():
            raise ValueError("step_weight must not sum to 0 over the steps that have a loss")
        raise ValueError(f"loss.weight must not sum to 0 over the targets' classes, got {self.options.class_weight}")

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
        if self.alike is not None:
            return self.each(outputs, self.dense[steps, samples]) * self.alike
        weight = self.weights_as(outputs, steps, samples)
        return torch.where(weight == 0, 0, self.each(outputs, self.dense[steps, samples]) * weight)

    def output_gradient(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O)."""
        if self.alike is not None:
            return self.gradient(outputs, self.dense[steps, samples]) * self.alike
        weight = self.weights_as(outputs, steps, samples).unsqueeze(-1)
        return torch.where(weight == 0, 0, self.gradient(outputs, self.dense[steps, samples]) * weight)

    def at(self, outputs: Tensor, steps: slice, samples: slice, *, backend: str, gradient: bool) -> AtOutputs:
        """Return the loss at clean outputs of some steps and samples, (L, b, O), in time order.

        backend: of the rollouts. gradient: whether `AtOutputs.gradient` may be asked for.
        """
        del backend, gradient
        return AtOutputs(self, outputs, steps, samples)

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
        weight = in_processing_order(self.weights_as(outputs, steps, samples), reverse, lengths)
        targets = self.dense[steps, samples]
        return self.rollout_loss(
            readout, outputs, targets, weight, lambda values: in_processing_order(values, reverse, lengths)
        )

    def call(self, outputs: Tensor, samples: slice) -> Tensor:
        """Call the caller's loss on outputs (T, b, p, O); return each step's weighted loss, (T, b, p)."""
        raise NotImplementedError


@LOSSES.add("mse")
class MeanSquaredError(MeasuredLoss):
    """The squared error, averaged over outputs and over the steps that count; or summed over both."""

    module = nn.MSELoss

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...]:
        """Return (O,)."""
        return (outputs,)

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype, options: LossOptions) -> Tensor:
        """Return targets in the working type; raise TypeError unless they are floating."""
        del outputs, options
        if not targets.dtype.is_floating_point:
            raise TypeError(f"targets of loss='mse' must be floating, got {targets.dtype}")
        return targets.detach().to(dtype)

    def factors(self, targets: Tensor) -> tuple[float, float]:
        """Return O twice: torch sums and counts the numbers of a step."""
        return float(targets.shape[-1]), float(targets.shape[-1])

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of each step."""
        return (outputs - targets).square().mean(-1)

    def at(self, outputs: Tensor, steps: slice, samples: slice, *, backend: str, gradient: bool) -> AtOutputs:
        """Return the loss at clean outputs, whose parts share the error."""
        del backend, gradient
        return _SquaredAt(self, outputs, steps, samples)

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


class _SquaredAt(AtOutputs):
    """The squared error at clean outputs."""

    @functools.cached_property
    def error(self) -> Tensor:
        """Outputs minus targets, (L, b, O)."""
        return self.outputs - self.targets

    @property
    def total(self) -> Tensor:
        """The loss of these steps, 0-dim."""
        if self.loss.alike is None:
            return super().total
        each: float = self.loss.alike / self.outputs.shape[-1]
        return F.mse_loss(self.outputs, self.targets, reduction="sum") * each

    @property
    def gradient(self) -> Tensor:
        """dL/do, (L, b, O)."""
        if self.loss.alike is None:
            weight = self.weight.unsqueeze(-1)
            return torch.where(weight == 0, 0, self.error * (2 / self.outputs.shape[-1]) * weight)
        each: float = self.loss.alike / self.outputs.shape[-1]
        return self.error * (2 * each)

    def spec(self, readout: Tensor | None, *, reverse: bool = False, lengths: Tensor | None = None) -> Loss:
        """Return the squared loss of the kernels."""
        error, weight = self.error, self.weight
        if reverse:
            error, weight = (in_processing_order(values, reverse, lengths) for values in (error, weight))
        return SquaredLoss(readout, error, weight)


def _times(weight: Tensor, factor: Tensor | float) -> Tensor:
    """Return the product, or the weight where the factor is 1."""
    return weight if not isinstance(factor, Tensor) and factor == 1 else weight * factor
