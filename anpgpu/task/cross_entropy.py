"""Cross-entropy of `estimate_grad_`, with class weights, ignored classes and label smoothing as in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.cross_entropy import CleanCrossEntropy, Smoothing, step_gradients, step_losses
from anpgpu.kernels.loss import CrossEntropyLoss, Loss
from anpgpu.network.weights import in_processing_order
from anpgpu.registry import LOSSES
from anpgpu.runtime.dispatch import cross_entropy_on

from .losses import AtOutputs, LossOptions, MeasuredLoss, Order


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
        counted = targets != self.options.ignore_index
        return counted if valid is None else valid & counted

    def at(self, outputs: Tensor, steps: slice, samples: slice, *, backend: str, gradient: bool) -> AtOutputs:
        """Return the loss at clean outputs, all of which is computed at once."""
        return _CrossEntropyAt(self, outputs, steps, samples, cross_entropy_on(backend), differentiated=gradient)

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
        return step_losses(outputs, self._in_range(targets), self.smoothing(outputs))

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return softmax(o) minus the target's indicator, or what smoothing makes of it."""
        return step_gradients(torch.softmax(outputs, dim=-1), self._in_range(targets), self.smoothing(outputs))

    def rollout_loss(
        self,
        readout: Tensor | None,
        outputs: Tensor,
        targets: Tensor,
        weight: Tensor,
        order: Order,
    ) -> Loss:
        """Return the cross-entropy of the kernels."""
        probs, index = order(torch.softmax(outputs, dim=-1)), order(self._in_range(targets))
        return measured_by_rollouts(readout, probs, index, weight, self.smoothing(outputs))

    def smoothing(self, outputs: Tensor) -> Smoothing | None:
        """Return what smoothing makes of targets, a and u, in the outputs' type; None where there is none."""
        smoothing, classes = self.options.label_smoothing, outputs.shape[-1]
        if not smoothing:
            return None
        weight = self.options.class_weight
        weight = outputs.new_ones(classes) if weight is None else weight
        weight = weight.double() / weight.sum(dtype=torch.float64)
        own = (1 - smoothing) * weight
        return Smoothing((own / (own + smoothing / classes)).to(outputs.dtype), weight.to(outputs.dtype))

    def _in_range(self, targets: Tensor) -> Tensor:
        """Return class indices with the ignored ones moved into range; their weight is zero."""
        return torch.where(targets == self.options.ignore_index, 0, targets)


class _CrossEntropyAt(AtOutputs):
    """The cross-entropy at clean outputs.

    Args:
        loss, outputs, steps, samples: see `AtOutputs`.
        compute: `kernels.cross_entropy.clean_cross_entropy`, or a backend's form of it.
        differentiated: whether the gradient is computed.
    """

    def __init__(
        self,
        loss: CrossEntropy,
        outputs: Tensor,
        steps: slice,
        samples: slice,
        compute: Callable[..., CleanCrossEntropy],
        *,
        differentiated: bool,
    ) -> None:
        super().__init__(loss, outputs, steps, samples)
        self.compute, self.differentiated = compute, differentiated

    @functools.cached_property
    def smoothing(self) -> Smoothing | None:
        """What smoothing makes of targets."""
        smoothing: Smoothing | None = self.loss.smoothing(self.outputs)
        return smoothing

    @functools.cached_property
    def clean(self) -> CleanCrossEntropy:
        """All of it."""
        return self.compute(
            self.outputs,
            self.targets,
            self.loss.weight[self.steps, self.samples],
            ignore_index=self.loss.options.ignore_index,
            smoothing=self.smoothing,
            gradient=self.differentiated,
        )

    @property
    def total(self) -> Tensor:
        """The loss of these steps, 0-dim."""
        return self.clean.losses.sum()

    @property
    def gradient(self) -> Tensor:
        """dL/do, (L, b, O)."""
        gradient = self.clean.gradient
        assert gradient is not None  # noqa: S101  (for the type checker; who asks for it has said so)
        return gradient

    def spec(self, readout: Tensor | None, *, reverse: bool = False, lengths: Tensor | None = None) -> Loss:
        """Return the cross-entropy of the kernels."""
        parts = (self.clean.probs, self.clean.target, self.clean.weight)
        probs, target, weight = (in_processing_order(values, reverse, lengths) for values in parts)
        return measured_by_rollouts(readout, probs, target, weight, self.smoothing)


def measured_by_rollouts(
    readout: Tensor | None, probs: Tensor, index: Tensor, weight: Tensor, smoothing: Smoothing | None
) -> CrossEntropyLoss:
    """Return the cross-entropy of the kernels, for which smoothing gives the readout a row more for each class."""
    if smoothing is None:
        return CrossEntropyLoss(readout, probs, index, weight)
    own, spread = smoothing
    rows = torch.diag(torch.ones_like(own)) if readout is None else readout
    smooth = own.unsqueeze(-1) * rows + (1 - own).unsqueeze(-1) * (spread @ rows)
    return CrossEntropyLoss(torch.cat((rows, smooth)), F.pad(probs, (0, len(own))), index + len(own), weight)
