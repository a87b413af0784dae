"""Returns and the sums over rollouts, against loops and by hand."""

import importlib
import math

import overflow_cases
import pytest
import torch
from oracles import clean_run, discounted, noise_block, one_step_adjoint, perturbed_run, true_adjoint
from scipy import stats
from tolerances import TOLERANCES, assert_close

from anpgpu.functional import Counters, LinearLoss, adjoint, returns, rollout
from anpgpu.kernels import adjoint as adjoint_module
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import ESTIMATORS

pytestmark = pytest.mark.usefixtures("cpu_backend")

SEED = 77


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def test_returns_by_hand():
    delta_loss = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    assert returns(delta_loss, 0.5).flatten().tolist() == [3.0, 4.0, 4.0]
    assert returns(delta_loss, 0.0).flatten().tolist() == [1.0, 2.0, 4.0]
    assert returns(delta_loss, 1.0).flatten().tolist() == [7.0, 6.0, 4.0]
    assert returns(delta_loss, 0.5, carry=torch.tensor([[8.0]])).flatten().tolist() == [4.0, 6.0, 8.0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (13, 2, 33)])
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9, 1.0])
def test_returns_are_the_double_sum(shape, discount):
    delta_loss = draw(*shape)
    before = delta_loss.clone()
    assert_close(returns(delta_loss, discount), discounted(delta_loss, discount), "float64")
    assert torch.equal(delta_loss, before)
    assert_close(returns(delta_loss.float(), discount), discounted(delta_loss, discount), "float32")


@pytest.mark.parametrize("discount", [0.0, 0.3, 1.0])
def test_returns_carry_on_across_segments(discount):
    delta_loss = draw(9, 2, 4)
    whole = returns(delta_loss, discount)
    later = returns(delta_loss[5:], discount)
    assert torch.equal(returns(delta_loss[:5], discount, carry=later[0]), whole[:5])


def adjoint_by_loops(credit, delta_a, xi, sigma, method):
    """The two estimators of the design, one (t, b, p) at a time, in float64."""
    time, batch, rollouts = credit.shape
    units = xi.shape[-1]
    estimate = torch.zeros(time, batch, units, dtype=torch.float64)
    for t in range(time):
        for b in range(batch):
            for p in range(rollouts):
                if method == "np":
                    estimate[t, b] += credit[t, b, p] * xi[t, b, p] / sigma**2 / rollouts
                elif credit[t, b, p] != 0:
                    moved = delta_a[t, b, p]
                    square = sum(float(value) ** 2 for value in moved)
                    estimate[t, b] += credit[t, b, p] * units * moved / square / rollouts
    return estimate


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (4, 3, 1, 17), (2, 1, 33, 130)])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint_is_the_loop(shape, noise, method, dtype):
    sigma = 0.03
    first = {"layer": 2, "time": 2**32 - 9, "rollout": 7, "sample": 4}
    credit, delta_a = draw(*shape[:3]), sigma * draw(*shape)
    xi = sigma * noise_block(SEED, shape, noise, **first)
    expected = adjoint_by_loops(credit, delta_a, xi, sigma, method)
    activity = {"anp": delta_a.to(dtype), "np": None}[method]
    sums = adjoint(
        credit.to(dtype), activity, SEED, method=method, units=shape[3], sigma=sigma, noise=noise,
        counters=Counters(**first),
    )  # fmt: skip
    assert sums.dtype == dtype
    assert_close(sums, expected, "float64" if dtype == torch.float64 else "float32")


def test_two_units_by_hand():
    # One step, one sample, two rollouts with delta_a = (3, 4) and (0, 2), credits 5 and -1, two units:
    # mean of 5 * 2 * (3, 4) / 25 and -1 * 2 * (0, 2) / 4 = ((1.2, 1.6) + (0, -1)) / 2.
    credit = torch.tensor([[[5.0, -1.0]]])
    delta_a = torch.tensor([[[[3.0, 4.0], [0.0, 2.0]]]])
    assert adjoint(credit, delta_a, SEED).flatten().tolist() == pytest.approx([0.6, 0.3], rel=1e-6)
    signs = noise_block(SEED, (1, 1, 2, 2), "rademacher")[0, 0]
    expected = (5 * signs[0] - signs[1]) / (2 * 0.5)
    sums = adjoint(credit, None, SEED, method="np", units=2, sigma=0.5)
    assert sums.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("first", [0, 1, 6, 2**32 - 7])
