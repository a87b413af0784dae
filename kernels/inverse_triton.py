"""Inverses of ridged Gram matrices in Triton: blocked Gauss-Jordan elimination without pivoting.

    A = G + r I,   r = max(ridge, floor) trace(G) / n + tiny          n: rollouts that count

Up to 128 rows a program holds a matrix in registers and eliminates 16 rows at a time; only those pass through memory. A
larger matrix is inverted as two by two blocks, with the Schur complement S of the first:

    E = A11^-1 A12,   S = A22 - A21 E,   A^-1 = [[A11^-1 + E S^-1 E^T, -E S^-1], [-S^-1 E^T, S^-1]]

Where a pivot is not positive, A is not positive definite to rounding, and its inverse becomes that of trace(G) I, as
`least_squares.factored` has it. That of a matrix of zeros is 0. Source: derived here; of Gauss-Jordan elimination of
positive definite matrices without pivoting, Peters and Wilkinson (1975).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .least_squares import RIDGE_FLOOR
from .tiles_least_squares import blocks_of, inverse_launch, row_width
from .tiles_measured import ceil_div, next_power_of_two

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
DOT = tl.constexpr("tf32x3")
"""How products round: twice tensor cores' 11 bits, as exact as float32 to a factor of a few."""
PRODUCT_TILE = 64


class Matrices(NamedTuple):
    """Matrices, (systems, rows, columns), any strides: a pointer to the first element."""

    ptr: Any
    system_stride: int
    row_stride: int
    column_stride: int


class Solved(NamedTuple):
    """What is kept of each system: (systems,) each."""

    trace_ptr: Any
    """float32."""
    bad_ptr: Any
    """int32, 1 where a pivot was not positive."""


class Counted(NamedTuple):
    """The rollouts of a system: rows `first`, `first + stride`, ... of its sample."""

    finite_ptr: Any
    """(batch, rollouts) int8."""
    first: int
    stride: int
    number: int
    rows: int
    """Of the whole matrix, in either form: the rollouts, or the units."""


def matrices_of(tensor: Tensor) -> Matrices:
    """Return a tensor (systems, rows, columns) as kernels take it."""
    return Matrices(tensor, *tensor.stride())


@triton.jit
def _small_inverse(matrix, bad, SIZE: tl.constexpr):
    """Return the inverse of a (SIZE, SIZE) matrix, row by row, and whether a pivot was not positive."""
    place = tl.arange(0, SIZE)
    for pivot_row in tl.range(0, SIZE):
        row = tl.sum(tl.where(place[:, None] == pivot_row, matrix, 0.0), 0)
        column = tl.sum(tl.where(place[None, :] == pivot_row, matrix, 0.0), 1)
        pivot = tl.sum(tl.where(place == pivot_row, row, 0.0), 0)
        # NaN is not positive either.
        bad = bad | (1 - (pivot > 0.0).to(tl.int32))
        row = tl.where(place == pivot_row, 1.0, row) / pivot
        column = tl.where(place == pivot_row, -1.0, column)
        crossed = (place[:, None] == pivot_row) | (place[None, :] == pivot_row)
        matrix = tl.where(crossed, 0.0, matrix) - column[:, None] * row[None, :]
    return matrix, bad


