"""Least-squares ANP reproduces BPTT's gradient when it may, and stays aligned with it when it may not."""

import math

import pytest
import torch
from torch import Tensor, nn

import anpgpu
from anpgpu.kernels import least_squares as least_squares_module
from anpgpu.kernels.least_squares import BLOCK_BYTES, LeastSquares, _cholesky, least_squares, smaller_gram
from anpgpu.kernels.noise import Counters, noise
from anpgpu.kernels.rollout import RolloutOptions


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
    cosines = []
    for (name, ours), true in zip(rnn.named_parameters(), oracle.parameters(), strict=True):
        if "weight_hh" in name:
            cosine = nn.functional.cosine_similarity(ours.grad.flatten(), true.grad.flatten(), dim=0)
            cosines.append((float(cosine), float(ours.grad.norm() / true.grad.norm())))
    return cosines


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


def by_hand(
    delta_loss: Tensor, activity: Tensor, noise: Tensor, discount: float, ridge: float, *, baseline: bool = False
) -> tuple[Tensor, Tensor]:
    """The equations, one sample and step at a time, by a general solver: the estimate and the returns."""
    time, batch, rollouts, units = activity.shape
    adjoint, credit = torch.zeros(time, batch, units).double(), torch.zeros_like(delta_loss)
    for sample in range(batch):
        carry = torch.zeros(rollouts).double()
        for step in range(time - 1, -1, -1):
            moved = activity[step, sample]
            credit[step, sample] = delta_loss[step, sample] + carry
            if baseline:
                credit[step, sample] -= credit[step, sample].mean()
            penalty = ridge * (moved**2).sum() / rollouts * torch.eye(units).double()
            adjoint[step, sample] = torch.linalg.solve(moved.T @ moved + penalty, moved.T @ credit[step, sample])
            carry = discount * (credit[step, sample] - noise[step, sample] @ adjoint[step, sample])
    return adjoint, credit


def regressed(
    activity: Tensor,
    delta_loss: Tensor,
    *,
    sigma: float = 0.5,
    ridge: float = 0.1,
    baseline: bool = False,
    finite: Tensor | None = None,
) -> LeastSquares:
    _, batch, rollouts, _ = activity.shape
    return least_squares(
        delta_loss,
        activity,
        delta_loss.new_zeros((batch, rollouts)),
        torch.tensor(3),
        finite=torch.ones(batch, rollouts, dtype=torch.bool) if finite is None else finite,
        discount=0.8,
        ridge=ridge,
        baseline=baseline,
        options=RolloutOptions(rollouts, sigma),
        counters=Counters(),
        draw=noise,
        recursion=None,
    )


@pytest.mark.parametrize("rollouts", [1, 2, 5, 6, 7, 12, 13, 14])
@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 21])
def test_both_forms_are_the_equations_by_hand(rollouts: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block_bytes)
    generator = torch.Generator().manual_seed(rollouts)
    activity = torch.randn(5, 2, rollouts, 6, generator=generator).double()
    delta_loss = torch.randn(5, 2, rollouts, generator=generator).double()
    injected = noise(torch.tensor(3), (5, 2, rollouts, 6), sigma=0.5, dtype=torch.float64)
    expected, credit = by_hand(delta_loss, activity, injected, 0.8, 0.1)
    regression = regressed(activity, delta_loss)
    torch.testing.assert_close(regression.adjoint.sum(0), expected)
    assert regression.ridge_grown == 0
    for half in range(min(rollouts, 2)):
        # At discount 0 a step's estimate is the regression on its own loss difference.
        alone, _ = by_hand(credit[..., half::2], activity[..., half::2, :], injected[..., half::2, :], 0.0, 0.1)
        torch.testing.assert_close(2 * regression.adjoint[half], alone)
    if rollouts == 1:
        assert not regression.adjoint[1].any()


def test_a_rollout_that_does_not_count_is_as_one_that_never_was() -> None:
    generator = torch.Generator().manual_seed(0)
    activity = torch.randn(4, 2, 5, 6, generator=generator).double()
    delta_loss = torch.randn(4, 2, 5, generator=generator).double()
    finite = torch.ones(2, 5, dtype=torch.bool)
    finite[:, 4] = False
    expected = regressed(activity[:, :, :4], delta_loss[:, :, :4])
    delta_loss[:, :, 4] = 0
    activity[:, :, 4] = torch.nan
    regression = regressed(activity, delta_loss, finite=finite)
    torch.testing.assert_close(regression.adjoint, expected.adjoint)
    torch.testing.assert_close(regression.carry[:, :4], expected.carry)


def indefinite(monkeypatch: pytest.MonkeyPatch, *where: int) -> None:
    """Make Gram matrices, or those of one step and sample, of which no ridge makes a positive definite one."""

    def gram(activity: Tensor, room: Tensor | None = None) -> Tensor:
        product = usual(activity, room)
        chosen = product[where]
        chosen[..., 0, -1] = chosen[..., -1, 0] = 9 * product.diagonal(dim1=-2, dim2=-1).sum(-1)[where]
        return product

    usual = least_squares_module.smaller_gram
    monkeypatch.setattr(least_squares_module, "smaller_gram", gram)


