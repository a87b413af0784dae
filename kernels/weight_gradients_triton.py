"""Weight gradients on tensor cores: operands rounded to TF32, sums in float32, in parts of fixed size and order.

Contract: `weight_gradients.py`. Two weights that share an adjoint, W_ih and W_hh, and their bias come from one launch.
Where few tiles would leave the GPU empty, steps and samples are split among programs, and a second launch adds up the
splits, first to last: no sum depends on which program ends first. Torch's settings for its own products are neither
read nor changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import weight_gradients as reference
from .tiles_measured import ceil_div
from .tiles_weight_gradients import CHUNK_ROWS, REDUCED, WeightGradientsLaunch, weight_gradients_launch

LARGEST = tl.constexpr(3.4e38)
"""Rounding leaves float32's range nowhere below."""


class Factor(NamedTuple):
    """A factor of the products, (time, batch, columns), any strides."""

    ptr: Any
    """None where there is no such factor."""
    step_stride: Any
    sample_stride: Any
    column_stride: Any
    columns: Any


class Sums(NamedTuple):
    """What is written: sums over all steps and samples, or those of a split."""

    first_ptr: Any
    """(parts, units, columns), contiguous, as the next two."""
    second_ptr: Any
    bias_ptr: Any
    """(parts, units)."""


@triton.jit
def _rounded(values):
    """Round to TF32, to nearest, where a tensor core would cut; what is not finite stays as it is."""
    bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(values) < LARGEST, bits.to(tl.float32, bitcast=True), values)


@triton.jit
def _tile(factor, step, sample, column, inside):
    """Load rows, each of a step and a sample, of some columns of a factor; zero outside."""
    place = step.to(tl.int64) * factor.step_stride + sample.to(tl.int64) * factor.sample_stride
    mask = inside[:, None] & (column < factor.columns)[None, :]
    return tl.load(factor.ptr + place[:, None] + column[None, :].to(tl.int64) * factor.column_stride, mask, 0.0)


@triton.jit
def _add(target_ptr, value, mask, ADDS: tl.constexpr):
    """Store a value, or add it to what is there."""
    if ADDS:
        value += tl.load(target_ptr, mask, 0.0)
    tl.store(target_ptr, value, mask)


