"""Samples of length 0, and callables that ask for lengths."""

import functools

import pytest
import torch
from loss_cases import (
    BPTT,
    CLOSE,
    FORMS,
    NETWORKS,
    B,
    Form,
    H,
    I,
    T,
    squared,
)
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation

# Samples of length 0.


@pytest.mark.parametrize("method", ["np", "anp", "anp-ls", "anp-feedback", "wp", "bptt"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", ["module", "callable"])
def test_a_sample_of_length_0_is_as_one_that_is_not_there(network, method, loss):
    problem = Form("a length of 0", nn.MSELoss() if loss == "module" else squared, network)
    how = Perturbation(method, rollouts=8, sigma=1e-4)
    # Behind the others, because a sample's noise depends on its number.
    problem.lengths, problem.valid = [4, 6, 0], problem.valid[:, [0, 2, 1]]
    problem.hx.requires_grad_(method != "wp")
    seen = problem.estimate(how, generator=torch.Generator().manual_seed(1))
    found, leaf = problem.gradient, problem.hx
    assert not seen.outputs[:, 2].any()
    assert torch.equal(seen.h_n[:, 2], leaf.detach()[:, 2])
    assert int(seen.skipped) == 0
    fewer = Form("lengths", problem.loss, network)
    fewer.inputs, fewer.targets, fewer.hx = problem.inputs[:, :2], problem.targets[:, :2], leaf.detach()[:, :2]
    fewer.lengths = [4, 6]
    expected = fewer.estimate(how, generator=torch.Generator().manual_seed(1))
    assert_close(seen.loss, expected.loss, "float64")
    assert_close(found, fewer.gradient, "float64")
    if method != "wp":
        assert not leaf.grad[:, 2].any()
        assert leaf.grad[:, :2].any()


@pytest.mark.parametrize("method", ["np", "anp-ls", "bptt"])
def test_a_value_of_a_sequence_of_length_0_does_not_count(method):
    problem = Form(
        "a length of 0", lambda outputs, _: outputs.sum(0).square().sum(-1) + 1e3 * (outputs[0, ..., 0] == 0)
    )
    how = Perturbation(method, rollouts=8, sigma=1e-4)
    seen = problem.estimate(how)
    sums = seen.outputs.sum(0).square().sum(-1)
    assert_close(seen.loss, (sums[0] + sums[2]) / 2, "float64")


def test_lengths_of_0_that_leave_nothing_are_named():
    problem = Form("lengths", nn.MSELoss())
    with pytest.raises(ValueError, match=r"lengths must not all be 0, got \[0, 0, 0\]"):
        problem.estimate(CLOSE, lengths=[0, 0, 0])
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 6\], got \[-1, 6, 6\]"):
        problem.estimate(CLOSE, lengths=[-1, 6, 6])
    problem = Form("lengths", nn.MSELoss(), per_sequence=True)
    for loss in ("mse", lambda outputs, targets: outputs.sum((0, -1))):
        with pytest.raises(ValueError, match=r"lengths must be at least 1 where .* one target, got \[0, 6, 6\]"):
            problem.estimate(CLOSE, loss, lengths=[0, 6, 6])


def test_decorrelation_passes_over_a_sample_of_length_0():
    torch.manual_seed(0)
    rnn = nn.RNN(I, H)
    inputs, matrices = torch.randn(T, B, I), []
    for batch, lengths in ((3, [6, 4, 0]), (2, [6, 4])):
        attached = anpgpu.Decorrelation(nn.RNN(I, H))
        with torch.no_grad():
            for name, value in rnn.named_parameters():
                target = dict(attached.rnn.named_parameters())
                target.get(name, target.get(f"parametrizations.{name}.original")).copy_(value)
        attached.update_(inputs[:, :batch], lengths=lengths)
        matrices.append(next(iter(attached.matrices.values())).clone())
    torch.testing.assert_close(*matrices)


# Callables that ask for lengths.


class Module(nn.Module):
    def forward(self, outputs, targets, lengths):
        return asked(outputs, targets, lengths=lengths)


def asked(outputs, targets, *, lengths):
    assert lengths.dtype == torch.int64
    assert lengths.shape == outputs.shape[1:2]
    assert int(lengths.max()) <= len(outputs)
    last = outputs[lengths - 1, torch.arange(len(lengths))]
    return (last - targets[-1]).square().mean(-1)


@pytest.mark.parametrize("form", FORMS[:-1])
@pytest.mark.parametrize(
    "loss",
    [
        asked,
        Module(),
        functools.partial(asked),
        lambda outputs, targets, lengths: asked(outputs, targets, lengths=lengths),
    ],
)
def test_a_callable_gets_the_lengths_it_asks_for(loss, form):
    problem = Form(form, loss)
    ends = problem.valid.sum(0) - 1
    outputs, _ = problem.states()
    expected = (outputs[ends, torch.arange(problem.batch)] - problem.targets[-1]).square().mean(-1).mean()
    for how in (BPTT, Perturbation("anp-ls", rollouts=8, max_memory=None)):
        assert_close(problem.estimate(how).loss, expected, "float64")


def test_lengths_are_those_of_the_samples_of_the_call(monkeypatch):
    memory, seen = anpgpu.runtime.memory, set()
    shape = memory.Shape.divide
    monkeypatch.setattr(memory.Shape, "divide", lambda self, *rest: shape(self, *rest)._replace(samples=1))

    def loss(outputs, targets, lengths):
        seen.add(tuple(lengths.tolist()))
        return asked(outputs, targets, lengths=lengths)

    Form("lengths", loss).estimate(CLOSE)
    assert seen == {(4,), (6,), (1,)}


def test_a_callable_without_a_signature_or_such_a_parameter_gets_none():
    def positional(outputs, targets, lengths=None, /, **others):
        assert lengths is None
        assert not others
        return squared(outputs, targets)

    problem = Form("lengths", nn.MSELoss())
    expected = problem.estimate(BPTT).loss
    assert_close(problem.estimate(BPTT, positional).loss, expected, "float64")


def test_a_readout_without_parameters_goes_with_lengths():
    problem = Form("lengths", asked, head=False)
    problem.head = nn.Tanh()
    outputs, _ = problem.states()
    ends = problem.valid.sum(0) - 1
    expected = (outputs[ends, torch.arange(B)] - problem.targets[-1]).square().mean(-1).mean()
    assert_close(problem.estimate(CLOSE).loss, expected, "float64")
