"""The least-squares kernels as the compile-only leg compiles them, with the launches of `tiles_least_squares.py`."""

from anpgpu.kernels import gram_triton, inverse_triton, least_squares_triton, primal_triton
from anpgpu.kernels.gram_triton import OPERANDS, ROUNDING, Activity, Injected, Systems
from anpgpu.kernels.inverse_triton import PRODUCT_TILE, Counted, Matrices, Solved
from anpgpu.kernels.least_squares_triton import Duals
from anpgpu.kernels.tiles_least_squares import (
    blocks_of,
    inverse_launch,
    least_squares_launch,
    primal_launch,
    sign_words,
)
from anpgpu.kernels.tiles_measured import next_power_of_two

NONE, ONE = ("=", None), ("=", 1)
STORED = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
SYSTEMS = Systems("*fp32", "*fp32", "*fp32")
PRIMAL_SYSTEMS = Systems(NONE, "*fp32", "*fp32")
SOLVED = Solved("*fp32", "*i32")


def _case(kernel, signature, constexprs, warps):
    signature = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    return kernel, signature, constexprs, {"num_warps": warps}


def _size(size):
    """Return the type of a size, where 1 becomes a constant."""
    return ONE if size == 1 else "i32:16" if size % 16 == 0 else "i32"


def _activity(operand):
    return Activity(STORED[operand], "i32:16", "i32:16", "i32:16", "*i8")


def products_case(rollouts, units=512, operand="bf16", noise="rademacher", primal=False):
    """Gram and noise products; in the primal form the noise products alone, always in float32."""
    packed = noise == "rademacher"
    launch = least_squares_launch(rollouts, units, operand, packed=packed)
    signature = {
        "systems": PRIMAL_SYSTEMS if primal else SYSTEMS,
        "activity": _activity(operand),
        "injected": Injected("*i32" if packed else NONE, NONE if packed else "*fp32"),
        "batch": "i32",
        "rollouts": _size(rollouts),
        "units": _size(units),
        "words": _size(sign_words(units)),
        "width": "i32:16",
    }
    constexprs = {
        "OPERAND": OPERANDS[operand],
        "DOT": ROUNDING[operand],
        "TILES": launch.tiles,
        "BLOCK": launch.block,
        "UNITS": launch.gram_units,
        "STAGES": launch.gram_stages,
    }
    return _case(gram_triton.products_kernel, signature, constexprs, launch.gram_warps)


def signs_case():
    signature = {"words_ptr": "*i32", "seed_ptr": "*i64", "rows": "i64", "batch": "i32", "rollouts": "i32"}
    signature |= {"words": "i32", "counters_low": "i64", "counters_high": "i64"}
    return _case(gram_triton.signs_kernel, signature, {"BLOCK_ROWS": gram_triton.SIGN_ROWS}, 4)


def invert_case(size, later=False):
    """Invert in place; LATER: the second of two blocks."""
    rows = blocks_of(size)[int(later)]
    launch = inverse_launch(rows)
    matrices = Matrices("*fp32", "i32:16", "i32:16", ONE)
    constexprs = {
        "LATER": later,
        "BLOCK": launch.block,
        "PANEL": launch.panel,
        "LONGEST": max(16, next_power_of_two(size)),
    }
    signature = {
        "result": matrices,
        "source": matrices,
        "solved": SOLVED,
        "counted": Counted("*i8", "i32:16", ONE, "i32:16", "i32:16"),
        "batch": "i32",
        "rollouts": "i32",
        "size": _size(rows),
        "width": "i32:16",
        "ridge": "fp32",
    }
    return _case(inverse_triton.invert_kernel, signature, constexprs, launch.warps)


def multiply_case():
    matrices = Matrices("*fp32", "i32:16", "i32:16", ONE)
    signature = dict.fromkeys(("result", "base", "left", "right"), matrices)
    signature |= dict.fromkeys(("height", "width", "inner"), "i32")
    constexprs = {"SIGN": -1.0, "BLOCK": PRODUCT_TILE, "INNER": 32}
    return _case(inverse_triton.multiply_kernel, signature, constexprs, 4)


def rescue_case():
    signature = {"result": Matrices("*fp32", "i32:16", "i32:16", ONE), "solved": SOLVED, "size": "i32"}
    return _case(inverse_triton.rescue_kernel, signature, {"BLOCK": PRODUCT_TILE}, 4)


def units_gram_case(units, operand):
    launch = primal_launch(units)
    signature = {"gram_ptr": "*fp32", "unit_ptr": "*fp32", "activity": _activity(operand), "batch": "i32"}
    signature |= {"rollouts": "i32:16", "units": _size(units), "width": "i32:16"}
    constexprs = {
        "OPERAND": OPERANDS[operand],
        "DOT": ROUNDING[operand],
        "TILES": launch.tiles,
        "BLOCK": launch.block,
        "ROLLOUTS": launch.rollouts,
        "STAGES": launch.stages,
    }
    return _case(primal_triton.units_gram_kernel, signature, constexprs, launch.warps)


