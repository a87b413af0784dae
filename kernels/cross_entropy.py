"""Cross-entropy with class indices at clean outputs: what an update needs of it, from one pass over the outputs.

    loss      a_y CE(y) + (1 - a_y) sum_c u_c CE(c),     CE(c) = log sum exp o - o_c     a = 1 without smoothing
    dL/do     softmax(o) - a_y e_y - (1 - a_y) u

each times the weight of its step; a and u follow from label smoothing, see `task.cross_entropy`. Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Smoothing(NamedTuple):
    """What label smoothing makes of a target."""

    own: Tensor
    """Share of the target's own class y, a_y, by class, (O,)."""
    spread: Tensor
    """How the rest is spread over the classes, u, (O,); its sum is 1."""


class CleanCrossEntropy(NamedTuple):
    """The loss of some steps and samples, (T, B) each; a step without a loss has weight, loss and gradient 0."""

    losses: Tensor
    """(T, B)."""
    probs: Tensor
    """Clean softmax, (T, B, O)."""
    target: Tensor
    """Class indices, (T, B) int64, 0 where the class is ignored."""
    weight: Tensor
    """Weight of each step, (T, B), in the outputs' type."""
    gradient: Tensor | None
    """dL/do, (T, B, O); None where it is not wanted."""


def step_losses(outputs: Tensor, index: Tensor, smoothing: Smoothing | None) -> Tensor:
    """Return the loss of each step without its weight, (T, B), which autograd can differentiate."""
    logs, target = torch.log_softmax(outputs, dim=-1), index.unsqueeze(-1)
    of_target = logs.gather(-1, target).squeeze(-1)
    if smoothing is None:
        return -of_target
    own = smoothing.own[index]
    return -own * of_target - (1 - own) * (logs @ smoothing.spread)


def step_gradients(probs: Tensor, index: Tensor, smoothing: Smoothing | None) -> Tensor:
    """Return the gradient of `step_losses` in the outputs, (T, B, O), from their softmax."""
    target = index.unsqueeze(-1)
    if smoothing is None:
        return probs.scatter(-1, target, -1, reduce="add")
    own = smoothing.own[target]
    return (probs - (1 - own) * smoothing.spread).scatter_add_(-1, target, -own)


def clean_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    ignore_index: int,
    smoothing: Smoothing | None = None,
    gradient: bool = True,
) -> CleanCrossEntropy:
    """Return the cross-entropy of clean outputs, its gradient, and what rollouts need.

    Args:
        outputs: (T, B, O).
        targets: class indices, (T, B) int64, any strides. One that is neither a class nor ignored raises on the CPU; on
            CUDA it is a failed assertion of the device, as in torch.
        weight: weight of each step in the reported loss, (T, B) float64, any strides; 0 where the class is ignored.
        ignore_index: class without a loss, which need not be in [0, O).
        smoothing: None is none.
        gradient: whether dL/do is wanted.
    """
    index = torch.where(targets == ignore_index, 0, targets)
    share, probs = weight.to(outputs.dtype), torch.softmax(outputs, dim=-1)
    # 0 * inf is NaN.
    losses = torch.where(share == 0, 0, step_losses(outputs, index, smoothing) * share)
    if not gradient:
        return CleanCrossEntropy(losses, probs, index, share, None)
    each = share.unsqueeze(-1)
    slope = torch.where(each == 0, 0, step_gradients(probs, index, smoothing) * each)
    return CleanCrossEntropy(losses, probs, index, share, slope)
