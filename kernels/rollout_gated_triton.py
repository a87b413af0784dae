"""Stepwise rollouts of gated cells: one matrix product per gate and time step, with cell, noise and loss behind them.

Contract and equations: `rollout.py`, `cell_gated.py`. Any size, any device. W_hh's rows are arranged by blocks of
units, so that a program has all gates of its units, in the same lanes. Operands are delta_h in the operand type; what
goes from step to step past the products, delta_h of a GRU and delta_c of an LSTM, stays float32. Losses of the outputs
are measured as those of the other cells (`measure_triton.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell_gated_triton import CleanStep
from .launch_triton import OPERAND_DTYPES, flags, gated_cell_of, state_scale
from .loss_triton import LossArguments, linear_sum
from .measure_triton import clean_outputs, measure_outputs, measurement
from .noise import Counters
from .noise_triton import counter_words, noise_tile, pin, unpack_counters
from .place_triton import Rows, gather_rows, rows_of, stored_in, tile_of_program
from .rollout import Rollout, RolloutOptions
from .rollout_stepwise_triton import Move, StepSizes, run_steps, stepped
from .tiles import PARTIAL_STEPS, RolloutLaunch, takes_plain_difference


class GatedStates(NamedTuple):
    """The states around a step, each (rows, inner), rows padded to whole tiles."""

    before: Any
    """delta_h / scale, operand type."""
    after: Any
    carried: Any
    """delta_c, or of a cell without c delta_h, float32: of the step before, then of this one. One program reads and
    writes an element, and what it writes there depends on what it has read."""


class GatedLinear(NamedTuple):
    """What a step does of a linear loss; absent where it has none."""

    sums: Any
    """Partial sums of the loss difference, (slots, unit tiles, rows), float32."""
    grad: Rows
    """dL/dh, (time, batch, hidden)."""
    of_memory: Rows
    """dL/dc; absent where nothing arrives there."""


@triton.jit
def _gate_products(
    state_ptr, first_ptr, output_ptr, inner,
    GATES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return W_hh delta_h / scale of four gates, (rows, units) each, and W_o delta_h / scale, (rows, outputs).

    Of three gates, the fourth is zero. state_ptr: the first states, (rows, lanes). first_ptr: the first columns of the
    first gate, (lanes, units). output_ptr: those of the readout, (lanes, outputs); None: outputs are zero.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    gate = BLOCK_UNITS * inner
    first = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    second, third, fourth = first, first, first
    outputs = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    for _ in tl.range(0, inner, BLOCK_INNER, num_stages=STAGES):
        state = tl.load(state_ptr)
        first = tl.dot(state, tl.load(first_ptr), first, input_precision=DOT)
        second = tl.dot(state, tl.load(first_ptr + gate), second, input_precision=DOT)
        third = tl.dot(state, tl.load(first_ptr + 2 * gate), third, input_precision=DOT)
        if GATES == 4:
            fourth = tl.dot(state, tl.load(first_ptr + 3 * gate), fourth, input_precision=DOT)
        if output_ptr is not None:
            outputs = tl.dot(state, tl.load(output_ptr), outputs, input_precision=DOT)
            output_ptr += BLOCK_INNER
        state_ptr += BLOCK_INNER
        first_ptr += BLOCK_INNER
    return first, second, third, fourth, outputs


@triton.jit
def _product(products, NUMBER: tl.constexpr, FAST: tl.constexpr):
    """Return the product of one gate, which has been made with the others'."""
    return products[NUMBER]


