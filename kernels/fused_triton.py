# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Resident rollouts that sum their adjoint at discount 0 on the way: activity and noise never leave the program.

Contract and equations: `adjoint.rollout_adjoint`. The time loop is that of `resident_triton.py`.

A step's credit is known within the step, so the tile's rollouts are added up at once, into partial sums of each tile;
a second pass adds tiles in order. Adding up rows of a tile costs many shuffles between the threads that hold them. With
16-bit operands it is a product instead: a matrix with a row for each parity times the tile. Each factor in it is two
numbers, the second what the first lost by rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjoint import SAFE_TO_SQUARE
from .loss import Loss
from .noise import Counters
from .noise_triton import counter_words
from .resident_triton import _noise_of_step, _observe, _place_of_program
from .rollout import RolloutOptions
from .rollout_triton import OPERAND_DTYPES, _arch, _clean, _fast, _signal, _strides, _wide
from .tiles import RolloutLaunch, fused_drawback, fused_launch, rollout_launch

SUM_BLOCK = 1024
FACTORS = tl.constexpr(16)
"""Rows of the matrix of factors, the least that a matrix unit takes: those of the remainders follow 8 further on."""


@triton.jit
def _kept(part, keep, FAST: tl.constexpr):
    """Return a tile as bfloat16, rows that are not kept cleared: 0 times what is not finite would count."""
    if FAST:
        part, mask = part.to(tl.bfloat16), tl.where(keep, -1, 0).to(tl.int16)[:, None]
        part = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [part, mask], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        part = tl.where(keep[:, None], part, 0.0).to(tl.bfloat16)
    return part


@triton.jit
def _tile_of_step(
    carried, noise, scale, size, METHOD: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, FULL: tl.constexpr
):
    """Return delta_a; what is summed of it, (rows, units); and what a row's credit is divided by, or 0.

    carried: delta_a, or "np": the product that lacks the noise, which comes with standard deviation 1.
    """
    if METHOD == "np":
        delta_a = carried + noise * scale
        part = noise.to(tl.bfloat16) if NARROW else noise
        divisor = tl.full((carried.shape[0],), 1.0, tl.float32) * scale
    else:
        delta_a = carried
        inside = (tl.arange(0, carried.shape[1]) < size)[None, :]
        counted = carried if FULL else tl.where(inside, carried, 0.0)
        squared = tl.sum(counted * counted, 1)
        usable = squared < float("inf")
        part = _kept(carried, usable, FAST) if NARROW else tl.where(usable[:, None], carried, 0.0)
        divisor = tl.where(usable, squared, 0.0)
    return delta_a, part, divisor


