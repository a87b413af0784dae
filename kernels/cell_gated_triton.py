"""Gated cells in Triton: the change of a state that a recurrent product makes, as device functions.

    sigma(a + d) - sigma(a) = 2 p (1 - p) th / (1 + (2 p - 1) th)      p = sigma(a), th = tanh(d / 2)
    tanh(a + d) - tanh(a)   = (1 - n^2) th / (1 + n th)                n = tanh(a), th = tanh(d)

Slopes 2 p (1 - p) and 1 - n^2 come from a, which keeps those of saturated gates. Contract and the cells' equations:
`cell_gated.py`. `GATED_CELLS` says what each takes; kernels take a device function as their constexpr CELL. Each has
the arguments

    products        what PRODUCT takes
    held            what the cell carries in float32, of the step before, (rows, units): delta_c where it has a c, else
                    delta_h
    clean           `CleanStep`
    PRODUCT         device function: PRODUCT(products, number, FAST) is the deviation of the pre-activation of a gate,
                    (rows, units), float32, by its number in PyTorch's order. Each is asked for once, late: one that is
                    made on demand then shares its registers with the others
    FAST            the GPU's approximate functions serve
    WIDE            deviations may be large: where |d| > 0.5 an exact difference is taken, which needs a. Elsewhere the
                    quotient serves for all of them: see `cell_triton.tanh_deviation`

and returns delta_h without its noise, and delta_c (of a cell without c delta_h again), (rows, units). Derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell_gated import GRU_CLEAN, LSTM_CLEAN
from .cell_triton import ABOVE_ONE, QUOTIENT_UP_TO, accurate_tanh, fast_reciprocal, fast_tanh, shared_reciprocal
from .place_triton import gather_rows, spread


class CleanStep(NamedTuple):
    """Where the clean values of a program's rollouts and units are at a step."""

    rows: Any
    """`Rows` of a tensor (time, batch, n hidden), which holds n values of every unit."""
    step: Any
    sample: Any
    """Sample of each row, (rows, 1), or of as many rows as share one, (samples, 1), or a scalar."""
    unit: Any
    """(1, units)."""
    inside: Any
    """Whether a unit exists, (1, units)."""
    units: Any
    """Distance of a unit's values: H, or H padded."""
    row: Any
    """One number for each row, (rows,) or (rows, 1)."""


@triton.jit
def _value(clean, number: tl.constexpr):
    """Return a clean value of each unit: (1, units), or (rows, units) if the tile spans samples."""
    value = gather_rows(clean.rows, clean.step, clean.sample, clean.unit + number * clean.units, clean.inside)
    return spread(value, clean.row)


@triton.jit
def _gate(a, FAST: tl.constexpr):
    """Return sigma(a), in which nothing overflows."""
    decay = tl.exp(-tl.abs(a))
    above, below = tl.where(a > 0, 1.0, decay), 1 + decay
    return above * fast_reciprocal(below) if FAST else above / below


@triton.jit
def _exact(a, d, FAST: tl.constexpr):
    """Return sigma(a + d) - sigma(a) for any a and d: every factor is positive, so that nothing cancels."""
    sign = tl.where(d > 0, 1.0, -1.0)
    return sign * (1 - tl.exp(-tl.abs(d))) * _gate(-sign * a, FAST) * _gate(sign * (a + d), FAST)


@triton.jit
def _quotient(d, value, slope, FAST: tl.constexpr):
    """Return slope * tanh(d) / (1 + value * tanh(d))."""
    change = fast_tanh(d) if FAST else accurate_tanh(d)
    # One unit in the last place above 1, so that value = -tanh(d) = +-1 does not give 0 / 0.
    denominator = value * change + ABOVE_ONE
    return change * slope * shared_reciprocal(denominator) if FAST else change * slope / denominator


@triton.jit
def _gate_difference(d, p, slope, clean, AT: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr):
    """Return sigma(a + d) - sigma(a) from p = sigma(a) and 2 p (1 - p); AT: the number of a among the clean values."""
    result = _quotient(0.5 * d, 2 * p - 1, slope, FAST)
    if WIDE:
        result = tl.where(tl.abs(d) > 2 * QUOTIENT_UP_TO, _exact(_value(clean, AT), d, FAST), result)
    return result


@triton.jit
def _tanh_difference(d, value, slope, clean, AT: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr):
    """Return tanh(a + d) - tanh(a) from tanh(a) and its slope; AT as in `_gate_difference`."""
    result = _quotient(d, value, slope, FAST)
    if WIDE:
        exact = 2 * _exact(2 * _value(clean, AT), 2 * d, FAST)
        result = tl.where(tl.abs(d) > QUOTIENT_UP_TO, exact, result)
    return result