@pytest.mark.parametrize("rollouts", [4, 9])
def test_a_system_without_a_factor_is_counted_and_harms_nothing(rollouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    activity, delta_loss = torch.randn(3, 2, rollouts, 6), torch.randn(3, 2, rollouts)
    clean = regressed(activity, delta_loss)
    indefinite(monkeypatch, 1, 0)
    regression = regressed(activity, delta_loss)
    assert clean.ridge_grown == 0
    assert regression.ridge_grown == 1
    assert torch.isfinite(regression.adjoint).all()
    torch.testing.assert_close(regression.adjoint[:, :, 1], clean.adjoint[:, :, 1])
    torch.testing.assert_close(regression.adjoint[:, 2], clean.adjoint[:, 2])


@pytest.mark.parametrize("rollouts", [1, 33, 63, 64, 67, 130, 300])
@pytest.mark.parametrize("units", [40, 300])
def test_the_lower_triangle_of_a_gram_matrix_is_that_of_the_whole_product(rollouts: int, units: int) -> None:
    activity = torch.randn(2, 3, rollouts, units, generator=torch.Generator().manual_seed(1)).double()
    whole = activity @ activity.mT if rollouts <= units else activity.mT @ activity
    room = torch.full((4, *whole.shape[1:]), torch.nan).double()
    for gram in (smaller_gram(activity), smaller_gram(activity, room)):
        torch.testing.assert_close(gram.tril(), whole.tril(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 32, 33, 67, 128])
def test_factors_of_large_systems_are_those_of_lapack(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    moved = torch.randn(3, 2, size, 2 * size, generator=generator)
    gram = moved @ moved.mT
    gram[1, 0, size // 2, size // 2] = -1.0
    factor, bad = _cholesky(gram.clone())
    expected, info = torch.linalg.cholesky_ex(gram)
    assert torch.equal(bad, info != 0)
    assert bad.sum() == 1
    torch.testing.assert_close(factor[~bad], expected[~bad], rtol=1e-4, atol=1e-4)
    assert not factor.triu(1).any()


@pytest.mark.parametrize("sigma", [1e-30, 1e30])
def test_the_noise_may_be_of_any_size(sigma: float) -> None:
    activity, delta_loss = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4)
    usual = regressed(activity, delta_loss, sigma=1.0)
    regression = regressed(activity * sigma, delta_loss, sigma=sigma)
    torch.testing.assert_close(regression.adjoint * sigma, usual.adjoint)


def test_halves_agree_the_better_the_more_rollouts() -> None:
    torch.manual_seed(0)
    rnn, readout = nn.RNN(10, 16), nn.Linear(16, 10)
    inputs, targets = copy_task(20, 4, 2, torch.Generator().manual_seed(1))
    agreement = []
    for rollouts in (1, 4, 16, 64):
        perturbation = anpgpu.Perturbation("anp-ls", rollouts, split_half=True)
        estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, "cross_entropy", perturbation=perturbation)
        agreement.append(float(estimate.split_half))
    assert math.isnan(agreement[0])
    assert agreement[1] < agreement[2] < agreement[3]
    assert agreement[3] > 0.95


@pytest.mark.parametrize("kind", [anpgpu.RNN, anpgpu.LSTM])
def test_halves_are_told_apart_on_demand(kind: type[anpgpu.RNN]) -> None:
    found = []
    for split_half in (False, True):
        torch.manual_seed(0)
        rnn = kind(3, 8, 2, perturbation=anpgpu.Perturbation("anp-ls", 6, split_half=split_half)).double()
        estimate = anpgpu.estimate_grad_(rnn, None, torch.randn(5, 2, 3).double(), torch.randn(5, 2, 8).double())
        assert bool(estimate.split_half.isnan()) != split_half
        outputs, state = rnn(torch.randn(5, 2, 3).double())
        # Of an LSTM's last c, too, a gradient arrives.
        (outputs.sum() + sum(value.sum() for value in (state if isinstance(state, tuple) else (state,)))).backward()
        assert bool(rnn.last_estimate.split_half.isnan()) != split_half
        found.append(torch.cat([parameter.grad.flatten() for parameter in rnn.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_systems_without_a_factor_are_reported(bidirectional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn = anpgpu.RNN(3, 8, bidirectional=bidirectional, perturbation=anpgpu.Perturbation("anp-ls", 4))
    indefinite(monkeypatch)
    inputs = torch.randn(3, 2, 3)
    directions = 1 + bidirectional
    estimate = anpgpu.estimate_grad_(rnn, None, inputs, torch.randn(3, 2, 8 * directions))
    # All steps of each sample and direction are counted.
    assert estimate.ridge_grown == 3 * 2 * directions
    assert all(torch.isfinite(weight.grad).all() for weight in rnn.parameters())
    rnn(inputs)[0].sum().backward()
    assert rnn.last_estimate is not None
    assert rnn.last_estimate.ridge_grown == 3 * 2 * directions
