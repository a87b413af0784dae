"""Rollouts shared between processes: each runs some of them, and the sum over processes is one update.

    dW = sum_n dW_n,   dW_n = sum_{t,b} (1 / P_b) sum_{p of process n} lam_tbp h_{t-1,b}^T

Rollouts keep their global numbers, so the noise does not depend on the number of processes. P_b, the number of finite
rollouts of a sample, is summed over all processes before it divides anything. Least squares needs all rollouts of a
sample at once, so it shares samples instead. All processes hold the same model and the same batch. A layer's sums are
exchanged once, with the gradient of its inputs, before the layer below runs. Source: derived here.

A process may fail alone: a NaN in one of its samples, memory, a callable that raises. No other may wait for what it
then never sends. So every exchange is announced: all processes first take the maximum of a header of a few whole
numbers, which says what comes next and which process has failed; the end of an update is announced, too.
`shared_update` makes this round the work: a process whose work raises answers the next announcement, whichever it is,
with its number. On a CPU everybody reads the header, so all raise at the same place, the failing process its own error,
and the group is in step again. On CUDA only the failing process reads headers, and takes part with NaN (0 for whole
numbers) in what the others announce, up to the end of the update: the others do not wait for the device, and get NaN
gradients. The first header also carries each process's memory limit: all divide the work by the smallest, since other
divisions exchange other sums. A process that is killed announces nothing: the group's own timeout is for that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

EXCHANGED = (torch.int64, torch.float32, torch.float64)
"""Types of the sums that are exchanged."""

END = 1
"""Announced at the end of an update."""

UNLIMITED = 2**62
"""The memory limit, in bytes, that a failing process announces: never the smallest."""

_limits: WeakKeyDictionary[object, dict[tuple[torch.device, int], int]] = WeakKeyDictionary()
"""Of each process group and by each process's own limit, the smallest of all: on CUDA read once, not at each update."""

AGREEMENT = 1e-3
"""Relative difference up to which two processes' batches count as equal: replicas may differ by rounding."""


_replica_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""For the group of each DistributedDataParallel, one of the same processes for exchanges of its own."""


class OtherProcessError(RuntimeError):
    """Another process that shares the update's rollouts has failed, so that no process has an estimate."""


class Header(NamedTuple):
    """What a process announces before an exchange; the greatest of each number over processes counts."""

    what: int = 0
    """0 in a process that has failed, END after the last exchange, else END + 1 + the type's place in EXCHANGED."""
    size: int = 0
    """Number of elements."""
    failed: int = 0
    """One more than the number of a process that has failed."""
    limit: int = UNLIMITED
    """Memory limit in bytes, of which the smallest counts."""

    @classmethod
    def of(cls, value: Tensor) -> Header:
        """Return the header of a tensor's sum."""
        return cls(END + 1 + EXCHANGED.index(value.dtype), value.numel())

    @classmethod
    def read(cls, numbers: Tensor) -> Header:
        """Return the header that these numbers hold; on CUDA the host waits."""
        what, size, failed, limit = numbers.tolist()
        return cls(what, size, failed, -limit)


def reads(device: torch.device) -> bool:
    """Return whether the host may read what is exchanged: on CUDA it would wait."""
    return device.type == "cpu"


def announce(header: Header, device: torch.device) -> Tensor:
    """Exchange headers and return the numbers that count, (4,) int64.

    Raises:
        OtherProcessError: another process has failed; not on CUDA, where its sums are NaN.
    """
    numbers = torch.empty(len(header), dtype=torch.int64, device=device)
    for place, number in enumerate((*header[:-1], -header.limit)):
        numbers[place] = number
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    if not header.failed and reads(device):
        failed = Header.read(numbers).failed
        if failed:
            raise OtherProcessError(
                f"shard_rollouts=True: process {failed - 1} failed in this update, and its own error says why; without "
                "its share no process has an estimate"
            )
    return numbers


