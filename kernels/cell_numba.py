"""Cells inside a compiled step: delta_h of one rollout from its delta_a, (B P, H or more), into a row of (B P, H).

For tanh, with x = delta_a and s = 1 - h^2,

    tanh x = n / d,  n = x (105 + 10 x^2),  d = 105 + x^2 (45 + x^2)    four terms of Lambert's continued fraction
    delta_h = n / (d / s + n h / s)                                     the quotient form with one division

whose relative error, x^8 / 99225, is below float32's rounding up to |x| = 0.5. Beyond, the plain difference is taken as
in the reference, with tanh from the same fraction of x / 16 and four doublings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .cell import PLAIN_DIFFERENCE_ABOVE, RELU, TANH, CellForms, limit_rows, quotient_rows
from .compile_numba import inlined, summing

_F = np.float32
_BOUND = _F(PLAIN_DIFFERENCE_ABOVE)
_SATURATED = _F(9.5)

TANH_BRANCH, RELU_BRANCH = TANH.numba, RELU.numba
_CLEAN_ROWS = {TANH_BRANCH: quotient_rows, RELU_BRANCH: limit_rows}


def clean_rows(cell: CellForms, preact: Tensor, hidden: Tensor) -> tuple[int, tuple[Tensor, Tensor]]:
    """Return the cell's branch in `rollout_numba`, and what that takes of the clean run: two tensors, (T, B, H).

    Raises:
        ValueError: the cell has no branch here.
    """
    branch: int = cell.on("numba")
    if branch not in _CLEAN_ROWS:
        raise ValueError(
            f"cell {cell.name!r} asks for branch {branch!r} of backend 'numba', which has {list(_CLEAN_ROWS)}"
        )
    return branch, _CLEAN_ROWS[branch](preact, hidden)


@inlined
def _tanh(x: Any) -> Any:
    """Return tanh in float32, by the fraction of x / 16 and four doublings of n / d."""
    x = _SATURATED if x > _SATURATED else (-_SATURATED if x < -_SATURATED else x)
    x *= _F(1 / 16)
    square = x * x
    n = x * (_F(1) + square * _F(10 / 105))
    d = _F(1) + square * (_F(45 / 105) + square * _F(1 / 105))
    for _ in range(4):
        n, d = _F(2) * n * d, n * n + d * d
    return n / d


@summing
def tanh_row(moved: Any, row: Any, delta_h: Any, inverse: Any, ratio: Any, step: Any, sample: Any, units: Any) -> Any:
    """Write delta_h by the quotient; return how many units it does not hold for."""
    large = _F(0)
    for unit in range(units):
        x = moved[row, unit]
        square = x * x
        n = x * (_F(105) + _F(10) * square)
        d = _F(105) + square * (_F(45) + square)
        delta_h[row, unit] = n / (d * inverse[step, sample, unit] + n * ratio[step, sample, unit])
        # A NaN is not small either.
        large += _F(0) if abs(x) <= _BOUND else _F(1)
    return large


@inlined
def plain_row(moved: Any, row: Any, delta_h: Any, preact: Any, step: Any, sample: Any, units: Any) -> None:
    """Write the plain difference where the quotient does not hold."""
    for unit in range(units):
        x, a = moved[row, unit], preact[step, sample, unit]
        plain = _tanh(a + x) - _tanh(a)
        delta_h[row, unit] = delta_h[row, unit] if abs(x) <= _BOUND else plain


@inlined
def relu_row(moved: Any, row: Any, delta_h: Any, below: Any, above: Any, step: Any, sample: Any, units: Any) -> None:
    """Write delta_h of a rectified rollout."""
    for unit in range(units):
        raised, least = moved[row, unit] + below[step, sample, unit], above[step, sample, unit]
        # Written so that a NaN stays one.
        delta_h[row, unit] = least if raised < least else raised
