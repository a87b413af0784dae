"""Which rollouts count: those that stayed finite, and those of samples whose own gradient is not."""

import math

import pytest
import torch

from anpgpu.kernels.finite import mark_finite

T, B, P, H = 5, 3, 7, 4
HOLES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("first", [True, False])
def test_by_hand(first, hole, dtype):
    delta_loss, delta_h = torch.randn(T, B, P, dtype=dtype), torch.randn(B, P, H, dtype=dtype)
    delta_loss[2, 0, 3] = delta_h[1, 4, 2] = HOLES[hole]
    finite = torch.ones(B, 2 * P, dtype=torch.bool)
    finite[2, 1] = False
    marks = finite[:, :P]
    seen = mark_finite(marks, delta_loss.clone(), delta_h, first=first)
    expected = torch.ones(B, P, dtype=torch.bool)
    expected[0, 3] = expected[1, 4] = False
    expected[2, 1] = first
    assert torch.equal(marks, expected)
    assert finite[:, P:].all()
    assert torch.equal(seen, torch.where(expected, delta_loss, 0))


def test_rollouts_of_a_trusted_sample_count():
    delta_loss, delta_h = torch.full((T, B, P), math.nan), torch.zeros(B, P, H)
    finite, trust = torch.empty(B, P, dtype=torch.bool), torch.tensor([False, True, False])
    seen = mark_finite(finite, delta_loss, delta_h, first=True, trust=trust)
    assert torch.equal(finite, trust.unsqueeze(1).expand(B, P))
    assert seen[:, 1].isnan().all()
    assert not seen[:, ::2].any()


def test_without_a_loss_the_states_decide():
    delta_h = torch.zeros(B, P, H)
    delta_h[0, 0, 0] = math.inf
    finite = torch.empty(B, P, dtype=torch.bool)
    assert mark_finite(finite, None, delta_h, first=True) is None
    assert finite.sum() == B * P - 1
    assert not finite[0, 0]


def test_an_empty_batch_has_no_marks():
    finite = torch.empty(0, P, dtype=torch.bool)
    assert mark_finite(finite, torch.empty(T, 0, P), torch.empty(0, P, H), first=True).shape == (T, 0, P)


@pytest.mark.parametrize("size", [3e38, 1e-45])
def test_the_largest_and_smallest_numbers_are_finite(size):
    finite = torch.empty(1, 1, dtype=torch.bool)
    mark_finite(finite, torch.full((9, 1, 1), size), torch.full((1, 1, 9), -size), first=True)
    assert finite.all()
