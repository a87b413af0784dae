"""The Triton rollouts that sum their own adjoint, in Triton's interpreter: float32 against the torch reference."""

from dataclasses import replace

import overflow_cases
import pytest
import tolerances
import torch

from anpgpu.kernels import adjoint as reference, tiles
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import fused_launch, rollout_launch
from anpgpu.registry import CELLS, ESTIMATORS

adjoint_triton = pytest.importorskip("anpgpu.kernels.adjoint_triton", reason="needs Triton")
rollout_fused_triton = pytest.importorskip("anpgpu.kernels.rollout_fused_triton", reason="needs Triton")

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SEED = torch.tensor(-(2**62) + 987654321)
OFFSET = Counters(purpose=2, layer=255, time=2**32 - 5, rollout=2**32 - 301, sample=2**20 - 3, rank=4095)
# time, batch, hidden, outputs, rollouts
SIZES = ((1, 1, 1, 1, 1), (4, 2, 5, 3, 3), (4, 1, 33, 5, 1), (2, 2, 65, 3, 70), (1, 2, 33, 2, 3))
METHODS = ("anp", "np")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(sizes, kind="linear", readout=True, nonlinearity="tanh", sigma=1e-2, start=True):
    """Return arguments (preact, hidden, weight, loss, seed) and delta_h0."""
    time, batch, units, outputs, rollouts = sizes
    outputs = outputs if readout else units
    generator = torch.Generator().manual_seed(sum(sizes))

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    preact, weight = 2 * draw(time, batch, units), draw(units, units) / units**0.5
    matrix = draw(outputs, units) / units**0.5 if readout else None
    share = torch.rand(time, batch, generator=generator)
    signal = draw(time, batch, units if kind == "linear" else outputs)
    target = torch.randint(outputs, (time, batch), generator=generator)
    loss = {
        "linear": LinearLoss(signal),
        "squared": SquaredLoss(matrix, signal, share),
        "cross_entropy": CrossEntropyLoss(matrix, signal.softmax(-1), target, share),
    }[kind]
    hidden = preact.tanh() if nonlinearity == "tanh" else preact.relu()
    return (preact, hidden, weight, loss, SEED), sigma * draw(batch, rollouts, units) if start else None


def tiles_of(arguments, options, product=False):
    """Return the fused kernel's tiles, whether or not they are preferred."""
    units = arguments[0].shape[-1]
    named = {"rollouts": options.rollouts, "precision": options.precision, "arch": 90}
    resident = rollout_launch(
        units=units, outputs=0, has_readout=False, returns_outputs=False, batch=2, form="resident", **named
    )
    outputs = 0 if getattr(arguments[3], "readout", None) is None else 16
    return replace(fused_launch(resident, **named), product=product, block_outputs=outputs)


def run(arguments, start, method, options, product=False, counters=OFFSET):
    launch = tiles_of(arguments, options, product)
    named = {"weight_by": ESTIMATORS[method].weight_by, "options": options, "counters": counters}
    named |= {"delta_h0": start, "finite": None}
    return adjoint_triton._fused_adjoint(launch, *arguments, **named)


def expected_of(arguments, start, method, options, counters=OFFSET):
    return reference.rollout_adjoint(
        *arguments, weight_by=ESTIMATORS[method].weight_by, options=options, counters=counters, delta_h0=start
    )


