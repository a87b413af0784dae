"""An update knows nothing of the one before: whatever is changed between two updates holds in the second."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import anpgpu
from anpgpu import Perturbation

T, B, I, H, O = 5, 3, 4, 6, 7  # noqa: E741  (the design's names)


class Model(nn.Module):
    """A network of two layers, its readout, a batch and a loss, all of which a change may replace."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        how = Perturbation("anp", rollouts=8, backend="torch")
        self.rnn, self.head = anpgpu.RNN(I, H, 2, perturbation=how), nn.Linear(H, O)
        self.loss = nn.CrossEntropyLoss()
        self.inputs, self.targets = torch.randn(T, B, I), torch.arange(T * B).view(T, B) % O

    def update(self, way):
        """Return the gradients of an update, by parameter's name."""
        self.zero_grad()
        torch.manual_seed(1)
        if way == "estimate":
            anpgpu.estimate_grad_(self.rnn, self.head, self.inputs, self.targets, self.loss)
        else:
            outputs = self.head(self.rnn(self.inputs)[0])
            self.loss(outputs.flatten(0, 1), self.targets.flatten()).backward()
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def of_perturbation(**changes):
    def change(model):
        model.rnn.perturbation = dataclasses.replace(model.rnn.perturbation, **changes)

    return change


def weights_swapped(model):
    first, second = model.rnn.weight_hh_l0.data, model.rnn.weight_hh_l1.data
    model.rnn.weight_hh_l0.data, model.rnn.weight_hh_l1.data = second, first


def weights_loaded(model):
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})


def frozen(model):
    model.rnn.weight_ih_l0.requires_grad_(False)
    model.rnn.bias_hh_l1.requires_grad_(False)


def without_biases(model):
    model.rnn = anpgpu.RNN(I, H, 2, bias=False, perturbation=model.rnn.perturbation)
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))


def doubled(model):
    model.double()
    model.inputs = model.inputs.double()


def dropped(model):
    model.rnn.dropout = 0.5


def dropped_but_not_in_eval(model):
    model.rnn.dropout = 0.5
    model.eval()


def hooked(model):
    model.rnn.weight_hh_l0.register_hook(lambda gradient: 3 * gradient)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(model):
    parametrize.register_parametrization(model.rnn, "weight_hh_l0", Halved())


def longer(model):
    model.inputs, model.targets = model.inputs.repeat(2, 1, 1), model.targets.repeat(2, 1)


def wider(model):
    model.inputs, model.targets = model.inputs.repeat(1, 2, 1), model.targets.repeat(1, 2)


def batch_first(model):
    model.rnn.batch_first = True
    model.targets = torch.arange(T * B).view(T, B) % O


def class_weights(model):
    model.loss.weight = torch.linspace(0.2, 2, O)


def smoothed(model):
    model.loss.label_smoothing = 0.3


def ignored(model):
    model.loss.ignore_index = 2


def summed(model):
    model.loss.reduction = "sum"


def relu(model):
    model.rnn = anpgpu.RNN(I, H, 2, nonlinearity="relu", perturbation=model.rnn.perturbation)
    with torch.no_grad():
        for parameter in model.rnn.parameters():
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))


CHANGES = {
    change.__name__: change
    for change in (
        *(weights_swapped, weights_loaded, frozen, without_biases, doubled, dropped, dropped_but_not_in_eval, hooked),
        *(parametrized, longer, wider, batch_first, class_weights, smoothed, ignored, summed, relu),
    )
} | {
    "sigma": of_perturbation(sigma=0.3),
    "rollouts": of_perturbation(rollouts=4),
    "method": of_perturbation(method="np"),
    "discount": of_perturbation(discount=0.5),
    "noise": of_perturbation(noise="gaussian"),
    "precision": of_perturbation(precision="bf16"),
    "memory": of_perturbation(max_memory=16_800_000),
}

WITHOUT_EFFECT = {"memory", "dropped_but_not_in_eval"}
"""Changes after which gradients are as before."""


@pytest.mark.parametrize("way", ["estimate", "backward"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_holds_in_the_next_update(name, way):
    model = Model()
    fresh = copy.deepcopy(model)
    before = model.update(way)
    found = {}
    for which in (model, fresh):
        CHANGES[name](which)
        found[which is fresh] = which.update(way)
    assert found[False].keys() == found[True].keys()
    for parameter, gradient in found[True].items():
        seen = found[False][parameter]
        assert (seen is None) == (gradient is None)
        assert seen is None or torch.equal(seen, gradient)
    if name not in WITHOUT_EFFECT:
        assert numbers(before) != numbers(found[True])


def numbers(gradients):
    return {name: None if gradient is None else gradient.tolist() for name, gradient in gradients.items()}


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_autocast_holds_in_the_updates_inside_it(way):
    model = Model()
    outside = model.update(way)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.update(way)
    again = model.update(way)
    name = "rnn.weight_hh_l0"
    assert torch.equal(again[name], outside[name])
    assert not torch.equal(inside[name], outside[name])


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_inputs_that_come_to_require_gradients_get_them(way):
    model = Model()
    model.update(way)
    model.inputs.requires_grad_()
    model.update(way)
    assert model.inputs.grad is not None
    model.inputs.requires_grad_(False)
    model.inputs.grad = None
    model.update(way)
    assert model.inputs.grad is None


@pytest.mark.parametrize("way", ["estimate", "backward"])
def test_a_value_that_comes_to_be_wrong_is_seen(way):
    model = Model()
    model.update(way)
    model.rnn.to("meta")
    with pytest.raises((RuntimeError, ValueError), match=r"meta|device"):
        model.update(way)
    model = Model()
    model.update(way)
    model.targets[2, 1] = O
    with pytest.raises((IndexError, ValueError), match=r"must be in|out of bounds"):
        model.update(way)


def test_the_backward_pass_takes_what_the_forward_pass_resolved(monkeypatch):
    asked = []
    choose = anpgpu.runtime.settings.choose_backend

    def watched(requested, *rest):
        asked.append(requested)
        return choose(requested, *rest)

    monkeypatch.setattr(anpgpu.runtime.settings, "choose_backend", watched)
    rnn = anpgpu.RNN(I, H, perturbation=Perturbation("anp", rollouts=4))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = rnn(torch.randn(T, B, I))
    (chosen,) = {choose("auto", torch.device("cpu"), torch.float32)}
    outputs.sum().backward()
    assert asked == ["auto", chosen]
