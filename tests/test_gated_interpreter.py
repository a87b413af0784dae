"""GRU and LSTM on the Triton kernels, in the interpreter: the same gradients as on the reference, and as BPTT's."""

import pytest
import torch
from test_division import Division, force
from test_gated import as_hx, as_states, cosines
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.kernels.tiles import INTERPRETED

pytestmark = pytest.mark.interpreter

MODULES = {"gru": (anpgpu.GRU, nn.GRU), "lstm": (anpgpu.LSTM, nn.LSTM)}
B, I, H, O = 3, 3, 9, 4  # noqa: E741  (the design's names)


def test_this_leg_interprets():
    assert INTERPRETED


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def build(kind, time, hold=0.0, **options):
    """A module, a readout, inputs and first states, all float32, that require gradients."""
    torch.manual_seed(3)
    module = kind(I, H, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias_ih"):
                parameter[H : 2 * H] += hold
    readout = nn.Linear(H * (1 + module.bidirectional), O)
    count = 2 if isinstance(module, nn.LSTM) else 1
    states = [0.5 * draw(len(module.all_weights), B, H, seed=seed) for seed in range(count)]
    return module, readout, draw(time, B, I).requires_grad_(), [state.requires_grad_() for state in states]


def gradients(module, readout, inputs, states, lengths, loss=None, last_only=False):
    """Gradients of all that requires one, by name, through `loss.backward()` or, with a loss, `estimate_grad_`."""
    leaves = {**dict(module.named_parameters()), "inputs": inputs, **dict(zip(("h_0", "c_0"), states, strict=False))}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(7)
    if loss is not None:
        targets = torch.randint(O, (len(inputs), B)) if loss == "cross_entropy" else torch.randn(len(inputs), B, O)
        anpgpu.estimate_grad_(module, readout, inputs, targets, loss, hx=as_hx(states), lengths=lengths)
    else:
        sequences = inputs if lengths is None else pack_padded_sequence(inputs, lengths, enforce_sorted=False)
        outputs, final = module(sequences, as_hx(states))
        values = readout(outputs if lengths is None else outputs.data)
        weight = draw(*values.shape)
        if last_only:
            weight[:-1] = 0
        ends = sum((state * draw(*state.shape, seed=5)).sum() for state in as_states(final))
        ((values * weight).sum() + ends).backward()
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        size = float(reference.abs().max())
        torch.testing.assert_close(found[name], reference, rtol=1e-4, atol=2e-5 * size, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("loss", [None, "cross_entropy"])
@pytest.mark.parametrize(
    ("method", "discount"), [("np", 1.0), ("np", 0.0), ("anp", 0.9), ("anp", 0.0), ("anp-ls", 0.9)]
)
@pytest.mark.parametrize("cell", MODULES)
def test_gradients_are_those_of_the_reference(cell, method, discount, loss):
    results = []
    for backend in ("torch", "triton"):
        module, *rest = build(MODULES[cell][0], 4)
        module.perturbation = Perturbation(method, rollouts=5, discount=discount, backend=backend)
        results.append(gradients(module, *rest, [4, 2, 3], loss))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("cell", MODULES)
def test_two_layers_both_directions_and_segments(cell, monkeypatch):
    for segments, both in ((1, True), (2, False)):
        force(monkeypatch, Division(2, 5, segments))
        results = []
        for backend in ("torch", "triton"):
            module, *rest = build(MODULES[cell][0], 6, num_layers=2, bidirectional=both)
            module.perturbation = Perturbation("anp-ls", rollouts=5, backend=backend)
            results.append(gradients(module, *rest, [6, 2, 5], "mse"))
        assert_same(results[1], results[0])


@pytest.mark.parametrize("cell", MODULES)
def test_a_loss_that_only_the_caller_can_measure_and_perturbed_weights(cell):
    def squares(outputs, targets):
        return (outputs - targets).square().sum(-1)

    for method, loss in (("anp", squares), ("wp", "mse")):
        results = []
        for backend in ("torch", "triton"):
            module, readout, inputs, states = build(MODULES[cell][0], 4)
            inputs, states = inputs.detach(), [state.detach() for state in states]
            module.perturbation = Perturbation(method, rollouts=5, sigma=0.1, backend=backend)
            results.append(gradients(module, readout, inputs, states, None, loss))
        assert_same(results[1], results[0])


@pytest.mark.parametrize("cell", MODULES)
def test_enough_rollouts_are_bptt_where_gates_hold_and_the_loss_is_at_the_end(cell):
    """With an LSTM's path through c left in the returns, the cosine is about .5."""
    ours, torchs = MODULES[cell]
    how = Perturbation("anp-ls", rollouts=2 * H, sigma=1e-3, ridge=1e-5, backend="triton")
    module, *rest = build(ours, 12, hold=3.0, perturbation=how)
    found = gradients(module, *rest, None, last_only=True)
    twin, *rest = build(torchs, 12, hold=3.0)
    alike = cosines(found, gradients(twin, *rest, None, last_only=True))
    assert min(alike.values()) > 0.999, alike


@pytest.mark.parametrize("cell", MODULES)
def test_auto_keeps_to_the_cpu_and_the_kernels_run_when_asked_for(cell, monkeypatch):
    import anpgpu.kernels.rollout_triton as kernels

    launched, run = [], kernels.run_gated
    counted = {"stepwise": lambda *arguments: launched.append(1) or run(*arguments)}
    monkeypatch.setattr(kernels, "GATED_FORMS", counted)
    module, *rest = build(MODULES[cell][0], 3)
    for backend in ("auto", "triton"):
        module.perturbation = Perturbation("np", rollouts=3, backend=backend)
        gradients(module, *rest, None)
        assert len(launched) == (1 if backend == "triton" else 0)
