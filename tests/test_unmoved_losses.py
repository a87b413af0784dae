"""Callable losses that rollouts do not move, from which nothing can be learnt: a warning once, and a count."""

import math
import warnings

import pytest
import torch
from test_cases import METHODS, B, H, I, O, T, network
from test_division import Division, force

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import ESTIMATORS


def wrong(outputs, targets):
    return outputs.argmax(-1) != targets


def test_a_loss_that_no_rollout_moves_is_told_once():
    rnn, head = network("np", dtype=torch.float32)
    inputs, labels = torch.randn(T, B, I), torch.randint(O, (T, B))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            anpgpu.estimate_grad_(rnn, head, inputs, labels, wrong)
    assert len(told) == 1
    assert "bool" in str(told[0].message)
    assert "sigma=0.001" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn.perturbation = Perturbation("np", rollouts=64, sigma=0.5)
        anpgpu.estimate_grad_(rnn, head, inputs, labels, wrong)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("divided", [False, True])
def test_the_rollouts_that_moved_a_callable_are_counted(method, divided, monkeypatch):
    # The loss of the second sample is always the same.
    def first_sample(outputs, targets):
        return torch.where(targets > 0, outputs.square().mean(-1), 1.0)

    if divided:
        force(monkeypatch, Division(1, 8 if ESTIMATORS[method].whole_samples else 3, 1))
    rnn, _ = network(method, head=False, num_layers=2)
    inputs = torch.randn(T, 2, I, dtype=torch.float64)
    which = torch.tensor([1, 0]).expand(T, 2)
    seen = anpgpu.estimate_grad_(rnn, None, inputs, which, first_sample)
    assert seen.moved.dtype == torch.int64
    # Lower layers answer to the last one's adjoint, not to the loss.
    assert int(seen.moved) == 8
    assert anpgpu.estimate_grad_(rnn, None, inputs, torch.zeros(T, 2, H).double()).moved is None
    rnn(inputs)[0].sum().backward()
    assert rnn.last_estimate.moved is None


def test_the_count_of_moved_rollouts_has_those_of_the_readout_and_none_that_is_lost():
    rnn, head = network("np", bidirectional=True)
    inputs, targets = torch.randn(T, B, I).double(), torch.randn(T, B, O).double()
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, lambda o, t: (o - t).abs().sum(-1))
    assert int(seen.moved) == 8 * B * 3

    def lost(outputs, targets):
        values = (outputs - targets).abs().sum(-1)
        if values.shape[-1] > 1:
            values[0, 0, 0] = math.nan
        return values

    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, lost)
    assert int(seen.moved) == 8 * B * 3 - 3
    assert int(seen.skipped) == 2
    with pytest.warns(UserWarning, match="no rollout changed the loss"):
        seen = anpgpu.estimate_grad_(rnn, head, inputs, None, lambda outputs, _: outputs.sum(-1) > 1e9)
    assert int(seen.moved) == 0
