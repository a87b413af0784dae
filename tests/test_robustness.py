"""Robustness of training: one draw per update, exact resume, rollouts that diverge, uninitialised memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.kernels import scratch

ROOT = Path(anpgpu.__file__).resolve().parent.parent
METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp")


def leaves_of(*modules):
    return [parameter for module in modules for parameter in module.parameters()]


def gradients(*modules):
    return [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves_of(*modules)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(left, right) for left, right in zip(first, second, strict=True)
    )


def one_draw(state, generator=None):
    """The generator's state after one 64-bit number."""
    generator = torch.default_generator if generator is None else generator
    generator.set_state(state)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_forward_pass_draws_one_number_and_backward_none(method, layers):
    rnn = anpgpu.RNN(3, 4, layers, perturbation=Perturbation(method, rollouts=4))
    state = torch.get_rng_state()
    outputs, _ = rnn(torch.ones(5, 2, 3))
    after = torch.get_rng_state()
    outputs.sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(one_draw(state), after)


def test_a_forward_pass_that_needs_no_gradient_draws_nothing():
    rnn = anpgpu.RNN(3, 4)
    state = torch.get_rng_state()
    with torch.no_grad():
        rnn(torch.ones(5, 2, 3))
    with torch.inference_mode():
        rnn(torch.ones(5, 2, 3))
    frozen = anpgpu.RNN(3, 4).requires_grad_(False)
    torch.set_rng_state(state)
    frozen(torch.ones(5, 2, 3))
    rnn.perturbation = Perturbation("bptt")
    rnn(torch.ones(5, 2, 3))[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("readout", ["exact", "perturbed"])
@pytest.mark.parametrize("method", METHODS)
def test_estimate_grad_draws_one_number(method, readout):
    rnn, head = nn.RNN(3, 4, 2), nn.Linear(4, 2)
    how = Perturbation(method, rollouts=4, readout=readout)
    state = torch.get_rng_state()
    anpgpu.estimate_grad_(rnn, head, torch.ones(5, 2, 3), torch.ones(5, 2, 2), perturbation=how)
    after = torch.get_rng_state()
    assert torch.equal(one_draw(state), after)


def test_a_generator_is_drawn_from_instead():
    rnn, head = nn.RNN(3, 4), nn.Linear(4, 2)
    inputs, targets = torch.randn(5, 2, 3), torch.randn(5, 2, 2)
    grads = []
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        before = generator.get_state()
        rnn.zero_grad()
        anpgpu.estimate_grad_(rnn, head, inputs, targets, generator=generator)
        after = generator.get_state()
        assert torch.equal(one_draw(before, generator), after)
        grads.append(gradients(rnn))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(grads[0], grads[1])
    assert not same(grads[0], grads[2])


RESUME = """
import sys, torch, anpgpu
from torch import nn

method, path, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = nn.ModuleDict({"rnn": anpgpu.RNN(3, 8, 2, dropout=0.2), "head": nn.Linear(8, 2)})
model["rnn"].perturbation = anpgpu.Perturbation(method, rollouts=4)
optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
if first:
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"])
for _ in range(first, last):
    optimiser.zero_grad()
    hidden, _ = model["rnn"](torch.randn(6, 4, 3))
    model["head"](hidden).square().mean().backward()
    optimiser.step()
torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}, path)
"""


@pytest.mark.parametrize("method", ["anp", "wp"])
def test_resumed_training_is_bitwise_the_same(tmp_path, method):
    def train(name, first, last):
        source = f"import sys; sys.path.append({str(ROOT)!r})\n{RESUME}"
        command = [sys.executable, "-c", source, method, str(tmp_path / name), str(first), str(last)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return torch.load(tmp_path / name)

    whole = train("whole", 0, 8)
    train("parts", 0, 4)
    parts = train("parts", 4, 8)
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert torch.equal(whole["rng"], parts["rng"])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_rollouts_whose_loss_is_not_finite_are_left_out_and_counted(method, wild, bidirectional):
    torch.manual_seed(0)
    rnn = nn.RNN(3, 4, bidirectional=bidirectional).double()
    inputs, targets = torch.randn(5, 2, 3).double(), torch.randn(5, 2, rnn.hidden_size * (1 + bidirectional)).double()
    how = Perturbation(method, rollouts=16, sigma=1e-3, warmup=0)
    clean = rnn(inputs)[0].detach()
    lost = []

    def loss(outputs, wanted):
        losses = (outputs - wanted).square().sum(-1)
        if outputs.shape[2] == 1:
            return losses
        bad = outputs[2, :, :, 0] > clean[2, : outputs.shape[1], None, 0] + 1e-4
        lost.append(int(bad.sum()))
        return torch.where(bad & (torch.arange(5) == 4).view(5, 1, 1), wild, losses)

    estimate = anpgpu.estimate_grad_(rnn, None, inputs, targets, loss, perturbation=how)
    assert 0 < sum(lost) < 2 * 16 * (1 + bidirectional)
    assert int(estimate.skipped) == sum(lost)
    assert all(bool(grad.isfinite().all()) for grad in gradients(rnn))


def test_the_mean_is_over_the_rollouts_that_are_left():
    # Half of the rollouts give NaN: the estimate is the mean over the others, not half of it. With one unit, one step
    # and Rademacher noise, every rollout with xi = -sigma gives (tanh(a) - tanh(a - sigma)) / sigma.
    rnn = nn.RNN(1, 1).double()
    nn.init.constant_(rnn.bias_ih_l0, 0.3)
    how = Perturbation("np", rollouts=64, sigma=0.1, discount=1.0)
    inputs = torch.zeros(1, 1, 1).double()
    clean = float(rnn(inputs)[0].detach())

    def loss(outputs, targets):
        return torch.where(outputs[..., 0] > clean + 1e-9, math.nan, outputs[..., 0])

    estimate = anpgpu.estimate_grad_(rnn, None, inputs, None, loss, perturbation=how)
    preact = math.atanh(clean)
    expected = (clean - math.tanh(preact - 0.1)) / 0.1
    assert 0 < int(estimate.skipped) < 64
    assert float(rnn.bias_ih_l0.grad) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["anp", "np"])
def test_an_exploding_rollout_is_left_out_in_backward(method):
    how = Perturbation(method, rollouts=6, sigma=1e-3, discount=1.0)
    rnn = anpgpu.RNN(1, 1, nonlinearity="relu", bias=False, perturbation=how)
    nn.init.constant_(rnn.weight_ih_l0, 1.0)
    nn.init.constant_(rnn.weight_hh_l0, 1e10)
    # No noise brings a unit above 0, but for the second sample at the first step: a rollout with positive noise there
    # grows by 1e10 a step until it overflows. Other rollouts, and the first sample, stay at 0.
    inputs = torch.full((8, 2, 1), -1.0)
    inputs[0, 1] = -1e-4
    torch.manual_seed(8)
    outputs, _ = rnn(inputs)
    assert bool((outputs == 0).all())
    outputs.sum().backward()
    assert 0 < int(rnn.last_estimate.skipped) < 6
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(rnn))


