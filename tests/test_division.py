"""The result does not depend on how the work is divided: equal divisions agree bitwise, others to rounding."""

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import CELLS, ESTIMATORS
from anpgpu.runtime.memory import Division, Shape, divide, needed_bytes, segments_of
from anpgpu.runtime.settings import resolve

T, B, I, H, O, P = 7, 3, 3, 6, 3, 5  # noqa: E741  (the design's names)
METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp")
DIVISIONS = [
    Division(B, 2, 1),
    Division(2, P, 1),
    Division(B, P, 3),
    Division(B, 2, 3),
    Division(1, P, T),
    Division(1, 1, T),
]


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def sequence_error(outputs, targets):
    return (outputs - targets).abs().sum(-1).mean(0)


def divisions_of(method, loss=None):
    """The divisions there are: least squares never divides rollouts, nor does anp that regresses sequences' values."""
    at_once = ESTIMATORS[method].whole_samples or (method == "anp" and loss == "per sequence")
    return [division for division in DIVISIONS if division.rollouts == P or not at_once]


def force(monkeypatch, division):
    """Divide every layer in this way, whatever the memory."""
    monkeypatch.setattr("anpgpu.runtime.memory.divide", lambda *_: division)
    # Weight perturbation has no activity to divide.
    block = (division.samples, division.rollouts)
    monkeypatch.setattr("anpgpu.estimators.weights._WeightShape.divide", lambda *_: block)


@pytest.mark.parametrize(("method", "whole"), [("np", False), ("anp", True), ("anp-ls", True), ("wp", True)])
def test_what_regresses_sequences_values_takes_all_rollouts_of_a_sample(method, whole):
    settings = resolve(Perturbation(method), CELLS["tanh"], torch.zeros(1))
    shape = settings.shape(time=3, batch=2, hidden=4, itemsize=4, at_once=True)
    assert shape.whole_samples == whole
    assert settings.shape(time=3, batch=2, hidden=4, itemsize=4).whole_samples == ESTIMATORS[method].whole_samples


def gradients(*modules):
    return torch.cat([parameter.grad.flatten() for module in modules for parameter in module.parameters()])


def networks(**options):
    torch.manual_seed(2)
    rnn = anpgpu.RNN(I, H, dtype=torch.float64, **options)
    return rnn, nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=torch.float64)


def estimate(how, loss, *, lengths=None, **options):
    """Return all results of `estimate_grad_` as one vector."""
    rnn, head = networks(**options)
    wanted = how.method != "wp"
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=wanted)
    hx = torch.randn(len(rnn.all_weights), B, H, dtype=torch.float64, requires_grad=wanted)
    targets = torch.randn(T, B, O, dtype=torch.float64)
    if loss == "cross_entropy":
        targets = torch.randint(O, (T, B))
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how, hx=hx, lengths=lengths)
    parts = [gradients(rnn, head), seen.loss, seen.outputs, seen.h_n, seen.split_half]
    if wanted:
        parts += [inputs.grad, hx.grad]
    # A method that does not tell halves apart has no agreement of them.
    return torch.cat([torch.nan_to_num(tensor.flatten()) for tensor in parts])


def backward(how, **options):
    """Return all results of a backward pass as one vector."""
    rnn, _ = networks(perturbation=how, **options)
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=how.method != "wp")
    outputs, h_n = rnn(inputs)
    (outputs.sin().sum() + h_n.square().sum()).backward()
    parts = [gradients(rnn), rnn.last_estimate.split_half]
    if inputs.requires_grad:
        parts.append(inputs.grad)
    # A method that does not tell halves apart has no agreement of them.
    return torch.cat([torch.nan_to_num(tensor.flatten()) for tensor in parts])


