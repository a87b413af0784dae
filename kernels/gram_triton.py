"""Gram matrices of activity differences, and their products with the noise, in Triton.

    G = D D^T,   M^T = D X^T,   D = delta_a_t / u (P x H),   X: the noise in units of sigma

for each step and sample, with u a power of two near the largest activity difference, so that squares fit float32. One
read of delta_a serves both products. Signs are made once and stay packed, a bit each, until a tile of them is an
operand; Gaussian noise is made once for some steps at a time. Rollouts that do not count are never read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import Counters
from .noise_triton import counter_words, noise, philox_words, unpack_counters
from .tiles import INTERPRETED
from .tiles_least_squares import LeastSquaresLaunch, sign_words
from .tiles_measured import ceil_div

EXPONENT = tl.constexpr(23)
"""Bits below the exponent of a float32."""
LARGEST_EXPONENT = tl.constexpr(253)
"""Of a power of two whose inverse is a normal number."""
SIGN_ROWS = 32
OPERANDS = {"bf16": tl.bfloat16, "tf32": tl.float32, "fp32": tl.float32}
"""Operand types of the products."""
ROUNDING = {"bf16": "tf32", "tf32": "tf32", "fp32": "tf32x3"}
"""How products of float32 round: with bfloat16 operands, that with Gaussian noise."""


class Activity(NamedTuple):
    """delta_a, (time, batch, rollouts, units), any strides but a contiguous last dimension."""

    ptr: Any
    step_stride: int
    sample_stride: int
    rollout_stride: int
    finite_ptr: Any
    """(batch, rollouts) int8, 0 for rollouts that do not count."""


class Injected(NamedTuple):
    """The noise in units of sigma: one of the two, the other None."""

    words_ptr: Any
    """(time * batch * rollouts, words) int32, see `signs_kernel`."""
    values_ptr: Any
    """(time * batch * rollouts, units), float32."""


class Systems(NamedTuple):
    """What is kept of each system, a step and sample."""

    gram_ptr: Any
    """(systems, rollouts, width): G, later A^-1; zeros beyond the last rollout. None in the primal form."""
    cross_ptr: Any
    """(systems, rollouts, width): M^T, row q and column p for d_q . xi_p; anything finite beyond the last rollout."""
    unit_ptr: Any
    """(systems,)."""


@triton.jit
def power_of_two(size):
    """Return a power of two of about that size whose inverse is a normal number; 1 where it is 0 or not finite."""
    exponent = tl.minimum((size.to(tl.int32, bitcast=True) >> EXPONENT) + 1, LARGEST_EXPONENT)
    power = (exponent << EXPONENT).to(tl.float32, bitcast=True)
    return tl.where((size > 0.0) & (size < float("inf")), power, 1.0)


@triton.jit(do_not_specialize=["rows", "batch", "rollouts", "words", "counters_low", "counters_high"])
def signs_kernel(
    words_ptr,  # (time * batch * rollouts, words), contiguous, int32
    seed_ptr,  # ()
    rows: tl.int64,
    batch,
    rollouts,
    words,
    counters_low: tl.int64,
    counters_high: tl.int64,
    BLOCK_ROWS: tl.constexpr,
):
    """Write the Philox words that hold signs: a program owns BLOCK_ROWS rows, each a (time, sample, rollout).

    Unit u = 128 v + 8 a + 2 q + b (a < 16, q < 4, b < 2) is bit 2 a + b of word 4 v + q; a set bit is +1.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    quarter = tl.arange(0, 4)[None, :]
    c0, c1, c2, c3 = unpack_counters(counters_low, counters_high)
    c1 = c1 + (row // rollouts // batch).to(tl.uint32)
    c2, c3 = c2 + (row % rollouts).to(tl.uint32), c3 + (row // rollouts % batch).to(tl.uint32)
    seed = tl.load(seed_ptr)
    for first in range(0, words, 16):
        block = (first // 4 + quarter).to(tl.uint32)
        made = philox_words(seed, c0 + block, c1, c2, c3)
        target = words_ptr + row * words + first + quarter
        for part in tl.static_range(4):
            word = made[part].to(tl.int32, bitcast=True)
            tl.store(target + 4 * part, word, (row < rows) & (first + 4 * part + quarter < words))


@triton.jit
def signs_of(rows_ptr, inside, start, UNITS: tl.constexpr):
    """Return the signs of UNITS units from `start` as float32, (rows, UNITS), from the words of each row."""
    quarter = tl.arange(0, 4)
    words = tl.load(rows_ptr[:, None] + start // 128 * 4 + quarter[None, :], inside[:, None], 0)
    eighth = tl.arange(0, UNITS // 8)[None, :, None, None]
    place = 2 * eighth + tl.arange(0, 2)[None, None, None, :] + start % 128 // 4
    negative = ~(words[:, None, :, None] << (31 - place))
    signs = ((negative & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.reshape(signs, (words.shape[0], UNITS))


@triton.jit
def largest_activity(origin, finite_ptr, rollouts, units, stride, BLOCK: tl.constexpr, UNITS: tl.constexpr):
    """Return the largest activity difference of a step and sample, of the rollouts that count."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rollouts, BLOCK):
        rollout = first + tl.arange(0, BLOCK)
        counted = tl.load(finite_ptr + rollout, rollout < rollouts, 0) != 0
        row = origin + rollout[:, None].to(tl.int64) * stride
        for start in range(0, units, UNITS):
            unit = start + tl.arange(0, UNITS)
            tile = tl.load(row + unit[None, :], counted[:, None] & (unit < units)[None, :], 0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(tile.to(tl.float32)), 1))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["batch"])
def products_kernel(
    systems,  # Systems
    activity,  # Activity
    injected,  # Injected
    batch,
    rollouts,
    units,
    words,
    width,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write G and M^T: a program owns a tile of both, (BLOCK, BLOCK), of one system.

    Without room for G, M^T alone, of an activity that is in units already.
    """
    system = tl.program_id(0).to(tl.int64)
    sample = system % batch
    local, lane = tl.arange(0, BLOCK), tl.arange(0, UNITS)
    origin = activity.ptr + system // batch * activity.step_stride + sample * activity.sample_stride
    finite_ptr = activity.finite_ptr + sample * rollouts
    if systems.gram_ptr is not None:
        size = power_of_two(
            largest_activity(origin, finite_ptr, rollouts, units, activity.rollout_stride, BLOCK, UNITS)
        )
    else:
        size = tl.full((), 1.0, tl.float32)
    inverse = (1.0 / size).to(OPERAND)
    row, column = tl.program_id(1) * BLOCK + local, tl.program_id(2) * BLOCK + local
    counted = tl.load(finite_ptr + row, row < rollouts, 0) != 0
    rows = origin + row[:, None].to(tl.int64) * activity.rollout_stride + lane[None, :]
    counted_too = tl.load(finite_ptr + column, column < rollouts, 0) != 0
    columns = origin + column[:, None].to(tl.int64) * activity.rollout_stride + lane[None, :]
    noisy = (column < rollouts, system * rollouts + column)
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    cross = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, units, UNITS, num_stages=STAGES):
        inside = (start + lane < units)[None, :]
        moved = tl.load(rows + start, counted[:, None] & inside, 0.0).to(OPERAND) * inverse
        if systems.gram_ptr is not None:
            other = moved
            if TILES > 1:
                other = tl.load(columns + start, counted_too[:, None] & inside, 0.0).to(OPERAND) * inverse
            gram = tl.dot(moved, tl.trans(other), gram, input_precision=DOT)
        if injected.words_ptr is not None:
            signs = signs_of(injected.words_ptr + noisy[1] * words, noisy[0], start, UNITS).to(OPERAND)
            cross = tl.dot(moved, tl.trans(signs), cross, input_precision=DOT)
        else:
            values = injected.values_ptr + noisy[1][:, None] * units + (start + lane)[None, :]
            values = tl.load(values, noisy[0][:, None] & inside, 0.0)
            cross = tl.dot(moved.to(tl.float32), tl.trans(values), cross, input_precision=DOT)
    first = system * rollouts * width
    place = row[:, None] * width + column[None, :]
    stored = (row < rollouts)[:, None] & (column < width)[None, :]
    tl.store(systems.cross_ptr + first + place, cross, stored)
    if systems.gram_ptr is not None:
        tl.store(systems.gram_ptr + first + place, gram, stored)
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            tl.store(systems.unit_ptr + system, size)


def operand_of(stored: torch.dtype, precision: str) -> str:
    """Return the operand type of the products of activity differences stored in a type, after rollouts' own."""
    if INTERPRETED or (precision == "fp32" and stored is not torch.bfloat16):
        return "fp32"
    return "bf16" if stored is torch.bfloat16 else "tf32"


def activity_of(delta_a: Tensor, finite: Tensor) -> Activity:
    """Return activity differences, (T, B, P, H), and the rollouts that count, (B, P) int8, as kernels take them."""
    step, sample, rollout, _ = delta_a.stride()
    return Activity(delta_a, step, sample, rollout, finite)


def write_products(
    systems: Systems,
    delta_a: Tensor,
    finite: Tensor,
    seed: Tensor,
    kind: str,
    counters: Counters,
    launch: LeastSquaresLaunch,
    operand: str,
) -> None:
    """Write G, M^T and u of some steps; M^T alone without room for G.

    Args:
        systems: of these steps.
        delta_a: activity differences, (L, B, P, H); what is in their place in the primal form.
        finite: rollouts that count, (B, P) int8.
        seed: 0-dim int64 tensor, the noise's key.
        kind: of the noise.
        counters: of the first step.
        launch: the division.
        operand: see `operand_of`.
    """
    steps, batch, rollouts, units = delta_a.shape
    words = sign_words(units)
    injected = injected_in(seed, (steps, batch, rollouts, units), kind, counters)
    products_kernel[(steps * batch, launch.tiles, launch.tiles)](
        systems,
        activity_of(delta_a, finite),
        injected,
        batch,
        rollouts,
        units,
        words,
        systems.cross_ptr.shape[-1],
        OPERAND=OPERANDS[operand],
        DOT=ROUNDING[operand],
        TILES=launch.tiles,
        BLOCK=launch.block,
        UNITS=launch.gram_units,
        STAGES=launch.gram_stages,
        num_warps=launch.gram_warps,
    )


def injected_in(seed: Tensor, shape: tuple[int, int, int, int], kind: str, counters: Counters) -> Injected:
    """Return the noise of some steps, (T, B, P, H), as kernels take it."""
    if kind == "rademacher":
        return Injected(packed_signs(seed, shape, counters), None)
    return Injected(None, noise(seed, shape, kind=kind, counters=counters))


def packed_signs(seed: Tensor, shape: tuple[int, int, int, int], counters: Counters) -> Tensor:
    """Return the signs of Rademacher noise of shape (T, B, P, H), (T B P, words) int32; see `signs_kernel`."""
    time, batch, rollouts, units = shape
    rows, words = time * batch * rollouts, sign_words(units)
    packed = torch.empty((rows, words), dtype=torch.int32, device=seed.device)
    low, high = counter_words(counters)
    signs_kernel[(ceil_div(rows, SIGN_ROWS),)](
        packed, seed, rows, batch, rollouts, words, low, high, BLOCK_ROWS=SIGN_ROWS, num_warps=4
    )
    return packed
