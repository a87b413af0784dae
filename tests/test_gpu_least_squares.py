"""Least squares on a GPU: the Triton kernels against the float64 reference, and what only a GPU can show."""

import pytest
import torch
from tolerances import relative_error

import anpgpu
from anpgpu.kernels import least_squares as reference
from anpgpu.kernels.noise import Counters, noise
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.runtime.dispatch import least_squares_on

pytestmark = pytest.mark.gpu

COUNTERS = Counters(layer=7, time=2**32 - 60, rollout=2**32 - 5001, sample=2**20 - 40, rank=4095)
SHAPES = (
    *((1, 1, 1, 1), (4, 3, 5, 17), (3, 2, 24, 64), (20, 4, 32, 128), (3, 2, 48, 500), (10, 3, 100, 256)),
    *((20, 2, 128, 512), (3, 2, 130, 300), (3, 2, 256, 512)),
)
PRIMAL_SHAPES = ((4, 3, 2, 1), (3, 2, 17, 5), (20, 4, 128, 32), (10, 3, 100, 64), (20, 2, 256, 128), (3, 2, 250, 140))
"""More rollouts than units."""


def arguments(shape, stored=torch.float32, precision="fp32", *, kind="rademacher", ridge=0.01, lost=True):
    """Return the arguments of a call on the GPU: positional and named."""
    torch.manual_seed(0)
    time, batch, rollouts, units = shape
    finite = torch.ones(batch, rollouts, dtype=torch.bool)
    finite[-1, 1::5] = not lost
    activity = (1e-3 * torch.randn(shape)).to(stored)
    activity[:, ~finite] = torch.nan
    delta_loss, carry = (torch.randn(*size, rollouts) * finite for size in ((time, batch), (batch,)))
    values = (delta_loss, activity, carry, torch.tensor(-(2**61) + 77))
    named = {
        "discount": 0.9,
        "ridge": ridge,
        "baseline": True,
        "options": RolloutOptions(rollouts, 1e-3, kind, precision=precision),
        "counters": COUNTERS,
        "halves": rollouts <= units,
    }
    return [value.cuda() for value in values], {"finite": finite.cuda(), **named}


def of_reference(values, named, dtype=torch.float64):
    """Return the reference's result on the CPU."""
    delta_loss, activity, carry, seed = (value.cpu() for value in values)
    moved = (delta_loss.to(dtype), activity.to(dtype), carry.to(dtype))
    return reference.least_squares(
        *moved, seed, draw=noise, recursion=None, **{**named, "finite": named["finite"].cpu()}
    )


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize(
    ("stored", "precision", "bound"),
    [(torch.float32, "fp32", 1e-5), (torch.float32, "tf32", 1e-3), (torch.bfloat16, "bf16", 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES + PRIMAL_SHAPES, ids=str)
def test_it_is_the_reference(shape, stored, precision, bound, kind):
    values, named = arguments(shape, stored, precision, kind=kind)
    found, expected = least_squares_on("triton")(*values, **named), of_reference(values, named)
    assert found.ridge_grown == 0
    assert relative_error(found.adjoint.sum(0).cpu(), expected.adjoint.sum(0)) <= bound
    if named["halves"]:
        assert relative_error(found.adjoint[:2].cpu(), expected.adjoint[:2]) <= bound
    counted = named["finite"].cpu()
    assert relative_error(found.carry.cpu() * counted, expected.carry * counted) <= bound


SMALL_RIDGES = ((3, 2, 32, 128), (3, 2, 128, 512), (2, 2, 200, 512), (3, 2, 128, 32), (3, 2, 100, 90), (2, 2, 250, 200))


@pytest.mark.parametrize("shape", SMALL_RIDGES, ids=str)
def test_a_small_ridge_costs_no_more_than_cholesky_in_float32(shape):
    values, named = arguments(shape, ridge=1e-5)
    exact = of_reference(values, named).adjoint.sum(0)
    theirs = relative_error(of_reference(values, named, torch.float32).adjoint.sum(0), exact)
    found = least_squares_on("triton")(*values, **named).adjoint.sum(0)
    assert relative_error(found.cpu(), exact) <= 4 * theirs


@pytest.mark.parametrize("shape", SHAPES + PRIMAL_SHAPES, ids=str)
def test_bitwise_repeatable_without_making_the_host_wait(shape):
    values, named = arguments(shape, torch.bfloat16, "bf16")
    first = least_squares_on("triton")(*values, **named)
    for _ in range(3):
        disturbance = torch.full((1 << 24,), float("nan"), device="cuda")
        del disturbance
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = least_squares_on("triton")(*values, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(new, old) for new, old in zip(again, first, strict=True))


@pytest.mark.parametrize("shape", [(20, 4, 32, 128), (3, 2, 256, 512), (20, 4, 128, 32), (3, 2, 250, 140)], ids=str)
def test_a_captured_graph_repeats(shape):
    values, named = arguments(shape, torch.bfloat16, "bf16")
    expected = least_squares_on("triton")(*values, **named)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = least_squares_on("triton")(*values, **named)
    for tensor in found:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(new, old) for new, old in zip(found, expected, strict=True))


@pytest.mark.parametrize("rollouts", [32, 96])
def test_updates_agree_with_those_on_torchs_operations(rollouts):
    gradients = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        perturbation = anpgpu.Perturbation("anp-ls", rollouts, backend=backend, precision="fp32", sigma=1e-4)
        rnn, readout = anpgpu.RNN(3, 64, 2, perturbation=perturbation).cuda(), torch.nn.Linear(64, 2).cuda()
        inputs, targets = torch.randn(20, 4, 3).cuda(), torch.randn(20, 4, 2).cuda()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        gradients.append(torch.cat([weight.grad.flatten() for weight in (*rnn.parameters(), *readout.parameters())]))
    assert relative_error(*gradients) <= 1e-4
