# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Resident rollouts: one launch for the whole sequence, W_hh in shared memory, no program waits for another.

Contract and equations: `rollout.py`.

The float32 deviation of the pre-activations is what goes round the time loop; the nonlinearity is at the loop's top and
the noise is the product's accumulator. So the state goes from accumulator to operand inside registers.
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
def _load_units(row_ptr, stride, unit, inside, FULL: tl.constexpr):
    """Return units of rows as float32, zero outside. FULL: all are inside; a mask costs half an instruction a unit."""
    unit_ptr = row_ptr + unit * stride
    values = tl.load(unit_ptr) if FULL else tl.load(unit_ptr, inside, 0.0)
    return values.to(tl.float32)


@triton.jit
def _load_rows(ptr, strides, step, place, size, FULL: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """Return a (time, batch, units) tensor at one step: (1, units), or (rows, units) where the tile spans samples."""
    first_sample, _, _, exists, _, _, batch = place
    step_ptr = ptr + tl.cast(step, tl.int64) * strides[0] + first_sample * strides[1]
    unit = tl.arange(0, BLOCK).to(tl.int64)
    if SAMPLES > 1:
        # One copy of each sample is loaded; where it is needed again it is already in place.
        ordinal = tl.arange(0, SAMPLES)[:, None]
        inside = (first_sample + ordinal < batch) & (unit < size)[None, :]
        rows = _load_units(step_ptr + ordinal * strides[1], strides[2], unit[None, :], inside, False)
        PER_SAMPLE: tl.constexpr = exists.shape[0] // SAMPLES
        rows = tl.broadcast_to(rows[:, None, :], (SAMPLES, PER_SAMPLE, BLOCK))
        rows = tl.reshape(rows, (SAMPLES * PER_SAMPLE, BLOCK))
    elif BLOCK >= 256 and FULL:
        # In pieces smaller than the program has threads: those are loaded straight into the accumulator's layout.
        half = tl.arange(0, BLOCK // 2).to(tl.int64)
        first = _load_units(step_ptr, strides[2], half, None, FULL)
        second = _load_units(step_ptr, strides[2], half + BLOCK // 2, None, FULL)
        rows = tl.reshape(tl.permute(tl.join(first, second), (1, 0)), (BLOCK,))[None, :]
    else:
        rows = _load_units(step_ptr, strides[2], unit, unit < size, FULL)[None, :]
    return rows


@triton.jit
def _load_share(ptr, strides, step, place, SAMPLES: tl.constexpr):
    """Return a (time, batch) tensor at one step: a scalar, or (rows,) where the tile spans samples."""
    first_sample, sample, _, exists, _, _, _ = place
    step_ptr = ptr + tl.cast(step, tl.int64) * strides[0]
    if SAMPLES > 1:
        share = tl.load(step_ptr + sample * strides[1], exists, 0)
    else:
        share = tl.load(step_ptr + first_sample * strides[1])
    return share


@triton.jit
def _reread(word):
    """Return a 64-bit word, seen by the compiler as a new value.

    Else what Philox makes of its key and counters before it meets the time step stays in registers for all steps.
    """
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _noise_of_step(seed, low, high, step, sample, rollout, like, scale, NOISE: tl.constexpr, FAST: tl.constexpr):
    """Return the noise of one step for the rollouts of one sample, in the layout of `like`, which has its shape."""
    if FAST:
        seed, high = _reread(seed), _reread(high)
    c0, c1, c2, c3 = unpack_counters(low, high)
    c1, c2, c3 = c1 + tl.cast(step, tl.uint32), c2 + rollout.to(tl.uint32)[:, None], c3 + sample.to(tl.uint32)
    unit = tl.arange(0, like.shape[1]).to(tl.uint32)[None, :]
    return noise_tile(seed, pin(c0, like), c1, c2, c3, unit, scale, NOISE, FAST)


@triton.jit
def _keep(delta_a, results, step, place, FULL: tl.constexpr):
    """Store delta_a of one step."""
    _, _, local, exists, first_row, rows_of_step, _ = place
    first_row += tl.cast(step, tl.int64) * rows_of_step
    unit = tl.arange(0, delta_a.shape[1])
    stride = delta_a.shape[1] if FULL else results[2]
    stored = exists[:, None] if FULL else exists[:, None] & (unit < stride)[None, :]
    # 64 bits from the start: constants of a sum that is widened later are not found to be constants.
    delta_a_ptr = results[1] + first_row * stride + (local.to(tl.int64)[:, None] * stride + unit[None, :])
    tl.store(delta_a_ptr, delta_a.to(results[1].dtype.element_ty), stored)


@triton.jit
def _measure(
    delta_o,  # delta_o, or delta_h where there is no readout
    loss,
    result_ptr,
    strides,
    step,
    place,
    size,  # outputs
    scale,
    LOSS: tl.constexpr,
    SCALED: tl.constexpr,
    FULL: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Store and return the loss difference of one step, or store delta_o itself and return 0.

    SCALED: delta_o comes divided by scale.
    """
    BLOCK: tl.constexpr = delta_o.shape[1]
    _, _, local, exists, first_row, rows_of_step, _ = place
    first_row += tl.cast(step, tl.int64) * rows_of_step
    output = tl.arange(0, BLOCK)[None, :]
    inside = output < size
    delta_loss = 0.0
    if SCALED and LOSS != "linear":
        delta_o = delta_o * scale
    if LOSS == "outputs":
        delta_o_ptr = result_ptr + first_row * size + (local[:, None] * size + output)
        tl.store(delta_o_ptr, delta_o, exists[:, None] & inside)
    else:
        signal = _load_rows(loss[0], strides[2], step, place, size, FULL, SAMPLES, BLOCK)
        if LOSS == "linear":
            delta_loss = tl.sum(delta_o * signal, 1)
            if SCALED:
                delta_loss = delta_loss * scale
        else:
            share = _load_share(loss[2], strides[4], step, place, SAMPLES).to(tl.float32)
            if LOSS == "squared":
                delta_loss = weighted_mean(squared_difference(delta_o, signal, inside), share, size)
            else:
                target = _load_share(loss[1], strides[3], step, place, SAMPLES)
                if SAMPLES > 1:
                    target = target[:, None]
                of_target = tl.sum(tl.where(output == target, delta_o, 0.0), 1)
                difference = tl.where(inside, delta_o - of_target[:, None], 0.0)
                none = tl.zeros_like(of_target)
                change, top, total, biggest = exponential_sums(difference, signal, none, none, none, none)
                delta_loss = cross_entropy_difference(change, top, total, biggest, share)
        tl.store(result_ptr + first_row + local, delta_loss, exists)
    return delta_loss


@triton.jit
def _observe(
    delta_a,
    readout,
    clean,
    loss,
    results,
    strides,
    step,
    place,
    sizes,
    scale,
    NONLINEARITY: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Return delta_h / scale and the loss difference of one step, having written what is wanted of the step.

    place: (the tile's first sample, each row's sample, each row's place behind the first, whether it exists, the first
    row's place in a (time, batch, rollouts) tensor, rows of one step in it, batch).
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    BLOCK: tl.constexpr = delta_a.shape[1]
    if SCALED:
        delta_a = delta_a * scale
    if results[1] is not None:
        _keep(delta_a, results, step, place, FULL)
    preact, hidden = None, None
    if clean[0] is not None:
        preact = _load_rows(clean[0], strides[0], step, place, sizes[0], FULL, SAMPLES, BLOCK)
    if clean[1] is not None:
        hidden = _load_rows(clean[1], strides[1], step, place, sizes[0], FULL, SAMPLES, BLOCK)
    inverse = 1.0 / scale if SCALED else 1.0
    if NONLINEARITY == "tanh":
        delta_h = tanh_deviation(delta_a, preact, hidden, inverse, FAST, PRECISION == "fp32", WIDE)
    else:
        delta_h = relu_deviation(delta_a, preact, inverse, SCALED)
    delta_loss = 0.0
    if LOSS != "none":
        if readout is None:
            delta_loss = _measure(
                delta_h, loss, results[0], strides, step, place, sizes[0], scale, LOSS, SCALED, FULL, SAMPLES
            )  # fmt: skip
        else:
            delta_o = tl.dot(delta_h.to(readout.dtype), readout, input_precision="tf32" if FAST else "ieee")
            delta_loss = _measure(
                delta_o, loss, results[0], strides, step, place, sizes[1], scale, LOSS, SCALED, False, SAMPLES
            )  # fmt: skip
    return delta_h, delta_loss


@triton.jit
def _place_of_program(batch, rollouts, BLOCK_ROWS: tl.constexpr, SAMPLES: tl.constexpr):
    """Return `place` as in `_observe`, and each row's rollout, (rows,), and sample, broadcasting to (rows, 1)."""
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
    return (first_sample, sample, local, exists, first_row, rows_of_step, batch), rollout, column


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "counters_low", "counters_high"])
def resident_kernel(
    clean,  # two tensors (time, batch, hidden), any strides, or None: what `cell_triton` says the nonlinearity takes
    weight_ptr,  # (hidden, hidden), contiguous, operand type
    loss,  # grad, error or probs (time, batch, outputs); target, share (time, batch); readout (outputs, hidden)
    start_ptr,  # (batch, rollouts, hidden), contiguous, operand type: first delta_h / scale; None is zero
    results,  # delta_loss or delta_o; delta_a (time, batch, rollouts, stride) and stride; last delta_h, as start
    seed_ptr,  # ()
    strides,  # of the two clean tensors, grad (3 each), target, share (2 each)
    time,
    batch,
    rollouts,
    sizes,  # hidden, outputs
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    NOISE: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Run rollouts through all steps: a program owns BLOCK_ROWS rollouts and all their units.

    The rollouts are of one sample, or BLOCK_ROWS / SAMPLES of each of SAMPLES samples, enough for all that one has.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    place, rollout, column = _place_of_program(batch, rollouts, BLOCK_ROWS, SAMPLES)
    _, _, local, exists, first_row, _, _ = place
    unit = tl.arange(0, BLOCK_UNITS)
    inside = unit < sizes[0]
    both = inside[:, None] & inside[None, :]
    weight = tl.load(weight_ptr + unit[None, :] * sizes[0] + unit[:, None], both, 0.0)
    readout = None
    if loss[3] is not None:
        output = tl.arange(0, BLOCK_OUTPUTS)
        mask = inside[:, None] & (output < sizes[1])[None, :]
        readout = tl.load(loss[3] + output[None, :] * sizes[0] + unit[:, None], mask, 0.0)

    seed = tl.load(seed_ptr)
    scale = tl.cast(sigma, tl.float32)
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)

    # A product even where there is no start: it gives the noise the accumulator's layout.
    state = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), weight.dtype)
    state_place = first_row * sizes[0] + (local[:, None] * sizes[0] + unit[None, :])
    state_mask = exists[:, None] & inside[None, :]
    if start_ptr is not None:
        state = tl.load(start_ptr + state_place, state_mask, 0.0)
    delta_a = tl.dot(state, weight, input_precision=DOT)
    low, high = tl.cast(counters_low, tl.int64), tl.cast(counters_high, tl.int64)
    delta_a += _noise_of_step(seed, low, high, 0, column, rollout, delta_a, deviation, NOISE, FAST)
    tl.debug_barrier()
    for step in tl.range(0, time - 1, num_stages=1):
        delta_h = _observe(
            delta_a, readout, clean, loss, results, strides, step, place, sizes, scale,
            NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL, SAMPLES,
        )[0]  # fmt: skip
        noise = _noise_of_step(seed, low, high, step + 1, column, rollout, delta_a, deviation, NOISE, FAST)
        delta_a = tl.dot(delta_h.to(weight.dtype), weight, noise, input_precision=DOT)
    delta_h = _observe(
        delta_a, readout, clean, loss, results, strides, time - 1, place, sizes, scale,
        NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL, SAMPLES,
    )[0]  # fmt: skip
    if SCALED:
        delta_h = delta_h * scale
    tl.store(results[3] + state_place, delta_h.to(results[3].dtype.element_ty), state_mask)
