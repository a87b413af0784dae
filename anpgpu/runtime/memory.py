"""Divides the rollouts so that they fit in memory: into samples, rollouts and time segments; pure Python.

Dividing rollouts or samples costs nothing. Cutting time into segments costs a second forward pass: the first stores
only the deviations at segment starts; then, last segment first, rollouts run again with the same noise and get their
credit.

Where a division runs out of memory all the same, its results are discarded and the work is repeated in half the memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

import torch

from anpgpu.kernels.noise import padded
from anpgpu.kernels.scratch import SPARE_BYTES

Parts = TypeVar("Parts")
Result = TypeVar("Result")

ROWS_WANTED = {"cpu": 64, "cuda": 4096}
"""Rows (samples x rollouts) below which a matrix product no longer fills the device."""

DEFAULT_SHARE = 8
"""By default rollouts use at most the device's total memory divided by this."""

UNKNOWN_MEMORY = 8 << 30
"""What a machine is taken to have where the system does not say."""

FIXED_BYTES = 16 << 20
"""Noise blocks and other temporaries whose size does not depend on the shapes."""

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""Only glibc has this function."""

_lowered: dict[torch.device, int] = {}
"""Memory limit, in bytes, of each device that has run out of memory, so that the next update does not do so again."""


class Shape(NamedTuple):
    """Everything that the memory of one layer's rollouts depends on."""

    time: int
    batch: int
    rollouts: int
    hidden: int
    outputs: int
    """Floats stored per step and rollout besides delta_a and its credit: the outputs of a black-box loss, else 0."""
    stores_delta: bool
    """Whether delta_a is stored."""
    whole_samples: bool
    """Whether all rollouts of a sample must run at once."""
    clean_floats: int
    """Floats of clean activity per step and sample; 0 where the whole clean run is stored anyway."""
    extra_floats: int
    """Floats per step and sample that the estimator adds."""
    fixed_floats: int
    """Floats that it needs however the work is divided."""
    layers: int
    """Layers whose deviations at segment starts are stored at the same time."""
    itemsize: int
    gates: int = 1
    """G of the cell."""
    states: int = 1
    """S / H of the cell."""

    def divide(self, max_memory: int, device_type: str) -> Division:
        """Return the coarsest division that fits; see `divide`."""
        return divide(self, max_memory, device_type)

    def needed_bytes(self, division: Division) -> int:
        """Return the bytes a division needs; see `needed_bytes`."""
        return needed_bytes(self, division)


class Division(NamedTuple):
    """Samples and rollouts that run at a time, and the number of time segments."""

    samples: int
    rollouts: int
    segments: int


