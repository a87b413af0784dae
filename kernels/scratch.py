"""Memory of the CPU that is used again from update to update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPARE_BYTES = 256 << 20
"""Memory that may stay allocated between updates."""

_spare: dict[torch.dtype, Tensor] = {}


def spare_room(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return an uninitialised tensor, in memory from `give_back` where that has about the size."""
    size = math.prod(shape)
    spare = _spare.pop(like.dtype, None) if like.device.type == "cpu" else None
    if spare is None or not spare.numel() // 2 <= size <= spare.numel():
        return like.new_empty(shape)
    return spare[:size].view(shape)


def give_back(delta_a: Tensor | None) -> None:
    """Let the next rollout on the CPU overwrite a delta_a that nobody reads any more.

    Fresh memory costs the CPU a page fault per 4 KB, a seventh of an update. Memory of CUDA tensors is kept by torch.
    """
    if delta_a is None or delta_a.device.type != "cpu":
        return
    storage = delta_a.untyped_storage()
    if storage.nbytes() <= SPARE_BYTES:
        _spare[delta_a.dtype] = delta_a.new_empty(0).set_(
            storage, 0, (storage.nbytes() // delta_a.element_size(),), (1,)
        )
