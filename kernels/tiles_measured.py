"""Tiles of the rollouts' kernels that were measured, as data: `tiles.py` chooses among them.

All on one H200 with bfloat16 operands, Rademacher noise, tanh and a linear loss, delta_a stored, in CUDA graphs, at
4,096, 16,384 and 65,536 rows (B P): `profiling/results/kernels-h200-2026-11-26.txt`, commit 4b6f516.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OPERAND_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}

ALIGNED_UNITS = 64
"""Hidden units from which rows of delta_a are padded to 16 elements, so that they are written 16 bytes at a time."""

MANY_ROWS = 132 * 128
"""Rows that give each of 132 multiprocessors a tile of 128, or two tiles of 64."""


@dataclass(frozen=True)
class ResidentTile:
    """A program of the resident form."""

    rows: int
    warps: int
    registers: int | None = None
    """Bound on a thread's registers."""
    up_to: float = math.inf
    """Rows of a block of rollouts up to which it is taken."""


RESIDENT_TILES = {
    # Not measured, as 64 units; they need no bound.
    16: (ResidentTile(64, 4),),
    32: (ResidentTile(64, 4),),
    # Microseconds a step at 16,384 rows: 2.0; without the bound 3.2, though registers and spills are the same.
    64: (ResidentTile(64, 4, registers=128),),
    # At 16,384 and 65,536 rows 3.3 and 12.5; with the bound, a third program on a multiprocessor and some spills, 3.6
    # and 10.8; with 128 rows and 8 warps 4.2 and 16.4.
    128: (ResidentTile(64, 4, up_to=MANY_ROWS), ResidentTile(64, 4, registers=168)),
    # One program on a multiprocessor, 4.6 for a wave of 64 rows and 8.2 of 128: at 4,096 rows 4.6 and 7.5, at 16,384
    # 9.7 and 8.3, at 65,536 38.8 and 32.7.
    256: (ResidentTile(64, 4, up_to=MANY_ROWS // 2), ResidentTile(128, 8)),
}
"""By padded hidden units, on compute capability 90 with 16-bit operands, in the order of `up_to`: lines `kind=tile`."""


@dataclass(frozen=True)
class StepTile:
    """A program of the stepwise form."""

    rows: int
    units: int
    warps: int
    stages: int
    described: bool = False
    """Tensors by descriptors (TMA)."""
    early: bool = False
    """Clean rows are loaded before the product."""
    parts: int = 1
    """Parts of the epilogue, each a share of the units."""
    dependent: bool = False
    """Programs start while those of the step before finish (programmatic dependent launch)."""
    inner: int = 64
    """Units of one step of the product's inner loop."""
    up_to: float = math.inf
    """Hidden units up to which it is taken."""


ONE_WAVE = 132
"""Programs that a large GPU runs at once, one on each multiprocessor."""

FEW_ROWS_TILE = StepTile(128, 128, 8, 3, early=True)
"""Where it makes no more than ONE_WAVE programs: 9.1 us a step at 4,096 rows of 512 units, `ptr 128x128 w8 s3 early`;
`STEP_TILES` 9.6, and commit 4b6f516's tile of 128 x 256 16.4."""

STEP_TILES = (
    # `tma+st 64x256 w4 s2 early pdl`: 23.9 us a step at 16,384 rows of 512 units; commit 4b6f516 34.1, the other 26.8.
    StepTile(64, 256, 4, 2, described=True, early=True, dependent=True, up_to=768),
    # `tma+st 128x128 w4 s3 sub2 pdl`: 74.8 at 16,384 rows of 1,024 units, 235 of 2,048; commit 4b6f516 90 and 295. The
    # best persistent kernels are at most 2.1 % faster there, and 1 % slower to 2 % faster at 4,096 and 65,536 rows.
    StepTile(128, 128, 4, 3, described=True, parts=2, dependent=True),
)
"""On compute capability 90 with 16-bit operands, in the order of `up_to`: lines `kind=step`. Measured with P a multiple
of a tile's rows; tiles of several whole samples, and of one that does not fill them, were not."""

LOOSE_TILE = StepTile(128, 128, 8, 3)
"""Of the same where rollouts fill no such tile: rows are taken as they come, by pointers. Not measured so."""


JOINED_OUTPUTS, JOINED_GATED_OUTPUTS = 32, 16
"""Outputs of a readout, and of one behind a cell with gates, up to which a step measures the step before.

A launch of its own behind every step took 4.2 us at 4,096 rows of 512 units, beside 14.7 of the step, and 13.6 at
16,384 rows of 1,024, beside 83: lines `kind=kernel`. What this takes has not been measured. The bounds follow from the
compile table: with 64 outputs fp32 and tf32 spill in the product's loop on compute capability 100 and 80, and two
programs of 128 x 128 no longer find shared memory on 90; with 32 a GRU spills there on 80."""


def next_power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """Return count / size, rounded up."""
    return -(-count // size)


def resident_tile(block_units: int, batch: int, rollouts: int, precision: str, arch: int) -> ResidentTile:
    """Return the resident form's program."""
    if precision == "fp32" or arch // 10 not in {9, 10}:
        # The state passes through shared memory on other architectures; small tiles keep two programs there.
        warps = 8 if block_units >= 256 and arch // 10 not in {9, 10} else 4
        return ResidentTile(32 if precision == "fp32" else 64, warps)
    # 128 rows: two groups of four warps, each with 64 rows of the matrix unit.
    tiles: tuple[ResidentTile, ...] = (ResidentTile(64, 4, up_to=MANY_ROWS - 1), ResidentTile(128, 8))
    if arch // 10 == 9 and OPERAND_BYTES[precision] == 2:
        tiles = RESIDENT_TILES.get(block_units, tiles)
    tile = next(tile for tile in tiles if batch * rollouts <= tile.up_to)
    return tiles[0] if tile.rows == 128 and _wastes_wide_tiles(rollouts) else tile


def step_tile(units: int, batch: int, rollouts: int) -> tuple[StepTile, str]:
    """Return the stepwise form's program on Hopper, and why."""
    few = FEW_ROWS_TILE
    samples = samples_of_step(few, rollouts)
    rows = ceil_div(batch, samples) * ceil_div(rollouts, few.rows) if samples else 0
    if samples and rows * ceil_div(units, few.units) <= ONE_WAVE:
        return few, "tiles by pointers: they are few"
    if units < ALIGNED_UNITS:
        return LOOSE_TILE, f"tiles by pointers: rows of {units} units are not aligned"
    tile = next(tile for tile in STEP_TILES if units <= tile.up_to)
    if not samples_of_step(tile, rollouts):
        return LOOSE_TILE, f"tiles by pointers: {rollouts} rollouts of a sample do not fill {tile.rows} rows"
    return tile, "tiles by descriptors"


def plain_tile(rollouts: int, precision: str, arch: int) -> StepTile:
    """Return the stepwise form's program where none was measured."""
    if precision == "fp32":
        return StepTile(64, 64, 4, 2, inner=32)
    if precision == "tf32":
        return StepTile(128, 128, 8, 3, inner=32)
    if arch // 10 not in {9, 10}:
        return StepTile(128, 128, 8, 3, inner=32)
    # Clean values of several samples are a whole tile: a wider one spills.
    return StepTile(128, 256 if rollouts >= 128 else 128, 8, 3)


def gated_tile(gates: int, wide: bool, rollouts: int, precision: str, arch: int) -> StepTile:
    """Return the program of a gated cell's step, which has an accumulator for each gate.

    More units would leave too few registers: in the product's loop, or behind it, where each clean value is a whole
    tile because the rows are of several samples.
    """
    if precision == "fp32":
        return StepTile(64, 32, 4, 2, inner=16)
    if precision == "tf32":
        return StepTile(128, 32, 8, 3, inner=32)
    warpgroups, rows = arch // 10 in {9, 10}, 128
    room = rollouts >= rows and (gates < 4 or (warpgroups and not wide))
    return StepTile(rows, 64 if room else 32, 8, 3, inner=64 if warpgroups else 32)


def samples_of_step(tile: StepTile, rollouts: int) -> int:
    """Return the samples of a tile: 1, several whole ones, or 0 where it would be emptier than by a quarter."""
    if rollouts < tile.rows and rollouts == next_power_of_two(rollouts):
        return tile.rows // rollouts
    return int(4 * rollouts >= 3 * tile.rows)


def _wastes_wide_tiles(rollouts: int) -> bool:
    """Return whether tiles of 128 rows are emptier than tiles of 64 by more than an eighth of the rollouts."""
    waste = -rollouts % 128 - -rollouts % 64 if rollouts > 64 else 0
    return waste > rollouts // 8


def pieces_of(tile: ResidentTile, block_units: int, precision: str, arch: int) -> int:
    """Return in how many pieces a clean row is loaded: on Hopper so many that a piece has a unit for two threads.

    A longer one passes through shared memory, which costs barriers and registers. Elsewhere it is cheaper that way.
    """
    if arch // 10 == 9 and precision != "fp32":
        return max(1, block_units // tile.rows)
    return 2 if block_units >= 256 else 1
