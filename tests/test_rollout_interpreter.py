"""The Triton rollouts, both forms, in Triton's interpreter: float32 against the torch reference in float64."""

from dataclasses import replace

import pytest
import torch
from tolerances import TOLERANCES, relative_error

from anpgpu.kernels import rollout as reference
from anpgpu.kernels.cell import TANH
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss, loss_of_steps
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import INTERPRETED
from anpgpu.registry import CELLS

rollout_triton = pytest.importorskip("anpgpu.kernels.rollout_triton", reason="needs Triton")
rollout_resident_triton = pytest.importorskip("anpgpu.kernels.rollout_resident_triton", reason="needs Triton")
rollout_stepwise_triton = pytest.importorskip("anpgpu.kernels.rollout_stepwise_triton", reason="needs Triton")

cell_triton = pytest.importorskip("anpgpu.kernels.cell_triton", reason="needs Triton")
loss_triton = pytest.importorskip("anpgpu.kernels.loss_triton", reason="needs Triton")
triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SEED = torch.tensor(-(2**62) + 987654321)
OFFSET = Counters(purpose=2, layer=255, time=2**32 - 5, rollout=2**32 - 40, sample=2**20 - 3, rank=4095)
FORMS = ("resident", "stepwise")
LOSSES = ("linear", "squared", "cross_entropy", "outputs", "none")
# time, batch, hidden, outputs, rollouts
SIZES = ((1, 1, 1, 1, 1), (4, 2, 5, 3, 3), (4, 1, 17, 5, 17), (2, 3, 33, 17, 3), (2, 1, 64, 2, 33))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(sizes, kind="linear", readout=True, nonlinearity="tanh", sigma=1e-2, start=True):
    """Return float64 arguments (preact, hidden, weight, loss, delta_h0) of a rollout."""
    time, batch, units, outputs, rollouts = sizes
    outputs = outputs if readout else units
    generator = torch.Generator().manual_seed(sum(sizes))

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    preact, weight = 2 * draw(time, batch, units), draw(units, units) / units**0.5
    matrix = draw(outputs, units) / units**0.5 if readout else None
    share = torch.rand(time, batch, generator=generator, dtype=torch.float64)
    share[:1, :1] = 0
    signal = draw(time, batch, units if kind == "linear" else outputs)
    target = torch.randint(outputs, (time, batch), generator=generator)
    loss = {
        "linear": LinearLoss(signal),
        "squared": SquaredLoss(matrix, signal, share),
        "cross_entropy": CrossEntropyLoss(matrix, signal.softmax(-1), target, share),
        "outputs": OutputsOnly(matrix),
        "none": None,
    }[kind]
    hidden = preact.tanh() if nonlinearity == "tanh" else preact.relu()
    return preact, hidden, weight, loss, sigma * draw(batch, rollouts, units) if start else None


