"""Least squares in Triton's interpreter, float32, against the equations and the torch reference in float64."""

import pytest
import torch
from test_least_squares import by_hand
from test_least_squares_range import (
    test_a_backward_pass_of_a_network_that_explodes_is_bptts as assert_backward_is_bptts,
    test_an_update_of_a_network_that_explodes_is_bptts as assert_update_is_bptts,
    test_values_of_any_size_are_regressed_as_by_hand as assert_regressed_as_by_hand,
)
from tolerances import assert_close, relative_error

import anpgpu
from anpgpu import functional
from anpgpu.kernels import least_squares as reference, tiles
from anpgpu.kernels.noise import Counters, noise
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles_least_squares import MOST_ROLLOUTS, least_squares_obstacle

least_squares_triton = pytest.importorskip("anpgpu.kernels.least_squares_triton", reason="needs Triton")
inverse_triton = pytest.importorskip("anpgpu.kernels.inverse_triton", reason="needs Triton")
gram_triton = pytest.importorskip("anpgpu.kernels.gram_triton", reason="needs Triton")
primal_triton = pytest.importorskip("anpgpu.kernels.primal_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SEED = torch.tensor(-(2**62) + 987654321)
OFFSET = Counters(layer=255, time=2**32 - 4, rollout=2**32 - 301, sample=2**20 - 3, rank=4095)
SHAPES = (
    (3, 2, 1, 1),
    (3, 2, 5, 7),
    (2, 2, 24, 130),
    (1, 2, 32, 64),
    (2, 1, 48, 513),
    (2, 1, 100, 128),
    (2, 1, 130, 150),
)
PRIMAL_SHAPES = ((3, 2, 2, 1), (3, 2, 5, 4), (2, 2, 40, 33), (2, 1, 65, 64), (2, 1, 150, 20), (2, 1, 150, 131))
"""More rollouts than units."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random rollouts, of which some do not count; `lost`: their numbers, in the last sample."""

    def __init__(self, shape, *, lost=(), sigma=0.5, kind="rademacher", baseline=False, ridge=0.01, counters=OFFSET):
        time, batch, rollouts, _ = shape
        generator = torch.Generator().manual_seed(sum(shape))
        self.activity = torch.randn(shape, generator=generator)
        self.delta_loss = torch.randn(time, batch, rollouts, generator=generator)
        self.carry = torch.randn(batch, rollouts, generator=generator)
        self.finite = torch.ones(batch, rollouts, dtype=torch.bool)
        self.finite[-1, list(lost)] = False
        self.delta_loss *= self.finite
        self.carry *= self.finite
        self.named = {
            "finite": self.finite,
            "discount": 0.8,
            "ridge": ridge,
            "baseline": baseline,
            "options": RolloutOptions(rollouts, sigma, kind),
            "counters": counters,
            "halves": rollouts <= shape[3],
        }

    def found(self):
        activity = self.activity.clone()
        activity[:, ~self.finite] = torch.nan
        return least_squares_triton.least_squares(self.delta_loss, activity, self.carry, SEED, **self.named)

    def expected(self, dtype=torch.float64):
        values = (self.delta_loss.to(dtype), self.activity.to(dtype), self.carry.to(dtype))
        return reference.least_squares(*values, SEED, draw=noise, recursion=None, **self.named)


def assert_agree(found, expected, finite, bound=1e-5):
    assert found.adjoint.dtype == found.carry.dtype == torch.float32
    for part, wanted in zip(found.adjoint, expected.adjoint, strict=True):
        assert relative_error(part, wanted) <= bound
    assert relative_error(found.adjoint.sum(0), expected.adjoint.sum(0)) <= bound
    assert relative_error(found.carry * finite, expected.carry * finite) <= bound
    assert found.ridge_grown == expected.ridge_grown == 0
    assert not found.carry[~finite].any()


@pytest.mark.parametrize("shape", SHAPES + PRIMAL_SHAPES, ids=str)
def test_rollouts_of_any_number(shape):
    case = Case(shape, baseline=shape[2] % 5 == 0)
    assert not least_squares_obstacle(*shape[2:], path=False, halves=case.named["halves"])
    assert_agree(case.found(), case.expected(), case.finite)


@pytest.mark.parametrize("units", [20, 4, 2])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_rollouts_that_do_not_count(kind, baseline, units, monkeypatch):
    # Gaussian noise is made for one step at a time. Of four units there are fewer rollouts that count.
    monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", 1)
    case = Case((3, 2, 6, units), lost=(0, 3, 5), kind=kind, baseline=baseline)
    assert_agree(case.found(), case.expected(), case.finite)


@pytest.mark.parametrize("shape", [(2, 1, 131, 140), (2, 1, 150, 131)], ids=str)
def test_lost_rollouts_in_a_system_of_two_blocks(shape):
    case = Case(shape, lost=(3, 128, 130), baseline=True)
    assert_agree(case.found(), case.expected(), case.finite)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [9, 3])