@triton.jit(do_not_specialize=["batch", "rollouts", "ridge"])
def invert_kernel(
    result,  # Matrices (systems, size, width), contiguous rows; may be `source`
    source,  # Matrices (systems, size, size), without a ridge
    solved,  # Solved
    counted,  # Counted
    batch,
    rollouts,
    size,
    width,
    ridge,
    LATER: tl.constexpr,
    BLOCK: tl.constexpr,
    PANEL: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """Write the inverse of a matrix with its ridge: a program owns a system.

    After a panel of rows has been eliminated, its rows and columns are those of the inverse. Only panels pass through
    memory, since those of the matrix and of the inverse are symmetric up to a sign. LATER: the matrix is a Schur
    complement, whose trace is known and whose rows do not say how many rollouts count.
    """
    system = tl.program_id(0).to(tl.int64)
    place, panel = tl.arange(0, BLOCK), tl.arange(0, PANEL)
    inside, eye = place < size, place[:, None] == place[None, :]
    # Columns beyond the last row of a matrix are zeros.
    wide_row = (place < width)[None, :]
    origin = source.ptr + system * source.system_stride
    offset = place[:, None].to(tl.int64) * source.row_stride + place[None, :].to(tl.int64) * source.column_stride
    matrix = tl.load(origin + offset, inside[:, None] & inside[None, :], 0.0)
    entry = tl.arange(0, LONGEST)
    of_sample = counted.finite_ptr + (system % batch) * rollouts + counted.first + entry * counted.stride
    count = tl.sum((tl.load(of_sample, entry < counted.number, 0) != 0).to(tl.int32), 0)
    if LATER:
        trace, bad = tl.load(solved.trace_ptr + system), tl.load(solved.bad_ptr + system)
    else:
        diagonal = origin + entry.to(tl.int64) * (source.row_stride + source.column_stride)
        trace = tl.sum(tl.load(diagonal, entry < counted.rows, 0.0), 0)
        bad = tl.full((), 0, tl.int32)
        tl.store(solved.trace_ptr + system, trace)
    penalty = ridge * trace / tl.maximum(count, 1).to(tl.float32) + TINY
    matrix += tl.where(eye, tl.where(inside, penalty, 1.0)[:, None], 0.0)
    # All of the program's reads of the source come before its writes.
    tl.debug_barrier()
    kept = result.ptr + system * result.system_stride
    rows = kept + place[:, None].to(tl.int64) * result.row_stride + place[None, :]
    tl.store(rows, matrix, (inside & (place < PANEL))[:, None] & wide_row)
    tl.debug_barrier()
    for first in tl.range(0, size, PANEL, num_stages=1):
        row, here = first + panel, (place >= first) & (place < first + PANEL)
        corner = kept + row[:, None].to(tl.int64) * result.row_stride + row[None, :]
        both = (row < size)[:, None] & (row < size)[None, :]
        unit = (panel[:, None] == panel[None, :]).to(tl.float32)
        pivots, bad = _small_inverse(tl.load(corner, both, 0.0) + tl.where(both, 0.0, unit), bad, PANEL)
        across = kept + row[:, None].to(tl.int64) * result.row_stride + place[None, :]
        wide = tl.load(across, (row < size)[:, None] & wide_row, 0.0)
        wide = tl.where(here[None, :], (place[None, :] == row[:, None]).to(tl.float32), wide)
        down = kept + row[None, :].to(tl.int64) * result.row_stride + place[:, None]
        tall = tl.load(down, (row < size)[None, :] & (place < width)[:, None], 0.0)
        tall = tl.where((place < first)[:, None], tall, -tall)
        tall = tl.where(here[:, None], (place[:, None] == row[None, :]).to(tl.float32), tall)
        eliminated = tl.dot(pivots, wide, input_precision=DOT)
        matrix = tl.where(here[:, None] | here[None, :], 0.0, matrix)
        matrix = tl.dot(tall, eliminated, matrix, input_precision=DOT)
        following = (place >= first + PANEL) & (place < first + 2 * PANEL) & inside
        tl.store(rows, matrix, following[:, None] & wide_row)
        tl.debug_barrier()
    tl.store(solved.bad_ptr + system, bad)
    # Of a matrix of zeros only the smallest of ridges is left, whose inverse leaves the range of what it multiplies.
    grown = tl.where(eye, 1.0 / (trace + TINY), 0.0)
    matrix = tl.where(trace == 0.0, 0.0, tl.where(bad != 0, grown, matrix))
    tl.store(rows, matrix, inside[:, None] & wide_row)


@triton.jit(do_not_specialize=["height", "width", "inner"])
def multiply_kernel(
    result,  # Matrices (systems, height, width)
    base,  # Matrices (systems, height, width), or a pointer of None for 0; may be `result`
    left,  # Matrices (systems, height, inner)
    right,  # Matrices (systems, inner, width)
    height,
    width,
    inner,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write base + SIGN left right: a program owns a tile of a system's product."""
    system = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, inner, INNER, num_stages=2):
        place = (first + tl.arange(0, INNER)).to(tl.int64)
        here = place < inner
        rows = left.ptr + system * left.system_stride + row[:, None] * left.row_stride
        tall = tl.load(rows + place[None, :] * left.column_stride, (row < height)[:, None] & here[None, :], 0.0)
        columns = right.ptr + system * right.system_stride + column[None, :] * right.column_stride
        wide = tl.load(columns + place[:, None] * right.row_stride, here[:, None] & (column < width)[None, :], 0.0)
        total = tl.dot(tall, wide, total, input_precision=DOT)
    total *= SIGN
    inside = (row < height)[:, None] & (column < width)[None, :]
    if base.ptr is not None:
        origin = base.ptr + system * base.system_stride
        total += tl.load(origin + row[:, None] * base.row_stride + column[None, :] * base.column_stride, inside, 0.0)
    origin = result.ptr + system * result.system_stride
    tl.store(origin + row[:, None] * result.row_stride + column[None, :] * result.column_stride, total, inside)


@triton.jit(do_not_specialize=["size"])
def rescue_kernel(
    result,  # Matrices (systems, size, size)
    solved,  # Solved
    size,
    BLOCK: tl.constexpr,
):
    """Overwrite what is no inverse, see `invert_kernel`: a program owns BLOCK rows of a system."""
    system = tl.program_id(0).to(tl.int64)
    trace = tl.load(solved.trace_ptr + system)
    if (tl.load(solved.bad_ptr + system) != 0) | (trace == 0.0):
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        diagonal = tl.where(trace == 0.0, 0.0, 1.0 / (trace + TINY))
        for first in range(0, size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.where(row[:, None] == column[None, :], diagonal, 0.0)
            offset = row[:, None].to(tl.int64) * result.row_stride + column[None, :]
            inside = (row < size)[:, None] & (column < size)[None, :]
            tl.store(result.ptr + system * result.system_stride + offset, value, inside)


def _multiply(result: Tensor, left: Tensor, right: Tensor, *, base: Tensor | None = None, sign: float = 1.0) -> None:
    """Write base + sign left right, (systems, height, width) each."""
    systems, height, width = result.shape
    inner = left.shape[2]
    grid = (systems, ceil_div(height, PRODUCT_TILE), ceil_div(width, PRODUCT_TILE))
    multiply_kernel[grid](
        matrices_of(result),
        Matrices(None, None, None, None) if base is None else matrices_of(base),  # type: ignore[arg-type]
        matrices_of(left),
        matrices_of(right),
        height,
        width,
        inner,
        SIGN=sign,
        BLOCK=PRODUCT_TILE,
        INNER=32,
        num_warps=4,
    )


def _eliminate(
    result: Tensor, source: Tensor, solved: Solved, counted: Counted, batch: int, ridge: float, *, later: bool
) -> None:
    """Write inverses of matrices of at most `WIDEST_INVERSE` rows with their ridge; see `invert_kernel`."""
    launch = inverse_launch(result.shape[1])
    invert_kernel[(len(result),)](
        matrices_of(result),
        matrices_of(source),
        solved,
        counted,
        batch,
        counted.finite_ptr.shape[1],
        result.shape[1],
        row_width(result.shape[1]),
        ridge,
        LATER=later,
        BLOCK=launch.block,
        PANEL=launch.panel,
        LONGEST=max(16, next_power_of_two(max(counted.number, counted.rows))),
        num_warps=launch.warps,
    )


def inverses(result: Tensor, gram: Tensor, finite: Tensor, ridge: float, *, half: int | None = None) -> Tensor:
    """Write the inverses of Gram matrices with their ridge; return which had none, (systems,) int32.

    Args:
        result: (systems, n, width), contiguous, with the `row_width` of n; may be `gram`.
        gram: (systems, n, n or more), of all rollouts, of every second, or of the units; overwritten where a program
            cannot hold it.
        finite: rollouts that count, (batch, rollouts) int8; system s is of sample s % batch.
        ridge: relative to the mean squared activity difference of a rollout.
        half: 0 or 1 where the systems are of the even or odd rollouts alone.
    """
    systems, size = result.shape[:2]
    solved = Solved(result.new_empty(systems), torch.empty(systems, dtype=torch.int32, device=result.device))
    rollouts = range(half or 0, finite.shape[1], 1 if half is None else 2)
    counted = Counted(finite, rollouts.start, rollouts.step, len(rollouts), size)
    ridge = max(ridge, RIDGE_FLOOR * torch.finfo(torch.float32).eps)
    first, second = blocks_of(size)
    upper, lower = slice(0, first), slice(first, size)
    common = (solved, counted, len(finite), ridge)
    if not second:
        _eliminate(result, gram, *common, later=False)
        return solved.bad_ptr  # type: ignore[no-any-return]
    above, beside, corner = gram[:, upper, lower], gram[:, lower, upper], gram[:, lower, lower]
    small, large = result[:, upper, upper], result[:, lower, lower]
    product = result.new_empty((systems, first, second))
    _eliminate(small, gram[:, upper, upper], *common, later=False)
    _multiply(product, small, above)
    _multiply(corner, beside, product, base=corner, sign=-1.0)
    _eliminate(large, corner, *common, later=True)
    _multiply(result[:, upper, lower], product, large, sign=-1.0)
    _multiply(result[:, lower, upper], large, product.mT, sign=-1.0)
    _multiply(small, result[:, upper, lower], product.mT, base=small, sign=-1.0)
    rescue_kernel[(systems, ceil_div(size, PRODUCT_TILE))](
        matrices_of(result), solved, size, BLOCK=PRODUCT_TILE, num_warps=4
    )
    return solved.bad_ptr  # type: ignore[no-any-return]
