"""The compiled loops of the CPU against the reference in float64, and on several threads against one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from oracles import noise_block
from tolerances import TOLERANCES, assert_close, relative_error

import anpgpu
from anpgpu.kernels import (
    adjoint as reference_adjoint,
    adjoint_numba,
    cell_numba,
    compile_numba,
    least_squares_numba,
    loss as reference_loss,
    noise as reference_noise,
    noise_numba,
    rollout as reference_rollout,
    rollout_numba,
)
from anpgpu.kernels.least_squares import Deflation, deflate as deflate_in_torch
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import COUNTER_LIMITS, Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS
from anpgpu.runtime import dispatch

SEED = torch.tensor(-0x1234567890ABCDEF)
SHAPES = [(4, 2, 3, 1), (7, 3, 5, 6), (2, 1, 3, 65), (5, 2, 33, 100), (3, 4, 2, 496)]
"""(T, B, P, H); H fills whole vectors or not. The third has too little work to copy the readout beside W_hh."""

HERE = {**os.environ, "PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent)}

WHERE = Counters(purpose=1, layer=3, time=7, rollout=5, sample=2, rank=1)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@st.composite
def blocks(draw):
    shape = tuple(draw(st.integers(0, high)) for high in (3, 3, 40, 1100))
    extent = {"time": shape[0], "sample": shape[1], "rollout": shape[2]}
    edges = {name: limit - max(1, extent.get(name, 1)) for name, limit in COUNTER_LIMITS.items()}
    fields = {name: draw(st.one_of(st.integers(0, edge), st.just(edge))) for name, edge in edges.items()}
    return shape, Counters(**fields)


@given(blocks(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_signs_are_the_references_bit_for_bit(block, seed, dtype):
    (shape, counters), key = block, torch.tensor(seed)
    named = {"sigma": 0.37, "counters": counters, "dtype": dtype}
    signs = noise_numba.noise(key, shape, **named)
    assert signs.shape == shape
    assert torch.equal(signs, reference_noise.noise(key, shape, **named))


def test_signs_by_brute_force():
    shape = (2, 1, 3, 700)
    where = WHERE._replace(time=2**32 - 2, rollout=2**31)
    signs = noise_numba.noise(torch.tensor(42), shape, counters=where)
    assert torch.equal(signs.double(), noise_block(42, shape, "rademacher", **where._asdict()))


@pytest.fixture(params=["torch's products", "own products"])
def product(request, monkeypatch):
    """Select one of the two forms of the rollout, which otherwise the size of the product decides."""
    monkeypatch.setattr(rollout_numba, "SMALL_PRODUCT", 0 if request.param == "torch's products" else 1 << 62)


def network(shape, nonlinearity="tanh", drive=1.0):
    """Clean pre-activations and states, (T, B, H), and W_hh, all exact in float32."""
    time, batch, _, units = shape
    weight = (0.9 * draw(units, units, seed=1) / math.sqrt(units)).float().double()
    state, preacts, states = draw(batch, units, seed=2), [], []
    for step in drive * draw(time, batch, units, seed=3):
        preacts.append((step + state @ weight.T).float().double())
        state = (torch.tanh if nonlinearity == "tanh" else torch.relu)(preacts[-1])
        states.append(state)
    return torch.stack(preacts), torch.stack(states), weight


def losses(shape, outputs=5):
    """One loss of each kind, with and without a readout."""
    time, batch, _, units = shape
    weight, readout = draw(time, batch, seed=4).abs(), draw(outputs, units, seed=5) / math.sqrt(units)
    kinds = {"none": None, "linear": LinearLoss(draw(time, batch, units, seed=6))}
    for name, matrix in (("readout", readout), ("states", None)):
        size = units if matrix is None else outputs
        probs = torch.softmax(draw(time, batch, size, seed=7), -1)
        target = draw(time, batch, seed=8).mul(100).long().abs() % size
        kinds[f"squared of {name}"] = SquaredLoss(matrix, draw(time, batch, size, seed=9), weight)
        kinds[f"cross-entropy of {name}"] = CrossEntropyLoss(matrix, probs, target, weight)
        kinds[f"outputs of {name}"] = OutputsOnly(matrix)
    return kinds


def narrowed(value):
    """The value with its tensors in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    return None if value is None else type(value)(*map(narrowed, value))


