"""What Triton makes of the clean run and of which rollouts count, in its interpreter, against the torch reference."""

import math

import pytest
import tolerances
import torch

from anpgpu.kernels import finite as reference, tiles
from anpgpu.kernels.cell import quotient_rows

finite_triton = pytest.importorskip("anpgpu.kernels.finite_triton", reason="needs Triton")
cell_triton = pytest.importorskip("anpgpu.kernels.cell_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SHAPES = ((1, 1, 1, 1), (5, 3, 7, 4), (33, 2, 65, 33), (2, 5, 40, 130), (64, 1, 64, 32))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["loss", "trusted", "states alone"])
def test_marks_are_the_references(shape, first, form):
    time, batch, rollouts, units = shape
    generator = torch.Generator().manual_seed(sum(shape))
    delta_loss = torch.randn(time, batch, rollouts, generator=generator)
    delta_h = torch.randn(batch, rollouts, units, generator=generator)
    for values in (delta_loss, delta_h):
        for hole in (math.nan, math.inf, -math.inf):
            values.view(-1)[torch.randint(values.numel(), (1 + batch * rollouts // 16,), generator=generator)] = hole
    whole = torch.rand(batch, 2 * rollouts, generator=generator) < 0.7
    trust = torch.rand(batch, generator=generator) < 0.5 if form == "trusted" else None
    found = []
    for module in (reference, finite_triton):
        given, marks = None if form == "states alone" else delta_loss.clone(), whole.clone()
        seen = module.mark_finite(marks[:, rollouts:], given, delta_h, first=first, trust=trust)
        found.append((marks, seen))
    (expected, masked), (marks, seen) = found
    assert torch.equal(marks, expected)
    assert (seen is None) == (masked is None)
    if masked is not None:
        torch.testing.assert_close(seen, masked, rtol=0, atol=0, equal_nan=True)


def test_marks_of_blocks_are_read_where_they_are():
    """Loss differences of a slice of the samples are no contiguous tensor."""
    delta_loss, delta_h = torch.randn(4, 6, 5), torch.randn(6, 5, 3)
    delta_loss[1, 3, 2] = math.nan
    finite = torch.ones(3, 5, dtype=torch.bool)
    seen = finite_triton.mark_finite(finite, delta_loss[:, 1::2], delta_h[1::2], first=True)
    assert torch.equal(finite, torch.isfinite(delta_loss[:, 1::2]).all(0))
    assert torch.equal(seen, torch.where(finite, delta_loss[:, 1::2], 0))


def test_an_empty_batch_has_no_marks():
    finite = torch.empty(0, 5, dtype=torch.bool)
    assert finite_triton.mark_finite(finite, torch.empty(4, 0, 5), torch.empty(0, 5, 3), first=True).shape == (4, 0, 5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 64), (7, 3, 130)], ids=str)
def test_quotient_rows_are_the_references(shape):
    preact = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    preact.view(-1)[-1] = 60.0
    hidden = preact.tanh()
    inverse, ratio = quotient_rows(preact, hidden, cell_triton.LEAST_SLOPE)
    seen = cell_triton._tanh_rows(preact, hidden, False, True)
    tolerances.assert_close(seen[0], inverse * (1 + 2.0**-23), "float32")
    tolerances.assert_close(seen[1], ratio, "float32")
    assert torch.isfinite(seen[0]).all()


def test_quotient_rows_of_a_part_of_the_samples_and_of_a_nan():
    preact = torch.randn(3, 4, 16)
    preact[0, 1, 2] = math.nan
    part, hidden = preact[:, 1:3], preact[:, 1:3].tanh()
    seen = cell_triton._tanh_rows(part, hidden, False, True)
    assert torch.equal(seen[0].isnan(), part.isnan())
    assert torch.equal(seen[1].isnan(), part.isnan())
