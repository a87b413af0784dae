"""The cross-entropy at clean outputs as the compile-only leg compiles it: a narrow readout, a wide one, smoothing."""

from compile_cases_rollout import NONE

from anpgpu.kernels import cross_entropy_triton, tiles
from anpgpu.kernels.cross_entropy_triton import Results, Shares
from anpgpu.kernels.place_triton import Scalars

NO_SHARES = Shares(NONE, NONE)


def case(outputs, shares=NO_SHARES, gradient="*fp32"):
    """Return the case of some outputs."""
    columns = min(outputs, tiles.CLEAN_LOSS_COLUMNS)
    kernel = cross_entropy_triton.cross_entropy_kernel
    constexprs = {"ROWS": min(tiles.CLEAN_LOSS_ELEMENTS // columns, tiles.CLEAN_LOSS_ROWS), "COLUMNS": columns}
    signature = {
        "outputs_ptr": "*fp32",
        "targets": Scalars("*i64", "i32:16", ("=", 1)),
        "weight": Scalars("*fp64", "i32:16", ("=", 1)),
        "shares": shares,
        "results": Results("*fp32", "*fp32", "*i64", "*fp32", gradient),
        **dict.fromkeys(("rows", "batch", "outputs"), "i32"),
        "ignore_index": "i64",
        **dict.fromkeys(constexprs, "constexpr"),
    }
    return kernel, signature, constexprs, {"num_warps": 4, **cross_entropy_triton.ASSERTED}


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    return {
        "cross_entropy-8": case(8),
        "cross_entropy-512": case(512),
        "cross_entropy-512-smoothed": case(512, Shares("*fp32", "*fp32")),
        "cross_entropy-8-value": case(8, gradient=NONE),
    }