def narrow(value):
    """Return the arguments in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return value if value is None else value._replace(**{name: narrow(part) for name, part in value._asdict().items()})


def run(form, arguments, options, counters=OFFSET):
    preact, hidden, weight, loss, start = map(narrow, arguments)
    return rollout_triton.rollout_in_form(form, preact, hidden, weight, loss, SEED, options, counters, start)


def oracle(arguments, options, counters=OFFSET):
    preact, hidden, weight, loss, start = arguments
    options = options._replace(precision="fp64")
    return reference.rollout(preact, hidden, weight, loss, SEED, options=options, counters=counters, delta_h0=start)


def assert_close(actual, expected, bound=TOLERANCES["float32"].bound):
    for name, left, right in zip(actual._fields, actual, expected, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == torch.float32
            error = relative_error(left, right)
            assert error <= bound, f"{name}: {error:.3g}"


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference(form, sizes, kind, nonlinearity):
    arguments = problem(sizes, kind, nonlinearity=nonlinearity)
    options = RolloutOptions(sizes[-1], sigma=1e-2, cell=CELLS[nonlinearity].forms, store_delta_a=True)
    assert_close(run(form, arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("kind", ["squared", "cross_entropy", "outputs"])
@pytest.mark.parametrize("sizes", SIZES[1:4], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_hidden_state_as_output(form, sizes, kind):
    arguments = problem(sizes, kind, readout=False)
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    assert_close(run(form, arguments, options), oracle(arguments, options))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("readout", [True, False])
@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
@pytest.mark.parametrize("sizes", SIZES[1:4], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_weight_zero_has_no_loss_whatever_it_holds(form, sizes, kind, readout):
    arguments = problem(sizes, kind, readout)
    loss, start = arguments[3:]
    loss.weight[-1] = 0
    signal = loss.error if kind == "squared" else loss.probs
    signal[0, 0], signal[-1] = float("nan"), float("inf")
    start[0, 0] = float("nan")
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    actual, expected = run(form, arguments, options).delta_loss, oracle(arguments, options).delta_loss
    assert (actual[loss.weight == 0] == 0).all()
    lost = expected.isnan()
    assert torch.equal(actual.isnan(), lost)
    assert relative_error(actual[~lost], expected[~lost]) <= TOLERANCES["float32"].bound


@pytest.mark.parametrize("sigma", [1e-6, 0.3, 3.0])
@pytest.mark.parametrize("kind", LOSSES[:3])
@pytest.mark.parametrize("form", FORMS)
def test_any_sigma(form, kind, sigma):
    sizes = (3, 2, 9, 4, 5)
    arguments = problem(sizes, kind, sigma=sigma)
    options = RolloutOptions(sizes[-1], sigma=sigma, store_delta_a=True)
    assert_close(run(form, arguments, options), oracle(arguments, options), TOLERANCES["float32_long"].bound)


@pytest.mark.parametrize("form", FORMS)
def test_gaussian_noise_without_start(form):
    sizes = (3, 2, 37, 4, 5)
    arguments = problem(sizes, start=False)
    options = RolloutOptions(sizes[-1], sigma=1e-2, noise="gaussian", store_delta_a=True)
    assert_close(run(form, arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("sigma", [1e-6, 1e-3])
@pytest.mark.parametrize("kind", ["linear", "squared"])
@pytest.mark.parametrize("form", FORMS)
def test_other_branches(form, kind, sigma, precision):
    """The scaled branch and the one without the plain difference, whose operands the interpreter does not round."""
    sizes = (3, 2, 9, 4, 5)
    arguments = problem(sizes, kind, sigma=sigma)
    options = RolloutOptions(sizes[-1], sigma=sigma, precision=precision)
    bound = TOLERANCES["bf16_adjoint"].bound if precision == "fp16" else TOLERANCES["float32_long"].bound
    assert_close(run(form, arguments, options), oracle(arguments, options), bound)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("form", FORMS)
def test_saturated_units_and_large_deviations_stay_finite(form, nonlinearity):
    sizes = (3, 1, 6, 2, 3)
    preact, _, weight, loss, start = problem(sizes, nonlinearity=nonlinearity)
    preact[..., :2], preact[..., 2:4] = 60.0, -60.0
    hidden = preact.tanh() if nonlinearity == "tanh" else preact.relu()
    for precision in ("fp32", "tf32"):
        options = RolloutOptions(sizes[-1], sigma=1e-3, cell=CELLS[nonlinearity].forms, precision=precision)
        wild = (preact, hidden, weight, loss, torch.full_like(start, 1e4))
        assert all(part.isfinite().all() for part in run(form, wild, options) if part is not None)


@pytest.fixture
def rows_taken(monkeypatch):
    """Whether tanh took its quotient from two rows, launch by launch."""
    taken = []
    clean_of = rollout_resident_triton.clean_of

    def noted(*arguments, quotient):
        taken.append(quotient)
        return clean_of(*arguments, quotient=quotient)

    monkeypatch.setattr(rollout_resident_triton, "clean_of", noted)
    return taken


@pytest.mark.parametrize("kind", ["linear", "squared"])
@pytest.mark.parametrize("sizes", [(3, 1, 64, 3, 65), (2, 1, 128, 3, 65)], ids=str)
def test_quotient_from_two_rows(rows_taken, sizes, kind):
    """Also where units are saturated, and where a unit's two terms cancel to the last bit."""
    preact, _, weight, loss, _ = problem(sizes, kind)
    start = problem(sizes, kind)[4] if sizes[2] == 64 else None
    preact[..., :3], preact[..., 3:6] = 9.0, -9.0
    arguments = (preact, preact.tanh(), weight, loss, start)
    options = RolloutOptions(sizes[-1], sigma=1e-3, precision="tf32")
    assert_close(run("resident", arguments, options), oracle(arguments, options), TOLERANCES["float32_long"].bound)
    preact[..., :8], preact[..., 8:16] = 60.0, -60.0
    if start is not None:
        start = torch.full_like(start, 30.0).mul_(torch.randn_like(start).sign())
    wild = (preact, preact.tanh(), weight, loss, start)
    assert all(part.isfinite().all() for part in run("resident", wild, options) if part is not None)
    assert rows_taken == [True, True]


