"""Both faces on a device: RNN's backward pass and `estimate_grad_` against float64 on the CPU, and what users do.

A test's body takes a device. With "cpu" it runs in the reference leg, which shows that the test itself is right; with
"cuda" in `make gpu`. Only CUDA graphs, and running out of a GPU's memory, have no form on a CPU. The comparison
with the oracle also runs the Triton kernels in their interpreter.
"""

import contextlib
import copy
import importlib
import warnings

import pytest
import torch
from device_cases import (
    CASES,
    FACES,
    LENGTHS,
    SEED,
    SETTINGS,
    I,
    O,
    T,
    add_gradients,
    errors,
    fixed_seed,
    loss_through,
    oracle,
    perturbation_of,
    problem_of,
)
from stepping import WARNINGS
from tolerances import TOLERANCES, assert_close, relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.estimators.sweep import Sweep
from anpgpu.registry import ESTIMATORS
from anpgpu.runtime import memory

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
    # cuDNN says so of weights that lie in no single piece, as those of one layer of several do not.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
    # Of inductor, on GPUs that have TensorFloat32.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", CUDA]
LEARNING = ("anp", "anp-ls", "np", "wp")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    # By default cuDNN rounds the operands of a float32 RNN to TensorFloat32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision="ieee"):
        yield
    memory._lowered.clear()


def draw_seeds_by(patch, draw):
    """Let updates of both faces draw their seed by a function of a device."""
    for module in ("anpgpu.modules", "anpgpu.estimate"):
        patch.setattr(importlib.import_module(module), "new_seed", draw)


@pytest.fixture
def one_seed(monkeypatch):
    """Let every update have one seed, on every device."""
    draw_seeds_by(monkeypatch, fixed_seed)


def combinations(cases=tuple(CASES)):
    """Faces, settings and cases that go together: a published rule measures losses, of one layer."""
    return [
        pytest.param(face, setting, case, id=f"{face}-{setting}-{case}")
        for face in FACES
        for setting, options in SETTINGS.items()
        for case in cases
        if not ESTIMATORS[options["method"]].measures_losses or (face, case) == ("estimate_grad_", "one layer")
    ]


# Equality with the oracle


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_nn_rnns(case, learns, device):
    how = perturbation_of("anp")
    here = problem_of(how, CASES[case], device)
    there = problem_of(how, CASES[case], dtype=torch.float64, kind=nn.RNN)
    found = []
    for problem in (here, there):
        inputs = problem.inputs
        if problem.lengths is not None:
            inputs = pack_padded_sequence(inputs, problem.lengths, enforce_sorted=False)
        with torch.set_grad_enabled(learns):
            outputs, h_n = problem.rnn(inputs, problem.hx)
        found.append((pad_packed_sequence(outputs)[0] if problem.lengths is not None else outputs, h_n))
    for actual, expected in zip(*found, strict=True):
        assert actual.requires_grad == learns
        assert actual.device.type == device
        assert_close(actual.cpu(), expected, "float32_long")


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("face", "setting", "case"), combinations())
def test_update_is_the_oracles(face, setting, case, device):
    how = perturbation_of(setting, precision="fp32")
    found = errors(FACES[face](problem_of(how, CASES[case], device)), oracle(face, setting, case))
    assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize(("face", "setting", "case"), combinations(("one layer",)))
def test_update_by_interpreted_kernels_is_the_oracles(face, setting, case):
    how = perturbation_of(setting, backend="triton", precision="fp32")
    found = errors(FACES[face](problem_of(how, CASES[case])), oracle(face, setting, case))
    assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("face", "setting", "case"), combinations())
def test_update_with_a_gpus_operands(face, setting, case, device):
    # What "auto" takes on a GPU.
    how = perturbation_of(setting, precision="bf16" if device == "cpu" else "auto")
    found = errors(FACES[face](problem_of(how, CASES[case], device)), oracle(face, setting, case))
    assert max(found.values()) <= TOLERANCES["bfloat16"].bound, found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("face", FACES)
