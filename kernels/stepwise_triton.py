# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Stepwise rollouts: one matrix product per time step, noise, nonlinearity and linear loss in its epilogue.

Contract and equations: `rollout.py`. Any size, any device. The deviation of the state goes from step to step through
two buffers in the operand type; losses behind a readout are measured by a second kernel on the new buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cell_triton import (
    cross_entropy_difference,
    exponential_sums,
    relu_deviation,
    squared_difference,
    tanh_deviation,
    weighted_mean,
)
from .noise_triton import noise_tile, pin, unpack_counters


@triton.jit
def _rows_of_program(program, rows, rollouts, BLOCK_ROWS: tl.constexpr, ONE_SAMPLE: tl.constexpr):
    """Return row numbers, sample and rollout of a program's rows, (rows, 1), and whether each row is its own.

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
    return row, sample, rollout, exists


@triton.jit
def _load_clean(ptr, strides, step, sample, unit, inside):
    """Return (time, batch, units) values of the samples at one step as float32: (1, units) or (rows, units)."""
    place = tl.cast(step, tl.int64) * strides[0] + sample * strides[1] + unit.to(tl.int64) * strides[2]
    return tl.load(ptr + place, inside, 0.0).to(tl.float32)


@triton.jit
def _load_share(ptr, strides, step, sample):
    """Return (time, batch) values of the samples at one step: a scalar or (rows, 1)."""
    return tl.load(ptr + tl.cast(step, tl.int64) * strides[0] + sample * strides[1])


@triton.jit(do_not_specialize=["step", "slot", "rows", "rollouts", "counters_low", "counters_high"])
def step_kernel(
    clean,  # two tensors (time, batch, hidden), any strides, or None: what `cell_triton` says the nonlinearity takes
    weight_ptr,  # (units, inner): W_hh padded with zeros to whole tiles, contiguous, operand type
    states,  # before and after the step: delta_h / scale, (rows, inner), rows padded to whole tiles, operand type
    loss,  # grad (time, batch, hidden); partial sums of the loss difference (slots, unit tiles, rows) float32
    kept,  # delta_a (time, rows, stride) and its row stride
    seed_ptr,  # ()
    strides,  # of the two clean tensors, grad
    step,
    slot,
    rows,
    rollouts,
    sizes,  # hidden, inner
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    NOISE: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Make one step: a program owns BLOCK_ROWS rollouts and BLOCK_UNITS units of them."""
    SCALED: tl.constexpr = PRECISION == "fp16"
    ACCURATE: tl.constexpr = PRECISION == "fp32"
    hidden_size, inner = sizes
    unit_tiles = tl.cdiv(hidden_size, BLOCK_UNITS)
    unit_tile = tl.program_id(0) % unit_tiles
    row, sample, rollout, exists = _rows_of_program(
        tl.program_id(0) // unit_tiles, rows, rollouts, BLOCK_ROWS, ONE_SAMPLE
    )
    unit = unit_tile * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)[None, :]
    inside = unit < hidden_size

    lane = tl.arange(0, BLOCK_INNER)
    state_ptr = states[0] + row.to(tl.int64) * inner + lane[None, :]
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
    c1, c2, c3 = c1 + tl.cast(step, tl.uint32), c2 + rollout.to(tl.uint32), c3 + sample.to(tl.uint32)
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    seed = tl.load(seed_ptr)
    delta_a += noise_tile(seed, pin(c0, delta_a), c1, c2, c3, unit.to(tl.uint32), deviation, NOISE, FAST)
    if SCALED:
        delta_a = delta_a * scale
    if kept[0] is not None:
        place = (tl.cast(step, tl.int64) * rows + row) * kept[1] + unit
        tl.store(kept[0] + place, delta_a.to(kept[0].dtype.element_ty), exists & (unit < kept[1]))

    preact, hidden = None, None
    if clean[0] is not None:
        preact = _load_clean(clean[0], strides[0], step, sample, unit, inside)
    if clean[1] is not None:
        hidden = _load_clean(clean[1], strides[1], step, sample, unit, inside)
    inverse = 1.0 / scale if SCALED else 1.0
    if NONLINEARITY == "tanh":
        delta_h = tanh_deviation(delta_a, preact, hidden, inverse, FAST, ACCURATE, WIDE)
    else:
        delta_h = relu_deviation(delta_a, preact, inverse, SCALED)
    new_ptr = states[1] + row.to(tl.int64) * inner + unit
    tl.store(new_ptr, delta_h.to(states[1].dtype.element_ty), exists & (unit < inner))
    if loss[0] is not None:
        grad = _load_clean(loss[0], strides[2], step, sample, unit, inside)
        partial = tl.sum(delta_h * grad, 1)[:, None]
        if SCALED:
            partial = partial * scale
        place = (tl.cast(slot, tl.int64) * unit_tiles + unit_tile) * rows + row
        tl.store(loss[1] + place, partial, exists)


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
    loss,  # error or probs (time, batch, outputs); target, share (time, batch)
    result_ptr,  # delta_loss (time, rows), or delta_o (time, rows, outputs), float32
    strides,  # of error or probs, target, share
    step,
    rows,
    rollouts,
    sizes,  # inner, outputs
    sigma,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Measure one step: a program owns BLOCK_ROWS rollouts and all their outputs."""
    inner, outputs = sizes
    row, sample, _, exists = _rows_of_program(tl.program_id(0), rows, rollouts, BLOCK_ROWS, ONE_SAMPLE)
    row = row.to(tl.int64)
    scale = tl.cast(sigma, tl.float32)
    first_row = tl.cast(step, tl.int64) * rows
    change = tl.zeros((BLOCK_ROWS,), tl.float32)
    top, total, biggest = change, change, change
    if LOSS == "cross_entropy":
        target = _load_share(loss[1], strides[1], step, sample)
        of_target = _output_of_target(state_ptr, readout_ptr, row, target, inner, BLOCK_INNER)
        if PRECISION == "fp16":
            of_target = of_target * scale
    for start in tl.range(0, outputs, BLOCK_OUTPUTS):
        output = start + tl.arange(0, BLOCK_OUTPUTS)[None, :]
        within = output < outputs
        delta_o = _output_tile(
            state_ptr, readout_ptr, row, output, inner, scale, PRECISION, BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INNER
        )
        if LOSS == "outputs":
            tl.store(result_ptr + (first_row + row) * outputs + output, delta_o, exists & within)
        else:
            signal = _load_clean(loss[0], strides[0], step, sample, output, within)
            if LOSS == "squared":
                change += squared_difference(delta_o, signal, within)
            else:
                difference = tl.where(within & exists, delta_o - of_target, 0.0)
                change, top, total, biggest = exponential_sums(difference, signal, change, top, total, biggest)
    if LOSS != "outputs":
        share = _load_share(loss[2], strides[2], step, sample).to(tl.float32)
        if LOSS == "squared":
            delta_loss = weighted_mean(change[:, None], share, outputs)
        else:
            delta_loss = cross_entropy_difference(
                change[:, None], top[:, None], total[:, None], biggest[:, None], share
            )
        tl.store(result_ptr + first_row + row, delta_loss, exists)
