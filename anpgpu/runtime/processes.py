"""Rollouts shared between processes: each runs its part of them, and the sums of all are one update.

    dW = sum_n dW_n,   dW_n = sum_{t,b} (1 / P_b) sum_{p of process n} lam_tbp h_{t-1,b}^T

Rollouts keep their global numbers, so n processes see the noise that one would. P_b, the finite rollouts of a sample,
are counted over all processes before anything is divided by them. Least squares needs every rollout of a sample at
once: its samples are shared instead. All processes hold the same model and the same batch. A layer's sums are exchanged
once, with the gradient of its inputs, before the layer below runs. Source: derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

AGREEMENT = 1e-3
"""Relative difference up to which two processes' batches count as the same: replicas may differ by rounding."""


@dataclass(frozen=True)
class Share:
    """What part of the rollouts of an update this process runs."""

    rollouts: int
    """Rollouts per sample over all processes."""
    index: int = 0
    count: int = 1
    by_samples: bool = False
    """Whether samples are shared, and every rollout of a sample is run by one process."""

    @property
    def alone(self) -> bool:
        """Whether this process runs everything."""
        return self.count == 1

    @property
    def own(self) -> slice:
        """The rollouts this process runs of every sample it has."""
        return slice(0, self.rollouts) if self.by_samples else self._part(self.rollouts)

    @property
    def most(self) -> int:
        """The number of rollouts any process runs: what all divide their memory by, and so alike."""
        return self.rollouts if self.by_samples else -(-self.rollouts // self.count)

    def samples(self, batch: int) -> slice:
        """Return the samples whose rollouts this process runs."""
        return self._part(batch) if self.by_samples else slice(0, batch)

    def _part(self, total: int) -> slice:
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def counted(self, finite: Tensor) -> Tensor:
        """Return each sample's number of finite rollouts over all processes, (b,), from this one's, (b, p) bool."""
        counts = finite.sum(1)
        if not self.alone and not self.by_samples:
            distributed.all_reduce(counts)
        return counts

    def complete_(self, part: Tensor) -> None:
        """Add up what processes have found of the same samples; where these are shared, it is whole already."""
        if not self.by_samples:
            self.sum_(part)

    def sum_(self, *parts: Tensor) -> None:
        """Replace tensors of one type by their sums over all processes, in one exchange."""
        if self.alone:
            return
        flat = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(flat)
        totals = torch.split(flat, [part.numel() for part in parts])
        for part, total in zip(parts, totals, strict=True):
            part.copy_(total.view_as(part))

    def agree(self, seed: Tensor, *given: Tensor) -> Tensor:
        """Return the first process's seed, once all processes hold the same batch.

        Args:
            seed: this process's own draw, 0-dim int64.
            given: what has to be the same everywhere, up to rounding.

        Raises:
            RuntimeError: they differ. On CUDA, where looking would make the host wait, nobody looks.
        """
        if self.alone:
            return seed
        seed = seed.clone()
        distributed.broadcast(seed, src=0)
        if seed.device.type != "cpu":
            return seed
        # Weighted by position, so that the same samples in another order are not the same.
        sums = [(one.detach().double().flatten() * torch.linspace(1, 2, one.numel())).sum() for one in given]
        mine = torch.nan_to_num(torch.stack(sums), 0, 0, 0)
        sizes = mine.new_tensor([one.numel() for one in given])
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
