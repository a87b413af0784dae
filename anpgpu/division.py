"""How the rollouts are divided so that they fit in memory: samples, rollouts and time segments; pure Python.

Dividing rollouts or samples costs nothing. Cutting time into segments costs a second forward pass: the first keeps only
the deviations at segment starts, then, last segment first, rollouts are run again with regenerated noise and credited.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

ROWS_WANTED = {"cpu": 64, "cuda": 4096}
"""Rows (samples x rollouts) below which a matrix product no longer fills the device."""

DEFAULT_SHARE = 8
"""Rollouts use this fraction of the device's total memory at most, unless told otherwise."""

FIXED_BYTES = 16 << 20
"""Blocks of noise and other temporaries that do not grow with the shapes."""


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
    # Rows of delta_a are padded to whole words of packed signs.
    per_step = block * (32 * -(-shape.hidden // 32) * shape.stores_delta_a + 4)
    per_step += division.samples * (6 * shape.hidden + shape.clean_floats + shape.gram_floats)
    tiles = block * (6 * shape.hidden + 2 * shape.outputs)
    whole = shape.time * block * 3 * shape.outputs + (shape.time * division.samples * shape.rollouts) * bool(
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

    Raises:
        MemoryError: one rollout of one sample at a time needs more; the message says how much.
    """
    rows_wanted = min(ROWS_WANTED.get(device_type, ROWS_WANTED["cuda"]), shape.batch * shape.rollouts)
    parts = [shape.rollouts] if shape.gram_floats else _halved(shape.rollouts)
    blocks = [(samples, rollouts) for samples in _halved(shape.batch) for rollouts in parts]
    full = [block for block in blocks if block[0] * block[1] >= rows_wanted]
    cuts = _doubled(shape.time)
    for candidates, segment_counts in ((full, [1]), (full, cuts), (blocks, [1, *cuts])):
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