@triton.jit
def _products(
    target_ptr,
    bias_ptr,
    adjoint,
    presynaptic,
    tile,
    start,
    stop,
    batch,
    has_bias,
    ADDS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the products of a tile's units and columns over some rows, and, where asked, the sums over the units."""
    unit, column = tl.program_id(0) * UNITS + tl.arange(0, UNITS), tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((UNITS, COLUMNS), tl.float32)
    sums = tl.zeros((INNER, UNITS), tl.float32)
    lane = tl.arange(0, INNER)
    for chunk in range(start, stop, CHUNK):
        product = tl.zeros((UNITS, COLUMNS), tl.float32)
        for first in tl.range(chunk, tl.minimum(chunk + CHUNK, stop), INNER, num_stages=STAGES):
            row = first + lane
            step, sample = row // batch, row % batch
            left = _tile(adjoint, step, sample, unit, row < stop)
            right = _tile(presynaptic, step, sample, column, row < stop)
            sums += left
            product = tl.dot(tl.trans(_rounded(left)), _rounded(right), product, input_precision="tf32")
        total += product
    place = unit[:, None].to(tl.int64) * presynaptic.columns + column[None, :]
    mask = (unit < adjoint.columns)[:, None] & (column < presynaptic.columns)[None, :]
    _add(target_ptr + place, total, mask, ADDS)
    _add(bias_ptr + unit, tl.sum(sums, 0), (unit < adjoint.columns) & has_bias, ADDS)


@triton.jit(do_not_specialize=["rows", "batch", "splits", "split_rows", "first_tiles"])
def products_kernel(
    sums,  # Sums, of each split
    adjoint,  # Factor, of each part
    first,  # Factor
    second,  # Factor
    rows,
    batch,
    splits,
    split_rows,
    first_tiles,
    split_stride: tl.int64,
    part_stride: tl.int64,
    ADDS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write a tile of a weight's gradient: a program owns one of a part and of a split of all steps and samples."""
    part, split = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(2) % splits
    start = split * split_rows
    stop = tl.minimum(start + split_rows, rows)
    adjoint = Factor(
        adjoint.ptr + part * part_stride,
        adjoint.step_stride,
        adjoint.sample_stride,
        adjoint.column_stride,
        adjoint.columns,
    )
    group = part * adjoint.columns
    written = split.to(tl.int64) * split_stride
    bias_ptr = sums.bias_ptr + written + group
    tile = tl.program_id(1)
    if tile < first_tiles:
        _products(
            sums.first_ptr + written + group * first.columns,
            bias_ptr,
            adjoint,
            first,
            tile,
            start,
            stop,
            batch,
            tile == 0,
            ADDS,
            BLOCK_UNITS,
            BLOCK_COLUMNS,
            INNER,
            CHUNK,
            STAGES,
        )
    # Nested: which of the two holds is known when it is compiled.
    if second.ptr is not None:  # noqa: SIM102
        if tile >= first_tiles:
            _products(
                sums.second_ptr + written + group * second.columns,
                bias_ptr,
                adjoint,
                second,
                tile - first_tiles,
                start,
                stop,
                batch,
                False,
                ADDS,
                BLOCK_UNITS,
                BLOCK_COLUMNS,
                INNER,
                CHUNK,
                STAGES,
            )


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    sums,  # Sums, of all splits
    room_ptr,  # (splits, sizes of the three, one after the other), contiguous
    first_size: tl.int64,
    second_size: tl.int64,
    bias_size: tl.int64,
    splits,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the splits, first to last: a program owns BLOCK of their numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    both = first_size + second_size
    size = both + bias_size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(room_ptr + split * size + place, place < size, 0.0)
    _add(sums.first_ptr + place, total, place < first_size, ADDS)
    if sums.second_ptr is not None:
        _add(sums.second_ptr + place - first_size, total, (place >= first_size) & (place < both), ADDS)
    _add(sums.bias_ptr + place - both, total, (place >= both) & (place < size), ADDS)


def weight_gradients(
    adjoint: Tensor, presynaptic: Sequence[Tensor], sums: Sequence[Tensor] | None = None, *, precision: str
) -> list[Tensor]:
    """Return the gradients of weights that share an adjoint, and of their bias.

    See the reference, which runs where `precision` is "fp32".
    """
    empty = adjoint.numel() == 0 or any(activity.numel() == 0 for activity in presynaptic)
    if precision == "fp32" or empty:
        return reference.weight_gradients(adjoint, presynaptic, sums)
    parts, time, batch, units = adjoint.shape
    columns = [activity.shape[-1] for activity in presynaptic]
    made = sums
    if made is None:
        made = [*(adjoint.new_empty((parts, units, size)) for size in columns), adjoint.new_empty((parts, units))]
    launch = weight_gradients_launch(time * batch, parts, units, (columns[0], columns[1] if columns[1:] else 0))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(adjoint):
        _launch(adjoint, presynaptic, made, launch, adds=sums is not None)
    return list(made)


def _launch(
    adjoint: Tensor, presynaptic: Sequence[Tensor], made: Sequence[Tensor], launch: WeightGradientsLaunch, *, adds: bool
) -> None:
    """Write, or add to, the sums."""
    parts, time, batch, _ = adjoint.shape
    sizes = [total.numel() for total in made]
    targets, whole = made, sum(sizes)
    split = launch.splits > 1
    if split:
        room = adjoint.new_empty((launch.splits, whole))
        targets = room[0].split(sizes)
    products_kernel[(launch.unit_tiles, sum(launch.column_tiles), parts * launch.splits)](
        _sums(targets),
        _factor(adjoint[0]),
        _factor(presynaptic[0]),
        _factor(presynaptic[1]) if presynaptic[1:] else Factor(None, 0, 0, 0, 0),
        time * batch,
        batch,
        launch.splits,
        launch.split_rows,
        launch.column_tiles[0],
        whole,
        adjoint.stride(0),
        ADDS=adds and not split,
        BLOCK_UNITS=launch.block_units,
        BLOCK_COLUMNS=launch.block_columns,
        INNER=launch.inner,
        CHUNK=CHUNK_ROWS,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    if split:
        second = sizes[1] if sizes[2:] else 0
        reduce_kernel[(ceil_div(whole, REDUCED),)](
            _sums(made), room, sizes[0], second, sizes[-1], launch.splits, ADDS=adds, BLOCK=REDUCED, num_warps=4
        )


def _factor(values: Tensor) -> Factor:
    """Return (T, B, n) as kernels take it."""
    step, sample, column = values.stride()
    return Factor(values, step, sample, column, values.shape[-1])


def _sums(sums: Sequence[Tensor]) -> Sums:
    """Return the gradients of one weight or two and of their bias as kernels take them."""
    first, *second, bias = sums
    return Sums(first, second[0] if second else None, bias)
