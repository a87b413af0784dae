"""Cross-entropy at clean outputs in Triton: one launch.

Contract and equations: `cross_entropy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cross_entropy import CleanCrossEntropy, Smoothing
from .place_triton import Scalars, scalars_of
from .tiles import CLEAN_LOSS_COLUMNS, CLEAN_LOSS_ELEMENTS, CLEAN_LOSS_ROWS

ASSERTED = {"debug": True, "sanitize_overflow": False}
"""Options of a launch whose assertions are compiled, without those on overflow that would follow sums of integers."""


class Shares(NamedTuple):
    """`Smoothing` as the kernel takes it, (outputs,) float32 each; None without smoothing."""

    own: Any
    spread: Any


class Results(NamedTuple):
    """The fields of `CleanCrossEntropy`, contiguous; `gradient` is None where it is not wanted."""

    losses: Any
    probs: Any
    target: Any
    weight: Any
    gradient: Any


@triton.jit(do_not_specialize=["rows", "batch", "outputs", "ignore_index"])
def cross_entropy_kernel(
    outputs_ptr,  # (time, batch, outputs), contiguous, float32
    targets: Scalars,  # int64
    weight: Scalars,  # float64
    shares: Shares,
    results: Results,
    rows,  # time batch
    batch,
    outputs,
    ignore_index: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute everything of ROWS steps and samples, whose outputs are read three times, COLUMNS at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists, step, sample = row < rows, row // batch, row % batch
    target_ptr = targets.ptr + step * targets.step_stride + sample * targets.sample_stride
    target = tl.load(target_ptr, exists, ignore_index)
    index = tl.where(target == ignore_index, 0, target)
    known = (index >= 0) & (index < outputs)
    tl.device_assert(known, "a target is neither a class nor ignored")
    share_ptr = weight.ptr + step * weight.step_stride + sample * weight.sample_stride
    share = tl.load(share_ptr, exists, 0.0).to(tl.float32)
    lane, row_ptr = tl.arange(0, COLUMNS)[None, :], outputs_ptr + row * outputs

    top = tl.full((ROWS, 1), float("-inf"), tl.float32)
    for start in range(0, outputs, COLUMNS):
        output = start + lane
        value = tl.load(row_ptr + output, exists & (output < outputs), float("-inf"))
        top = tl.maximum(top, tl.max(value, 1, keep_dims=True))
    # Rows that do not exist have one output, 0.
    top = tl.where(exists, top, 0.0)
    total = tl.where(exists, 0.0, tl.full((ROWS, 1), 1.0, tl.float32))
    of_target, of_spread = tl.zeros((ROWS, 1), tl.float32), tl.zeros((ROWS, 1), tl.float32)
    spread_total = tl.zeros((1, 1), tl.float32)
    for start in range(0, outputs, COLUMNS):
        output = start + lane
        inside = output < outputs
        shifted = tl.load(row_ptr + output, exists & inside, float("-inf")) - top
        total += tl.sum(tl.exp(shifted), 1, keep_dims=True)
        of_target += tl.sum(tl.where(output == index, shifted, 0.0), 1, keep_dims=True)
        if shares.spread is not None:
            spread = tl.load(shares.spread + output, inside, 0.0)
            spread_total += tl.sum(spread, 1, keep_dims=True)
            of_spread += tl.sum(spread * tl.where(exists & inside, shifted, 0.0), 1, keep_dims=True)
    log_total = tl.log(total)
    loss, own = log_total - of_target, tl.full((ROWS, 1), 1.0, tl.float32)
    if shares.own is not None:
        own = tl.load(shares.own + index, exists & known, 1.0)
        loss = own * loss + (1 - own) * (log_total * spread_total - of_spread)
    # 0 * inf is NaN.
    tl.store(results.losses + row, tl.where(share == 0, 0.0, loss) * share, exists)
    tl.store(results.target + row, index, exists)
    tl.store(results.weight + row, share, exists)
    for start in range(0, outputs, COLUMNS):
        output = start + lane
        inside = exists & (output < outputs)
        prob = tl.exp(tl.load(row_ptr + output, inside, float("-inf")) - top) / total
        tl.store(results.probs + row * outputs + output, prob, inside)
        if results.gradient is not None:
            slope = prob - tl.where(output == index, own, 0.0)
            if shares.spread is not None:
                slope -= (1 - own) * tl.load(shares.spread + output, output < outputs, 0.0)
            tl.store(results.gradient + row * outputs + output, tl.where(share == 0, 0.0, slope) * share, inside)


def clean_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    ignore_index: int,
    smoothing: Smoothing | None = None,
    gradient: bool = True,
) -> CleanCrossEntropy:
    """Return the cross-entropy of clean outputs, its gradient, and what rollouts need.

    See `cross_entropy.clean_cross_entropy`; outputs are float32.
    """
    outputs = outputs.contiguous()
    time, batch, width = outputs.shape
    found = CleanCrossEntropy(
        losses=outputs.new_empty((time, batch)),
        probs=torch.empty_like(outputs),
        target=torch.empty((time, batch), dtype=targets.dtype, device=targets.device),
        weight=outputs.new_empty((time, batch)),
        gradient=torch.empty_like(outputs) if gradient else None,
    )
    rows = time * batch
    if not rows:
        return found
    columns = min(triton.next_power_of_2(width), CLEAN_LOSS_COLUMNS)
    each = min(CLEAN_LOSS_ELEMENTS // columns, CLEAN_LOSS_ROWS)
    shares = Shares(None, None) if smoothing is None else Shares(*(share.contiguous() for share in smoothing))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(outputs):
        cross_entropy_kernel[(triton.cdiv(rows, each),)](
            outputs,
            scalars_of(targets),
            scalars_of(weight),
            shares,
            Results(*found),
            rows,
            batch,
            width,
            ignore_index,
            ROWS=each,
            COLUMNS=columns,
            num_warps=4,
            **ASSERTED,
        )
    return found
