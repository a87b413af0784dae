"""Where a program's rollouts are, and how values of the clean run are loaded for them.

A row is one rollout of one sample. Tensors of the clean run are read where they are, whatever their strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor (time, batch, units) of the clean run: its pointer and strides, all None where there is none.

    An absent tensor is no None instead of the tuple: Triton 3.6 then forgets, in loops, what it knows of the strides of
    a tensor beside it.
    """

    ptr: Any
    step_stride: int | None
    sample_stride: int | None
    unit_stride: int | None


class Scalars(NamedTuple):
    """A tensor (time, batch) of the clean run: its pointer and strides, all None where there is none."""

    ptr: Any
    step_stride: int | None
    sample_stride: int | None


class CleanRows(NamedTuple):
    """The two tensors of the clean run that a cell takes, (time, batch, hidden) each; absent where it takes none."""

    first: Rows
    second: Rows


class Stored(NamedTuple):
    """delta_a as it is stored, (time, batch, rollouts, stride): its pointer and the stride of its rows."""

    ptr: Any
    stride: int


class Place(NamedTuple):
    """Where the rollouts of a program are, which holds whole rollouts; rows are those of (time, batch, rollouts)."""

    first_sample: Any
    """The program's first sample."""
    sample: Any
    """Sample of each row: a scalar, or (rows,) where the tile spans samples."""
    column: Any
    """The same, broadcasting to (rows, units)."""
    rollout: Any
    """Rollout of each row, (rows,)."""
    local: Any
    """Distance of each row from the first, (rows,)."""
    exists: Any
    """Whether a row is a rollout of the block, (rows,)."""
    first_row: Any
    """Number of the first row among those of its step."""
    rows_of_step: Any
    """Rows of one step."""
    batch: Any
    pieces: Any
    """Pieces in which rows of clean values are loaded, 1, 2 or 4; constexpr."""


class TilePlace(NamedTuple):
    """Where the rows of a program are, which holds some units of them; each field but `sample` is (rows, 1)."""

    row: Any
    """Number of a row among those of its step."""
    sample: Any
    """Sample of each row, (rows, 1), or a scalar."""
    rollout: Any
    exists: Any
    """Whether a row is the program's own."""


def rows_of(tensor: Tensor | None) -> Rows:
    """Return a tensor (T, B, H) as kernels take it."""
    return Rows(None, None, None, None) if tensor is None else Rows(tensor, *tensor.stride())


def scalars_of(tensor: Tensor | None) -> Scalars:
    """Return a tensor (T, B) as kernels take it."""
    return Scalars(None, None, None) if tensor is None else Scalars(tensor, *tensor.stride())


def stored_in(delta_a: Tensor | None) -> Stored | None:
    """Return the tensor that delta_a is stored in, (T, B, P, H padded), as kernels take it."""
    return None if delta_a is None else Stored(delta_a, delta_a.shape[-1])


