"""Gated cells inside a compiled step: the deviation of one rollout's state from its recurrent product, in place.

The quotient and its fraction are those of `cell_numba`, with sigma(a) = (1 + tanh(a / 2)) / 2; where the change of a
pre-activation is too large for it, the exact difference of the reference is taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cell import PLAIN_DIFFERENCE_ABOVE, CellForms
from .cell_gated import GRU, LSTM, GruDeviation, LstmDeviation
from .compile_numba import inlined, summing

_F = np.float32
_BOUND = _F(PLAIN_DIFFERENCE_ABOVE)

GRU_BRANCH, LSTM_BRANCH = GRU.numba, LSTM.numba


def clean_values(cell: CellForms, preact: Tensor, hidden: Tensor) -> tuple[int, Tensor]:
    """Return the cell's branch in `rollout_numba`, and what that takes of the clean run, (T, B, n H).

    Raises:
        ValueError: the cell has no branch here.
    """
    branch: int = cell.on("numba")
    if branch == GRU_BRANCH:
        gru = GruDeviation(preact, (preact, hidden))
        values = [_whole(part) for part in (gru.gates, gru.candidate)]
        return branch, torch.cat([*values, *_stacked(gru.rows)], -1)
    if branch == LSTM_BRANCH:
        lstm = LstmDeviation(preact, (preact, hidden))
        values = [_whole(part) for part in (lstm.gates, lstm.read)]
        return branch, torch.cat([*values, *_stacked(lstm.rows)], -1)
    raise ValueError(
        f"cell {cell.name!r} asks for branch {branch!r} of backend 'numba', which has {[GRU_BRANCH, LSTM_BRANCH]}"
    )


def _whole(differences: Any) -> Tensor:
    """Return a, 1 / s and h / s, each with its factor, (T, B, 3 N)."""
    return torch.cat((differences.preact, differences.inverse, differences.ratio), -1).squeeze(2)


def _stacked(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the values of all steps, (T, B, H) each."""
    return [torch.stack(values).squeeze(2) for values in zip(*rows, strict=True)]


@summing
def _quotients(
    moved: Any, row: Any, first: Any, last: Any, scale: Any, target: Any, place: Any, clean: Any, at: Any, apart: Any
) -> Any:
    """Write the differences of some pre-activations by the quotient; return how many it does not hold for.

    The changes, moved[row, first:last], are scaled in place; clean[at + first:] holds a, and `apart` and twice as much
    behind it 1 / s and h / s.
    """
    large = _F(0)
    for number in range(first, last):
        x = scale * moved[row, number]
        moved[row, number] = x
        square = x * x
        n = x * (_F(105) + _F(10) * square)
        d = _F(105) + square * (_F(45) + square)
        target[place, number] = n / (d * clean[at + apart + number] + n * clean[at + 2 * apart + number])
        # A NaN is not small either.
        large += _F(0) if abs(x) <= _BOUND else _F(1)
    return large


@inlined
def _sigmoid(x: Any) -> Any:
    return _F(1) / (_F(1) + np.exp(-x))


@inlined
def _exactly(
    moved: Any, row: Any, first: Any, last: Any, factor: Any, target: Any, place: Any, clean: Any, at: Any
) -> None:
    """Write the exact difference where the quotient does not hold."""
    for number in range(first, last):
        x, a = moved[row, number], clean[at + number]
        if not abs(x) <= _BOUND:
            sign = _F(2) if x > _F(0) else _F(-2)
            grown = -sign * np.expm1(_F(-2) * abs(x))
            target[place, number] = factor * grown * _sigmoid(-sign * a) * _sigmoid(sign * (a + x))


@inlined
def gru_row(moved: Any, row: Any, state: Any, scratch: Any, place: Any, clean: Any, units: Any) -> None:
    """Write delta_h of a GRU, without its noise, over that of the step before, state[row].

    Args:
        moved: W_hh delta_h of the step before, (B P, 3 H or more), overwritten.
        row: which rollout.
        state: (B P, H).
        scratch: written, (rows, 3 H or more).
        place: row of the scratch.
        clean: of the step and sample, (13 H,).
        units: H.
    """
    gates, half = 2 * units, _F(0.5)
    if _quotients(moved, row, 0, gates, half, scratch, place, clean, 0, gates) > _F(0):
        _exactly(moved, row, 0, gates, half, scratch, place, clean, 0)
    rest = 9 * units
    for unit in range(units):
        q, delta_q = clean[rest + 2 * units + unit], moved[row, gates + unit]
        moved[row, gates + unit] = clean[rest + unit] * delta_q + scratch[place, unit] * (q + delta_q)
    # The candidate's values begin at 6 H, and its changes at 2 H.
    if _quotients(moved, row, gates, gates + units, _F(1), scratch, place, clean, 4 * units, units) > _F(0):
        _exactly(moved, row, gates, gates + units, _F(1), scratch, place, clean, 4 * units)
    for unit in range(units):
        delta_n = scratch[place, gates + unit]
        apart = state[row, unit] - delta_n
        update, away = clean[rest + units + unit], clean[rest + 3 * units + unit]
        state[row, unit] = delta_n + update * apart + scratch[place, units + unit] * (away + apart)


@inlined
def lstm_row(moved: Any, row: Any, state: Any, scratch: Any, place: Any, clean: Any, units: Any) -> None:
    """Write the deviations of h and c of an LSTM, without noise, over those of the step before, state[row].

    Arguments as in `gru_row`, with `moved` and `scratch` 4 H wide, `state` (B P, 2 H) and `clean` (21 H,).
    """
    gates, half = 4 * units, _F(0.5)
    large = _quotients(moved, row, 0, 2 * units, half, scratch, place, clean, 0, gates)
    large += _quotients(moved, row, 2 * units, 3 * units, _F(1), scratch, place, clean, 0, gates)
    large += _quotients(moved, row, 3 * units, gates, half, scratch, place, clean, 0, gates)
    if large > _F(0):
        _exactly(moved, row, 0, 2 * units, half, scratch, place, clean, 0)
        _exactly(moved, row, 2 * units, 3 * units, _F(1), scratch, place, clean, 0)
        _exactly(moved, row, 3 * units, gates, half, scratch, place, clean, 0)
    rest = 15 * units
    for unit in range(units):
        enter, keep, value = clean[rest + unit], clean[rest + units + unit], clean[rest + 2 * units + unit]
        held, memory = state[row, units + unit], clean[rest + 4 * units + unit]
        delta_value = scratch[place, 2 * units + unit]
        delta_c = keep * held + scratch[place, units + unit] * (memory + held)
        delta_c += enter * delta_value + scratch[place, unit] * (value + delta_value)
        state[row, units + unit] = delta_c
        # The inputs' gates are done with.
        moved[row, unit] = delta_c
    if _quotients(moved, row, 0, units, _F(1), scratch, place, clean, 12 * units, units) > _F(0):
        _exactly(moved, row, 0, units, _F(1), scratch, place, clean, 12 * units)
    for unit in range(units):
        delta_read, leave = scratch[place, unit], clean[rest + 3 * units + unit]
        read = clean[rest + 5 * units + unit]
        state[row, unit] = leave * delta_read + scratch[place, 3 * units + unit] * (read + delta_read)
