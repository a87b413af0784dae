"""The compiled Cholesky factors of the CPU against float64."""

import pytest
import torch
from tolerances import assert_close, relative_error

from anpgpu.kernels.least_squares import back, factored, smaller_gram

least_squares_numba = pytest.importorskip("anpgpu.kernels.least_squares_numba", reason="needs Numba")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 33, 64, 67, 128, 131])
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_factors_are_those_of_float64(size, ridge):
    finite = torch.ones(3, 5, dtype=torch.bool)
    finite[1, :2] = False
    moved = draw(2, 3, size, 2 * size)
    gram = (moved @ moved.mT).float()
    if size > 1:
        gram[1, 2, -1, 0] = 9 * gram[1, 2].trace()
    wanted = gram.double()
    # What lies above the diagonal is not read.
    gram = torch.where(torch.ones(size, size, dtype=torch.bool).tril(), gram, torch.nan)
    expected, number = factored(wanted.clone(), ridge, finite)
    factor, bad = least_squares_numba.factored(gram.clone(), ridge, finite)
    assert bad == number == (size > 1)
    assert_close(factor.tril(), expected.tril(), "float32_long")
    alike, _ = least_squares_numba.factored(gram.mT.contiguous().mT, ridge, finite)
    assert torch.equal(alike.tril(), factor.tril())


def test_a_factor_is_as_good_as_lapacks_at_a_small_ridge():
    # Columns that shrink make the matrices nearly singular.
    moved = (draw(4, 8, 96, 128) * torch.logspace(0, -3, 128, dtype=torch.float64)).float()
    side = draw(4, 8, 96, 1)
    finite = torch.ones(8, 96, dtype=torch.bool)
    exact = back(moved.double(), factored(smaller_gram(moved.double()), 1e-5, finite)[0], side)
    errors = []
    for factors in (factored, least_squares_numba.factored):
        found = back(moved, factors(smaller_gram(moved), 1e-5, finite)[0], side.float())
        errors.append(relative_error(found, exact))
    assert errors[1] < 4 * errors[0]
