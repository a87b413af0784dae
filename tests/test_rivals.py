"""Rivals of the study: against autograd in float64 where they are exact, by z-test, and by their limits."""

import functools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

import rivals_forward  # noqa: E402  (found through the line above)
from rivals import CELLS, RIVALS  # noqa: E402
from rivals_backward import Truncated  # noqa: E402

STEPS, BATCH, INPUTS, HIDDEN, OUTPUTS = 7, 3, 2, 5, 4
Z_BOUND = 4.3
"""A right mean exceeds it with probability 1.7e-5."""


def built(cell, seed=0, hidden=HIDDEN):
    torch.manual_seed(seed)
    rnn, readout = CELLS[cell](INPUTS, hidden).double(), nn.Linear(hidden, OUTPUTS).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            # Larger than torch's, so that memory does not fade within the test's few steps.
            parameter.normal_(0, 1 / math.sqrt(hidden))
    return rnn, readout


def data(seed=1, steps=STEPS, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, batch, INPUTS, generator=generator, dtype=torch.float64)
    targets = torch.randint(OUTPUTS, (steps, batch), generator=generator)
    targets[0, 0] = -100
    return inputs, targets


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def at_the_end(outputs, targets):
    return F.mse_loss(outputs[-1], targets)


def first_state(cell, batch=BATCH, hidden=HIDDEN):
    state = torch.randn(1, batch, hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (state, state.flip(2)) if cell == "lstm" else state


def by_rival(name, rnn, readout, inputs, targets, loss_of=cross_entropy, hx=None):
    make = RIVALS[name] if isinstance(name, str) else name
    for module in (rnn, readout):
        module.zero_grad()
    outcome = make(rnn, readout).grad_(inputs, targets, loss_of, hx)
    return outcome, [parameter.grad.clone() for module in (rnn, readout) for parameter in module.parameters()]


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def apart(left, right):
    return max(float((one - other).abs().max()) for one, other in zip(left, right, strict=True))


EXACT = {"rtrl": "rtrl", "truncation as long as the window": functools.partial(Truncated, depth=STEPS)}


@pytest.mark.parametrize("rival", EXACT)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("begun", [False, True])
def test_exact_rivals_give_the_gradient_of_autograd(rival, cell, per_step, begun):
    rnn, readout = built(cell)
    inputs, targets = data()
    loss_of = cross_entropy if per_step else at_the_end
    targets = targets if per_step else torch.randn(BATCH, OUTPUTS, dtype=torch.float64)
    state = first_state(cell) if begun else None
    outcome, gradients = by_rival(EXACT[rival], rnn, readout, inputs, targets, loss_of, state)
    hidden, last = rnn(inputs, state)
    loss = loss_of(readout(hidden), targets)
    exact = torch.autograd.grad(loss, [*rnn.parameters(), *readout.parameters()])
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert_equal(gradients, exact)
    pairs = zip(outcome.last, last, strict=True) if cell == "lstm" else [(outcome.last, last)]
    for found, expected in pairs:
        assert torch.equal(found, expected)
        assert not found.requires_grad
    # The test would see a step too few.
    short = by_rival(functools.partial(Truncated, depth=STEPS - 1), rnn, readout, inputs, targets, loss_of, state)
    assert apart(short[1], exact) > 1e-6


def cell_of(rnn):
    """Return torch's cell with the parameters of a network."""
    make = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}[type(rnn)]
    cell = make(rnn.input_size, rnn.hidden_size).double()
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(rnn, f"{name}_l0"))
    return cell


def cut(state):
    return tuple(value.detach() for value in state) if isinstance(state, tuple) else state.detach()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_truncation_detaches_every_losss_past(depth, cell):
    rnn, readout = built(cell)
    inputs, targets = data()
    step, zero = cell_of(rnn), torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    states = [(zero, zero) if cell == "lstm" else zero]
    for values in inputs:
        states.append(cut(step(values, states[-1])))
    outputs = []
    for last in range(STEPS):
        first = max(0, last + 1 - depth)
        state = states[first]
        for values in inputs[first : last + 1]:
            state = step(values, state)
        outputs.append(readout(state[0] if cell == "lstm" else state))
    loss = cross_entropy(torch.stack(outputs), targets)
    expected = torch.autograd.grad(loss, [*rnn.parameters(), *readout.parameters()])
    _, gradients = by_rival(functools.partial(Truncated, depth=depth), rnn, readout, inputs, targets)
    assert_equal(gradients, expected)


def test_truncation_needs_a_step():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Truncated(*built("rnn"), depth=0)


