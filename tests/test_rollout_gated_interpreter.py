"""The Triton rollouts of gated cells in Triton's interpreter: float32 against the torch reference in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_cell_gated import BIASES, STEPS, Clean
from test_rollout_interpreter import FORMS, LOSSES, OFFSET, SEED, SIZES, _poisoned_memory, narrow, oracle, problem, run
from tolerances import TOLERANCES, assert_close as assert_close_to, relative_error

from anpgpu.kernels import adjoint as adjoint_reference
from anpgpu.kernels.cell_gated import exact_difference
from anpgpu.kernels.loss import LinearLoss, loss_of_steps
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS

triton = pytest.importorskip("triton", reason="needs Triton")
tl = pytest.importorskip("triton.language", reason="needs Triton")
adjoint_triton = pytest.importorskip("anpgpu.kernels.adjoint_triton", reason="needs Triton")
cell_gated_triton = pytest.importorskip("anpgpu.kernels.cell_gated_triton", reason="needs Triton")
place_triton = pytest.importorskip("anpgpu.kernels.place_triton", reason="needs Triton")
rollout_gated_triton = pytest.importorskip("anpgpu.kernels.rollout_gated_triton", reason="needs Triton")
rollout_triton = pytest.importorskip("anpgpu.kernels.rollout_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter
RESIDENT_LOSSES = ("linear", "none")
SERVED = [*(("stepwise", kind) for kind in LOSSES), *(("resident", kind) for kind in RESIDENT_LOSSES)]
poisoned_memory = _poisoned_memory


def gated(cell, sizes, kind="linear", readout=True, sigma=1e-2, start=True, saturated=False):
    """Return float64 arguments (preact, hidden, weight, loss, delta_h0) of a rollout; every third unit may saturate."""
    time, batch, units, _, rollouts = sizes
    forms, generator = CELLS[cell].forms, torch.Generator().manual_seed(sum(sizes))
    _, _, _, loss, _ = problem(sizes, kind, readout)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    preact = draw(time, batch, forms.clean, units)
    if saturated:
        preact[:, :, : forms.gates, ::3] += 15 * draw(1, 1, forms.gates, len(range(0, units, 3))).sign()
    hidden = draw(time, batch, units).tanh()
    if forms.states > 1:
        a_i, a_f, a_g, _, before = preact.unbind(2)
        hidden = torch.cat((hidden, a_f.sigmoid() * before + a_i.sigmoid() * a_g.tanh()), -1)
        if kind == "linear":
            loss = LinearLoss(draw(time, batch, 2 * units))
    weight = draw(forms.gates * units, units) / units**0.5
    return preact.flatten(2), hidden, weight, loss, sigma * draw(batch, rollouts, hidden.shape[-1]) if start else None


def options_of(cell, sizes, sigma=1e-2, **options):
    return RolloutOptions(sizes[-1], sigma=sigma, cell=CELLS[cell].forms, **{"store_delta_a": True, **options})


def assert_close(actual, expected, bound=TOLERANCES["float32"].bound):
    """Compare h and c apart: each has its own size."""
    for name, left, right in zip(actual._fields, actual, expected, strict=True):
        assert (left is None) == (right is None), name
        if left is None:
            continue
        assert left.dtype == torch.float32
        halves = 2 if name in {"delta_a", "delta_h"} else 1
        for part, (ours, reference) in enumerate(zip(left.chunk(halves, -1), right.chunk(halves, -1), strict=True)):
            error = relative_error(ours, reference)
            assert error <= bound, f"{name}, part {part}: {error:.3g}"


@pytest.mark.parametrize(("form", "kind"), SERVED)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", STEPS)
def test_equals_the_reference(cell, sizes, form, kind):
    arguments, options = gated(cell, sizes, kind), options_of(cell, sizes)
    assert_close(run(form, arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(
    ("kind", "outputs", "rollouts"), [("squared", 16, 32), ("cross_entropy", 10, 5), ("outputs", 17, 40)]
)
@pytest.mark.parametrize("cell", STEPS)
def test_outputs_of_the_step_before(monkeypatch, cell, kind, outputs, rollouts, joined):
    """Measured by the programs of the last units, or by a launch behind every step; the last step by one anyway."""
    choose, block = rollout_triton.rollout_launch, 16 * -(-outputs // 16)
    monkeypatch.setattr(
        rollout_triton, "rollout_launch", lambda **named: replace(choose(**named), joined=joined, block_outputs=block)
    )
    sizes = (3, 2, 37, outputs, rollouts)
    arguments, options = gated(cell, sizes, kind), options_of(cell, sizes, noise="gaussian")
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("sizes", [(2, 5, 16, 1, 20), (3, 2, 32, 1, 70), (2, 3, 20, 1, 64)], ids=str)
@pytest.mark.parametrize("cell", STEPS)
def test_resident_tiles(cell, sizes, noise):
    """A last tile of missing samples, of missing rollouts, and none; units that fill the tile, and not."""
    for store, start in ((True, False), (False, True)):
        arguments = gated(cell, sizes, start=start)
        options = options_of(cell, sizes, noise=noise, store_delta_a=store)
        assert_close(run("resident", arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("cell", STEPS)
def test_the_forms_are_equal_to_rounding(cell):
    arguments, options = gated(cell, SIZES[2]), options_of(cell, SIZES[2])
    assert_close(run("resident", arguments, options), run("stepwise", arguments, options))


@pytest.mark.parametrize("kind", ["squared", "cross_entropy", "outputs"])
@pytest.mark.parametrize("cell", STEPS)
def test_hidden_state_as_output(cell, kind):
    sizes = SIZES[3]
    arguments, options = gated(cell, sizes, kind, readout=False), options_of(cell, sizes, store_delta_a=False)
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_loss_of_h_alone(cell, form):
    sizes = (4, 2, 17, 5, 3)
    preact, hidden, weight, loss, start = gated(cell, sizes)
    arguments = preact, hidden, weight, LinearLoss(loss.grad[..., :17]), start
    options = options_of(cell, sizes)
    assert_close(run(form, arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize(("sigma", "noise"), [(1e-6, "gaussian"), (0.3, "rademacher"), (3.0, "gaussian")])
@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_any_sigma(cell, sigma, noise, saturated, form):
    sizes = (4, 2, 9, 4, 5)
    arguments = gated(cell, sizes, sigma=sigma, saturated=saturated)
    options = options_of(cell, sizes, sigma, noise=noise)
    assert_close(run(form, arguments, options), oracle(arguments, options), 1e-5)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("cell", STEPS)
def test_deviations_are_the_difference_of_two_runs(cell, bias):
    clean = Clean(cell, BIASES[bias])
    for sigma in (1e-3, 0.3, 4.0):
        moved = clean.rollout(sigma, torch.float32, run=rollout_triton.rollout)
        assert relative_error(moved.delta_a, clean.perturbed(sigma)) < 1e-5


@pytest.mark.parametrize(
    ("form", "precision", "kind"),
    [
        *((form, precision, "linear") for form in FORMS for precision in ("tf32", "fp16")),
        ("stepwise", "fp16", "squared"),
    ],
)
@pytest.mark.parametrize("sigma", [1e-6, 1e-3])
@pytest.mark.parametrize("cell", STEPS)
def test_other_branches(cell, form, kind, sigma, precision):
    """The scaled branch and the one without the exact difference, whose operands the interpreter does not round."""
    sizes = (3, 2, 9, 4, 5)
    arguments = gated(cell, sizes, kind, sigma=sigma, saturated=True)
    options = options_of(cell, sizes, sigma, precision=precision, store_delta_a=False)
    bound = TOLERANCES["bf16_adjoint"].bound if precision == "fp16" else TOLERANCES["float32_long"].bound
    assert_close(run(form, arguments, options), oracle(arguments, options), bound)


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_saturated_units_and_large_deviations_stay_finite(cell, form):
    sizes = (3, 1, 6, 2, 3)
    preact, hidden, weight, loss, start = gated(cell, sizes)
    gates = preact.view(3, 1, 5, 6)[:, :, : CELLS[cell].forms.gates]
    gates[..., :2], gates[..., 2:4] = 60.0, -60.0
    for precision in ("fp32", "tf32"):
        options = options_of(cell, sizes, 1e-3, precision=precision)
        wild = (preact, hidden, weight, loss, torch.full_like(start, 1e4))
        assert all(part.isfinite().all() for part in run(form, wild, options) if part is not None)


@pytest.mark.parametrize(("form", "kind"), [*(("stepwise", kind) for kind in LOSSES[:4]), ("resident", "linear")])
@pytest.mark.parametrize("cell", STEPS)
def test_strides(cell, form, kind):
    """Transposed and offset tensors; torch rounds the cell's clean values by their place in memory."""
    sizes = (3, 2, 17, 4, 3)
    arguments, options = gated(cell, sizes, kind), options_of(cell, sizes)
    expected = run(form, arguments, options)

    def scattered(value):
        if isinstance(value, torch.Tensor):
            memory = value.new_zeros((*(2 * size for size in reversed(value.shape)),))
            view = memory.permute(*reversed(range(value.dim())))[tuple(slice(1, None, 2) for _ in value.shape)]
            return view.copy_(value)
        parts = {name: scattered(part) for name, part in value._asdict().items() if part is not None}
        return value._replace(**parts)

    preact, hidden, weight, loss, start = map(narrow, arguments)
    tensors = (scattered(value) for value in (preact, hidden, weight, loss))
    actual = rollout_triton.rollout_in_form(form, *tensors, SEED, options, OFFSET, scattered(start))
    assert_close(actual, expected)


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_time_can_be_cut(cell, form):
    sizes = (4, 2, 9, 4, 5)
    preact, hidden, weight, loss, start = map(narrow, gated(cell, sizes))
    options = options_of(cell, sizes)
    cut = partial(rollout_triton.rollout_in_form, form)
    whole = cut(preact, hidden, weight, loss, SEED, options, Counters(), start)
    parts, state = [], start
    for steps in (slice(0, 1), slice(1, 4)):
        counters, of_steps = Counters(time=steps.start), loss_of_steps(loss, steps)
        part = cut(preact[steps], hidden[steps], weight, of_steps, SEED, options, counters, state)
        parts.append(part)
        state = part.delta_h
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("delta_loss", "delta_a")]
    # Torch rounds the cell's clean values by their place in memory.
    assert_close(whole._replace(delta_loss=joined[0], delta_a=joined[1], delta_h=state), whole)


