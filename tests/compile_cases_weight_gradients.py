"""The kernels of weight gradients as the compile-only leg compiles them, with the launches of their tiles."""

from anpgpu.kernels.tiles_weight_gradients import CHUNK_ROWS, REDUCED, weight_gradients_launch
from anpgpu.kernels.weight_gradients_triton import Factor, Sums, products_kernel, reduce_kernel

NONE, ONE = ("=", None), ("=", 1)


def _size(size):
    """Return the type of a size or stride, where 1 becomes a constant."""
    return ONE if size == 1 else "i32:16" if size % 16 == 0 else "i32"


def _factor(size, stride=None):
    return Factor("*fp32", "i32:16" if size % 16 == 0 else "i32", _size(stride or size), ONE, _size(size))


def products_case(units, inputs, *, adds=False, rows=6400):
    """W_ih and W_hh of an RNN; a readout's weight where there are no inputs."""
    launch = weight_gradients_launch(rows, 2, units, (inputs or units, units if inputs else 0))
    signature = {
        "sums": Sums("*fp32", "*fp32" if inputs else NONE, "*fp32"),
        "adjoint": _factor(units),
        "first": _factor(inputs or 512),
        "second": _factor(units) if inputs else Factor(NONE, *4 * [("=", 0)]),
        **dict.fromkeys(("rows", "batch", "splits", "split_rows", "first_tiles"), "i32"),
        "split_stride": "i64",
        "part_stride": "i64:16" if units % 16 == 0 else "i64",
    }
    constexprs = {
        "ADDS": adds,
        "BLOCK_UNITS": launch.block_units,
        "BLOCK_COLUMNS": launch.block_columns,
        "INNER": launch.inner,
        "CHUNK": CHUNK_ROWS,
        "STAGES": launch.stages,
    }
    signature |= dict.fromkeys(constexprs, "constexpr")
    return products_kernel, signature, constexprs, {"num_warps": launch.warps}


def reduce_case(*, second=True):
    signature = {
        "sums": Sums("*fp32", "*fp32" if second else NONE, "*fp32"),
        "room_ptr": "*fp32",
        **dict.fromkeys(("first_size", "second_size", "bias_size"), "i64"),
        "splits": "i32",
    }
    constexprs = {"ADDS": True, "BLOCK": REDUCED}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return reduce_kernel, signature, constexprs, {"num_warps": 4}


def cases():
    """Return {name: (kernel, signature, constexprs, options)}."""
    return {
        "weight-gradients-512": products_case(512, 16),
        "weight-gradients-64": products_case(64, 10),
        "weight-gradients-reduce": reduce_case(),
        "sm_90:weight-gradients-2048-adds": products_case(2048, 128, adds=True),
        "sm_90:weight-gradients-500": products_case(500, 3),
        "sm_90:weight-gradients-readout": products_case(10, 0),
        "sm_90:weight-gradients-1": products_case(1, 1, rows=1),
        "sm_90:weight-gradients-reduce-readout": reduce_case(second=False),
    }