@triton.jit
def gru_deviation(products, held, clean, PRODUCT: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr):
    """Return delta_h of a GRU, twice: dn + z (delta_h' - dn) + dz ((h' - n) + (delta_h' - dn))."""
    reset = _value(clean, 0)
    delta_reset = _gate_difference(PRODUCT(products, 0, FAST), reset, _value(clean, 1), clean, 8, FAST, WIDE)
    delta_q = PRODUCT(products, 2, FAST)
    moved = reset * delta_q + delta_reset * (_value(clean, 6) + delta_q)
    delta_n = _tanh_difference(moved, _value(clean, 4), _value(clean, 5), clean, 10, FAST, WIDE)
    apart = held - delta_n
    update = _value(clean, 2)
    delta_update = _gate_difference(PRODUCT(products, 1, FAST), update, _value(clean, 3), clean, 9, FAST, WIDE)
    delta_h = delta_n + update * apart + delta_update * (_value(clean, 7) + apart)
    return delta_h, delta_h


@triton.jit
def lstm_deviation(products, held, clean, PRODUCT: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr):
    """Return delta_h and delta_c of an LSTM.

    delta_c = f delta_c' + df (c' + delta_c') + i dg + di (g + dg), and delta_h = o dt + do (tanh c + dt).
    """
    keep = _value(clean, 2)
    delta_keep = _gate_difference(PRODUCT(products, 1, FAST), keep, _value(clean, 3), clean, 12, FAST, WIDE)
    delta_c = keep * held + delta_keep * (_value(clean, 10) + held)
    value = _value(clean, 6)
    delta_value = _tanh_difference(PRODUCT(products, 2, FAST), value, _value(clean, 7), clean, 14, FAST, WIDE)
    enter = _value(clean, 0)
    delta_enter = _gate_difference(PRODUCT(products, 0, FAST), enter, _value(clean, 1), clean, 11, FAST, WIDE)
    delta_c += enter * delta_value + delta_enter * (value + delta_value)
    read, leave = _value(clean, 8), _value(clean, 4)
    delta_read = _tanh_difference(delta_c, read, _value(clean, 9), clean, 15, FAST, WIDE)
    delta_leave = _gate_difference(PRODUCT(products, 3, FAST), leave, _value(clean, 5), clean, 13, FAST, WIDE)
    return leave * delta_read + delta_leave * (read + delta_read), delta_c


def _of_gate(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = sigma(a) and 2 p (1 - p)."""
    p = torch.sigmoid(a)
    return p, torch.sigmoid(-a).mul_(p).mul_(2)


def _of_tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return n = tanh(a) and 1 - n^2."""
    return torch.tanh(a), torch.sigmoid(2 * a).mul_(torch.sigmoid(-2 * a)).mul_(4)


def _gru_values(preact: Tensor, hidden: Tensor, wide: bool) -> Tensor:
    """Return r, z and n, each with its slope, q, h' - n, and if `wide` a_r, a_z and a_n, (T, B, 8 H or 11 H)."""
    del hidden
    a_r, a_z, a_n, q, before = preact.float().chunk(GRU_CLEAN, -1)
    n, slope = _of_tanh(a_n)
    values = (*_of_gate(a_r), *_of_gate(a_z), n, slope, q, before - n)
    return torch.cat((*values, a_r, a_z, a_n) if wide else values, -1)


def _lstm_values(preact: Tensor, hidden: Tensor, wide: bool) -> Tensor:
    """Return i, f, o, g and tanh c, each with its slope, c', and if `wide` a_i, a_f, a_o, a_g and c.

    The result is (T, B, 11 H or 16 H).
    """
    a_i, a_f, a_g, a_o, before = preact.float().chunk(LSTM_CLEAN, -1)
    memory = hidden[..., hidden.shape[-1] // 2 :].float()
    squashed = (*_of_gate(a_i), *_of_gate(a_f), *_of_gate(a_o), *_of_tanh(a_g), *_of_tanh(memory))
    values = (*squashed, before)
    return torch.cat((*values, a_i, a_f, a_o, a_g, memory) if wide else values, -1)


class GatedForm(NamedTuple):
    """A gated cell on this backend."""

    deviation: Any
    """The device function, with the arguments above."""
    clean_values: Callable[[Tensor, Tensor, bool], Tensor]
    """From the clean values of `cell_gated`, (T, B, 5 H), the clean states, (T, B, S), and whether deviations may be
    large (WIDE): what the device function reads, (T, B, n H), contiguous, float32."""


GATED_CELLS = {
    "gru_deviation": GatedForm(gru_deviation, _gru_values),
    "lstm_deviation": GatedForm(lstm_deviation, _lstm_values),
}


def gated_form(name: str) -> GatedForm:
    """Return the gated cell whose device function has this name.

    Raises:
        ValueError: there is none.
    """
    if name not in GATED_CELLS:
        raise ValueError(f"backend triton has no gated cell {name!r}, only {sorted(GATED_CELLS)}")
    return GATED_CELLS[name]
