"""The noise and rollout kernels as the compile-only leg compiles them, with the launch configurations of `tiles.py`."""

from dataclasses import replace

import torch

from anpgpu.kernels import measure_triton, noise_triton, rollout_resident_triton, rollout_stepwise_triton
from anpgpu.kernels.cell_triton import CELLS
from anpgpu.kernels.launch_triton import Weights
from anpgpu.kernels.loss_triton import LOSSES, NO_LOSS, LossRows
from anpgpu.kernels.measure_triton import MeasuredPart, OutputSizes
from anpgpu.kernels.place_triton import CleanRows, Rows, Scalars, Stored
from anpgpu.kernels.rollout_resident_triton import Results, Sizes
from anpgpu.kernels.rollout_stepwise_triton import LinearPart, StepSizes
from anpgpu.kernels.tiles import NOISE_LAUNCH, UNIT_SUM_BLOCK, rollout_launch, takes_quotient_rows
from anpgpu.kernels.tiles_measured import JOINED_OUTPUTS, next_power_of_two

ARCHES = (80, 89, 90, 100)
OPERANDS = {"bf16": "*bf16", "fp16": "*fp16", "tf32": "*fp32", "fp32": "*fp32"}
STORED = {"bf16": "*bf16", "fp16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
NONE = ("=", None)
NO_ROWS, NO_SCALARS = Rows(NONE, NONE, NONE, NONE), Scalars(NONE, NONE, NONE)
MANY = 1024
OUTPUTS = 10


READ_OUT = {
    "squared": {"loss": "squared"},
    "outputs": {"loss": "outputs"},
    "cross_entropy-few_rollouts": {"rollouts": 32},
    "cross_entropy-loose": {"rollouts": 5},
    "cross_entropy-few_rows": {"rollouts": 128, "batch": 1},
    "cross_entropy-few_rows-few_rollouts": {"rollouts": 32, "batch": 4},
    "cross_entropy-gaussian": {"noise": "gaussian"},
    "cross_entropy-relu": {"cell": "relu"},
    "cross_entropy-wide": {"wide": True},
}
"""More cases of steps that measure the step before."""


def form_of(loss):
    return NO_LOSS if loss == "none" else LOSSES[loss]


def rows(units=16):
    """Return a contiguous (time, batch, units) tensor; strides are known to be divisible by 16 where units are."""
    stride = "i32:16" if units % 16 == 0 else "i32"
    return Rows("*fp32", stride, stride, ("=", 1))


def clean_rows(precision, cell, wide, units=16, quotient=False):
    """Return what of the clean run a cell takes."""
    wide = wide or precision == "fp32"
    if quotient:
        # Made by a kernel of their own.
        return CleanRows(rows(units), rows(units))
    tensors = CELLS[f"{cell}_deviation"].clean_rows(torch.zeros(1), torch.zeros(1), wide, False)
    return CleanRows(*(NO_ROWS if tensor is None else rows(units) for tensor in tensors))


def loss_rows(loss, units=16):
    """Return what a loss reads of the clean run."""
    scalars = {kind: Scalars(kind, "i32:16", ("=", 1)) for kind in ("*i64", "*fp32")}
    return LossRows(
        rows(units) if loss in {"linear", "squared", "cross_entropy"} else NO_ROWS,
        scalars["*i64"] if loss == "cross_entropy" else NO_SCALARS,
        scalars["*fp32"] if loss in {"squared", "cross_entropy"} else NO_SCALARS,
    )


def _flags(precision, cell, wide):
    return {
        "CELL": CELLS[f"{cell}_deviation"].deviation,
        "PRECISION": precision,
        "FAST": precision != "fp32",
        "WIDE": wide or precision == "fp32",
    }


def _launch(units, loss, readout, precision, arch, form, rollouts=MANY, batch=MANY, outputs=OUTPUTS, **cell):
    form_of_loss = form_of(loss)
    behind = form_of_loss.of_outputs and readout
    return rollout_launch(
        units=units,
        outputs=(outputs if behind else units) if form_of_loss.of_outputs else 0,
        has_readout=behind,
        returns_outputs=form_of_loss.returned,
        batch=batch,
        rollouts=rollouts,
        precision=precision,
        arch=arch,
        **cell,
        form=form,
    )


def _size(size):
    """Return the type that a size has in a tuple, where 1 becomes a constant."""
    return ("=", 1) if size == 1 else "i32:16" if size % 16 == 0 else "i32"


def resident_case(
    arch, units, precision="bf16", loss="linear", store=False, noise="rademacher", cell="tanh", wide=False,
    readout=True, start=False, rollouts=MANY,
):  # fmt: skip
    launch = _launch(units, loss, readout, precision, arch, "resident", rollouts)
    behind = form_of(loss).of_outputs and readout
    quotient = takes_quotient_rows(
        launch, units=units, precision=precision, arch=arch, noise=noise, keeps=store or start
    )
    signature = {
        "clean": clean_rows(precision, cell, wide, units, quotient and not wide),
        "weights": Weights(OPERANDS[precision], OPERANDS[precision] if behind else NONE),
        "loss": loss_rows(loss, units),
        "start_ptr": OPERANDS[precision] if start else NONE,
        "results": Results(
            "*fp32" if loss != "none" else NONE,
            STORED[precision] if store else NONE,
            "i32:16" if store else NONE,
            STORED[precision],
        ),
        "seed_ptr": "*i64",
        "time": "i32",
        "batch": "i32",
        "rollouts": "i32",
        "sizes": Sizes(_size(units), _size((launch.block_outputs and OUTPUTS) or units)),
        "sigma": "fp32",
        "counters_low": "i64",
        "counters_high": "i64",
    }
    constexprs = {
        **_flags(precision, cell, wide),
        "NOISE": noise,
        "LOSS": form_of(loss).of_tile,
        "FULL": units == next_power_of_two(units) and units >= 16,
        "SAMPLES": launch.samples,
        "PIECES": launch.pieces,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_OUTPUTS": max(launch.block_outputs, 16),
    }
    return _case(rollout_resident_triton.resident_kernel, signature, constexprs, launch)


def measured_part(launch, loss, readout):
    """Return what a step takes to measure the step before."""
    if not launch.joined:
        return {"readout": NONE, "measured": MeasuredPart(loss_rows("none"), NONE, NONE)}
    return {"readout": readout, "measured": MeasuredPart(loss_rows(loss), "*fp32", "i32")}


def joined_functions(launch, loss):
    """Return the constants with which a step measures the step before."""
    form = form_of(loss if launch.joined else "none")
    return {"ADD": form.add, "FINISH": form.finish, "BLOCK_OUTPUTS": launch.block_outputs if launch.joined else 1}


def step_case(
    arch, units, precision="bf16", loss="linear", store=False, noise="rademacher", cell="tanh", wide=False,
    rollouts=MANY, batch=MANY, outputs=OUTPUTS,
):  # fmt: skip
    launch = _launch(units, loss, True, precision, arch, "stepwise", rollouts, batch, outputs)
    linear = loss == "linear"
    state, stored = OPERANDS[precision], Stored(STORED[precision], "i32:16")
    weight, before, after, readout = state, state, state, state
    if launch.described:
        kind, kept = state.removeprefix("*"), STORED[precision].removeprefix("*")
        part = [1, launch.block_rows, launch.block_units // launch.parts]
        weight = f"tensordesc<{kind}[{launch.block_units}, {launch.block_inner}]>"
        readout = f"tensordesc<{kind}[{launch.block_outputs}, {launch.block_inner}]>"
        before = f"tensordesc<{kind}[1, {launch.block_rows}, {launch.block_inner}]>"
        after, stored = f"tensordesc<{kind}{part}>", f"tensordesc<{kept}{part}>"
    signature = {
        "clean": clean_rows(precision, cell, wide),
        "weight": weight,
        "before": before,
        "after": after,
        "linear": LinearPart("*fp32" if linear else NONE, rows() if linear else NO_ROWS),
        **measured_part(launch, loss, readout),
        "stored": stored if store else NONE,
        "seed_ptr": "*i64",
        "step": "i32",
        "slot": "i32",
        "rows": "i32",
        "rollouts": "i32",
        "sizes": StepSizes(_size(units), "i32:16"),
        "sigma": "fp32",
        "counters_low": "i64",
        "counters_high": "i64",
    }
    constexprs = {
        **_flags(precision, cell, wide),
        "NOISE": noise,
        **joined_functions(launch, loss),
        "SAMPLES": launch.samples,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_INNER": launch.block_inner,
        "STAGES": launch.stages,
        "DESCRIBED": launch.described,
        "EARLY": launch.early,
        "PARTS": launch.parts,
        "DEPENDENT": launch.dependent,
    }
    kernel, signature, constexprs, options = _case(rollout_stepwise_triton.step_kernel, signature, constexprs, launch)
    return kernel, signature, constexprs, {**options, "launch_pdl": launch.dependent}


def measure_case(arch, loss, precision="bf16", readout=True, units=512):
    launch = _launch(units, loss, readout, precision, arch, "stepwise")
    signature = {
        "state_ptr": OPERANDS[precision],
        "readout_ptr": OPERANDS[precision] if readout else NONE,
        "loss": loss_rows(loss),
        "result_ptr": "*fp32",
        "step": "i32",
        "rows": "i32",
        "rollouts": "i32",
        "sizes": OutputSizes("i32:16", "i32"),
        "sigma": "fp32",
    }
    block_rows, warps = launch.measuring
    constexprs = {
        "ADD": form_of(loss).add,
        "FINISH": form_of(loss).finish,
        "PRECISION": precision,
        "ONE_SAMPLE": True,
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUTPUTS": launch.block_outputs,
        "BLOCK_INNER": launch.block_inner,
    }
    return _case(measure_triton.measure_kernel, signature, constexprs, replace(launch, warps=warps, stages=3))


def noise_case(kind, output):
    names = ["noise_ptr", "seed_ptr", "rows", "batch", "rollouts", "hidden", "sigma", "counters_low", "counters_high"]
    kinds = [output, "*i64", "i64", "i32", "i32", "i32:16", "fp32", "i64", "i64"]
    constexprs = {
        "KIND": kind,
        "FAST": True,
        "BLOCK_ROWS": NOISE_LAUNCH.block_rows,
        "BLOCK_UNITS": NOISE_LAUNCH.block_units,
    }
    return _case(noise_triton._noise_kernel, dict(zip(names, kinds, strict=True)), constexprs, NOISE_LAUNCH)


def sum_case():
    signature = {"delta_loss_ptr": "*fp32", "partial_ptr": "*fp32", "rows": "i32", "tiles": "i32"}
    kernel = rollout_stepwise_triton.sum_partials_kernel
    return kernel, {**signature, "BLOCK": "constexpr"}, {"BLOCK": UNIT_SUM_BLOCK}, {"num_warps": 4}


def _case(kernel, signature, constexprs, launch):
    signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    options = {"num_warps": launch.warps, "num_stages": getattr(launch, "stages", 1)}
    return kernel, signature, constexprs, {**options, "maxnreg": getattr(launch, "registers", None)}


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {}
    for arch in ARCHES:
        for precision in OPERANDS:
            units = 64 if precision == "fp32" else 128
            found[f"sm_{arch}:resident-{units}-{precision}"] = resident_case(arch, units, precision, store=True)
            found[f"sm_{arch}:step-512-{precision}"] = step_case(arch, 512, precision, store=True)
            found[f"sm_{arch}:measure-cross_entropy-{precision}"] = measure_case(arch, "cross_entropy", precision)
            read = step_case(arch, 512, precision, "cross_entropy", store=True)
            found[f"sm_{arch}:step-512-{precision}-cross_entropy"] = read
        found[f"sm_{arch}:resident-128-bf16-cross_entropy"] = resident_case(arch, 128, loss="cross_entropy", store=True)
    for units in (16, 64, 128, 256):
        found[f"sm_90:resident-{units}-bf16-no_loss"] = resident_case(90, units, loss="none")
        found[f"sm_90:resident-{units}-bf16-loss"] = resident_case(90, units)
        found[f"sm_90:resident-{units}-bf16-loss-stored"] = resident_case(90, units, store=True)
    for units in (1, 100, 250):
        found[f"sm_90:resident-{units}-bf16-loss-stored"] = resident_case(90, units, store=True)
    for loss in ("squared", "outputs"):
        found[f"sm_90:resident-128-bf16-{loss}"] = resident_case(90, 128, loss=loss)
        found[f"sm_90:measure-{loss}-bf16"] = measure_case(90, loss)
    for loss in ("squared", "cross_entropy"):
        found[f"sm_90:resident-64-bf16-{loss}-no_readout"] = resident_case(90, 64, loss=loss, readout=False)
        found[f"sm_90:measure-{loss}-bf16-no_readout"] = measure_case(90, loss, readout=False)
    for units in (128, 256):
        found[f"sm_90:resident-{units}-bf16-gaussian"] = resident_case(90, units, noise="gaussian")
        found[f"sm_90:resident-{units}-bf16-relu"] = resident_case(90, units, cell="relu")
        found[f"sm_90:resident-{units}-bf16-wide"] = resident_case(90, units, wide=True)
    found["sm_90:resident-128-bf16-start"] = resident_case(90, 128, start=True)
    found["sm_90:resident-256-bf16-start"] = resident_case(90, 256, start=True)
    for units in (64, 128, 256):
        few = resident_case(90, units, store=True, rollouts=32)
        found[f"sm_90:resident-{units}-bf16-loss-stored-few_rollouts"] = few
    found["sm_90:resident-128-bf16-cross_entropy-few_rollouts"] = resident_case(
        90, 128, loss="cross_entropy", rollouts=3
    )
    found["sm_90:step-1-bf16"] = step_case(90, 1, store=True)
    found["sm_90:step-500-bf16"] = step_case(90, 500, store=True)
    found["sm_90:step-1024-bf16"] = step_case(90, 1024, store=True)
    for units in (512, 1024):
        found[f"sm_90:step-{units}-bf16-few_rollouts"] = step_case(90, units, store=True, rollouts=32)
    found["sm_90:step-512-bf16-loose"] = step_case(90, 512, store=True, rollouts=5)
    found["sm_90:step-512-bf16-few_rows"] = step_case(90, 512, store=True, rollouts=128, batch=1)
    found["sm_90:step-512-bf16-few_rows-few_rollouts"] = step_case(90, 512, store=True, rollouts=32, batch=4)
    found["sm_90:step-1024-bf16-gaussian"] = step_case(90, 1024, noise="gaussian")
    found["sm_90:step-1024-bf16-wide"] = step_case(90, 1024, wide=True)
    found["sm_90:step-512-bf16-gaussian"] = step_case(90, 512, noise="gaussian")
    found["sm_90:step-512-bf16-relu"] = step_case(90, 512, cell="relu")
    found["sm_90:step-512-bf16-wide"] = step_case(90, 512, wide=True)
    for arch, units, precision in (
        *((90, 512, "bf16"), (90, 1024, "bf16"), (80, 512, "tf32"), (90, 512, "tf32"), (100, 512, "tf32")),
        *((80, 512, "fp32"), (100, 512, "fp32"), (100, 512, "bf16")),
    ):
        wide = step_case(arch, units, precision, "cross_entropy", store=True, outputs=JOINED_OUTPUTS)
        found[f"sm_{arch}:step-{units}-{precision}-cross_entropy-{JOINED_OUTPUTS}"] = wide
    for name, changes in READ_OUT.items():
        found[f"sm_90:step-512-bf16-{name}"] = step_case(90, 512, **{"loss": "cross_entropy", "store": True, **changes})
    for kind in ("rademacher", "gaussian"):
        found[f"noise-{kind}-fp32"] = noise_case(kind, "*fp32")
    found["sm_90:noise-rademacher-bf16"] = noise_case("rademacher", "*bf16")
    found["sum_partials"] = sum_case()
    return found
