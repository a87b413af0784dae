"""Least squares in Triton: Gram and noise products, inverses, the recursion over time, and the sums over rollouts.

Contract and equations: `least_squares.py`. In its dual form, with u a power of two near the largest activity difference
of a step and sample, D = delta_a_t / u, and X the noise in units of sigma:

    products     G = D D^T and M^T = D X^T, read once              a program per (step, sample)
    inverses     A^-1 = (G + r I)^-1                               `inverse_triton.py`
    recursion    x_t = A^-1 c_t,  c_{t-1} = loss_{t-1} + discount (c_t - (sigma / u) M x_t)    a program per sample
    sums         lam_t = D^T x_t / u

In its primal form, for P > H, K^T of `primal_triton.py` takes the place of D, and of A^-1 D and M A^-1 in one:

    products     M^T = K^T X^T
    recursion    c_{t-1} = loss_{t-1} + discount (c_t - (sigma / u) M c_t)
    sums         lam_t = K c_t / u

Only the recursion follows time, and it reads P x P matrices instead of the P x H activity, two a step or one. Signs
are made once and stay packed, a bit each; Gaussian noise is made once for some steps at a time. Rollouts that do not
count are never read. For Rademacher noise no array of the size of delta_a is made but K, and nothing makes the host
wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import least_squares as reference
from .gram_triton import EXPONENT, Systems, activity_of, operand_of, power_of_two, write_products
from .inverse_triton import inverses
from .least_squares import LeastSquares, Path, block_length
from .noise import Counters
from .noise_triton import noise
from .primal_triton import regressors
from .rollout import RolloutOptions
from .rollout_fused_triton import as_bytes
from .tiles_least_squares import inverse_launch, least_squares_launch, least_squares_obstacle, row_width
from .tiles_measured import ceil_div

LOSS_STEPS = tl.constexpr(16)
"""Steps whose loss differences are looked at together for their largest."""


class Duals(NamedTuple):
    """What the recursion writes."""

    dual_ptr: Any
    """x, (systems, rollouts); c in the primal form."""
    credit_ptr: Any
    """c, (systems, rollouts), or None."""
    carry_ptr: Any
    """(batch, rollouts)."""
    unit_ptr: Any
    """What x and c of each sample are in units of, (batch,)."""


@triton.jit
def _times_quotient(value, above, below):
    """Return value * above / below of two powers of two, whose quotient alone may leave float32's range."""
    exponent = (above.to(tl.int32, bitcast=True) >> EXPONENT) - (below.to(tl.int32, bitcast=True) >> EXPONENT)
    half = exponent >> 1
    first = ((127 + half) << EXPONENT).to(tl.float32, bitcast=True)
    return value * first * ((127 + exponent - half) << EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def _load_rows(matrix_ptr, first, rollouts, width, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Return ROWS rows of a (rollouts, width) matrix."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, ROWS * TILES)
    inside = (row < rollouts)[:, None] & (column < width)[None, :]
    return tl.load(matrix_ptr + row[:, None] * width + column[None, :], inside, 0.0)


@triton.jit
def _times_rows(loaded, matrix_ptr, vector, rollouts, width, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Return the vector times a matrix, which is `loaded` already where there is one tile of rows."""
    if TILES == 1:
        result = tl.sum(loaded * vector[:, None], 0)
    else:
        result = tl.zeros((ROWS * TILES,), tl.float32)
        parts, number = tl.reshape(vector, (TILES, ROWS)), tl.arange(0, TILES)[:, None]
        for tile in tl.range(0, TILES, num_stages=1):
            part = tl.sum(tl.where(number == tile, parts, 0.0), 0)
            result += tl.sum(_load_rows(matrix_ptr, tile * ROWS, rollouts, width, ROWS, TILES) * part[:, None], 0)
    return result


@triton.jit
def _matrices(systems, place, rollouts, width, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Return A^-1 and M^T of a system, or what stands for them where there is none or they are read in parts."""
    if TILES == 1:
        cross = _load_rows(systems.cross_ptr + place, 0, rollouts, width, ROWS, TILES)
        inverse = cross
        if systems.gram_ptr is not None:
            inverse = _load_rows(systems.gram_ptr + place, 0, rollouts, width, ROWS, TILES)
    else:
        inverse, cross = 0.0, 0.0
    return inverse, cross


@triton.jit(do_not_specialize=["time", "batch", "discount", "sigma"])
def recursion_kernel(
    duals,  # Duals
    systems,  # Systems
    delta_loss_ptr,  # (time, batch, rollouts), contiguous, float32
    carry_ptr,  # (batch, rollouts), contiguous, float32
    finite_ptr,  # (batch, rollouts), contiguous, int8
    time,
    batch,
    rollouts,
    width,
    discount,
    sigma,
    BASELINE: tl.constexpr,
    PREFETCHES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Go back through time: a program owns a sample. A sample without a rollout that counts gets NaN.

    In the primal form there is no A^-1 here, and x is c.
    """
    sample = tl.program_id(0).to(tl.int64)
    rollout = tl.arange(0, ROWS * TILES)
    counted = tl.load(finite_ptr + sample * rollouts + rollout, rollout < rollouts, 0) != 0
    count = tl.sum(counted.to(tl.float32), 0)
    carry = tl.load(carry_ptr + sample * rollouts + rollout, counted, 0.0)
    ahead = tl.arange(0, LOSS_STEPS)
    largest = tl.abs(carry)
    for first in range(0, time, LOSS_STEPS):
        step = (first + ahead)[:, None].to(tl.int64)
        losses = delta_loss_ptr + (step * batch + sample) * rollouts + rollout[None, :]
        losses = tl.load(losses, (step < time) & counted[None, :], 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(losses), 0))
    unit = power_of_two(tl.max(largest, 0))
    tl.store(duals.unit_ptr + sample, unit)
    inverse_unit = 1.0 / unit
    carry *= inverse_unit
    area = tl.cast(rollouts, tl.int64) * width
    # The sample's system of the last step.
    system = (tl.cast(time, tl.int64) - 1) * batch + sample
    if PREFETCHES:
        inverse, cross = _matrices(systems, system * area, rollouts, width, ROWS, TILES)
    for _ in tl.range(0, time, num_stages=1):
        size = tl.load(systems.unit_ptr + system)
        credit = tl.load(delta_loss_ptr + system * rollouts + rollout, counted, 0.0) * inverse_unit + carry
        if PREFETCHES:
            inverse_now, cross_now = inverse, cross
            # The first step's are loaded twice.
            earlier = tl.maximum(system - batch, sample)
            inverse, cross = _matrices(systems, earlier * area, rollouts, width, ROWS, TILES)
        else:
            inverse_now, cross_now = _matrices(systems, system * area, rollouts, width, ROWS, TILES)
        if BASELINE:
            credit -= tl.sum(credit, 0) / count
        credit = tl.where(counted, credit, 0.0)
        dual = credit
        if systems.gram_ptr is not None:
            dual = _times_rows(inverse_now, systems.gram_ptr + system * area, credit, rollouts, width, ROWS, TILES)
        later = _times_rows(cross_now, systems.cross_ptr + system * area, dual, rollouts, width, ROWS, TILES)
        place = system * rollouts + rollout
        tl.store(duals.dual_ptr + place, tl.where(count > 0.0, dual, float("nan")), rollout < rollouts)
        if duals.credit_ptr is not None:
            tl.store(duals.credit_ptr + place, credit, rollout < rollouts)
        carry = tl.where(counted, discount * (credit - sigma / size * later), 0.0)
        system -= batch
    tl.store(duals.carry_ptr + sample * rollouts + rollout, carry * unit, rollout < rollouts)


@triton.jit
def half_kernel(
    dual_ptr,  # (systems, rollouts), contiguous, float32; of the other half, too
    credit_ptr,  # (systems, rollouts), contiguous, float32
    inverse_ptr,  # (systems, size, width), contiguous, float32
    rollouts,
    size,
    width,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write x = A^-1 c of the even or odd rollouts alone: a program owns a system."""
    system = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    row = system * rollouts + HALF + 2 * place
    credit = tl.load(credit_ptr + row, place < size, 0.0)
    origin = inverse_ptr + system * size * width
    inside = (place < size)[:, None] & (place < width)[None, :]
    inverse = tl.load(origin + place[:, None] * width + place[None, :], inside, 0.0)
    tl.store(dual_ptr + row, tl.sum(inverse * credit[:, None], 0), place < size)


@triton.jit(do_not_specialize=["batch", "parts_stride"])
def sums_kernel(
    adjoint_ptr,  # (parts, systems, units), contiguous, float32
    activity,  # Activity
    duals,  # Duals
    halves_ptr,  # (systems, rollouts), contiguous, float32: x of each half alone; None where halves are not told apart
    unit_ptr,  # (systems,)
    batch,
    rollouts,
    units,
    parts_stride: tl.int64,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Write D^T x in the caller's units: a program owns UNITS units of a system.

    In the primal form K^T, which is in units already, stands for D. With halves, the parts are half of each half's own
    estimate, and the estimate of all less the two.
    """
    system = tl.program_id(0).to(tl.int64)
    sample = system % batch
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    origin = activity.ptr + system // batch * activity.step_stride + sample * activity.sample_stride
    size, loss_unit = tl.load(unit_ptr + system), tl.load(duals.unit_ptr + sample)
    inverse = 1.0 / size if DUAL else 1.0
    whole = tl.zeros((UNITS,), tl.float32)
    even = tl.zeros((UNITS,), tl.float32)
    odd = tl.zeros((UNITS,), tl.float32)
    for first in range(0, rollouts, BLOCK):
        rollout = first + tl.arange(0, BLOCK)
        counted = tl.load(activity.finite_ptr + sample * rollouts + rollout, rollout < rollouts, 0) != 0
        row = origin + rollout[:, None].to(tl.int64) * activity.rollout_stride
        moved = tl.load(row + unit[None, :], counted[:, None] & (unit < units)[None, :], 0.0).to(tl.float32) * inverse
        place = system * rollouts + rollout
        whole += tl.sum(moved * tl.load(duals.dual_ptr + place, rollout < rollouts, 0.0)[:, None], 0)
        if halves_ptr is not None:
            half = tl.load(halves_ptr + place, rollout < rollouts, 0.0) / 2
            even += tl.sum(moved * tl.where(rollout % 2 == 0, half, 0.0)[:, None], 0)
            odd += tl.sum(moved * tl.where(rollout % 2 == 1, half, 0.0)[:, None], 0)
    target = adjoint_ptr + system * units + unit
    if halves_ptr is not None:
        tl.store(target, _times_quotient(even, loss_unit, size), unit < units)
        tl.store(target + parts_stride, _times_quotient(odd, loss_unit, size), unit < units)
        target += 2 * parts_stride
        whole -= even + odd
    tl.store(target, _times_quotient(whole, loss_unit, size), unit < units)


def least_squares(
    delta_loss: Tensor,
    delta_a: Tensor,
    carry: Tensor,
    seed: Tensor,
    *,
    finite: Tensor,
    discount: float,
    ridge: float,
    baseline: bool,
    options: RolloutOptions,
    counters: Counters,
    halves: bool = True,
    path: Path | None = None,
    handed: Tensor | None = None,
) -> LeastSquares:
    """Estimate the adjoint of a block of steps from all rollouts of its samples; see the reference.

    What `tiles_least_squares.least_squares_obstacle` names runs in the reference, on torch's batched operations.
    """
    time, batch, rollouts, units = delta_a.shape
    if delta_loss.numel() == 0 or least_squares_obstacle(rollouts, units, path=path is not None, halves=halves):
        return reference.least_squares(
            delta_loss,
            delta_a,
            carry,
            seed,
            finite=finite,
            discount=discount,
            ridge=ridge,
            baseline=baseline,
            options=options,
            counters=counters,
            draw=noise,
            recursion=None,
            halves=halves,
            path=path,
            handed=handed,
        )
    primal = rollouts > units
    stored = operand_of(delta_a.dtype, options.precision)
    # K^T is float32.
    operand = "fp32" if primal else stored
    launch = least_squares_launch(rollouts, units, operand, packed=options.noise == "rademacher")
    if delta_a.dtype not in {torch.bfloat16, torch.float32}:
        delta_a = delta_a.to(torch.float32)
    if delta_a.stride(-1) != 1:
        delta_a = delta_a.contiguous()
    counted = as_bytes(finite)
    number = time * batch
    width = row_width(rollouts)
    room = (number, rollouts, width)
    systems = Systems(
        None if primal else delta_loss.new_empty(room), delta_loss.new_empty(room), delta_loss.new_empty(number)
    )
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(delta_loss):
        if primal:
            delta_a, bad = regressors(systems.unit_ptr, delta_a, counted, ridge, stored)
        for steps in _blocks(delta_a, delta_loss, options.noise):
            own = Systems(
                *(None if part is None else part[steps.start * batch : steps.stop * batch] for part in systems)
            )
            first = counters._replace(time=counters.time + steps.start)
            write_products(own, delta_a[steps], counted, seed, options.noise, first, launch, operand)
        alone = [_half_inverses(systems.gram_ptr, counted, half, ridge) for half in (0, 1) if halves]
        if not primal:
            bad = inverses(systems.gram_ptr, systems.gram_ptr, counted, ridge)
        duals = Duals(
            delta_loss.new_empty((number, rollouts)),
            delta_loss.new_empty((number, rollouts)) if halves else None,
            torch.empty_like(carry, memory_format=torch.contiguous_format),
            delta_loss.new_empty(batch),
        )
        recursion_kernel[(batch,)](
            duals,
            systems,
            delta_loss.contiguous(),
            carry.contiguous(),
            counted,
            time,
            batch,
            rollouts,
            width,
            float(discount),
            float(options.sigma),
            BASELINE=baseline,
            PREFETCHES=launch.prefetches,
            ROWS=launch.recursion_rows,
            TILES=launch.block * launch.tiles // launch.recursion_rows,
            num_warps=launch.recursion_warps,
        )
        adjoint = delta_loss.new_empty((3 if halves else 1, time, batch, units))
        sums_kernel[(number, ceil_div(units, launch.sum_units))](
            adjoint,
            activity_of(delta_a, counted),
            duals,
            _half_duals(duals, alone) if halves else None,
            systems.unit_ptr,
            batch,
            rollouts,
            units,
            adjoint.stride(0),
            DUAL=not primal,
            BLOCK=launch.block,
            UNITS=launch.sum_units,
            num_warps=launch.sum_warps,
        )
    return LeastSquares(adjoint, duals.carry_ptr, bad.sum())


def _blocks(delta_a: Tensor, delta_loss: Tensor, kind: str) -> Iterator[slice]:
    """Yield the steps whose noise is made at once: all where it is packed signs."""
    time = len(delta_a)
    length = time if kind == "rademacher" else block_length(delta_a, delta_loss)
    for start in range(0, time, length):
        yield slice(start, min(start + length, time))


def _half_inverses(gram: Tensor, finite: Tensor, half: int, ridge: float) -> Tensor:
    """Return the inverses of the even (0) or odd (1) rollouts' own Gram matrices, which are contiguous."""
    own = gram[:, half : finite.shape[1] : 2, half : finite.shape[1] : 2]
    result = gram.new_empty((*own.shape[:2], row_width(own.shape[1])))
    if result.numel():
        inverses(result, own, finite, ridge, half=half)
    return result


def _half_duals(duals: Duals, halves: list[Tensor]) -> Tensor:
    """Return x = A^-1 c of each half of the rollouts alone, (systems, rollouts)."""
    solved: Tensor = torch.empty_like(duals.dual_ptr)
    for half, inverse in enumerate(halves):
        size = inverse.shape[1]
        if size:
            launch = inverse_launch(size)
            half_kernel[(len(inverse),)](
                solved,
                duals.credit_ptr,
                inverse,
                solved.shape[1],
                size,
                inverse.shape[2],
                HALF=half,
                BLOCK=launch.block,
                num_warps=launch.warps,
            )
    return solved
