"""The fused kernel as the compile-only leg compiles it, with the launch configurations of `tiles.py`."""

import compile_cases_rollout

from anpgpu.kernels import rollout_fused_triton
from anpgpu.kernels.rollout_fused_triton import Counted, FusedResults
from anpgpu.kernels.tiles import fused_launch

MANY = compile_cases_rollout.MANY
NONE = compile_cases_rollout.NONE
COUNTED = {"": Counted(NONE, NONE), "-finite": Counted("*i8", NONE), "-again": Counted("*i8", "*i8")}
"""What a launch is limited to: nothing, rollouts known before, or the tiles of those that turned out not finite."""


def fused_case(arch, units, weight_by, precision="bf16", rollouts=MANY, counted="", **variant):
    """Return the resident kernel's case with what differs."""
    _, signature, constexprs, _ = compile_cases_rollout.resident_case(
        arch, units, precision, rollouts=rollouts, **variant
    )
    launch = fused_launch(
        compile_cases_rollout._launch(
            units, variant.get("loss", "linear"), True, precision, arch, "resident", rollouts
        ),
        rollouts=rollouts,
        precision=precision,
        arch=arch,
    )
    constexprs = {name: value for name, value in constexprs.items() if name not in {"SAMPLES", "PIECES"}}
    constexprs |= {"BY_NOISE": weight_by == "noise", "PRODUCT": launch.product, "BLOCK_ROWS": launch.block_rows}
    signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    signature["results"] = FusedResults("*fp32", signature["results"].delta_h, "*fp32")
    signature["counted"] = COUNTED[counted]
    # These rollouts take h alone.
    signature["clean"] = compile_cases_rollout.clean_rows(precision, "tanh", False, units)
    kernel, signature, constexprs, settings = compile_cases_rollout._case(
        rollout_fused_triton.fused_kernel, signature, constexprs, launch
    )
    return kernel, signature, constexprs, {**settings, "maxnreg": launch.registers}


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {}
    for method, weight_by in (("anp", "activity"), ("np", "noise")):
        for units in (128, 256):
            found[f"sm_90:fused-{units}-bf16-{method}"] = fused_case(90, units, weight_by)
            found[f"sm_90:fused-{units}-bf16-{method}-again"] = fused_case(90, units, weight_by, counted="-again")
        found[f"sm_90:fused-128-bf16-{method}-finite"] = fused_case(90, 128, weight_by, counted="-finite")
        found[f"sm_90:fused-128-tf32-{method}"] = fused_case(90, 128, weight_by, "tf32")
    found["sm_90:fused-64-fp16-anp"] = fused_case(90, 64, "activity", "fp16")
    found["sm_90:fused-64-fp32-anp"] = fused_case(90, 64, "activity", "fp32")
    found["sm_90:fused-1-bf16-anp"] = fused_case(90, 1, "activity")
    found["sm_90:fused-100-bf16-anp-cross_entropy"] = fused_case(90, 100, "activity", loss="cross_entropy", start=True)
    for arch in (80, 89, 100):
        found[f"sm_{arch}:fused-128-bf16-anp"] = fused_case(arch, 128, "activity")
        found[f"sm_{arch}:fused-128-bf16-anp-again"] = fused_case(arch, 128, "activity", counted="-again")
    return found