def test_returns_that_the_activity_explains(units, stored):
    # As BPTT's are: what is left over is small, and must not be what rounding leaves.
    case = Case((3, 2, 6, units))
    case.activity = case.activity.to(stored)
    gradient = torch.randn(3, 2, units, 1, generator=torch.Generator().manual_seed(1))
    case.delta_loss = (case.activity.float() @ gradient).squeeze(-1)
    assert_agree(case.found(), case.expected(), case.finite)


SMALL_RIDGES = ((2, 1, 24, 64), (1, 1, 100, 256), (1, 1, 130, 520), (2, 1, 64, 24), (1, 1, 100, 90), (1, 1, 160, 140))


@pytest.mark.parametrize("shape", SMALL_RIDGES, ids=str)
def test_a_small_ridge_costs_no_more_than_cholesky_in_float32(shape):
    case = Case(shape, ridge=1e-5)
    exact = case.expected().adjoint.sum(0)
    theirs = relative_error(case.expected(torch.float32).adjoint.sum(0), exact)
    assert relative_error(case.found().adjoint.sum(0), exact) <= 4 * theirs


@pytest.mark.parametrize("units", [7, 3])
def test_it_is_the_equations_by_hand(units):
    case = Case((3, 2, 5, units), counters=Counters())
    case.carry.zero_()
    injected = noise(SEED, (3, 2, 5, units), sigma=0.5, dtype=torch.float64)
    expected, _ = by_hand(case.delta_loss.double(), case.activity.double(), injected, 0.8, 0.01)
    assert_close(case.found().adjoint.sum(0), expected, "float32_long")