def default_memory(device: torch.device) -> int:
    """Return the bytes rollouts may use by default: a share of the device's total memory, so that runs repeat.

    On a CPU the total is that of the machine, or of the container or job where that is limited to less.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // DEFAULT_SHARE
    return _host_memory() // DEFAULT_SHARE


@functools.cache
def _host_memory() -> int:
    """Return the bytes this process may use in all, read once."""
    # Windows has no sysconf.
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else UNKNOWN_MEMORY
    return min([total, *_cgroup_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _cgroup_limits(root: Path, own: Path) -> list[int]:
    """Return the memory limits of this process's control groups, versions 1 and 2, in bytes."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        here = PurePosixPath(path)
        # A group is bound by its parents' limits, too; inside a container its own path may be the root.
        for folder in (here, *here.parents):
            try:
                text = (top / str(folder).lstrip("/") / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def needed_bytes(shape: Shape, division: Division) -> int:
    """Return the bytes a division needs: an upper estimate, tested against measured peaks."""
    length = -(-shape.time // division.segments)
    block = division.samples * division.rollouts
    # A gated cell's clean values and their forms, and the temporaries of its step.
    clean, temporary = 6 + 14 * (shape.gates - 1), 6 + 5 * (shape.gates - 1)
    per_step = block * (padded(shape.hidden) * shape.states * shape.stores_delta + 4)
    per_step += division.samples * (clean * shape.hidden + shape.clean_floats + shape.extra_floats)
    tiles = block * (temporary * shape.hidden + 2 * shape.outputs)
    # Output deviations by segment and concatenated, outputs, and temporaries of the caller's loss.
    whole = shape.time * block * 6 * shape.outputs + (shape.time * division.samples * shape.rollouts) * bool(
        shape.outputs
    )
    starts = 0
    if division.segments > 1:
        starts = division.segments * division.samples * shape.states * shape.hidden * (shape.rollouts * shape.layers)
        starts += division.segments * division.samples * shape.states * shape.hidden * shape.layers
    return FIXED_BYTES + shape.itemsize * (shape.fixed_floats + length * per_step + tiles + whole + starts)


@functools.lru_cache(maxsize=256)
def divide(shape: Shape, max_memory: int, device_type: str) -> Division:
    """Return the coarsest division that fits: whole if possible, then fewer rollouts or samples, then segments.

    On a CPU, blocks are also kept small enough, where possible, for their activity to fit the memory that stays
    allocated from update to update.

    Raises:
        MemoryError: one rollout of one sample at a time needs more; the message says how much.
    """
    rows_wanted = min(ROWS_WANTED.get(device_type, ROWS_WANTED["cuda"]), shape.batch * shape.rollouts)
    parts = [shape.rollouts] if shape.whole_samples else _halved(shape.rollouts)
    blocks = [(samples, rollouts) for samples in _halved(shape.batch) for rollouts in parts]
    full = [block for block in blocks if block[0] * block[1] >= rows_wanted]
    whole = full
    if device_type == "cpu" and shape.stores_delta:
        # Newly allocated memory costs a page fault for every 4 KB.
        row_bytes = shape.itemsize * shape.time * padded(shape.hidden) * shape.states
        whole = [block for block in full if block[0] * block[1] * row_bytes <= SPARE_BYTES] or full
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
    """Yield segments; on a CPU, make the C library return to the system what each segment has freed.

    The C library holds on to freed blocks, which do not always fit the next segment's requests: several times the
    memory of a segment would stay allocated.
    """
    for number, steps in enumerate(segments):
        if number and device.type == "cpu" and _malloc_trim is not None:
            _malloc_trim(0)
        yield steps


class Divisible(Protocol[Parts]):
    """Work that can be divided to fit in memory."""

    def divide(self, max_memory: int, device_type: str) -> Parts:
        """Return the coarsest division that fits in `max_memory` bytes; raise MemoryError if none does."""

    def needed_bytes(self, parts: Parts) -> int:
        """Return the bytes a division needs."""


def within_memory(
    whole: Divisible[Parts],
    max_memory: int,
    device: torch.device,
    work: Callable[[Parts], Result],
    *,
    alone: bool,
) -> Result:
    """Return `work(parts)`; whenever memory runs out, repeat the work in half the memory.

    Args:
        whole: the work before division.
        max_memory: bytes to begin with, or fewer if memory ran out on that device before.
        device: where the work runs.
        work: called with a division, possibly several times: it must have no effect before it returns.
        alone: False where other processes divide alike and would wait for this one: running out is then an error.

    Raises:
        MemoryError: `max_memory` is too little.
        torch.OutOfMemoryError: memory ran out at the smallest division; the message says what that needs.
    """
    parts = whole.divide(max_memory, device.type)
    limit = _lowered.get(device, max_memory)
    while alone and limit < max_memory:
        # The lowered limit comes from other work: this one's smallest division may need more.
        smaller = _at_most(limit, whole, device)
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
        # Outside the handler, so that no traceback keeps the failed attempt's memory alive.
        used = whole.needed_bytes(parts)
        if not alone:
            raise torch.OutOfMemoryError(
                f"out of memory with rollouts shared between processes, which have to divide alike: lower max_memory, "
                f"in all of them, below {used} bytes ({reason})"
            )
        half = FIXED_BYTES + (used - FIXED_BYTES) // 2
        smaller = _at_most(half, whole, device) or _at_most(used - 1, whole, device)
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"out of memory at the smallest division, {parts}, which needs about {used} bytes on {device} beside "
                f"parameters, inputs, targets and outputs; a shorter sequence or fewer units would fit ({reason})"
            )
        _lowered[device] = whole.needed_bytes(smaller)
        warnings.warn(
            f"out of memory on {device} with {parts}; going on with {smaller}, in this update and those to come "
            f"(max_memory={_lowered[device]} divides like that from the start)",
            RuntimeWarning,
            stacklevel=3,
        )
        parts = smaller


def _at_most(limit: int, whole: Divisible[Parts], device: torch.device) -> Parts | None:
    try:
        return whole.divide(limit, device.type)
    except MemoryError:
        return None


def _out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out; torch's CPU allocator, drivers and cuBLAS have no type."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def segments_of(time: int, division: Division) -> list[slice]:
    """Return the time segments of a division, first to last."""
    length = -(-time // division.segments)
    return [slice(start, min(start + length, time)) for start in range(0, time, length)]


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
