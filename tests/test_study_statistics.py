"""Statistics of the study, by cases that are computed by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

from study_statistics import area, holm, interval, nmse, paired, reached  # noqa: E402  (found through the line above)


def test_interval_of_two_values_is_their_range():
    # A quarter of the means of two draws is the lower value, half the middle, a quarter the higher one.
    assert interval([1.0, 3.0]) == (2.0, 1.0, 3.0)
    assert interval([1.0, 3.0], level=0.4)[1:] == (2.0, 2.0)
    assert interval([1.0, 3.0]) == interval([1.0, 3.0])


def test_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).standard_normal((300, 40))
    bounds = [interval(row, level=0.9, draws=400) for row in draws]
    inside = sum(low <= 0 <= high for _, low, high in bounds)
    # 270 are due, less what forty values cost the percentile bootstrap (about 1 %); six deviations are 31.
    assert 236 <= inside <= 298


def test_interval_of_one_value_or_a_broken_run():
    assert interval([2.0])[0] == 2.0
    assert all(math.isnan(bound) for bound in interval([2.0])[1:])
    assert interval([2.0, math.inf])[0] == math.inf
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_paired_p_by_counting_signs():
    # All five differences have one sign: two of 2^5 assignments of signs are as extreme.
    assert paired([2, 3, 4, 5, 6], [1, 1, 1, 1, 1]) == pytest.approx(2 / 32)
    # Ranks 1, 2, 3 with signs +, -, +: the rank sum 2 of the negative is reached or undercut by
    # {}, {1}, {2} of eight, on either side.
    assert paired([1, 0, 3], [0, 2, 0]) == pytest.approx(6 / 8)
    assert paired([1, 2], [1, 2]) == 1.0
    assert paired([2, 1, 5], [1, 1, 1]) == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="3 and 2"):
        paired([1, 2, 3], [1, 2])


def test_a_run_that_broke_off_is_the_worst_of_all():
    # Differences 1, 2, 3 and one larger than all.
    assert paired([2, 3, 4, math.inf], [1, 1, 1, 1]) == pytest.approx(2 / 16)
    assert paired([2, 3, 4, math.nan], [1, 1, 1, 1]) == pytest.approx(2 / 16)
    assert paired([math.inf], [math.inf]) == 1.0


def test_ties_of_ranks_are_counted_exactly():
    # Differences 1, 1, -1: every rank is 2; the sums 2 and 4 and beyond are all assignments but none.
    assert paired([1, 1, 0], [0, 0, 1]) == pytest.approx(1.0)
    # 1, 1, 1: two of eight.
    assert paired([1, 1, 1], [0, 0, 0]) == pytest.approx(2 / 8)


def test_holm_by_hand():
    # Sorted .01 x 3 = .03, .02 x 2 = .04, .04 x 1 = .04.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # .01 x 4; .03 x 3 = .09; .03 x 2 = .06, but no lower than before; .5.
    assert holm([0.03, 0.5, 0.01, 0.03]) == pytest.approx([0.09, 0.5, 0.04, 0.09])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_area_is_the_mean_height():
    # Between 0 and 10 from 4 to 2, between 10 and 30 from 2 to 0: (30 + 20) / 30.
    assert area([0, 10, 30], [4.0, 2.0, 0.0]) == pytest.approx(50 / 30)
    assert area([5], [2.0]) == 2.0
    assert area([0, 1], [1.0, math.nan]) == area([], []) == math.inf
    with pytest.raises(ValueError, match="2 and 1"):
        area([0], [1.0, 2.0])


def test_a_loss_is_reached_at_the_first_two_evaluations_below_it():
    # At 20 it is only passing by.
    assert reached([10, 20, 30, 40], [3.0, 1.0, 2.0, 0.5], 1.0) == 40
    assert reached([10, 20, 30, 40], [3.0, 1.0, 0.5, 2.0], 1.0) == 20
    assert reached([10, 20], [1.0, 1.0], 1.0) == 10
    assert reached([10, 20], [3.0, 1.1], 1.0) is None
    assert reached([10], [math.nan], 1.0) is None


def test_nmse_is_the_mean_of_the_last_five_records():
    assert nmse([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 3.0
    assert nmse([]) == math.inf


@pytest.mark.parametrize("count", [6, 10, 14, 15])
def test_paired_is_scipys_test_where_no_ranks_are_tied(count):
    from scipy.stats import wilcoxon

    left, right = np.random.default_rng(count).standard_normal((2, count))
    assert paired(left + 0.4, right) == pytest.approx(wilcoxon(left + 0.4, right, method="exact").pvalue)
