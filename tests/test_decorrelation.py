"""Decorrelation: the rule and its gradients against the equations written out, and its use in training.

The oracles run step by step and sample by sample on D x; they never form W D.
"""

import copy

import numpy as np
import pytest
import torch
from decorrelation_cases import (
    KINDS,
    METHODS,
    RATE,
    B,
    H,
    I,
    O,
    T,
    decorrelated,
    draw,
    gradients_of,
    network,
    originals,
)
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.decorrelation import Decorrelate, Decorrelation, squared_correlation

LENGTHS = [4, 6, 1]


class Seen:
    """The inputs of every weight of a network: a list of (x, D x) per weight."""

    def __init__(self, rnn, matrices, weights, inputs, hx, lengths):
        self.by_name = {name: [[] for _ in range(len(inputs))] for name in weights if name.startswith("weight")}
        self.outputs = []
        phi = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu
        sides = ("", "_reverse") if rnn.bidirectional else ("",)
        for sample in range(inputs.shape[1]):
            length = lengths[sample]
            values = list(inputs[:length, sample])
            for layer in range(rnn.num_layers):
                outputs = []
                for side, suffix in enumerate(sides):
                    h = hx[layer * len(sides) + side, sample]
                    states = []
                    for step, x in enumerate(reversed(values) if side else values):
                        a = 0
                        for kind, activity in (("ih", x), ("hh", h)):
                            name = f"weight_{kind}_l{layer}{suffix}"
                            self.by_name[name][step].append(activity)
                            a = a + weights[name] @ (matrices[name] @ activity if name in matrices else activity)
                            a = a + weights.get(name.replace("weight", "bias"), 0)
                        h = phi(a)
                        states.append(h)
                    outputs.append(states[::-1] if side else states)
                values = [torch.cat(states) for states in zip(*outputs, strict=True)]
            self.outputs.append(values)


def rule(matrix, activities, rate):
    """D <- D - rate (mean x^ x^T with zero diagonal) D, by one sum over samples and steps."""
    mean = torch.zeros_like(matrix)
    for activity in activities:
        seen = matrix @ activity
        mean += torch.outer(seen, seen) / len(activities)
    mean -= torch.diag(mean.diag())
    return matrix - rate * mean @ matrix


def detached(rnn):
    return {name: parameter.detach() for name, parameter in originals(rnn).items()}


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [True, False])
def test_every_matrix_follows_the_rule(kind, lengths, average):
    rnn, _, attached = decorrelated(kind)
    attached.average_over_time = average
    inputs, hx = draw(T, B, I), draw(len(rnn.all_weights), B, H)
    before = {name: matrix.clone() for name, matrix in attached.matrices.items()}
    seen = Seen(rnn, before, detached(rnn), inputs, hx, lengths or [T] * B)
    seen.by_name["readout"] = [[outputs[t] for outputs in seen.outputs if t < len(outputs)] for t in range(T)]
    attached.update_(inputs, hx, lengths)
    assert attached.matrices.keys() == seen.by_name.keys()
    for name, matrix in attached.matrices.items():
        expected = before[name]
        steps = seen.by_name[name]
        for activities in [[activity for step in steps for activity in step]] if average else steps:
            expected = rule(expected, activities, RATE)
        assert_close(matrix - before[name], expected - before[name], "float64")
        assert not torch.equal(matrix, before[name])


def test_one_step_by_hand():
    # Two units, one sample, one step: W_hh sees h_0 = (1, 2) alone, so mean x^ x^T = ((1, 2), (2, 4)).
    rnn = nn.RNN(1, 2)
    attached = Decorrelation(rnn, rate=0.25)
    attached.update_(torch.zeros(1, 1, 1), torch.tensor([[[1.0, 2.0]]]))
    expected = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    assert torch.equal(attached.matrices["weight_hh_l0"], expected)
    assert torch.allclose(rnn.weight_hh_l0, originals(rnn)["weight_hh_l0"] @ expected)