@pytest.mark.parametrize("cell", CELLS)
def test_snap_is_exact_where_recurrent_weights_are_diagonal(cell):
    rnn, readout = built(cell)
    inputs, targets = data()
    gradients, exact = (by_rival(name, rnn, readout, inputs, targets)[1] for name in ("snap-1", "bptt"))
    assert apart(gradients, exact) > 1e-4
    with torch.no_grad():
        blocks = rnn.weight_hh_l0.view(-1, HIDDEN, HIDDEN)
        blocks.mul_(torch.eye(HIDDEN, dtype=torch.float64))
    gradients, exact = (by_rival(name, rnn, readout, inputs, targets)[1] for name in ("snap-1", "bptt"))
    # W_hh's entries off the diagonal are zero, not missing: their gradients are exact, too.
    assert_equal(gradients, exact)


def test_snap_by_hand():
    # One unit, two steps, h1 = tanh(w_i x1), h2 = tanh(w_i x2 + w_h h1): its own path is all there is.
    rnn, readout = nn.RNN(1, 1).double(), nn.Linear(1, 1).double()
    with torch.no_grad():
        for parameter in (*rnn.parameters(), *readout.parameters()):
            parameter.zero_()
        rnn.weight_ih_l0.fill_(0.5)
        rnn.weight_hh_l0.fill_(2.0)
        readout.weight.fill_(1.0)
    inputs = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    h_1 = math.tanh(0.5)
    h_2 = math.tanh(-0.5 + 2 * h_1)
    slope_1, slope_2 = 1 - h_1**2, 1 - h_2**2
    trace_1 = slope_1
    trace_2 = slope_2 * (2 * trace_1 - 1)
    targets = torch.zeros(2, 1, 1, dtype=torch.float64)
    by_rival("snap-1", rnn, readout, inputs, targets, F.mse_loss)
    # The loss is the mean of h_1^2 and h_2^2.
    assert rnn.weight_ih_l0.grad.item() == pytest.approx(h_1 * trace_1 + h_2 * trace_2)
    assert rnn.weight_hh_l0.grad.item() == pytest.approx(h_2 * slope_2 * h_1)
    assert rnn.bias_hh_l0.grad.item() == pytest.approx(h_1 * slope_1 + h_2 * slope_2 * (1 + 2 * slope_1))


def test_rflo_is_a_network_whose_units_pass_on_a_leak():
    rnn, readout = built("rnn")
    inputs, targets = data()
    leak, state = rivals_forward.LEAK, torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    outputs = []
    for values in inputs:
        # The value is that of the network; the gradient is RFLO's.
        new = F.linear(values, rnn.weight_ih_l0, rnn.bias_ih_l0) + F.linear(
            state.detach(), rnn.weight_hh_l0, rnn.bias_hh_l0
        )
        state = torch.tanh(new) + leak * (state - state.detach())
        outputs.append(readout(state))
    loss = cross_entropy(torch.stack(outputs), targets)
    expected = torch.autograd.grad(loss, [*rnn.parameters(), *readout.parameters()])
    assert_equal(by_rival("rflo", rnn, readout, inputs, targets)[1], expected)


def test_without_a_leak_rflo_is_one_step_truncation(monkeypatch):
    rnn, readout = built("rnn")
    truncated, leaking = (by_rival(name, rnn, readout, *data())[1] for name in ("bptt-1", "rflo"))
    assert apart(truncated, leaking) > 1e-4
    monkeypatch.setattr(rivals_forward, "LEAK", 0.0)
    assert_equal(by_rival("rflo", rnn, readout, *data())[1], truncated)


def detached_gates(cell, rnn, inputs):
    """Return the hidden states of a network whose gates see detached states: e-prop is BPTT of it."""
    by_input = F.linear(inputs, rnn.weight_ih_l0, rnn.bias_ih_l0)
    h = c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    hidden = []
    for values in by_input:
        by_state = F.linear(h.detach(), rnn.weight_hh_l0, rnn.bias_hh_l0)
        if cell == "gru":
            (r_in, z_in, n_in), (r_by, z_by, n_by) = values.chunk(3, -1), by_state.chunk(3, -1)
            r, z = torch.sigmoid(r_in + r_by), torch.sigmoid(z_in + z_by)
            n = torch.tanh(n_in + r * n_by)
            # z h' passes the state on; z (h' - n) as a function of the gate sees it detached.
            h = n + z * (h.detach() - n) + z.detach() * (h - h.detach())
        else:
            i, f, g, o = (values + by_state).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        hidden.append(h)
    return torch.stack(hidden)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_e_prop_is_bptt_through_states_alone(cell):
    rnn, readout = built(cell)
    inputs, targets = data()
    hidden = detached_gates(cell, rnn, inputs)
    assert torch.allclose(hidden, rnn(inputs)[0])
    expected = torch.autograd.grad(cross_entropy(readout(hidden), targets), [*rnn.parameters(), *readout.parameters()])
    gradients = by_rival("e-prop", rnn, readout, inputs, targets)[1]
    assert_equal(gradients, expected)
    assert apart(gradients, by_rival("bptt", rnn, readout, inputs, targets)[1]) > 1e-4


