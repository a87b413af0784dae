"""The primal form of least squares in Triton, for more rollouts than units: what the estimate is, given the returns.

    E = D^T D,   K^T = D (E + r I)^-1,   lam_t = K c_t / u,   D = delta_a_t / u (P x H)

for each step and sample, with u a power of two near the largest activity difference. With more rollouts than units
D D^T is singular, and A^-1 c would be what a small ridge makes of rounding; E = D^T D is not. Products of bfloat16
numbers are exact, all others as exact as float32 to a factor of a few: what rounds E is amplified by the square of D's
condition number. Rollouts that do not count are never read. Source: derived here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram_triton import OPERANDS, ROUNDING, activity_of, largest_activity, power_of_two
from .inverse_triton import DOT, inverses
from .tiles_least_squares import primal_launch, row_width
from .tiles_measured import ceil_div


@triton.jit
def _tile(origin, finite_ptr, rollout, unit, stride, rollouts, units):
    """Return the activity differences of some rollouts that count and some units."""
    counted = tl.load(finite_ptr + rollout, rollout < rollouts, 0) != 0
    place = origin + rollout[:, None].to(tl.int64) * stride + unit[None, :]
    return tl.load(place, counted[:, None] & (unit < units)[None, :], 0.0)


@triton.jit(do_not_specialize=["batch"])
def units_gram_kernel(
    gram_ptr,  # (systems, units, width), contiguous, float32
    unit_ptr,  # (systems,)
    activity,  # Activity
    batch,
    rollouts,
    units,
    width,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROLLOUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write E and u: a program owns a tile of E, (BLOCK, BLOCK), of one system."""
    system = tl.program_id(0).to(tl.int64)
    sample = system % batch
    local, lane = tl.arange(0, BLOCK), tl.arange(0, ROLLOUTS)
    stride = activity.rollout_stride
    origin = activity.ptr + system // batch * activity.step_stride + sample * activity.sample_stride
    finite_ptr = activity.finite_ptr + sample * rollouts
    size = power_of_two(largest_activity(origin, finite_ptr, rollouts, units, stride, ROLLOUTS, BLOCK))
    inverse = (1.0 / size).to(OPERAND)
    row, column = tl.program_id(1) * BLOCK + local, tl.program_id(2) * BLOCK + local
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, rollouts, ROLLOUTS, num_stages=STAGES):
        moved = _tile(origin, finite_ptr, first + lane, row, stride, rollouts, units).to(OPERAND) * inverse
        other = moved
        if TILES > 1:
            other = _tile(origin, finite_ptr, first + lane, column, stride, rollouts, units).to(OPERAND) * inverse
        gram = tl.dot(tl.trans(moved), other, gram, input_precision=DOT)
    place = (system * units + row[:, None]) * width + column[None, :]
    tl.store(gram_ptr + place, gram, (row < units)[:, None] & (column < width)[None, :])
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(unit_ptr + system, size)


@triton.jit(do_not_specialize=["batch"])
def regressors_kernel(
    regressors_ptr,  # (systems, rollouts, width), contiguous, float32
    inverse_ptr,  # (systems, units, width), contiguous, float32; zeros beyond the last unit
    unit_ptr,  # (systems,)
    activity,  # Activity
    batch,
    rollouts,
    units,
    width,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Write K^T: a program owns a tile of it, (BLOCK, BLOCK), of one system."""
    system = tl.program_id(0).to(tl.int64)
    sample = system % batch
    origin = activity.ptr + system // batch * activity.step_stride + sample * activity.sample_stride
    finite_ptr = activity.finite_ptr + sample * rollouts
    inverse_unit = 1.0 / tl.load(unit_ptr + system)
    rollout = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, units, INNER, num_stages=2):
        unit = first + tl.arange(0, INNER)
        moved = _tile(origin, finite_ptr, rollout, unit, activity.rollout_stride, rollouts, units).to(tl.float32)
        place = (system * units + unit[:, None]) * width + column[None, :]
        rows = tl.load(inverse_ptr + place, (unit < units)[:, None] & (column < width)[None, :], 0.0)
        total = tl.dot(moved * inverse_unit, rows, total, input_precision=DOT)
    place = (system * rollouts + rollout[:, None]) * width + column[None, :]
    tl.store(regressors_ptr + place, total, (rollout < rollouts)[:, None] & (column < width)[None, :])


def regressors(unit: Tensor, delta_a: Tensor, finite: Tensor, ridge: float, operand: str) -> tuple[Tensor, Tensor]:
    """Return K^T, (T, B, P, H), and which systems had no inverse, (T * B,) int32; write u.

    Args:
        unit: written, (T * B,).
        delta_a: activity differences, (T, B, P, H).
        finite: rollouts that count, (B, P) int8.
        ridge: relative to the mean squared activity difference of a rollout.
        operand: see `gram_triton.operand_of`.
    """
    time, batch, rollouts, units = delta_a.shape
    systems, width = time * batch, row_width(units)
    launch = primal_launch(units)
    exact = "bf16" if operand == "bf16" else "fp32"
    activity, sizes = activity_of(delta_a, finite), (batch, rollouts, units, width)
    gram = unit.new_empty((systems, units, width))
    units_gram_kernel[(systems, launch.tiles, launch.tiles)](
        gram,
        unit,
        activity,
        *sizes,
        OPERAND=OPERANDS[exact],
        DOT=ROUNDING[exact],
        TILES=launch.tiles,
        BLOCK=launch.block,
        ROLLOUTS=launch.rollouts,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    bad = inverses(gram, gram, finite, ridge)
    result = unit.new_empty((systems, rollouts, width))
    regressors_kernel[(systems, ceil_div(rollouts, launch.block), launch.tiles)](
        result, gram, unit, activity, *sizes, BLOCK=launch.block, INNER=launch.inner, num_warps=launch.warps
    )
    return torch.unflatten(result, 0, (time, batch))[..., :units], bad