@pytest.mark.parametrize("rollouts", [1, 2, 7])
def test_halves_are_the_even_and_the_odd_rollouts(method, first, rollouts):
    shape, sigma = (3, 2, rollouts, 5), 0.1
    credit, delta_a = draw(*shape[:3]), draw(*shape)
    halves = adjoint_module.adjoint(
        credit, delta_a if method == "anp" else None, torch.tensor(SEED), units=5,
        weight_by=ESTIMATORS[method].weight_by, options=RolloutOptions(rollouts, sigma),
        counters=Counters(rollout=first),
    )  # fmt: skip
    assert halves.shape == (2, 3, 2, 5)
    xi = sigma * noise_block(SEED, shape, "rademacher", rollout=first)
    for parity in (0, 1):
        mine = [p for p in range(rollouts) if (first + p) % 2 == parity]
        expected = adjoint_by_loops(credit[..., mine], delta_a[:, :, mine], xi[:, :, mine], sigma, method) * len(mine)
        assert_close(halves[parity], expected, "float64")


@pytest.mark.parametrize("method", ["np", "anp"])
def test_rollouts_that_sum_their_adjoint_have_the_noise_of_their_counters(method):
    # More steps than run at a time, which are not the first of their sequence.
    time, batch, rollouts, units, sigma = adjoint_module.STEPS_AT_A_TIME + 3, 2, 3, 5, 1e-3
    first = {"time": 40, "rollout": 7, "sample": 4}
    weight_hh, drive, grad = draw(units, units) / 2, draw(time, batch, units), draw(time, batch, units, seed=2)
    start = torch.zeros(batch, rollouts, units, dtype=torch.float64)
    preact, hidden = clean_run(drive, weight_hh, start[:, 0])
    xi = sigma * noise_block(SEED, (time, batch, rollouts, units), "rademacher", **first)
    moved, states = perturbed_run(drive, weight_hh, start, xi)
    delta_loss = torch.einsum("tbpu,tbu->tbp", states - hidden.unsqueeze(2), grad)
    expected = adjoint_by_loops(delta_loss, moved - preact.unsqueeze(2), xi, sigma, method)
    sums, _, _ = adjoint_module.rollout_adjoint(
        preact, hidden, weight_hh, LinearLoss(grad), torch.tensor(SEED), weight_by=ESTIMATORS[method].weight_by,
        options=RolloutOptions(rollouts, sigma, precision="fp64"), counters=Counters(**first),
    )  # fmt: skip
    assert_close(sums.sum(0) / rollouts, expected, "two_runs")


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_a_rollout_without_credit_adds_nothing_however_wild(wild):
    credit, delta_a = draw(3, 2, 4), draw(3, 2, 4, 5)
    credit[:, :, 2] = 0
    tame = adjoint(credit, delta_a, SEED)
    delta_a[:, :, 2] = wild
    assert torch.equal(adjoint(credit, delta_a, SEED), tame)


def test_a_rollout_that_did_not_move_adds_nothing():
    credit, delta_a = draw(2, 1, 3), draw(2, 1, 3, 4)
    delta_a[:, :, 1] = 0
    others = [0, 2]
    expected = adjoint(credit[..., others], delta_a[:, :, others], SEED) * 2 / 3
    assert_close(adjoint(credit, delta_a, SEED), expected, "float64")