@pytest.mark.parametrize("cell", STEPS)
def test_tile_sizes_change_rounding_at_most(cell, monkeypatch):
    """Also tiles of one sample, and more steps than slots of partial sums."""
    sizes = (3, 2, 20, 3, 40)
    arguments, options = gated(cell, sizes), options_of(cell, sizes)
    expected = run("auto", arguments, options)
    choose = rollout_triton.rollout_launch
    monkeypatch.setattr(rollout_gated_triton, "PARTIAL_STEPS", 2)
    for samples in (0, 1):

        def other_tiles(samples=samples, **named):
            return replace(choose(**named), block_rows=16, block_units=16, block_inner=32, samples=samples)

        monkeypatch.setattr(rollout_triton, "rollout_launch", other_tiles)
        assert_close(run("auto", arguments, options), expected)


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_rollout_that_is_not_finite_stays_alone(cell, form):
    sizes = (3, 2, 9, 4, 5)
    preact, hidden, weight, loss, start = gated(cell, sizes)
    for unit in (0, start.shape[-1] - 1):
        lost = start.clone()
        lost[1, 2, unit] = float("nan")
        delta_loss = run(form, (preact, hidden, weight, loss, lost), options_of(cell, sizes)).delta_loss
        bad = torch.zeros_like(delta_loss, dtype=torch.bool)
        bad[:, 1, 2] = True
        assert torch.equal(delta_loss.isnan(), bad)


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("cell", STEPS)
def test_rollouts_that_sum_their_own_adjoint(cell, weight_by):
    sizes = (3, 2, 17, 4, 5)
    arguments, options = gated(cell, sizes, "squared"), options_of(cell, sizes)
    preact, hidden, weight, loss, start = arguments
    named = {"weight_by": weight_by, "counters": OFFSET}
    expected = adjoint_reference.rollout_adjoint(
        preact, hidden, weight, loss, SEED, options=options._replace(precision="fp64"), delta_h0=start, **named
    )
    *tensors, start = map(narrow, arguments)
    found = adjoint_triton.rollout_adjoint(*tensors, SEED, options=options, delta_h0=start, **named)
    for ours, reference in zip(found, expected, strict=True):
        assert_close_to(ours, reference, "float32_long")


