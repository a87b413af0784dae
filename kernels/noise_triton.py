"""Counter-based noise in Triton: the device functions that every kernel inlines, and `noise` itself.

Contract, equations and counter layout: `noise.py`. Words and signs equal the reference bit for bit; Gaussians differ by
the fast logarithm, square root, sine and cosine of the GPU.

A tile of noise is written element by element, each element with its own Philox block. In the layout of a matrix unit's
accumulator, a lane's units of one row have the same blocks; the compiler sees it, and one Philox call serves up to 128
signs or 4 Gaussians. `pin` puts the counters in the accumulator's layout.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import UNITS_PER_GROUP, Counters, first_word
from .tiles import INTERPRETED, NOISE_LAUNCH

TWO_LN2 = tl.constexpr(2 * math.log(2))
RADIANS_PER_WORD = tl.constexpr(2 * math.pi * 2.0**-32)
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def counter_words(counters: Counters) -> tuple[int, int]:
    """Return (c1 << 32 | c0, c3 << 32 | c2) of a block's first element as signed 64-bit integers.

    Two integers of fixed type, because Triton compiles a kernel anew for some values of small integers and tuples.
    """
    low = (counters.time << 32) | first_word(counters)
    high = (((counters.rank << 20) | counters.sample) << 32) | counters.rollout
    return _signed(low), _signed(high)


def _signed(word: int) -> int:
    """Return a 64-bit word as the signed integer of the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


@triton.jit
def unpack_counters(low, high):
    """Return c0, c1, c2, c3 as uint32 scalars from the two integers of `counter_words`."""
    low, high = tl.cast(low, tl.int64), tl.cast(high, tl.int64)
    return low.to(tl.uint32), (low >> 32).to(tl.uint32), high.to(tl.uint32), (high >> 32).to(tl.uint32)


@triton.jit
def philox_words(seed, c0, c1, c2, c3):
    """Return the four Philox4x32-10 words of each counter as uint32; the counter words broadcast against each other."""
    return tl.philox(seed.to(tl.uint64, bitcast=True), c0, c1, c2, c3)


@triton.jit
def pin(counter, like):
    """Return a uint32 counter unchanged, tied to the layout of the float32 tile `like`.

    Only the last stage of compilation, after layouts are fixed, can tell that the added number is zero. Without it the
    noise itself goes to the accumulator's layout through shared memory.
    """
    return counter | ((like.to(tl.uint32, bitcast=True) & 1) >> 1)


