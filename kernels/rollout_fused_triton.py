"""Resident rollouts that sum their adjoint at discount 0 on the way: activity and noise never leave the program.

Contract and equations: `adjoint.rollout_adjoint`. The time loop is that of `rollout_resident_triton.py`.

A step's credit is known within the step, so the tile's rollouts are added up at once, into partial sums of each tile;
a second pass adds tiles in order. Adding up rows of a tile costs many shuffles between the threads that hold them. With
16-bit operands it is a product instead: a matrix with a row for each parity times the tile. Each factor in it is two
numbers, of which the second is the rounding error of the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjoint import SAFE_TO_SQUARE, by_activity
from .launch_triton import OPERAND_DTYPES, capability, clean_of, constexprs, start_in, weights_in
from .loss import Loss
from .loss_triton import loss_arguments
from .noise import Counters
from .noise_triton import counter_words
from .place_triton import place_of_program
from .rollout import RolloutOptions
from .rollout_resident_triton import Results, Sizes, begin, noise_of_step, observe
from .tiles import SPLIT_SUM_BLOCK, RolloutLaunch, fused_drawback, fused_launch, rollout_launch

FACTORS = tl.constexpr(16)
"""Rows of the matrix of factors, the least that a matrix unit takes: those of the remainders follow 8 further on."""


class FusedResults(NamedTuple):
    """What fused rollouts write, contiguous."""

    delta_loss: Any
    """(time, batch, rollouts), float32."""
    delta_h: Any
    """Deviation of the state after the last step, (batch, rollouts, hidden)."""
    sums: Any
    """Sums of each tile of rollouts, (tiles, 2, time, batch, hidden), float32."""


class Counted(NamedTuple):
    """What a launch is limited to; each is None where it is not.

    What a rollout that overflows has added at earlier steps is known only when the kernel is through. A second launch
    goes through the tiles of such rollouts without them; the programs of all others return at once.
    """

    finite: Any
    """Rollouts that count, (batch, rollouts), contiguous, int8."""
    wanted: Any
    """Whether a tile is run, (batch, tiles), contiguous, int8."""


class TileSums(NamedTuple):
    """Where the sums of the program's tile and sample are, and what counts in them."""

    ptr: Any
    """Those of the even rollouts at the first step."""
    half: Any
    """Elements from the sums of the even to those of the odd rollouts."""
    parity: Any
    """Parity of the tile's first rollout."""
    counted: Any
    """Rows that count, (rows,)."""


class Credited(NamedTuple):
    """A tile at one step, before its loss difference is known."""

    delta_a: Any
    summand: Any
    """What is summed over rollouts, (rows, units)."""
    divisor: Any
    """What a row's credit is divided by, (rows,); 0 where the row does not count."""


@triton.jit
def _finite_rows(tile, finite, FAST: tl.constexpr):
    """Return a tile as bfloat16 with dropped rows set to zero, because 0 * inf is NaN; finite: (rows,)."""
    if FAST:
        tile, mask = tile.to(tl.bfloat16), tl.where(finite, -1, 0).to(tl.int16)[:, None]
        tile = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [tile, mask], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        tile = tl.where(finite[:, None], tile, 0.0).to(tl.bfloat16)
    return tile


@triton.jit
def _credited(
    carried, noise, scale, size, BY_NOISE: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr
):
    """Return what is `Credited`.

    carried: delta_a; BY_NOISE: the product that lacks the noise, which comes with standard deviation 1.
    """
    if BY_NOISE:
        delta_a = carried + noise * scale
        summand = noise.to(tl.bfloat16) if NARROW else noise
        divisor = tl.full((carried.shape[0],), 1.0, tl.float32) * scale
    else:
        delta_a = carried
        inside = (tl.arange(0, carried.shape[1]) < size)[None, :]
        counted = carried if FULL else tl.where(inside, carried, 0.0)
        squared = tl.sum(counted * counted, 1)
        usable = squared < float("inf")
        summand = _finite_rows(carried, usable, FAST) if NARROW else tl.where(usable[:, None], carried, 0.0)
        divisor = tl.where(usable, squared, 0.0)
    return Credited(delta_a, summand, divisor)