def regressors_case(units, operand):
    launch = primal_launch(units)
    signature = dict.fromkeys(("regressors_ptr", "inverse_ptr", "unit_ptr"), "*fp32")
    signature |= {"activity": _activity(operand), "batch": "i32", "rollouts": "i32:16", "units": _size(units)}
    signature["width"] = "i32:16"
    constexprs = {"BLOCK": launch.block, "INNER": launch.inner}
    return _case(primal_triton.regressors_kernel, signature, constexprs, launch.warps)


def recursion_case(rollouts, primal=False):
    launch = least_squares_launch(rollouts, 512, "fp32" if primal else "bf16")
    signature = {
        "duals": Duals("*fp32", NONE if primal else "*fp32", "*fp32", "*fp32"),
        "systems": PRIMAL_SYSTEMS if primal else SYSTEMS,
        "delta_loss_ptr": "*fp32",
        "carry_ptr": "*fp32",
        "finite_ptr": "*i8",
        **dict.fromkeys(("time", "batch"), "i32"),
        "rollouts": _size(rollouts),
        "width": "i32:16",
        **dict.fromkeys(("discount", "sigma"), "fp32"),
    }
    constexprs = {
        "BASELINE": True,
        "PREFETCHES": launch.prefetches,
        "ROWS": launch.recursion_rows,
        "TILES": launch.block * launch.tiles // launch.recursion_rows,
    }
    return _case(least_squares_triton.recursion_kernel, signature, constexprs, launch.recursion_warps)


def half_case(size):
    launch = inverse_launch(size)
    signature = {"dual_ptr": "*fp32", "credit_ptr": "*fp32", "inverse_ptr": "*fp32", "rollouts": "i32:16"}
    signature |= {"size": "i32:16", "width": "i32:16"}
    return _case(least_squares_triton.half_kernel, signature, {"HALF": 0, "BLOCK": launch.block}, launch.warps)


def sums_case(operand, halves, primal=False):
    launch = least_squares_launch(128, 512, operand)
    signature = {
        "adjoint_ptr": "*fp32",
        "activity": _activity(operand),
        "duals": Duals("*fp32", "*fp32" if halves else NONE, "*fp32", "*fp32"),
        "halves_ptr": "*fp32" if halves else NONE,
        "unit_ptr": "*fp32",
        "batch": "i32",
        "rollouts": "i32:16",
        "units": "i32:16",
        "parts_stride": "i64",
    }
    constexprs = {"DUAL": not primal, "BLOCK": launch.block, "UNITS": launch.sum_units}
    return _case(least_squares_triton.sums_kernel, signature, constexprs, launch.sum_warps)


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {
        "gram-128-bf16": products_case(128),
        "signs": signs_case(),
        "invert-128": invert_case(128),
        "multiply": multiply_case(),
        "recursion-128": recursion_case(128),
        "lambda-bf16": sums_case("bf16", halves=True),
        "units_gram-128-bf16": units_gram_case(128, "bf16"),
        "regressors-128-bf16": regressors_case(128, "bf16"),
        "noise-256-primal": products_case(256, units=128, operand="fp32", primal=True),
    }
    for name, case in {
        "gram-256-bf16": products_case(256),
        "gram-128-fp32": products_case(128, operand="fp32"),
        "gram-128-bf16-gaussian": products_case(128, noise="gaussian"),
        "gram-32-bf16": products_case(32),
        "gram-1-bf16-1_units": products_case(1, units=1),
        "invert-32": invert_case(32),
        "invert-148-later": invert_case(148, later=True),
        "rescue": rescue_case(),
        "recursion-1": recursion_case(1),
        "recursion-64": recursion_case(64),
        "recursion-256": recursion_case(256),
        "half-64": half_case(64),
        "lambda-fp32-whole": sums_case("fp32", halves=False),
        "lambda-primal": sums_case("fp32", halves=False, primal=True),
        "units_gram-128-fp32": units_gram_case(128, "fp32"),
        "units_gram-1-fp32": units_gram_case(1, "fp32"),
        "regressors-128-fp32": regressors_case(128, "fp32"),
        "regressors-1-fp32": regressors_case(1, "fp32"),
        "noise-256-primal-gaussian": products_case(256, units=128, operand="fp32", noise="gaussian", primal=True),
        "noise-2-primal-1_units": products_case(2, units=1, operand="fp32", primal=True),
        "recursion-2-primal": recursion_case(2, primal=True),
        "recursion-64-primal": recursion_case(64, primal=True),
        "recursion-128-primal": recursion_case(128, primal=True),
        "recursion-256-primal": recursion_case(256, primal=True),
    }.items():
        found[f"sm_90:{name}"] = case
    return found
