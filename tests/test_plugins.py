"""A cell and an estimator that are not in the library, each registered in one place, run everywhere.

The cell is a leaky unit, h_t = (1 - a) h_{t-1} + a tanh(u_t), u_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh. The
estimator regresses the return on the activity difference of each unit alone,
lam_t = sum_p c_t delta_a_t / sum_p delta_a_t^2. The oracle is a loop over steps under autograd in float64.
"""

import pytest
import torch
from test_estimators import assert_unbiased, flat
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu.estimators.rules import Rule
from anpgpu.kernels.cell import CellForms, TanhDeviation, quotient_rows
from anpgpu.network.cells import Cell
from anpgpu.registry import CELLS, ESTIMATORS
from anpgpu.runtime.memory import Division

T, B, I, H, O, P = 7, 3, 2, 5, 4, 6  # noqa: E741  (the design's names)
LEAK = 0.3


class LeakyDeviation(TanhDeviation):
    """a (tanh(u + delta_u) - tanh(u)) + (1 - a) delta_h_{t-1}."""

    def step(self, step, delta_a, before, scratch):
        # The result may overwrite `before`.
        held = 0 if before is None else (1 - LEAK) * before
        return super().step(step, delta_a, before, scratch).mul_(LEAK).add_(held)


class Leaky(Cell):
    """A leaky unit, on the torch backend alone."""

    forms = CellForms("leaky", lambda preact, _: quotient_rows(preact, preact.tanh()), LeakyDeviation, None, None, None)
    native = False

    @classmethod
    def run_layer(cls, layer, inputs, h_0):
        sides = []
        for number, (weights, start) in enumerate(zip(layer, h_0, strict=True)):
            drive = nn.functional.linear(inputs.flip(0) if number else inputs, weights.weight_ih, weights.bias_ih)
            states = [start]
            for step in drive:
                preact = step + nn.functional.linear(states[-1], weights.weight_hh, weights.bias_hh)
                states.append((1 - LEAK) * states[-1] + LEAK * preact.tanh())
            sides.append(torch.stack(states))
        outputs = [states[1:].flip(0) if number else states[1:] for number, states in enumerate(sides)]
        return torch.cat(outputs, dim=-1), sides

    @classmethod
    def first_state_gradient(cls, adjoint, weights, run):
        # dL/dh_1 = adjoint / (a phi'); its share 1 - a reaches h_0 past the nonlinearity.
        preact = cls.preactivations(weights, run)[0]
        return adjoint @ weights.weight_hh + (1 - LEAK) / LEAK * adjoint / (1 - preact.tanh().square())


class LeakyRNN(anpgpu.RNN):
    """The module of the leaky unit."""

    cell = "leaky"


class UnitRegression(Rule):
    """Regression of the return on each unit's activity difference alone, over all rollouts of a sample at once."""

    whole_samples = True

    def add(self, block, delta_loss, delta_a):
        credit = delta_loss.clone()
        for step in range(len(credit) - 1, -1, -1):
            credit[step] += self.settings.discount * (self.carry if step + 1 == len(credit) else credit[step + 1])
        self.carry = credit[0]
        power = torch.where(self.finite.unsqueeze(-1), delta_a, 0).square().sum(2)
        halves = [torch.einsum("tbp,tbph->tbh", credit[..., h::2], delta_a[:, :, h::2]) / power for h in (0, 1)]
        self.add_sums(torch.stack(halves))

    def estimate(self, counts):
        return self.taken()


@pytest.fixture(autouse=True)
def _registered():
    """Register both for a test; nothing else in the library changes."""
    CELLS.add("leaky")(Leaky)
    ESTIMATORS.add("per-unit")(UnitRegression)
    yield
    del CELLS["leaky"], ESTIMATORS["per-unit"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def leaky(perturbation=None, **options):
    torch.manual_seed(3)
    return LeakyRNN(I, H, dtype=torch.float64, perturbation=perturbation, **options)


NETWORKS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
}


def loss_of(outputs, h_n):
    return (outputs * draw(*outputs.shape, seed=3)).sum() + (h_n.square() * draw(*h_n.shape, seed=4)).sum()


def backward_through(rnn, inputs, hx):
    return flat(torch.autograd.grad(loss_of(*rnn(inputs, hx)), [*rnn.parameters(), inputs, hx]))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_clean_run_of_a_new_cell_is_its_own(network):
    rnn = leaky(**NETWORKS[network])
    inputs, hx = draw(T, B, I), draw(len(rnn.all_weights), B, H, seed=1)
    with torch.no_grad():
        outputs, h_n = rnn(inputs, hx)
    learning, _ = rnn(inputs, hx)
    assert_close(learning, outputs, "float64")
    # By hand: the first layer's forward direction, first step.
    w_ih, w_hh, b_ih, b_hh = rnn.all_weights[0]
    first = (1 - LEAK) * hx[0] + LEAK * torch.tanh(inputs[0] @ w_ih.T + b_ih + hx[0] @ w_hh.T + b_hh)
    if rnn.num_layers == 1:
        assert_close(outputs[0], first, "float64")
        assert_close(outputs[-1], h_n[0], "float64")
    packed = nn.utils.rnn.pack_padded_sequence(inputs, [T, 3, 5], enforce_sorted=False)
    padded, _ = nn.utils.rnn.pad_packed_sequence(rnn(packed, hx)[0])
    if not rnn.bidirectional:
        assert_close(padded[:3], outputs[:3], "float64")


