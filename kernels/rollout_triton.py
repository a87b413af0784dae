# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Perturbed rollouts in Triton, in two forms behind one function; `tiles.py` chooses.

Contract and equations: `rollout.py`. Resident: `resident_triton.py`. Stepwise: `stepwise_triton.py`, one launch per
time step. Both only launch: no host synchronisation, and every result depends on device memory alone, so a call can be
captured in a CUDA graph (which is what makes the stepwise form's launches cheap where steps are short).

Operands are rounded to `options.precision`; everything else is float32. The state after the last step and a stored
delta_a are bfloat16 with 16-bit operands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .loss import CrossEntropyLoss, LinearLoss, Loss, SquaredLoss
from .noise import Counters
from .noise_triton import counter_words
from .resident_triton import resident_kernel
from .rollout import Rollout, RolloutOptions, quotient_rows
from .stepwise_triton import measure_kernel, step_kernel, sum_partials_kernel
from .tiles import INTERPRETED, NARROW_SIGMA, RolloutLaunch, rollout_launch, takes_quotient_rows

OPERAND_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
INTERPRETED_ARCH = 90
ALIGNED_UNITS = 64
"""Hidden units from which rows of delta_a are padded to 16 elements, so that they are written 16 bytes at a time."""

PARTIAL_STEPS = 32
"""Steps whose partial sums of the loss difference are kept until they are added."""

LEAST_SLOPE = 2.0**-60
"""Of tanh, in `quotient_rows`: the product of two inverses must stay a float32."""

SUM_BLOCK = 256


class _Signal(NamedTuple):
    """A loss as the kernels take it: what is per step, the readout, and the loss's kind."""

    kind: str
    values: Tensor | None = None
    target: Tensor | None = None
    share: Tensor | None = None
    readout: Tensor | None = None


def rollout(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    *,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Run a block of perturbed rollouts through time; see `rollout.rollout`."""
    return rollout_in_form("auto", preact, hidden, weight_hh, loss, seed, options, counters, delta_h0)


def rollout_in_form(
    form: str,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Do what `rollout` does in the form "resident" or "stepwise"; "auto" chooses.

    Raises:
        ValueError: a dtype or precision that Triton does not serve, or a form that cannot hold the shapes.
    """
    for name, tensor in (("preact", preact), ("hidden", hidden), ("weight_hh", weight_hh)):
        if tensor.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            raise ValueError(f"backend triton runs in float32; {name} is {tensor.dtype}")
    if options.precision not in OPERAND_DTYPES:
        raise ValueError(f"backend triton has no precision {options.precision!r}, only {sorted(OPERAND_DTYPES)}")
    time, batch, units = preact.shape
    signal = _signal(loss)
    outputs = units if signal.readout is None else signal.readout.shape[0]
    launch = rollout_launch(
        units=units,
        outputs=outputs,
        loss=signal.kind,
        has_readout=signal.readout is not None,
        batch=batch,
        rollouts=options.rollouts,
        precision=options.precision,
        arch=_arch(preact.device),
        form=form,
    )
    results = _empty_results(preact, signal, outputs, options)
    if 0 in {time, batch, units, options.rollouts}:
        start = torch.zeros_like(results.delta_h) if delta_h0 is None else delta_h0
        return results._replace(delta_h=results.delta_h.copy_(start).to(preact.dtype))
    run = _run_resident if launch.form == "resident" else _run_stepwise
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(preact):
        run(launch, preact, hidden, weight_hh, signal, seed, options, counters, delta_h0, results)
    delta_a = None if results.delta_a is None else results.delta_a[..., :units]
    return results._replace(delta_a=delta_a, delta_h=results.delta_h.to(preact.dtype))


def _signal(loss: Loss | None) -> _Signal:
    """Return the loss as the kernels take it."""
    if loss is None:
        return _Signal("none")
    if isinstance(loss, LinearLoss):
        return _Signal("linear", loss.grad)
    if isinstance(loss, SquaredLoss):
        return _Signal("squared", loss.error, None, loss.weight, loss.readout)
    if isinstance(loss, CrossEntropyLoss):
        return _Signal("cross_entropy", loss.probs, loss.target, loss.weight, loss.readout)
    return _Signal("outputs", readout=loss.readout)


def _arch(device: torch.device) -> int:
    """Return the compute capability as 10 major + minor."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _empty_results(preact: Tensor, signal: _Signal, outputs: int, options: RolloutOptions) -> Rollout:
    """Return the tensors that the kernels fill; delta_a still has its padding."""
    time, batch, units = preact.shape
    rows = (batch, options.rollouts)
    kept = torch.float32 if OPERAND_DTYPES[options.precision] is torch.float32 else torch.bfloat16
    measured = signal.kind not in {"none", "outputs"}
    stride = units if units < ALIGNED_UNITS else 16 * triton.cdiv(units, 16)
    return Rollout(
        preact.new_empty((time, *rows), dtype=torch.float32) if measured else None,
        preact.new_empty((time, *rows, stride), dtype=kept) if options.store_delta_a else None,
        preact.new_empty((*rows, units), dtype=kept),
        preact.new_empty((time, *rows, outputs), dtype=torch.float32) if signal.kind == "outputs" else None,
    )


def _clean(
    preact: Tensor, hidden: Tensor, options: RolloutOptions, *, rows: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return what of the clean run the nonlinearity needs: two tensors, (T, B, H), or None; see `cell_triton`.

    rows: tanh's narrow form takes `quotient_rows`.
    """
    if options.nonlinearity == "relu":
        return preact, None
    if rows and not _wide(options):
        inverse, ratio = quotient_rows(preact.float(), hidden.float(), LEAST_SLOPE)
        # Above 1 by a bit: h = -th = +-1 must not give 0 / 0.
        return inverse.mul_(1 + 2.0**-23), ratio
    return (preact if _wide(options) else None), hidden


def _wide(options: RolloutOptions) -> bool:
    """Return whether tanh takes the plain difference where delta_a is large."""
    return options.precision == "fp32" or options.sigma > NARROW_SIGMA


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Return a tensor's strides, ones where there is no tensor."""
    return (1,) * dims if tensor is None else tensor.stride()


def _fast(options: RolloutOptions) -> bool:
    """Return whether the GPU's approximate functions serve."""
    return options.precision != "fp32" and not INTERPRETED


def _run_resident(
    launch: RolloutLaunch,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    signal: _Signal,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    results: Rollout,
) -> None:
    """Fill `results` by one launch."""
    time, batch, units = preact.shape
    operand = OPERAND_DTYPES[options.precision]
    readout = None if signal.readout is None else signal.readout.to(operand).contiguous()
    scale = options.sigma if options.precision == "fp16" else 1.0
    start = None if delta_h0 is None else (delta_h0 / scale).to(operand).contiguous()
    outputs = units if readout is None else readout.shape[0]
    measured = results.delta_o if signal.kind == "outputs" else results.delta_loss
    stride = None if results.delta_a is None else results.delta_a.shape[-1]
    low, high = counter_words(counters)
    programs = triton.cdiv(batch, launch.samples) * triton.cdiv(options.rollouts, launch.block_rows)
    rows = preact.dtype == hidden.dtype == torch.float32 and takes_quotient_rows(
        launch,
        units=units,
        precision=options.precision,
        arch=_arch(preact.device),
        noise=options.noise,
        keeps=results.delta_a is not None or start is not None,
    )
    clean = _clean(preact, hidden, options, rows=rows)
    resident_kernel[(programs,)](
        clean,
        weight_hh.to(operand).contiguous(),
        (signal.values, signal.target, signal.share, readout),
        start,
        (measured, results.delta_a, stride, results.delta_h),
        seed,
        (
            _strides(clean[0], 3),
            _strides(clean[1], 3),
            _strides(signal.values, 3),
            _strides(signal.target, 2),
            _strides(signal.share, 2),
        ),
        time,
        batch,
        options.rollouts,
        (units, outputs),
        float(options.sigma),
        low,
        high,
        NOISE=options.noise,
        NONLINEARITY=options.nonlinearity,
        LOSS=signal.kind,
        PRECISION=options.precision,
        FAST=_fast(options),
        WIDE=_wide(options),
        FULL=units == launch.block_units,
        SAMPLES=launch.samples,
        BLOCK_ROWS=launch.block_rows,
        BLOCK_UNITS=launch.block_units,
        BLOCK_OUTPUTS=max(launch.block_outputs, 16),
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )


def _padded(matrix: Tensor, rows: int, inner: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix padded with zeros."""
    result = matrix.new_zeros((rows, inner), dtype=dtype)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def _run_stepwise(
    launch: RolloutLaunch,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    signal: _Signal,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    results: Rollout,
) -> None:
    """Fill `results` by one launch per step, or two where the loss lies behind a readout."""
    time, batch, units = preact.shape
    rows = batch * options.rollouts
    operand = OPERAND_DTYPES[options.precision]
    scale = options.sigma if options.precision == "fp16" else 1.0
    inner = launch.block_inner * triton.cdiv(units, launch.block_inner)
    unit_tiles = triton.cdiv(units, launch.block_units)
    row_tiles = triton.cdiv(rows, launch.block_rows)
    if launch.samples:
        row_tiles = batch * triton.cdiv(options.rollouts, launch.block_rows)
    weight = _padded(weight_hh, unit_tiles * launch.block_units, inner, operand)
    # A tile may reach beyond the last row.
    states = [preact.new_zeros((rows + launch.block_rows, inner), dtype=operand) for _ in range(2)]
    if delta_h0 is not None:
        states[0][:rows, :units] = (delta_h0 / scale).reshape(rows, units)
    linear = signal.kind == "linear"
    slots = min(time, PARTIAL_STEPS)
    partial = preact.new_empty((slots, unit_tiles, rows), dtype=torch.float32) if linear else None
    stride = None if results.delta_a is None else results.delta_a.shape[-1]
    measure = _measurement(launch, signal, options, inner, units, rows, row_tiles, results)
    low, high = counter_words(counters)
    clean = _clean(preact, hidden, options)
    for step in range(time):
        step_kernel[(row_tiles * unit_tiles,)](
            clean,
            weight,
            (states[0], states[1]),
            (signal.values if linear else None, partial),
            (results.delta_a, stride),
            seed,
            (_strides(clean[0], 3), _strides(clean[1], 3), _strides(signal.values, 3)),
            step,
            step % slots,
            rows,
            options.rollouts,
            (units, inner),
            float(options.sigma),
            low,
            high,
            NOISE=options.noise,
            NONLINEARITY=options.nonlinearity,
            PRECISION=options.precision,
            FAST=_fast(options),
            WIDE=_wide(options),
            ONE_SAMPLE=launch.samples == 1,
            BLOCK_ROWS=launch.block_rows,
            BLOCK_UNITS=launch.block_units,
            BLOCK_INNER=launch.block_inner,
            STAGES=launch.stages,
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=True,
        )
        if measure is not None:
            measure(states[1], step)
        done = step % slots + 1
        if partial is not None and results.delta_loss is not None and (done == slots or step == time - 1):
            sum_partials_kernel[(done * triton.cdiv(rows, SUM_BLOCK),)](
                results.delta_loss[step + 1 - done :], partial, rows, unit_tiles, BLOCK=SUM_BLOCK
            )
        states.reverse()
    results.delta_h.view(rows, units).copy_(states[0][:rows, :units].float() * scale)


def _measurement(
    launch: RolloutLaunch,
    signal: _Signal,
    options: RolloutOptions,
    inner: int,
    units: int,
    rows: int,
    row_tiles: int,
    results: Rollout,
):
    """Return what measures a new state at a step, or None where the step kernel does it or nothing is measured."""
    if signal.kind in {"none", "linear"}:
        return None
    operand = OPERAND_DTYPES[options.precision]
    outputs, readout = units, None
    if signal.readout is not None:
        outputs = signal.readout.shape[0]
        padded = launch.block_outputs * triton.cdiv(outputs, launch.block_outputs)
        readout = _padded(signal.readout, padded, inner, operand)

    def measure(state: Tensor, step: int) -> None:
        measure_kernel[(row_tiles,)](
            state,
            readout,
            (signal.values, signal.target, signal.share),
            results.delta_o if signal.kind == "outputs" else results.delta_loss,
            (_strides(signal.values, 3), _strides(signal.target, 2), _strides(signal.share, 2)),
            step,
            rows,
            options.rollouts,
            (inner, outputs),
            float(options.sigma),
            LOSS=signal.kind,
            PRECISION=options.precision,
            ONE_SAMPLE=launch.samples == 1,
            BLOCK_ROWS=launch.block_rows,
            BLOCK_OUTPUTS=launch.block_outputs,
            BLOCK_INNER=launch.block_inner,
            num_warps=launch.warps,
            enable_fp_fusion=True,
        )

    return measure
