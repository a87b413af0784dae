"""Stepwise rollouts: one matrix product per time step, with the noise, the cell and a linear loss in its epilogue.

Contract and equations: `rollout.py`. Any size, any device. The deviation of the state goes from step to step through
two buffers in the operand type; losses of the outputs are measured by a second kernel on the new buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import OPERAND_DTYPES, clean_of, constexprs, state_scale
from .loss_triton import LossArguments, linear_sum
from .noise import Counters
from .noise_triton import counter_words, noise_tile, pin, unpack_counters
from .place_triton import Rows, gather_rows, gather_scalars, rows_of, stored_in, tile_of_program
from .repeated_triton import Repeated
from .rollout import Rollout, RolloutOptions
from .tiles import PARTIAL_STEPS, UNIT_SUM_BLOCK, RolloutLaunch


class States(NamedTuple):
    """delta_h / scale before and after a step, (rows, inner), rows padded to whole tiles, operand type."""

    before: Any
    after: Any


class LinearPart(NamedTuple):
    """What the step kernel does of a linear loss; absent where it has none."""

    sums: Any
    """Partial sums of the loss difference, (slots, unit tiles, rows), float32."""
    grad: Rows
    """(time, batch, hidden)."""


class StepSizes(NamedTuple):
    """Widths of a step's product."""

    units: int
    """H."""
    inner: int
    """H padded to whole tiles of the inner loop."""


class OutputSizes(NamedTuple):
    """Widths of the product with the readout."""

    inner: int
    """H padded to whole tiles of the inner loop."""
    outputs: int
    """O, or H where there is no readout."""