@pytest.mark.parametrize("kind", LOSSES[:4])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, kind):
    """Transposed, expanded and offset tensors are read where they lie."""
    sizes = (3, 2, 17, 4, 3)
    arguments = problem(sizes, kind)
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    expected = run(form, arguments, options)

    def scattered(value):
        if isinstance(value, torch.Tensor):
            memory = value.new_zeros((*(2 * size for size in reversed(value.shape)),))
            view = memory.permute(*reversed(range(value.dim())))[tuple(slice(1, None, 2) for _ in value.shape)]
            return view.copy_(value)
        parts = {name: scattered(part) for name, part in value._asdict().items() if part is not None}
        return value._replace(**parts)

    preact, hidden, weight, loss, start = map(narrow, arguments)
    actual = rollout_triton.rollout_in_form(
        form, *(scattered(value) for value in (preact, hidden, weight, loss)), SEED, options, OFFSET, scattered(start)
    )
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)

    constant = preact[:1, :1].expand_as(preact)
    actual = rollout_triton.rollout_in_form(
        form, constant, constant.tanh(), weight, loss, SEED, options, OFFSET, start[:1].expand_as(start)
    )
    dense = rollout_triton.rollout_in_form(
        form, constant.clone(), constant.tanh(), weight, loss, SEED, options, OFFSET, start[:1].expand_as(start).clone()
    )
    assert torch.equal(actual.delta_h, dense.delta_h)


@pytest.mark.parametrize("form", FORMS)
def test_time_can_be_cut(form):
    sizes = (4, 2, 9, 4, 5)
    preact, hidden, weight, loss, start = map(narrow, problem(sizes))
    options = RolloutOptions(sizes[-1], sigma=1e-2, store_delta_a=True)
    whole = rollout_triton.rollout_in_form(form, preact, hidden, weight, loss, SEED, options, Counters(), start)
    parts, state = [], start
    for steps in (slice(0, 1), slice(1, 4)):
        part = rollout_triton.rollout_in_form(
            form, preact[steps], hidden[steps], weight, loss_of_steps(loss, steps), SEED, options,
            Counters(time=steps.start), state,
        )  # fmt: skip
        parts.append(part)
        state = part.delta_h
    assert torch.equal(torch.cat([part.delta_a for part in parts]), whole.delta_a)
    assert torch.equal(torch.cat([part.delta_loss for part in parts]), whole.delta_loss)
    assert torch.equal(state, whole.delta_h)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("form", FORMS)
def test_tile_sizes_change_rounding_at_most(form, rows, monkeypatch):
    sizes = (2, 2, 20, 3, 40)
    arguments = problem(sizes)
    options = RolloutOptions(sizes[-1], sigma=1e-2, store_delta_a=True)
    expected = run(form, arguments, options)
    choose = rollout_triton.rollout_launch

    def other_tiles(**named):
        launch = choose(**named)
        if form == "stepwise":
            return replace(launch, block_rows=16, block_units=16, block_inner=32)
        return replace(launch, block_rows=rows, block_units=64, samples=max(1, rows // 64))

    monkeypatch.setattr(rollout_triton, "rollout_launch", other_tiles)
    assert_close(run(form, arguments, options), expected)


def test_forms_agree_where_programs_span_samples():
    """Stepwise tiles with one sample and with several."""
    for rollouts in (3, 40):
        sizes = (2, 3, 9, 4, rollouts)
        arguments = problem(sizes, "cross_entropy")
        options = RolloutOptions(rollouts, sigma=1e-2, store_delta_a=True)
        assert_close(run("stepwise", arguments, options), run("resident", arguments, options))


def test_more_steps_than_slots_of_partial_sums(monkeypatch):
    monkeypatch.setattr(rollout_stepwise_triton, "PARTIAL_STEPS", 2)
    sizes = (5, 1, 9, 4, 3)
    arguments = problem(sizes)
    options = RolloutOptions(sizes[-1], sigma=1e-2)
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))


