"""The baseline, the mean return of the other rollouts: by hand, in blocks, and where it pays."""

import pytest
import torch
from oracles import clean_run, discounted, noise_block, perturbed_run
from torch import nn

import anpgpu
from anpgpu.estimators.sweep import Block
from anpgpu.kernels.noise import Counters
from anpgpu.registry import CELLS, ESTIMATORS
from anpgpu.runtime.settings import resolve

TIME, BATCH, ROLLOUTS, HIDDEN, SIGMA, GAMMA = 4, 2, 5, 6, 0.4, 0.7


def network(perturbation):
    torch.manual_seed(0)
    rnn = anpgpu.RNN(3, HIDDEN, perturbation=perturbation).double()
    return rnn, torch.randn(TIME, BATCH, 3).double(), torch.randn(TIME, BATCH, HIDDEN).double()


def drawn_seed():
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(3))


def gradient(perturbation):
    rnn, inputs, targets = network(perturbation)
    generator = torch.Generator().manual_seed(3)
    anpgpu.estimate_grad_(rnn, None, inputs, targets, generator=generator)
    return rnn.weight_hh_l0.grad


def returns_and_activity():
    """Returns, (T, B, P), activity differences and noise, (T, B, P, H), and states before each step, by hand."""
    rnn, inputs, targets = network(None)
    noise = SIGMA * noise_block(int(drawn_seed()) & (2**64 - 1), (TIME, BATCH, ROLLOUTS, HIDDEN), "rademacher")
    drive = (inputs @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()
    weight_hh = rnn.weight_hh_l0.detach()
    start = torch.zeros(BATCH, HIDDEN).double()
    preact, states = clean_run(drive, weight_hh, start)
    moved, outputs = perturbed_run(drive, weight_hh, start.unsqueeze(1).expand(-1, ROLLOUTS, -1), noise)
    loss = ((outputs - targets.unsqueeze(2)) ** 2).mean(-1) - ((states - targets) ** 2).mean(-1).unsqueeze(-1)
    previous = torch.cat((start.unsqueeze(0), states[:-1]))
    return discounted(loss / (TIME * BATCH), GAMMA), moved - preact.unsqueeze(2), noise, previous


@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("max_memory", [None, (16 << 20) + 4000])
def test_each_return_loses_the_mean_of_the_others(method, max_memory):
    credit, moved, noise, previous = returns_and_activity()
    others = (credit.sum(-1, keepdim=True) - credit) / (ROLLOUTS - 1)
    share = HIDDEN * moved / (moved**2).sum(-1, keepdim=True) if method == "anp" else noise / SIGMA**2
    adjoint = ((credit - others).unsqueeze(-1) * share).mean(2)
    perturbation = anpgpu.Perturbation(method, ROLLOUTS, SIGMA, discount=GAMMA, baseline=True, max_memory=max_memory)
    estimated = gradient(perturbation)
    torch.testing.assert_close(estimated, torch.einsum("tbi,tbj->ij", adjoint, previous))


@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("at_a_time", [ROLLOUTS, 2])
def test_lost_rollouts_are_none_of_the_others(method, at_a_time):
    credit, moved, noise, _ = returns_and_activity()
    losses = credit.clone()
    losses[:-1] -= GAMMA * credit[1:]
    finite = torch.ones(BATCH, ROLLOUTS, dtype=torch.bool)
    finite[0, 1] = finite[1, 0] = finite[1, 3] = False
    share = HIDDEN * moved / (moved**2).sum(-1, keepdim=True) if method == "anp" else noise / SIGMA**2
    expected = torch.zeros(TIME, BATCH, HIDDEN).double()
    for sample in range(BATCH):
        alive = finite[sample].nonzero().flatten().tolist()
        for p in alive:
            others = credit[:, sample, [q for q in alive if q != p]].mean(-1)
            expected[:, sample] += (credit[:, sample, p] - others).unsqueeze(-1) * share[:, sample, p] / len(alive)
    how = anpgpu.Perturbation(method, ROLLOUTS, SIGMA, discount=GAMMA, baseline=True, backend="torch")
    weight_hh = torch.zeros(HIDDEN, HIDDEN).double()
    settings = resolve(how, CELLS["tanh"], weight_hh)
    rule = ESTIMATORS[method].rule(settings, weight_hh, drawn_seed(), finite)
    losses = torch.where(finite, losses, 0)
    for first in range(0, ROLLOUTS, at_a_time):
        part = slice(first, min(first + at_a_time, ROLLOUTS))
        block = Block(part, settings.options._replace(rollouts=part.stop - first), Counters(rollout=first))
        rule.add(block, losses[..., part], moved[:, :, part])
    torch.testing.assert_close(rule.estimate(finite.sum(1)).sum(0), expected)


def test_least_squares_takes_the_mean_off_before_it_regresses():
    credit, moved, noise, previous = returns_and_activity()
    losses = credit.clone()
    losses[:-1] -= GAMMA * credit[1:]
    expected = torch.zeros(HIDDEN, HIDDEN).double()
    for sample in range(BATCH):
        carry = torch.zeros(ROLLOUTS).double()
        for step in range(TIME - 1, -1, -1):
            activity, target = moved[step, sample], losses[step, sample] + carry
            target = target - target.mean()
            penalty = 0.1 * (activity**2).sum() / ROLLOUTS * torch.eye(HIDDEN)
            adjoint = torch.linalg.solve(activity.T @ activity + penalty, activity.T @ target)
            carry = GAMMA * (target - noise[step, sample] @ adjoint)
            expected += torch.outer(adjoint, previous[step, sample])
    torch.testing.assert_close(
        gradient(anpgpu.Perturbation("anp-ls", ROLLOUTS, SIGMA, discount=GAMMA, ridge=0.1, baseline=True)), expected
    )


# The baseline takes one of 32 equations from the regression, so that "anp-ls" changes more.
@pytest.mark.parametrize(("method", "change"), [("np", 0.01), ("anp", 0.01), ("anp-ls", 0.06)])
def test_it_pays_where_the_noise_is_large_and_changes_little_where_it_is_small(method, change):
    torch.manual_seed(0)
    rnn, readout = nn.RNN(4, 32), nn.Linear(32, 2)
    nn.init.orthogonal_(rnn.weight_hh_l0, 0.9)
    inputs, targets = torch.randn(15, 8, 4), torch.randn(15, 8, 2)

    def alignment(sigma, baseline):
        torch.manual_seed(1)
        rule = anpgpu.Perturbation(method, 32, sigma, discount=0.9, ridge=0.1, baseline=baseline)
        cosines = []
        for _ in range(20):
            rnn.zero_grad()
            anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=rule)
            cosines.append(torch.cosine_similarity(rnn.weight_hh_l0.grad.flatten(), truth, dim=0))
        return float(torch.stack(cosines).mean())

    nn.functional.mse_loss(readout(rnn(inputs)[0]), targets).backward()
    truth = rnn.weight_hh_l0.grad.flatten()
    assert alignment(0.5, True) > alignment(0.5, False) + 0.03
    assert abs(alignment(1e-3, True) - alignment(1e-3, False)) < change


def test_one_rollout_has_no_others():
    with pytest.raises(ValueError, match="baseline=True needs at least 2 rollouts, got rollouts=1"):
        anpgpu.Perturbation(rollouts=1, baseline=True)
    with pytest.raises(TypeError, match="baseline must be a bool, got 'yes'"):
        anpgpu.Perturbation(baseline="yes")
