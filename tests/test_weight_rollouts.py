"""Weight perturbation by both faces against perturbed networks, run by hand, rollout by rollout."""

import pytest
import torch
from oracles import noise_block
from tolerances import assert_close

import anpgpu
from anpgpu import Perturbation
from anpgpu.kernels.noise import Purpose

T, B, I, H, P = 4, 3, 2, 3, 4  # noqa: E741  (the design's names)
SEED, SIGMA = 2**62 + 12345, 1e-3


def run_by_hand(layers, inputs, h_0, masks):
    """Outputs, (T, D * H), and final states, (layers * D, H), of one sample; a direction is (W_ih, W_hh, b)."""
    values, final = inputs, []
    for number, layer in enumerate(layers):
        values = values if number == 0 else values * masks[number - 1]
        sides = []
        for side, (weight_ih, weight_hh, bias) in enumerate(layer):
            state, states = h_0[len(layer) * number + side], []
            for step in values.flip(0) if side else values:
                state = torch.tanh(weight_ih @ step + weight_hh @ state + bias)
                states.append(state)
            final.append(state)
            sides.append(torch.stack(states[::-1] if side else states))
        values = torch.cat(sides, -1)
    return values, torch.stack(final)


def sides_of(rnn):
    """W_ih, W_hh and b of every layer and direction."""
    detached = (map(torch.Tensor.detach, side) for side in rnn.all_weights)
    return [(weight_ih, weight_hh, b_ih + b_hh) for weight_ih, weight_hh, b_ih, b_hh in detached]


def mean_of_products(loss, sides, seed):
    """Sum over samples, mean over rollouts, of loss differences times noise, over sigma: [W_ih | W_hh | b] each.

    loss: from the number of a sample and all sides' weights.
    """
    noise = [
        noise_block(seed, (B, H, P, w_ih.shape[1] + H + 1), "rademacher", purpose=int(Purpose.WEIGHTS), layer=layer)
        for layer, (w_ih, _, _) in enumerate(sides)
    ]
    expected = [torch.zeros_like(block[0, :, 0]) for block in noise]
    for sample in range(B):
        clean = loss(sample, sides)
        for rollout in range(P):
            errors = [block[sample, :, rollout] for block in noise]
            moved = [
                (w_ih + SIGMA * e[:, : w_ih.shape[1]], w_hh + SIGMA * e[:, w_ih.shape[1] : -1], b + SIGMA * e[:, -1])
                for (w_ih, w_hh, b), e in zip(sides, errors, strict=True)
            ]
            change = loss(sample, moved) - clean
            for place, error in enumerate(errors):
                expected[place] += change * error / (SIGMA * P)
    return expected


def assert_gradients(rnn, expected):
    for weights, total in zip(rnn.all_weights, expected, strict=True):
        w_ih, w_hh, b_ih, b_hh = (weight.grad for weight in weights)
        assert_close(torch.cat((w_ih, w_hh, b_ih.unsqueeze(1)), 1), total, "two_runs")
        assert_close(b_hh, b_ih, "float64")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_are_the_mean_of_loss_differences_times_noise(bidirectional, dropout, monkeypatch):
    """Of every layer, direction and sample, through dropout, from outputs and final states."""
    torch.manual_seed(0)
    how = Perturbation("wp", rollouts=P, sigma=SIGMA, rank=None)
    rnn = anpgpu.RNN(I, H, 2, dropout=dropout, bidirectional=bidirectional, dtype=torch.float64, perturbation=how)
    directions = 1 + bidirectional
    inputs, h_0 = torch.randn(T, B, I).double(), torch.randn(2 * directions, B, H).double()
    on_outputs, on_final = torch.randn(T, B, directions * H).double(), torch.randn(2 * directions, B, H).double()
    masks, draw = [], torch.nn.functional.dropout
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda *given: masks.append(draw(*given)) or masks[-1])
    monkeypatch.setattr("anpgpu.modules.new_seed", lambda device: torch.tensor(SEED, device=device))
    outputs, h_n = rnn(inputs, h_0)
    ((outputs * on_outputs).sum() + (h_n * on_final).sum()).backward()
    assert len(masks) == bool(dropout)

    def loss(sample, weights):
        own = [mask[:, sample] for mask in masks] or [torch.ones(()).double()]
        layers = [weights[:directions], weights[directions:]]
        values, final = run_by_hand(layers, inputs[:, sample], h_0[:, sample], own)
        return (values * on_outputs[:, sample]).sum() + (final * on_final[:, sample]).sum()

    assert_gradients(rnn, mean_of_products(loss, sides_of(rnn), SEED))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_measured_loss_counts_the_steps_of_each_sequence_alone(bidirectional):
    torch.manual_seed(0)
    how = Perturbation("wp", rollouts=P, sigma=SIGMA, rank=None)
    rnn = anpgpu.RNN(I, H, 2, bidirectional=bidirectional, dtype=torch.float64, perturbation=how)
    directions, lengths = 1 + bidirectional, [2, T, 3]
    inputs, targets = torch.randn(T, B, I).double(), torch.randn(T, B, directions * H).double()
    h_0 = torch.randn(2 * directions, B, H).double()
    generator = torch.Generator().manual_seed(3)
    anpgpu.estimate_grad_(rnn, None, inputs, targets, hx=h_0, lengths=lengths, generator=generator)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator.manual_seed(3))

    def loss(sample, weights):
        layers, steps = [weights[:directions], weights[directions:]], slice(lengths[sample])
        values, _ = run_by_hand(layers, inputs[steps, sample], h_0[:, sample], [torch.ones(()).double()])
        return (values - targets[steps, sample]).square().mean(-1).sum() / sum(lengths)

    assert_gradients(rnn, mean_of_products(loss, sides_of(rnn), int(seed) & (2**64 - 1)))