def test_a_rollout_that_is_not_finite_stays_alone():
    sizes = (3, 2, 9, 4, 5)
    preact, hidden, weight, loss, start = problem(sizes, nonlinearity="relu")
    start[1, 2, 4] = float("nan")
    options = RolloutOptions(sizes[-1], sigma=1e-2, cell=CELLS["relu"].forms)
    for form in FORMS:
        delta_loss = run(form, (preact, hidden, weight, loss, start), options).delta_loss
        bad = torch.zeros_like(delta_loss, dtype=torch.bool)
        bad[:, 1, 2] = True
        assert torch.equal(delta_loss.isnan(), bad)


def test_a_cell_is_a_function_of_the_kernels(monkeypatch):
    """A cell that is registered in one place runs in both forms."""

    @triton.jit
    def leaky_deviation(
        delta_a, first, second, factor,
        SCALED: tl.constexpr, FAST: tl.constexpr, ACCURATE: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        slope = tl.where(first > 0, 1.0, 0.5)
        return tl.where((first + delta_a > 0) == (first > 0), slope * delta_a, 0.0) * factor

    def clean_rows(preact, hidden, wide, quotient):
        return preact, None

    monkeypatch.setitem(cell_triton.CELLS, "leaky_deviation", cell_triton.CellForm(leaky_deviation, clean_rows))
    sizes = (3, 2, 9, 4, 5)
    preact, hidden, weight, _, start = problem(sizes)
    options = RolloutOptions(
        sizes[-1], sigma=1e-2, cell=TANH._replace(name="leaky", triton="leaky_deviation"), store_delta_a=True
    )
    for form in FORMS:
        result = run(form, (preact, hidden, weight, None, start), options)
        clean = preact[-1].float().unsqueeze(1)
        moved = clean + result.delta_a[-1]
        kept = (moved > 0) == (clean > 0)
        expected = torch.where(kept, torch.where(clean > 0, 1.0, 0.5) * result.delta_a[-1], 0)
        assert relative_error(result.delta_h, expected) <= TOLERANCES["float32"].bound


def test_unknown_names_raise():
    arguments = problem((2, 1, 3, 2, 4))
    options = RolloutOptions(4, 1e-2)
    cell = TANH._replace(name="gru", triton=None)
    with pytest.raises(ValueError, match="cell 'gru' has no form on backend 'triton', only on torch, numba, cupy"):
        run("auto", arguments, options._replace(cell=cell))
    with pytest.raises(ValueError, match=r"no cell 'gru_deviation', only \['relu_deviation', 'tanh_deviation'\]"):
        run("auto", arguments, options._replace(cell=TANH._replace(triton="gru_deviation")))
    with pytest.raises(ValueError, match="form 'persistent' is none of 'auto', 'resident', 'stepwise'"):
        run("persistent", arguments, options)
    with pytest.raises(TypeError, match="loss must be a LinearLoss"):
        loss_triton.loss_arguments((1,))

    class HuberLoss(LinearLoss):
        @property
        def kind(self):
            return "huber"

    with pytest.raises(ValueError, match="no loss of kind 'huber', only"):
        loss_triton.loss_arguments(HuberLoss(arguments[0]))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 1, 4), (2, 0, 3, 1, 4), (2, 2, 3, 1, 0)], ids=str)
def test_empty(sizes):
    arguments = problem(sizes, start=False)
    options = RolloutOptions(sizes[-1], sigma=1e-2, store_delta_a=True)
    actual, expected = run("auto", arguments, options), oracle(arguments, options)
    assert [part.shape for part in actual if part is not None] == [p.shape for p in expected if p is not None]
    assert (actual.delta_h == 0).all()


def test_what_triton_does_not_serve():
    arguments = problem((1, 1, 2, 1, 1))
    with pytest.raises(ValueError, match="float64"):
        rollout_triton.rollout(*arguments[:4], SEED, options=RolloutOptions(1, 1e-3))
    with pytest.raises(ValueError, match="fp64"):
        run("auto", arguments, RolloutOptions(1, 1e-3, precision="fp64"))
    with pytest.raises(ValueError, match="hidden units are more than"):
        run("resident", problem((1, 1, 300, 1, 1)), RolloutOptions(1, 1e-3))
