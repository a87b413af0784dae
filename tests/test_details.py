"""Details that an estimate can get wrong without a bias that any other test would see."""

import math

import pytest
import torch
from oracles import noise_block
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.estimators import readout
from anpgpu.estimators.found import Found, GradientSums, NonFiniteRolloutsError, split_half
from anpgpu.kernels.least_squares import least_squares
from anpgpu.kernels.noise import Counters, noise
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.network.cells import GateAdjoints, LayerRun
from anpgpu.network.stack import Network, run_network
from anpgpu.network.weights import LayerWeights
from anpgpu.registry import CELLS
from anpgpu.runtime.memory import FIXED_BYTES, Division
from anpgpu.runtime.settings import resolve
from anpgpu.task.problem import canonical

T, B, I, H, O = 6, 4, 2, 5, 3  # noqa: E741  (the design's names)
BOTH = {"num_layers": 2, "bidirectional": True}


def build(how, *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    rnn = anpgpu.RNN(I, H, dtype=dtype, perturbation=how, **options)
    return rnn, nn.Linear(H * (1 + rnn.bidirectional), O, dtype=dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(T, B, size, generator=generator).to(dtype) for size in (I, O))


def estimated(rnn, head, *arguments, seed=3, **named):
    """The gradients of one update, (rnn's, head's), as vectors."""
    for module in (rnn, head):
        module.zero_grad()
    anpgpu.estimate_grad_(rnn, head, *arguments, generator=torch.Generator().manual_seed(seed), **named)
    return tuple(torch.cat([leaf.grad.flatten() for leaf in module.parameters()]) for module in (rnn, head))


class Watched:
    """Notes the counters and options of every rollout of a sweep."""

    def __init__(self, monkeypatch):
        self.counters, self.options = [], []
        self.implementation = anpgpu.estimators.sweep.implementation
        monkeypatch.setattr("anpgpu.estimators.sweep.implementation", self.watched)

    def watched(self, op, backend):
        function = self.implementation(op, backend)

        def run(*arguments, counters, options, **named):
            self.counters.append(counters)
            self.options.append(options)
            return function(*arguments, counters=counters, options=options, **named)

        return run


@pytest.mark.parametrize("face", ["backward", "estimate_grad_"])
def test_every_layer_and_direction_has_noise_of_its_own(monkeypatch, face):
    rnn, head = build(Perturbation("np", rollouts=4), **BOTH)
    inputs, targets = data()
    watched = Watched(monkeypatch)
    if face == "backward":
        rnn(inputs)[0].sum().backward()
    else:
        estimated(rnn, head, inputs, targets)
    assert sorted({counters.layer for counters in watched.counters}) == [0, 1, 2, 3]


def test_processes_perturb_the_readout_with_different_noise(monkeypatch):
    how = Perturbation("np", rollouts=4, readout="perturbed")
    gradients = []
    for rank in (0, 1):
        monkeypatch.setattr("anpgpu.runtime.settings.process_rank", lambda rank=rank: rank)
        rnn, head = build(how)
        gradients.append(estimated(rnn, head, *data())[1])
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("rank", [None, 1])
def test_weight_noise_of_chunks_of_samples_is_that_of_the_whole(monkeypatch, rank):
    rnn, head = build(Perturbation("wp", rollouts=4, rank=rank))
    whole, _ = estimated(rnn, head, *data())
    monkeypatch.setattr("anpgpu.estimators.weights._WeightShape.divide", lambda *_: (1, 2))
    assert_close(estimated(rnn, head, *data())[0], whole, "float64")


@pytest.mark.parametrize("method", ["np", "anp"])
def test_a_sequences_value_is_credited_at_its_last_valid_step(method):
    def last(outputs, targets):
        return outputs.square().sum((0, 3))

    rnn, head = build(Perturbation(method, rollouts=8, sigma=1e-4, discount=0.5))
    inputs, _ = data()
    lengths = [6, 2, 4, 6]
    short, _ = estimated(rnn, head, inputs, None, last, lengths=lengths)
    padded = torch.cat((inputs, torch.zeros(5, B, I, dtype=torch.float64)))
    assert_close(estimated(rnn, head, padded, None, last, lengths=lengths)[0], short, "float64")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_is_in_the_gradient_that_the_layer_below_answers_to(bidirectional):
    options = {"num_layers": 3, "dropout": 0.5, "bidirectional": bidirectional}
    exact = Perturbation("anp-ls", rollouts=8 * H, sigma=1e-7, noise="gaussian", ridge=1e-10)
    gradients = []
    for how in (exact, Perturbation("bptt")):
        rnn, head = build(how, **options)
        torch.manual_seed(7)
        gradients.append(estimated(rnn, head, *data())[0])
    assert_close(*gradients, "least_squares")


@pytest.mark.parametrize("division", [Division(B, 4, 1), Division(2, 4, 3)], ids=str)
def test_a_gradient_that_is_not_finite_comes_back_however_time_is_cut(monkeypatch, division):
    monkeypatch.setattr("anpgpu.runtime.memory.divide", lambda *_: division)
    rnn, _ = build(Perturbation("np", rollouts=4))
    outputs, _ = rnn(data()[0])
    gradient = torch.ones_like(outputs)
    gradient[2, 1, 0] = math.inf
    refused = None
    try:
        outputs.backward(gradient)
    except NonFiniteRolloutsError as error:
        refused = error
    assert refused is None, "the gradient was taken for rollouts that are not finite"
    assert not bool(rnn.weight_hh_l0.grad.isfinite().all())


def regression(delta_a, finite=None, *, baseline=False, ridge=0.0):
    """One step's regression; the return of rollout p is p."""
    batch, rollouts = delta_a.shape[1:3]
    delta_loss = torch.arange(rollouts, dtype=delta_a.dtype).expand(1, batch, rollouts).contiguous()
    return least_squares(
        delta_loss,
        delta_a,
        torch.zeros(batch, rollouts, dtype=delta_a.dtype),
        torch.tensor(3),
        finite=torch.ones(batch, rollouts, dtype=torch.bool) if finite is None else finite,
        discount=1.0,
        ridge=ridge,
        baseline=baseline,
        options=RolloutOptions(rollouts, 1.0),
        counters=Counters(),
        draw=noise,
        recursion=None,
    )


def test_two_equal_rollouts_are_no_singular_system():
    result = regression(torch.ones(1, 1, 2, 4))
    assert int(result.ridge_grown) == 0
    # Both say: the mean return, 1/2, along (1, 1, 1, 1) / 4.
    assert_close(result.adjoint.sum(0), torch.full((1, 1, 4), 0.125), "unridged")


def test_a_lost_rollout_is_not_in_the_mean_that_is_taken_off():
    torch.manual_seed(2)
    delta_a = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    finite = torch.tensor([[True, True, True, False]])
    lost = regression(torch.where(finite[..., None], delta_a, torch.nan), finite, baseline=True, ridge=1e-3)
    # By hand: returns 0, 1, 2 less their mean, and the ridge relative to the mean of three.
    rows = delta_a[0, 0, :3]
    gram = rows @ rows.T
    target = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    expected = rows.T @ torch.linalg.solve(gram + 1e-3 * gram.trace() / 3 * torch.eye(3, dtype=torch.float64), target)
    assert_close(lost.adjoint.sum(0)[0, 0], expected, "float64")


def sums_of(*parts):
    weights = LayerWeights(torch.zeros(1, 1), torch.zeros(1, 1), None, None)
    sums = GradientSums(weights)
    for half, value in enumerate(parts):
        sums.weight_hh[half] = value
    return sums


def test_the_agreement_of_halves_is_over_all_layers():
    # (3, 4) and (3, -4): -7 / 25; the first layer alone would say 1.
    layers = [sums_of(3.0, 3.0), sums_of(4.0, -4.0)]
    assert float(split_half(layers)) == pytest.approx(-7 / 25)
    weights = LayerWeights(torch.zeros(1, 1), torch.zeros(1, 1), None, None)
    found = Found(Network(((weights,), (weights,)), CELLS["tanh"]), torch.zeros(1, 1, 1), torch.zeros(2, 1, 1))
    found.layers = layers
    assert float(found.split_half) == pytest.approx(-7 / 25)


@pytest.mark.parametrize("scale", [1e25, 1e-30])
def test_the_agreement_of_halves_does_not_depend_on_the_size_of_the_gradients(scale):
    # The squares are out of float32's range.
    layers = [sums_of(3 * scale, 3 * scale), sums_of(4 * scale, -4 * scale)]
    assert float(split_half(layers)) == pytest.approx(-7 / 25)
    assert split_half(layers).dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("resolves", ["forward", "backward"])
def test_the_forward_passs_autocast_decides_the_precision_of_the_rollouts(monkeypatch, resolves, backend):
    if resolves == "backward":
        # As under torch.compile: what the forward pass resolved is not handed over.
        run = anpgpu.modules.run_perturbed
        monkeypatch.setattr(anpgpu.modules, "run_perturbed", lambda *arguments: run(*arguments[:-1]))
    rnn, _ = build(Perturbation("np", rollouts=4, backend=backend), dtype=torch.float32)
    watched = Watched(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = rnn(data(torch.float32)[0])
    outputs.float().sum().backward()
    assert {options.precision for options in watched.options} == {"bf16"}
    watched.options.clear()
    outputs, _ = rnn(data(torch.float32)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs.sum().backward()
    assert {options.precision for options in watched.options} == {"fp32"}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("division", [None, Division(1, 32, 1), Division(2, 8, 2)])
def test_lost_rollouts_of_every_layer_and_sample_are_counted(division, bidirectional, monkeypatch):
    """Units that rest at zero, and explode three steps after the first noise that raises them."""
    if division is not None:
        monkeypatch.setattr("anpgpu.runtime.memory.divide", lambda *_: division)
    time, batch, rollouts = 4, 3, 32
    how = Perturbation("np", rollouts=rollouts, sigma=1e-3, backend="torch")
    rnn = anpgpu.RNN(1, 1, 2, "relu", bias=False, bidirectional=bidirectional, perturbation=how)
    for name, weight in rnn.named_parameters():
        nn.init.constant_(weight, 1e38 if "weight_hh" in name else 1.0)
    inputs, targets = torch.zeros(time, batch, 1), torch.zeros(time, batch, 1 + bidirectional)
    generator = torch.Generator().manual_seed(3)
    seen = anpgpu.estimate_grad_(rnn, None, inputs, targets, generator=generator)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator.manual_seed(3))
    lost = 0
    for layer in range(2 * (1 + bidirectional)):
        noise = 1e-3 * noise_block(int(seed) & (2**64 - 1), (time, batch, rollouts, 1), "rademacher", layer=layer)
        state, change = torch.zeros(batch, rollouts, 1), torch.zeros(batch, rollouts, 1)
        for step in noise.float():
            state = (step + 1e38 * state).clamp(min=0)
            change += state**2
        # Only the last layer's loss is the squared error.
        gone = ~(state if layer <= bidirectional else change).isfinite()
        assert 0 < int(gone.sum()) < batch * rollouts
        lost += int(gone.sum())
    assert int(seen.skipped) == lost


def test_each_bias_has_the_gradient_of_its_own_product():
    """Of a cell whose two products have different adjoints, over two segments."""
    rows = 3 * H
    weights = LayerWeights(*(torch.zeros(shape).double() for shape in ((rows, I), (rows, H), (rows,), (rows,))))
    sums = GradientSums(weights, 2)
    expected = [torch.zeros_like(weight) for weight in weights]
    torch.manual_seed(0)
    for _ in range(2):
        gates = GateAdjoints(torch.randn(2, T, B, rows).double(), torch.randn(2, T, B, rows).double())
        run = LayerRun(torch.randn(T, B, I).double(), torch.randn(T + 1, B, H).double())
        sums.add(gates, run)
        for part in range(2):
            for t in range(T):
                for b in range(B):
                    inward, recurrent = gates.inputs[part, t, b], gates.recurrent[part, t, b]
                    expected[0] += torch.outer(inward, run.inputs[t, b])
                    expected[1] += torch.outer(recurrent, run.states[t, b])
                    expected[2] += inward
                    expected[3] += recurrent
    for total, loops in zip(sums.totals(biases=True), expected, strict=True):
        assert_close(total, loops, "float64")


def test_every_block_of_a_perturbed_readouts_rollouts_has_noise_of_its_own():
    how = Perturbation("np", rollouts=5, sigma=1e-2)
    rnn, head = build(how)
    problem = canonical(rnn, head, *data(), "mse", None, None)
    outputs = problem.read(run_network(problem.network, problem.inputs, problem.h_0).outputs)
    settings, everyone = resolve(how, CELLS["tanh"], head.weight), slice(0, B)
    whole, one_by_one = (
        readout.perturb_readout(problem, outputs, settings, torch.tensor(3), everyone, limit)
        for limit in (1 << 40, FIXED_BYTES + 1)
    )
    assert_close(one_by_one, whole, "float64")


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32"), (torch.float64, "fp64")],
)
def test_on_a_cpu_operands_have_the_type_of_the_parameters(dtype, precision):
    settings = resolve(Perturbation(), CELLS["tanh"], torch.zeros(2, 2, dtype=dtype))
    assert settings.options.precision == precision