@pytest.mark.parametrize("method", METHODS)
def test_with_no_rollout_left_estimate_grad_raises_and_leaves_gradients_alone(method):
    torch.manual_seed(0)
    rnn, head = nn.RNN(3, 4), nn.Linear(4, 2)
    for leaf in leaves_of(rnn, head):
        leaf.grad = torch.full_like(leaf, 7.0)
    before = gradients(rnn, head)

    def loss(outputs, targets):
        return outputs.sum(-1) * (1.0 if outputs.shape[2] == 1 else math.nan)

    with pytest.raises(RuntimeError, match=r"every rollout of sample 0, 1 is not finite.*sigma=0\.001"):
        anpgpu.estimate_grad_(
            rnn, head, torch.randn(5, 2, 3), None, loss, perturbation=Perturbation(method, rollouts=4, sigma=1e-3)
        )
    assert same(gradients(rnn, head), before)
    nn.init.constant_(rnn.weight_hh_l0, math.nan)
    with pytest.raises(RuntimeError, match="every rollout of sample"):
        anpgpu.estimate_grad_(
            rnn, head, torch.randn(5, 2, 3), torch.randn(5, 2, 2), perturbation=Perturbation(method, rollouts=4)
        )
    assert same(gradients(rnn, head), before)


@pytest.mark.parametrize("method", METHODS)
def test_with_no_rollout_left_backward_raises(method):
    rnn = anpgpu.RNN(3, 4, perturbation=Perturbation(method, rollouts=4))
    inputs = torch.randn(5, 2, 3)
    inputs[2, 1] = math.nan
    outputs, _ = rnn(inputs)
    with pytest.raises(RuntimeError, match="every rollout of sample 1 is not finite"):
        torch.where(outputs.isnan(), 0, outputs).sum().backward()
    assert all(grad is None for grad in gradients(rnn))