@pytest.mark.parametrize("form", ["batch first", "unbatched", "packed"])
def test_every_layout_gives_the_same(form):
    batch = 1 if form == "unbatched" else B
    inputs, hx = draw(T, batch, I), draw(1, batch, H)
    lengths = LENGTHS if form == "packed" else None
    rnn, _ = network()
    plain = Decorrelation(rnn, inputs=True, rate=RATE)
    plain.update_(inputs, hx, lengths)
    rnn, _ = network(batch_first=form == "batch first")
    other = Decorrelation(rnn, inputs=True, rate=RATE)
    if form == "batch first":
        other.update_(inputs.transpose(0, 1), hx)
    elif form == "unbatched":
        other.update_(inputs[:, 0], hx[:, 0])
    else:
        other.update_(pack_padded_sequence(inputs, torch.tensor(LENGTHS), enforce_sorted=False), hx)
    for name, matrix in plain.matrices.items():
        assert_close(other.matrices[name], matrix, "float64")
    assert len(plain.matrices) == 2


def test_padding_may_hold_anything():
    inputs = draw(T, B, I)
    rnn, _ = network("bidirectional")
    attached = Decorrelation(rnn, inputs=True, rate=RATE)
    attached.update_(inputs, lengths=LENGTHS)
    for sample, length in enumerate(LENGTHS):
        inputs[length:, sample] = torch.nan
    again, _ = network("bidirectional")
    other = Decorrelation(again, inputs=True, rate=RATE)
    other.update_(inputs, lengths=LENGTHS)
    for name, matrix in attached.matrices.items():
        assert torch.equal(other.matrices[name], matrix)


@pytest.mark.parametrize("through", ["backward", "estimate_grad_", "torch.nn.RNN"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_are_those_of_the_equations(kind, through):
    rnn, readout, attached = decorrelated(kind)
    rnn.perturbation = Perturbation("bptt")
    if through == "torch.nn.RNN":
        anpgpu.unswap_(rnn)
    inputs, hx = draw(T, B, I).requires_grad_(), draw(len(rnn.all_weights), B, H).requires_grad_()
    targets = draw(T, B, O)
    weights = {name: parameter.detach().requires_grad_() for name, parameter in originals(rnn).items()}
    head = {name: parameter.detach().requires_grad_() for name, parameter in originals(readout).items()}
    seen = Seen(rnn, attached.matrices, weights, inputs, hx, [T] * B)
    hidden = torch.stack([torch.stack(states) for states in seen.outputs], dim=1)
    outputs = hidden @ attached.matrices["readout"].t() @ head["weight"].t() + head["bias"]
    wanted = [*weights.values(), *head.values(), inputs, hx]
    expected = torch.autograd.grad((outputs - targets).square().mean(), wanted)
    if through == "estimate_grad_":
        estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, hx=hx)
        assert_close(estimate.outputs, outputs, "float64")
    else:
        nn.functional.mse_loss(readout(rnn(inputs, hx)[0]), targets).backward()
    leaves = [*(originals(rnn)[name] for name in weights), *(originals(readout)[name] for name in head), inputs, hx]
    for leaf, exact in zip(leaves, expected, strict=True):
        assert_close(leaf.grad, exact, "float64")


@pytest.mark.parametrize("through", ["backward", "estimate_grad_"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one layer", "bidirectional"])
def test_every_methods_estimate_is_multiplied_by_the_transposed_matrix(kind, method, through):
    rnn, readout, attached = decorrelated(kind)
    matrices = {name: matrix.clone() for name, matrix in attached.matrices.items()}
    estimated = gradients_of(rnn, readout, method, through)
    attached.fold_()
    rnn.zero_grad()
    readout.zero_grad()
    plain = gradients_of(rnn, readout, method, through)
    assert estimated.keys() == plain.keys()
    for name, gradient in plain.items():
        matrix = matrices.get("readout" if name == "readout.weight" else name)
        assert_close(estimated[name], gradient if matrix is None else gradient @ matrix.t(), "float64")
        assert gradient.abs().max() > 0


def test_least_squares_reproduces_the_equations():
    # With more rollouts than units the adjoint is BPTT's, so that the oracle shares no code with the estimator.
    rnn, readout, attached = decorrelated()
    estimated = gradients_of(rnn, readout, "anp-ls", "backward", ridge=1e-9, discount=1.0)
    rnn.zero_grad()
    exact = gradients_of(rnn, readout, "bptt", "backward")
    for name in ("weight_hh_l0", "weight_ih_l0"):
        assert torch.cosine_similarity(estimated[name].flatten(), exact[name].flatten(), 0) > 0.9999
    assert len(attached.matrices) == 3


@pytest.mark.parametrize("cls", [anpgpu.RNN, nn.RNN])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_leaves_a_plain_network(kind, cls):
    rnn, readout, attached = decorrelated(kind, cls=cls)
    inputs = draw(T, B, I)
    expected = readout(rnn(inputs)[0]).detach()
    before = originals(rnn)
    attached.fold_()
    assert type(rnn) is cls
    plain, _ = network(kind, cls=nn.RNN)
    # Names and order are the same, so that an optimiser's state fits too.
    assert list(rnn.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in rnn.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter is before[name] for name, parameter in rnn.named_parameters())
    plain.load_state_dict(rnn.state_dict())
    assert type(readout) is nn.Linear
    assert_close(readout(plain(inputs)[0]), expected, "float64")
    assert_close(readout(rnn(inputs)[0]), expected, "float64")
    for call in (attached.fold_, lambda: attached.update_(inputs)):
        with pytest.raises(RuntimeError, match=r"last parametrization of weight_ih_l0 .* got none"):
            call()


def test_a_copy_can_be_folded_while_the_original_goes_on():
    rnn, _, attached = decorrelated()
    inputs = draw(T, B, I)
    rnn(inputs)[0].sum().backward()
    attached.update_(inputs)
    expected = rnn(inputs)[0].detach()
    with torch.no_grad():
        rnn(inputs)
    other = copy.deepcopy(rnn)
    Decorrelation(other, inputs=True).fold_()
    assert type(other) is anpgpu.RNN
    assert_close(other(inputs)[0], expected, "float64")
    attached.update_(inputs)
    # Right after an update, a copy of the state is complete.
    copied = copy.deepcopy(rnn)
    assert torch.equal(copied(inputs)[0], rnn(inputs)[0])
    assert not torch.equal(rnn(inputs)[0], expected)


def test_a_parametrization_that_comes_later_is_refused():
    rnn, _, attached = decorrelated()
    parametrizations.orthogonal(rnn, "weight_hh_l0")
    with pytest.raises(RuntimeError, match=r"last parametrization of weight_hh_l0 .* got _Orthogonal"):
        attached.update_(draw(T, B, I))


def test_a_weight_that_has_a_matrix_keeps_it():
    rnn, _, attached = decorrelated()
    again = Decorrelation(rnn, inputs=True, rate=0.5)
    assert again.matrices["weight_hh_l0"] is attached.matrices["weight_hh_l0"]
    assert len(rnn.parametrizations.weight_hh_l0) == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}),
        ({"inputs": True}, {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}),
        ({"hidden": False, "inputs": True}, {"weight_ih_l0"}),
    ],
)
def test_which_weights(options, names):
    rnn, _ = network("two layers")
    attached = Decorrelation(rnn, **options)
    assert attached.matrices.keys() == names
    assert set(rnn.parametrizations) == names


