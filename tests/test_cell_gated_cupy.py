"""The CUDA C of the gated cells, run by a C compiler on the CPU, against the reference and two runs in float64."""

import pytest
import test_kernels_compile_cupy as harness
import torch
from test_cell_gated import BIASES, SEED, STEPS, B, Clean, H, P, T
from test_kernels_compile_cupy import COUNTERS, TOLERANCE, assert_same_rollout, strided
from tolerances import assert_close, relative_error

from anpgpu.kernels import adjoint as adjoint_reference, adjoint_cupy, rollout, rollout_cupy
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.rollout import RolloutOptions

pytestmark = pytest.mark.compile

cpu_launches = harness._cpu_launches


def losses_of(clean, dtype, outputs=3):
    """Every kind of loss, with a step of weight zero; a linear loss also of all of the state."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    readout, weight = draw(outputs, H), draw(T, B).abs()
    weight[0, 0] = 0
    target = torch.randint(outputs, (T, B), generator=generator)
    return {
        "linear": LinearLoss(draw(T, B, H)),
        "linear in the state": LinearLoss(draw(T, B, clean.run.states.shape[-1])),
        "squared": SquaredLoss(readout, draw(T, B, outputs), weight),
        "squared, no readout": SquaredLoss(None, draw(T, B, H), weight),
        "cross-entropy": CrossEntropyLoss(readout, draw(T, B, outputs).softmax(-1), target, weight),
        "outputs": OutputsOnly(readout),
        "outputs, no readout": OutputsOnly(None),
        "none": None,
    }


def narrow(value, dtype):
    """Return a tensor, or a loss, in another floating type."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return value if value is None else type(value)(*(narrow(field, dtype) for field in value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("cell", STEPS)
def test_rollout(cell, bias, dtype):
    clean = Clean(cell, BIASES[bias])
    for sigma, kind in ((1e-4, "rademacher"), (1.5, "gaussian")):
        start = sigma * torch.randn(B, P, clean.run.states.shape[-1], dtype=torch.float64)
        for name, loss in losses_of(clean, torch.float64).items():
            named = {"noise": kind, "counters": COUNTERS[2], "loss": loss, "delta_h0": start}
            if name == "none":
                named["delta_h0"] = None
            expected = clean.rollout(sigma, **named)
            named |= {"loss": narrow(loss, dtype), "delta_h0": narrow(named["delta_h0"], dtype)}
            actual = clean.rollout(sigma, dtype, run=rollout_cupy.rollout, **named)
            assert all(part is None or part.dtype == dtype for part in actual)
            widened = type(actual)(*(narrow(part, torch.float64) for part in actual))
            assert_same_rollout(widened, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 4.0])
@pytest.mark.parametrize("cell", STEPS)
def test_deviations_are_the_difference_of_two_runs(cell, sigma, bias):
    clean = Clean(cell, BIASES[bias])
    moved = clean.rollout(sigma, run=rollout_cupy.rollout)
    # The oracle subtracts states of order 1, whose rounding is 1e-16.
    assert relative_error(moved.delta_a, clean.perturbed(sigma)) < 1e-12 / min(sigma, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", STEPS)
def test_deviations_that_no_exponential_holds_saturate(cell, dtype):
    clean = Clean(cell, 200.0)
    for sigma in (1e3, 1e6):
        actual = clean.rollout(sigma, dtype, run=rollout_cupy.rollout)
        assert_close(actual.delta_a, clean.rollout(sigma).delta_a, TOLERANCE[dtype])


@pytest.mark.parametrize("cell", STEPS)
def test_strided_tensors(cell):
    clean = Clean(cell)
    preact, states = clean.cell.preactivations(clean.weights, clean.run), clean.run.states[1:]
    loss = losses_of(clean, torch.float64)["linear in the state"]
    options = RolloutOptions(P, 0.1, cell=clean.cell.forms, precision="fp64", store_delta_a=True)
    start = torch.randn(B, P, states.shape[-1], dtype=torch.float64)
    tensors = (preact, states, clean.weights.weight_hh)
    expected = rollout_cupy.rollout(*tensors, loss, SEED, options=options, delta_h0=start)
    moved = rollout_cupy.rollout(
        *map(strided, tensors), LinearLoss(strided(loss.grad)), SEED, options=options, delta_h0=strided(start)
    )
    assert_same_rollout(moved, expected, "exact")


@pytest.mark.parametrize("cell", STEPS)
def test_a_rollout_that_is_lost_stays_alone(cell):
    clean = Clean(cell)
    start = torch.zeros(B, P, clean.run.states.shape[-1], dtype=torch.float64)
    start[0, 1, 0], start[1, 2, -1] = torch.nan, torch.nan
    lost = ~clean.rollout(0.1, run=rollout_cupy.rollout, delta_h0=start).delta_h.isfinite().all(-1)
    assert lost.nonzero().tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("module", [adjoint_reference, adjoint_cupy], ids=["torch", "cupy"])
@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("cell", STEPS)
def test_rollouts_that_sum_their_own_adjoint(cell, weight_by, module):
    """At discount 0, against rollouts that are stored and summed afterwards; the adjoint is that of h."""
    clean = Clean(cell)
    loss = losses_of(clean, torch.float64)["linear in the state"]
    options = RolloutOptions(P, 0.1, cell=clean.cell.forms, precision="fp64", store_delta_a=True)
    preact = clean.cell.preactivations(clean.weights, clean.run)
    arguments = preact, clean.run.states[1:], clean.weights.weight_hh, loss, SEED
    named = {"options": options, "counters": COUNTERS[2]}
    stored = rollout.rollout(*arguments, **named)
    expected = adjoint_reference.adjoint(
        stored.delta_loss, stored.delta_a[..., :H], SEED, weight_by=weight_by, units=H, **named
    )
    sums, delta_loss, delta_h = module.rollout_adjoint(*arguments, weight_by=weight_by, **named)
    assert_close(sums, expected, "float64")
    assert_close(delta_loss, stored.delta_loss, "float64")
    assert_close(delta_h, stored.delta_h, "float64")