@triton.jit(do_not_specialize=["step", "slot", "rows", "rollouts", "counters_low", "counters_high"])
def gated_step_kernel(
    clean,  # Rows: the cell's clean values, (time, batch, n hidden)
    weight_ptr,  # (unit tiles, gates, BLOCK_UNITS, inner): W_hh padded with zeros to whole tiles, operand type
    states,  # GatedStates
    linear,  # GatedLinear
    readout,  # W_o padded with zeros, (BLOCK_OUTPUTS, inner), operand type; None where a step measures nothing
    measured,  # MeasuredPart
    stored,  # Stored: the states' deviations (time, rows, stride); None where they are not kept
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
    CELL: tl.constexpr,  # device function of `cell_gated_triton`
    GATES: tl.constexpr,  # 3 or 4
    MEMORY: tl.constexpr,  # whether the cell has a c
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    ADD: tl.constexpr,  # as in `measure_kernel`
    FINISH: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,  # of the readout, all in one tile
    BLOCK_INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Make one step: a program owns BLOCK_ROWS rollouts and BLOCK_UNITS units of them, with all their gates.

    Programs of the same rollouts are neighbours, so that they find the state in the cache. That of the last units has
    the readout, too, and measures the step before.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    inner = sizes.inner
    unit_tiles = tl.cdiv(sizes.units, BLOCK_UNITS)
    unit_tile = tl.program_id(0) % unit_tiles
    place = tile_of_program(tl.program_id(0) // unit_tiles, rows, rollouts, BLOCK_ROWS, ONE_SAMPLE)
    row, sample, exists = place.row, place.sample, place.exists
    column = tl.arange(0, BLOCK_UNITS)[None, :]
    unit = unit_tile * BLOCK_UNITS + column
    inside = unit < sizes.units

    lane = tl.arange(0, BLOCK_INNER)
    state_ptr = states.before + row.to(tl.int64) * inner + lane[None, :]
    first_ptr = weight_ptr + (unit_tile * (GATES * BLOCK_UNITS) + column).to(tl.int64) * inner + lane[:, None]
    scale = tl.cast(sigma, tl.float32)
    if readout is not None and (unit_tile == unit_tiles - 1) & (step > 0):
        signal = clean_outputs(measured, step - 1, sample, BLOCK_OUTPUTS)
        output_ptr = readout + tl.arange(0, BLOCK_OUTPUTS)[None, :].to(tl.int64) * inner + lane[:, None]
        first, second, third, fourth, delta_o = _gate_products(
            state_ptr, first_ptr, output_ptr, inner,
            GATES, PRECISION, BLOCK_ROWS, BLOCK_UNITS, BLOCK_OUTPUTS, BLOCK_INNER, STAGES,
        )  # fmt: skip
        measure_outputs(delta_o, measured, signal, step - 1, place, rows, scale, PRECISION, ADD, FINISH)
    else:
        first, second, third, fourth, _ = _gate_products(
            state_ptr, first_ptr, None, inner,
            GATES, PRECISION, BLOCK_ROWS, BLOCK_UNITS, BLOCK_OUTPUTS, BLOCK_INNER, STAGES,
        )  # fmt: skip
    if SCALED:
        first, second, third, fourth = first * scale, second * scale, third * scale, fourth * scale
    carried_ptr = states.carried + row.to(tl.int64) * inner + unit
    held = tl.load(carried_ptr, exists & inside, 0.0)
    step_of_run = CleanStep(clean, step, sample, unit, inside, sizes.units, row)
    delta_h, delta_c = CELL((first, second, third, fourth), held, step_of_run, _product, FAST, WIDE)
    c0, c1, c2, c3 = unpack_counters(counters_low, counters_high)
    c1, c2, c3 = c1 + tl.cast(step, tl.uint32), c2 + place.rollout.to(tl.uint32), c3 + sample.to(tl.uint32)
    delta_h += noise_tile(tl.load(seed_ptr), pin(c0, delta_h), c1, c2, c3, unit.to(tl.uint32), scale, NOISE, FAST)

    tl.store(carried_ptr, delta_c if MEMORY else delta_h, exists & inside)
    if stored is not None:
        stored_ptr = stored.ptr + (tl.cast(step, tl.int64) * rows + row) * stored.stride + unit
        tl.store(stored_ptr, delta_h.to(stored.ptr.dtype.element_ty), exists & inside)
        if MEMORY:
            tl.store(stored_ptr + sizes.units, delta_c.to(stored.ptr.dtype.element_ty), exists & inside)
    if linear.sums is not None:
        part = linear_sum(delta_h, gather_rows(linear.grad, step, sample, unit, inside))
        if linear.of_memory.ptr is not None:
            part += linear_sum(delta_c, gather_rows(linear.of_memory, step, sample, unit, inside))
        offset = (tl.cast(slot, tl.int64) * unit_tiles + unit_tile) * rows + row
        tl.store(linear.sums + offset, part[:, None], exists)
    if SCALED:
        delta_h = delta_h / scale
    new_ptr = states.after + row.to(tl.int64) * inner + unit
    tl.store(new_ptr, delta_h.to(states.after.dtype.element_ty), exists & inside)


def run_gated(
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
    """Fill `results` by one launch per step, or two where outputs are measured apart; see `rollout.rollout`."""
    (time, batch, _), units = preact.shape, weight_hh.shape[1]
    rows, cell = batch * options.rollouts, options.cell
    operand, scale = OPERAND_DTYPES[options.precision], state_scale(options)
    inner = launch.block_inner * triton.cdiv(units, launch.block_inner)
    unit_tiles = triton.cdiv(units, launch.block_units)
    row_tiles = triton.cdiv(rows, launch.block_rows)
    if launch.samples:
        row_tiles = batch * triton.cdiv(options.rollouts, launch.block_rows)
    form, wide = gated_cell_of(options), takes_plain_difference(options.precision, options.sigma)
    clean = rows_of(form.clean_values(preact, hidden, wide))
    weight = by_unit_blocks(weight_hh, cell.gates, launch.block_units, inner, operand)
    # A tile may reach beyond the last row.
    room = (rows + launch.block_rows, inner)
    before, after = (preact.new_zeros(room, dtype=operand) for _ in range(2))
    states = GatedStates(before, after, preact.new_zeros(room, dtype=torch.float32))
    if delta_h0 is not None:
        start = delta_h0.reshape(rows, -1)
        before[:rows, :units] = start[:, :units] / scale
        states.carried[:rows, :units] = start[:, -units:]
    slots = min(time, PARTIAL_STEPS)
    linear = GatedLinear(None, rows_of(None), rows_of(None))
    if loss.form.measured and not loss.form.of_outputs:
        grad = loss.rows.signal.ptr
        of_memory = grad[..., units:] if grad.shape[-1] > units else None
        sums = preact.new_empty((slots, unit_tiles, rows), dtype=torch.float32)
        linear = GatedLinear(sums, rows_of(grad[..., :units]), rows_of(of_memory))
    measure = measurement(launch, loss, options, inner, units, results)
    low, high = counter_words(counters)
    arguments = {
        "clean": clean,
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
        **flags(options),
        "CELL": form.deviation,
        "GATES": cell.gates,
        "MEMORY": cell.states > 1,
        **measure.joined,
        "ONE_SAMPLE": launch.samples == 1,
    }
    moves = [
        Move(
            stepped(gated_step_kernel, launch, row_tiles * unit_tiles, {**arguments, "states": pair}, time, slots),
            None if measure.every is None else measure.every(pair.after),
        )
        for pair in (states, GatedStates(after, before, states.carried))
    ]
    run_steps(moves, time, slots, results.delta_loss, linear.sums)
    if measure.last is not None:
        measure.last(after if time % 2 else before)(time - 1)
    last = results.delta_h.view(rows, -1)
    last[:, -units:] = states.carried[:rows, :units]
    if cell.states > 1:
        last[:, :units] = (after if time % 2 else before)[:rows, :units].float() * scale


def by_unit_blocks(weight_hh: Tensor, gates: int, block: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Return W_hh, (G H, H), arranged by blocks of units and padded with zeros, (blocks, G, block, inner)."""
    units = weight_hh.shape[1]
    blocks = triton.cdiv(units, block)
    result = weight_hh.new_zeros((gates, blocks * block, inner), dtype=dtype)
    result[:, :units, :units] = weight_hh.view(gates, units, units)
    return result.view(gates, blocks, block, inner).transpose(0, 1).contiguous()
