"""Estimates of GRU and LSTM against autograd through torch's modules, in float64."""

import contextlib
import dataclasses

import pytest
import torch
from test_division import DIVISIONS, B as SAMPLES, force
from test_estimators import assert_unbiased, flat
from tolerances import TOLERANCES, assert_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.runtime.processes import Share

T, B, I, H, O = 12, SAMPLES, 3, 6, 3  # noqa: E741  (the design's names)
EXACT = Perturbation("anp-ls", rollouts=2 * H, sigma=1e-5, ridge=1e-5)
MODULES = {"gru": (anpgpu.GRU, nn.GRU), "lstm": (anpgpu.LSTM, nn.LSTM)}
NETWORKS = {
    "one layer": {},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
}
LENGTHS = (7, 12, 4)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def build(cell, how=None, *, hold=0.0, units=H, features=I, **options):
    """Ours and torch's module with the same parameters; `hold` is added to the biases of the forget (update) gates."""
    ours, torchs = MODULES[cell]
    torch.manual_seed(3)
    module = ours(features, units, dtype=torch.float64, perturbation=how, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias_ih"):
                parameter[units : 2 * units] += hold
    twin = torchs(features, units, dtype=torch.float64, **options)
    twin.load_state_dict(module.state_dict(), strict=True)
    return module, twin


def states_of(module, batch=B, scale=0.5):
    """First states that require a gradient, as a tuple."""
    count = 2 if isinstance(module, nn.LSTM) else 1
    shape = (len(module.all_weights), batch, module.hidden_size)
    return tuple(draw(*shape, seed=seed).mul_(scale).requires_grad_() for seed in range(1, 1 + count))


def as_hx(states):
    return states if len(states) > 1 else states[0]


def as_states(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def loss_of(outputs, final, last_only=False):
    """A loss that reads the outputs, or the last of them, and every final state."""
    weight = draw(*outputs.shape, seed=3)
    if last_only:
        weight[:-1] = 0
    ends = sum((3 * state * draw(*state.shape, seed=4 + n)).sum() for n, state in enumerate(final))
    return (outputs * weight).sum() + ends


def backward_through(module, inputs, states, *, lengths=None, last_only=False):
    """Gradients of every parameter, the inputs and the first states, by name."""
    sequences = inputs if lengths is None else pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    outputs, final = module(sequences, as_hx(states))
    loss = loss_of(outputs if lengths is None else outputs.data, as_states(final), last_only)
    names, parameters = zip(*module.named_parameters(), strict=True)
    names = [*names, "inputs", "h_0", "c_0"][: len(names) + 1 + len(states)]
    return dict(zip(names, torch.autograd.grad(loss, [*parameters, inputs, *states]), strict=True))


def cosines(found, truth):
    assert found.keys() == truth.keys()
    return {
        name: float(nn.functional.cosine_similarity(found[name].flatten(), truth[name].flatten(), 0)) for name in truth
    }


def assert_aligned(found, truth, least):
    by_name = cosines(found, truth)
    assert min(by_name.values()) > least, by_name
    for name, gradient in truth.items():
        assert 0.99 < float(found[name].norm() / gradient.norm()) < 1.01, name


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "packed"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cell", MODULES)
def test_anp_ls_with_enough_rollouts_is_bptt(cell, network, lengths):
    module, twin = build(cell, EXACT, **NETWORKS[network])
    inputs, states = draw(T, B, I).requires_grad_(), states_of(module)
    torch.manual_seed(5)
    found = backward_through(module, inputs, states, lengths=lengths)
    assert_aligned(found, backward_through(twin, inputs, states, lengths=lengths), 0.9999)


LEARNING = dataclasses.replace(EXACT, method="anp-feedback", warmup=0)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "packed"])
@pytest.mark.parametrize("network", ["one layer", "two layers, bidirectional"])
@pytest.mark.parametrize("cell", MODULES)
def test_learned_feedback_with_enough_rollouts_is_bptt_from_the_first_update_on(cell, network, lengths):
    module, twin = build(cell, LEARNING, **NETWORKS[network])
    inputs, states = draw(T, B, I).requires_grad_(), states_of(module)
    truth = backward_through(twin, inputs, states, lengths=lengths)
    for seed in (5, 6):
        torch.manual_seed(seed)
        assert_aligned(backward_through(module, inputs, states, lengths=lengths), truth, 0.9999)
    assert all(float(layer.feedback.norm()) > 0 for layer in vars(module)["_estimator_state"].layers)