def assert_close(actual, expected):
    for left, right, name in zip(actual, expected, ("fp32_adjoint", "float32_long", "float32_long"), strict=True):
        assert left.dtype == torch.float32
        tolerances.assert_close(left, right, name)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("kind", ["linear", "squared", "cross_entropy"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_reference(sizes, kind, nonlinearity, method, product):
    arguments, start = problem(sizes, kind, nonlinearity=nonlinearity)
    options = RolloutOptions(sizes[-1], sigma=1e-2, cell=CELLS[nonlinearity].forms)
    if sizes == SIZES[0] and kind == "cross_entropy":
        arguments[3].probs.fill_(1)
    assert_close(
        run(arguments, start, method, options, product),
        expected_of(arguments, start, method, options),
    )


@pytest.mark.parametrize("method", METHODS)
def test_other_arguments(method):
    """Gaussian noise, no start, no readout, even first rollout, and sigma of any size."""
    sizes = (3, 2, 17, 4, 5)
    for kind, sigma in (("linear", 1e-6), ("squared", 0.3), ("cross_entropy", 3.0)):
        arguments, _ = problem(sizes, kind, readout=False, start=False)
        options = RolloutOptions(sizes[-1], sigma=sigma, noise="gaussian")
        counters = Counters(rollout=2)
        assert_close(
            run(arguments, None, method, options, counters=counters),
            expected_of(arguments, None, method, options, counters),
        )


def test_a_product_of_16_bit_operands_adds_up_as_in_float32():
    """Factors are two numbers of 16 bits: with the first alone the sum would be wrong by 2^-11."""
    rows, units = 32, 16

    @triton.jit
    def add(sums_ptr, summand_ptr, share_ptr, ROWS: tl.constexpr, UNITS: tl.constexpr):
        row, unit = tl.arange(0, ROWS), tl.arange(0, UNITS)
        summand = tl.load(summand_ptr + row[:, None] * UNITS + unit[None, :])
        sums = rollout_fused_triton._add_rollouts(summand, tl.load(share_ptr + row), True)
        place = tl.arange(0, 8)[:, None] * UNITS + unit[None, :]
        tl.store(sums_ptr + place, sums)

    generator = torch.Generator().manual_seed(0)
    summand, share = torch.randn(rows, units, generator=generator).half(), torch.rand(rows, generator=generator)
    sums = torch.empty(8, units)
    add[(1,)](sums, summand, share, rows, units)
    product = summand.double() * share.double().unsqueeze(1)
    expected = torch.stack((product[::2].sum(0), product[1::2].sum(0)))
    tolerances.assert_close(sums[:2], expected, "float32")


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_other_branches(method, precision):
    """The scaled branch and the one without the plain difference, whose operands the interpreter does not round."""
    sizes = (3, 2, 9, 4, 5)
    arguments, start = problem(sizes, "squared", sigma=1e-6)
    options = RolloutOptions(sizes[-1], sigma=1e-6, precision=precision)
    actual = run(arguments, start, method, options)
    for left, right in zip(actual, expected_of(arguments, start, method, options), strict=True):
        tolerances.assert_close(left, right, "bf16_adjoint")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_that_is_not_finite_adds_nothing(method, product):
    sizes = (3, 2, 9, 4, 5)
    arguments, start = problem(sizes, nonlinearity="relu")
    start[1, 2, 4], start[0, 4, 0] = float("nan"), float("inf")
    options = RolloutOptions(sizes[-1], sigma=1e-2, cell=CELLS["relu"].forms)
    expected = expected_of(arguments, start, method, options)
    actual = run(arguments, start, method, options, product)
    assert torch.isfinite(actual[0]).all()
    tolerances.assert_close(actual[0], expected[0], "fp32_adjoint")
    alive = torch.ones(3, 2, 5, dtype=torch.bool)
    alive[:, 1, 2], alive[:, 0, 4] = False, False
    for deviation in (actual, expected):
        assert torch.equal(deviation[1].isfinite(), alive)
    tolerances.assert_close(actual[1][alive], expected[1][alive], "float32_long")
    tolerances.assert_close(actual[2][alive[0]], expected[2][alive[0]], "float32_long")


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("stored", [1 << 28, 1])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_that_overflows_later_adds_nothing_before(method, known, stored, monkeypatch):
    monkeypatch.setattr(tiles, "STORED_BYTES", stored)
    # Of one tile of rollouts, and of two, of which a sample may lose rollouts in one alone.
    for rollouts in (7, 70):
        arguments, named, finite = overflow_cases.case(rollouts, SEED, OFFSET)
        launch = tiles_of(arguments, named["options"])
        assert launch.block_rows < 70
        found = adjoint_triton._fused_adjoint(
            launch,
            *arguments,
            weight_by=ESTIMATORS[method].weight_by,
            finite=finite if known else None,
            **named,
        )
        overflow_cases.assert_left_out(found, arguments, named, finite, method, "fp32_adjoint")


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
def test_a_step_of_weight_zero_has_no_loss_whatever_it_holds(kind, method):
    sizes = (4, 2, 5, 3, 3)
    arguments, start = problem(sizes, kind)
    loss = arguments[3]
    signal = loss.error if kind == "squared" else loss.probs
    loss.weight[2:, 1] = 0
    signal[2, 1], signal[3, 1] = float("nan"), float("inf")
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    actual = run(arguments, start, method, options)
    assert (actual[1][2:, 1] == 0).all()
    assert_close(actual, expected_of(arguments, start, method, options))


@pytest.mark.parametrize("method", METHODS)
def test_time_is_cut_where_partial_sums_are_many(method, monkeypatch):
    sizes = (4, 1, 5, 2, 70)
    arguments, start = problem(sizes)
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    whole = run(arguments, start, method, options)
    monkeypatch.setattr(tiles, "STORED_BYTES", 3 * 8 * 3 * 5)
    for left, right in zip(run(arguments, start, method, options), whole, strict=True):
        assert torch.equal(left, right)


def test_who_is_fused():
    """Rollouts that a program can hold, if no tile of several samples is better filled."""
    loss = LinearLoss(torch.zeros(2, 1, 5))
    for rollouts, units, sigma, precision, fused in (
        (70, 5, 1e-2, "fp32", True),
        (16, 5, 1e-2, "fp32", True),
        (3, 5, 1e-2, "fp32", False),
        (70, 5, 1e-20, "fp32", False),
        (70, 65, 1e-2, "fp32", False),
        (70, 65, 1e-2, "bf16", True),
        (70, 300, 1e-2, "bf16", False),
        (70, 5, 1e-2, "fp64", False),
    ):
        preact, options = torch.zeros(2, 1, units), RolloutOptions(rollouts, sigma=sigma, precision=precision)
        chosen = rollout_fused_triton.preferred_launch(preact, preact[0], loss, "activity", options)
        assert (chosen is not None) == fused, (rollouts, units, sigma, precision)
    arguments, start = problem((2, 1, 5, 2, 33))
    options = RolloutOptions(33, sigma=1e-2)
    named = {"weight_by": "activity", "options": options, "counters": OFFSET, "delta_h0": start}
    for left, right in zip(
        adjoint_triton.rollout_adjoint(*arguments, **named), run(arguments, start, "anp", options), strict=True
    ):
        assert torch.equal(left, right)