def assert_as_good(compiled, small, exact):
    """The error of every field against float64 is at most twice the float32 reference's, or a few roundings."""
    for name, expected in exact._asdict().items():
        mine, other = getattr(compiled, name), getattr(small, name)
        if expected is None:
            assert mine is None
            continue
        assert mine.dtype == torch.float32
        bound = max(2 * relative_error(other, expected), TOLERANCES["float32"].bound)
        assert relative_error(mine, expected) <= bound, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", list(losses(SHAPES[0])))
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rollout_is_as_good_as_the_reference(shape, loss, nonlinearity, product):
    measured = losses(shape)[loss]
    clean = network(shape, nonlinearity)
    for sigma in (1e-6, 1e-3, 0.1, 3.0):
        start = sigma * draw(shape[1], shape[2], shape[3], seed=10).float().double()
        for kind, store, first in (("rademacher", True, None), ("gaussian", False, start)):
            options = RolloutOptions(shape[2], sigma, kind, CELLS[nonlinearity].forms, "fp32", store)
            named = {"options": options, "counters": WHERE}
            exact = reference_rollout.rollout(*clean, measured, SEED, **named, delta_h0=first)
            arguments = (*map(narrowed, clean), narrowed(measured), SEED)
            small = reference_rollout.rollout(*arguments, **named, delta_h0=narrowed(first))
            compiled = rollout_numba.rollout(*arguments, **named, delta_h0=narrowed(first))
            assert_as_good(compiled, small, exact)
            assert store == (compiled.delta_a is not None)


@pytest.mark.parametrize("waiting", [1, 2500, 5000])
def test_outputs_that_wait_reach_their_steps(waiting, monkeypatch, product):
    shape = (11, 2, 30, 20)
    monkeypatch.setattr(reference_loss, "WAITING_BYTES", waiting)
    measured, clean = losses(shape)["squared of readout"], network(shape)
    options = RolloutOptions(30, 1e-2)
    exact = reference_rollout.rollout(*clean, measured, SEED, options=options)
    compiled = rollout_numba.rollout(*map(narrowed, clean), narrowed(measured), SEED, options=options)
    assert_close(compiled.delta_loss, exact.delta_loss, "float32")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_rounded_operands(precision):
    shape = (4, 2, 16, 64)
    clean, measured = [narrowed(tensor) for tensor in network(shape)], narrowed(losses(shape)["squared of readout"])
    options = RolloutOptions(16, 1e-3, precision=precision, store_delta_a=True)
    compiled = rollout_numba.rollout(*clean, measured, SEED, options=options)
    expected = reference_rollout.rollout(*clean, measured, SEED, options=options)
    plain = reference_rollout.rollout(*clean, measured, SEED, options=options._replace(precision="fp32"))
    # A state near a rounding boundary may be rounded the other way.
    assert_close(compiled.delta_a, expected.delta_a, "bfloat16")
    assert relative_error(compiled.delta_a, expected.delta_a) < relative_error(plain.delta_a, expected.delta_a)
    assert_close(compiled.delta_loss, expected.delta_loss, "bfloat16")


def test_any_strides_of_what_is_given(product):
    shape = (4, 3, 5, 20)
    clean, measured = [narrowed(tensor) for tensor in network(shape)], narrowed(losses(shape)["linear"])
    start = draw(5, 20, 3).float()
    options = RolloutOptions(5, 1e-2, store_delta_a=True)
    preact, hidden = (torch.stack((tensor, -tensor), dim=-1)[..., 0] for tensor in clean[:2])
    weight, grad = clean[2].t().contiguous().t(), measured.grad.transpose(0, 1).contiguous().transpose(0, 1)
    strided = rollout_numba.rollout(
        preact, hidden, weight, LinearLoss(grad), SEED, options=options, delta_h0=start.permute(2, 0, 1)
    )
    plain = rollout_numba.rollout(*clean, measured, SEED, options=options, delta_h0=start.permute(2, 0, 1).contiguous())
    for name in ("delta_loss", "delta_a", "delta_h"):
        assert_close(getattr(strided, name), getattr(plain, name), "float32")


def test_saturated_units_and_large_deviations(product):
    shape = (6, 2, 40, 33)
    clean = network(shape, drive=30.0)
    assert float(clean[0].abs().max()) > 40
    for sigma in (1e-3, 0.4, 20.0):
        options = RolloutOptions(40, sigma, store_delta_a=True)
        exact = reference_rollout.rollout(*clean, None, SEED, options=options)
        small = reference_rollout.rollout(*map(narrowed, clean), None, SEED, options=options)
        assert_as_good(rollout_numba.rollout(*map(narrowed, clean), None, SEED, options=options), small, exact)


