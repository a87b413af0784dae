"""The clean run of a network of one direction by segments of time, each run again from a checkpoint of its start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .stack import CleanRun, Network, run_network


class CheckpointedRun:
    """The clean activity of some samples, segment by segment.

    Args:
        network: of one direction.
        inputs: of these samples, (T, b, I).
        h_0: their first states, (layers, b, H).
        lengths: valid steps of these samples, (b,) int64 on the CPU; None where all are valid.
        keep: whether there is one segment, whose activity is kept.
        masks: what multiplies the inputs of every layer but the first, (T, b, H) each; none without dropout.
    """

    def __init__(
        self,
        network: Network,
        inputs: Tensor,
        h_0: Tensor,
        lengths: Tensor | None,
        *,
        keep: bool,
        masks: tuple[Tensor, ...] = (),
    ) -> None:
        self.network, self.inputs, self.lengths, self.masks, self.keep = network, inputs, lengths, masks, keep
        self.starts = {0: h_0}
        self.whole: CleanRun | None = None

    def segment(self, steps: slice) -> CleanRun:
        """Return the clean run of a segment; the segment before it must have run already."""
        if self.whole is not None:
            return self.whole
        rest = None if self.lengths is None else (self.lengths - steps.start).clamp(0, steps.stop - steps.start)
        run = run_network(self.network, self.inputs[steps], self.starts[steps.start], rest, self._dropout(steps))
        self.starts[steps.stop] = run.h_n
        self.whole = run if self.keep else None
        return run

    def _dropout(self, steps: slice) -> Callable[[Tensor], Tensor] | None:
        masks = iter(self.masks)
        return (lambda _: next(masks)[steps]) if self.masks else None


def keep_final(h_n: Tensor, run: CleanRun, steps: slice, last_step: Tensor) -> None:
    """Write the state after each sample's last valid step into h_n, (layers, b, H), if the step is in this segment.

    A sample of length 0 has last_step -1: its first state is its final one.
    """
    first = last_step.clamp(min=0)
    inside = ((first >= steps.start) & (first < steps.stop)).unsqueeze(-1)
    index = (last_step - steps.start + 1).clamp(0, steps.stop - steps.start)
    for number, (layer,) in enumerate(run.layers):
        state = layer.states[index, torch.arange(len(index), device=index.device)]
        h_n[number] = torch.where(inside, state, h_n[number])
