"""`swap_` and `unswap_` put perturbation learning into an existing model and take it out again."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation

HOW = Perturbation("anp", rollouts=4, sigma=1e-3)


def grads(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Nested(nn.Module):
    """A model with recurrent networks at several depths, one of them shared."""

    def __init__(self):
        super().__init__()
        self.first = nn.RNN(4, 5)
        self.block = nn.ModuleDict({"deep": nn.Sequential(nn.RNN(5, 5, num_layers=2)), "gru": nn.GRU(5, 5)})
        self.block["lstm"] = nn.LSTM(5, 5)
        self.again = self.first
        self.head = nn.Linear(5, 2)

    def forward(self, inputs):
        hidden, _ = self.first(inputs)
        hidden, _ = self.block["deep"](hidden)
        hidden, _ = self.block["gru"](hidden)
        return self.head(self.block["lstm"](hidden)[0])


def test_swap_counts_and_keeps_parameters_names_and_outputs():
    torch.manual_seed(2)
    model = Nested()
    inputs = torch.randn(6, 3, 4)
    expected = model(inputs).detach()
    before = dict(model.named_parameters())
    names, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    assert anpgpu.swap_(model, HOW) == 4
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state
    assert isinstance(model.first, anpgpu.RNN)
    assert model.again is model.first
    assert isinstance(model.block["deep"][0], anpgpu.RNN)
    assert type(model.block["gru"]) is anpgpu.GRU
    assert type(model.block["lstm"]) is anpgpu.LSTM
    assert_close(model(inputs), expected, "float32")


def test_an_optimiser_made_before_the_swap_goes_on():
    torch.manual_seed(2)
    model = Nested()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs = torch.randn(6, 3, 4)
    for swap in (None, anpgpu.swap_, anpgpu.unswap_):
        if swap is not None:
            assert swap(model) == 4
        before = model.block["lstm"].weight_hh_l0.detach().clone()
        optimiser.zero_grad()
        model(inputs).square().sum().backward()
        optimiser.step()
        assert not torch.equal(model.block["lstm"].weight_hh_l0, before)
    assert len(optimiser.state) == len(list(model.parameters()))


def test_unswap_gives_torchs_gradients_back():
    torch.manual_seed(2)
    model = Nested()
    inputs = torch.randn(6, 3, 4)
    expected = step_of_model(model, inputs)
    anpgpu.swap_(model, HOW)
    estimated = step_of_model(model, inputs)
    for name in ("first", "block.gru", "block.lstm"):
        assert not torch.equal(estimated[f"{name}.weight_hh_l0"], expected[f"{name}.weight_hh_l0"])
    assert_close(estimated["head.weight"], expected["head.weight"], "float32")
    assert anpgpu.unswap_(model) == 4
    assert type(model.first) is nn.RNN
    assert vars(model.first).keys() == vars(nn.RNN(4, 5)).keys()
    assert type(model.block["gru"]) is nn.GRU
    assert type(model.block["lstm"]) is nn.LSTM
    assert_same(step_of_model(model, inputs), expected)
    assert anpgpu.unswap_(model) == 0
    pickle.loads(pickle.dumps(model))


def step_of_model(model, inputs):
    model.zero_grad()
    torch.manual_seed(1)
    model(inputs).square().sum().backward()
    return {name: grad.clone() for name, grad in grads(model).items()}


def test_swapping_again_changes_the_perturbation():
    model = Nested()
    anpgpu.swap_(model, HOW)
    other = Perturbation("np")
    assert anpgpu.swap_(model, other) == 4
    assert model.first.perturbation == model.block["deep"][0].perturbation == other


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_swap_of_a_bare_network_and_of_none(name):
    rnn = getattr(nn, name)(4, 5)
    assert anpgpu.swap_(rnn) == 1
    assert type(rnn) is getattr(anpgpu, name)
    assert rnn.perturbation == Perturbation()
    with pytest.raises(ValueError, match=r"no nn\.RNN, nn\.GRU or nn\.LSTM to swap inside Linear"):
        anpgpu.swap_(nn.Linear(2, 2))


def test_a_swapped_model_survives_deepcopy_and_pickle():
    model = Nested()
    anpgpu.swap_(model, HOW)
    inputs = torch.randn(6, 3, 4)
    expected = step_of_model(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step_of_model(other, inputs), expected)


class Hooked(NamedTuple):
    forward: list
    gradient: list


def test_hooks_stay():
    rnn = nn.RNN(4, 5)
    seen = Hooked([], [])
    rnn.register_forward_hook(lambda module, args, outputs: seen.forward.append(type(module)))
    rnn.weight_hh_l0.register_hook(lambda grad: seen.gradient.append(grad.shape))
    anpgpu.swap_(rnn, HOW)
    rnn(torch.randn(6, 3, 4))[0].sum().backward()
    assert seen == Hooked([anpgpu.RNN], [(5, 5)])
