"""Launch configurations of least squares from shapes and operand type, and the table of what runs in torch instead.

Warps and tiles are those that one H200 measured as best at T, B, P, H = 200, 32, 128, 512 and 200, 32, 64, 512, where
their kernels were the same; the others follow from the compile table.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiles_measured import ceil_div, next_power_of_two

MOST_ROLLOUTS = 256
"""Beyond, a step of the recursion holds too much in registers."""

WIDEST_INVERSE = 128
"""Largest matrix that a program inverts in registers; a larger one is inverted as two by two blocks."""

ALIGNED = 16
"""Rows of matrices have room for a multiple of so many numbers, so that they are read 16 bytes at a time."""

SIGNS_PER_CHUNK = 128
"""Units whose signs four words hold; see `noise.py`."""

PREFETCHED = 64
"""Rollouts up to which the recursion loads a step's matrices while it works on the step before: 198 us instead of 254
at 64 rollouts, but 1,011 instead of 580 at 128."""


MOST_FEEDBACK_ROLLOUTS = 64
"""Of learned feedback. Beyond, what a step holds of its Gram matrix and of a tile of activity spills."""

MOST_FEEDBACK_UNITS = 1024
"""Of learned feedback: a program reads its H x H matrix at every step. At 64 bytes a cycle 4 MiB take 40 us at 1.8 GHz
(an estimate), a quarter of the 66 operations that a step takes in torch, which launch in 2 or 3 us each at best."""


@dataclass(frozen=True)
class FeedbackLaunch:
    """How the recursion of learned feedback is divided."""

    block: int
    """Rollouts of a tile, a power of two."""
    rows: int
    """Rows of the feedback matrix that are read at once."""
    units: int
    """Units of a tile: at most those whose signs are read at once."""
    warps: int


@dataclass(frozen=True)
class LeastSquaresLaunch:
    """How the kernels of least squares are divided."""

    block: int
    """Rollouts of a tile, a power of two."""
    tiles: int
    """Tiles of all rollouts."""
    gram_units: int
    """Units of a step of the inner loop of the Gram and noise products."""
    gram_warps: int
    gram_stages: int
    recursion_rows: int
    """Rows of a matrix that the recursion reads at once."""
    recursion_warps: int
    prefetches: bool
    sum_units: int = 64
    """Units of a program that sums activity over rollouts."""
    sum_warps: int = 4


@dataclass(frozen=True)
class PrimalLaunch:
    """How the kernels of the primal form are divided; not measured on a GPU."""

    block: int
    """Units, or rollouts, of a tile, a power of two."""
    tiles: int
    """Tiles of all units."""
    inner: int
    """Units of a step of the inner loop of the product with the inverses."""
    rollouts: int = 32
    """Rollouts of a step of the inner loop of the Gram matrices."""
    stages: int = 2
    warps: int = 4


@dataclass(frozen=True)
class InverseLaunch:
    """How a matrix is inverted."""

    block: int
    """Rows and columns that a program holds, a power of two."""
    panel: int
    """Rows that are eliminated at a time."""
    warps: int


def least_squares_obstacle(rollouts: int, units: int, *, path: bool, halves: bool) -> str:
    """Return why least squares runs in torch's batched operations instead of the kernels, or an empty string.

    Args:
        rollouts: P.
        units: H.
        path: whether a step hands on more than the state that is regressed, as an LSTM does.
        halves: whether the estimates of the even and the odd rollouts alone are wanted, too.
    """
    if path:
        return "what an LSTM's c hands on needs the estimate of each step before the next"
    if rollouts > MOST_ROLLOUTS:
        return f"{rollouts} rollouts are more than {MOST_ROLLOUTS}"
    if halves and rollouts > units:
        return f"{rollouts} rollouts are more than {units} units, and half of them may be fewer: halves need both forms"
    return ""


def least_squares_launch(rollouts: int, units: int, operand: str, *, packed: bool = True) -> LeastSquaresLaunch:
    """Return the division for P rollouts of H units.

    Args:
        rollouts: P, at most `MOST_ROLLOUTS`.
        units: H.
        operand: "bf16", "tf32" or "fp32".
        packed: whether the noise is packed signs; other noise is float32.
    """
    padded = max(16, next_power_of_two(rollouts))
    # With "fp32" every operand is split in two, and a tile of 128 rows spills.
    block = min(64 if operand == "fp32" else 128, padded)
    widest = {"bf16": 64 if packed else 32, "tf32": 32, "fp32": 16}[operand]
    return LeastSquaresLaunch(
        block=block,
        tiles=padded // block,
        gram_units=min(widest, max(16, next_power_of_two(units))),
        gram_warps=8 if block == 128 else 4,
        gram_stages=3 if operand == "bf16" and packed and padded == block else 2,
        recursion_rows=padded if padded <= 128 else 64,
        recursion_warps=8 if padded <= PREFETCHED else 16,
        prefetches=padded <= PREFETCHED,
    )


def primal_launch(units: int) -> PrimalLaunch:
    """Return the division for matrices of `units` rows."""
    padded = max(16, next_power_of_two(units))
    block = min(64, padded)
    return PrimalLaunch(block, tiles=padded // block, inner=min(32, padded))


def feedback_obstacle(rollouts: int, units: int, *, gated: bool) -> str:
    """Return why the recursion of learned feedback runs in torch's operations instead, or an empty string.

    Args:
        rollouts: P.
        units: H.
        gated: whether the cell makes its own adjoint of that of the state.
    """
    if gated:
        return "a gated cell's adjoint has no kernel"
    if rollouts > units:
        return f"{rollouts} rollouts are more than {units} units: the primal form has no kernel"
    if rollouts > MOST_FEEDBACK_ROLLOUTS:
        return f"{rollouts} rollouts are more than {MOST_FEEDBACK_ROLLOUTS}"
    if units > MOST_FEEDBACK_UNITS:
        return f"{units} units are more than {MOST_FEEDBACK_UNITS}"
    return ""


def feedback_launch(rollouts: int, units: int) -> FeedbackLaunch:
    """Return the division for P rollouts of H units, where there is no `feedback_obstacle`."""
    across = min(SIGNS_PER_CHUNK, max(16, next_power_of_two(units)))
    large = units > SIGNS_PER_CHUNK
    return FeedbackLaunch(
        block=max(16, next_power_of_two(rollouts)),
        rows=128 if large else min(64, across),
        units=across,
        warps=8 if units > 32 else 4,
    )


def inverse_launch(size: int) -> InverseLaunch:
    """Return the division for matrices of `size` rows, at most `WIDEST_INVERSE`."""
    block = max(16, next_power_of_two(size))
    return InverseLaunch(block, panel=16, warps=4 if block >= 64 else 2)


def blocks_of(size: int) -> tuple[int, int]:
    """Return the rows of the first and of the second diagonal block of a matrix, the second 0 where one holds it."""
    first = min(size, WIDEST_INVERSE)
    return first, size - first


def row_width(size: int) -> int:
    """Return the numbers that a row of a matrix has room for."""
    return ALIGNED * ceil_div(size, ALIGNED)


def sign_words(units: int) -> int:
    """Return the number of 32-bit words that hold the signs of H units."""
    return 4 * ceil_div(units, SIGNS_PER_CHUNK)
