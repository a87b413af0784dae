"""GRU and LSTM under torch.compile, export, torch.func, activation checkpointing and data parallelism."""

import pytest
import torch
from stepping import WARNINGS
from test_gated import MODULES, B, H, I, T, as_hx, as_states
from tolerances import assert_close
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from anpgpu import Perturbation

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]
HOW = Perturbation("anp-ls", rollouts=5)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(11)


def made(cell, **options):
    """A module, inputs, and first states that require a gradient."""
    module = MODULES[cell][0](I, H, 2, perturbation=HOW, **options)
    count = 2 if cell == "lstm" else 1
    shape = (2 * (1 + module.bidirectional), B, H)
    return module, torch.randn(T, B, I), tuple(torch.randn(shape, requires_grad=True) for _ in range(count))


def step(run, module, inputs, states):
    """Outputs, final states, and gradients of parameters and first states."""
    torch.manual_seed(7)
    outputs, final = run(inputs, as_hx(states))
    values = [outputs, *as_states(final)]
    loss = sum((number + 1) * value.square().sum() for number, value in enumerate(values))
    gradients = torch.autograd.grad(loss, [*module.parameters(), *states])
    return [value.detach() for value in values] + list(gradients)


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_a_full_graph_it_is_the_same(cell, dynamic):
    module, inputs, states = made(cell, bidirectional=True, dropout=0.3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scale in (1.0, 0.5):
        pairs = zip(
            step(compiled, module, scale * inputs, states), step(module, module, scale * inputs, states), strict=True
        )
        for ours, eager in pairs:
            assert_close(ours, eager, "float32")


@pytest.mark.parametrize("cell", MODULES)
def test_export_is_torchs_clean_run(cell):
    module, inputs, states = made(cell)
    twin = MODULES[cell][1](I, H, 2)
    twin.load_state_dict(module.state_dict())
    hx = as_hx(tuple(state.detach() for state in states))
    exported = torch.export.export(module.eval(), (inputs, hx)).module()
    for ours, torchs in zip(
        (exported(inputs, hx)[0], *as_states(exported(inputs, hx)[1])),
        (twin(inputs, hx)[0], *as_states(twin(inputs, hx)[1])),
        strict=True,
    ):
        assert_close(ours, torchs, "float32")


@pytest.mark.parametrize("cell", MODULES)
def test_gradients_of_torch_func_are_those_of_backward(cell):
    module, inputs, _ = made(cell)

    def loss(parameters):
        outputs, final = functional_call(module, parameters, (inputs,))
        return outputs.square().mean() + sum(state.sum() for state in as_states(final))

    torch.manual_seed(7)
    functional = grad(loss)(dict(module.named_parameters()))
    torch.manual_seed(7)
    expected = torch.autograd.grad(loss(dict(module.named_parameters())), list(module.parameters()))
    assert all(torch.equal(ours, eager) for ours, eager in zip(functional.values(), expected, strict=True))


@pytest.mark.parametrize("cell", MODULES)
def test_activation_checkpointing_repeats_the_estimate(cell):
    module, inputs, states = made(cell, dropout=0.3)

    def run(inputs, hx):
        return checkpoint(module, inputs, hx, use_reentrant=False)

    pairs = zip(step(run, module, inputs, states), step(module, module, inputs, states), strict=True)
    assert all(torch.equal(ours, plain) for ours, plain in pairs)


@pytest.mark.parametrize("cell", MODULES)
def test_results_may_be_changed_in_place(cell):
    module, inputs, states = made(cell)
    hx = as_hx(states)
    expected = step(module, module, inputs, states)
    torch.manual_seed(7)
    outputs, final = module(inputs, hx)
    values = [outputs, *as_states(final)]
    loss = sum((number + 1) * value.square().sum() for number, value in enumerate(values))
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    torch.manual_seed(7)
    outputs, final = module(inputs, hx)
    for value in (outputs, *as_states(final)):
        value.mul_(1)
    loss = sum((number + 1) * value.square().sum() for number, value in enumerate([outputs, *as_states(final)]))
    again = torch.autograd.grad(loss, list(module.parameters()))
    assert all(torch.equal(*both) for both in zip(gradients, again, strict=True))
    count = len(expected) - len(gradients) - len(states)
    assert all(torch.equal(*both) for both in zip(expected[count:], gradients, strict=False))


@pytest.mark.parametrize("cell", MODULES)
def test_a_state_carried_and_detached_trains(cell):
    torch.manual_seed(0)
    module, head = MODULES[cell][0](1, 16, perturbation=Perturbation("anp-ls", rollouts=16)), nn.Linear(16, 1)
    optimiser, hx, losses = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-2), None, []
    for _ in range(80):
        inputs = torch.randn(8, 16, 1)
        outputs, hx = module(inputs, hx)
        hx = as_hx(tuple(state.detach() for state in as_states(hx)))
        loss = (head(outputs)[1:] - inputs[:-1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), (losses[0], losses[-1])
