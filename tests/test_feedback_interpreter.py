"""Learned feedback in Triton's interpreter, float32, against the equations written down a second time, in float64."""

import pytest
import torch
from test_feedback import Case, assert_same
from tolerances import assert_close

import anpgpu
from anpgpu.kernels import least_squares, tiles
from anpgpu.kernels.tiles_least_squares import MOST_FEEDBACK_ROLLOUTS, MOST_FEEDBACK_UNITS, feedback_obstacle

feedback_triton = pytest.importorskip("anpgpu.kernels.feedback_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

KERNELS = {"recursion": feedback_triton.descend, "inverses": feedback_triton.inverses}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(rollouts, units, *, time=4, batch=2, kind="rademacher", **how):
    return Case(rollouts, dtype=torch.float32, units=units, time=time, batch=batch, kind=kind, **how)


@pytest.mark.parametrize(
    ("rollouts", "units"), [(1, 1), (2, 3), (5, 20), (16, 16), (24, 64), (8, 130), (40, 150), (4, 300)]
)
def test_rollouts_and_units_of_any_number(rollouts, units):
    assert not feedback_obstacle(rollouts, units, gated=False)
    case = case_of(rollouts, units)
    assert_same(case.run(**KERNELS), case.oracle(), "least_squares")


@pytest.mark.parametrize("knobs", [{}, {"discount": 0.6}, {"ridge": 1.0}, {"baseline": True}], ids=str)
@pytest.mark.parametrize("size", [1.0, 4.0, -1.0], ids="B {}".format)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_an_update_is_that_of_the_equations(kind, size, knobs):
    case = case_of(4, 9, kind=kind, size=size, discount=knobs.get("discount", 1.0))
    assert_same(case.run(**knobs, **KERNELS), case.oracle(**knobs), "least_squares")


@pytest.mark.parametrize("baseline", [False, True])
def test_padding_and_lost_rollouts_have_no_part(baseline):
    case = case_of(5, 12, time=5, batch=4).cut(5, 1, 4, 2).lose(0, 1).lose(2, 0).lose(2, 4)
    found = case.run(baseline=baseline, **KERNELS)
    assert_same(found, case.oracle(baseline=baseline), "least_squares")
    assert not found[0][4:, 2].any()


@pytest.mark.parametrize(("segments", "blocks"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_no_division_of_time_and_samples_changes_an_update(segments, blocks):
    case = case_of(3, 12).cut(4, 2)
    assert_same(case.run(segments=segments, blocks=blocks, **KERNELS), case.run(**KERNELS), "float32_long")


def test_steps_whose_noise_is_made_at_once_hand_on_to_those_before(monkeypatch):
    case = case_of(3, 12)
    whole = case.run(**KERNELS)
    monkeypatch.setitem(least_squares.BLOCK_BYTES, "cpu", 1)
    assert_same(case.run(**KERNELS), whole, "float32_long")


def test_a_step_whose_rollouts_are_blind_to_its_adjoint_does_not_rule_the_sums():
    case = case_of(4, 40)
    known = (case.slope * case.gradient)[-1, 0]
    case.delta_a[-1, 0] -= 0.9999 * torch.outer(case.delta_a[-1, 0] @ known, known) / (known @ known)
    case.delta_loss[-1, 0] = -(case.delta_a[-1, 0] @ known)
    found = case.run(**KERNELS)
    assert float(found[0][-1, 0].norm()) < 1e-3 * float(known.norm())
    assert_same(found, case.oracle(), "least_squares")


def test_activity_whose_square_leaves_the_range_is_regressed_in_units():
    case = case_of(4, 40, growth=1e16)
    assert_same(case.run(**KERNELS), case.oracle(), "least_squares")


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_the_size_of_the_gradient_does_not_matter_to_the_matrix(scale):
    plain, scaled = case_of(4, 9), case_of(4, 9, scale=scale)
    (adjoint, matrix, _), (larger, other, _) = plain.run(**KERNELS), scaled.run(**KERNELS)
    assert (other - matrix).norm() < 1e-5 * (matrix - plain.matrix).norm()
    assert_close(larger.double() / scale, adjoint.double(), "float32_long")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_leaves_the_matrix_as_it_was(value):
    case = case_of(4, 9)
    case.gradient[2, 1, 2] = value
    case.delta_loss[2, 1] = value
    gram = torch.eye(len(case.matrix))
    adjoint, matrix, mean = case.run(gram=gram, **KERNELS)
    assert not torch.isfinite(adjoint[:3, 1]).all()
    assert torch.isfinite(adjoint[:, 0]).all()
    assert torch.equal(matrix, case.matrix)
    assert torch.equal(mean, gram)


def test_without_a_rollout_that_counts_there_is_no_estimate():
    case = case_of(3, 9)
    for rollout in range(3):
        case.lose(1, rollout)
    adjoint, _, _ = case.run(**KERNELS)
    assert not adjoint[:, 1].any()
    assert adjoint[:, 0].any()


@pytest.mark.parametrize(
    ("rollouts", "units", "gated", "reason"),
    [
        (9, 8, False, "9 rollouts are more than 8 units"),
        (8, 8, False, ""),
        (MOST_FEEDBACK_ROLLOUTS, MOST_FEEDBACK_UNITS, False, ""),
        (MOST_FEEDBACK_ROLLOUTS + 1, 300, False, "65 rollouts are more than 64"),
        (8, MOST_FEEDBACK_UNITS + 1, False, "1025 units are more than 1024"),
        (2, 8, True, "gated"),
    ],
)
def test_the_table_names_what_runs_in_torch(rollouts, units, gated, reason):
    obstacle = feedback_obstacle(rollouts, units, gated=gated)
    assert reason in obstacle
    assert bool(reason) == bool(obstacle)


@pytest.mark.parametrize("layer", [anpgpu.RNN, anpgpu.GRU], ids=["RNN", "GRU"])
@pytest.mark.parametrize("options", [{}, {"noise": "gaussian", "baseline": True, "discount": 0.9}], ids=str)
def test_updates_through_both_faces_agree_with_torchs(options, layer):
    estimates = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        perturbation = anpgpu.Perturbation("anp-feedback", 5, backend=backend, sigma=1e-4, warmup=1, **options)
        rnn, readout = layer(2, 9, perturbation=perturbation), torch.nn.Linear(9, 2)
        inputs, targets = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        readout(rnn(inputs)[0]).square().mean().backward()
        parameters = (*rnn.parameters(), *readout.parameters())
        estimates.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert_close(*estimates, "least_squares")