@triton.jit
def rademacher_tile(seed, c0, c1, c2, c3, unit, scale):
    """Return +-scale as float32.

    seed: int64 scalar. c0: counter word of unit block 0. c1, c2, c3, unit: uint32, broadcasting to the tile's shape.
    scale: non-negative float32 scalar.
    """
    block = 4 * (unit // 512) + (unit % 8) // 2
    first, second, third, fourth = philox_words(seed, c0 + block, c1, c2, c3)
    index = (unit // 128) % 4
    low = tl.where(index == 0, first, second)
    high = tl.where(index == 2, third, fourth)
    word = tl.where(index < 2, low, high)
    bit = 2 * ((unit // 8) % 16) + unit % 2
    negative = scale.to(tl.uint32, bitcast=True) | 0x80000000
    return (((word << (31 - bit)) & 0x80000000) ^ negative).to(tl.float32, bitcast=True)


@triton.jit
def gaussian_tile(seed, c0, c1, c2, c3, unit, scale, FAST: tl.constexpr):
    """Return Gaussians of standard deviation `scale` as float32; arguments as in `rademacher_tile`.

    FAST: the GPU's approximate functions; False is Triton's own, which its interpreter can run.
    """
    block = 4 * (unit // 16) + (unit % 8) // 2
    first, second, third, fourth = philox_words(seed, c0 + block, c1, c2, c3)
    odd_pair = (unit // 8) % 2 == 1
    uniform = tl.where(odd_pair, third, first)
    turn = tl.where(odd_pair, fourth, second)
    argument = uniform.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    if FAST:
        # Signed: the same angle, in the range where the approximate functions are most accurate.
        angle = turn.to(tl.int32, bitcast=True).to(tl.float32) * RADIANS_PER_WORD
        # abs: the approximate logarithm of the last number below 1 may come out positive.
        radius = _approximate_sqrt(TWO_LN2 * tl.abs(_approximate_log2(argument))) * scale
        wave = tl.where(unit % 2 == 1, _approximate_sin(angle), _approximate_cos(angle))
    else:
        angle = turn.to(tl.float32) * RADIANS_PER_WORD
        radius = tl.sqrt(-2.0 * tl.log(argument)) * scale
        wave = tl.where(unit % 2 == 1, tl.sin(angle), tl.cos(angle))
    return radius * wave


@triton.jit
def _approximate_log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _approximate_sqrt(x):
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _approximate_sin(x):
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _approximate_cos(x):
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def noise_tile(seed, c0, c1, c2, c3, unit, scale, KIND: tl.constexpr, FAST: tl.constexpr):
    """Return a tile of noise of standard deviation `scale` as float32; KIND is "rademacher" or "gaussian"."""
    if KIND == "rademacher":
        tile = rademacher_tile(seed, c0, c1, c2, c3, unit, scale)
    elif KIND == "gaussian":
        tile = gaussian_tile(seed, c0, c1, c2, c3, unit, scale, FAST)
    else:
        tl.static_assert(False, "unknown kind of noise")
    return tile


@triton.jit(do_not_specialize=["batch", "rollouts", "rows", "counters_low", "counters_high"])
def _noise_kernel(
    noise_ptr,  # (time, batch, rollouts, hidden), contiguous
    seed_ptr,  # ()
    rows: tl.int64,
    batch,
    rollouts,
    hidden,
    sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    KIND: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Write noise: a program owns BLOCK_ROWS rows, each a (time, sample, rollout), and all their units."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rollout = row % rollouts
    sample = (row // rollouts) % batch
    step = row // rollouts // batch
    c0, c1, c2, c3 = unpack_counters(counters_low, counters_high)
    c1, c2, c3 = c1 + step.to(tl.uint32), c2 + rollout.to(tl.uint32), c3 + sample.to(tl.uint32)
    seed = tl.load(seed_ptr)
    scale = tl.cast(sigma, tl.float32)
    for start in range(0, hidden, BLOCK_UNITS):
        unit = start + tl.arange(0, BLOCK_UNITS)[None, :]
        tile = noise_tile(seed, c0, c1, c2, c3, unit.to(tl.uint32), scale, KIND, FAST)
        mask = (row < rows) & (unit < hidden)
        tl.store(noise_ptr + row * hidden + unit, tile.to(noise_ptr.dtype.element_ty), mask)


def noise(
    seed: Tensor,
    shape: tuple[int, int, int, int],
    *,
    sigma: float = 1.0,
    kind: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return noise of standard deviation `sigma`, shape (T, B, P, H); see `noise.noise`."""
    if dtype not in DTYPES:
        raise ValueError(f"backend triton has no noise of dtype {dtype}; it has float32, float16 and bfloat16")
    if kind not in UNITS_PER_GROUP:
        raise ValueError(f"noise {kind!r} is none of {sorted(UNITS_PER_GROUP)}")
    result = torch.empty(shape, dtype=dtype, device=seed.device)
    time, batch, rollouts, hidden = shape
    rows = time * batch * rollouts
    if result.numel() == 0:
        return result
    low, high = counter_words(counters)
    launch = NOISE_LAUNCH
    # Triton launches on the current device, which need not be the seed's.
    with torch.cuda.device_of(seed):
        _noise_kernel[(triton.cdiv(rows, launch.block_rows),)](
            result,
            seed,
            rows,
            batch,
            rollouts,
            hidden,
            float(sigma),
            low,
            high,
            KIND=kind,
            FAST=not INTERPRETED,
            BLOCK_ROWS=launch.block_rows,
            BLOCK_UNITS=launch.block_units,
            num_warps=launch.warps,
        )
    return result
