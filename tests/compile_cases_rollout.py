"""The noise and rollout kernels as the compile-only leg compiles them, with the launch configurations of `tiles.py`."""

from anpgpu.kernels import noise_triton, resident_triton, stepwise_triton
from anpgpu.kernels.tiles import NOISE_LAUNCH, next_power_of_two, rollout_launch, takes_quotient_rows

ARCHES = (80, 89, 90, 100)
OPERANDS = {"bf16": "*bf16", "fp16": "*fp16", "tf32": "*fp32", "fp32": "*fp32"}
STORED = {"bf16": "*bf16", "fp16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
NONE = ("=", None)
ROWS = ("i32:16", "i32:16", ("=", 1))
SCALARS = ("i32:16", ("=", 1))
MANY = 1024
OUTPUTS = 10


def _parts(precision, nonlinearity, loss, store, wide, readout):
    """Return the signature's parts that both forms share."""
    wide = wide or precision == "fp32"
    tanh = nonlinearity == "tanh"
    clean = ("*fp32" if wide or not tanh else NONE, "*fp32" if tanh else NONE)
    behind = loss in {"squared", "cross_entropy", "outputs"} and readout
    signal = (
        "*fp32" if loss in {"linear", "squared", "cross_entropy"} else NONE,
        "*i64" if loss == "cross_entropy" else NONE,
        "*fp32" if loss in {"squared", "cross_entropy"} else NONE,
    )
    kept = (STORED[precision], "i32:16") if store else (NONE, NONE)
    flags = {
        "NONLINEARITY": nonlinearity,
        "PRECISION": precision,
        "FAST": precision != "fp32",
        "WIDE": wide,
    }
    return clean, signal, OPERANDS[precision] if behind else NONE, kept, flags


def _launch(units, loss, readout, precision, arch, form, rollouts=MANY):
    behind = loss in {"squared", "cross_entropy", "outputs"} and readout
    return rollout_launch(
        units=units,
        outputs=OUTPUTS if behind else units,
        loss=loss,
        has_readout=behind,
        batch=MANY,
        rollouts=rollouts,
        precision=precision,
        arch=arch,
        form=form,
    )


def _size(size):
    """Return the type that a size has in a tuple, where 1 becomes a constant."""
    return ("=", 1) if size == 1 else "i32:16" if size % 16 == 0 else "i32"


def resident_case(
    arch, units, precision="bf16", loss="linear", store=False, noise="rademacher", nonlinearity="tanh", wide=False,
    readout=True, start=False, rollouts=MANY,
):  # fmt: skip
    launch = _launch(units, loss, readout, precision, arch, "resident", rollouts)
    clean, signal, readout_ptr, kept, flags = _parts(precision, nonlinearity, loss, store, wide, readout)
    if nonlinearity == "tanh" and takes_quotient_rows(
        launch, units=units, precision=precision, arch=arch, noise=noise, keeps=store or start
    ):
        clean = ("*fp32", "*fp32")
    full = units == next_power_of_two(units) and units >= 16
    rows = ROWS if units % 16 == 0 else ("i32", "i32", ("=", 1))
    signature = {
        "clean": clean,
        "weight_ptr": OPERANDS[precision],
        "loss": (*signal, readout_ptr),
        "start_ptr": OPERANDS[precision] if start else NONE,
        "results": ("*fp32" if loss != "none" else NONE, *kept, STORED[precision]),
        "seed_ptr": "*i64",
        "strides": (rows, rows, rows, SCALARS, SCALARS),
        "time": "i32",
        "batch": "i32",
        "rollouts": "i32",
        "sizes": (_size(units), _size((launch.block_outputs and OUTPUTS) or units)),
        "sigma": "fp32",
        "counters_low": "i64",
        "counters_high": "i64",
    }
    constexprs = {
        **flags,
        "NOISE": noise,
        "LOSS": loss,
        "FULL": full,
        "SAMPLES": launch.samples,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_OUTPUTS": max(launch.block_outputs, 16),
    }
    return _case(resident_triton.resident_kernel, signature, constexprs, launch)


def step_case(
    arch, units, precision="bf16", loss="linear", store=False, noise="rademacher", nonlinearity="tanh", wide=False,
    rollouts=MANY,
):  # fmt: skip
    launch = _launch(units, loss, True, precision, arch, "stepwise", rollouts)
    clean, signal, _, kept, flags = _parts(precision, nonlinearity, loss, store, wide, True)
    linear = loss == "linear"
    signature = {
        "clean": clean,
        "weight_ptr": OPERANDS[precision],
        "states": (OPERANDS[precision], OPERANDS[precision]),
        "loss": (signal[0] if linear else NONE, "*fp32" if linear else NONE),
        "kept": kept,
        "seed_ptr": "*i64",
        "strides": (ROWS, ROWS, ROWS),
        "step": "i32",
        "slot": "i32",
        "rows": "i32",
        "rollouts": "i32",
        "sizes": (_size(units), "i32:16"),
        "sigma": "fp32",
        "counters_low": "i64",
        "counters_high": "i64",
    }
    constexprs = {
        **flags,
        "NOISE": noise,
        "ONE_SAMPLE": launch.samples == 1,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_INNER": launch.block_inner,
        "STAGES": launch.stages,
    }
    return _case(stepwise_triton.step_kernel, signature, constexprs, launch)


def measure_case(arch, loss, precision="bf16", readout=True, units=512):
    launch = _launch(units, loss, readout, precision, arch, "stepwise")
    _, signal, readout_ptr, _, _ = _parts(precision, "tanh", loss, False, False, readout)
    signature = {
        "state_ptr": OPERANDS[precision],
        "readout_ptr": readout_ptr,
        "loss": signal,
        "result_ptr": "*fp32",
        "strides": (ROWS, SCALARS, SCALARS),
        "step": "i32",
        "rows": "i32",
        "rollouts": "i32",
        "sizes": ("i32:16", "i32"),
        "sigma": "fp32",
    }
    constexprs = {
        "LOSS": loss,
        "PRECISION": precision,
        "ONE_SAMPLE": launch.samples == 1,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_OUTPUTS": launch.block_outputs,
        "BLOCK_INNER": launch.block_inner,
    }
    return _case(stepwise_triton.measure_kernel, signature, constexprs, launch)


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
    kernel = stepwise_triton.sum_partials_kernel
    return kernel, {**signature, "BLOCK": "constexpr"}, {"BLOCK": 256}, {"num_warps": 4}


def _case(kernel, signature, constexprs, launch):
    signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    return kernel, signature, constexprs, {"num_warps": launch.warps, "num_stages": getattr(launch, "stages", 1)}


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {}
    for arch in ARCHES:
        for precision in OPERANDS:
            units = 64 if precision == "fp32" else 128
            found[f"sm_{arch}:resident-{units}-{precision}"] = resident_case(arch, units, precision, store=True)
            found[f"sm_{arch}:step-512-{precision}"] = step_case(arch, 512, precision, store=True)
            found[f"sm_{arch}:measure-cross_entropy-{precision}"] = measure_case(arch, "cross_entropy", precision)
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
        found[f"sm_90:resident-{units}-bf16-relu"] = resident_case(90, units, nonlinearity="relu")
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
    found["sm_90:step-512-bf16-few_rollouts"] = step_case(90, 512, store=True, rollouts=32)
    found["sm_90:step-512-bf16-gaussian"] = step_case(90, 512, noise="gaussian")
    found["sm_90:step-512-bf16-relu"] = step_case(90, 512, nonlinearity="relu")
    found["sm_90:step-512-bf16-wide"] = step_case(90, 512, wide=True)
    for kind in ("rademacher", "gaussian"):
        found[f"noise-{kind}-fp32"] = noise_case(kind, "*fp32")
    found["sm_90:noise-rademacher-bf16"] = noise_case("rademacher", "*bf16")
    found["sum_partials"] = sum_case()
    return found
