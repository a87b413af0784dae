"""How the rollouts are divided so that they fit in memory: samples, rollouts and time segments; pure Python.

Dividing rollouts or samples costs nothing. Cutting time into segments costs a second forward pass: the first keeps only
the deviations at segment starts, then, last segment first, rollouts are run again with regenerated noise and credited.

A division that runs out of memory all the same is given up, with everything it had found, and the work is done again in
half the memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from .kernels.noise import padded
from .kernels.scratch import SPARE_BYTES

Parts = TypeVar("Parts")
Result = TypeVar("Result")

ROWS_WANTED = {"cpu": 64, "cuda": 4096}
"""Rows (samples x rollouts) below which a matrix product no longer fills the device."""

DEFAULT_SHARE = 8
"""Rollouts use this fraction of the device's total memory at most, unless told otherwise."""

FIXED_BYTES = 16 << 20
"""Blocks of noise and other temporaries that do not grow with the shapes."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc's; other C libraries have none."""

_lowered: dict[torch.device, int] = {}
"""Per device the bytes to divide by since memory ran out there, so that the next update does not run out again."""


class Shape(NamedTuple):
    """What the memory of one layer's rollouts depends on."""

    time: int
    batch: int
    rollouts: int
    hidden: int
    outputs: int
    """Floats kept per step and rollout besides delta_a and its credit: the outputs of a black-box loss, else 0."""
    stores_delta_a: bool
    clean_floats: int
    """Floats of clean activity per step and sample that count: 0 where the clean run is kept anyway."""
    gram_floats: int
    """Floats per step and sample that a least-squares estimate adds; it takes all rollouts at once. 0 otherwise."""
    layers: int
    """Layers whose rollouts are kept at segment starts at the same time."""
    itemsize: int


class Division(NamedTuple):
    """Samples and rollouts at a time, and the number of time segments."""

    samples: int
    rollouts: int
    segments: int