def test_the_fraction_is_tanh_to_float32s_rounding():
    x = np.linspace(-0.5, 0.5, 200_001, dtype=np.float32).reshape(1, -1)
    values, flat = np.empty_like(x), np.ones((1, *x.shape), np.float32)
    large = cell_numba.tanh_row(x, 0, values, flat, 0 * flat, 0, 0, x.shape[1])
    expected = np.tanh(x.astype(np.float64))
    assert large == 0
    assert np.abs(values - expected).max() < 2**-23
    assert (np.abs(values - expected) / np.maximum(np.abs(expected), 1e-300)).max() < 3 * 2**-24
    # A unit that is too large, or NaN, is counted.
    for wild in (0.51, -0.51, math.inf, -math.inf, math.nan):
        x[0, 77] = wild
        assert cell_numba.tanh_row(x, 0, values, flat, 0 * flat, 0, 0, x.shape[1]) == 1


def test_tanh_of_anything():
    inputs = [*np.linspace(-12, 12, 20_001), 1e-30, 1e30, math.inf, -math.inf]
    values = np.array([cell_numba._tanh(np.float32(number)) for number in inputs])
    assert np.abs(values - np.tanh(np.array(inputs, np.float32).astype(np.float64))).max() < 2**-22
    assert math.isnan(cell_numba._tanh(np.float32(math.nan)))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_its_rollout(wild, nonlinearity, product):
    shape = (3, 2, 4, 40)
    clean, measured = [narrowed(tensor) for tensor in network(shape, nonlinearity)], narrowed(losses(shape)["linear"])
    start = torch.zeros(2, 4, 40)
    start[1, 2, 7] = wild
    options = RolloutOptions(4, 1e-3, cell=CELLS[nonlinearity].forms, store_delta_a=True)
    compiled = rollout_numba.rollout(*clean, measured, SEED, options=options, delta_h0=start)
    expected = reference_rollout.rollout(*clean, measured, SEED, options=options, delta_h0=start)
    for mine, other in ((compiled.delta_a, expected.delta_a), (compiled.delta_loss, expected.delta_loss)):
        assert torch.equal(torch.isfinite(mine), torch.isfinite(other))
        broken = ~torch.isfinite(mine.view(3, 2, 4, -1)).all(-1)
        assert bool(broken[:, 1, 2].any()) or mine is compiled.delta_loss
        broken[:, 1, 2] = False
        assert not broken.any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (9, 1, 33, 64), (2, 3, 70, 500)], ids=str)
@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("sigma", [1e-20, 1e-3, 1e15])
def test_adjoint_is_the_references(shape, weight_by, kind, sigma):
    time, batch, rollouts, units = shape
    credit = (sigma * draw(time, batch, rollouts)).float()
    credit[0, 0, 0] = 0
    room = (sigma * draw(time + 1, batch, rollouts, units + 3, seed=1)).float()
    room[1:, :, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(time) % 3].unsqueeze(1)
    if rollouts > 1:
        room[1:, :, 1] = 0
    # A view into a larger tensor with padded rows, and a contiguous copy.
    for delta_a in (room[1:, ..., :units], room[1:, ..., :units].contiguous()):
        named = {
            "weight_by": weight_by,
            "units": units,
            "counters": WHERE,
            "options": RolloutOptions(rollouts, sigma, kind),
        }
        activity = None if weight_by == "noise" else delta_a
        exact = reference_adjoint.adjoint(
            credit.double(), None if activity is None else activity.double(), SEED, **named
        )
        sums = adjoint_numba.adjoint(credit, activity, SEED, **named)
        assert sums.shape == (2, time, batch, units)
        assert_close(sums, exact, "float32_long")


