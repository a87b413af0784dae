"""Which rollouts count: those that stayed finite, or whose sample's own gradient is not."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mark_finite(
    finite: Tensor, delta_loss: Tensor | None, delta_h: Tensor, *, first: bool, trust: Tensor | None = None
) -> Tensor | None:
    """Mark which rollouts count: those whose loss differences and last delta_h are finite.

    Args:
        finite: the marks, (B, P) bool, any strides, which this changes.
        delta_loss: loss differences of some steps, (T, B, P), which this may change; None where none were measured.
        delta_h: the deviation after the last step, (B, P, S).
        first: whether these are the first steps, so that `finite` holds nothing yet; else a rollout that did not count
            before still does not.
        trust: samples, (B,) bool, all of whose rollouts count; None is none.

    Returns:
        delta_loss with zeros where a rollout does not count.
    """
    # Infinite where a value is infinite, NaN where one is NaN.
    size = torch.linalg.vector_norm(delta_h, math.inf, -1)
    if delta_loss is not None:
        size = torch.maximum(size, torch.linalg.vector_norm(delta_loss, math.inf, 0))
    if first:
        torch.lt(size, math.inf, out=finite)
    else:
        finite &= size < math.inf
    if trust is not None:
        finite |= trust.unsqueeze(1)
    return None if delta_loss is None else torch.where(finite, delta_loss, 0)