def default_memory(device: torch.device) -> int:
    """Return the bytes rollouts may use by default: a share of the device's total memory, so that runs repeat."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // DEFAULT_SHARE
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // DEFAULT_SHARE


def needed_bytes(shape: Shape, division: Division) -> int:
    """Return what a division needs, in bytes: an upper estimate, checked against measured peaks."""
    length = -(-shape.time // division.segments)
    block = division.samples * division.rollouts
    per_step = block * (padded(shape.hidden) * shape.stores_delta_a + 4)
    per_step += division.samples * (6 * shape.hidden + shape.clean_floats + shape.gram_floats)
    tiles = block * (6 * shape.hidden + 2 * shape.outputs)
    # Output deviations in segments and put together, outputs, and temporaries of the loss that is called.
    whole = shape.time * block * 6 * shape.outputs + (shape.time * division.samples * shape.rollouts) * bool(
        shape.outputs
    )
    starts = 0
    if division.segments > 1:
        starts = division.segments * division.samples * shape.hidden * (shape.rollouts * shape.layers)
        starts += division.segments * division.samples * shape.hidden * shape.layers
    return FIXED_BYTES + shape.itemsize * (length * per_step + tiles + whole + starts)


@functools.lru_cache(maxsize=256)
def divide(shape: Shape, max_memory: int, device_type: str) -> Division:
    """Return the coarsest division that fits: whole if possible, then fewer rollouts or samples, then segments.

    On a CPU a block of rollouts also keeps its activity in what stays allocated from update to update, if it can.

    Raises:
        MemoryError: one rollout of one sample at a time needs more; the message says how much.
    """
    rows_wanted = min(ROWS_WANTED.get(device_type, ROWS_WANTED["cuda"]), shape.batch * shape.rollouts)
    parts = [shape.rollouts] if shape.gram_floats else _halved(shape.rollouts)
    blocks = [(samples, rollouts) for samples in _halved(shape.batch) for rollouts in parts]
    full = [block for block in blocks if block[0] * block[1] >= rows_wanted]
    whole = full
    if device_type == "cpu" and shape.stores_delta_a:
        # Memory that does not stay allocated costs a page fault for every 4 KB.
        each = shape.itemsize * shape.time * padded(shape.hidden)
        whole = [block for block in full if block[0] * block[1] * each <= SPARE_BYTES] or full
    cuts = _doubled(shape.time)
    for candidates, segment_counts in ((whole, [1]), (full, cuts), (blocks, [1, *cuts])):
        for samples, rollouts in candidates:
            for segments in segment_counts:
                division = Division(samples, rollouts, segments)
                if needed_bytes(shape, division) <= max_memory:
                    return division
    smallest = min(needed_bytes(shape, Division(1, parts[-1], segments)) for segments in [1, *cuts])
    raise MemoryError(
        f"max_memory={max_memory} bytes is too little for T={shape.time}, H={shape.hidden}: "
        f"{parts[-1]} of {shape.rollouts} rollouts of one sample at a time needs {smallest} bytes"
    )


def one_after_another(segments: Iterable[slice], device: torch.device) -> Iterator[slice]:
    """Yield segments; on a CPU have the C library return what each has freed.

    It keeps freed blocks up to a size that grows with use, and what the next segment asks for does not always fit them:
    several times the memory of a segment would stay.
    """
    for number, steps in enumerate(segments):
        if number and device.type == "cpu" and _malloc_trim is not None:
            _malloc_trim(0)
        yield steps


def divided(
    shape: Shape, max_memory: int | None, device: torch.device, work: Callable[[Division], Result], *, alone: bool
) -> Result:
    """Return `work(division)` at the coarsest division that fits; see `within_memory`."""
    return within_memory(
        default_memory(device) if max_memory is None else max_memory,
        device,
        lambda most: divide(shape, most, device.type),
        lambda division: needed_bytes(shape, division),
        work,
        alone=alone,
    )


def within_memory(
    max_memory: int,
    device: torch.device,
    choose: Callable[[int], Parts],
    needed: Callable[[Parts], int],
    work: Callable[[Parts], Result],
    *,
    alone: bool,
) -> Result:
    """Return `work(parts)`; where memory runs out, do all of it again in half the memory, and so on down.

    Args:
        max_memory: bytes to begin with, or fewer where memory ran out on that device before.
        device: where the work runs.
        choose: from bytes to the coarsest parts that need no more; raises MemoryError where none do.
        needed: the bytes some parts need.
        work: what to do. It is called again, so it must leave nothing behind before it returns.
        alone: False where other processes divide alike and would wait for this one: running out is then an error.

    Raises:
        MemoryError: `max_memory` is too little.
        torch.OutOfMemoryError: memory ran out at the smallest division; the message says what that needs.
    """
    parts = choose(max_memory)
    limit = _lowered.get(device, max_memory)
    while alone and limit < max_memory:
        # Other work may need more at the least than what was left for that which ran out.
        smaller = _at_most(limit, choose)
        if smaller is not None:
            parts = smaller
            break
        limit = FIXED_BYTES + 2 * max(limit - FIXED_BYTES, 1)
    while True:
        try:
            return work(parts)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = str(error)
        # Here, outside the handler, no traceback holds what the failed attempt had allocated.
        used = needed(parts)
        if not alone:
            raise torch.OutOfMemoryError(
                f"out of memory with rollouts shared between processes, which have to divide alike: lower max_memory, "
                f"in all of them, below {used} bytes ({reason})"
            )
        half = FIXED_BYTES + (used - FIXED_BYTES) // 2
        smaller = _at_most(half, choose) or _at_most(used - 1, choose)
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"out of memory at the smallest division, {parts}, which needs about {used} bytes on {device} beside "
                f"parameters, inputs, targets and outputs; a shorter sequence or fewer units would fit ({reason})"
            )
        _lowered[device] = needed(smaller)
        warnings.warn(
            f"out of memory on {device} with {parts}; going on with {smaller}, in this update and those to come "
            f"(max_memory={_lowered[device]} divides like that from the start)",
            RuntimeWarning,
            stacklevel=3,
        )
        parts = smaller


def _at_most(limit: int, choose: Callable[[int], Parts]) -> Parts | None:
    try:
        return choose(limit)
    except MemoryError:
        return None


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator, drivers and cuBLAS have no type for it."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def segments_of(time: int, division: Division) -> list[slice]:
    """Return the time segments of a division, first to last."""
    length = -(-time // division.segments)
    return [slice(start, min(start + length, time)) for start in range(0, time, length)]


def gram_floats(method: str, rollouts: int, hidden: int) -> int:
    """Return a least-squares estimate's floats per step and sample: delta_a again, the Gram matrix and its factor."""
    return rollouts * hidden + 2 * min(rollouts, hidden) ** 2 if method == "anp-ls" else 0


def _halved(count: int) -> list[int]:
    sizes = [max(count, 1)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _doubled(limit: int) -> list[int]:
    sizes = []
    size = 2
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit] if limit > 1 else []
