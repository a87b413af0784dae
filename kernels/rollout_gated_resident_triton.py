"""Resident rollouts of gated cells: one launch for the whole sequence, the gates' weights in shared memory.

Contract and equations: `rollout.py`, `cell_gated.py`. A program owns whole rollouts and waits for no other. Round the
time loop go the operand of the next products and, in float32, what passes by them: delta_h of a GRU, delta_c of an
LSTM. The gates' products have one left operand. Losses of the outputs are left to the stepwise form: an accumulator
for each gate leaves no room for a tile of outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .cell_gated_triton import CleanStep
from .launch_triton import OPERAND_DTYPES, flags, gated_cell_of
from .loss_triton import LossArguments, linear_sum
from .noise import Counters
from .noise_triton import counter_words
from .place_triton import Rows, gather_rows, place_of_program, rows_of, spread, stored_in
from .rollout import Rollout, RolloutOptions
from .rollout_resident_triton import Stream, noise_of_step
from .tiles import RolloutLaunch, takes_plain_difference


class GatedLoss(NamedTuple):
    """A linear loss; absent where there is none."""

    measured: Any
    """delta_loss, (time, batch, rollouts), float32."""
    grad: Rows
    """dL/dh, (time, batch, hidden)."""
    of_memory: Rows
    """dL/dc; absent where nothing arrives there."""


class GatedEnds(NamedTuple):
    """Deviations of the states before the first step and after the last, (batch, rollouts, states), float32."""

    first: Any
    """None is zero."""
    last: Any


class GateProducts(NamedTuple):
    """What the product of a gate is made of, when the cell comes to it."""

    state: Any
    """delta_h / scale of the step before, (rows, units), operand type."""
    first: Any
    """W_hh of the first gate, transposed, (units, units)."""
    second: Any
    third: Any
    fourth: Any
    """Of a cell of three gates the third again."""
    scale: Any


@triton.jit
def _product(gates, NUMBER: tl.constexpr, FAST: tl.constexpr):
    """Return W_hh delta_h of one gate, (rows, units), float32."""
    weight = gates[NUMBER + 1]
    result = tl.dot(gates.state, weight, input_precision="tf32" if FAST else "ieee")
    if gates.state.dtype == tl.float16:
        result = result * gates.scale
    return result


@triton.jit
def _load_gate(weight_ptr, gate, BLOCK_UNITS: tl.constexpr):
    """Return one gate's rows of W_hh, padded, (gates, units, units), transposed."""
    unit = tl.arange(0, BLOCK_UNITS)
    return tl.load(weight_ptr + gate * BLOCK_UNITS * BLOCK_UNITS + unit[None, :] * BLOCK_UNITS + unit[:, None])


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "counters_low", "counters_high"])
def gated_resident_kernel(
    clean,  # Rows, (time, batch, n BLOCK_UNITS): what the cell reads, zero beyond the units
    weight_ptr,  # W_hh, (gates, BLOCK_UNITS, BLOCK_UNITS), contiguous, operand type, zero beyond the units
    loss,  # GatedLoss
    ends,  # GatedEnds
    stored,  # Stored, or None
    seed_ptr,  # ()
    time,
    batch,
    rollouts,
    units,
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
    FULL: tl.constexpr,  # whether the units fill the tile
    SAMPLES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Run rollouts through all steps: a program owns BLOCK_ROWS rollouts and all their units.

    The rollouts are of one sample, or BLOCK_ROWS / SAMPLES of each of SAMPLES samples, enough for all that one has.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    STATES: tl.constexpr = 2 if MEMORY else 1
    place = place_of_program(batch, rollouts, BLOCK_ROWS, SAMPLES, 1)
    unit = tl.arange(0, BLOCK_UNITS)[None, :]
    every = tl.full((1, BLOCK_UNITS), True, tl.int1)
    inside = every if FULL else unit < units
    owned = place.exists[:, None] & inside
    sample = place.sample
    if SAMPLES > 1:
        # Those beyond the last sample read what is there.
        sample = tl.minimum(place.first_sample + tl.arange(0, SAMPLES)[:, None], batch - 1)

    first_weight = _load_gate(weight_ptr, 0, BLOCK_UNITS)
    second_weight = _load_gate(weight_ptr, 1, BLOCK_UNITS)
    third_weight = _load_gate(weight_ptr, 2, BLOCK_UNITS)
    # Triton 3.6 cannot leave a name undefined in one branch.
    fourth_weight = third_weight
    if GATES == 4:
        fourth_weight = _load_gate(weight_ptr, 3, BLOCK_UNITS)

    scale = tl.cast(sigma, tl.float32)
    stream = Stream(tl.load(seed_ptr), tl.cast(counters_low, tl.int64), tl.cast(counters_high, tl.int64))
    end = (place.first_row + place.local[:, None]) * (STATES * units) + unit
    state = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), weight_ptr.dtype.element_ty)
    held = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), tl.float32)
    if ends.first is not None:
        start = tl.load(ends.first + end, owned, 0.0)
        held = tl.load(ends.first + (end + (STATES - 1) * units), owned, 0.0)
        state = (start / scale if SCALED else start).to(state.dtype)
    tl.debug_barrier()
    for step in tl.range(0, time, num_stages=1):
        step_of_run = CleanStep(clean, step, sample, unit, every, BLOCK_UNITS, place.local)
        gates = GateProducts(state, first_weight, second_weight, third_weight, fourth_weight, scale)
        delta_h, delta_c = CELL(gates, held, step_of_run, _product, FAST, WIDE)
        delta_h += noise_of_step(stream, step, place, delta_h, scale, NOISE, FAST)
        held = delta_c if MEMORY else delta_h
        first_row = place.first_row + tl.cast(step, tl.int64) * place.rows_of_step
        if stored is not None:
            stored_ptr = stored.ptr + first_row * stored.stride
            stored_ptr += place.local.to(tl.int64)[:, None] * stored.stride + unit
            tl.store(stored_ptr, delta_h.to(stored.ptr.dtype.element_ty), owned)
            if MEMORY:
                tl.store(stored_ptr + units, delta_c.to(stored.ptr.dtype.element_ty), owned)
        if loss.measured is not None:
            part = linear_sum(delta_h, spread(gather_rows(loss.grad, step, sample, unit, inside), place.local))
            if loss.of_memory.ptr is not None:
                part += linear_sum(
                    delta_c, spread(gather_rows(loss.of_memory, step, sample, unit, inside), place.local)
                )
            tl.store(loss.measured + first_row + place.local, part, place.exists)
        state = (delta_h / scale if SCALED else delta_h).to(state.dtype)
    if MEMORY:
        delta_h = state.to(tl.float32)
        tl.store(ends.last + end, delta_h * scale if SCALED else delta_h, owned)
    tl.store(ends.last + (end + (STATES - 1) * units), held, owned)