@triton.jit
def place_of_program(batch, rollouts, BLOCK_ROWS: tl.constexpr, SAMPLES: tl.constexpr, PIECES: tl.constexpr):
    """Return the `Place` of a program that owns BLOCK_ROWS rollouts of one sample, or of SAMPLES samples."""
    local = tl.arange(0, BLOCK_ROWS)
    rows_of_step = tl.cast(batch, tl.int64) * rollouts
    if SAMPLES > 1:
        first_sample = tl.program_id(0).to(tl.int64) * SAMPLES
        ordinal, rollout = local // (BLOCK_ROWS // SAMPLES), local % (BLOCK_ROWS // SAMPLES)
        sample = first_sample + ordinal
        exists = (rollout < rollouts) & (sample < batch)
        first_row = first_sample * rollouts
        local = ordinal * rollouts + rollout
        column = sample[:, None]
    else:
        tiles = tl.cdiv(rollouts, BLOCK_ROWS)
        first_sample = (tl.program_id(0) // tiles).to(tl.int64)
        first_rollout = (tl.program_id(0) % tiles) * BLOCK_ROWS
        rollout = first_rollout + local
        sample = first_sample
        exists = rollout < rollouts
        first_row = sample * rollouts + first_rollout
        column = sample
    return Place(first_sample, sample, column, rollout, local, exists, first_row, rows_of_step, batch, PIECES)


@triton.jit
def _load_units(row_ptr, stride, unit, inside, FULL: tl.constexpr):
    """Return units of rows as float32, zero outside. FULL: all are inside; a mask costs half an instruction a unit."""
    unit_ptr = row_ptr + unit * stride
    units = tl.load(unit_ptr) if FULL else tl.load(unit_ptr, inside, 0.0)
    return units.to(tl.float32)


@triton.jit
def _load_halves(row_ptr, stride, HALF: tl.constexpr):
    """Return 2 HALF units of a row, (HALF, 2): the first half and the second."""
    unit = tl.arange(0, HALF).to(tl.int64)
    first = _load_units(row_ptr, stride, unit, None, True)
    return tl.join(first, _load_units(row_ptr, stride, unit + HALF, None, True))


@triton.jit
def load_rows(rows, step, place, size, FULL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """Return `Rows` of one step for the rollouts of a `Place`: (1, units), or (rows, units) if the tile spans samples.

    size: units of the tensor. FULL: that is BLOCK. Units are then loaded in pieces: those smaller than the program has
    threads come straight into the accumulator's layout.
    """
    step_ptr = rows.ptr + tl.cast(step, tl.int64) * rows.step_stride + place.first_sample * rows.sample_stride
    unit = tl.arange(0, BLOCK).to(tl.int64)
    if SAMPLES > 1:
        # One copy of each sample is loaded; its values are then where every row of the sample needs them.
        ordinal = tl.arange(0, SAMPLES)[:, None]
        inside = (place.first_sample + ordinal < place.batch) & (unit < size)[None, :]
        clean = _load_units(step_ptr + ordinal * rows.sample_stride, rows.unit_stride, unit[None, :], inside, False)
        PER_SAMPLE: tl.constexpr = place.exists.shape[0] // SAMPLES
        clean = tl.broadcast_to(clean[:, None, :], (SAMPLES, PER_SAMPLE, BLOCK))
        clean = tl.reshape(clean, (SAMPLES * PER_SAMPLE, BLOCK))
    elif place.pieces == 4 and FULL:
        left = _load_halves(step_ptr, rows.unit_stride, BLOCK // 4)
        right = _load_halves(step_ptr + BLOCK // 2 * rows.unit_stride, rows.unit_stride, BLOCK // 4)
        clean = tl.reshape(tl.permute(tl.join(left, right), (2, 1, 0)), (BLOCK,))[None, :]
    elif place.pieces == 2 and FULL:
        halves = _load_halves(step_ptr, rows.unit_stride, BLOCK // 2)
        clean = tl.reshape(tl.permute(halves, (1, 0)), (BLOCK,))[None, :]
    else:
        clean = _load_units(step_ptr, rows.unit_stride, unit, unit < size, FULL)[None, :]
    return clean


@triton.jit
def load_scalars(scalars, step, place, SAMPLES: tl.constexpr):
    """Return `Scalars` of one step for the rollouts of a `Place`: a scalar, or (rows,) if the tile spans samples."""
    step_ptr = scalars.ptr + tl.cast(step, tl.int64) * scalars.step_stride
    if SAMPLES > 1:
        clean = tl.load(step_ptr + place.sample * scalars.sample_stride, place.exists, 0)
    else:
        clean = tl.load(step_ptr + place.first_sample * scalars.sample_stride)
    return clean


@triton.jit
def tile_of_program(program, rows, rollouts, BLOCK_ROWS: tl.constexpr, ONE_SAMPLE: tl.constexpr):
    """Return the `TilePlace` of the program with number `program` among those of the same units.

    ONE_SAMPLE: no program spans two samples; the sample is a scalar and a row of clean values serves the whole tile.
    """
    local = tl.arange(0, BLOCK_ROWS)[:, None]
    if ONE_SAMPLE:
        tiles = tl.cdiv(rollouts, BLOCK_ROWS)
        sample = (program // tiles).to(tl.int64)
        rollout = (program % tiles) * BLOCK_ROWS + local
        row = sample * rollouts + rollout
        exists = rollout < rollouts
    else:
        row = program.to(tl.int64) * BLOCK_ROWS + local
        exists = row < rows
        sample = row // rollouts
        rollout = row % rollouts
        sample = tl.where(exists, sample, 0)
    return TilePlace(row, sample, rollout, exists)


@triton.jit
def gather_rows(rows, step, sample, unit, inside):
    """Return some units of `Rows` at one step as float32, zero outside: (1, units), or (rows, units) of the samples."""
    offset = tl.cast(step, tl.int64) * rows.step_stride + sample * rows.sample_stride
    # Added to the pointer first: what is left is constant where the units are.
    row_ptr = rows.ptr + offset
    return tl.load(row_ptr + unit.to(tl.int64) * rows.unit_stride, inside, 0.0).to(tl.float32)


@triton.jit
def spread(values, row):
    """Return values of some samples, (samples, units), for each of their rows, (rows, units); `row` has one of each."""
    SAMPLES: tl.constexpr = values.shape[0]
    EACH: tl.constexpr = row.shape[0] // SAMPLES
    if SAMPLES > 1 and EACH > 1:
        values = tl.broadcast_to(values[:, None, :], (SAMPLES, EACH, values.shape[1]))
        values = tl.reshape(values, (SAMPLES * EACH, values.shape[2]))
    return values


@triton.jit
def gather_scalars(scalars, step, sample):
    """Return `Scalars` at one step: a scalar, or (rows, 1) of the samples."""
    return tl.load(scalars.ptr + tl.cast(step, tl.int64) * scalars.step_stride + sample * scalars.sample_stride)
