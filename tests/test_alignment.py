"""Cosine, limit and agreement of estimates with a known expectation and scatter."""

import math

import pytest
import torch

from anpgpu.diagnosis.alignment import alignment

AXES = torch.eye(100, dtype=torch.float64)


def drawn(expected, scatter, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(expected), generator=generator, dtype=torch.float64)
    return expected + scatter * noise


def test_alignment_of_two_by_hand():
    result = alignment(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), torch.tensor([2.0, 0.0]))
    assert result.cosine == pytest.approx((0.6 + 0.8) / 2)
    assert result.ratio == pytest.approx(5 / 2)
    assert result.agreement == pytest.approx(24 / 25)
    # <(3.5, 3.5), (2, 0)> / (sqrt(24) 2)
    assert result.limit == pytest.approx(7 / (math.sqrt(24) * 2))


def test_limit_sees_through_variance_and_not_through_bias():
    # The expected estimate is 3 along the gradient and 4 across, so the limit is .6; the scatter has norm 5.
    truth, expected = 2 * AXES[0], 3 * AXES[0] + 4 * AXES[1]
    many = [alignment(drawn(expected, 0.5, 4, seed), truth) for seed in range(300)]
    # The estimate of |m|^2 = 25 is unbiased; its square root, which the limit uses, is nearly unbiased.
    assert sum(result.limit for result in many) / 300 == pytest.approx(0.6, abs=0.01)
    assert sum(result.cosine for result in many) / 300 == pytest.approx(0.6 * math.sqrt(25 / 50), abs=0.01)
    assert sum(result.agreement for result in many) / 300 == pytest.approx(25 / 50, abs=0.01)
    # The jackknife error has the size of the spread.
    spread = torch.tensor([result.limit for result in many]).std()
    assert sum(result.limit_error for result in many) / 300 == pytest.approx(float(spread), rel=0.5)
    # The cosine of the mean of four estimates falls short of it: a quarter of the scatter's variance stays.
    means = torch.stack([drawn(expected, 0.5, 4, seed).mean(0) for seed in range(300)])
    cosines = torch.nn.functional.cosine_similarity(means, truth[None])
    assert float(cosines.mean()) == pytest.approx(3 / math.sqrt(25 + 25 / 4), abs=0.01)


@pytest.mark.parametrize("count", [4, 9])
def test_the_limits_error_is_the_jackknifes(count):
    truth, estimates = 2 * AXES[0], drawn(3 * AXES[0] + 4 * AXES[1], 0.5, count)
    without = [alignment(torch.cat((estimates[:left], estimates[left + 1 :])), truth).limit for left in range(count)]
    mean = sum(without) / count
    squared = (count - 1) / count * sum((limit - mean) ** 2 for limit in without)
    assert alignment(estimates, truth).limit_error == pytest.approx(squared**0.5)


def test_bias_and_variance_are_not_mistaken_for_each_other():
    truth = AXES[0]
    biased = alignment(drawn(AXES[0] + 2 * AXES[1], 0.01, 4), truth)
    noisy = alignment(drawn(AXES[0], 0.1, 4), truth)
    assert biased.limit == pytest.approx(1 / math.sqrt(5), abs=0.01)
    assert biased.agreement > 0.99
    assert noisy.limit > 0.85
    assert noisy.agreement < 0.6
    assert noisy.cosine < 0.8


def test_alignment_has_a_sign_and_no_scale():
    truth = AXES[0]
    estimates = drawn(truth, 0.05, 4)
    plain, scaled = alignment(estimates, truth), alignment(-3 * estimates, truth)
    assert scaled.cosine == pytest.approx(-plain.cosine)
    assert scaled.limit == pytest.approx(-plain.limit)
    assert scaled.agreement == pytest.approx(plain.agreement)
    assert scaled.ratio == pytest.approx(3 * plain.ratio)
    assert plain.cosine > 0.8


def test_doubling_rollouts_is_predicted():
    truth, expected = AXES[0], AXES[0] + 0.5 * AXES[1]
    few = alignment(drawn(expected, 0.2, 400), truth)
    many = alignment(drawn(expected, 0.2 / math.sqrt(2), 400), truth)
    assert few.predicted(1) == pytest.approx(few.cosine, abs=0.01)
    assert few.predicted(2) == pytest.approx(many.cosine, abs=0.01)
    assert few.predicted(1e9) == pytest.approx(few.limit)


def test_alignment_of_nothing_is_nan():
    zero = alignment(torch.zeros(3, 5), torch.ones(5))
    assert all(math.isnan(value) for value in zero if value != 0)
    assert zero.ratio == 0
    assert math.isnan(alignment(torch.ones(1, 5), torch.ones(5)).limit)
    opposed = alignment(torch.tensor([[1.0, 0.1], [-1.0, 0.1]]), torch.tensor([0.0, 1.0]))
    assert math.isnan(opposed.limit)
    only_each_other = alignment(torch.ones(3, 5), None)
    assert math.isnan(only_each_other.cosine)
    assert only_each_other.agreement == pytest.approx(1)
