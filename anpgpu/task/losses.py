"""Losses of `estimate_grad_`: values, exact output gradients, and the form that rollouts use.

All tensors are time first and batched; padded and ignored steps have weight zero. A loss is a weighted sum over the
steps that count, by default their mean. There is a class per loss, in the table `registry.LOSSES`; torch's loss modules
are these losses with `LossOptions`; any other callable is a `black_box.BlackBox`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.loss import CrossEntropyLoss, Loss, SquaredLoss
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

    @property
    def rollout_targets(self) -> Tensor:
        """Targets with a time axis, as `rollout_loss` takes them."""
        return self.dense

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

    def total(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return the sum of `values`, 0-dim."""
        return self.values(outputs, steps, samples).sum()

    def output_gradient(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O)."""
        if self.alike is not None:
            return self.gradient(outputs, self.dense[steps, samples]) * self.alike
        weight = self.weights_as(outputs, steps, samples).unsqueeze(-1)
        return torch.where(weight == 0, 0, self.gradient(outputs, self.dense[steps, samples]) * weight)

    def gradient_with(self, spec: Loss, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return `output_gradient` of steps in time order from their `spec`, which may hold what it needs."""
        del spec
        return self.output_gradient(outputs, steps, samples)

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
        targets = self.rollout_targets[steps, samples]
        return self.rollout_loss(
            readout, outputs, targets, weight, lambda values: in_processing_order(values, reverse, lengths)
        )

    def call(self, outputs: Tensor, samples: slice) -> Tensor:
        """Call the caller's loss on outputs (T, b, p, O); return each step's weighted loss, (T, b, p)."""
        raise NotImplementedError


