"""Cross-entropy at clean outputs: values and gradients are torch's and autograd's, in float64."""

import math

import pytest
import torch
from cross_entropy_cases import FORMS, SHAPES, Case
from tolerances import assert_close

from anpgpu.kernels.cross_entropy import clean_cross_entropy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_torchs_loss_and_autograds_gradient(form, shape):
    case = Case(form, shape)
    found = clean_cross_entropy(**case.arguments(torch.float64))
    value, gradient = case.by_autograd()
    assert_close(found.losses.sum(), value, "float64")
    assert_close(found.gradient, gradient, "float64")
    assert_close(found.probs, torch.softmax(case.outputs, -1), "float64")
    assert torch.equal(found.target, case.targets.masked_fill(case.targets == case.ignored, 0))
    assert torch.equal(found.weight, case.weight)


def test_by_hand():
    outputs = torch.tensor([[[0.0, 0.0]], [[3.0, 3.0]]], dtype=torch.float64)
    targets, weight = torch.tensor([[1], [7]]), torch.tensor([[0.5], [0.0]], dtype=torch.float64)
    found = clean_cross_entropy(outputs, targets, weight, ignore_index=7)
    assert found.losses.flatten().tolist() == [pytest.approx(math.log(2) / 2), 0]
    assert torch.equal(found.gradient, torch.tensor([[[0.25, -0.25]], [[0.0, 0.0]]], dtype=torch.float64))
    assert found.target.flatten().tolist() == [1, 0]


def test_without_a_gradient_the_rest_is_there():
    case = Case("plain", (3, 2, 5))
    found = clean_cross_entropy(**case.arguments(torch.float64), gradient=False)
    assert found.gradient is None
    assert_close(found.losses.sum(), case.by_autograd()[0], "float64")


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_target_that_is_no_class_raises(wrong):
    case = Case("plain", (3, 2, 5))
    case.targets[1, 1] = wrong
    with pytest.raises((IndexError, RuntimeError), match=r"out of|bounds"):
        clean_cross_entropy(**case.arguments(torch.float64))


def test_steps_without_a_loss_may_hold_anything():
    case = Case("ignored", (6, 4, 5))
    lost = case.weight == 0
    assert lost.any()
    case.outputs[lost] = torch.nan
    found = clean_cross_entropy(**case.arguments(torch.float64))
    assert not found.losses[lost].any()
    assert not found.gradient[lost].any()
    assert found.losses.isfinite().all()
