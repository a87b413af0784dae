"""Cells in Triton: the change of a state that a change of its pre-activations makes, as device functions.

Contract and equations: `cell.py`. Kernels take a device function as their constexpr CELL. Each has the arguments

    delta_a         deviation of the pre-activations, (rows, units), float32
    first, second   what of the clean run the cell takes, (1, units) or (rows, units), or None: see `CellForm`
    factor          float32 scalar, by which the result is multiplied; SCALED says whether it differs from 1
    FAST            the GPU's approximate functions serve
    ACCURATE        operands are float32
    WIDE            delta_a may be large

and returns delta_h times the factor, (rows, units).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cell import PLAIN_DIFFERENCE_ABOVE
from .tiles import QUOTIENT_BLOCK

QUOTIENT_UP_TO = tl.constexpr(PLAIN_DIFFERENCE_ABOVE)
ABOVE_ONE = tl.constexpr(1 + 2.0**-23)
EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)

LEAST_SLOPE = 2.0**-60
"""Of tanh, in quotient rows: the product of two inverses must be finite in float32."""


@triton.jit
def fast_tanh(x):
    """Return tanh within 2^-11 relative, one instruction on a GPU."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_reciprocal(x):
    """Return 1 / x within one unit in the last place, one instruction on a GPU."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def shared_reciprocal(x):
    """Return 1 / x within three units in the last place, for x between 2^-63 and 2^63.

    Two elements share the reciprocal of their product, because a GPU computes fewer special functions than products.
    In an accumulator's layout the two are neighbouring units of one rollout: NaN and inf stay in their rollout.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 both;
        mul.f32 both, $2, $3;
        rcp.approx.ftz.f32 both, both;
        mul.f32 $0, both, $3;
        mul.f32 $1, both, $2;
        }""",
        "=&f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def accurate_tanh(x):
    """Return tanh within 1e-6 relative: a polynomial near zero, elsewhere (1 - e) / (1 + e), e = exp(-2 |x|)."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    far = (1 - decay) / (1 + decay)
    return tl.where(size < 0.3, x * series, tl.where(x < 0, -far, far))


@triton.jit
def tanh_deviation(
    delta_a,
    first,
    second,
    factor,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
    ACCURATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return (tanh(a + delta_a) - tanh(a)) * factor.

    WIDE: `first` and `second` are a and h, and where |delta_a| > 0.5 the plain difference is taken; ACCURATE then takes
    the slope 1 - h^2 from a, which is exact for saturated units too. Otherwise they are None and h, or (the factor
    being 1) the two tensors of `_quotient_rows`, and the quotient form serves for every delta_a: it is never NaN and at
    most 2 in size, but where a large delta_a undoes the saturation of its unit its relative error grows to
    2^-11 / (1 + h tanh(delta_a)).
    """
    change = fast_tanh(delta_a) if FAST else accurate_tanh(delta_a)
    if WIDE or first is None:
        if ACCURATE:
            tail = tl.exp(-2 * tl.abs(first))
            slope = 4 * tail / ((1 + tail) * (1 + tail))
        else:
            slope = 1 - second * second
        slope = slope * factor
        # One unit in the last place above 1, so that h = -th = +-1 does not give 0 / 0.
        denominator = second * change + ABOVE_ONE
        result = change * slope * fast_reciprocal(denominator) if FAST else change * slope / denominator
    else:
        denominator = second * change + first
        result = change * shared_reciprocal(denominator) if FAST else change / denominator
    if WIDE:
        moved = first + delta_a
        plain = (fast_tanh(moved) if FAST else accurate_tanh(moved)) - second
        result = tl.where(tl.abs(delta_a) > QUOTIENT_UP_TO, plain * factor, result)
    return result


@triton.jit
def relu_deviation(
    delta_a,
    first,
    second,
    factor,
    SCALED: tl.constexpr,
    FAST: tl.constexpr,
    ACCURATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return (relu(a + delta_a) - relu(a)) * factor; `first` is a, `second` None."""
    below = tl.minimum(first, 0.0, propagate_nan=EVERY_NAN)
    above = tl.maximum(first, 0.0, propagate_nan=EVERY_NAN)
    result = tl.maximum(delta_a + below, -above, propagate_nan=EVERY_NAN)
    if SCALED:
        result = result * factor
    return result


@triton.jit(do_not_specialize=["elements", "most"])
def _quotient_kernel(
    inverse_ptr,  # (elements), contiguous, float32
    ratio_ptr,  # (elements), contiguous, float32
    preact_ptr,  # (elements), contiguous
    hidden_ptr,  # (elements), contiguous
    elements: tl.int64,
    most,
    BLOCK: tl.constexpr,
):
    """Write 1 / s, one unit in the last place above it, and h / s: a program owns BLOCK elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    preact = tl.load(preact_ptr + element, inside, 0.0).to(tl.float32)
    # Below the least slope's, so that nothing is divided by zero.
    tail = tl.maximum(tl.exp(-2 * tl.abs(preact)), 0.125 / most, propagate_nan=EVERY_NAN)
    inverse = tl.minimum((1 + tail) * (1 + tail) / tail * 0.25, most, propagate_nan=EVERY_NAN)
    hidden = tl.load(hidden_ptr + element, inside, 0.0).to(tl.float32)
    # So that h = -th = +-1 does not give 0 / 0.
    tl.store(inverse_ptr + element, inverse * ABOVE_ONE, inside)
    tl.store(ratio_ptr + element, hidden * inverse, inside)


def _quotient_rows(preact: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `cell.quotient_rows` does, 1 / s one unit in the last place above it, float32."""
    preact, hidden = preact.contiguous(), hidden.contiguous()
    inverse, ratio = (torch.empty_like(preact, dtype=torch.float32) for _ in range(2))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(preact):
        _quotient_kernel[(triton.cdiv(preact.numel(), QUOTIENT_BLOCK),)](
            inverse, ratio, preact, hidden, preact.numel(), 1 / LEAST_SLOPE, BLOCK=QUOTIENT_BLOCK, num_warps=4
        )
    return inverse, ratio


def _tanh_rows(preact: Tensor, hidden: Tensor, wide: bool, quotient: bool) -> tuple[Tensor | None, Tensor]:
    """Return the rows of `tanh_deviation`."""
    if quotient:
        return _quotient_rows(preact, hidden)
    return (preact if wide else None), hidden


def _relu_rows(preact: Tensor, hidden: Tensor, wide: bool, quotient: bool) -> tuple[Tensor, None]:
    """Return the rows of `relu_deviation`."""
    return preact, None


class CellForm(NamedTuple):
    """A cell on this backend."""

    deviation: Any
    """The device function, with the arguments above."""
    clean_rows: Callable[[Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]
    """From a and h, (T, B, H), whether delta_a may be large (WIDE), and whether quotient rows serve, where the cell
    has them: the device function's `first` and `second`, (T, B, H) each, or None."""


CELLS = {
    "tanh_deviation": CellForm(tanh_deviation, _tanh_rows),
    "relu_deviation": CellForm(relu_deviation, _relu_rows),
}


def cell_form(name: str) -> CellForm:
    """Return the cell whose device function has this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CELLS:
        raise ValueError(f"backend triton has no cell {name!r}, only {sorted(CELLS)}")
    return CELLS[name]