class Discounted(torch.autograd.Function):
    """Multiplies the gradient that goes back by the discount."""

    @staticmethod
    def forward(ctx, values, discount):
        ctx.discount = discount
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.discount * grad, None


def discounted(cell, twin, inputs, states, discount):
    """BPTT's gradients where what a step hands to the one before is multiplied by the discount."""
    single = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[cell](I, twin.hidden_size, dtype=torch.float64)
    for name, parameter in twin.named_parameters():
        setattr(single, name.removesuffix("_l0"), parameter)
    hx, outputs = as_hx(tuple(state[0] for state in states)), []
    for step, x in enumerate(inputs):
        if step:
            hx = as_hx(tuple(Discounted.apply(state, discount) for state in as_states(hx)))
        hx = single(x, hx)
        outputs.append(as_states(hx)[0])
    loss = loss_of(torch.stack(outputs), [state.unsqueeze(0) for state in as_states(hx)], last_only=True)
    names, parameters = zip(*twin.named_parameters(), strict=True)
    names = [*names, "inputs", "h_0", "c_0"][: len(names) + 1 + len(states)]
    return dict(zip(names, torch.autograd.grad(loss, [*parameters, inputs, *states]), strict=True))


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("cell", MODULES)
def test_gates_that_hold_and_a_loss_at_the_end(cell, discount):
    assert_gates_hold(cell, discount, EXACT)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("cell", MODULES)
def test_gates_that_hold_and_a_loss_at_the_end_with_learned_feedback(cell, discount):
    assert_gates_hold(cell, discount, LEARNING)


def assert_gates_hold(cell, discount, how):
    # With the path through c left in the returns the cosine is .46 to .63, however many rollouts there are.
    units = 24
    how = dataclasses.replace(how, rollouts=2 * units, discount=discount)
    module, twin = build(cell, how, hold=3.0, units=units)
    inputs, states = draw(40, B, I).requires_grad_(), states_of(module)
    torch.manual_seed(5)
    found = backward_through(module, inputs, states, last_only=True)
    truth = discounted(cell, twin, inputs, states, discount)
    if discount == 1:
        plain = backward_through(twin, inputs, states, last_only=True)
        assert all(torch.allclose(plain[name], truth[name], atol=1e-9) for name in truth)
    assert_aligned(found, truth, 0.999)


def measured(module, head, inputs, targets, loss, states, how, **options):
    """Gradients of `estimate_grad_` by name, with those of the readout."""
    leaves = {
        **dict(module.named_parameters()),
        **{f"head.{name}": parameter for name, parameter in head.named_parameters()},
        "inputs": inputs,
        **dict(zip(("h_0", "c_0"), states, strict=False)),
    }
    for leaf in leaves.values():
        leaf.grad = None
    report = anpgpu.estimate_grad_(
        module, head, inputs, targets, loss, hx=as_hx(states), perturbation=how,
        generator=torch.Generator().manual_seed(5), **options,
    )  # fmt: skip
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}, report


def squares(outputs, targets):
    return (outputs - targets).square().sum(-1)


def squares_of_sequences(outputs, targets, lengths):
    steps = torch.arange(len(outputs)).view(-1, 1, 1) < lengths.view(1, -1, 1)
    return ((outputs - targets).square().mean(-1) * steps).sum(0)


LOSSES = {"mse": "mse", "cross_entropy": "cross_entropy", "per step": squares, "per sequence": squares_of_sequences}


def targets_of(loss):
    if loss == "cross_entropy":
        return torch.randint(O, (T, B), generator=torch.Generator().manual_seed(1))
    return draw(T, B, O, seed=9)


def with_head(cell, how=None, **options):
    module, twin = build(cell, how, **options)
    torch.manual_seed(4)
    return module, twin, nn.Linear(H * (2 if module.bidirectional else 1), O, dtype=torch.float64)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "without bias"])
