"""Losses of the fuzz test of `estimate_grad_`, and what torch says that they are."""

import math
from typing import NamedTuple

import torch
from fuzzing import tensor
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

REDUCTIONS = st.sampled_from(["mean", "sum"])


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def whole_sequence(outputs, targets):
    return outputs.square().sum((0, -1)) if outputs.dim() == 4 else outputs.sum()


@st.composite
def cross_entropies(draw, outputs):
    """A `torch.nn.CrossEntropyLoss`, of which a class may weigh nothing."""
    weight = draw(st.sampled_from([None, torch.linspace(0.5, 2, outputs), torch.linspace(0, 1, outputs).double()]))
    return nn.CrossEntropyLoss(
        weight,
        ignore_index=draw(st.sampled_from([-100, 0, 7])),
        reduction=draw(REDUCTIONS),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )


@st.composite
def losses(draw, outputs):
    """A loss by name, a module of torch's, or a callable, for O outputs."""
    modules = ["mse module", *(2 * ["cross_entropy module"])]
    kind = draw(st.sampled_from(["mse", "cross_entropy", absolute, whole_sequence, *modules]))
    if kind == "mse module":
        return nn.MSELoss(reduction=draw(REDUCTIONS))
    return draw(cross_entropies(outputs)) if kind == "cross_entropy module" else kind


def takes_classes(loss):
    return loss == "cross_entropy" or isinstance(loss, nn.CrossEntropyLoss)


@st.composite
def classes(draw, sizes, outputs, loss):
    """Class indices of some sizes, some of them without a loss."""
    targets = torch.arange(math.prod(sizes)).view(sizes) % outputs
    if draw(st.booleans()):
        targets.view(-1)[::2] = getattr(loss, "ignore_index", -100)
    return targets


@st.composite
def step_weights(draw, sizes, loss, dtype):
    """Weights of steps, of which some may be 0; None for a loss that has none."""
    if loss is whole_sequence or draw(st.booleans()):
        return None
    weight = draw(tensor(sizes, dtype)).abs()
    return draw(st.sampled_from([weight, weight.round(), (weight > 0.5).long(), weight > 0.5]))


@st.composite
def some_lengths(draw, time, batch):
    """Lengths of samples, of which some but not all may be 0; None for all steps."""
    if batch is None or draw(st.booleans()):
        return None
    lengths = draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
    return lengths if any(lengths) or not lengths else [time, *lengths[1:]]


class Expected(NamedTuple):
    """What torch says of a loss."""

    loss: torch.Tensor
    """0-dim float64; NaN where torch does not know."""
    nothing: bool
    """Whether no step counts, so that there is no mean; a sum of nothing teaches nothing."""


def expected(loss, outputs, targets, valid, step_weight):
    """Return the `Expected` of outputs (..., O), with valid steps and weights of the targets' sizes."""
    if not outputs.numel() or loss in {absolute, whole_sequence}:
        counted = valid if step_weight is None else valid & (step_weight != 0)
        return Expected(torch.tensor(torch.nan).double(), bool(valid.numel()) and not counted.any())
    outputs, weight = outputs[valid].double(), None if step_weight is None else step_weight[valid].double()
    targets = targets[valid] if takes_classes(loss) else targets[valid].double()
    weight = outputs.new_ones(len(outputs)) if weight is None else weight
    if not takes_classes(loss):
        each, size = F.mse_loss(outputs, targets, reduction="none").sum(-1), outputs.shape[-1]
        counts = torch.full_like(weight, size)
    else:
        options = {name: getattr(loss, name) for name in ("ignore_index", "label_smoothing") if hasattr(loss, name)}
        classes = getattr(loss, "weight", None)
        classes = outputs.new_ones(outputs.shape[-1]) if classes is None else classes.double()
        each = F.cross_entropy(outputs, targets, classes, reduction="none", **options)
        ignored = targets == options.get("ignore_index", -100)
        weight = torch.where(ignored, 0, weight)
        counts = classes[torch.where(ignored, 0, targets)]
    summed = getattr(loss, "reduction", "mean") == "sum"
    total = (weight * counts).sum()
    value = (weight * torch.where(weight > 0, each, 0)).sum()
    return Expected(value if summed else value / total, not bool(weight.sum() if summed else total))
