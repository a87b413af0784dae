"""Rollouts of gated cells as the compile-only leg compiles it, with the launch configurations of `tiles.py`."""

from compile_cases_rollout import (
    ARCHES,
    MANY,
    NO_ROWS,
    NONE,
    OPERANDS,
    STORED,
    _case,
    _launch,
    _size,
    joined_functions,
    measured_part,
    rows,
)

from anpgpu.kernels.cell_gated_triton import GATED_CELLS
from anpgpu.kernels.place_triton import Stored
from anpgpu.kernels.rollout_gated_resident_triton import GatedEnds, GatedLoss, gated_resident_kernel
from anpgpu.kernels.rollout_gated_triton import GatedLinear, GatedStates, gated_step_kernel
from anpgpu.kernels.rollout_stepwise_triton import StepSizes
from anpgpu.registry import CELLS


def gated_case(
    arch, cell, precision="bf16", units=512, loss="linear", store=True, noise="rademacher", wide=False, rollouts=MANY,
    memory_grad=False,
):  # fmt: skip
    forms = CELLS[cell].forms
    launch = _launch(units, loss, True, precision, arch, "stepwise", rollouts, gates=forms.gates, wide=wide)
    linear, operand = loss == "linear", OPERANDS[precision]
    signature = {
        "clean": rows(units),
        "weight_ptr": operand,
        "states": GatedStates(operand, operand, "*fp32"),
        "linear": GatedLinear(
            "*fp32" if linear else NONE, rows(units) if linear else NO_ROWS, rows(units) if memory_grad else NO_ROWS
        ),
        **measured_part(launch, loss, operand),
        "stored": Stored(STORED[precision], "i32:16") if store else NONE,
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
        "NOISE": noise,
        "CELL": GATED_CELLS[forms.triton].deviation,
        "GATES": forms.gates,
        "MEMORY": forms.states > 1,
        "PRECISION": precision,
        "FAST": precision != "fp32",
        "WIDE": wide or precision == "fp32",
        **joined_functions(launch, loss),
        "ONE_SAMPLE": launch.samples == 1,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_INNER": launch.block_inner,
        "STAGES": launch.stages,
    }
    return _case(gated_step_kernel, signature, constexprs, launch)


def resident_case(
    arch, cell, units=128, precision="bf16", loss="linear", store=True, noise="rademacher", start=False, rollouts=MANY,
):  # fmt: skip
    forms = CELLS[cell].forms
    launch = _launch(units, loss, True, precision, arch, "resident", rollouts, gates=forms.gates)
    linear = loss == "linear"
    signature = {
        "clean": rows(16),
        "weight_ptr": OPERANDS[precision],
        "loss": GatedLoss(
            "*fp32" if linear else NONE, rows(units) if linear else NO_ROWS, rows(units) if start else NO_ROWS
        ),
        "ends": GatedEnds("*fp32" if start else NONE, "*fp32"),
        "stored": Stored(STORED[precision], "i32:16") if store else NONE,
        "seed_ptr": "*i64",
        "time": "i32",
        "batch": "i32",
        "rollouts": "i32",
        "units": _size(units),
        "sigma": "fp32",
        "counters_low": "i64",
        "counters_high": "i64",
    }
    constexprs = {
        "NOISE": noise,
        "CELL": GATED_CELLS[forms.triton].deviation,
        "GATES": forms.gates,
        "MEMORY": forms.states > 1,
        "PRECISION": precision,
        "FAST": precision != "fp32",
        "WIDE": precision == "fp32",
        "FULL": units == launch.block_units,
        "SAMPLES": launch.samples,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_UNITS": launch.block_units,
    }
    return _case(gated_resident_kernel, signature, constexprs, launch)


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {}
    for cell in ("gru", "lstm"):
        for arch in ARCHES:
            found[f"sm_{arch}:{cell}-512-bf16"] = gated_case(arch, cell)
            found[f"sm_{arch}:{cell}-512-bf16-cross_entropy"] = gated_case(arch, cell, loss="cross_entropy")
    found["sm_90:lstm-512-bf16-few_rollouts"] = gated_case(90, "lstm", rollouts=32, memory_grad=True)
    found["sm_90:lstm-512-bf16-wide"] = gated_case(90, "lstm", wide=True)
    found["sm_80:gru-500-fp32"] = gated_case(80, "gru", "fp32", 500, noise="gaussian")
    found["sm_80:gru-500-fp32-squared"] = gated_case(80, "gru", "fp32", 500, "squared", noise="gaussian")
    found["sm_90:lstm-512-bf16-cross_entropy-few_rollouts"] = gated_case(90, "lstm", loss="cross_entropy", rollouts=32)
    for cell in ("gru", "lstm"):
        for units in (64, 128):
            found[f"sm_90:{cell}-resident-{units}-bf16"] = resident_case(90, cell, units)
    found["sm_90:gru-resident-128-fp16-few_rollouts"] = resident_case(90, "gru", precision="fp16", rollouts=32)
    found["sm_90:lstm-resident-128-bf16-few_rollouts"] = resident_case(90, "lstm", rollouts=3)
    found["sm_90:lstm-resident-128-bf16-gaussian-start"] = resident_case(90, "lstm", noise="gaussian", start=True)
    found["sm_90:lstm-resident-100-bf16"] = resident_case(90, "lstm", 100)
    return found
