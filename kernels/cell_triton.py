# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What one step does to a tile of rollouts, as device functions: the nonlinearity's deviation and the loss differences.

Contract and equations: `rollout.py`. Both forms of the rollout kernel inline these.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN_DIFFERENCE_ABOVE = tl.constexpr(0.5)
ONE_AND_A_BIT = tl.constexpr(1 + 2.0**-23)
EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)


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

    Two share one reciprocal, that of their product: special functions are scarcer than products. In an accumulator's
    layout the two are neighbouring units of one rollout, so what is not finite stays in its rollout.
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
def tanh_deviation(delta_a, first, second, scale, FAST: tl.constexpr, ACCURATE: tl.constexpr, WIDE: tl.constexpr):
    """Return (tanh(a + delta_a) - tanh(a)) * scale; `first` and `second` are rows, scale a scalar.

    FAST: the GPU's approximate tanh and reciprocal. WIDE: the rows are a and h, and where |delta_a| > 0.5 the plain
    difference is taken; ACCURATE then has the slope 1 - h^2 from a, exact for saturated units too. Otherwise the rows
    are None and h, or (scale being 1) those of `rollout.quotient_rows`, and the quotient form serves for every delta_a:
    it is never NaN and at most 2 in size, but where a large delta_a undoes the saturation of its unit its relative
    error grows to 2^-11 / (1 + h tanh(delta_a)).
    """
    change = fast_tanh(delta_a) if FAST else accurate_tanh(delta_a)
    if WIDE or first is None:
        if ACCURATE:
            tail = tl.exp(-2 * tl.abs(first))
            slope = 4 * tail / ((1 + tail) * (1 + tail))
        else:
            slope = 1 - second * second
        slope = slope * scale
        # Not 1: h = -th = +-1 must not give 0 / 0.
        denominator = second * change + ONE_AND_A_BIT
        result = change * slope * fast_reciprocal(denominator) if FAST else change * slope / denominator
    else:
        denominator = second * change + first
        result = change * shared_reciprocal(denominator) if FAST else change / denominator
    if WIDE:
        moved = first + delta_a
        plain = (fast_tanh(moved) if FAST else accurate_tanh(moved)) - second
        result = tl.where(tl.abs(delta_a) > PLAIN_DIFFERENCE_ABOVE, plain * scale, result)
    return result


@triton.jit
def relu_deviation(delta_a, preact, scale, SCALED: tl.constexpr):
    """Return (relu(a + delta_a) - relu(a)) * scale; preact is a row, scale a scalar, SCALED whether it is not 1."""
    below = tl.minimum(preact, 0.0, propagate_nan=EVERY_NAN)
    above = tl.maximum(preact, 0.0, propagate_nan=EVERY_NAN)
    result = tl.maximum(delta_a + below, -above, propagate_nan=EVERY_NAN)
    if SCALED:
        result = result * scale
    return result


@triton.jit
def squared_difference(delta_o, error, inside):
    """Return sum_o delta_o (2 e + delta_o), (rows,); error and inside (o < outputs) broadcast to delta_o, (rows, o)."""
    return tl.sum(tl.where(inside, delta_o * (2 * error + delta_o), 0.0), 1)


@triton.jit
def weighted_mean(change, share, outputs):
    """Return share / outputs times the sum `change`; exactly zero where share is, whatever the padding holds."""
    return tl.where(share == 0, 0.0, change * (share / outputs))


@triton.jit
def exponential_sums(difference, probs, change, top, total, biggest):
    """Add some outputs to the four running sums of the cross-entropy difference, each (rows,).

    difference: delta_o - delta_o[target], (rows, o), zero outside; probs: p, broadcasting to it, zero outside.
    Sums: change = sum p expm1(d); top = max(d, 0); total = sum p exp(d - top); biggest = max |d|.
    """
    # expm1 by its series to degree 8: 1e-8 relative up to 0.5.
    growth = 1 + difference / 8
    for step in tl.static_range(6):
        growth = 1 + difference * growth * (1 / (7 - step))
    change += tl.sum(probs * (difference * growth), 1)
    higher = tl.maximum(top, tl.max(difference, 1))
    total = total * tl.exp(top - higher) + tl.sum(probs * tl.exp(difference - higher[:, None]), 1)
    return change, higher, total, tl.maximum(biggest, tl.max(tl.abs(difference), 1))


@triton.jit
def cross_entropy_difference(change, top, total, biggest, share):
    """Return share * log sum_o p_o exp(d_o), (rows,), from the sums of `exponential_sums`; zero where share is."""
    # log1p(x) = 2 artanh(x / (2 + x)), |x / (2 + x)| < 1/4 here.
    ratio = change / (2 + change)
    square = ratio * ratio
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11)))))
    # A row without a loss may have no probabilities either.
    large = tl.log(tl.where(share == 0, 1.0, total)) + top
    difference = tl.where(biggest <= PLAIN_DIFFERENCE_ABOVE, 2 * ratio * series, large)
    return tl.where(share == 0, 0.0, difference * share)