def test_swapping_keeps_the_matrix():
    rnn, _, attached = decorrelated(cls=nn.RNN)
    inputs = draw(T, B, I)
    expected = rnn(inputs)[0]
    assert anpgpu.swap_(rnn) == 1
    assert isinstance(rnn, anpgpu.RNN)
    assert torch.equal(rnn(inputs)[0], expected)
    attached.update_(inputs)
    anpgpu.unswap_(rnn)
    attached.fold_()
    assert type(rnn) is nn.RNN


def trained(rnn, readout, attached, updates):
    optimiser = torch.optim.SGD([*rnn.parameters(), *readout.parameters()], lr=0.1)
    for update in updates:
        optimiser.zero_grad()
        generator = torch.Generator().manual_seed(update)
        anpgpu.estimate_grad_(rnn, readout, draw(T, B + update, I), draw(T, B + update, O), generator=generator)
        optimiser.step()
        attached.update_(draw(T, B + update, I))


def test_exact_resume_in_the_middle_of_every():
    # Three updates a D: it changes with the third, sixth and ninth, and the checkpoint is after the fifth.
    def fresh():
        rnn, readout = network()
        return rnn, readout, Decorrelation(rnn, readout, rate=RATE, every=3)

    whole = fresh()
    trained(*whole, range(10))
    first = fresh()
    trained(*first, range(5))
    second = fresh()
    with torch.no_grad():
        originals(second[0])["weight_hh_l0"].zero_()
    for module, saved in zip(second[:2], first[:2], strict=True):
        module.load_state_dict(saved.state_dict(), strict=True)
    trained(*second, range(5, 10))
    for module, other in zip(second[:2], whole[:2], strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    assert int(whole[0].state_dict()["parametrizations.weight_hh_l0.0.calls"]) == 10


def test_every_few_updates():
    rnn, _ = network()
    attached = Decorrelation(rnn, rate=RATE, every=3)
    matrix = attached.matrices["weight_hh_l0"]
    changed = []
    for _ in range(7):
        before = matrix.clone()
        attached.update_(draw(T, B, I))
        changed.append(not torch.equal(matrix, before))
    assert changed == [False, False, True, False, False, True, False]


def test_an_update_between_forward_and_backward_is_refused():
    rnn, _, attached = decorrelated()
    loss = rnn(draw(T, B, I))[0].sum()
    attached.update_(draw(T, B, I))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_updates_draw_nothing_and_leave_no_gradient():
    rnn, _, attached = decorrelated("two layers", dropout=0.5)
    state = torch.get_rng_state()
    attached.update_(draw(T, B, I))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in rnn.parameters())
    assert not any(matrix.requires_grad for matrix in attached.matrices.values())


