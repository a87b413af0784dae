"""Parametrized weights: `estimate_grad_` reaches the parameters behind them, alone and under decorrelation."""

import copy

import pytest
import torch
from decorrelation_cases import METHODS, RATE, B, H, I, O, T, decorrelated, draw, gradients_of, network, originals
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations

import anpgpu
from anpgpu.decorrelation import Decorrelation

STACKED = {
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    # spectral_norm's power iteration changes a buffer whenever the weight is computed.
    "spectral_norm": parametrizations.spectral_norm,
}


def stacked(kind, *, decorrelate):
    rnn, readout = network()
    STACKED[kind](rnn, "weight_hh_l0")
    STACKED[kind](readout, "weight")
    if decorrelate:
        attached = Decorrelation(rnn, readout, rate=RATE)
        attached.update_(draw(T, B, I))
        attached.update_(draw(T, B, I))
    return rnn, readout


@pytest.mark.parametrize("decorrelate", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", STACKED)
def test_estimates_reach_parameters_through_parametrizations(kind, method, decorrelate):
    rnn, readout = stacked(kind, decorrelate=decorrelate)
    twin, head = copy.deepcopy(rnn), copy.deepcopy(readout)
    # The twin's weights are computed once; autograd takes their estimates on to the parameters.
    weight_hh, weight_o = twin.weight_hh_l0, head.weight
    plain, plain_head = network()
    with torch.no_grad():
        plain.weight_hh_l0.copy_(weight_hh)
        plain_head.weight.copy_(weight_o)
    effective = gradients_of(plain, plain_head, method, "estimate_grad_")
    torch.autograd.backward([weight_hh, weight_o], [effective["weight_hh_l0"], effective["readout.weight"]])
    gradients = gradients_of(rnn, readout, method, "estimate_grad_")
    for mine, by_hand in ((rnn, twin), (readout, head)):
        for (name, parameter), other in zip(mine.named_parameters(), by_hand.parameters(), strict=True):
            if name.startswith("parametrizations"):
                assert_close(parameter.grad, other.grad, "float64")
                assert parameter.grad.abs().max() > 0
    assert_close(gradients["weight_ih_l0"], effective["weight_ih_l0"], "float64")


def test_estimates_add_up_through_parametrizations():
    rnn, readout = stacked("orthogonal", decorrelate=True)
    once = {name: grad.clone() for name, grad in gradients_of(rnn, readout, "anp", "estimate_grad_").items()}
    twice = gradients_of(rnn, readout, "anp", "estimate_grad_")
    for name, gradient in once.items():
        assert_close(twice[name], 2 * gradient, "float64")


def test_frozen_parameters_behind_a_parametrization_get_nothing():
    rnn, readout, _ = decorrelated()
    originals(rnn)["weight_hh_l0"].requires_grad_(False)
    gradients = gradients_of(rnn, readout, "anp", "estimate_grad_")
    assert gradients["weight_hh_l0"] is None
    assert gradients["weight_ih_l0"].abs().max() > 0


@pytest.mark.parametrize("kind", STACKED)
def test_folding_makes_stacked_parametrizations_permanent(kind):
    rnn, _ = stacked(kind, decorrelate=True)
    rnn.eval()
    inputs = draw(T, B, I)
    expected = rnn(inputs)[0].detach()
    Decorrelation(rnn).fold_()
    assert type(rnn) is anpgpu.RNN
    assert_close(rnn(inputs)[0], expected, "float64")


@pytest.mark.parametrize("method", ["published-anp", "published-np", "published-wp"])
def test_the_published_rules_reach_decorrelated_weights(method):
    rnn, readout = nn.RNN(I, H, bias=False, dtype=torch.float64), nn.Linear(H, O, bias=False, dtype=torch.float64)
    optimised = [rnn.weight_ih_l0, rnn.weight_hh_l0, readout.weight]
    attached = Decorrelation(rnn, readout, inputs=True, rate=RATE)
    attached.update_(draw(T, B, I))
    matrices = [matrix.clone() for matrix in attached.matrices.values()]
    how = anpgpu.Perturbation(method, rollouts=1, noise="gaussian", sigma=1e-4, discount=0.0)
    gradients = []
    for fold in (False, True):
        if fold:
            attached.fold_()
        generator = torch.Generator().manual_seed(1)
        anpgpu.estimate_grad_(rnn, readout, draw(T, B, I), draw(T, B, O), perturbation=how, generator=generator)
        gradients.append([weight.grad.clone() for weight in optimised])
        rnn.zero_grad()
        readout.zero_grad()
    for decorrelated_grad, plain, matrix in zip(*gradients, matrices, strict=True):
        assert_close(decorrelated_grad, plain @ matrix.t(), "float64")
        assert plain.abs().max() > 0
