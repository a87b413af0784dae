"""Which rollouts count, in Triton: one launch reads what they left and clears what does not count.

Contract: `finite.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import MARK_COLUMNS, MARK_ROWS


@triton.jit
def _all_finite(pointer, count, stride, inside, ROWS: tl.constexpr):
    """Return whether `count` values of each column, `stride` apart, are all finite, (columns) int32."""
    finite = inside.to(tl.int32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < count) & inside[None, :]
        value = tl.load(pointer[None, :] + row * stride, mask, 0.0).to(tl.float32)
        finite = tl.minimum(finite, tl.min((tl.abs(value) < float("inf")).to(tl.int32), 0))
    return finite


@triton.jit(do_not_specialize=["time", "batch", "rollouts", "units", "stride_sample", "stride_rollout"])
def _mark_kernel(
    finite_ptr,  # (batch, rollouts), int8, any strides
    delta_loss_ptr,  # (time, batch, rollouts), contiguous, float32, or None
    delta_h_ptr,  # (batch, rollouts, units), contiguous
    trust_ptr,  # (batch), int8, or None
    time,
    batch,
    rollouts,
    units,
    stride_sample: tl.int64,
    stride_rollout: tl.int64,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mark which rollouts count, and clear the loss differences of the others: a program owns COLUMNS rollouts."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    columns = tl.cast(batch, tl.int64) * rollouts
    inside = column < columns
    sample = column // rollouts
    mark_ptr = finite_ptr + sample * stride_sample + column % rollouts * stride_rollout
    counts = _all_finite(delta_h_ptr + column * units, units, 1, inside, ROWS)
    if delta_loss_ptr is not None:
        counts = tl.minimum(counts, _all_finite(delta_loss_ptr + column, time, columns, inside, ROWS))
    if not FIRST:
        counts = tl.minimum(counts, tl.load(mark_ptr, inside, 0).to(tl.int32))
    if trust_ptr is not None:
        counts = tl.maximum(counts, tl.load(trust_ptr + sample, inside, 0).to(tl.int32))
    tl.store(mark_ptr, counts.to(tl.int8), inside)
    if delta_loss_ptr is not None:
        lost = inside & (counts == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            for step in range(time):
                tl.store(delta_loss_ptr + step * columns + column, tl.zeros((COLUMNS,), tl.float32), lost)


def mark_finite(
    finite: Tensor, delta_loss: Tensor | None, delta_h: Tensor, *, first: bool, trust: Tensor | None = None
) -> Tensor | None:
    """Mark which rollouts count, and return delta_loss, (T, B, P), in place, zero where one does not.

    See `finite.mark_finite`.
    """
    if finite.numel() == 0:
        return delta_loss
    delta_h = delta_h.contiguous()
    delta_loss = None if delta_loss is None else delta_loss.contiguous()
    (batch, rollouts), units = finite.shape, delta_h.shape[-1]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(delta_h):
        _mark_kernel[(triton.cdiv(batch * rollouts, MARK_COLUMNS),)](
            finite.view(torch.int8),
            delta_loss,
            delta_h,
            None if trust is None else trust.contiguous().view(torch.int8),
            0 if delta_loss is None else len(delta_loss),
            batch,
            rollouts,
            units,
            *finite.stride(),
            FIRST=first,
            COLUMNS=MARK_COLUMNS,
            ROWS=MARK_ROWS,
            num_warps=4,
        )
    return delta_loss