@pytest.mark.parametrize("sigma", [1e-30, 1e-18, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("method", ["np", "anp"])
def test_squares_neither_underflow_nor_overflow(method, sigma):
    # Credit is proportional to sigma, as loss differences are, so that the estimate does not depend on sigma.
    credit, unit = draw(3, 2, 4), draw(3, 2, 4, 6)
    sums = adjoint(
        (sigma * credit).float(), (sigma * unit).float() if method == "anp" else None, SEED, method=method, units=6,
        sigma=sigma,
    )  # fmt: skip
    xi = noise_block(SEED, (3, 2, 4, 6), "rademacher")
    assert_close(sums, adjoint_by_loops(credit, unit, xi, 1.0, method), "float32")


def network(time, batch, units):
    weight_hh = 0.9 * draw(units, units) / units**0.5
    preact = torch.zeros(time, batch, units, dtype=torch.float64)
    state = torch.zeros(batch, units, dtype=torch.float64)
    drive = draw(time, batch, units, seed=1)
    for t in range(time):
        preact[t] = drive[t] + state @ weight_hh.T
        state = torch.tanh(preact[t])
    return preact, preact.tanh(), weight_hh, draw(time, batch, units, seed=2)


def estimate(seed, rollouts, method, discount, sigma=1e-4, samples=1):
    preact, hidden, weight_hh, grad = (
        tensor if tensor.dim() == 2 else tensor[:, :samples] for tensor in network(6, samples, 8)
    )
    run = rollout(preact, hidden, weight_hh, LinearLoss(grad), seed, rollouts=rollouts, sigma=sigma)
    credit = returns(run.delta_loss, discount)
    activity = run.delta_a if method == "anp" else None
    return adjoint(credit, activity, seed, method=method, units=8, sigma=sigma)


def test_error_of_node_perturbation_falls_like_one_over_root_p():
    preact, _, weight_hh, grad = network(6, 1, 8)
    truth = true_adjoint(grad, preact, weight_hh)
    sizes = [16, 64, 256]
    errors = []
    for rollouts in sizes:
        squares = [(estimate(seed, rollouts, "np", 1.0) - truth).square().sum() for seed in range(32)]
        errors.append(float(torch.stack(squares).mean().sqrt()))
    slope = stats.linregress([math.log(size) for size in sizes], [math.log(error) for error in errors]).slope
    assert abs(slope + 0.5) < TOLERANCES["slope"].bound, f"slope {slope:.3f}, errors {errors}"


def test_without_discount_the_estimate_is_the_one_step_gradient():
    # The published credit leaves out later losses, whatever the number of rollouts.
    preact, _, weight_hh, grad = network(6, 1, 8)
    estimated = estimate(3, 32768, "np", 0.0)
    one_step = one_step_adjoint(grad, preact)
    assert float((estimated - one_step).norm() / one_step.norm()) < 0.05
    truth = true_adjoint(grad, preact, weight_hh)
    assert float((one_step - truth).norm() / truth.norm()) > 0.2


def test_activity_based_estimate_points_along_the_gradient():
    preact, _, weight_hh, grad = network(6, 1, 8)
    truth = true_adjoint(grad, preact, weight_hh)
    estimated = estimate(5, 8192, "anp", 1.0)
    assert float(torch.nn.functional.cosine_similarity(estimated.flatten(), truth.flatten(), dim=0)) > 0.9


@pytest.mark.parametrize("backend", ["", "_numba", "_cupy", "_triton"])
def test_an_unknown_weighting_raises(backend):
    if backend == "_triton":
        pytest.importorskip("triton", reason="needs Triton")
    module = importlib.import_module(f"anpgpu.kernels.adjoint{backend}")
    named = {"units": 5, "options": RolloutOptions(4, 0.1)}
    credit, seed = draw(3, 2, 4).float(), torch.tensor(SEED)
    with pytest.raises(ValueError, match="weight_by must be 'noise' or 'activity', got 'anp'"):
        module.adjoint(credit, draw(3, 2, 4, 5).float(), seed, weight_by="anp", **named)
    with pytest.raises(ValueError, match="weight_by='activity' needs delta_a, got None"):
        module.adjoint(credit, None, seed, weight_by="activity", **named)
    if hasattr(module, "rollout_adjoint"):
        preact = draw(3, 2, 5).float()
        arguments = (preact, preact.tanh(), draw(5, 5).float(), LinearLoss(preact), seed)
        with pytest.raises(ValueError, match="weight_by must be 'noise' or 'activity', got None"):
            module.rollout_adjoint(*arguments, weight_by=None, options=RolloutOptions(4, 0.1))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["np", "anp"])
def test_a_rollout_that_overflows_later_adds_nothing_before(method, known, monkeypatch):
    monkeypatch.setattr(adjoint_module, "STEPS_AT_A_TIME", 1)
    arguments, named, finite = overflow_cases.case(7, torch.tensor(SEED), Counters())
    found = adjoint_module.rollout_adjoint(
        *arguments, weight_by=ESTIMATORS[method].weight_by, finite=finite if known else None, **named
    )
    overflow_cases.assert_left_out(found, arguments, named, finite, method, "float32_long")
