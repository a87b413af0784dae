"""Resident rollouts: one launch for the whole sequence, W_hh in shared memory, no program waits for another.

Contract and equations: `rollout.py`.

The float32 deviation of the pre-activations goes round the time loop; the cell is at the loop's top and the noise is
the product's accumulator. So the state goes from accumulator to operand inside registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import capability, clean_of, constexprs, start_in, weights_in
from .loss_triton import LossArguments
from .noise import Counters
from .noise_triton import counter_words, noise_tile, pin, unpack_counters
from .place_triton import load_rows, place_of_program
from .rollout import Rollout, RolloutOptions
from .tiles import RolloutLaunch, takes_quotient_rows


class Sizes(NamedTuple):
    """Widths of the network."""

    units: int
    """H."""
    outputs: int
    """O, or H where there is no readout."""


class Results(NamedTuple):
    """What rollouts write, contiguous."""

    measured: Any
    """delta_loss (time, batch, rollouts) or delta_o (time, batch, rollouts, outputs), float32; None without a loss."""
    delta_a: Any
    """(time, batch, rollouts, stride), or None."""
    stride: int | None
    delta_h: Any
    """Deviation of the state after the last step, (batch, rollouts, hidden)."""


class Stream(NamedTuple):
    """The noise of a block: its key and the first counters, two words each."""

    seed: Any
    low: Any
    high: Any


class Observed(NamedTuple):
    """What one step leaves: delta_h / scale, (rows, units), and the loss difference, (rows,), or 0."""

    delta_h: Any
    delta_loss: Any


class Beginning(NamedTuple):
    """What a program holds before the first step."""

    weight: Any
    """W_hh transposed, (units, units)."""
    readout: Any
    """W_o transposed, (units, outputs); without a readout `weight` again."""
    product: Any
    """W_hh times the first delta_h / scale, (rows, units), float32: delta_a / scale without its noise."""
    stream: Stream
    scale: Any
    """Standard deviation of the noise, float32."""
    offset: Any
    """Where the program's states are in a tensor (batch, rollouts, hidden), (rows, units)."""
    inside: Any
    """Whether they exist, (rows, units)."""


