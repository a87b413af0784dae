"""Least-squares ANP reproduces BPTT's gradient when it may, and stays aligned with it when it may not."""

import pytest
import torch
from torch import Tensor, nn

import anpgpu


def copy_task(time: int, batch: int, delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One-hot symbols (T, B, 10), and the symbol of `delay` steps ago as target, -100 before there is one."""
    symbols = torch.randint(10, (time, batch), generator=generator)
    targets = torch.full((time, batch), -100)
    targets[delay:] = symbols[: time - delay]
    return nn.functional.one_hot(symbols, 10).float(), targets


def recurrent_alignment(
    perturbation: anpgpu.Perturbation, *, time: int, layers: int = 1, bidirectional: bool = False
) -> list[tuple[float, float]]:
    """Cosine and norm ratio to autograd's dW_hh of every layer and direction, copy with delay 5, H = 64, B = 8."""
    torch.manual_seed(0)
    rnn = anpgpu.RNN(10, 64, layers, bidirectional=bidirectional, perturbation=perturbation)
    for name, parameter in rnn.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(parameter, 0.9)
    readout = nn.Linear(64 * (1 + bidirectional), 10)
    inputs, targets = copy_task(time, 8, 5, torch.Generator().manual_seed(1))

    oracle = nn.RNN(10, 64, layers, bidirectional=bidirectional)
    oracle.load_state_dict(rnn.state_dict())
    outputs = readout(oracle(inputs)[0])
    nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten()).backward()
    readout.zero_grad()

    anpgpu.estimate_grad_(rnn, readout, inputs, targets, "cross_entropy")
    found = []
    for (name, ours), true in zip(rnn.named_parameters(), oracle.parameters(), strict=True):
        if "weight_hh" in name:
            cosine = nn.functional.cosine_similarity(ours.grad.flatten(), true.grad.flatten(), dim=0)
            found.append((float(cosine), float(ours.grad.norm() / true.grad.norm())))
    return found


@pytest.mark.parametrize(("rollouts", "ridge"), [(72, 1e-6), (128, 1e-3)])
@pytest.mark.parametrize("max_memory", [None, 40 << 20])
def test_enough_rollouts_give_the_gradient_of_bptt(rollouts: int, ridge: float, max_memory: int | None) -> None:
    perturbation = anpgpu.Perturbation("anp-ls", rollouts, discount=1.0, ridge=ridge, max_memory=max_memory)
    ((cosine, ratio),) = recurrent_alignment(perturbation, time=50)
    assert cosine > 0.9999
    assert abs(ratio - 1) < 0.01


@pytest.mark.parametrize("network", [{"layers": 2}, {"bidirectional": True}])
def test_every_layer_and_direction_gets_the_gradient_of_bptt(network: dict[str, int]) -> None:
    perturbation = anpgpu.Perturbation("anp-ls", 72, discount=1.0, ridge=1e-6)
    for cosine, ratio in recurrent_alignment(perturbation, time=50, **network):
        assert cosine > 0.9999
        assert abs(ratio - 1) < 0.01


@pytest.mark.parametrize(("time", "bound"), [(25, 0.5), (400, 0.75)])
def test_alignment_with_few_rollouts_does_not_fall_with_length(time: int, bound: float) -> None:
    few = anpgpu.Perturbation("anp-ls", 16, discount=1.0, ridge=0.1)
    plain = anpgpu.Perturbation("np", 16, discount=1.0)
    ((cosine, _),) = recurrent_alignment(few, time=time)
    ((plain_cosine, _),) = recurrent_alignment(plain, time=time)
    assert cosine > bound
    assert plain_cosine < 0.25


def test_backward_gives_what_estimate_grad_gives() -> None:
    perturbation = anpgpu.Perturbation("anp-ls", 16, discount=1.0, ridge=1e-3, sigma=1e-9)
    torch.manual_seed(0)
    rnn = anpgpu.RNN(3, 8, perturbation=perturbation).double()
    inputs, targets = torch.randn(6, 2, 3).double(), torch.randn(6, 2, 8).double()
    torch.manual_seed(7)
    anpgpu.estimate_grad_(rnn, None, inputs, targets)
    measured = [parameter.grad.clone() for parameter in rnn.parameters()]
    rnn.zero_grad()
    torch.manual_seed(7)
    nn.functional.mse_loss(rnn(inputs)[0], targets).backward()
    for first, second in zip(measured, rnn.parameters(), strict=True):
        torch.testing.assert_close(first, second.grad, rtol=1e-4, atol=1e-8)


def test_rollouts_are_never_divided() -> None:
    rnn = anpgpu.RNN(3, 64, perturbation=anpgpu.Perturbation("anp-ls", 512, max_memory=20 << 20))
    with pytest.raises(MemoryError, match="512 of 512 rollouts"):
        anpgpu.estimate_grad_(rnn, None, torch.randn(400, 1, 3), torch.randn(400, 1, 64))