@pytest.mark.parametrize("wild", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_non_finite_incoming_gradient_gives_non_finite_gradients(method, wild, layers):
    # As in torch; loss scaling finds its overflows in this way.
    rnn = anpgpu.RNN(3, 4, layers, perturbation=Perturbation(method, rollouts=4))
    outputs, _ = rnn(torch.randn(5, 2, 3))
    upstream = torch.ones_like(outputs)
    upstream[3, 1, 2] = wild
    outputs.backward(upstream)
    assert all(not bool(grad.isfinite().all()) for grad in gradients(rnn))


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new uninitialised tensors with NaN, or the largest integer."""

    def poison(function):
        def poisoned(*args, **options):
            tensor = function(*args, **options)
            if tensor.is_floating_point():
                return tensor.detach().fill_(math.nan).requires_grad_(tensor.requires_grad)
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype == torch.int64 else tensor

        return poisoned

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))

    def give_back(delta_a):
        # All bits set is NaN, for a kernel that reads memory after it was freed or before it is written.
        if delta_a is not None:
            delta_a.untyped_storage().fill_(255)
        scratch.give_back(delta_a)

    monkeypatch.setattr("anpgpu.estimators.sweep.give_back", give_back)


def everything(method):
    """Return gradients and estimates of small calls that take every path of a method."""
    torch.manual_seed(0)
    tensors = []
    rnn = anpgpu.RNN(3, 4, 2, bidirectional=True, perturbation=Perturbation(method, rollouts=5))
    outputs, h_n = rnn(nn.utils.rnn.pack_sequence([torch.ones(5, 3), torch.ones(2, 3)]))
    (outputs.data.sum() + h_n.sum()).backward()
    tensors += gradients(rnn)
    for directions, loss in ((1, "mse"), (2, "mse"), (1, absolute), (2, absolute)):
        rnn, head = nn.RNN(3, 4, 2, bidirectional=directions == 2), nn.Linear(4 * directions, 2)
        for max_memory in (None, 20_000_000):
            how = Perturbation(method, rollouts=5, max_memory=max_memory)
            seen = anpgpu.estimate_grad_(
                rnn, head, torch.ones(5, 2, 3), torch.zeros(5, 2, 2), loss, perturbation=how, lengths=[5, 3]
            )
            tensors += [*gradients(rnn, head), seen.loss, seen.outputs, seen.h_n]
    return tensors


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


@pytest.mark.parametrize("method", METHODS)
def test_no_uninitialised_memory_is_read(request, method):
    expected = everything(method)
    request.getfixturevalue("poisoned")
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.zeros(2).new_empty(3).isnan().all())
    assert same(everything(method), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_ops_read_no_uninitialised_memory(kind):
    states = torch.linspace(-1, 1, 3 * 2 * 5).view(3, 2, 5)
    run = anpgpu.functional.rollout(
        states, states.tanh(), torch.eye(5), anpgpu.functional.LinearLoss(states), 3, rollouts=7, noise=kind
    )
    credit = anpgpu.functional.returns(run.delta_loss, 0.9)
    adjoint = anpgpu.functional.adjoint(credit, run.delta_a, 3, noise=kind)
    assert all(bool(tensor.isfinite().all()) for tensor in (run.delta_loss, run.delta_a, run.delta_h, credit, adjoint))


def test_padding_may_hold_anything():
    torch.manual_seed(0)
    rnn, head = nn.RNN(3, 4, 2), nn.Linear(4, 2)
    inputs, targets = torch.randn(5, 2, 3), torch.randn(5, 2, 2)
    results = []
    for filler in (0.0, math.nan, 1e30):
        inputs[3:, 1], targets[3:, 1] = filler, filler
        rnn.zero_grad()
        head.zero_grad()
        generator = torch.Generator().manual_seed(1)
        seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, lengths=[5, 3], generator=generator)
        results.append([*gradients(rnn, head), seen.loss, seen.outputs, seen.h_n])
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert_close(results[0][-2][3:, 1], torch.zeros(2, 2), "exact")


def test_activity_of_another_type_is_refused_but_under_autocast():
    head = anpgpu.decorrelation.Decorrelate(3)
    with pytest.raises(RuntimeError, match=r"activity must be torch.float32, as D is, got torch.float64"):
        head(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"activity must be torch.float32, as D is, got torch.float64"):
        head(torch.zeros(2, 3, dtype=torch.float64, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