@pytest.mark.parametrize("inputs", [100 * torch.ones(T, B, I), torch.full((T, B, I), torch.nan), draw(T, B, I) * 1e30])
def test_an_unstable_step_raises_and_changes_nothing(inputs):
    rnn, readout = network(dtype=torch.float32)
    attached = Decorrelation(rnn, readout, inputs=True, rate=RATE)
    state = {name: value.clone() for name, value in rnn.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"rate=0.1 times .* has norm (\d|inf|nan).* for weight_ih_l0"):
        attached.update_(inputs.float())
    assert all(torch.equal(value, state[name]) for name, value in rnn.state_dict().items())
    # The network still learns from finite inputs.
    attached.update_(draw(T, B, I).float())
    assert all(matrix.isfinite().all() for matrix in attached.matrices.values())


def test_an_empty_batch_changes_no_matrix():
    rnn, _, attached = decorrelated()
    before = {name: matrix.clone() for name, matrix in attached.matrices.items()}
    attached.update_(torch.zeros(T, 0, I, dtype=torch.float64))
    assert all(torch.equal(matrix, before[name]) for name, matrix in attached.matrices.items())
    assert rnn.state_dict()["parametrizations.weight_hh_l0.0.calls"] == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 0.0}, ValueError, "rate must be positive and finite, got 0.0"),
        ({"rate": float("inf")}, ValueError, "got inf"),
        ({"rate": "1"}, TypeError, "rate must be a float, got '1'"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an int, got 1.5"),
        ({"hidden": False}, ValueError, "nothing to decorrelate: hidden=False, inputs=False"),
        ({"readout": nn.ReLU()}, TypeError, "readout must be a torch.nn.Linear or None, got ReLU"),
    ],
)
def test_wrong_options_are_quoted(options, error, message):
    rnn, _ = network()
    with pytest.raises(error, match=message):
        Decorrelation(rnn, **options)
    assert type(rnn) is anpgpu.RNN


def test_wrong_arguments_are_quoted():
    with pytest.raises(TypeError, match="got GRUCell"):
        Decorrelation(nn.GRUCell(I, H))
    rnn, _, attached = decorrelated()
    with pytest.raises(ValueError, match=r"lengths must be in \[0, 6\], got \[0, 6, 7\]"):
        attached.update_(draw(T, B, I), lengths=[0, 6, 7])
    with pytest.raises(RuntimeError, match=r"input\.size"):
        attached.update_(draw(T, B, I + 1))
    with pytest.raises(ValueError, match=r"activity must have shape \(\.\.\., 5\), got \(3, 4\)"):
        Decorrelate(H).update_(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Decorrelate(0)
    assert rnn.state_dict()["parametrizations.weight_hh_l0.0.calls"] == 3


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_types(dtype, kept):
    rnn, _ = network(dtype=dtype)
    attached = Decorrelation(rnn, rate=RATE)
    attached.update_(draw(T, B, I, dtype=dtype))
    assert attached.matrices["weight_hh_l0"].dtype == kept
    assert rnn.weight_hh_l0.dtype == dtype
    rnn(draw(T, B, I, dtype=dtype))[0].sum().backward()
    assert originals(rnn)["weight_hh_l0"].grad.dtype == dtype


def test_autocast_does_not_round_the_product():
    rnn, _, _ = decorrelated(dtype=torch.float32)
    expected = rnn.weight_hh_l0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rnn.weight_hh_l0, expected)
        rnn(draw(T, B, I, dtype=torch.float32))[0].float().sum().backward()
    assert originals(rnn)["weight_hh_l0"].grad.isfinite().all()


