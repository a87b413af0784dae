"""Stepwise rollouts: one matrix product per time step, with the noise, the cell and a linear loss in its epilogue.

Contract and equations: `rollout.py`. Any size, any device. The deviation of the state goes from step to step through
two buffers in the operand type. Losses of the outputs are measured by the step behind or by a second kernel
(`measure_triton.py`).

`tiles.py` chooses how a step is made (`RolloutLaunch`): tensors by pointers or by descriptors (TMA), which clip at the
last rollout of a sample; clean rows before the product or behind it; the epilogue in one part or two; and whether a
step's programs may start while those of the step before finish (programmatic dependent launch). They then read of the
clean run alone until `gdc_wait` returns, which is when the step before has written everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_triton import OPERAND_DTYPES, clean_of, constexprs, state_scale
from .loss_triton import LossArguments, linear_sum
from .measure_triton import clean_outputs, measure_outputs, measurement, padded_to
from .noise import Counters
from .noise_triton import counter_words, noise_tile, pin, unpack_counters
from .place_triton import Rows, TilePlace, gather_rows, rows_of, spread, stored_in, tile_of_program
from .repeated_triton import Repeated
from .rollout import Rollout, RolloutOptions
from .tiles import PARTIAL_STEPS, UNIT_SUM_BLOCK, RolloutLaunch


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


class StepPlace(NamedTuple):
    """Where a program's rows are at one step."""

    tile: TilePlace
    samples: Any
    """Samples of the tile: a scalar, (samples, 1), or (rows, 1) where rows are taken as they come."""
    outer: Any
    """Described: place of the first row in a state (batch, rollouts, inner); of several samples, (1, rows, inner)."""
    first: Any
    outer_of_stored: Any
    """Described: `outer` in delta_a, (time batch, rollouts, stride), or (time, rows, stride)."""
    step: Any
    rows: Any


class StepNoise(NamedTuple):
    """The noise of a step: its key, the first counters, two words each, and its standard deviation."""

    seed: Any
    low: Any
    high: Any
    scale: Any


@triton.jit
def place_of_step(program, step, rows, rollouts, BLOCK_ROWS: tl.constexpr, SAMPLES: tl.constexpr):
    """Return the `StepPlace` of the program with number `program` among those of the same units."""
    tile = tile_of_program(program, rows, rollouts, BLOCK_ROWS, SAMPLES == 1)
    batch = rows // rollouts
    samples, outer, first, outer_of_stored = tile.sample, 0, program * BLOCK_ROWS, step
    if SAMPLES > 1:
        # What lies beyond the last sample is computed and not kept.
        samples = tl.minimum(program.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)[:, None], batch - 1)
    if SAMPLES == 1:
        tiles = tl.cdiv(rollouts, BLOCK_ROWS)
        outer, first = program // tiles, (program % tiles) * BLOCK_ROWS
        outer_of_stored = step * batch + outer
    return StepPlace(tile, samples, outer, first, outer_of_stored, step, rows)