@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 1, 4), (2, 0, 3, 1, 4), (2, 2, 3, 1, 0)], ids=str)
def test_empty(cell, sizes):
    arguments, options = gated(cell, sizes, start=False), options_of(cell, sizes)
    actual, expected = run("auto", arguments, options), oracle(arguments, options)
    assert [part.shape for part in actual if part is not None] == [p.shape for p in expected if p is not None]
    assert (actual.delta_h == 0).all()


def test_what_triton_does_not_serve():
    sizes = (2, 1, 3, 2, 4)
    options = options_of("gru", sizes)
    with pytest.raises(ValueError, match="these rollouts: losses of the outputs of a cell of 3 gates run stepwise"):
        run("resident", gated("gru", sizes, "squared"), options)
    peephole = options.cell._replace(name="peephole", triton="peephole_deviation")
    with pytest.raises(ValueError, match=r"no gated cell 'peephole_deviation', only \['gru_deviation', 'lstm_dev"):
        run("auto", gated("gru", sizes), options._replace(cell=peephole))


@triton.jit
def _differences_kernel(result_ptr, change_ptr, rows, COUNT: tl.constexpr, GATE: tl.constexpr):
    lane = tl.arange(0, COUNT)[None, :]
    clean = cell_gated_triton.CleanStep(rows, 0, 0, lane, lane < COUNT, COUNT, lane)
    squashed, slope = cell_gated_triton._value(clean, 0), cell_gated_triton._value(clean, 1)
    change = tl.load(change_ptr + lane)
    if GATE:
        result = cell_gated_triton._gate_difference(change, squashed, slope, clean, 2, False, True)
    else:
        result = cell_gated_triton._tanh_difference(change, squashed, slope, clean, 2, False, True)
    tl.store(result_ptr + lane, result)