def test_adjoint_takes_any_strides():
    credit, delta_a = draw(4, 3, 6).float(), draw(6, 20, 3, 4, seed=2).float().permute(3, 2, 0, 1)
    named = {"weight_by": "activity", "units": 20, "options": RolloutOptions(6, 1.0)}
    sums = adjoint_numba.adjoint(credit, delta_a, SEED, **named)
    assert torch.equal(sums, adjoint_numba.adjoint(credit, delta_a.contiguous(), SEED, **named))
    assert_close(sums, reference_adjoint.adjoint(credit.double(), delta_a.double(), SEED, **named), "float32")
    half = adjoint_numba.adjoint(credit, delta_a.half(), SEED, **named)
    assert_close(half, sums, "bfloat16")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 3, 7, 20), (3, 2, 40, 100)], ids=str)
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_deflation_is_the_references(shape, baseline, discount):
    length, batch, rollouts, units = shape
    finite = draw(batch, rollouts, seed=3) > -1
    finite[:, 0] = True
    # Rows are padded, as those of a rollout are.
    room = torch.zeros(length, batch, rollouts, units + 3, dtype=torch.float64)
    room[..., :units] = draw(*shape).float() * finite.unsqueeze(-1)
    activity = room[..., :units]
    gram = activity @ activity.mT + torch.eye(rollouts, dtype=torch.float64)
    factor = torch.linalg.cholesky(gram).float().double()
    delta_loss = draw(length, batch, rollouts, seed=1).float().double() * finite
    carry = draw(batch, rollouts, seed=2).float().double()
    unit = 0.5 + torch.rand(length, batch, generator=torch.Generator().manual_seed(4))
    results = []
    for deflate, dtype in ((deflate_in_torch, torch.float64), (least_squares_numba.deflate, torch.float32)):
        inputs = [tensor.to(dtype) for tensor in (delta_loss, factor, carry)]
        how = Deflation(finite, discount, baseline, 0.3, "rademacher", WHERE, unit.to(dtype))
        estimate, credit = torch.empty(length, batch, units, dtype=dtype), torch.empty_like(inputs[0])
        after = deflate(
            inputs[0], room.to(dtype)[..., :units], *inputs[1:], SEED, how, estimate=estimate, credit=credit
        )
        results.append((estimate, credit, after))
    for exact, mine in zip(*results, strict=True):
        assert_close(mine, exact, "float32_long")


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (20, 3, 100), (5, 0, 3), (3, 1, 257)], ids=str)
def test_returns_are_the_references(shape, discount):
    delta_loss, carry = draw(*shape).float(), draw(*shape[1:], seed=1).float()
    for after in (None, carry):
        credit = adjoint_numba.returns(delta_loss, discount, carry=after)
        exact = reference_adjoint.returns(
            delta_loss.double(), discount, carry=None if after is None else after.double()
        )
        assert_close(credit, exact, "float32")
    assert credit is not delta_loss


def test_threads_change_nothing(product):
    shape = (6, 3, 40, 70)
    clean, measured = [narrowed(tensor) for tensor in network(shape)], narrowed(losses(shape)["squared of readout"])
    options = RolloutOptions(40, 0.2, store_delta_a=True)

    def everything():
        run = rollout_numba.rollout(*clean, measured, SEED, options=options)
        credit = adjoint_numba.returns(run.delta_loss, 0.9)
        named = {"units": 70, "options": options}
        sums = [
            adjoint_numba.adjoint(
                credit, run.delta_a if weight_by == "activity" else None, SEED, weight_by=weight_by, **named
            )
            for weight_by in ("noise", "activity")
        ]
        return [run.delta_a, run.delta_h, noise_numba.noise(SEED, shape), credit, *sums]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(2)
        together = everything()
        assert numba.get_num_threads() == min(2, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)
    # The products are torch's, whose rounding may depend on the number of threads.
    assert torch.equal(alone[2], together[2])
    for first, second in zip(alone, together, strict=True):
        assert_close(first, second, "float32")
    assert torch.equal(
        adjoint_numba.adjoint(alone[3], alone[0], SEED, weight_by="activity", units=70, options=options), alone[5]
    )