def run_gated_resident(
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
    """Fill `results` by one launch; arguments as in `rollout.rollout`."""
    (time, batch, _), units, cell = preact.shape, weight_hh.shape[1], options.cell
    form, wide = gated_cell_of(options), takes_plain_difference(options.precision, options.sigma)
    lacking = launch.block_units - units
    # Made for this call, so that padding costs no copy of the user's, and then every place in it is a constant.
    clean = form.clean_values(preact, hidden, wide)
    weight = weight_hh.to(OPERAND_DTYPES[options.precision]).view(cell.gates, units, units)
    if lacking:
        clean = pad(clean.view(time, batch, -1, units), (0, lacking)).flatten(2)
        weight = pad(weight, (0, lacking, 0, lacking))
    linear = GatedLoss(None, rows_of(None), rows_of(None))
    if loss.form.measured:
        grad = loss.rows.signal.ptr
        of_memory = grad[..., units:] if grad.shape[-1] > units else None
        linear = GatedLoss(results.delta_loss, rows_of(grad[..., :units]), rows_of(of_memory))
    start = None if delta_h0 is None else delta_h0.float().contiguous()
    low, high = counter_words(counters)
    programs = triton.cdiv(batch, launch.samples) * triton.cdiv(options.rollouts, launch.block_rows)
    gated_resident_kernel[(programs,)](
        rows_of(clean),
        weight.contiguous(),
        linear,
        GatedEnds(start, results.delta_h),
        stored_in(results.delta_a),
        seed,
        time,
        batch,
        options.rollouts,
        units,
        float(options.sigma),
        low,
        high,
        **flags(options),
        CELL=form.deviation,
        GATES=cell.gates,
        MEMORY=cell.states > 1,
        FULL=lacking == 0,
        SAMPLES=launch.samples,
        BLOCK_ROWS=launch.block_rows,
        BLOCK_UNITS=launch.block_units,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )
