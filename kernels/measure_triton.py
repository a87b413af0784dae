"""Losses of the outputs behind a step of the stepwise rollouts: a kernel that reads the new state.

Contract and equations: `rollout.py`, `loss.py`. `rollout_stepwise_triton.py` and `rollout_gated_triton.py` launch it
after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import OPERAND_DTYPES
from .loss_triton import LossArguments
from .place_triton import gather_rows, gather_scalars, tile_of_program
from .repeated_triton import Repeated
from .rollout import Rollout, RolloutOptions
from .tiles import RolloutLaunch


class OutputSizes(NamedTuple):
    """Widths of the product with the readout."""

    inner: int
    """H padded to whole tiles of the inner loop."""
    outputs: int
    """O, or H where there is no readout."""


@triton.jit
def _output_tile(
    state_ptr,
    readout_ptr,
    row,
    output,
    inner,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Return delta_o of some outputs, (rows, outputs) float32: a product with the readout, or the state itself."""
    if readout_ptr is None:
        delta_o = tl.load(state_ptr + row * inner + output, output < inner, 0.0).to(tl.float32)
    else:
        lane = tl.arange(0, BLOCK_INNER)
        left_ptr = state_ptr + row * inner + lane[None, :]
        right_ptr = readout_ptr + output.to(tl.int64) * inner + lane[:, None]
        delta_o = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for _ in tl.range(0, inner, BLOCK_INNER):
            delta_o = tl.dot(
                tl.load(left_ptr),
                tl.load(right_ptr),
                delta_o,
                input_precision="ieee" if PRECISION == "fp32" else "tf32",
            )
            left_ptr += BLOCK_INNER
            right_ptr += BLOCK_INNER
    if PRECISION == "fp16":
        delta_o = delta_o * scale
    return delta_o


@triton.jit
def _output_of_target(state_ptr, readout_ptr, row, target, inner, BLOCK_INNER: tl.constexpr):
    """Return delta_o[target] / scale of each row, (rows, 1); target is a scalar or (rows, 1)."""
    if readout_ptr is None:
        of_target = tl.load(state_ptr + row * inner + target).to(tl.float32)
    else:
        lane = tl.arange(0, BLOCK_INNER)[None, :]
        of_target = tl.zeros_like(row).to(tl.float32)
        for start in tl.range(0, inner, BLOCK_INNER):
            state = tl.load(state_ptr + row * inner + start + lane).to(tl.float32)
            column = tl.load(readout_ptr + target * inner + start + lane).to(tl.float32)
            of_target += tl.sum(state * column, 1)[:, None]
    return of_target


@triton.jit(do_not_specialize=["step", "rows", "rollouts"])
def measure_kernel(
    state_ptr,  # (rows, inner): delta_h / scale, rows padded to whole tiles, operand type
    readout_ptr,  # (outputs, inner) padded with zeros to whole tiles, operand type; None: the state is the output
    loss,  # LossRows
    result_ptr,  # delta_loss (time, rows), or delta_o (time, rows, outputs), float32
    step,
    rows,
    rollouts,
    sizes,  # OutputSizes
    sigma,
    ADD: tl.constexpr,  # device functions of `loss_triton`; None: delta_o itself is the result
    FINISH: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Measure one step: a program owns BLOCK_ROWS rollouts and all their outputs, BLOCK_OUTPUTS at a time."""
    inner, outputs = sizes.inner, sizes.outputs
    place = tile_of_program(tl.program_id(0), rows, rollouts, BLOCK_ROWS, ONE_SAMPLE)
    row, sample, exists = place.row.to(tl.int64), place.sample, place.exists
    scale = tl.cast(sigma, tl.float32)
    first_row = tl.cast(step, tl.int64) * rows
    change = tl.zeros((BLOCK_ROWS,), tl.float32)
    top, total, biggest = change, change, change
    of_target = None
    if loss.target.ptr is not None:
        target = gather_scalars(loss.target, step, sample)
        of_target = _output_of_target(state_ptr, readout_ptr, row, target, inner, BLOCK_INNER)
        if PRECISION == "fp16":
            of_target = of_target * scale
    for start in tl.range(0, outputs, BLOCK_OUTPUTS):
        output = start + tl.arange(0, BLOCK_OUTPUTS)[None, :]
        inside = output < outputs
        delta_o = _output_tile(
            state_ptr, readout_ptr, row, output, inner, scale, PRECISION, BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INNER
        )
        if ADD is None:
            tl.store(result_ptr + (first_row + row) * outputs + output, delta_o, exists & inside)
        else:
            signal = gather_rows(loss.signal, step, sample, output, inside)
            change, top, total, biggest = ADD(
                change, top, total, biggest, delta_o, of_target, signal, inside, exists
            )  # fmt: skip
    if ADD is not None:
        share = gather_scalars(loss.share, step, sample).to(tl.float32)
        delta_loss = FINISH(change[:, None], top[:, None], total[:, None], biggest[:, None], share, outputs)
        tl.store(result_ptr + first_row + row, delta_loss, exists)


def measurement(
    launch: RolloutLaunch,
    loss: LossArguments,
    options: RolloutOptions,
    inner: int,
    units: int,
    results: Rollout,
) -> Callable[[Tensor], Repeated] | None:
    """Return what returns the launches that measure a new state, or None where no loss of the outputs is asked for."""
    if not loss.form.of_outputs:
        return None
    outputs, readout = loss.outputs(units), None
    if loss.readout is not None:
        padded = launch.block_outputs * triton.cdiv(outputs, launch.block_outputs)
        readout = padded_to(loss.readout, padded, inner, OPERAND_DTYPES[options.precision])
    result = results.delta_loss if results.delta_o is None else results.delta_o
    assert result is not None  # noqa: S101  (for the type checker; a loss of the outputs has one of them)
    time, batch, rollouts = result.shape[:3]
    block_rows, warps = launch.measuring
    one_sample = rollouts >= block_rows
    row_tiles = batch * triton.cdiv(rollouts, block_rows) if one_sample else triton.cdiv(batch * rollouts, block_rows)
    arguments = {
        "readout_ptr": readout,
        "loss": loss.rows,
        "result_ptr": result,
        "rows": batch * rollouts,
        "rollouts": rollouts,
        "sizes": OutputSizes(inner, outputs),
        "sigma": float(options.sigma),
        "ADD": loss.form.add,
        "FINISH": loss.form.finish,
        "PRECISION": options.precision,
        "ONE_SAMPLE": one_sample,
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUTPUTS": launch.block_outputs,
        "BLOCK_INNER": launch.block_inner,
    }
    named = {"num_warps": warps, "enable_fp_fusion": True}
    return lambda state: Repeated(measure_kernel, row_tiles, {"state_ptr": state, **arguments}, {"step": time}, **named)


def padded_to(matrix: Tensor, rows: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix padded with zeros."""
    result = matrix.new_zeros((rows, inner), dtype=dtype)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result