@triton.jit(do_not_specialize=["step", "slot", "rows", "rollouts", "counters_low", "counters_high"])
def step_kernel(
    clean,  # CleanRows: what of the clean run the cell takes
    weight_ptr,  # (units, inner): W_hh padded with zeros to whole tiles, contiguous, operand type
    states,  # States
    linear,  # LinearPart
    stored,  # Stored: delta_a (time, rows, stride); None where it is not kept
    seed_ptr,  # ()
    step,
    slot,
    rows,
    rollouts,
    sizes,  # StepSizes
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    NOISE: tl.constexpr,
    CELL: tl.constexpr,  # device function of `cell_triton`
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Make one step: a program owns BLOCK_ROWS rollouts and BLOCK_UNITS units of them.

    Programs of the same rollouts are neighbours, so that they find the state in the cache.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    ACCURATE: tl.constexpr = PRECISION == "fp32"
    inner = sizes.inner
    unit_tiles = tl.cdiv(sizes.units, BLOCK_UNITS)
    unit_tile = tl.program_id(0) % unit_tiles
    place = tile_of_program(tl.program_id(0) // unit_tiles, rows, rollouts, BLOCK_ROWS, ONE_SAMPLE)
    row, sample, exists = place.row, place.sample, place.exists
    unit = unit_tile * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)[None, :]
    inside = unit < sizes.units

    lane = tl.arange(0, BLOCK_INNER)
    state_ptr = states.before + row.to(tl.int64) * inner + lane[None, :]
    column_ptr = weight_ptr + unit.to(tl.int64) * inner + lane[:, None]
    delta_a = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    for _ in tl.range(0, inner, BLOCK_INNER, num_stages=STAGES):
        delta_a = tl.dot(
            tl.load(state_ptr), tl.load(column_ptr), delta_a, input_precision="ieee" if ACCURATE else "tf32"
        )
        state_ptr += BLOCK_INNER
        column_ptr += BLOCK_INNER

    scale = tl.cast(sigma, tl.float32)
    c0, c1, c2, c3 = unpack_counters(counters_low, counters_high)
    c1, c2, c3 = c1 + tl.cast(step, tl.uint32), c2 + place.rollout.to(tl.uint32), c3 + sample.to(tl.uint32)
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    seed = tl.load(seed_ptr)
    delta_a += noise_tile(seed, pin(c0, delta_a), c1, c2, c3, unit.to(tl.uint32), deviation, NOISE, FAST)
    if SCALED:
        delta_a = delta_a * scale
    if stored is not None:
        offset = (tl.cast(step, tl.int64) * rows + row) * stored.stride + unit
        tl.store(stored.ptr + offset, delta_a.to(stored.ptr.dtype.element_ty), exists & (unit < stored.stride))

    first, second = None, None
    if clean.first.ptr is not None:
        first = gather_rows(clean.first, step, sample, unit, inside)
    if clean.second.ptr is not None:
        second = gather_rows(clean.second, step, sample, unit, inside)
    delta_h = CELL(delta_a, first, second, 1.0 / scale if SCALED else 1.0, SCALED, FAST, ACCURATE, WIDE)
    new_ptr = states.after + row.to(tl.int64) * inner + unit
    tl.store(new_ptr, delta_h.to(states.after.dtype.element_ty), exists & (unit < inner))
    if linear.sums is not None:
        part = linear_sum(delta_h, gather_rows(linear.grad, step, sample, unit, inside))[:, None]
        if SCALED:
            part = part * scale
        offset = (tl.cast(slot, tl.int64) * unit_tiles + unit_tile) * rows + row
        tl.store(linear.sums + offset, part, exists)


@triton.jit(do_not_specialize=["rows", "tiles"])
def sum_partials_kernel(
    delta_loss_ptr,  # (steps, rows)
    partial_ptr,  # (steps, tiles, rows)
    rows,
    tiles,
    BLOCK: tl.constexpr,
):
    """Add partial sums in order: a program owns BLOCK rows of one step."""
    blocks = tl.cdiv(rows, BLOCK)
    step = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(0, tiles):
        total += tl.load(partial_ptr + (step * tiles + tile) * rows + row, row < rows, 0.0)
    tl.store(delta_loss_ptr + step * rows + row, total, row < rows)


@triton.jit
def _output_tile(
    state_ptr,
    readout_ptr,
    row,
    output,
    inner,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Return delta_o of some outputs, (rows, outputs) float32: a product with the readout, or the state itself."""
    if readout_ptr is None:
        delta_o = tl.load(state_ptr + row * inner + output, output < inner, 0.0).to(tl.float32)
    else:
        lane = tl.arange(0, BLOCK_INNER)
        left_ptr = state_ptr + row * inner + lane[None, :]
        right_ptr = readout_ptr + output.to(tl.int64) * inner + lane[:, None]
        delta_o = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for _ in tl.range(0, inner, BLOCK_INNER):
            delta_o = tl.dot(
                tl.load(left_ptr),
                tl.load(right_ptr),
                delta_o,
                input_precision="ieee" if PRECISION == "fp32" else "tf32",
            )
            left_ptr += BLOCK_INNER
            right_ptr += BLOCK_INNER
    if PRECISION == "fp16":
        delta_o = delta_o * scale
    return delta_o


@triton.jit
def _output_of_target(state_ptr, readout_ptr, row, target, inner, BLOCK_INNER: tl.constexpr):
    """Return delta_o[target] / scale of each row, (rows, 1); target is a scalar or (rows, 1)."""
    if readout_ptr is None:
        of_target = tl.load(state_ptr + row * inner + target).to(tl.float32)
    else:
        lane = tl.arange(0, BLOCK_INNER)[None, :]
        of_target = tl.zeros_like(row).to(tl.float32)
        for start in tl.range(0, inner, BLOCK_INNER):
            state = tl.load(state_ptr + row * inner + start + lane).to(tl.float32)
            column = tl.load(readout_ptr + target * inner + start + lane).to(tl.float32)
            of_target += tl.sum(state * column, 1)[:, None]
    return of_target


@triton.jit(do_not_specialize=["step", "rows", "rollouts"])
def measure_kernel(
    state_ptr,  # (rows, inner): delta_h / scale, rows padded to whole tiles, operand type
    readout_ptr,  # (outputs, inner) padded with zeros to whole tiles, operand type; None: the state is the output
    loss,  # LossRows
    result_ptr,  # delta_loss (time, rows), or delta_o (time, rows, outputs), float32
    step,
    rows,
    rollouts,
    sizes,  # OutputSizes
    sigma,
    ADD: tl.constexpr,  # device functions of `loss_triton`; None: delta_o itself is the result
    FINISH: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Measure one step: a program owns BLOCK_ROWS rollouts and all their outputs, BLOCK_OUTPUTS at a time."""
    inner, outputs = sizes.inner, sizes.outputs
    place = tile_of_program(tl.program_id(0), rows, rollouts, BLOCK_ROWS, ONE_SAMPLE)
    row, sample, exists = place.row.to(tl.int64), place.sample, place.exists
    scale = tl.cast(sigma, tl.float32)
    first_row = tl.cast(step, tl.int64) * rows
    change = tl.zeros((BLOCK_ROWS,), tl.float32)
    top, total, biggest = change, change, change
    of_target = None
    if loss.target.ptr is not None:
        target = gather_scalars(loss.target, step, sample)
        of_target = _output_of_target(state_ptr, readout_ptr, row, target, inner, BLOCK_INNER)
        if PRECISION == "fp16":
            of_target = of_target * scale
    for start in tl.range(0, outputs, BLOCK_OUTPUTS):
        output = start + tl.arange(0, BLOCK_OUTPUTS)[None, :]
        inside = output < outputs
        delta_o = _output_tile(
            state_ptr, readout_ptr, row, output, inner, scale, PRECISION, BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INNER
        )
        if ADD is None:
            tl.store(result_ptr + (first_row + row) * outputs + output, delta_o, exists & inside)
        else:
            signal = gather_rows(loss.signal, step, sample, output, inside)
            change, top, total, biggest = ADD(
                change, top, total, biggest, delta_o, of_target, signal, inside, exists
            )  # fmt: skip
    if ADD is not None:
        share = gather_scalars(loss.share, step, sample).to(tl.float32)
        delta_loss = FINISH(change[:, None], top[:, None], total[:, None], biggest[:, None], share, outputs)
        tl.store(result_ptr + first_row + row, delta_loss, exists)


def run_stepwise(
    launch: RolloutLaunch,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: LossArguments,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    results: Rollout,
) -> None:
    """Fill `results` by one launch per step, or two where the loss is one of the outputs; see `rollout.rollout`."""
    time, batch, units = preact.shape
    rows = batch * options.rollouts
    operand, scale = OPERAND_DTYPES[options.precision], state_scale(options)
    inner = launch.block_inner * triton.cdiv(units, launch.block_inner)
    unit_tiles = triton.cdiv(units, launch.block_units)
    row_tiles = triton.cdiv(rows, launch.block_rows)
    if launch.samples:
        row_tiles = batch * triton.cdiv(options.rollouts, launch.block_rows)
    weight = padded_to(weight_hh, unit_tiles * launch.block_units, inner, operand)
    # A tile may reach beyond the last row.
    states = States(*(preact.new_zeros((rows + launch.block_rows, inner), dtype=operand) for _ in range(2)))
    if delta_h0 is not None:
        states.before[:rows, :units] = (delta_h0 / scale).reshape(rows, units)
    slots = min(time, PARTIAL_STEPS)
    linear = LinearPart(None, rows_of(None))
    if loss.form.measured and not loss.form.of_outputs:
        linear = LinearPart(preact.new_empty((slots, unit_tiles, rows), dtype=torch.float32), loss.rows.signal)
    low, high = counter_words(counters)
    arguments = {
        "clean": clean_of(preact, hidden, options),
        "weight_ptr": weight,
        "linear": linear,
        "stored": stored_in(results.delta_a),
        "seed_ptr": seed,
        "rows": rows,
        "rollouts": options.rollouts,
        "sizes": StepSizes(units, inner),
        "sigma": float(options.sigma),
        "counters_low": low,
        "counters_high": high,
        **constexprs(options),
    }
    measure = measurement(launch, loss, options, inner, units, row_tiles, results)
    moves = [
        Move(
            stepped(step_kernel, launch, row_tiles * unit_tiles, {**arguments, "states": pair}, time, slots),
            None if measure is None else measure(pair.after),
        )
        for pair in (states, States(states.after, states.before))
    ]
    run_steps(moves, time, slots, results.delta_loss, linear.sums)
    last = states.after if time % 2 else states.before
    results.delta_h.view(rows, units).copy_(last[:rows, :units].float() * scale)


class Move(NamedTuple):
    """What makes a step from one of two buffers into the other."""

    step: Repeated
    measure: Repeated | None
    """Measures the new state; None where no loss of the outputs is asked for."""


def stepped(
    kernel: Any, launch: RolloutLaunch, programs: int, arguments: dict[str, Any], time: int, slots: int
) -> Repeated:
    """Return the launches of a kernel that makes one step, of which `step` and `slot` change."""
    return Repeated(
        kernel,
        programs,
        {
            **arguments,
            "ONE_SAMPLE": launch.samples == 1,
            "BLOCK_ROWS": launch.block_rows,
            "BLOCK_UNITS": launch.block_units,
            "BLOCK_INNER": launch.block_inner,
            "STAGES": launch.stages,
        },
        {"step": time, "slot": slots},
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )


def run_steps(moves: list[Move], time: int, slots: int, delta_loss: Tensor | None, sums: Tensor | None) -> None:
    """Make all steps, with the two buffers in turn, and add up the partial sums of a linear loss."""
    for step in range(time):
        move = moves[step % 2]
        move.step(step, step % slots)
        if move.measure is not None:
            move.measure(step)
        if sums is not None and delta_loss is not None:
            add_partials(delta_loss, sums, step)


def add_partials(delta_loss: Tensor, sums: Tensor, step: int) -> None:
    """Add the partial sums of some steps, (slots, tiles, rows), into delta_loss, (T, B, P), where `step` fills them."""
    slots, tiles, rows = sums.shape
    done = step % slots + 1
    if done == slots or step == len(delta_loss) - 1:
        sum_partials_kernel[(done * triton.cdiv(rows, UNIT_SUM_BLOCK),)](
            delta_loss[step + 1 - done :], sums, rows, tiles, BLOCK=UNIT_SUM_BLOCK
        )


def measurement(
    launch: RolloutLaunch,
    loss: LossArguments,
    options: RolloutOptions,
    inner: int,
    units: int,
    row_tiles: int,
    results: Rollout,
) -> Callable[[Tensor], Repeated] | None:
    """Return what returns the launches that measure a new state, or None where no loss of the outputs is asked for."""
    if not loss.form.of_outputs:
        return None
    outputs, readout = loss.outputs(units), None
    if loss.readout is not None:
        padded = launch.block_outputs * triton.cdiv(outputs, launch.block_outputs)
        readout = padded_to(loss.readout, padded, inner, OPERAND_DTYPES[options.precision])
    result = results.delta_loss if results.delta_o is None else results.delta_o
    assert result is not None  # noqa: S101  (for the type checker; a loss of the outputs has one of them)
    time, batch, rollouts = result.shape[:3]
    arguments = {
        "readout_ptr": readout,
        "loss": loss.rows,
        "result_ptr": result,
        "rows": batch * rollouts,
        "rollouts": rollouts,
        "sizes": OutputSizes(inner, outputs),
        "sigma": float(options.sigma),
        "ADD": loss.form.add,
        "FINISH": loss.form.finish,
        "PRECISION": options.precision,
        "ONE_SAMPLE": launch.samples == 1,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_OUTPUTS": launch.block_outputs,
        "BLOCK_INNER": launch.block_inner,
    }
    named = {"num_warps": launch.warps, "enable_fp_fusion": True}
    return lambda state: Repeated(measure_kernel, row_tiles, {"state_ptr": state, **arguments}, {"step": time}, **named)


def padded_to(matrix: Tensor, rows: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix padded with zeros."""
    result = matrix.new_zeros((rows, inner), dtype=dtype)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result