@triton.jit
def begin(
    weights, start_ptr, seed_ptr, place, sizes, sigma, counters_low, counters_high,
    DOT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Load what stays for all steps, and return the `Beginning`; arguments as in `resident_kernel`."""
    unit = tl.arange(0, BLOCK_UNITS)
    real = unit < sizes.units
    both = real[:, None] & real[None, :]
    weight = tl.load(weights.recurrent + unit[None, :] * sizes.units + unit[:, None], both, 0.0)
    # Triton 3.6 cannot return None.
    readout = weight
    if weights.readout is not None:
        output = tl.arange(0, BLOCK_OUTPUTS)
        mask = real[:, None] & (output < sizes.outputs)[None, :]
        readout = tl.load(weights.readout + output[None, :] * sizes.units + unit[:, None], mask, 0.0)
    seed = tl.load(seed_ptr)
    scale = tl.cast(sigma, tl.float32)
    # A product even where there is no start: it gives the noise the accumulator's layout.
    state = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), weight.dtype)
    offset = place.first_row * sizes.units + (place.local[:, None] * sizes.units + unit[None, :])
    inside = place.exists[:, None] & real[None, :]
    if start_ptr is not None:
        state = tl.load(start_ptr + offset, inside, 0.0)
    product = tl.dot(state, weight, input_precision=DOT)
    stream = Stream(seed, tl.cast(counters_low, tl.int64), tl.cast(counters_high, tl.int64))
    return Beginning(weight, readout, product, stream, scale, offset, inside)


@triton.jit
def _reread(word):
    """Return a 64-bit word, seen by the compiler as a new value.

    Otherwise the rounds of Philox that do not depend on the time step are computed once and stay in registers.
    """
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [word], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def noise_of_step(stream, step, place, like, scale, NOISE: tl.constexpr, FAST: tl.constexpr):
    """Return the noise of one step, of standard deviation `scale`, in the layout of `like`, which has its shape."""
    seed, low, high = stream.seed, stream.low, stream.high
    if FAST:
        seed, high = _reread(seed), _reread(high)
    c0, c1, c2, c3 = unpack_counters(low, high)
    c1 = c1 + tl.cast(step, tl.uint32)
    c2, c3 = c2 + place.rollout.to(tl.uint32)[:, None], c3 + place.column.to(tl.uint32)
    unit = tl.arange(0, like.shape[1]).to(tl.uint32)[None, :]
    return noise_tile(seed, pin(c0, like), c1, c2, c3, unit, scale, NOISE, FAST)


@triton.jit
def _store(delta_a, results, step, place, FULL: tl.constexpr):
    """Store delta_a of one step."""
    first_row = place.first_row + tl.cast(step, tl.int64) * place.rows_of_step
    unit = tl.arange(0, delta_a.shape[1])
    stride = delta_a.shape[1] if FULL else results.stride
    mask = place.exists[:, None] if FULL else place.exists[:, None] & (unit < stride)[None, :]
    # 64 bits from the start: the compiler finds no constants in a sum that is widened later.
    delta_a_ptr = results.delta_a + first_row * stride + (place.local.to(tl.int64)[:, None] * stride + unit[None, :])
    tl.store(delta_a_ptr, delta_a.to(results.delta_a.dtype.element_ty), mask)


@triton.jit
def observe(
    delta_a,
    readout,
    clean,
    loss,
    results,
    step,
    place,
    sizes,
    scale,
    CELL: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Take delta_a / scale of one step, (rows, units), write the step's results and return what is `Observed`.

    readout: W_o transposed, (units, outputs), or None. place: `Place` of the program. Other arguments as in
    `resident_kernel`.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    BLOCK: tl.constexpr = delta_a.shape[1]
    if SCALED:
        delta_a = delta_a * scale
    if results.delta_a is not None:
        _store(delta_a, results, step, place, FULL)
    first, second = None, None
    if clean.first.ptr is not None:
        first = load_rows(clean.first, step, place, sizes.units, FULL, SAMPLES, BLOCK)
    if clean.second.ptr is not None:
        second = load_rows(clean.second, step, place, sizes.units, FULL, SAMPLES, BLOCK)
    inverse = 1.0 / scale if SCALED else 1.0
    delta_h = CELL(delta_a, first, second, inverse, SCALED, FAST, PRECISION == "fp32", WIDE)
    delta_loss = 0.0
    if results.measured is not None:
        if readout is None:
            delta_loss = LOSS(delta_h, loss, results.measured, step, place, sizes.units, scale, SCALED, FULL, SAMPLES)
        else:
            delta_o = tl.dot(delta_h.to(readout.dtype), readout, input_precision="tf32" if FAST else "ieee")
            delta_loss = LOSS(
                delta_o, loss, results.measured, step, place, sizes.outputs, scale, SCALED, False, SAMPLES
            )
    return Observed(delta_h, delta_loss)


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "counters_low", "counters_high"])
def resident_kernel(
    clean,  # CleanRows: what of the clean run the cell takes
    weights,  # Weights
    loss,  # LossRows
    start_ptr,  # (batch, rollouts, hidden), contiguous, operand type: first delta_h / scale; None is zero
    results,  # Results
    seed_ptr,  # ()
    time,
    batch,
    rollouts,
    sizes,  # Sizes
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    NOISE: tl.constexpr,
    CELL: tl.constexpr,  # device function of `cell_triton`
    LOSS: tl.constexpr,  # device function of `loss_triton`; None without a loss
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,  # whether the units fill the tile
    SAMPLES: tl.constexpr,
    PIECES: tl.constexpr,  # in which clean rows are loaded
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Run rollouts through all steps: a program owns BLOCK_ROWS rollouts and all their units.

    The rollouts are of one sample, or BLOCK_ROWS / SAMPLES of each of SAMPLES samples, enough for all that one has.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    place = place_of_program(batch, rollouts, BLOCK_ROWS, SAMPLES, PIECES)
    begun = begin(
        weights, start_ptr, seed_ptr, place, sizes, sigma, counters_low, counters_high,
        DOT, BLOCK_ROWS, BLOCK_UNITS, BLOCK_OUTPUTS,
    )  # fmt: skip
    weight, scale, stream = begun.weight, begun.scale, begun.stream
    readout = begun.readout if weights.readout is not None else None
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    delta_a = begun.product
    delta_a += noise_of_step(stream, 0, place, delta_a, deviation, NOISE, FAST)
    tl.debug_barrier()
    for step in tl.range(0, time - 1, num_stages=1):
        delta_h = observe(
            delta_a, readout, clean, loss, results, step, place, sizes, scale,
            CELL, LOSS, PRECISION, FAST, WIDE, FULL, SAMPLES,
        ).delta_h  # fmt: skip
        noise = noise_of_step(stream, step + 1, place, delta_a, deviation, NOISE, FAST)
        delta_a = tl.dot(delta_h.to(weight.dtype), weight, noise, input_precision=DOT)
    delta_h = observe(
        delta_a, readout, clean, loss, results, time - 1, place, sizes, scale,
        CELL, LOSS, PRECISION, FAST, WIDE, FULL, SAMPLES,
    ).delta_h  # fmt: skip
    if SCALED:
        delta_h = delta_h * scale
    tl.store(results.delta_h + begun.offset, delta_h.to(results.delta_h.dtype.element_ty), begun.inside)


def run_resident(
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
    time, batch, units = preact.shape
    low, high = counter_words(counters)
    programs = triton.cdiv(batch, launch.samples) * triton.cdiv(options.rollouts, launch.block_rows)
    quotient = preact.dtype == hidden.dtype == torch.float32 and takes_quotient_rows(
        launch,
        units=units,
        precision=options.precision,
        arch=capability(preact.device),
        noise=options.noise,
        keeps=results.delta_a is not None or delta_h0 is not None,
    )
    resident_kernel[(programs,)](
        clean_of(preact, hidden, options, quotient=quotient),
        weights_in(weight_hh, loss.readout, options),
        loss.rows,
        start_in(delta_h0, options),
        Results(
            results.delta_loss if results.delta_o is None else results.delta_o,
            results.delta_a,
            None if results.delta_a is None else results.delta_a.shape[-1],
            results.delta_h,
        ),
        seed,
        time,
        batch,
        options.rollouts,
        Sizes(units, loss.outputs(units)),
        float(options.sigma),
        low,
        high,
        **constexprs(options),
        LOSS=loss.form.of_tile,
        FULL=units == launch.block_units,
        SAMPLES=launch.samples,
        PIECES=launch.pieces,
        BLOCK_ROWS=launch.block_rows,
        BLOCK_UNITS=launch.block_units,
        BLOCK_OUTPUTS=max(launch.block_outputs, 16),
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=launch.registers,
        enable_fp_fusion=True,
    )