@triton.jit
def _add_rollouts(part, share, PRODUCT: tl.constexpr):
    """Return the sums over even and over odd rows of share times part, (2, units); further rows are void."""
    ROWS: tl.constexpr = part.shape[0]
    UNITS: tl.constexpr = part.shape[1]
    if PRODUCT:
        place = tl.arange(0, FACTORS)[None, :]
        parity = (tl.arange(0, ROWS) % 2)[:, None]
        high = share.to(part.dtype)
        low = (share - high.to(tl.float32)).to(part.dtype)
        chosen = tl.where(place < 8, high[:, None], low[:, None])
        factors = tl.where(place % 8 == parity, chosen, tl.zeros_like(chosen))
        sums = tl.dot(tl.trans(factors), part, input_precision="ieee")
        sums = tl.sum(tl.reshape(sums, (2, 8, UNITS)), 0)
    else:
        product = part.to(tl.float32) * share[:, None]
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
    strides,
    step,
    place,
    sizes,
    scale,
    sums_ptr,  # of the program's tile and sample: even rollouts, and `half` elements on, odd ones
    half,
    first,  # parity of the first rollout
    METHOD: tl.constexpr,
    PRODUCT: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return delta_h / scale of one step, having written its loss differences and the tile's sums."""
    SCALED: tl.constexpr = PRECISION == "fp16"
    NARROW: tl.constexpr = SCALED or PRECISION == "bf16"
    deviation = tl.cast(1.0 if SCALED else scale, tl.float32)
    delta_a, part, divisor = _tile_of_step(carried, noise, deviation, sizes[0], METHOD, NARROW, FAST, FULL)
    delta_h, delta_loss = _observe(
        delta_a, readout, clean, loss, results, strides, step, place, sizes, scale,
        NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL, 1,
    )  # fmt: skip
    exists, batch = place[3], place[6]
    if SCALED:
        divisor = divisor * scale
    factor = 1.0 if METHOD == "np" else tl.cast(sizes[0], tl.float32)
    usable = exists & (tl.abs(delta_loss) < float("inf")) & (divisor > 0.0)
    share = tl.where(usable, delta_loss * factor / tl.where(usable, divisor, 1.0), 0.0)
    sums = _add_rollouts(part, share, PRODUCT)
    unit = tl.arange(0, carried.shape[1])[None, :]
    parity = tl.arange(0, sums.shape[0])[:, None]
    step_ptr = sums_ptr + tl.cast(step, tl.int64) * (sizes[0] * batch)
    mask = (parity < 2) & (unit < sizes[0])
    tl.store(step_ptr + ((parity + first) % 2).to(tl.int64) * half + unit, sums, mask)
    return delta_h


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "counters_low", "counters_high"])
def fused_kernel(
    clean,  # two tensors (time, batch, hidden), any strides, or None: what `cell_triton` says the nonlinearity takes
    weight_ptr,  # (hidden, hidden), contiguous, operand type
    loss,  # grad, error or probs (time, batch, outputs); target, share (time, batch); readout (outputs, hidden)
    start_ptr,  # (batch, rollouts, hidden), contiguous, operand type: first delta_h / scale; None is zero
    results,  # delta_loss; None; None; last delta_h, as start; sums (tiles, 2, time, batch, hidden), contiguous
    seed_ptr,  # ()
    strides,  # of the two clean tensors, grad (3 each), target, share (2 each)
    time,
    batch,
    rollouts,
    sizes,  # hidden, outputs
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    METHOD: tl.constexpr,
    PRODUCT: tl.constexpr,
    NOISE: tl.constexpr,
    NONLINEARITY: tl.constexpr,
    LOSS: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """Run rollouts through all steps: a program owns BLOCK_ROWS rollouts of one sample and all their units."""
    SCALED: tl.constexpr = PRECISION == "fp16"
    DOT: tl.constexpr = "ieee" if PRECISION == "fp32" else "tf32"
    place, rollout, column = _place_of_program(batch, rollouts, BLOCK_ROWS, 1)
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
    deviation = tl.cast(1.0 if SCALED or METHOD == "np" else scale, tl.float32)
    low, high = tl.cast(counters_low, tl.int64), tl.cast(counters_high, tl.int64)
    first = (high & 1).to(tl.int32)
    half = tl.cast(time, tl.int64) * batch * sizes[0]
    tile = tl.program_id(0) % tl.cdiv(rollouts, BLOCK_ROWS)
    sums_ptr = results[4] + (2 * tile * half + place[0] * sizes[0])

    # A product even where there is no start: it gives the noise the accumulator's layout.
    state = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), weight.dtype)
    state_place = first_row * sizes[0] + (local[:, None] * sizes[0] + unit[None, :])
    state_mask = exists[:, None] & inside[None, :]
    if start_ptr is not None:
        state = tl.load(start_ptr + state_place, state_mask, 0.0)
    carried = tl.dot(state, weight, input_precision=DOT)
    noise = None
    if METHOD != "np":
        carried += _noise_of_step(seed, low, high, 0, column, rollout, carried, deviation, NOISE, FAST)
    tl.debug_barrier()
    for step in tl.range(0, time - 1, num_stages=1):
        if METHOD == "np":
            injected = _noise_of_step(seed, low, high, step, column, rollout, carried, deviation, NOISE, FAST)
            delta_h = _step(
                carried, injected, readout, clean, loss, results, strides, step, place, sizes, scale,
                sums_ptr, half, first, METHOD, PRODUCT, NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL,
            )  # fmt: skip
            carried = tl.dot(delta_h.to(weight.dtype), weight, input_precision=DOT)
        else:
            delta_h = _step(
                carried, None, readout, clean, loss, results, strides, step, place, sizes, scale,
                sums_ptr, half, first, METHOD, PRODUCT, NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL,
            )  # fmt: skip
            injected = _noise_of_step(seed, low, high, step + 1, column, rollout, carried, deviation, NOISE, FAST)
            carried = tl.dot(delta_h.to(weight.dtype), weight, injected, input_precision=DOT)
    if METHOD == "np":
        noise = _noise_of_step(seed, low, high, time - 1, column, rollout, carried, deviation, NOISE, FAST)
    delta_h = _step(
        carried, noise, readout, clean, loss, results, strides, time - 1, place, sizes, scale,
        sums_ptr, half, first, METHOD, PRODUCT, NONLINEARITY, LOSS, PRECISION, FAST, WIDE, FULL,
    )  # fmt: skip
    if SCALED:
        delta_h = delta_h * scale
    tl.store(results[3] + state_place, delta_h.to(results[3].dtype.element_ty), state_mask)


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
        _add_partials_kernel[(triton.cdiv(elements, SUM_BLOCK),)](
            sums, partials, len(partials), elements, BLOCK=SUM_BLOCK, num_warps=4
        )
    return sums


