"""The torch face on the Triton kernels, in the interpreter: the same gradients as on the reference."""

from dataclasses import replace

import pytest
import torch
from test_division import Division, force
from torch import Tensor, nn

import anpgpu
from anpgpu.kernels.tiles import INTERPRETED

pytestmark = pytest.mark.interpreter


def test_this_leg_interprets() -> None:
    assert INTERPRETED


def gradients(perturbation: anpgpu.Perturbation, *, measured: bool, **network: object) -> list[Tensor]:
    torch.manual_seed(3)
    rnn = anpgpu.RNN(3, 9, perturbation=perturbation, **network)
    readout = nn.Linear(9 * (1 + rnn.bidirectional), 4)
    inputs, labels = torch.randn(4, 2, 3), torch.randint(4, (4, 2))
    if measured:
        anpgpu.estimate_grad_(rnn, readout, inputs, labels, "cross_entropy", lengths=[4, 3])
    else:
        nn.functional.cross_entropy(readout(rnn(inputs)[0]).flatten(0, 1), labels.flatten()).backward()
    return [parameter.grad for parameter in (*rnn.parameters(), *readout.parameters())]


@pytest.mark.parametrize("method", ["np", "anp", "anp-ls"])
@pytest.mark.parametrize("discount", [0.0, 0.9])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("network", [{}, {"num_layers": 2, "nonlinearity": "relu"}, {"bidirectional": True}])
def test_gradients_are_those_of_the_reference(
    method: str, discount: float, measured: bool, network: dict[str, object]
) -> None:
    perturbation = anpgpu.Perturbation(method, rollouts=5, discount=discount, backend="torch")
    expected = gradients(perturbation, measured=measured, **network)
    found = gradients(replace(perturbation, backend="triton"), measured=measured, **network)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("method", ["np", "anp", "anp-ls"])
@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_padded_targets_may_hold_anything(method: str, discount: float) -> None:
    def padded(backend: str, padding: float) -> list[Tensor]:
        torch.manual_seed(3)
        perturbation = anpgpu.Perturbation(method, rollouts=5, discount=discount, backend=backend)
        rnn, readout = anpgpu.RNN(3, 9, perturbation=perturbation), nn.Linear(9, 4)
        inputs, targets = torch.randn(4, 2, 3), torch.randn(4, 2, 4)
        targets[2:, 1] = padding
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, "mse", lengths=[4, 2])
        return [parameter.grad for parameter in (*rnn.parameters(), *readout.parameters())]

    found, expected = padded("triton", float("nan")), padded("torch", 0.0)
    for ours, clean, reference in zip(found, padded("triton", 0.0), expected, strict=True):
        assert torch.equal(ours, clean)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_rollout_that_overflows_later_is_left_out_on_every_backend(
    method: str, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Deviations grow by 3e9 a step and end near the largest number: above it in some rollouts, below in others.
    perturbation = anpgpu.Perturbation(method, rollouts=16, sigma=6.0, noise="gaussian", discount=0.0)
    results = []
    for backend in ("torch", "triton"):
        force(monkeypatch, Division(2, 16, segments))
        rnn = anpgpu.RNN(3, 9, nonlinearity="relu", bias=False, perturbation=replace(perturbation, backend=backend))
        nn.init.constant_(rnn.weight_hh_l0, 3.8e8)
        nn.init.constant_(rnn.weight_ih_l0, 0.0)
        generator = torch.Generator().manual_seed(5)
        inputs, gradient = (torch.randn(5, 2, size, generator=generator) for size in (3, 9))
        # The gradient of W_ih is then the first step's alone; those of later steps are many times as large.
        inputs[1:] = 0
        torch.manual_seed(5)
        rnn(inputs)[0].backward(1e-9 * gradient)
        assert 0 < rnn.last_estimate.skipped < 32
        results.append((rnn.weight_ih_l0.grad, rnn.last_estimate.skipped))
    (expected, lost), (found, also_lost) = results
    assert lost == also_lost
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
