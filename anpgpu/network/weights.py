"""The parameters of one layer and direction, and the order in which a direction processes its steps.

A direction's tensors are in *processing order*: time order for the forward direction; for the reverse direction,
backwards in time within each sample's length. So both directions run from step 0 to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """Parameters of one layer and direction, named as in torch's recurrent modules; G gates, 1 in an Elman RNN."""

    weight_ih: Tensor
    """(G H, I)."""
    weight_hh: Tensor
    """(G H, H)."""
    bias_ih: Tensor | None
    """(G H,)."""
    bias_hh: Tensor | None
    """(G H,)."""

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.weight_hh.shape[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerWeights:
        """Apply a function to each parameter; a missing bias stays None."""
        biases = (None if bias is None else change(bias) for bias in (self.bias_ih, self.bias_hh))
        return LayerWeights(change(self.weight_ih), change(self.weight_hh), *biases)

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """Return the parameters detached and in `dtype`, copied only if their type differs."""
        return self.map(lambda weight: weight.detach().to(dtype))


def in_processing_order(values: Tensor, reverse: bool, lengths: Tensor | None) -> Tensor:
    """Return values, (T, B, ...), in a direction's processing order; the same call restores time order."""
    if not reverse:
        return values
    if lengths is None:
        return values.flip(0)
    step = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    lengths = lengths.to(values.device)
    source = torch.where(step < lengths, lengths - 1 - step, step)
    return values.gather(0, source.view(*source.shape, *[1] * (values.dim() - 2)).expand_as(values))


def valid_steps(time: int, lengths: Tensor, device: torch.device) -> Tensor:
    """Return which steps are within each sample's length, (T, B) bool."""
    return torch.arange(time, device=device).unsqueeze(1) < lengths.to(device)