@pytest.mark.parametrize("cell", CELLS)
def test_uoro_is_unbiased(cell):
    calls, lanes, directions = 60, 64, 6
    rnn, readout = built(cell, hidden=3)
    inputs, targets = data(batch=1)
    exact = by_rival("bptt", rnn, readout, inputs, targets)[1]
    # Each lane of a batch of equal sequences draws its own signs; their mean loss is that of one.
    repeated = inputs.expand(-1, lanes, -1).contiguous(), targets.expand(-1, lanes).contiguous()
    errors = torch.stack(
        [
            torch.cat([(one - other).flatten() for one, other in zip(found[:4], exact[:4], strict=True)])
            for found in (by_rival("uoro", rnn, readout, *repeated)[1] for _ in range(calls))
        ]
    )
    size = torch.cat([gradient.flatten() for gradient in exact[:4]])
    along = torch.randn(len(size), directions, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    seen = errors @ torch.cat((along, size.unsqueeze(1)), 1)
    z = seen.mean(0) / seen.std(0) * math.sqrt(calls)
    assert (seen.std(0) > 0).all()
    assert z.abs().max() < Z_BOUND
    # The exact gradient's own length is far outside, so that a factor or a sign would be seen.
    assert (size @ size) / seen[:, -1].std() * math.sqrt(calls) > 2 * Z_BOUND


CONTINUING = [
    ("rtrl", "rnn"),
    ("rtrl", "gru"),
    ("rtrl", "lstm"),
    ("uoro", "rnn"),
    ("uoro", "lstm"),
    *(("snap-1", cell) for cell in CELLS),
    ("rflo", "rnn"),
]
CONTINUING += [("e-prop", "gru"), ("e-prop", "lstm")]


@pytest.mark.parametrize("lengths", [(1,) * STEPS, (3, 1, 3)], ids=["one step", "some steps"])
@pytest.mark.parametrize(("name", "cell"), CONTINUING)
def test_windows_carry_on_where_the_last_one_ended(name, cell, lengths):
    rnn, readout = built(cell)
    inputs, targets = data()
    targets = torch.where(targets < 0, 0, targets)
    # UORO draws a sign for every step: the same ones, in whatever windows.
    torch.manual_seed(0)
    _, whole = by_rival(name, rnn, readout, inputs, targets)
    torch.manual_seed(0)
    rival, state = RIVALS[name](rnn, readout), None
    for module in (rnn, readout):
        module.zero_grad()
    for values, wanted in zip(inputs.split(lengths), targets.split(lengths), strict=True):

        def share(outputs, targets):
            return cross_entropy(outputs, targets) * len(outputs)

        _, state = rival.grad_(values, wanted, share, state)
    # The mean over all steps is a T-th of the sum of the steps' means.
    parts = [parameter.grad / STEPS for module in (rnn, readout) for parameter in module.parameters()]
    assert_equal(parts, whole)
    # Without a state a window begins anew.
    for module in (rnn, readout):
        module.zero_grad()
    torch.manual_seed(0)
    rival.grad_(inputs, targets, cross_entropy)
    assert_equal([parameter.grad for module in (rnn, readout) for parameter in module.parameters()], whole)


@pytest.mark.parametrize("name", RIVALS)
def test_gradients_are_added_and_readouts_are_exact(name):
    cell = "gru" if name == "e-prop" else "rnn"
    rnn, readout = built(cell)
    inputs, targets = data()
    torch.manual_seed(0)
    _, once = by_rival(name, rnn, readout, inputs, targets)
    torch.manual_seed(0)
    RIVALS[name](rnn, readout).grad_(inputs, targets, cross_entropy)
    twice = [parameter.grad for module in (rnn, readout) for parameter in module.parameters()]
    assert_equal(twice, [2 * gradient for gradient in once])
    exact = by_rival("bptt", rnn, readout, inputs, targets)[1]
    assert_equal(once[4:], exact[4:])


@pytest.mark.parametrize(
    ("name", "rnn", "message"),
    [
        ("e-prop", nn.RNN(2, 3), "not for rnn: its path is empty there"),
        ("rflo", nn.GRU(2, 3), "not for gru: use 'e-prop'"),
        ("rtrl", nn.RNN(2, 3, 2), "one layer"),
        ("snap-1", nn.RNN(2, 3, nonlinearity="relu"), "relu"),
        ("uoro", nn.LSTM(2, 3, bidirectional=True), "bidirectional=True"),
        ("bptt-1", nn.LSTM(2, 3, proj_size=2), "proj_size=2"),
        ("bptt-8", nn.RNN(2, 3, batch_first=True), "batch_first=True"),
        ("rtrl", nn.RNN(2, 3, bias=False), "bias=False"),
    ],
)
def test_rivals_refuse_what_they_are_not_written_for(name, rnn, message):
    with pytest.raises(ValueError, match=message):
        RIVALS[name](rnn, nn.Linear(3, 2))