@pytest.mark.parametrize("network", NETWORKS)
def test_np_of_a_new_cell_is_unbiased(network):
    exact = leaky(anpgpu.Perturbation("bptt"), **NETWORKS[network])
    rnn = leaky(anpgpu.Perturbation("np", rollouts=32, sigma=1e-4), **NETWORKS[network])
    inputs = draw(T, B, I).requires_grad_()
    hx = draw(len(rnn.all_weights), B, H, seed=1).mul_(0.5).requires_grad_()
    truth = backward_through(exact, inputs, hx)
    torch.manual_seed(21)
    assert_unbiased([backward_through(rnn, inputs, hx) for _ in range(100)], truth)


def estimate(how, network="one layer", *, module=leaky, loss="mse"):
    """Return all results of `estimate_grad_` for a network as one vector."""
    rnn = module(**NETWORKS[network])
    torch.manual_seed(4)
    head = nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=torch.float64)
    inputs = draw(T, B, I).requires_grad_()
    hx = draw(len(rnn.all_weights), B, H, seed=1).requires_grad_()
    seen = anpgpu.estimate_grad_(
        rnn, head, inputs, draw(T, B, O, seed=2), loss, hx=hx, perturbation=how,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    leaves = [*rnn.parameters(), *head.parameters(), inputs, hx]
    return flat([*(leaf.grad for leaf in leaves), seen.outputs, seen.h_n, seen.loss.view(1)])


DIVISIONS = [Division(2, P, 1), Division(1, P, 3), Division(B, P, T)]


def divided(monkeypatch, division):
    monkeypatch.setattr("anpgpu.runtime.memory.divide", lambda *_: division)


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["np", "anp-ls", "per-unit"])
def test_a_new_cell_and_a_new_estimator_run_in_blocks_and_segments(monkeypatch, method, network, division):
    how = anpgpu.Perturbation(method, rollouts=P, sigma=1e-3, discount=0.9)
    whole = estimate(how, network)
    rnn = leaky(how, **NETWORKS[network])
    inputs, hx = draw(T, B, I).requires_grad_(), draw(len(rnn.all_weights), B, H, seed=1).requires_grad_()
    torch.manual_seed(8)
    through = backward_through(rnn, inputs, hx)
    divided(monkeypatch, division)
    assert_close(estimate(how, network), whole, "float64")
    torch.manual_seed(8)
    assert_close(backward_through(rnn, inputs, hx), through, "float64")


def black_box(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def plain(**options):
    torch.manual_seed(3)
    return anpgpu.RNN(I, H, dtype=torch.float64, **options)


@pytest.mark.parametrize("division", DIVISIONS, ids=str)
@pytest.mark.parametrize("module", [leaky, plain])
def test_they_run_with_a_black_box(monkeypatch, module, division):
    how = anpgpu.Perturbation("per-unit", rollouts=P, sigma=1e-3)
    whole = estimate(how, module=module, loss=black_box)
    divided(monkeypatch, division)
    assert_close(estimate(how, module=module, loss=black_box), whole, "float64")


def test_one_step_of_the_new_estimator_is_node_perturbation():
    # delta_a is then the noise itself, whose squares add up to P sigma^2.
    gradients = []
    for method in ("per-unit", "np"):
        rnn = plain(perturbation=anpgpu.Perturbation(method, rollouts=P, sigma=1e-4))
        torch.manual_seed(9)
        rnn(draw(1, B, I))[0].square().sum().backward()
        gradients.append(rnn.weight_ih_l0.grad)
    assert_close(*gradients, "float64")


def test_the_new_estimator_trains_a_network():
    torch.manual_seed(1)
    rnn, head = LeakyRNN(1, 16, perturbation=anpgpu.Perturbation("per-unit", rollouts=16)), nn.Linear(16, 1)
    optimiser = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        inputs = torch.randn(8, 16, 1)
        optimiser.zero_grad()
        # The target is the mean of the inputs so far.
        targets = inputs.cumsum(0) / torch.arange(1, 9).view(-1, 1, 1)
        losses.append(float(anpgpu.estimate_grad_(rnn, head, inputs, targets).loss))
        optimiser.step()
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_a_backend_without_the_cell_is_refused_with_those_that_have_it():
    rnn = LeakyRNN(I, H, perturbation=anpgpu.Perturbation("np", rollouts=2, backend="numba"))
    with pytest.raises(ValueError, match="cell 'leaky' has no form on backend 'numba', only on torch"):
        rnn(torch.randn(T, B, I))
    with pytest.raises(ValueError, match="cell 'leaky' has no form on backend 'numba', only on torch"):
        anpgpu.estimate_grad_(rnn, None, torch.randn(T, B, I), torch.randn(T, B, H))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="there is a cell 'leaky' already"):
        CELLS.add("leaky")(Leaky)
    with pytest.raises(ValueError, match="there is a method 'np' already"):
        ESTIMATORS.add("np")(UnitRegression)


def test_learned_feedback_refuses_a_cell_that_says_nothing_of_its_steps():
    how = anpgpu.Perturbation("anp-feedback", rollouts=4)
    told = "method='anp-feedback' needs a cell h = phi\\(a\\), or one that.*'leaky' is neither: use method='anp-ls'"
    with pytest.raises(ValueError, match=told):
        leaky(how)(draw(T, B, I))
    rnn = leaky()
    with pytest.raises(ValueError, match=told):
        anpgpu.estimate_grad_(rnn, None, draw(T, B, I), draw(T, B, H), perturbation=how)
    assert anpgpu.estimator_state(rnn) == {}
