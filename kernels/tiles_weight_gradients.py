"""Launch configurations of weight gradients, from shapes alone, so that results repeat.

None of it is measured. Tiles are as wide as 4 or 8 warps hold without spills, since a tile of 128 x 128 reads half as
much for as many products as one of 64 x 64; programs are two for each of the 132 multiprocessors of an H100 or H200.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiles_measured import ceil_div, next_power_of_two

PROGRAMS_WANTED = 264
"""Below, rows are split among programs."""

ROOM_FLOATS = 1 << 21
"""Partial sums of all splits together have at most so many floats."""

LEAST_ROWS, CHUNK_ROWS = 256, 1024
"""Of a split; and rows that a tensor core sums before what it found is added to a sum of its own, in float32: its own
sums are cut, not rounded, and would lose a bit more with every row."""

REDUCED = 1024
"""Numbers of a program that adds up splits."""


@dataclass(frozen=True)
class WeightGradientsLaunch:
    """How the products of weight gradients are divided."""

    block_units: int
    """Rows of a tile of a weight, G, a power of two."""
    block_columns: int
    """Columns of it, n, a power of two."""
    inner: int
    """Steps and samples of a product of the inner loop."""
    warps: int
    stages: int
    unit_tiles: int
    column_tiles: tuple[int, int]
    """Of the first and of the second weight."""
    splits: int
    """Parts of all steps and samples."""
    split_rows: int
    """Steps and samples of each, a multiple of `inner`."""


def weight_gradients_launch(rows: int, parts: int, units: int, columns: tuple[int, int]) -> WeightGradientsLaunch:
    """Return the division.

    Args:
        rows: T B.
        parts: of the adjoint.
        units: G.
        columns: n of the first weight and of the second, 0 where there is one.
    """
    widest = 128 if min(units, max(columns)) > 64 else 64
    block_units, block_columns = (
        min(widest, max(16, next_power_of_two(size))) for size in (units, max(columns))
    )  # fmt: skip
    unit_tiles, tiles = ceil_div(units, block_units), tuple(ceil_div(size, block_columns) for size in columns)
    inner = 32
    size = parts * units * (sum(columns) + 1)
    most = max(1, min(rows // LEAST_ROWS, ROOM_FLOATS // size))
    split_rows = ceil_div(rows, min(most, ceil_div(PROGRAMS_WANTED, parts * unit_tiles * sum(tiles))))
    split_rows = max(inner, ceil_div(split_rows, inner) * inner)
    return WeightGradientsLaunch(
        block_units=block_units,
        block_columns=block_columns,
        inner=inner,
        warps=8 if block_units * block_columns > 64 * 64 else 4,
        stages=3,
        unit_tiles=unit_tiles,
        column_tiles=(tiles[0], tiles[1]),
        splits=max(1, ceil_div(rows, split_rows)),
        split_rows=split_rows,
    )