@contextlib.contextmanager
def shared_update(device: torch.device) -> Iterator[None]:
    """Surround an update whose rollouts are shared, so that no process waits for one that has failed.

    Args:
        device: where the rollouts run.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        # Nothing is exchanged: `share_of` raises without a group.
        yield
        return
    try:
        yield
    except (OtherProcessError, distributed.DistError):
        # All know, or the group is broken.
        raise
    except Exception:
        # Where the group is broken, too, this process's own error says more.
        with contextlib.suppress(RuntimeError):
            _take_leave(device)
        raise
    else:
        announce(Header(END), device)


def _take_leave(device: torch.device) -> None:
    """Tell the others of a failure in this process; on CUDA take part, with NaN, in the rest of their update."""
    own = Header(failed=distributed.get_rank() + 1)
    while True:
        header = Header.read(announce(own, device))
        if reads(device) or header.what <= END:
            return
        dtype = EXCHANGED[header.what - END - 1]
        lost = math.nan if dtype.is_floating_point else 0
        distributed.all_reduce(torch.full((header.size,), lost, dtype=dtype, device=device))


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
        if not self.by_samples:
            self._sum_(counts)
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
        self._sum_(flat)
        totals = torch.split(flat, [value.numel() for value in tensors])
        for value, total in zip(tensors, totals, strict=True):
            value.copy_(total.view_as(value))

    def _sum_(self, flat: Tensor) -> None:
        """Announce a tensor's sum over all processes, and make it in place."""
        if not self.alone:
            announce(Header.of(flat), flat.device)
            distributed.all_reduce(flat)

    def agree(self, seed: Tensor, max_memory: int, *tensors: Tensor) -> tuple[Tensor, int]:
        """Return the first process's seed and the least memory limit; check that all hold the same tensors.

        Args:
            seed: this process's own draw, 0-dim int64.
            max_memory: bytes that this process's rollouts may use.
            tensors: equal in all processes, up to rounding.

        Raises:
            RuntimeError: they differ. Not checked on CUDA, where it would make the host wait.
        """
        if self.alone:
            return seed, max_memory
        seed = seed.clone() if self.index == 0 else torch.zeros_like(seed)
        numbers = announce(Header.of(seed)._replace(limit=max_memory), seed.device)
        distributed.all_reduce(seed)
        known = _limits.setdefault(distributed.group.WORLD, {})
        if reads(seed.device) or (seed.device, max_memory) not in known:
            known[seed.device, max_memory] = Header.read(numbers).limit
        max_memory = known[seed.device, max_memory]
        if not reads(seed.device):
            return seed, max_memory
        # Weighted by position, so that a different order of samples is detected.
        sums = [(value.detach().double().flatten() * torch.linspace(1, 2, value.numel())).sum() for value in tensors]
        mine = torch.nan_to_num(torch.stack(sums), 0, 0, 0)
        sizes = mine.new_tensor([value.numel() for value in tensors])
        bounds = torch.cat((mine, -mine, sizes, -sizes))
        announce(Header.of(bounds), bounds.device)
        distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX)
        high, low = bounds.view(2, 2, -1).unbind(1)
        spread, scale = high + low, torch.maximum(high.abs(), low.abs())
        if bool((spread > AGREEMENT * scale).any()):
            raise RuntimeError(
                f"shard_rollouts=True: the {self.count} processes do not hold the same batch, weights and dropout "
                "masks. They share the rollouts of one batch: load the same data everywhere (no DistributedSampler, no "
                "DistributedDataParallel) and seed all processes alike, or share samples with shard_rollouts=False"
            )
        return seed, max_memory


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


def replicas() -> Any:
    """Return a group of the replicas whose forward pass runs, for exchanges beside DistributedDataParallel's own.

    None outside of one, or where it has one process. The first call makes the group, in all replicas at the same place.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    wrapper = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None or distributed.get_world_size(wrapper.process_group) == 1:
        return None
    group = _replica_groups.get(wrapper.process_group)
    if group is None:
        ranks = distributed.get_process_group_ranks(wrapper.process_group)
        group = distributed.new_group(ranks, use_local_synchronization=True)
        _replica_groups[wrapper.process_group] = group
    return group


def sum_over(group: Any, *tensors: Tensor) -> None:
    """Replace tensors, all of one dtype, by their sums over a group's processes, in one exchange."""
    flat = torch.cat([value.flatten() for value in tensors])
    distributed.all_reduce(flat, group=group)
    for value, total in zip(tensors, torch.split(flat, [value.numel() for value in tensors]), strict=True):
        value.copy_(total.view_as(value))
