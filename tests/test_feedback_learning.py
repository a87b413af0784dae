"""What learned feedback must reach while weights move, in small: `profiling/study_feedback.py` has the full size."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "profiling"))

import study_feedback_plan
from study_feedback_runs import EXACT, Run, shadow

learned = study_feedback_plan.learned


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_errors_of_many_updates_do_not_add_up_where_the_matrix_moves_with_the_weights(seed):
    # The cosine of single updates does not show it: a B that lags behind W makes the same error in many updates.
    both, lagging, cold = (
        learned(2),
        learned(2, follow=False),
        learned(2, warmup=0),
    )
    run = Run("path", "copying 10, orthogonal", (EXACT, both, lagging, cold), seed, 150, hidden=32, lr=3e-3)
    result = shadow(run, None)
    error = {name: sums["weight_hh_l0"]["error"] for name, sums in result["sum"].items()}
    assert error[both] < 0.06
    assert error[lagging] > 3 * error[both]
    assert error[cold] > 2 * error[both]
    cosine = {name: by_weight["weight_hh_l0"]["140-150"] for name, by_weight in result["cosine"].items()}
    assert cosine[both] > cosine[lagging] > 0.97
