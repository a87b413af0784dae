"""Least squares where squares of activity differences, or products with their inverses, leave float32's range."""

import itertools

import pytest
import torch
from test_least_squares import by_hand
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation, functional
from anpgpu.functional import Counters
from anpgpu.kernels import least_squares
from anpgpu.registry import ESTIMATORS

BACKENDS = ("torch", "numba")
METHODS = [("anp-ls", 1), ("anp-ls", 2), ("anp-ls", 8), ("anp-feedback", 2), ("anp-feedback", 8)]


def exploding(perturbation=None):
    """A relu network of one unit that grows eightfold at each step."""
    rnn = anpgpu.RNN(1, 1, bias=False, nonlinearity="relu", perturbation=perturbation)
    nn.init.constant_(rnn.weight_hh_l0, 8.0)
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    return rnn


def gradients_of_bptt(time, loss):
    """The gradients of W_ih and W_hh in float64."""
    rnn = nn.RNN(1, 1, bias=False, nonlinearity="relu").double()
    rnn.load_state_dict(exploding().state_dict())
    loss(rnn(torch.ones(time, 1, 1).double())[0]).backward()
    return torch.cat([weight.grad.flatten() for weight in rnn.parameters()])


def squared(outputs):
    return outputs.square().mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "rollouts"), METHODS)
@pytest.mark.parametrize("time", [4, 18, 20])
def test_an_update_of_a_network_that_explodes_is_bptts(time, rollouts, method, backend):
    rnn = exploding(Perturbation(method, rollouts, ridge=1e-6, backend=backend, warmup=3, split_half=True))
    estimate = anpgpu.estimate_grad_(rnn, None, torch.ones(time, 1, 1), torch.zeros(time, 1, 1))
    assert estimate.skipped == 0
    assert estimate.ridge_grown == 0
    assert rollouts == 1 or ESTIMATORS[method].parts == 1 or float(estimate.split_half) > 0.99
    found = torch.cat([weight.grad.flatten() for weight in rnn.parameters()])
    # sigma is .001 of the first pre-activation, and the loss is quadratic.
    torch.testing.assert_close(found.double(), gradients_of_bptt(time, squared), rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "rollouts"), METHODS)
@pytest.mark.parametrize("time", [4, 26, 40])
def test_a_backward_pass_of_a_network_that_explodes_is_bptts(time, rollouts, method, backend):
    rnn = exploding(Perturbation(method, rollouts, ridge=1e-6, backend=backend, warmup=3))
    rnn(torch.ones(time, 1, 1))[0].sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in rnn.parameters()])
    torch.testing.assert_close(found.double(), gradients_of_bptt(time, torch.sum), rtol=2e-3, atol=0)
    assert rnn.last_estimate.ridge_grown == 0


LOSSES = {"large": 1e30, "small": 1e-30, "usual": 1.0}
ACTIVITIES = {"rising": torch.logspace(0, 25, 6), "falling": torch.logspace(25, 0, 6), "tiny": torch.full((6,), 1e-22)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("rollouts", [4, 9])
@pytest.mark.parametrize(
    ("losses", "activities"), [pair for pair in itertools.product(LOSSES, ACTIVITIES) if pair != ("large", "tiny")]
)
def test_values_of_any_size_are_regressed_as_by_hand(losses, activities, rollouts, baseline, backend):
    generator = torch.Generator().manual_seed(rollouts)
    growth = ACTIVITIES[activities].double()
    sigma = 1e-3 * float(growth.min())
    activity = (growth[:, None, None, None] * torch.randn(6, 2, rollouts, 5, generator=generator)).float()
    delta_loss = (LOSSES[losses] * torch.randn(6, 2, rollouts, generator=generator)).float()
    # The second sample's losses and activity differences are of another size than the first's.
    delta_loss[:, 1] *= 1e3
    activity[:, 1] *= 1e-3
    injected = functional.noise(3, tuple(activity.shape), sigma=sigma, dtype=torch.float64)
    expected, _ = by_hand(delta_loss.double(), activity.double(), injected, 0.8, 0.1, baseline=baseline)
    options = {"discount": 0.8, "ridge": 0.1, "sigma": sigma, "baseline": baseline, "backend": backend}
    found, carry = functional.least_squares(delta_loss, activity, 3, **options)
    for step, estimate in enumerate(found):
        for sample in range(2):
            # A value below float32's smallest normal number has no precision of its own.
            if float(expected[step, sample].abs().max()) > 1e-37:
                assert_close(estimate[sample], expected[step, sample], "float32_long")
            else:
                assert float(estimate[sample].abs().max()) < 1e-36
    late, between = functional.least_squares(delta_loss[3:], activity[3:], 3, counters=Counters(time=3), **options)
    early, before = functional.least_squares(delta_loss[:3], activity[:3], 3, carry=between, **options)
    for whole, parts in ((found[3:], late), (found[:3], early), (carry, before)):
        assert bool(((parts - whole).abs() <= 1e-4 * whole.abs().amax(-1, keepdim=True) + 1e-37).all())


@pytest.mark.parametrize("rollouts", [4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_change_nothing_where_none_are_needed(rollouts, dtype, monkeypatch):
    # On CUDA there are always units, because to ask whether any are needed would make the host wait.
    activity, delta_loss = torch.randn(5, 2, rollouts, 6, dtype=dtype), torch.randn(5, 2, rollouts, dtype=dtype)
    activity *= torch.tensor([1e-3, 1e-2, 1.0, 7.0, 1e3]).view(-1, 1, 1, 1)
    # A sample without any activity or loss has a unit, too.
    activity[:, 1], delta_loss[:, 1] = 0, 0
    results = []
    for safe in (least_squares.SAFE_TRACES, (0.0, 0.0)):
        monkeypatch.setattr(least_squares, "SAFE_TRACES", safe)
        results.append(functional.least_squares(delta_loss, activity, 3, sigma=1e-3, discount=0.9))
    for scaled, plain in zip(results[1], results[0], strict=True):
        assert bool(plain.isfinite().all())
        assert_close(scaled, plain, "float32_long" if dtype == torch.float32 else "float64")