def preferred_launch(
    preact: Tensor, weight_hh: Tensor, loss: Loss, method: str, options: RolloutOptions
) -> RolloutLaunch | None:
    """Return the tiles of the fused kernel, or None where rollouts are run and then summed."""
    signal = _signal(loss)
    served = options.precision in OPERAND_DTYPES and preact.dtype != torch.float64 != weight_hh.dtype
    safe = method == "np" or SAFE_TO_SQUARE[0] < options.sigma < SAFE_TO_SQUARE[1]
    if not served or not safe or 0 in {*preact.shape, options.rollouts} or signal.kind in {"none", "outputs"}:
        return None
    arch, units = _arch(preact.device), preact.shape[2]
    launch = rollout_launch(
        units=units,
        outputs=units if signal.readout is None else signal.readout.shape[0],
        loss=signal.kind,
        has_readout=signal.readout is not None,
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
    method: str,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    delta_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run rollouts in the tiles of `tiles.fused_launch`; arguments as in `adjoint.rollout_adjoint`.

    Loss differences go to `delta_loss`, (T, B, P), contiguous, float32. Returns the sums of each tile of a sample's
    rollouts, (tiles, 2, T, B, H), and the last delta_h, (B, P, H).
    """
    time, batch, units = preact.shape
    signal = _signal(loss)
    operand = OPERAND_DTYPES[options.precision]
    readout = None if signal.readout is None else signal.readout.to(operand).contiguous()
    scale = options.sigma if options.precision == "fp16" else 1.0
    start = None if delta_h0 is None else (delta_h0 / scale).to(operand).contiguous()
    tiles = triton.cdiv(options.rollouts, launch.block_rows)
    sums = preact.new_empty((tiles, 2, time, batch, units), dtype=torch.float32)
    kept = torch.float32 if operand is torch.float32 else torch.bfloat16
    delta_h = preact.new_empty((batch, options.rollouts, units), dtype=kept)
    low, high = counter_words(counters)
    clean = _clean(preact, hidden, options)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(preact):
        fused_kernel[(batch * tiles,)](
            clean,
            weight_hh.to(operand).contiguous(),
            (signal.values, signal.target, signal.share, readout),
            start,
            (delta_loss, None, None, delta_h, sums),
            seed,
            (
                _strides(clean[0], 3),
                _strides(clean[1], 3),
                _strides(signal.values, 3),
                _strides(signal.target, 2),
                _strides(signal.share, 2),
            ),
            time,
            batch,
            options.rollouts,
            (units, units if readout is None else readout.shape[0]),
            float(options.sigma),
            low,
            high,
            METHOD=method,
            PRODUCT=launch.product,
            NOISE=options.noise,
            NONLINEARITY=options.nonlinearity,
            LOSS=signal.kind,
            PRECISION=options.precision,
            FAST=_fast(options),
            WIDE=_wide(options),
            FULL=units == launch.block_units,
            BLOCK_ROWS=launch.block_rows,
            BLOCK_UNITS=launch.block_units,
            BLOCK_OUTPUTS=max(launch.block_outputs, 16),
            num_warps=launch.warps,
            num_stages=launch.stages,
            maxnreg=launch.registers,
            enable_fp_fusion=True,
        )
    return sums, delta_h
