"""Operations and kernel launches of a whole update on CUDA, counted without a GPU.

`pytest tests/test_operations.py -s` prints what an update issues, and where.
"""

import sys

import pytest

from anpgpu.kernels import tiles
from anpgpu.kernels.tiles import INTERPRETED

idle = pytest.importorskip("idle_driver", reason="needs Triton")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels are not launched")

MOST = {("estimate", "mse"): 40, ("estimate", "cross_entropy"): 40, ("backward", "mse"): 40}
"""Operations and launches of an update whose rollouts are resident, those of one layer in one chunk.

Of a cross-entropy some steps may be ignored, which only the device knows.
"""


MOST_OF_LEARNED_FEEDBACK = 280


@pytest.mark.parametrize(("way", "loss"), MOST)
def test_a_resident_update_issues_few_operations(way, loss):
    issued = idle.issued_by(idle.Update(way, loss))
    sys.stdout.write(f"{way}, {loss}\n{issued}\n")
    assert issued.operations[idle.CLEAN_RUN] <= 1
    assert issued.operations.total() + issued.launches.total() <= MOST[way, loss]


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_neither_length_nor_sizes_change_the_number_of_operations(way):
    short = idle.issued_by(idle.Update(way))
    long = idle.issued_by(idle.Update(way, time=200, batch=32, rollouts=64))
    assert short.operations == long.operations
    assert abs(short.launches.total() - long.launches.total()) <= 1


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_an_update_of_learned_feedback_has_no_loop_over_steps(way):
    """It was 66 operations a step. What is left is of one update, much of it the step of the feedback matrix."""
    learned = idle.Update(way, method="anp-feedback", rollouts=8, knobs=(("warmup", 0),))
    short, long = (idle.issued_by(learned._replace(time=time)) for time in (20, 200))
    sys.stdout.write(f"{way}, anp-feedback\n{short}\n")
    assert short.operations == long.operations
    assert abs(short.launches.total() - long.launches.total()) <= 2
    assert short.operations.total() + short.launches.total() <= MOST_OF_LEARNED_FEEDBACK
    assert {name for name, _ in short.launches} >= {"invert_kernel", "feedback_kernel"}


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_a_stepwise_update_adds_a_launch_a_step(way):
    """Beside it: the last step's loss, where it is one of the outputs, and the partial sums of a linear loss."""
    few, many = (idle.issued_by(idle.Update(way, time=time, hidden=512)) for time in (10, 20))
    assert many.operations == few.operations
    assert many.launches.total() - few.launches.total() == 10
    assert few.operations.total() <= 48


def test_a_wide_readout_adds_two(monkeypatch):
    monkeypatch.setattr(tiles, "JOINED_OUTPUTS", 7)
    few, many = (idle.issued_by(idle.Update("estimate", time=time, hidden=512)) for time in (10, 20))
    assert many.launches.total() - few.launches.total() == 20


def test_what_is_counted():
    """Operations of torch's one by one, those inside the package's too; no views and no allocations."""
    import torch

    with idle.idle_driver() as issued, issued:
        values = torch.empty(3, 4)
        values.t().reshape(2, 6)[0].isfinite().to(torch.float32).float()
        assert values.is_cuda
    # `reshape` copies, and `isfinite` is four operations.
    names = {name: number for (name, _), number in issued.operations.items()}
    assert names == {"clone": 1, "eq": 1, "abs": 1, "ne": 1, "mul": 1, "_to_copy": 1}
    assert issued.launches.total() == 0
