"""The recursion of learned feedback as the compile-only leg compiles it."""

from compile_cases_least_squares import NONE, _case, _size

from anpgpu.kernels.feedback_triton import Ends, Prior, Regressed, Results, feedback_kernel
from anpgpu.kernels.gram_triton import Injected
from anpgpu.kernels.tiles_least_squares import feedback_launch


def feedback_case(rollouts, units, noise="rademacher", baseline=False):
    packed = noise == "rademacher"
    launch = feedback_launch(rollouts, units)
    signature = {
        "results": Results(*["*fp32"] * 4),
        "handed": Ends("*fp32", "*fp32"),
        "prior": Prior(*["*fp32"] * 4),
        "regressed": Regressed("*fp32", "*fp32", "*fp32", "*i8", "*fp32", "i32:16", _size(rollouts)),
        "injected": Injected("*i32" if packed else NONE, NONE if packed else "*fp32"),
        "start": Ends("*fp32", "*fp32"),
        **dict.fromkeys(("time", "batch"), "i32"),
        "units": _size(units),
        **dict.fromkeys(("discount", "sigma"), "fp32"),
    }
    constexprs = {"BASELINE": baseline, "BLOCK": launch.block, "ROWS": launch.rows, "UNITS": launch.units}
    return _case(feedback_kernel, signature, constexprs, launch.warps)


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    return {
        "feedback-8-128": feedback_case(8, 128),
        "feedback-32-512": feedback_case(32, 512),
        "sm_90:feedback-64-1024": feedback_case(64, 1024),
        "sm_90:feedback-64-1024-gaussian-baseline": feedback_case(64, 1024, "gaussian", baseline=True),
        "sm_90:feedback-1-1": feedback_case(1, 1),
        "sm_90:feedback-4-24": feedback_case(4, 24),
    }