@triton.jit
def _add_rollouts(summand, share, PRODUCT: tl.constexpr):
    """Return the sums over even and over odd rows of share times summand, (2, units); further rows are void."""
    ROWS: tl.constexpr = summand.shape[0]
    UNITS: tl.constexpr = summand.shape[1]
    if PRODUCT:
        place = tl.arange(0, FACTORS)[None, :]
        parity = (tl.arange(0, ROWS) % 2)[:, None]
        high = share.to(summand.dtype)
        low = (share - high.to(tl.float32)).to(summand.dtype)
        chosen = tl.where(place < 8, high[:, None], low[:, None])
        factors = tl.where(place % 8 == parity, chosen, tl.zeros_like(chosen))
        sums = tl.dot(tl.trans(factors), summand, input_precision="ieee")
        sums = tl.sum(tl.reshape(sums, (2, 8, UNITS)), 0)
    else:
        product = summand.to(tl.float32) * share[:, None]
        sums = tl.sum(tl.reshape(product, (ROWS // 2, 2, UNITS)), 0)
    return sums


@triton.jit
def _step(
    carried,
    noise,
    readout,
    clean,
    loss,
    results,
    step,
    place,
    sizes,
    scale,
    sums,  # TileSums
    BY_NOISE: tl.constexpr,
    PRODUCT: tl.constexpr,
    CELL: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return delta_h / scale of one step, having written its loss differences and the tile's sums.

    carried, noise: as in `_credited`; other arguments as in `rollout_resident_triton.observe`.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    NARROW: tl.constexpr = SCALED or PRECISION == "bf16"
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    tile = _credited(carried, noise, deviation, sizes.units, BY_NOISE, NARROW, FAST, FULL)
    observed = observe(
        tile.delta_a, readout, clean, loss, results, step, place, sizes, scale,
        CELL, LOSS, PRECISION, FAST, WIDE, FULL, 1,
    )  # fmt: skip
    delta_loss, divisor = observed.delta_loss, tile.divisor
    if SCALED:
        divisor = divisor * scale
    factor = 1.0 if BY_NOISE else tl.cast(sizes.units, tl.float32)
    usable = sums.counted & (tl.abs(delta_loss) < float("inf")) & (divisor > 0.0)
    share = tl.where(usable, delta_loss * factor / tl.where(usable, divisor, 1.0), 0.0)
    halves = _add_rollouts(tile.summand, share, PRODUCT)
    unit = tl.arange(0, carried.shape[1])[None, :]
    parity = tl.arange(0, halves.shape[0])[:, None]
    step_ptr = sums.ptr + tl.cast(step, tl.int64) * (sizes.units * place.batch)
    mask = (parity < 2) & (unit < sizes.units)
    tl.store(step_ptr + ((parity + sums.parity) % 2).to(tl.int64) * sums.half + unit, halves, mask)
    return observed.delta_h


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "counters_low", "counters_high"])
def fused_kernel(
    weights,  # Weights
    start_ptr,  # (batch, rollouts, hidden), contiguous, operand type: first delta_h / scale; None is zero
    results,  # FusedResults
    counted,  # Counted
    seed_ptr,  # ()
    clean,  # CleanRows: what of the clean run the cell takes
    loss,  # LossRows
    time,
    batch,
    rollouts,
    sizes,  # Sizes
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    BY_NOISE: tl.constexpr,  # whether credit goes to the noise rather than to the activity
    PRODUCT: tl.constexpr,  # whether rollouts are added up by the matrix unit
    NOISE: tl.constexpr,
    CELL: tl.constexpr,  # device function of `cell_triton`
    LOSS: tl.constexpr,  # device function of `loss_triton`
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,  # whether the units fill the tile
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Run rollouts through all steps: a program owns BLOCK_ROWS rollouts of one sample and all their units.

    Of each step it writes its rollouts' loss differences and the two sums of its tile, over even and odd rollouts.
    """
    SCALED: tl.constexpr = PRECISION == "fp16"
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    if counted.wanted is not None:  # noqa: SIM102  (the outer condition is the compiler's)
        if tl.load(counted.wanted + tl.program_id(0)) == 0:
            return
    place = place_of_program(batch, rollouts, BLOCK_ROWS, 1, 2 if BLOCK_UNITS >= 256 else 1)
    counts = place.exists
    if counted.finite is not None:
        counts = tl.load(counted.finite + place.first_row + place.local, counts, 0) != 0
    half = tl.cast(time, tl.int64) * batch * sizes.units
    tile = tl.program_id(0) % tl.cdiv(rollouts, BLOCK_ROWS)
    sums_ptr = results.sums + (2 * tile * half + place.first_sample * sizes.units)
    sums = TileSums(sums_ptr, half, (tl.cast(counters_high, tl.int64) & 1).to(tl.int32), counts)
    begun = begin(
        weights, start_ptr, seed_ptr, place, sizes, sigma, counters_low, counters_high,
        DOT, BLOCK_ROWS, BLOCK_UNITS, BLOCK_OUTPUTS,
    )  # fmt: skip
    weight, stream, scale = begun.weight, begun.stream, begun.scale
    readout = begun.readout if weights.readout is not None else None
    deviation = tl.cast(1.0 if SCALED or BY_NOISE else scale, tl.float32)
    written = Results(results.delta_loss, None, None, results.delta_h)
    carried, noise = begun.product, None
    if not BY_NOISE:
        carried += noise_of_step(stream, 0, place, carried, deviation, NOISE, FAST)
    tl.debug_barrier()
    for step in tl.range(0, time - 1, num_stages=1):
        if BY_NOISE:
            injected = noise_of_step(stream, step, place, carried, deviation, NOISE, FAST)
            delta_h = _step(
                carried, injected, readout, clean, loss, written, step, place, sizes, scale, sums,
                BY_NOISE, PRODUCT, CELL, LOSS, PRECISION, FAST, WIDE, FULL,
            )  # fmt: skip
            carried = tl.dot(delta_h.to(weight.dtype), weight, input_precision=DOT)
        else:
            delta_h = _step(
                carried, None, readout, clean, loss, written, step, place, sizes, scale, sums,
                BY_NOISE, PRODUCT, CELL, LOSS, PRECISION, FAST, WIDE, FULL,
            )  # fmt: skip
            injected = noise_of_step(stream, step + 1, place, carried, deviation, NOISE, FAST)
            carried = tl.dot(delta_h.to(weight.dtype), weight, injected, input_precision=DOT)
    if BY_NOISE:
        noise = noise_of_step(stream, time - 1, place, carried, deviation, NOISE, FAST)
    delta_h = _step(
        carried, noise, readout, clean, loss, written, time - 1, place, sizes, scale, sums,
        BY_NOISE, PRODUCT, CELL, LOSS, PRECISION, FAST, WIDE, FULL,
    )  # fmt: skip
    if SCALED:
        delta_h = delta_h * scale
    tl.store(results.delta_h + begun.offset, delta_h.to(results.delta_h.dtype.element_ty), begun.inside)


@triton.jit(do_not_specialize=["splits", "elements"])
def _add_partials_kernel(
    sums_ptr,  # (elements), float32
    partials_ptr,  # (splits, elements), contiguous, float32
    splits,
    elements: tl.int64,
    BLOCK: tl.constexpr,
):
    """Add the splits in order: a program owns BLOCK elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        sums += tl.load(partials_ptr + tl.cast(split, tl.int64) * elements + element, element < elements, other=0.0)
    tl.store(sums_ptr + element, sums, element < elements)


def added(partials: Tensor) -> Tensor:
    """Return the sum over the first dimension, taken in order."""
    if len(partials) == 1:
        return partials[0]
    sums = torch.empty_like(partials[0])
    elements = sums.numel()
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(partials):
        _add_partials_kernel[(triton.cdiv(elements, SPLIT_SUM_BLOCK),)](
            sums, partials, len(partials), elements, BLOCK=SPLIT_SUM_BLOCK, num_warps=4
        )
    return sums


def preferred_launch(
    preact: Tensor, weight_hh: Tensor, loss: Loss, weight_by: str, options: RolloutOptions
) -> RolloutLaunch | None:
    """Return the tiles of the fused kernel, or None where rollouts are run and then summed."""
    arguments = loss_arguments(loss)
    served = options.precision in OPERAND_DTYPES and preact.dtype != torch.float64 != weight_hh.dtype
    safe = not by_activity(weight_by) or SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1]
    served = served and arguments.form.measured and not options.cell.noise_in_state
    if not served or not safe or 0 in {*preact.shape, options.rollouts}:
        return None
    arch, units = capability(preact.device), preact.shape[2]
    launch = rollout_launch(
        units=units,
        outputs=arguments.outputs(units) if arguments.form.of_outputs else 0,
        has_readout=arguments.readout is not None,
        returns_outputs=False,
        batch=preact.shape[1],
        rollouts=options.rollouts,
        precision=options.precision,
        arch=arch,
    )
    fused = fused_launch(launch, rollouts=options.rollouts, precision=options.precision, arch=arch)
    return None if fused_drawback(launch, fused, arch) else fused


def fused_rollouts(
    launch: RolloutLaunch,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss,
    seed: Tensor,
    *,
    weight_by: str,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    counted: Counted,
    results: FusedResults,
) -> None:
    """Run rollouts in the tiles of `tiles.fused_launch`, and write `results`.

    Other arguments as in `adjoint.rollout_adjoint`.
    """
    time, batch, units = preact.shape
    arguments = loss_arguments(loss)
    tiles = triton.cdiv(options.rollouts, launch.block_rows)
    low, high = counter_words(counters)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(preact):
        fused_kernel[(batch * tiles,)](
            weights_in(weight_hh, arguments.readout, options),
            start_in(delta_h0, options),
            results,
            counted,
            seed,
            clean_of(preact, hidden, options),
            arguments.rows,
            time,
            batch,
            options.rollouts,
            Sizes(units, arguments.outputs(units)),
            float(options.sigma),
            low,
            high,
            BY_NOISE=not by_activity(weight_by),
            PRODUCT=launch.product,
            **constexprs(options),
            LOSS=arguments.form.of_tile,
            FULL=units == launch.block_units,
            BLOCK_ROWS=launch.block_rows,
            BLOCK_UNITS=launch.block_units,
            BLOCK_OUTPUTS=max(launch.block_outputs, 16),
            num_warps=launch.warps,
            num_stages=launch.stages,
            maxnreg=launch.registers,
            enable_fp_fusion=True,
        )


def tiles_of(lost: Tensor, block_rows: int) -> Tensor:
    """Return which tiles, (batch, tiles), hold any of some rollouts, (batch, rollouts) bool."""
    batch, rollouts = lost.shape
    tiles = triton.cdiv(rollouts, block_rows)
    filled = torch.nn.functional.pad(lost, (0, tiles * block_rows - rollouts))
    return filled.view(batch, tiles, block_rows).any(-1)


def as_bytes(mask: Tensor) -> Tensor:
    """Return a bool tensor as the kernel reads it."""
    return mask.contiguous().view(torch.int8)