def test_the_setting_that_is_cut_in_time_is(face, device, monkeypatch):
    advanced = []
    advance = Sweep.advance
    monkeypatch.setattr(Sweep, "advance", lambda *given: advanced.append(given[2].stop) or advance(*given))
    FACES[face](problem_of(perturbation_of("anp, cut in time"), device=device))
    assert set(advanced) == {T // 2, T}


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", ["cross_entropy", "callable"])
@pytest.mark.parametrize("method", LEARNING)
def test_other_losses_are_the_oracles(method, loss, device):
    def absolute(outputs, targets):
        return (outputs - targets).abs().mean(-1)

    # A callable's loss differences are those of two float32 losses: they need a large sigma.
    options = {"sigma": 0.1} if loss == "callable" else {}
    found = []
    for where, dtype, precision in ((device, torch.float32, "fp32"), ("cpu", torch.float64, "auto")):
        problem = problem_of(perturbation_of(method, precision=precision, **options), device=where, dtype=dtype)
        given = absolute
        if loss != "callable":
            problem, given = problem._replace(targets=problem.targets.argmax(-1)), loss
        found.append(FACES["estimate_grad_"](problem, given))
    found = errors(*found)
    assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


# Without the host


@contextlib.contextmanager
def no_synchronisation(device):
    """Raise at anything that makes the host wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("face", "setting", "case"), combinations(("one layer",)))
def test_no_host_synchronisation(face, setting, case, device):
    """Not with lengths, which are the CPU's."""
    problem = problem_of(perturbation_of(setting), CASES[case], device)
    expected = FACES[face](problem).keys()
    problem.clear()
    with no_synchronisation(device):
        add_gradients(face, problem)
    found = problem.grads()
    assert found.keys() == expected
    assert all(bool(torch.isfinite(grad).all()) for grad in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("face", FACES)
def test_an_update_in_a_cuda_graph(face, method, monkeypatch):
    """Three replays, each with another seed, are the oracle's updates; capture would fail on a synchronisation."""
    seed = torch.full((), SEED, dtype=torch.int64, device="cuda")
    problem = problem_of(perturbation_of(method, precision="fp32"), device="cuda")
    reference = problem_of(perturbation_of(method, backend="torch"), dtype=torch.float64)

    with monkeypatch.context() as patch:
        draw_seeds_by(patch, lambda *_: seed.clone())
        graph = captured(lambda: add_gradients(face, problem), problem.clear)
    for value in (1, 2, SEED):
        seed.fill_(value)
        graph.replay()
        with monkeypatch.context() as patch:
            draw_seeds_by(patch, lambda *_, value=value: torch.tensor(value))
            expected = FACES[face](reference)
        found = errors(problem.grads(), expected)
        assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


def captured(work, before):
    """Return a CUDA graph of some work, which has run on a side stream before; `before` is called before each run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


# Training


def trainer(device, method="anp-ls", momentum=0.9, **options):
    """A problem that can be learnt, and a function that makes one step of it and returns the loss."""
    problem = problem_of(Perturbation(method, rollouts=32, **options), device=device)
    # The gradients of inputs and hx would add up.
    problem = problem._replace(
        inputs=problem.inputs.detach(), hx=problem.hx.detach(), targets=problem.targets.tanh() / 2
    )
    parameters = [*problem.rnn.parameters(), *problem.readout.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.2, momentum=momentum)

    def step(run=None):
        optimiser.zero_grad()
        outputs, _ = (problem.rnn if run is None else run)(problem.inputs, problem.hx)
        loss = (problem.readout(outputs).float() - problem.targets).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return problem, optimiser, step


def falls(losses):
    """Whether a loss has fallen by a third, which a step in the wrong direction, or none, would not do."""
    return bool(losses[-1] < losses[0] * 2 / 3)


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNING)
def test_a_training_step_in_a_cuda_graph(method):
    """Forward pass, backward pass and optimiser: replays learn, each from noise of its own."""
    problem, optimiser, _ = trainer("cuda", method)
    error = torch.zeros((), device="cuda")

    def step():
        outputs, _ = problem.rnn(problem.inputs, problem.hx)
        loss = (problem.readout(outputs) - problem.targets).square().mean()
        loss.backward()
        optimiser.step()
        error.copy_(loss.detach())

    # Gradients are made anew in the graph's own memory.
    graph = captured(step, lambda: optimiser.zero_grad(set_to_none=True))
    losses = []
    for _ in range(60):
        graph.replay()
        losses.append(float(error))
    assert falls(losses)
    before = {name: weight.clone() for name, weight in problem.rnn.state_dict().items()}
    heads = copy.deepcopy(problem.readout.state_dict())
    again = []
    for _ in range(2):
        problem.rnn.load_state_dict(before)
        problem.readout.load_state_dict(heads)
        graph.replay()
        again.append(problem.rnn.weight_hh_l0.grad.clone())
    # The same weights and data: only the noise differs.
    assert relative_error(*again) > TOLERANCES["float32_long"].bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", LEARNING)
def test_autocast(method, dtype, device):
    """Steps under autocast, in float16 with a GradScaler, learn."""
    problem, optimiser, _ = trainer(device, method)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        with torch.autocast(device, dtype):
            outputs, _ = problem.rnn(problem.inputs, problem.hx)
            loss = (problem.readout(outputs).float() - problem.targets).square().mean()
        assert outputs.dtype == dtype
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.detach().cpu())
    assert falls(losses)
    assert all(weight.dtype == torch.float32 for weight in problem.rnn.parameters())


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", LEARNING)
def test_autocasts_gradients_are_the_oracles(method, dtype, device):
    problem = problem_of(perturbation_of(method), device=device)
    with torch.autocast(device, dtype):
        loss = loss_through(problem)
    loss.backward()
    found = errors(problem.grads(), oracle("backward", method, "one layer"))
    assert max(found.values()) <= TOLERANCES["bfloat16"].bound, found


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", LEARNING)
def test_compiled_gradients_are_the_oracles(method, device):
    torch._dynamo.reset()
    # A CPU may have no compiler for inductor.
    options = {"backend": "aot_eager"} if device == "cpu" else {}
    problem = problem_of(perturbation_of(method, precision="fp32"), device=device)
    loss_through(problem, torch.compile(problem.rnn, fullgraph=True, **options)).backward()
    found = errors(problem.grads(), oracle("backward", method, "one layer"))
    assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


@pytest.mark.gpu
@pytest.mark.parametrize("method", LEARNING)
def test_reduce_overhead_learns(method):
    """Compiled into CUDA graphs by torch itself; the static weights are updated in place."""
    torch._dynamo.reset()
    problem, _, step = trainer("cuda", method)
    run = torch.compile(problem.rnn, mode="reduce-overhead", fullgraph=True)
    losses = []
    for _ in range(60):
        torch.compiler.cudagraph_mark_step_begin()
        losses.append(float(step(run)))
    assert falls(losses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", LEARNING)
def test_training_goes_on_where_it_stopped(method, device, tmp_path):
    """A checkpoint of weights, optimiser and the device's generator continues bit for bit."""
    generator = torch.cuda if device == "cuda" else torch
    problem, optimiser, step = trainer(device, method)
    torch.manual_seed(1)
    for _ in range(3):
        step()
    state = {
        "rnn": problem.rnn.state_dict(),
        "readout": problem.readout.state_dict(),
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_rng_state(),
    }
    torch.save(state, tmp_path / "checkpoint.pt")
    expected = torch.stack([step() for _ in range(3)])
    problem, optimiser, step = trainer(device, method)
    torch.manual_seed(2)
    state = torch.load(tmp_path / "checkpoint.pt", map_location=device)
    problem.rnn.load_state_dict(state["rnn"])
    problem.readout.load_state_dict(state["readout"])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_rng_state(state["generator"].cpu())
    assert torch.equal(torch.stack([step() for _ in range(3)]), expected)


# Around training


@pytest.mark.parametrize("device", DEVICES)
def test_diagnose(device):
    """The same seeds give the CPU's table."""
    grid = {"methods": ("anp", "anp-ls", "np"), "rollouts": (4,), "discounts": (0.5, 1.0), "sigmas": (1e-3,)}
    grid |= {"repeats": 2, "progress": False}
    found = []
    for where in (device, "cpu"):
        how = perturbation_of("anp", precision="fp32", backend="auto" if where == device else "torch")
        problem = problem_of(how, CASES["two layers, both directions, padded"], where)
        found.append(anpgpu.diagnose(*problem[:4], lengths=LENGTHS, **grid))
    here, there = found
    assert here.unseen is None
    assert [row.perturbation.method for row in here.rows] == [row.perturbation.method for row in there.rows]
    for row, expected in zip(here.rows, there.rows, strict=True):
        assert row.error is None
        assert row.total.cosine == pytest.approx(expected.total.cosine, abs=TOLERANCES["deviation_float32"].bound)


@pytest.mark.parametrize("device", DEVICES)
def test_decorrelation(device):
    """The matrices, and the gradients through them, are the oracle's."""
    found = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        how = Perturbation("bptt")
        problem = problem_of(how, CASES["two layers, both directions, padded"], where, dtype)
        decorrelation = anpgpu.Decorrelation(problem.rnn, problem.readout, inputs=True, rate=0.02)
        for _ in range(3):
            decorrelation.update_(problem.inputs.detach(), problem.hx.detach(), lengths=LENGTHS)
        loss_through(problem).backward()
        matrices = {name: matrix.cpu() for name, matrix in decorrelation.matrices.items()}
        found.append({**matrices, **problem.grads()})
        assert all(matrix.device.type == where for matrix in decorrelation.matrices.values())
    found = errors(*found)
    assert max(found.values()) <= TOLERANCES["float32_long"].bound, found


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["anp", "anp-ls", "wp"])
def test_running_out_of_memory_goes_on_in_less(method):
    """An update that does not fit goes on, with a warning, and is that of a smaller max_memory."""
    time, batch, units, rollouts = 64, 32, 256, 512
    torch.manual_seed(3)
    rnn, readout = anpgpu.RNN(I, units, device="cuda"), nn.Linear(units, O, device="cuda")
    inputs, targets = torch.randn(time, batch, I, device="cuda"), torch.randn(time, batch, O, device="cuda")

    def update(max_memory):
        rnn.zero_grad()
        rnn.perturbation = Perturbation(method, rollouts=rollouts, precision="fp32", max_memory=max_memory)
        generator = torch.Generator("cuda").manual_seed(5)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, generator=generator)
        return rnn.weight_hh_l0.grad.clone()

    expected = update(192 << 20)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # delta_a alone is 1 GiB.
    allowed = (torch.cuda.memory_reserved() + (768 << 20)) / total
    torch.cuda.set_per_process_memory_fraction(allowed)
    try:
        with pytest.warns(RuntimeWarning, match="out of memory on cuda"):
            found = update(16 << 30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = update(16 << 30)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert_close(found, expected, "float32_long")
    assert_close(again, expected, "float32_long")