def test_the_module_in_front_of_a_head():
    torch.manual_seed(0)
    module = Decorrelate(H, rate=RATE, every=2, dtype=torch.float64)
    activity, valid = draw(T, B, H), torch.arange(T).unsqueeze(1) < torch.tensor(LENGTHS)
    assert torch.equal(module(activity), activity)
    expected = torch.eye(H, dtype=torch.float64)
    for call in range(4):
        module.update_(activity, valid)
        if call % 2:
            expected = rule(expected, list(activity[valid]), RATE)
    assert_close(module.matrix, expected, "float64")
    assert_close(module(activity)[2, 1], expected @ activity[2, 1], "float64")
    assert list(module.state_dict()) == ["matrix", "calls"]
    assert repr(module) == "Decorrelate(5, rate=0.1, every=2)"
    head = nn.Sequential(module, nn.Linear(H, O, dtype=torch.float64))
    rnn, _ = network()
    head(rnn(draw(T, B, I))[0]).sum().backward()
    assert [name for name, parameter in head.named_parameters()] == ["1.weight", "1.bias"]


def test_the_module_and_the_readout_of_a_decorrelation_agree():
    rnn, readout = network()
    attached = Decorrelation(rnn, readout, rate=RATE)
    hidden = rnn(draw(T, B, I))[0].detach()
    attached.update_(draw(T, B, I))
    module = Decorrelate(H, rate=RATE, dtype=torch.float64)
    module.update_(hidden)
    assert_close(module.matrix, attached.matrices["readout"], "float64")
    plain = nn.functional.linear(module(hidden), originals(readout)["weight"], readout.bias)
    assert_close(readout(hidden), plain, "float64")


def test_squared_correlation():
    activity = draw(7, 9, H) @ draw(H, H) + 1
    coefficients = np.corrcoef(activity.flatten(0, 1).numpy().T)
    others = coefficients[~np.eye(H, dtype=bool)]
    assert float(squared_correlation(activity)) == pytest.approx(np.mean(others**2))
    rows = activity.flatten(0, 1).numpy()
    moments = rows.T @ rows / np.sqrt(np.outer((rows**2).sum(0), (rows**2).sum(0)))
    correlation = squared_correlation(activity, centred=False)
    assert float(correlation) == pytest.approx(np.mean(moments[~np.eye(H, dtype=bool)] ** 2))
    # A constant unit has correlation 0 with all others.
    still = torch.cat((activity, torch.zeros(7, 9, 1)), dim=-1)
    assert float(squared_correlation(still)) == pytest.approx(np.mean(others**2))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_correlation_falls_tenfold_on_mackey_glass(seed):
    # The input of W_hh on held-out data, with W fixed. The rule also shrinks the activity, to which a correlation is
    # blind. profiling/study_decorrelation.py is the complete measurement.
    from reservoirpy.datasets import mackey_glass

    units, lanes, steps, updates = 64, 8, 50, 1000
    series = torch.from_numpy(mackey_glass(12_000, tau=17, seed=0)[:, 0]).float()
    series = (series - series[:10_000].mean()) / series[:10_000].std()
    values, held_out = series[:10_000].view(lanes, -1).t().unsqueeze(-1), series[10_000:].view(-1, 1, 1)
    torch.manual_seed(seed)
    rnn = nn.RNN(1, units)
    nn.init.orthogonal_(rnn.weight_hh_l0, 0.95)
    attached = Decorrelation(rnn, rate=0.2)
    with torch.no_grad():
        for update in range(updates):
            first = update % (len(values) // steps) * steps
            window, state = values[first : first + steps], state if first else None  # noqa: F821
            attached.update_(window, state)
            state = rnn(window, state)[1]
        hidden = rnn(held_out)[0][100:]
    seen = hidden @ attached.matrices["weight_hh_l0"].t()
    lowered = float(squared_correlation(hidden) / squared_correlation(seen))
    assert lowered >= 10, f"lowered {lowered:.1f} times"