def _times(weight: Tensor, factor: Tensor | float) -> Tensor:
    """Return the product, or the weight where the factor is 1."""
    return weight if not isinstance(factor, Tensor) and factor == 1 else weight * factor


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

    def total(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return the loss of some steps, 0-dim."""
        if self.alike is None:
            return super().total(outputs, steps, samples)
        squares = F.mse_loss(outputs, self.dense[steps, samples], reduction="sum")
        return squares * (self.alike / outputs.shape[-1])

    def gradient_with(self, spec: Loss, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O), from the error."""
        if self.alike is None or not isinstance(spec, SquaredLoss):
            return self.output_gradient(outputs, steps, samples)
        return spec.error * (2 * self.alike / outputs.shape[-1])

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
    """Cross-entropy with class indices, averaged over the steps that count, with every option of torch's module.

    With class weights w, label smoothing eps and C classes, torch's loss of a step of class y is

        (1 - eps) w_y CE(y) + eps / C sum_c w_c CE(c)  =  A_y (a_y CE(y) + (1 - a_y) sum_c u_c CE(c))
        A_y = (1 - eps) w_y + eps / C sum_c w_c,  a_y = (1 - eps) w_y / A_y,  u_c = w_c / sum w

    and its mean divides by sum w_y over the steps. A_y is part of the step's weight. What remains is the cross-entropy
    of a target whose logit is a_y o_y + (1 - a_y) u . o, so that rollouts measure it in the kernels' own form, without
    cancellation: the readout gets a row of that kind for each class, of probability 0, behind the rows of the classes.
    Smoothing so doubles the outputs of the last layer's rollouts. Derived here.
    """

    module = nn.CrossEntropyLoss

    @classmethod
    def options_of(cls, loss: object) -> LossOptions:
        """Return the options of a `torch.nn.CrossEntropyLoss`."""
        options = super().options_of(loss)
        if not isinstance(loss, nn.CrossEntropyLoss):
            return options
        if not 0 <= loss.label_smoothing <= 1:
            raise ValueError(f"loss.label_smoothing must be in [0, 1], got {loss.label_smoothing!r}")
        weight: Tensor | None = loss.weight
        return options._replace(
            class_weight=None if weight is None else weight.detach(),
            ignore_index=loss.ignore_index,
            label_smoothing=float(loss.label_smoothing),
        )

    @staticmethod
    def tail(outputs: int) -> tuple[int, ...]:
        """Return (): a target is a class index."""
        del outputs
        return ()

    @staticmethod
    def checked(targets: Tensor, outputs: int, dtype: torch.dtype, options: LossOptions) -> Tensor:
        """Return the targets; raise TypeError unless they are int64, ValueError unless they are classes."""
        del dtype
        weight = options.class_weight
        if weight is not None and weight.shape != (outputs,):
            raise ValueError(f"loss.weight must have shape ({outputs},), one for a class, got {tuple(weight.shape)}")
        if weight is not None and weight.device != targets.device:
            raise RuntimeError(f"loss.weight is on {weight.device}, the targets on {targets.device}")
        if weight is not None and not weight.is_cuda and not bool((weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(f"loss.weight must be finite and not negative, got {weight.tolist()}")
        if targets.dtype != torch.int64:
            raise TypeError(
                f"targets of loss='cross_entropy' must be class indices of dtype int64, got {targets.dtype}"
            )
        if targets.is_cuda:
            # Reading values would make the host wait for the GPU.
            return targets
        ignored = options.ignore_index
        wrong = targets[(targets != ignored) & ((targets < 0) | (targets >= outputs))]
        if len(wrong):
            raise ValueError(f"class indices must be in [0, {outputs - 1}] or {ignored}, got {int(wrong[0])}")
        return targets

    def counted(self, valid: Tensor | None, targets: Tensor) -> Tensor:
        """Leave out the steps whose class is ignored."""
        del targets
        return ~self.ignored if valid is None else valid & ~self.ignored

    @functools.cached_property
    def ignored(self) -> Tensor:
        """The steps whose class is ignored, (T, B) bool."""
        return self.dense == self.options.ignore_index

    @functools.cached_property
    def rollout_targets(self) -> Tensor:
        """Class indices with the ignored ones moved into range."""
        return self.dense.masked_fill(self.ignored, 0)

    def total(self, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return the loss of some steps, 0-dim."""
        options = self.options
        if not self.whole or options.class_weight is not None or options.label_smoothing:
            return super().total(outputs, steps, samples)
        values, targets = outputs.flatten(0, 1), self.dense[steps, samples].flatten()
        total = F.cross_entropy(values, targets, reduction="sum", ignore_index=options.ignore_index)
        return total if options.summed else total.div_(self.counting)

    def gradient_with(self, spec: Loss, outputs: Tensor, steps: slice, samples: slice) -> Tensor:
        """Return dL/do, (L, b, O), from the clean softmax."""
        if not self.whole or self.options.label_smoothing or not isinstance(spec, CrossEntropyLoss):
            return self.output_gradient(outputs, steps, samples)
        gradient = spec.probs.scatter(-1, spec.target.unsqueeze(-1), -1, reduce="add")
        # 0 * inf is NaN.
        return (gradient * spec.weight.unsqueeze(-1)).masked_fill_(self.ignored[steps, samples].unsqueeze(-1), 0)

    def factors(self, targets: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return A_y and w_y of each step."""
        weight = self.options.class_weight
        if weight is None:
            return 1.0, 1.0
        weight, smoothing = weight.double(), self.options.label_smoothing
        index = self._in_range(targets)
        return ((1 - smoothing) * weight + smoothing * weight.mean())[index], weight[index]

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each step."""
        index = self._in_range(targets)
        if not self.options.label_smoothing:
            flat = F.cross_entropy(outputs.flatten(0, 1), index.flatten(), reduction="none")
            return flat.view(targets.shape)
        own, spread = self._smoothing(outputs)
        logs, own = torch.log_softmax(outputs, dim=-1), own[index]
        return -own * logs.gather(-1, index.unsqueeze(-1)).squeeze(-1) - (1 - own) * (logs @ spread)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return softmax(o) minus the target's indicator, or what smoothing makes of it."""
        gradient, index = torch.softmax(outputs, dim=-1), self._in_range(targets).unsqueeze(-1)
        own = torch.ones_like(gradient[..., :1])
        if self.options.label_smoothing:
            share, spread = self._smoothing(outputs)
            own = share[index]
            gradient -= (1 - own) * spread
        return gradient.scatter_add_(-1, index, -own)

    def rollout_loss(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        order: Order,
    ) -> Loss:
        """Return the cross-entropy of the kernels."""
        probs, index = torch.softmax(outputs, dim=-1), targets
        if self.options.label_smoothing:
            own, spread = self._smoothing(outputs)
            rows = torch.diag(torch.ones_like(own)) if readout is None else readout
            smooth = own.unsqueeze(-1) * rows + (1 - own).unsqueeze(-1) * (spread @ rows)
            readout, probs, index = torch.cat((rows, smooth)), F.pad(probs, (0, len(own))), index + len(own)
        return CrossEntropyLoss(readout, order(probs), order(index), weight)

    def _smoothing(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and u, (O,) each."""
        smoothing, classes = self.options.label_smoothing, outputs.shape[-1]
        weight = self.options.class_weight
        weight = outputs.new_ones(classes) if weight is None else weight
        weight = weight.double() / weight.sum(dtype=torch.float64)
        own = (1 - smoothing) * weight
        return (own / (own + smoothing / classes)).to(outputs.dtype), weight.to(outputs.dtype)

    def _in_range(self, targets: Tensor) -> Tensor:
        """Return class indices with the ignored ones moved into range; their weight is zero."""
        return torch.where(targets == self.options.ignore_index, 0, targets)
