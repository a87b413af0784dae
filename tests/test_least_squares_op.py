"""`anpgpu.functional.least_squares`: the adjoint of backpropagation, in pieces of time, and what it refuses."""

import numpy as np
import pytest
import torch
from loss_cases import B, H, T, draw
from tolerances import assert_close

from anpgpu import functional
from anpgpu.functional import Counters, LinearLoss


def regression(*, rollouts=12, dtype=torch.float64, loss=None):
    """Clean activity of a small network, its rollouts' differences, and the true adjoint of its loss."""
    weight_hh, drive = draw(H, H).to(dtype) / 2, draw(T, B, H).to(dtype)
    states, preacts = [torch.zeros(B, H, dtype=dtype)], []
    for step in drive:
        preacts.append((step + states[-1] @ weight_hh.T).requires_grad_())
        states.append(torch.tanh(preacts[-1]))
    preact, hidden = torch.stack(preacts), torch.stack(states[1:])
    grad = draw(T, B, H, seed=5).to(dtype)
    adjoint = torch.stack(torch.autograd.grad((grad * hidden).sum(), preacts))
    moved = functional.rollout(
        preact.detach(), hidden.detach(), weight_hh, LinearLoss(grad), 3, rollouts=rollouts, sigma=1e-6
    )
    return moved, adjoint


def test_least_squares_is_the_adjoint_of_bptt():
    moved, adjoint = regression()
    found, carry = functional.least_squares(moved.delta_loss, moved.delta_a, 3, sigma=1e-6, ridge=0.0)
    torch.testing.assert_close(found, adjoint, rtol=1e-3, atol=1e-4)
    assert carry.shape == (B, 12)
    # All that the activity explains is taken off, and nothing came before.
    assert float(carry.abs().max()) < 1e-3 * float(moved.delta_loss.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rollouts", [3, 9])
@pytest.mark.parametrize("baseline", [False, True])
def test_least_squares_can_be_divided_in_time(rollouts, baseline, dtype):
    moved, _ = regression(rollouts=rollouts, dtype=dtype)
    options = {"sigma": 1e-6, "discount": 0.8, "ridge": 0.1, "baseline": baseline}
    expected, carry = functional.least_squares(moved.delta_loss, moved.delta_a, 3, **options)
    late, between = functional.least_squares(
        moved.delta_loss[4:], moved.delta_a[4:], 3, counters=Counters(time=4), **options
    )
    early, before = functional.least_squares(moved.delta_loss[:4], moved.delta_a[:4], 3, carry=between, **options)
    kind = "unridged" if dtype == torch.float64 else "float32_long"
    assert_close(torch.cat((early, late)), expected, kind)
    assert_close(before, carry, kind)


def test_least_squares_of_nothing_and_of_nan():
    found, carry = functional.least_squares(torch.zeros(T, 0, 3), torch.zeros(T, 0, 3, H), 3)
    assert found.shape == (T, 0, H)
    assert carry.shape == (0, 3)
    moved, _ = regression()
    moved.delta_loss[2, 1, 0] = torch.nan
    found, carry = functional.least_squares(moved.delta_loss, moved.delta_a, 3, sigma=1e-6)
    assert bool(found[:3, 1].isnan().all())
    assert bool(found[:, [0, 2]].isfinite().all())
    assert bool(found[3:].isfinite().all())
    assert bool(carry[1].isnan().any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta_loss": torch.zeros(T, B)}, ValueError, "delta_loss must have 3 dimensions"),
        ({"delta_loss": torch.zeros(T, B, 2, dtype=torch.float16)}, TypeError, "delta_loss must be float32 or float64"),
        ({"delta_a": torch.zeros(T, B, 3, H)}, ValueError, r"delta_a must have shape \(6, 3, 2, 'H'\)"),
        ({"delta_a": torch.zeros(T, B, 2, H).long()}, TypeError, "delta_a must be floating, got torch.int64"),
        ({"delta_a": torch.zeros(T, B, 2, H, device="meta")}, ValueError, "delta_a must be on cpu"),
        ({"delta_a": torch.zeros(T, B, 2, 0)}, ValueError, "delta_a's H must be at least 1, got 0"),
        ({"delta_a": None}, TypeError, "delta_a must be a tensor, got NoneType"),
        ({"seed": 1.5}, TypeError, r"seed must be an int, got 1\.5"),
        ({"discount": 1.5}, ValueError, r"discount must be in \[0, 1\], got 1\.5"),
        ({"ridge": -1.0}, ValueError, r"ridge must be finite and not negative, got -1\.0"),
        ({"ridge": "0.1"}, TypeError, "ridge must be a float, got '0.1'"),
        ({"baseline": 1}, TypeError, "baseline must be a bool, got 1"),
        ({"sigma": 0.0}, ValueError, r"sigma must be positive and finite.*got 0\.0"),
        ({"noise": "pink"}, ValueError, "noise must be one of 'rademacher', 'gaussian'; got 'pink'"),
        ({"counters": 3}, TypeError, "counters must be anpgpu.functional.Counters, got int"),
        ({"carry": torch.zeros(B, 3)}, ValueError, r"carry must have shape \(3, 2\), got \(3, 3\)"),
        ({"backend": "jax"}, ValueError, "backend must be one of .*got 'jax'"),
        ({"backend": np.zeros(3)}, TypeError, r"backend must be a str.*got array\("),
    ],
)
def test_least_squares_quotes_what_does_not_fit(change, error, message):
    arguments = {"delta_loss": torch.zeros(T, B, 2), "delta_a": torch.zeros(T, B, 2, H), "seed": 3}
    with pytest.raises(error, match=message):
        functional.least_squares(**(arguments | change))