@pytest.mark.parametrize("cell", MODULES)
def test_measured_losses_with_enough_rollouts_are_bptt(cell, network, loss, lengths):
    # A value of a whole sequence needs T O rollouts.
    rollouts = 4 * T * O if loss == "per sequence" else 2 * H
    how = Perturbation("anp-ls", rollouts=rollouts, sigma=1e-5, ridge=1e-6)
    module, twin, head = with_head(cell, how, **NETWORKS[network])
    inputs, states, targets = draw(T, B, I).requires_grad_(), states_of(module), targets_of(loss)
    truth, exact = measured(twin, head, inputs, targets, LOSSES[loss], states, Perturbation("bptt"), lengths=lengths)
    found, report = measured(module, head, inputs, targets, LOSSES[loss], states, how, lengths=lengths)
    kept = {name for name in truth if not (name.startswith("head") and loss.startswith("per"))}
    assert_aligned({name: found[name] for name in kept}, {name: truth[name] for name in kept}, 0.9999)
    assert_close(report.loss, exact.loss, "float64")
    assert_close(report.outputs, exact.outputs, "float64")
    for ours, torchs in zip(as_states(report.h_n), as_states(exact.h_n), strict=True):
        assert_close(ours, torchs, "float64")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cell", MODULES)
def test_np_is_unbiased(cell, network):
    module, twin = build(cell, Perturbation("np", rollouts=32, sigma=1e-4), **NETWORKS[network])
    inputs, states = draw(6, B, I).requires_grad_(), states_of(module)
    truth = backward_through(twin, inputs, states)
    torch.manual_seed(21)
    runs = [backward_through(module, inputs, states) for _ in range(100)]
    # Each parameter by itself, at the bound of one statistic: a combination of its elements drawn at random.
    for name, gradient in truth.items():
        direction = draw(gradient.numel(), seed=len(name))
        values = torch.stack([run[name].flatten() @ direction for run in runs])
        z = (values.mean() - gradient.flatten() @ direction) / (values.std() / len(runs) ** 0.5)
        assert abs(float(z)) < TOLERANCES["z"].bound, name
    assert_unbiased([flat(run.values()) for run in runs], flat(truth.values()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cell", MODULES)
def test_np_of_measured_losses_is_unbiased(cell, loss):
    how = Perturbation("np", rollouts=32, sigma=1e-4)
    module, twin, head = with_head(cell, how)
    inputs, states, targets = draw(T, B, I).requires_grad_(), states_of(module), targets_of(loss)
    truth, _ = measured(twin, head, inputs, targets, LOSSES[loss], states, Perturbation("bptt"))
    torch.manual_seed(33)
    runs = []
    for _ in range(60):
        leaves = [*module.parameters(), *head.parameters(), inputs, *states]
        for leaf in leaves:
            leaf.grad = None
        anpgpu.estimate_grad_(module, head, inputs, targets, LOSSES[loss], hx=as_hx(states))
        runs.append(flat([leaf.grad for leaf in leaves]))
    assert_unbiased(runs, flat(truth.values()))


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("cell", MODULES)
def test_wp_is_unbiased(cell, network, rank):
    module, twin = build(cell, Perturbation("wp", rollouts=32, sigma=1e-4, rank=rank), **NETWORKS[network])
    inputs, states = draw(4, B, I), tuple(state.detach() for state in states_of(module))

    def gradients(of):
        outputs, final = of(inputs, as_hx(states))
        return flat(torch.autograd.grad(loss_of(outputs, as_states(final)), list(of.parameters())))

    torch.manual_seed(22)
    assert_unbiased([gradients(module) for _ in range(60)], gradients(twin))


@pytest.mark.parametrize("cell", MODULES)
def test_bptt_is_torchs(cell):
    module, twin = build(cell, Perturbation("bptt"), num_layers=2, bidirectional=True)
    inputs, states = draw(T, B, I).requires_grad_(), states_of(module)
    for lengths in (None, LENGTHS):
        found = backward_through(module, inputs, states, lengths=lengths)
        assert_close(
            flat(found.values()), flat(backward_through(twin, inputs, states, lengths=lengths).values()), "float64"
        )


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("network", ["one layer", "two layers, bidirectional"])
@pytest.mark.parametrize("method", ["np", "anp", "anp-ls", "anp-feedback", "wp"])
def test_the_result_does_not_depend_on_division(monkeypatch, method, network, cell):
    how = Perturbation(method, rollouts=5, sigma=1e-3, discount=0.9, warmup=2)

    def results():
        values = []
        for loss in ("mse", "per step", None):
            module, _, head = with_head(cell, how, **NETWORKS[network])
            states, inputs = states_of(module), draw(7, B, I).requires_grad_()
            if method == "wp":
                states, inputs = tuple(state.detach() for state in states), inputs.detach()
            torch.manual_seed(8)
            if loss is None:
                outputs, final = module(inputs, as_hx(states))
                loss_of(outputs, as_states(final)).backward()
            else:
                anpgpu.estimate_grad_(
                    module, head, inputs, draw(7, B, O, seed=9), LOSSES[loss], hx=as_hx(states), lengths=[5, 7, 1]
                )
            leaves = [*module.parameters(), *head.parameters(), inputs, *states]
            values += [leaf.grad for leaf in leaves if leaf.grad is not None]
        return flat(values)

    whole = results()
    for division in DIVISIONS:
        if division.rollouts == 5 or method not in {"anp-ls", "anp-feedback"}:
            force(monkeypatch, division)
            assert_close(results(), whole, "float64")


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("method", ["np", "anp-ls"])
def test_max_memory_divides(cell, method):
    values = []
    for limit in (None, 18 << 20):
        how = Perturbation(method, rollouts=500, sigma=1e-3, max_memory=limit)
        module, _, head = with_head(cell, how)
        found, _ = measured(
            module, head, draw(T, B, I).requires_grad_(), targets_of("mse"), "mse", states_of(module), how
        )
        values.append(flat(found.values()))
    assert_close(*values, "float64")


def test_processes_that_share_rollouts_count_the_gradient_of_c_n_once(monkeypatch):
    # Each process in turn, with sums that do nothing; then their parts are added here.
    module, _ = build("lstm", Perturbation("np", rollouts=8, shard_rollouts=True))
    inputs, states = draw(T, B, I).requires_grad_(), states_of(module)

    def gradients(share):
        monkeypatch.setattr("anpgpu.runtime.settings.share_of", lambda *_, **__: share)
        torch.manual_seed(5)
        return flat(backward_through(module, inputs, states).values())

    whole = gradients(Share(8))
    monkeypatch.setattr("anpgpu.ops.network.shared_update", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Share, "agree", lambda self, seed, limit, *_: (seed, limit))
    monkeypatch.setattr(Share, "sum_", lambda self, *_: None)
    monkeypatch.setattr(Share, "counted", lambda self, finite: torch.full((len(finite),), 8))
    assert_close(sum(gradients(Share(8, index, 2)) for index in range(2)), whole, "float64")


ROW = {
    "gru": {8: 0.313, 16: 0.414, 32: 0.633, 64: 0.963, 96: 0.999, 128: 1.0},
    "lstm": {8: 0.366, 16: 0.489, 32: 0.716, 64: 0.974, 96: 0.999, 128: 1.0},
}
"""Cosine of all weights' gradients by number of rollouts: H = 64, T = 50, torch's start, ridge .01, as a prototype of
this method measured it for a loss that is linear in every h_t."""


@pytest.mark.parametrize("cell", MODULES)
def test_rollouts_for_h_numbers_serve_all_gates(cell):
    found, inputs, weight = {}, 2 * draw(50, 8, 8), draw(50, 8, 64, seed=3)
    for rollouts in ROW[cell]:
        module, twin = build(cell, Perturbation("anp-ls", rollouts=rollouts, sigma=1e-5), units=64, features=8)
        torch.manual_seed(5)

        def gradient(of):
            return flat(torch.autograd.grad((of(inputs)[0] * weight).sum(), list(of.parameters())))

        truth = gradient(twin)
        # With few rollouts a draw differs from the next by as much as the bound.
        draws = [
            nn.functional.cosine_similarity(gradient(module), truth, dim=0) for _ in range(8 if rollouts < 64 else 1)
        ]
        found[rollouts] = float(torch.stack(draws).mean())
    assert all(abs(found[rollouts] - expected) < 0.05 for rollouts, expected in ROW[cell].items()), found