NETWORKS = {"one layer": {}, "two layers, bidirectional": {"num_layers": 2, "bidirectional": True}}
LOSSES = {"mse": "mse", "cross_entropy": "cross_entropy", "per step": absolute, "per sequence": sequence_error}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_backward_does_not_depend_on_division(monkeypatch, method, network):
    how = Perturbation(method, rollouts=P, sigma=1e-3, discount=0.9, warmup=2, split_half=True)
    whole = backward(how, **NETWORKS[network])
    for division in divisions_of(method):
        force(monkeypatch, division)
        divided = backward(how, **NETWORKS[network])
        assert_close(divided, whole, "float64")
        assert torch.equal(backward(how, **NETWORKS[network]), divided)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_estimate_grad_does_not_depend_on_division(monkeypatch, method, network, loss):
    how = Perturbation(method, rollouts=P, sigma=1e-3, discount=0.9, warmup=2, split_half=True)
    whole = estimate(how, LOSSES[loss], **NETWORKS[network])
    for division in divisions_of(method, loss):
        force(monkeypatch, division)
        divided = estimate(how, LOSSES[loss], **NETWORKS[network])
        assert_close(divided, whole, "float64")
    assert torch.equal(estimate(how, LOSSES[loss], **NETWORKS[network]), divided)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_unequal_lengths_and_other_discounts(monkeypatch, network, discount):
    how = Perturbation("anp", rollouts=P, sigma=1e-3, discount=discount, readout="perturbed", noise="gaussian")
    options = {"lengths": [5, 7, 1]} | NETWORKS[network]
    whole = estimate(how, "mse", **options)
    for division in DIVISIONS:
        force(monkeypatch, division)
        assert_close(estimate(how, "mse", **options), whole, "float64")


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
def test_max_memory_is_what_divides(method):
    # By the public option, from undivided work down to the least memory that works.
    how = Perturbation(method, rollouts=2000, sigma=1e-3)
    whole = estimate(how, "mse")
    for mebibytes in (17, 18, 24):
        less = Perturbation(method, rollouts=2000, sigma=1e-3, max_memory=mebibytes << 20)
        divided = estimate(less, "mse")
        assert_close(divided, whole, "float64")
        assert torch.equal(estimate(less, "mse"), divided)


def test_dropout_masks_are_the_same_when_a_segment_is_run_again(monkeypatch):
    # The readout's exact gradient needs the outputs, of the first pass, and the states, of the second.
    how = Perturbation("anp", rollouts=P, sigma=1e-3)
    rnn, head = networks(num_layers=2, dropout=0.5)
    inputs, targets = torch.randn(T, B, I).double(), torch.randn(T, B, O).double()
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    force(monkeypatch, Division(B, P, 3))
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=how)
    assert not torch.equal(seen.outputs, rnn.eval()(inputs)[0][..., :O])
    error = 2 * (seen.outputs - targets) / targets.numel()
    # The first O states are the outputs themselves.
    expected = torch.einsum("tbo,tbh->oh", error, seen.outputs)
    assert_close(head.weight.grad[:, :O], expected, "float64")


@pytest.mark.parametrize("method", ["anp", "np", "anp-ls"])
def test_every_segment_has_the_dropout_of_its_own_steps(monkeypatch, method):
    how = Perturbation(method, rollouts=P, sigma=1e-3, discount=0.9)
    whole = estimate(how, "mse", num_layers=2, dropout=0.5)
    for division in divisions_of(method):
        force(monkeypatch, division)
        assert_close(estimate(how, "mse", num_layers=2, dropout=0.5), whole, "float64")


SHAPE = Shape(
    time=100,
    batch=8,
    rollouts=64,
    hidden=32,
    outputs=0,
    stores_delta=True,
    whole_samples=False,
    clean_floats=0,
    extra_floats=0,
    fixed_floats=0,
    layers=1,
    itemsize=4,
)


@pytest.mark.parametrize("mebibytes", [17, 20, 32, 64, 1024])
@pytest.mark.parametrize("outputs", [0, 5])
def test_a_division_fits_the_limit_it_was_made_for(mebibytes, outputs):
    shape = SHAPE._replace(outputs=outputs)
    division = divide(shape, mebibytes << 20, "cpu")
    assert needed_bytes(shape, division) <= mebibytes << 20
    assert 1 <= division.samples <= 8
    assert 1 <= division.rollouts <= 64
    assert 1 <= division.segments <= 100


def test_with_room_enough_nothing_is_divided():
    assert divide(SHAPE, 1 << 40, "cpu") == Division(8, 64, 1)


def test_on_a_cpu_activity_fits_in_what_stays_allocated_where_that_fills_it():
    # 2 MB a row, 1 GB in all, and 256 MB stay allocated.
    large = SHAPE._replace(time=1000, hidden=500)
    assert divide(large, 1 << 40, "cuda") == Division(8, 64, 1)
    assert divide(large, 1 << 40, "cpu") == Division(8, 16, 1)
    assert divide(large._replace(whole_samples=True), 1 << 40, "cpu") == Division(2, 64, 1)
    assert divide(large._replace(stores_delta=False), 1 << 40, "cpu") == Division(8, 64, 1)
    # A block of 64 rows would not fit, and a smaller one does not fill a core.
    assert divide(large._replace(time=3000), 1 << 40, "cpu") == Division(8, 64, 1)


@pytest.mark.parametrize("time", [1, 2, 7, 100])
@pytest.mark.parametrize("segments", [1, 2, 3, 8, 100])
def test_segments_cover_every_step_once(time, segments):
    steps = [step for segment in segments_of(time, Division(1, 1, segments)) for step in range(time)[segment]]
    assert steps == list(range(time))
