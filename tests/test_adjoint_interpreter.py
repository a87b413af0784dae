"""The Triton adjoint in Triton's interpreter, float32, against the torch reference."""

import overflow_cases
import pytest
import tolerances
import torch

from anpgpu.kernels import adjoint as reference, tiles
from anpgpu.kernels.loss import LinearLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import ESTIMATORS

adjoint_triton = pytest.importorskip("anpgpu.kernels.adjoint_triton", reason="needs Triton")
rollout_fused_triton = pytest.importorskip("anpgpu.kernels.rollout_fused_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SEED = torch.tensor(-(2**62) + 987654321)
SHAPES = ((1, 1, 1, 1), (3, 2, 3, 5), (1, 3, 17, 17), (3, 1, 17, 65), (1, 2, 3, 130), (1, 1, 17, 520))
OFFSETS = (Counters(), Counters(purpose=2, layer=255, time=2**32 - 4, rollout=2**32 - 301, sample=2**20 - 3, rank=4095))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, sigma=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return sigma * torch.randn(shape, generator=generator)


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    tolerances.assert_close(actual, expected, "float32")


def padded(tensor, alignment=8, fill=float("nan")):
    """Return the same values in rows that are longer than their contents."""
    units = tensor.shape[-1]
    width = -(-units // alignment) * alignment + alignment
    memory = torch.full((*tensor.shape[:-1], width), fill)
    memory[..., :units] = tensor
    return memory[..., :units]


def both(credit, delta_a, weight_by, units, sigma=1.0, noise="rademacher", counters=Counters()):  # noqa: B008
    """Return the kernel's sums and the reference's."""
    options = RolloutOptions(rollouts=credit.shape[-1], sigma=sigma, noise=noise)
    named = {"weight_by": weight_by, "units": units, "options": options, "counters": counters}
    arguments = (credit, delta_a, SEED)
    return adjoint_triton.adjoint(*arguments, **named), reference.adjoint(*arguments, **named)


@pytest.mark.parametrize("counters", OFFSETS, ids=("origin", "offset"))
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_np(shape, noise, counters):
    assert_close(*both(draw(*shape[:3]), None, "noise", shape[3], sigma=1e-3, noise=noise, counters=counters))


@pytest.mark.parametrize("counters", OFFSETS, ids=("origin", "offset"))
@pytest.mark.parametrize("sigma", [1e-20, 1e-3, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_anp(shape, sigma, counters):
    credit, delta_a = draw(*shape[:3], sigma=sigma), draw(*shape, sigma=sigma)
    assert_close(*both(credit, delta_a, "activity", shape[3], sigma, counters=counters))


@pytest.mark.parametrize(
    "rearranged",
    [
        padded,
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        lambda tensor: padded(tensor.transpose(1, 2)).transpose(1, 2),
        lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=("padded rows", "batch first", "rollouts before batch", "units not contiguous"),
)
def test_strides_of_delta_a(rearranged):
    credit, delta_a = draw(3, 2, 5), draw(3, 2, 5, 20)
    actual, expected = both(credit, rearranged(delta_a), "activity", 20)
    assert_close(actual, expected)
    contiguous, _ = both(credit, delta_a, "activity", 20)
    assert torch.equal(actual, contiguous)


def test_strides_of_credit():
    credit = draw(2, 5, 3).permute(2, 0, 1)
    assert_close(*both(credit, draw(3, 2, 5, 9), "activity", 9))
    assert_close(*both(credit, None, "noise", 9))


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
def test_split_rollouts(weight_by, monkeypatch):
    """Rollouts are split over programs where there are many and little else, and partial sums added."""
    for noise, units in (("gaussian", 5), ("rademacher", 17)):
        rollouts = 300
        assert tiles.activity_launch(1, rollouts, units).splits > 1
        assert tiles.noise_sum_launch(1, rollouts, units, noise).splits > 1
        credit, delta_a = draw(1, 1, rollouts), draw(1, 1, rollouts, units) if weight_by == "activity" else None
        split, expected = both(credit, delta_a, weight_by, units, noise=noise, counters=OFFSETS[1])
        assert_close(split, expected)
        again, _ = both(credit, delta_a, weight_by, units, noise=noise, counters=OFFSETS[1])
        assert torch.equal(split, again)
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "WARPS_WANTED", 1)
            whole, _ = both(credit, delta_a, weight_by, units, noise=noise, counters=OFFSETS[1])
        assert_close(split, whole)


def test_rows_wider_than_a_tile(monkeypatch):
    monkeypatch.setattr(tiles, "WIDEST_TILE", 64)
    monkeypatch.setattr(tiles, "WARP_ELEMENTS", 128)
    assert tiles.activity_launch(2, 5, 130).unit_blocks == 3
    credit, delta_a = draw(2, 1, 5), padded(draw(2, 1, 5, 130, sigma=1e-20))
    credit[0, 0, 1], delta_a[0, 0, 1, 3] = 0, float("nan")
    delta_a[1, 0, 2, 129] = float("inf")
    assert_close(*both(credit, delta_a, "activity", 130, 1e-20, counters=OFFSETS[1]))


def test_what_does_not_count_adds_nothing():
    credit, delta_a = draw(2, 3, 5), draw(2, 3, 5, 9)
    credit[0, 0, 0], delta_a[0, 0, 0, 4] = 0, float("nan")
    credit[0, 1, 2], delta_a[0, 1, 2] = 0, float("inf")
    delta_a[1, 0, 1, 8] = -float("inf")
    credit[1, 1, 4], delta_a[1, 1, 4, 0] = float("inf"), float("inf")
    delta_a[1, 2, 3] = 0
    actual, expected = both(credit, delta_a, "activity", 9)
    assert torch.isfinite(actual).all()
    assert_close(actual, expected)
    credit[1, 1, 4] = 0
    cleared, _ = both(credit, torch.where(torch.isfinite(delta_a), delta_a, 0), "activity", 9)
    changed, _ = both(credit, delta_a, "activity", 9)
    assert torch.equal(changed[:, 0], cleared[:, 0])


def test_non_finite_credit_shows():
    credit = draw(1, 1, 3)
    credit[0, 0, 1] = float("nan")
    for weight_by, delta_a in (("noise", None), ("activity", draw(1, 1, 3, 5))):
        actual, expected = both(credit, delta_a, weight_by, 5)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual[1].isnan().all()
        assert actual[0].isfinite().all()


def test_empty_shapes():
    for shape in ((0, 2, 3, 5), (2, 0, 3, 5), (2, 1, 0, 5)):
        for weight_by, delta_a in (("noise", None), ("activity", draw(*shape))):
            actual, expected = both(draw(*shape[:3]), delta_a, weight_by, 5)
            assert actual.shape == expected.shape
            assert not actual.any()


@pytest.mark.parametrize("time", [1, 3, 4, 9])
@pytest.mark.parametrize("with_carry", [False, True])
def test_returns(time, with_carry):
    delta_loss = draw(time, 2, 67)
    carry = draw(2, 67) if with_carry else None
    for discount in (0.0, 0.9, 1.0):
        assert_close(
            adjoint_triton.returns(delta_loss, discount, carry=carry),
            reference.returns(delta_loss, discount, carry=carry),
        )
    strided = delta_loss.transpose(1, 2).contiguous().transpose(1, 2)
    turned = None if carry is None else carry.t().contiguous().t()
    assert torch.equal(
        adjoint_triton.returns(strided, 0.9, carry=turned), adjoint_triton.returns(delta_loss, 0.9, carry=carry)
    )


def test_returns_at_discount_zero_looks_at_no_other_step():
    delta_loss = draw(4, 1, 2)
    delta_loss[2] = float("nan")
    credit = adjoint_triton.returns(delta_loss, 0.0, carry=torch.full((1, 2), float("inf")))
    assert torch.equal(credit.isnan(), delta_loss.isnan())
    assert credit.data_ptr() != delta_loss.data_ptr()


def test_division_depends_on_shapes_alone_and_covers_all():
    for rows in (1, 7, 264, 10_000):
        for rollouts in (1, 2, 33, 1000, 20_000):
            for units in (1, 100, 500, 2048, 20_000):
                activity = tiles.activity_launch(rows, rollouts, units)
                assert activity.block_rollouts % 2 == 0
                reached = activity.splits * activity.blocks * activity.block_rollouts
                assert 0 <= reached - rollouts < activity.blocks * activity.block_rollouts
                assert activity.unit_blocks * activity.block_units >= units
                for kind in ("rademacher", "gaussian"):
                    noise = tiles.noise_sum_launch(rows, rollouts, units, kind)
                    assert 0 <= 2 * noise.splits * noise.pairs - rollouts <= 2 * noise.pairs
                    assert noise.splits <= 65535


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
def test_rollout_adjoint(weight_by, monkeypatch):
    """In one pass over the rollouts, as at any other discount, of which it is never to be slower."""
    preact, weight_hh, grad = draw(4, 2, 5), draw(5, 5), draw(4, 2, 5)
    options = RolloutOptions(rollouts=3, sigma=1e-2)
    arguments = (preact, preact.tanh(), weight_hh, LinearLoss(grad), SEED)
    named = {"weight_by": weight_by, "options": options, "counters": OFFSETS[1], "delta_h0": draw(2, 3, 5, sigma=1e-2)}
    named["delta_h0"][1, 2, 0] = float("nan")
    expected = reference.rollout_adjoint(*arguments, **named)
    runs, run = [], adjoint_triton.rollout
    monkeypatch.setattr(adjoint_triton, "rollout", lambda *given, **more: runs.append(given) or run(*given, **more))
    sums, delta_loss, delta_h = adjoint_triton.rollout_adjoint(*arguments, **named)
    assert len(runs) == 1
    assert torch.isfinite(sums).all()
    tolerances.assert_close(sums, expected[0], "fp32_adjoint")
    for actual, wanted in ((delta_loss, expected[1]), (delta_h, expected[2])):
        finite = torch.isfinite(wanted)
        assert torch.equal(torch.isfinite(actual), finite)
        tolerances.assert_close(actual[finite], wanted[finite], "float32_long")


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", ["np", "anp"])
def test_a_rollout_that_overflows_later_adds_nothing_before(method, known):
    arguments, named, finite = overflow_cases.case(7, SEED, OFFSETS[1])
    weight_by = ESTIMATORS[method].weight_by
    assert (
        rollout_fused_triton.preferred_launch(arguments[0], arguments[2], arguments[3], weight_by, named["options"])
        is None
    )
    found = adjoint_triton.rollout_adjoint(*arguments, weight_by=weight_by, finite=finite if known else None, **named)
    overflow_cases.assert_left_out(found, arguments, named, finite, method, "fp32_adjoint")
