"""Rollouts shared between processes: each runs some of them, and the sum over processes is one update.

    dW = sum_n dW_n,   dW_n = sum_{t,b} (1 / P_b) sum_{p of process n} lam_tbp h_{t-1,b}^T

Rollouts keep their global numbers, so the noise does not depend on the number of processes. P_b, the number of finite
rollouts of a sample, is summed over all processes before it divides anything. Least squares needs all rollouts of a
sample at once, so it shares samples instead. All processes hold the same model and the same batch. A layer's sums are
exchanged once, with the gradient of its inputs, before the layer below runs. Source: derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

AGREEMENT = 1e-3
"""Relative difference up to which two processes' batches count as equal: replicas may differ by rounding."""


@dataclass(frozen=True)
class Share:
    """Which of an update's rollouts this process runs."""

    rollouts: int
    """Rollouts per sample over all processes."""
    index: int = 0
    count: int = 1
    by_samples: bool = False
    """Whether samples are shared instead: one process then runs all rollouts of a sample."""

    @property
    def alone(self) -> bool:
        """Whether this process runs everything."""
        return self.count == 1

    @property
    def own(self) -> slice:
        """The rollouts this process runs, of each of its samples."""
        return slice(0, self.rollouts) if self.by_samples else self._part(self.rollouts)

    @property
    def most(self) -> int:
        """The most rollouts any process runs; all divide their memory by it, so that they divide alike."""
        return self.rollouts if self.by_samples else -(-self.rollouts // self.count)

    def samples(self, batch: int) -> slice:
        """Return the samples whose rollouts this process runs."""
        return self._part(batch) if self.by_samples else slice(0, batch)

    def _part(self, total: int) -> slice:
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def counted(self, finite: Tensor) -> Tensor:
        """Return the number of finite rollouts per sample over all processes, (b,), from this one's, (b, p) bool."""
        counts = finite.sum(1)
        if not self.alone and not self.by_samples:
            distributed.all_reduce(counts)
        return counts

    def complete_(self, value: Tensor) -> None:
        """Sum a tensor over processes that run rollouts of the same samples; shared samples are complete already."""
        if not self.by_samples:
            self.sum_(value)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors, all of one dtype, by their sums over all processes, in one exchange."""
        if self.alone:
            return
        flat = torch.cat([value.flatten() for value in tensors])
        distributed.all_reduce(flat)
        totals = torch.split(flat, [value.numel() for value in tensors])
        for value, total in zip(tensors, totals, strict=True):
            value.copy_(total.view_as(value))

    def agree(self, seed: Tensor, *tensors: Tensor) -> Tensor:
        """Return the first process's seed; check that all processes hold the same tensors.

        Args:
            seed: this process's own draw, 0-dim int64.
            tensors: equal in all processes, up to rounding.

        Raises:
            RuntimeError: they differ. Not checked on CUDA, where it would make the host wait.
        """
        if self.alone:
            return seed
        seed = seed.clone()
        distributed.broadcast(seed, src=0)
        if seed.device.type != "cpu":
            return seed
        # Weighted by position, so that a different order of samples is detected.
        sums = [(value.detach().double().flatten() * torch.linspace(1, 2, value.numel())).sum() for value in tensors]
        mine = torch.nan_to_num(torch.stack(sums), 0, 0, 0)
        sizes = mine.new_tensor([value.numel() for value in tensors])
        bounds = torch.cat((mine, -mine, sizes, -sizes))
        distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX)
        high, low = bounds.view(2, 2, -1).unbind(1)
        spread, scale = high + low, torch.maximum(high.abs(), low.abs())
        if bool((spread > AGREEMENT * scale).any()):
            raise RuntimeError(
                f"shard_rollouts=True: the {self.count} processes do not hold the same batch, weights and dropout "
                "masks. They share the rollouts of one batch: load the same data everywhere (no DistributedSampler, no "
                "DistributedDataParallel) and seed all processes alike, or share samples with shard_rollouts=False"
            )
        return seed


def share_of(rollouts: int, *, shared: bool, by_samples: bool) -> Share:
    """Return this process's share of `rollouts`.

    Raises:
        RuntimeError: there is no process group to share with.
        ValueError: there are fewer rollouts than processes.
    """
    if not shared:
        return Share(rollouts)
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError("shard_rollouts=True needs torch.distributed.init_process_group() first")
    count = distributed.get_world_size()
    if rollouts < count and not by_samples:
        raise ValueError(f"rollouts={rollouts} cannot be shared between {count} processes: some would have none")
    return Share(rollouts, distributed.get_rank(), count, by_samples)
