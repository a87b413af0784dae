"""The adjoint kernels as the compile-only leg compiles them: (kernel, signature, constexprs, options) of each case.

The constexprs and the number of warps are those that the launchers choose.
"""

from anpgpu.kernels import adjoint_triton, cell_triton, finite_triton, rollout_fused_triton, tiles
from anpgpu.kernels.noise import UNITS_PER_GROUP

WIDTHS = (64, 256, 512, 2048)
"""Hidden units; 512 stands for every width that fills the signs of a Philox block."""

TYPES = {"ptr": "*fp32", "activity": "*bf16", "int": "i32", "long": "i64", "float": "fp32"}


def _case(kernel, kinds, constexprs, warps, **types):
    """Name the type of every argument that is not a constexpr, in order."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = dict(zip(names, (types.get(kind, TYPES.get(kind, kind)) for kind in kinds.split()), strict=True))
    signature.update(dict.fromkeys(constexprs, "constexpr"))
    return kernel, {name: signature[name] for name in kernel.arg_names}, constexprs, {"num_warps": warps}


def activity_sum_case(units, activity, rows=1024, rollouts=256):
    launch = tiles.activity_launch(rows, rollouts, units)
    constexprs = {
        "FUSED": launch.unit_blocks == 1,
        "ALIGNED": 16,
        "BLOCK_ROLLOUTS": launch.block_rollouts,
        "BLOCK_UNITS": launch.block_units,
    }
    kinds = "ptr ptr activity int int int long long long float int int"
    return _case(adjoint_triton._activity_sum_kernel, kinds, constexprs, launch.warps, activity=activity)


def noise_sum_case(units, kind, rows=1024, rollouts=256):
    launch = tiles.noise_sum_launch(rows, rollouts, units, kind)
    constexprs = {
        "KIND": kind,
        "UNITS": UNITS_PER_GROUP[kind],
        "FAST": True,
        "COLUMN_UNITS": launch.column_units,
        "LANES": launch.lanes,
    }
    kinds = "ptr ptr *i64 long int int int int float long long"
    return _case(adjoint_triton._noise_sum_kernel, kinds, constexprs, 1)


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    found = {}
    for units in WIDTHS:
        for activity in ("*bf16", "*fp32"):
            found[f"activity_sum-{activity[1:]}-{units}"] = activity_sum_case(units, activity)
        for kind in ("rademacher", "gaussian"):
            found[f"noise_sum-{kind}-{units}"] = noise_sum_case(units, kind)
    for activity in ("*bf16", "*fp32"):
        wide = 2 * tiles.WIDEST_TILE
        found[f"activity_sum-{activity[1:]}-{wide}"] = activity_sum_case(wide, activity)
        kinds = "ptr ptr activity long int int int long long long float"
        launch = tiles.activity_launch(1024, 256, wide)
        sizes = {"BLOCK_ROLLOUTS": launch.norm_rollouts, "BLOCK_UNITS": launch.norm_units}
        found[f"share-{activity[1:]}"] = _case(adjoint_triton._share_kernel, kinds, sizes, 4, activity=activity)
    for has_carry in (False, True):
        sizes = {"HAS_CARRY": has_carry, "BLOCK": tiles.RETURNS_BLOCK}
        found[f"returns-{has_carry}"] = _case(adjoint_triton._returns_kernel, "ptr ptr ptr float int long", sizes, 4)
    sizes = {"COLUMNS": tiles.MARK_COLUMNS, "ROWS": tiles.MARK_ROWS}
    for activity in ("*bf16", "*fp32"):
        found[f"mark-{activity[1:]}"] = _case(
            finite_triton._mark_kernel,
            "*i8 ptr activity *i8 int int int int long long",
            {"FIRST": activity == "*bf16", **sizes},
            4,
            activity=activity,
        )
    sizes = {"BLOCK": tiles.QUOTIENT_BLOCK}
    found["quotient_rows"] = _case(cell_triton._quotient_kernel, "ptr ptr ptr ptr long float", sizes, 4)
    sizes = {"BLOCK": tiles.SPLIT_SUM_BLOCK}
    found["add_partials"] = _case(rollout_fused_triton._add_partials_kernel, "ptr ptr int long", sizes, 4)
    return found
