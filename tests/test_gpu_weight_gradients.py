"""Weight gradients on a GPU: tensor cores against float64, and what only a GPU can show."""

import math

import pytest
import torch
from tolerances import assert_close

from anpgpu.kernels import weight_gradients as reference
from anpgpu.runtime.dispatch import weight_gradients_on

pytestmark = pytest.mark.gpu

SHAPES = [
    *((1, 1, 1, 1, (1,)), (2, 7, 3, 17, (3, 17)), (3, 40, 13, 100, (10, 100)), (1, 200, 32, 10, (512,))),
    *((2, 200, 32, 512, (16, 512)), (2, 210, 1, 500, (3, 500)), (2, 100, 32, 2048, (128, 2048))),
    (2, 4096, 32, 128, (16, 128)),
]
"""parts, T, B, G, and the columns of each weight."""


def drawn(shape):
    parts, time, batch, units, columns = shape
    torch.manual_seed(0)
    adjoint = torch.randn(parts, time, batch, units, device="cuda")
    # Of one sign, sums that a tensor core cuts instead of rounding would drift.
    return adjoint, tuple(torch.rand(time, batch, size, device="cuda") for size in columns)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("same_sign", [False, True])
def test_sums_are_those_of_float64(shape, same_sign):
    adjoint, presynaptic = drawn(shape)
    adjoint = adjoint.abs() if same_sign else adjoint
    products = weight_gradients_on("triton", "bf16")
    found = products(adjoint, presynaptic)
    *weights, bias = reference.weight_gradients(adjoint.double(), [values.double() for values in presynaptic])
    for mine, expected in zip(found, weights, strict=False):
        assert_close(mine.cpu(), expected.cpu(), "weight_gradients")
    assert_close(found[-1].cpu(), bias.cpu(), "float32_long")
    for _ in range(5):
        assert all(map(torch.equal, products(adjoint, presynaptic), found))
    added = products(adjoint, presynaptic, [total.clone() for total in found])
    for twice, once in zip(added, found, strict=True):
        assert_close(twice.cpu(), 2 * once.cpu(), "float32_long")


def test_torchs_own_settings_are_neither_read_nor_changed():
    adjoint, presynaptic = drawn((2, 50, 8, 64, (64, 64)))
    products = weight_gradients_on("triton", "bf16")
    settings = torch.backends.cuda.matmul
    before, found = settings.fp32_precision, []
    try:
        for precision in ("ieee", "tf32"):
            settings.fp32_precision = precision
            found.append(products(adjoint, presynaptic))
            assert settings.fp32_precision == precision
    finally:
        settings.fp32_precision = before
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_out(value):
    adjoint, presynaptic = drawn((1, 40, 3, 70, (2, 70)))
    adjoint[0, 20, 1, 4] = value
    found = weight_gradients_on("triton", "tf32")(adjoint, presynaptic)
    for mine in found:
        lost = ~mine.isfinite()
        assert lost[0, 4].all()
        assert not lost[0, 5:].any()


def test_operands_of_any_strides_are_read_where_they_lie():
    adjoint, (first, second) = drawn((2, 60, 5, 90, (12, 90)))
    batch_first = first.transpose(0, 1).contiguous().transpose(0, 1)
    states = torch.cat((second, torch.full_like(second, math.nan)), -1)[..., :90]
    products = weight_gradients_on("triton", "tf32")
    for found, expected in zip(
        products(adjoint, (batch_first, states)), products(adjoint, (first, second)), strict=True
    ):
        assert_close(found.cpu(), expected.cpu(), "float32_long")