FORK = """
import os, torch
from anpgpu.kernels import adjoint_numba
torch.set_num_threads(2)
values = torch.ones(5, 2, 300)
assert float(adjoint_numba.returns(values, 1.0)[0].sum()) == 3000
child = os.fork()
if not child:
    os._exit(0 if float(adjoint_numba.returns(values, 1.0)[0].sum()) == 3000 else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_alone():
    run = subprocess.run([sys.executable, "-c", FORK], env=HERE, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0"], run.stderr


def test_auto_takes_numba_for_float32_on_the_cpu():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert dispatch.choose_backend("auto", cpu, torch.float32) == "numba"
    assert dispatch.choose_backend("auto", cpu, torch.float64) == "torch"
    assert dispatch.choose_backend("auto", meta, torch.float32) == "torch"
    assert dispatch.choose_backend("numba", cpu, torch.float32) == "numba"
    with pytest.raises(ValueError, match="backend='numba' has no float64 kernels"):
        dispatch.choose_backend("numba", cpu, torch.float64)
    with pytest.raises(ValueError, match="backend='numba' needs CPU tensors, got meta"):
        dispatch.choose_backend("numba", meta, torch.float32)


@pytest.fixture
def numba_not_looked_for(monkeypatch):
    dispatch._has_numba.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    dispatch._has_numba.cache_clear()


def test_without_numba_auto_takes_torch(numba_not_looked_for):
    numba_not_looked_for.setitem(sys.modules, "numba", None)
    cpu = torch.device("cpu")
    assert dispatch.choose_backend("auto", cpu, torch.float32) == "torch"
    with pytest.raises(ImportError, match=r"backend='numba' needs Numba: pip install 'anpgpu\[cpu\]'"):
        dispatch.choose_backend("numba", cpu, torch.float32)


def test_a_numba_that_does_not_import_is_told(numba_not_looked_for):
    def refuse(name):
        raise ImportError("Numba needs NumPy 2.5 or less")

    numba_not_looked_for.setattr(dispatch.importlib, "import_module", refuse)
    with pytest.warns(RuntimeWarning, match=r"does not import \(Numba needs NumPy 2.5 or less\).*run in torch"):
        assert dispatch.choose_backend("auto", torch.device("cpu"), torch.float32) == "torch"


def test_without_a_folder_for_compiled_code_it_is_compiled_anew(monkeypatch):
    njit = numba.njit

    def nowhere(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", nowhere)

    def fill(values):
        for place in numba.prange(len(values)):
            values[place] = place

    values = np.zeros(5)
    compile_numba.kernel(fill)(values)
    assert values.tolist() == [0, 1, 2, 3, 4]


def test_a_change_in_any_file_of_a_kernel_is_seen(tmp_path):
    version = compile_numba.sources_version.__wrapped__
    for name in ("cell.py", "cell_numba.py", "rollout_numba.py", "cell_triton.py"):
        (tmp_path / name).write_text("x = 1\n")
    before = version(tmp_path)
    assert version(tmp_path) == before
    (tmp_path / "cell_triton.py").write_text("x = 2\n")
    assert version(tmp_path) == before
    for name in ("cell.py", "cell_numba.py"):
        (tmp_path / name).write_text("x = 2\n")
        assert version(tmp_path) != before
        before = version(tmp_path)


ESTIMATE = """
import hashlib, torch, anpgpu
torch.set_num_threads(1)
for method in ("np", "anp", "anp-ls"):
    torch.manual_seed(0)
    rnn, readout = anpgpu.RNN(3, 40, 2, perturbation=anpgpu.Perturbation(method, 20, sigma=0.1)), torch.nn.Linear(40, 2)
    anpgpu.estimate_grad_(rnn, readout, torch.randn(9, 3, 3), torch.randn(9, 3, 2))
    for parameter in (*rnn.parameters(), *readout.parameters()):
        print(hashlib.sha256(parameter.grad.numpy().tobytes()).hexdigest())
"""


def test_code_from_the_disk_rounds_like_code_just_compiled(tmp_path):
    where = {**HERE, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", ESTIMATE], env=where, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        said.append(run.stdout.split())
        assert list(tmp_path.rglob("*.nbc"))
    assert len(said[0]) == 3 * 10
    assert said[0] == said[1]


@pytest.mark.parametrize("method", ["np", "anp", "anp-ls"])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_estimates_agree_with_torchs(method, discount):
    inputs, targets = draw(12, 3, 4).float(), draw(12, 3, 2, seed=1).float()
    estimates = []
    for backend in ("torch", "numba"):
        torch.manual_seed(0)
        how = anpgpu.Perturbation(method, rollouts=12, discount=discount, backend=backend)
        rnn, readout = anpgpu.RNN(4, 24, num_layers=2, perturbation=how), torch.nn.Linear(24, 2)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        estimates.append(
            torch.cat([parameter.grad.flatten() for parameter in (*rnn.parameters(), *readout.parameters())])
        )
    assert_close(estimates[1], estimates[0], "least_squares" if method == "anp-ls" else "float32_long")
