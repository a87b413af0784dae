"""Losses of the outputs of the stepwise rollouts, delta_o = W_o delta_h of every step.

Contract and equations: `rollout.py`, `loss.py`. In two ways, between which `tiles.py` chooses:

- The step kernels of `rollout_stepwise_triton.py` and `rollout_gated_triton.py` measure the step before. W_o multiplies
  the same state as W_hh; the programs of the last units hold both products. A program of its own would read the state
  once more, and be one too many where a wave holds all.
- Wide readouts, and states that are the output themselves: `measure_kernel` reads the state behind every step. It
  measures the last step in either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_triton import OPERAND_DTYPES
from .loss_triton import NO_LOSS_ROWS, LossArguments, LossRows
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


class MeasuredPart(NamedTuple):
    """What a step measures of the step before: a loss of its outputs; absent where that is left to `measure_kernel`.

    W_o is not in it: Triton encodes no descriptor inside a tuple.
    """

    loss: LossRows
    result: Any
    """delta_loss (time, rows), or delta_o (time, rows, outputs), float32."""
    outputs: Any
    """O."""


class CleanOutputs(NamedTuple):
    """What a loss reads of the clean run at one step for the rows of a tile, and 0 for what it does not."""

    signal: Any
    """(1, outputs) or (rows, outputs)."""
    target: Any
    """A scalar or (rows, 1)."""
    share: Any
    """The same."""


@triton.jit
def clean_outputs(measured, step, sample, BLOCK_OUTPUTS: tl.constexpr):
    """Return the `CleanOutputs` of one step of a `MeasuredPart` for some rows' samples."""
    output = tl.arange(0, BLOCK_OUTPUTS)[None, :]
    signal, target, share = 0.0, 0, 0.0
    if measured.loss.signal.ptr is not None:
        signal = gather_rows(measured.loss.signal, step, sample, output, output < measured.outputs)
        share = gather_scalars(measured.loss.share, step, sample).to(tl.float32)
    if measured.loss.target.ptr is not None:
        target = gather_scalars(measured.loss.target, step, sample)
    return CleanOutputs(signal, target, share)


@triton.jit
def measure_outputs(
    delta_o, measured, clean, step, place, rows, scale,
    PRECISION: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Write the loss differences of one step, or delta_o itself, from all outputs of a tile's rows.

    delta_o: (rows, outputs), divided by scale with fp16; measured: `MeasuredPart`; clean: `CleanOutputs` of the step;
    place: `TilePlace`; other arguments as in `measure_kernel`.
    """
    if PRECISION == "fp16":
        delta_o = delta_o * scale
    output = tl.arange(0, delta_o.shape[1])[None, :]
    inside = output < measured.outputs
    row = tl.cast(step, tl.int64) * rows + place.row
    if ADD is None:
        tl.store(measured.result + row * measured.outputs + output, delta_o, place.exists & inside)
    else:
        none = tl.zeros((delta_o.shape[0],), tl.float32)
        of_target = tl.sum(tl.where(output == clean.target, delta_o, 0.0), 1)[:, None]
        change, top, total, biggest = ADD(
            none, none, none, none, delta_o, of_target, clean.signal, inside, place.exists
        )  # fmt: skip
        delta_loss = FINISH(
            change[:, None], top[:, None], total[:, None], biggest[:, None], clean.share, measured.outputs
        )
        tl.store(measured.result + row, delta_loss, place.exists)


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


class Measurement(NamedTuple):
    """How the loss of every step's outputs is measured."""

    joined: dict[str, Any]
    """What step kernels take to measure the step before; absent where they measure nothing."""
    every: Callable[[Tensor], Repeated] | None = None
    """Makes the launches that measure a state at every step; None where that is not done."""
    last: Callable[[Tensor], Repeated] | None = None
    """Makes that of the last step alone, which no step comes behind; None where that is not done."""


def measurement(
    launch: RolloutLaunch,
    loss: LossArguments,
    options: RolloutOptions,
    inner: int,
    units: int,
    results: Rollout,
) -> Measurement:
    """Return how losses of the outputs are measured: by the step behind, or by a launch for every step."""
    part = MeasuredPart(NO_LOSS_ROWS, None, None)
    joined: dict[str, Any] = {"readout": None, "measured": part, "ADD": None, "FINISH": None, "BLOCK_OUTPUTS": 1}
    if not loss.form.of_outputs:
        return Measurement(joined)
    outputs, readout = loss.outputs(units), None
    if loss.readout is not None:
        padded = launch.block_outputs * triton.cdiv(outputs, launch.block_outputs)
        readout = padded_to(loss.readout, padded, inner, OPERAND_DTYPES[options.precision])
    result = results.delta_loss if results.delta_o is None else results.delta_o
    assert result is not None  # noqa: S101  (for the type checker; a loss of the outputs has one of them)
    functions = {"ADD": loss.form.add, "FINISH": loss.form.finish, "BLOCK_OUTPUTS": launch.block_outputs}
    if launch.joined:
        rows = readout
        if launch.described:
            rows = TensorDescriptor.from_tensor(readout, [launch.block_outputs, launch.block_inner])
        joined = {"readout": rows, "measured": MeasuredPart(loss.rows, result, outputs), **functions}
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
        **functions,
        "PRECISION": options.precision,
        "ONE_SAMPLE": one_sample,
        "BLOCK_ROWS": block_rows,
        "BLOCK_INNER": launch.block_inner,
    }
    named = {"num_warps": warps, "enable_fp_fusion": True}

    def launches(state: Tensor) -> Repeated:
        return Repeated(measure_kernel, row_tiles, {"state_ptr": state, **arguments}, {"step": time}, **named)

    return Measurement(joined, last=launches) if launch.joined else Measurement(joined, every=launches)


def padded_to(matrix: Tensor, rows: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix padded with zeros."""
    result = matrix.new_zeros((rows, inner), dtype=dtype)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result