@pytest.mark.parametrize("units", [20, 4])
def test_any_strides_and_types(units):
    case = Case((1, 2, 5, units))
    plain = case.found()
    wide = torch.full((1, 2, 5, 36), torch.nan)
    wide[..., :units] = case.activity
    for rearranged in (
        wide[..., :units],
        case.activity.mT.contiguous().mT,
        case.activity.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        case.activity = rearranged
        found = case.found()
        assert torch.equal(found.adjoint, plain.adjoint)
        assert torch.equal(found.carry, plain.carry)
    case.activity = case.activity.bfloat16().float()
    rounded = case.found()
    for narrow in (torch.bfloat16, torch.float64):
        case.activity = case.activity.to(narrow)
        assert torch.equal(case.found().adjoint, rounded.adjoint)


@pytest.mark.parametrize("units", [9, 3])
def test_time_may_be_divided(units):
    case = Case((2, 2, 5, units), baseline=True, counters=Counters(time=7))
    whole = case.found()
    late, early = Case((2, 2, 5, units), baseline=True, counters=Counters(time=8)), case
    late.delta_loss, late.activity = case.delta_loss[1:], case.activity[1:]
    between = late.found()
    early.delta_loss, early.activity, early.carry = case.delta_loss[:1], case.activity[:1], between.carry
    before = early.found()
    assert_close(torch.cat((before.adjoint, between.adjoint), 1), whole.adjoint, "float32")
    assert_close(before.carry, whole.carry, "float32")


@pytest.mark.parametrize("units", [9, 3])
def test_what_is_not_finite_shows_in_its_sample_alone(units):
    case = Case((2, 2, 5, units))
    case.delta_loss[1, 0, 2] = torch.nan
    found = case.found()
    assert found.adjoint[-1, :, 0].isnan().all()
    assert found.adjoint[:, :, 1].isfinite().all()
    assert found.carry[1].isfinite().all()


@pytest.mark.parametrize("units", [9, 2])
def test_a_sample_without_a_rollout_that_counts_is_nan(units):
    found = Case((2, 2, 3, units), lost=(0, 1, 2)).found()
    assert found.adjoint[-1, :, 1].isnan().all()
    assert found.adjoint[:, :, 0].isfinite().all()


@pytest.mark.parametrize("units", [9, 2])
def test_a_step_without_activity_hands_its_return_on(units):
    case = Case((2, 1, 3, units))
    case.activity[1] = 0
    found = case.found()
    assert not found.adjoint[:, 1].any()
    assert found.ridge_grown == 0
    case.carry = 0.8 * (case.delta_loss[1] + case.carry)
    case.delta_loss, case.activity = case.delta_loss[:1], case.activity[:1]
    assert_close(found.adjoint[:, 0], case.found().adjoint[:, 0], "float32")


@pytest.mark.parametrize("size", [5, 20, 132])
def test_a_matrix_without_an_inverse_is_rescued_and_counted(size):
    generator = torch.Generator().manual_seed(size)
    moved = torch.randn(3, size, 2 * size, generator=generator)
    gram = moved @ moved.mT
    # In the last block of rows, and hidden from the diagonal.
    gram[1, -2, -1] = gram[1, -1, -2] = 9 * gram[1].trace()
    finite = torch.ones(1, size, dtype=torch.int8)
    width = -(-size // 16) * 16
    room = torch.zeros(3, size, width)
    room[..., :size] = gram
    bad = inverse_triton.inverses(room, room, finite, 1e-3)
    assert bad.tolist() == [0, 1, 0]
    ridge = 1e-3 * gram.double().diagonal(dim1=1, dim2=2).mean(-1)
    exact = torch.linalg.inv(gram.double() + ridge.view(-1, 1, 1) * torch.eye(size).double())
    exact[1] = torch.eye(size).double() / gram[1].double().trace()
    for inverse, wanted in zip(room[..., :size], exact, strict=True):
        assert_close(inverse, wanted, "float32_long")


def test_the_ridge_of_fewer_units_than_rollouts_is_of_the_rollouts_that_count():
    moved = torch.randn(1, 40, 5, generator=torch.Generator().manual_seed(0))
    finite = torch.ones(1, 40, dtype=torch.int8)
    finite[0, 7:20] = 0
    gram = moved.mT @ moved
    room = torch.zeros(1, 5, 16)
    room[..., :5] = gram
    assert inverse_triton.inverses(room, room, finite, 0.1).tolist() == [0]
    exact = gram.double() + 0.1 / 27 * gram.double()[0].trace() * torch.eye(5).double()
    assert_close(room[..., :5], torch.linalg.inv(exact), "float32_long")


@pytest.mark.parametrize("units", [6, 4])
@pytest.mark.parametrize("rollouts", [4, 7])
def test_systems_without_a_factor_are_those_of_the_reference(rollouts, units, monkeypatch):
    def spoilt(result, gram, *arguments, **named):
        gram[2, 0, 3] = gram[2, 3, 0] = 9 * gram[2].diagonal().sum()
        return invert(result, gram, *arguments, **named)

    def spoilt_reference(activity, room=None):
        gram = usual(activity, room)
        gram[1, 0, 0, 3] = gram[1, 0, 3, 0] = 9 * gram[1, 0].trace()
        return gram

    case = Case((2, 2, rollouts, units))
    case.named["halves"] = False
    invert, usual = inverse_triton.inverses, reference.smaller_gram
    for module in (least_squares_triton, primal_triton):
        monkeypatch.setattr(module, "inverses", spoilt)
    monkeypatch.setattr(reference, "smaller_gram", spoilt_reference)
    found, expected = case.found(), case.expected()
    assert found.ridge_grown == expected.ridge_grown == 1
    assert_close(found.adjoint.sum(0), expected.adjoint.sum(0), "float32_long")


@pytest.mark.parametrize("units", [1, 40, 128, 600])
def test_packed_signs_are_those_of_the_noise(units):
    shape = (2, 2, 9, units)
    words = gram_triton.packed_signs(SEED, shape, OFFSET).view(2, 2, 9, -1)
    unit = torch.arange(units)
    word = words[..., 4 * (unit // 128) + unit % 8 // 2].long()
    bit = word >> (2 * (unit // 8 % 16) + unit % 2) & 1
    assert torch.equal(2.0 * bit - 1, noise(SEED, shape, counters=OFFSET))


@pytest.mark.parametrize(
    ("losses", "activities", "baseline"),
    [("large", "rising", False), ("small", "falling", True), ("usual", "tiny", False)],
)
@pytest.mark.parametrize("rollouts", [4, 9])
def test_values_of_any_size(losses, activities, rollouts, baseline):
    assert_regressed_as_by_hand(losses, activities, rollouts, baseline, "triton")


def test_an_update_of_a_network_that_explodes():
    assert_update_is_bptts(18, 1, "anp-ls", "triton")
    assert_backward_is_bptts(26, 1, "anp-ls", "triton")
    assert_backward_is_bptts(26, 2, "anp-ls", "triton")


@pytest.mark.parametrize(
    ("rollouts", "units", "path", "halves", "reason"),
    [
        (9, 8, False, True, "9 rollouts are more than 8 units"),
        (9, 8, False, False, ""),
        (8, 8, False, True, ""),
        (MOST_ROLLOUTS, 1, False, False, ""),
        (MOST_ROLLOUTS, 300, False, True, ""),
        (MOST_ROLLOUTS + 1, 300, False, False, "257 rollouts are more than 256"),
        (MOST_ROLLOUTS + 1, 3, False, False, "257 rollouts are more than 256"),
        (2, 8, True, False, "LSTM"),
    ],
)
def test_the_table_names_what_runs_in_torch(rollouts, units, path, halves, reason):
    obstacle = least_squares_obstacle(rollouts, units, path=path, halves=halves)
    assert reason in obstacle
    assert bool(reason) == bool(obstacle)


def test_what_the_table_names_is_the_reference():
    case = Case((2, 2, 9, 8))
    case.named["halves"] = True
    found, expected = case.found(), case.expected(torch.float32)
    assert_close(found.adjoint, expected.adjoint, "float32")
    empty = functional.least_squares(torch.zeros(3, 0, 2), torch.zeros(3, 0, 2, 4), 3, backend="triton")
    assert empty[0].shape == (3, 0, 4)


OPTIONS = ({}, {"noise": "gaussian", "baseline": True, "discount": 0.9}, {"rollouts": 12, "split_half": False})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_updates_through_both_faces_agree_with_torchs(options):
    options = {"rollouts": 5, "split_half": True, **options}
    estimates = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        perturbation = anpgpu.Perturbation("anp-ls", backend=backend, sigma=1e-4, **options)
        rnn, readout = anpgpu.RNN(2, 9, 2, perturbation=perturbation), torch.nn.Linear(9, 2)
        inputs, targets = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
        report = anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        readout(rnn(inputs)[0]).square().mean().backward()
        parameters = (*rnn.parameters(), *readout.parameters())
        estimates.append((torch.cat([parameter.grad.flatten() for parameter in parameters]), report.split_half))
    assert_close(estimates[0][0], estimates[1][0], "least_squares")
    torch.testing.assert_close(estimates[0][1], estimates[1][1], rtol=1e-3, atol=1e-3, equal_nan=True)