@triton.jit
def product_of_step(
    before, weight, readout, place, unit0, inner,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return tiles of W_hh delta_h / scale, (rows, units), and of W_o delta_h / scale, (rows, outputs), float32.

    readout: None: outputs are zero. Other arguments as in `step_kernel`.
    """
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    BLOCK_ROWS: tl.constexpr = place.tile.row.shape[0]
    product = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    outputs = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    if DESCRIBED:
        for start in tl.range(0, inner, BLOCK_INNER, num_stages=STAGES):
            state = tl.reshape(before.load([place.outer, place.first, start]), (BLOCK_ROWS, BLOCK_INNER))
            product = tl.dot(state, weight.load([unit0, start]).T, product, input_precision=DOT)
            if readout is not None:
                outputs = tl.dot(state, readout.load([0, start]).T, outputs, input_precision=DOT)
    else:
        lane = tl.arange(0, BLOCK_INNER)
        unit = unit0 + tl.arange(0, BLOCK_UNITS)[None, :]
        state_ptr = before + place.tile.row.to(tl.int64) * inner + lane[None, :]
        column_ptr = weight + unit.to(tl.int64) * inner + lane[:, None]
        if readout is not None:
            output_ptr = readout + tl.arange(0, BLOCK_OUTPUTS)[None, :].to(tl.int64) * inner + lane[:, None]
        for _ in tl.range(0, inner, BLOCK_INNER, num_stages=STAGES):
            state = tl.load(state_ptr)
            product = tl.dot(state, tl.load(column_ptr), product, input_precision=DOT)
            if readout is not None:
                outputs = tl.dot(state, tl.load(output_ptr), outputs, input_precision=DOT)
                output_ptr += BLOCK_INNER
            state_ptr += BLOCK_INNER
            column_ptr += BLOCK_INNER
    return product, outputs


@triton.jit
def clean_value(early, values, place, unit, inside, EARLY: tl.constexpr):
    """Return some units of `Rows` for all rows of a tile: (1, units), or (rows, units) where it spans samples.

    early: what was loaded before if EARLY.
    """
    if not EARLY:
        early = gather_rows(values, place.step, place.samples, unit, inside)
    return spread(early, place.tile.row)


@triton.jit
def finish_step(
    delta_a, first, second, grad, clean, linear, after, stored, place, noise, unit0, sizes,
    NOISE: tl.constexpr, CELL: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    DESCRIBED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Take a product of a step, (rows, units from unit0 on), write its results and return its part of a linear loss.

    first, second, grad: what was loaded of the clean run if EARLY. noise: `StepNoise`; place: `StepPlace`; other
    arguments as in `step_kernel`.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    ACCURATE: tl.constexpr = PRECISION == "fp32"
    ROWS: tl.constexpr = delta_a.shape[0]
    UNITS: tl.constexpr = delta_a.shape[1]
    tile, scale = place.tile, noise.scale
    row, exists = tile.row, tile.exists
    unit = unit0 + tl.arange(0, UNITS)[None, :]
    inside = unit < sizes.units
    c0, c1, c2, c3 = unpack_counters(noise.low, noise.high)
    c1, c2, c3 = c1 + tl.cast(place.step, tl.uint32), c2 + tile.rollout.to(tl.uint32), c3 + tile.sample.to(tl.uint32)
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    delta_a += noise_tile(noise.seed, pin(c0, delta_a), c1, c2, c3, unit.to(tl.uint32), deviation, NOISE, FAST)
    if SCALED:
        delta_a = delta_a * scale
    if stored is not None:
        if DESCRIBED:
            kept = tl.reshape(delta_a.to(stored.dtype), (1, ROWS, UNITS))
            stored.store([place.outer_of_stored, place.first, unit0], kept)
        else:
            offset = (tl.cast(place.step, tl.int64) * place.rows + row) * stored.stride + unit
            tl.store(stored.ptr + offset, delta_a.to(stored.ptr.dtype.element_ty), exists & (unit < stored.stride))
    if clean.first.ptr is not None:
        first = clean_value(first, clean.first, place, unit, inside, EARLY)
    if clean.second.ptr is not None:
        second = clean_value(second, clean.second, place, unit, inside, EARLY)
    delta_h = CELL(delta_a, first, second, 1.0 / scale if SCALED else 1.0, SCALED, FAST, ACCURATE, WIDE)
    if DESCRIBED:
        after.store([place.outer, place.first, unit0], tl.reshape(delta_h.to(after.dtype), (1, ROWS, UNITS)))
    else:
        new_ptr = after + row.to(tl.int64) * sizes.inner + unit
        tl.store(new_ptr, delta_h.to(after.dtype.element_ty), exists & (unit < sizes.inner))
    part = tl.zeros((ROWS,), tl.float32)
    if linear.sums is not None:
        part = linear_sum(delta_h, clean_value(grad, linear.grad, place, unit, inside, EARLY))
        if SCALED:
            part = part * scale
    return part


@triton.jit(do_not_specialize=["step", "slot", "rows", "rollouts", "counters_low", "counters_high"])
def step_kernel(
    clean,  # CleanRows: what of the clean run the cell takes
    weight,  # (units, inner): W_hh padded with zeros to whole tiles, contiguous, operand type
    before,  # delta_h / scale before the step, (rows, inner), operand type
    after,  # and after it
    linear,  # LinearPart
    readout,  # W_o padded with zeros, (BLOCK_OUTPUTS, inner), operand type; None where a step measures nothing
    measured,  # MeasuredPart
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
    ADD: tl.constexpr,  # as in `measure_kernel`
    FINISH: tl.constexpr,
    SAMPLES: tl.constexpr,  # of a tile: 1, or several whole ones, or 0: rows are taken as they come
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,  # of the readout, all in one tile
    BLOCK_INNER: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,  # weight, before, after, readout and stored are tensor descriptors
    EARLY: tl.constexpr,  # clean rows are loaded before the product
    PARTS: tl.constexpr,  # 1 or 2: the epilogue takes the tile's units at once or in two halves
    DEPENDENT: tl.constexpr,  # programs may start before the step before is done
):
    """Make one step: a program owns BLOCK_ROWS rollouts and BLOCK_UNITS units of them.

    Programs of the same rollouts are neighbours, so that they find the state in the cache. That of the last units has
    the readout, too, and measures the step before.
    """
    unit_tiles = tl.cdiv(sizes.units, BLOCK_UNITS)
    unit_tile = tl.program_id(0) % unit_tiles
    unit0 = unit_tile * BLOCK_UNITS
    place = place_of_step(tl.program_id(0) // unit_tiles, step, rows, rollouts, BLOCK_ROWS, SAMPLES)
    noise = StepNoise(
        tl.load(seed_ptr), tl.cast(counters_low, tl.int64), tl.cast(counters_high, tl.int64), tl.cast(sigma, tl.float32)
    )
    first, second, grad = None, None, None
    if EARLY:
        unit = unit0 + tl.arange(0, BLOCK_UNITS)[None, :]
        inside = unit < sizes.units
        if clean.first.ptr is not None:
            first = gather_rows(clean.first, step, place.samples, unit, inside)
        if clean.second.ptr is not None:
            second = gather_rows(clean.second, step, place.samples, unit, inside)
        if linear.sums is not None:
            grad = gather_rows(linear.grad, step, place.samples, unit, inside)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if readout is not None and (unit_tile == unit_tiles - 1) & (step > 0):
        signal = clean_outputs(measured, step - 1, place.tile.sample, BLOCK_OUTPUTS)
        delta_a, delta_o = product_of_step(
            before, weight, readout, place, unit0, sizes.inner,
            PRECISION, DESCRIBED, BLOCK_UNITS, BLOCK_OUTPUTS, BLOCK_INNER, STAGES,
        )  # fmt: skip
        measure_outputs(delta_o, measured, signal, step - 1, place.tile, rows, noise.scale, PRECISION, ADD, FINISH)
    else:
        delta_a, _ = product_of_step(
            before, weight, None, place, unit0, sizes.inner,
            PRECISION, DESCRIBED, BLOCK_UNITS, BLOCK_OUTPUTS, BLOCK_INNER, STAGES,
        )  # fmt: skip
    if PARTS == 2:
        HALF: tl.constexpr = BLOCK_UNITS // 2
        left, right = tl.split(tl.permute(tl.reshape(delta_a, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
        part = finish_step(
            left, None, None, None, clean, linear, after, stored, place, noise, unit0, sizes,
            NOISE, CELL, PRECISION, FAST, WIDE, DESCRIBED, False,
        )  # fmt: skip
        part += finish_step(
            right, None, None, None, clean, linear, after, stored, place, noise, unit0 + HALF, sizes,
            NOISE, CELL, PRECISION, FAST, WIDE, DESCRIBED, False,
        )  # fmt: skip
    else:
        part = finish_step(
            delta_a, first, second, grad, clean, linear, after, stored, place, noise, unit0, sizes,
            NOISE, CELL, PRECISION, FAST, WIDE, DESCRIBED, EARLY,
        )  # fmt: skip
    if linear.sums is not None:
        offset = (tl.cast(slot, tl.int64) * unit_tiles + unit_tile) * rows + place.tile.row
        tl.store(linear.sums + offset, part[:, None], place.tile.exists)


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
    """Fill `results` by one launch per step, or two where outputs are measured apart; see `rollout.rollout`."""
    time, batch, units = preact.shape
    rows = batch * options.rollouts
    operand, scale = OPERAND_DTYPES[options.precision], state_scale(options)
    inner = launch.block_inner * triton.cdiv(units, launch.block_inner)
    unit_tiles = triton.cdiv(units, launch.block_units)
    row_tiles = triton.cdiv(rows, launch.block_rows)
    if launch.samples == 1:
        row_tiles = batch * triton.cdiv(options.rollouts, launch.block_rows)
    weight = padded_to(weight_hh, unit_tiles * launch.block_units, inner, operand)
    # A tile may reach beyond the last row.
    padded = rows + max(launch.block_rows, launch.measuring[0])
    states = [preact.new_zeros((padded, inner), dtype=operand) for _ in range(2)]
    if delta_h0 is not None:
        states[0][:rows, :units] = (delta_h0 / scale).reshape(rows, units)
    slots = min(time, PARTIAL_STEPS)
    linear = LinearPart(None, rows_of(None))
    if loss.form.measured and not loss.form.of_outputs:
        linear = LinearPart(preact.new_empty((slots, unit_tiles, rows), dtype=torch.float32), loss.rows.signal)
    measure = measurement(launch, loss, options, inner, units, results)
    low, high = counter_words(counters)
    tensors = described(launch, weight, states, results.delta_a, batch, options.rollouts)
    arguments = {
        "clean": clean_of(preact, hidden, options),
        "weight": tensors.weight,
        "linear": linear,
        "stored": tensors.stored,
        "seed_ptr": seed,
        "rows": rows,
        "rollouts": options.rollouts,
        "sizes": StepSizes(units, inner),
        "sigma": float(options.sigma),
        "counters_low": low,
        "counters_high": high,
        **constexprs(options),
        **measure.joined,
        "SAMPLES": launch.samples,
        "DESCRIBED": launch.described,
        "EARLY": launch.early,
        "PARTS": launch.parts,
        "DEPENDENT": launch.dependent,
    }

    def move(old: int, dependent: bool) -> Move:
        """Return what makes a step from buffer `old` into the other."""
        pair = {"before": tensors.before[old], "after": tensors.after[1 - old]}
        named = {"launch_pdl": True} if dependent else {}
        return Move(
            stepped(step_kernel, launch, row_tiles * unit_tiles, {**arguments, **pair}, time, slots, **named),
            None if measure.every is None else measure.every(states[1 - old]),
        )

    moves = [move(0, launch.dependent), move(1, launch.dependent)]
    # Not the first: what comes before it may be what made the clean run.
    first = [move(0, dependent=False)] if launch.dependent else []
    run_steps(moves, time, slots, results.delta_loss, linear.sums, first)
    if measure.last is not None:
        measure.last(states[time % 2])(time - 1)
    results.delta_h.view(rows, units).copy_(states[time % 2][:rows, :units].float() * scale)


class StepTensors(NamedTuple):
    """What a step reads and writes, as the step kernel takes it."""

    weight: Any
    before: list[Any]
    """Both buffers, to read from."""
    after: list[Any]
    """Both buffers, to write to."""
    stored: Any


def described(
    launch: RolloutLaunch, weight: Tensor, states: list[Tensor], delta_a: Tensor | None, batch: int, rollouts: int
) -> StepTensors:
    """Return the tensors of a step, as descriptors where the launch takes those."""
    if not launch.described:
        return StepTensors(weight, states, states, stored_in(delta_a))
    outer, inner_rows = (batch, rollouts) if launch.samples == 1 else (1, batch * rollouts)
    rows, units = launch.block_rows, launch.block_units // launch.parts

    def tiles(tensor: Tensor, outer: int, units: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor.view(outer, inner_rows, tensor.shape[-1]), [1, rows, units])

    valid = [state[: batch * rollouts] for state in states]
    time = 0 if delta_a is None else delta_a.shape[0]
    return StepTensors(
        TensorDescriptor.from_tensor(weight, [launch.block_units, launch.block_inner]),
        [tiles(state, outer, launch.block_inner) for state in valid],
        [tiles(state, outer, units) for state in valid],
        None if delta_a is None else tiles(delta_a, time * outer, units),
    )


class Move(NamedTuple):
    """What makes a step from one of two buffers into the other."""

    step: Repeated
    measure: Repeated | None
    """Measures the new state; None where no loss of the outputs is asked for."""


def stepped(
    kernel: Any, launch: RolloutLaunch, programs: int, arguments: dict[str, Any], time: int, slots: int, **named: Any
) -> Repeated:
    """Return the launches of a kernel that makes one step, of which `step` and `slot` change."""
    return Repeated(
        kernel,
        programs,
        {
            **arguments,
            "BLOCK_ROWS": launch.block_rows,
            "BLOCK_UNITS": launch.block_units,
            "BLOCK_INNER": launch.block_inner,
            "STAGES": launch.stages,
        },
        {"step": time, "slot": slots},
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
        **named,
    )


def run_steps(
    moves: list[Move],
    time: int,
    slots: int,
    delta_loss: Tensor | None,
    sums: Tensor | None,
    first: Sequence[Move] = (),
) -> None:
    """Make all steps, with the two buffers in turn, and add up the partial sums of a linear loss.

    first: what makes the first steps instead.
    """
    for step in range(time):
        move = first[step] if step < len(first) else moves[step % 2]
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