@pytest.mark.parametrize("gate", [True, False])
def test_every_difference_keeps_its_precision(gate):
    """Of saturated units, too, whose part in a state's norm is nothing."""
    clean = torch.tensor([-30.0, -12.0, -3.0, -0.1, 0.0, 0.7, 4.0, 12.0, 30.0])
    change = torch.tensor([s * x for s in (1, -1) for x in (1e-9, 1e-3, 0.3, 0.8, 2.0, 9.0, 25.0)])
    a, d = (values.flatten() for values in torch.meshgrid(clean, change, indexing="ij"))
    a, d = (torch.nn.functional.pad(values, (0, 128 - len(a))) for values in (a, d))
    of = cell_gated_triton._of_gate if gate else cell_gated_triton._of_tanh
    rows = torch.cat((*of(a), a)).view(1, 1, -1)
    result = torch.empty_like(d)
    _differences_kernel[(1,)](result, d, place_triton.rows_of(rows), COUNT=128, GATE=gate)
    # sigma(a) = (1 + tanh(a / 2)) / 2
    factor = 0.5 if gate else 1.0
    exact = factor * exact_difference(factor * a.double(), factor * d.double())
    error = (result.double() - exact).abs()
    assert (error <= 1e-5 * exact.abs() + 1e-37).all(), (error / exact.abs()).nan_to_num().max()
