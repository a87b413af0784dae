"""Parameters of anpgpu's modules tied, replaced, computed, moved and saved; padding has no effect."""

import copy
import io
import math
import pickle

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anpgpu
from anpgpu import Perturbation

METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp")
SERVED = [(kind, method) for kind in ("RNN", "GRU", "LSTM") for method in METHODS]
"""Modules, and the methods that train them."""


def step(module, inputs, seed=3):
    """Gradients of one backward pass, by parameter name."""
    module.zero_grad()
    torch.manual_seed(seed)
    module(inputs)[0].square().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


EXACT = Perturbation("anp-ls", rollouts=40, sigma=1e-7, noise="gaussian", discount=1.0, ridge=1e-10)
"""Enough rollouts for gradients that equal torch's to 1e-4."""


@pytest.fixture(params=["RNN", "GRU", "LSTM"])
def name_of_module(request):
    return request.param


@pytest.fixture
def ours(name_of_module):
    """The class of anpgpu."""
    return getattr(anpgpu, name_of_module)


@pytest.fixture
def pair(ours, name_of_module):
    """Makes modules with the same float64 parameters, whose gradients should agree."""

    def made(*args, **options):
        torch.manual_seed(4)
        rnn = ours(*args, dtype=torch.float64, perturbation=EXACT, **options)
        twin = getattr(nn, name_of_module)(*args, dtype=torch.float64, **options)
        twin.load_state_dict(rnn.state_dict(), strict=True)
        return rnn, twin

    return made


def states(hx):
    """The final states as a tuple."""
    return hx if isinstance(hx, tuple) else (hx,)


INPUTS = torch.linspace(-1, 1, 4 * 2 * 3, dtype=torch.float64).sin().view(4, 2, 3)


def assert_same_gradients(rnn, twin):
    assert_close(rnn(INPUTS)[0], twin(INPUTS)[0], "float64")
    ours, expected = step(rnn, INPUTS), step(twin, INPUTS)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert_close(ours[name], expected[name], "least_squares")


def test_a_tied_parameter_gets_the_sum_of_its_gradients(pair):
    rnn, twin = pair(3, 3, num_layers=2)
    for module in (rnn, twin):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_hh_l0
    assert len(list(rnn.parameters())) == 6
    assert_same_gradients(rnn, twin)


def test_a_parameter_of_two_networks_gets_the_sum_of_its_gradients(pair):
    class Twice(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second
            second.weight_hh_l0 = first.weight_hh_l0

        def forward(self, inputs):
            return self.second(self.first(inputs)[0])

    (lower, expected_lower), (upper, expected_upper) = pair(3, 4), pair(4, 4)
    rnn, twin = Twice(lower, upper), Twice(expected_lower, expected_upper)
    assert len(list(rnn.parameters())) == 7
    assert_same_gradients(rnn, twin)


def test_a_reassigned_parameter_is_the_one_that_counts(pair):
    rnn, twin = pair(3, 4)
    old = rnn.weight_hh_l0
    for module in (rnn, twin):
        gates = len(module.weight_hh_l0) // 4
        module.weight_hh_l0 = nn.Parameter(0.5 * torch.eye(4, dtype=torch.float64).repeat(gates, 1))
    assert_same_gradients(rnn, twin)
    assert old.grad is None
    for module in (rnn, twin):
        module.bias_hh_l0.data = torch.full_like(module.bias_hh_l0, 0.1)
        with torch.no_grad():
            module.weight_ih_l0.mul_(0.5)
    assert_same_gradients(rnn, twin)


def test_a_weight_computed_by_the_model_passes_its_gradient_on(pair):
    # Weight dropping and hypernetworks replace a parameter by a plain tensor before every call.
    rnn, twin = pair(3, 4)
    grads = []
    for module in (rnn, twin):
        raw = module.weight_hh_l0
        del module.weight_hh_l0
        module.register_parameter("raw", raw)
        module.weight_hh_l0 = module.raw * 0.5
        torch.manual_seed(1)
        module(INPUTS)[0].square().sum().backward()
        grads.append(module.raw.grad)
    assert_close(grads[0], grads[1], "least_squares")


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1_reverse"])
def test_parametrized_weights_learn(kind, name, pair, ours):
    rnn, twin = pair(3, 4, num_layers=2, bidirectional=True)
    for module in (rnn, twin):
        torch.manual_seed(2)
        PARAMETRIZATIONS[kind](module, name)
        # In training mode, each access to a weight under spectral_norm makes a power iteration.
        module.eval()
    assert list(rnn.state_dict()) == list(twin.state_dict())
    assert_same_gradients(rnn, twin)
    # The parametrization survives swap_ and unswap_.
    assert anpgpu.unswap_(rnn) == 1
    assert_same(step(rnn, INPUTS), step(twin, INPUTS))
    assert anpgpu.swap_(rnn, EXACT) == 1
    assert_same_gradients(rnn, twin)
    nn.utils.parametrize.remove_parametrizations(rnn, name)
    nn.utils.parametrize.remove_parametrizations(twin, name)
    assert type(rnn) is ours
    assert_same_gradients(rnn, twin)


def test_a_parametrized_network_trains(ours):
    torch.manual_seed(0)
    rnn = parametrizations.orthogonal(ours(3, 4, perturbation=Perturbation("anp", rollouts=8)), "weight_hh_l0")
    optimiser = torch.optim.SGD(rnn.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (rnn(torch.ones(5, 2, 3))[0] - 0.5).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    weight = rnn.weight_hh_l0.detach()
    assert losses[-1] < 0.5 * losses[0]
    assert_close(weight.t() @ weight, torch.eye(4), "float32")


def test_functional_call_estimates_for_the_parameters_it_is_given(pair):
    rnn, twin = pair(3, 4, num_layers=2)
    results = []
    for module in (rnn, twin):
        replaced = {name: (0.7 * parameter.detach()).requires_grad_() for name, parameter in module.named_parameters()}
        torch.manual_seed(1)
        outputs, _ = torch.func.functional_call(module, replaced, (INPUTS,))
        outputs.square().sum().backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        results.append((outputs, replaced))
    assert_close(results[0][0], results[1][0], "float64")
    for name in results[0][1]:
        assert_close(results[0][1][name].grad, results[1][1][name].grad, "least_squares")


def test_a_module_from_the_meta_device_is_an_ordinary_one(ours):
    torch.manual_seed(1)
    # Without a state, so that the source makes the same update twice.
    options = {"bidirectional": True, "dtype": torch.float64, "perturbation": Perturbation("anp-ls")}
    source = ours(3, 4, 2, **options)
    with torch.device("meta"):
        rnn = ours(3, 4, 2, **options)
    outputs, h_n = rnn(INPUTS.to("meta"))
    assert outputs.shape == (4, 2, 8)
    assert outputs.is_meta
    assert all(state.shape == (4, 2, 4) and state.is_meta for state in states(h_n))
    rnn.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    assert_same(step(rnn, INPUTS), step(source, INPUTS))
    assigned = ours(3, 4, 2, device="meta", **options)
    assigned.load_state_dict(source.state_dict(), strict=True, assign=True)
    assert_same(step(assigned, INPUTS), step(source, INPUTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_move_to_another_type_moves_everything(dtype, pair, ours):
    rnn, _ = pair(3, 4, num_layers=2)
    rnn.perturbation = Perturbation("anp", rollouts=4)
    step(rnn, INPUTS)
    moved = copy.deepcopy(rnn).to(dtype)
    fresh = ours(3, 4, 2, dtype=dtype, perturbation=rnn.perturbation)
    fresh.load_state_dict(rnn.state_dict(), strict=True)
    inputs = INPUTS.to(dtype)
    assert torch.equal(moved(inputs)[0], fresh(inputs)[0])
    assert_same(step(moved, inputs), step(fresh, inputs))
    back = moved.to(torch.float64)
    assert all(grad.dtype == torch.float64 for grad in step(back, INPUTS).values())


def test_saved_modules_come_back_whole(pair, ours):
    rnn, twin = pair(3, 4, num_layers=2, bidirectional=True)
    hooked = []
    rnn.eval().weight_hh_l0.requires_grad_(False)
    twin.eval().weight_hh_l0.requires_grad_(False)
    buffer = io.BytesIO()
    torch.save({"rnn": rnn.state_dict(), "twin": twin.state_dict()}, buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    assert list(states["rnn"]) == list(states["twin"])
    for other in (copy.deepcopy(rnn), copy.copy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert type(other) is ours
        assert not other.training
        assert not other.weight_hh_l0.requires_grad
        assert other.perturbation == EXACT
        other.register_forward_hook(lambda *arguments: hooked.append(type(arguments[0])))
        assert_close(other(INPUTS)[0], twin(INPUTS)[0], "float64")
    assert hooked == [ours] * 3


@pytest.mark.parametrize(("name_of_module", "method"), SERVED)
@pytest.mark.parametrize("filler", [7.0, -1e4])
def test_what_a_packed_sequence_is_padded_with_changes_nothing(monkeypatch, method, filler, ours):
    # Samples are padded to one length inside. The padding must not reach any loss, norm, product or update.
    rnn = ours(3, 4, 2, bidirectional=True, perturbation=Perturbation(method, rollouts=5))
    packed = pack_padded_sequence(torch.randn(6, 3, 3), [2, 6, 3], enforce_sorted=False)

    def results():
        anpgpu.load_estimator_state_(rnn, {})
        rnn.zero_grad()
        torch.manual_seed(2)
        outputs, h_n = rnn(packed)
        (outputs.data.square().sum() + sum(state.sum() for state in states(h_n))).backward()
        estimate = rnn.last_estimate
        grads = [parameter.grad for parameter in rnn.parameters()]
        return [outputs.data, *states(h_n), estimate.skipped, torch.nan_to_num(estimate.split_half), *grads]

    expected = results()
    pad = torch._VF._pad_packed_sequence
    padded_with = []

    def filled(data, batch_sizes, batch_first, value, total_length):
        padded_with.append(filler)
        return pad(data, batch_sizes, batch_first, filler, total_length)

    monkeypatch.setattr(torch._VF, "_pad_packed_sequence", filled, raising=False)
    assert float(pad_packed_sequence(packed)[0][5, 0, 0]) == filler
    assert all(torch.equal(tensor, other) for tensor, other in zip(results(), expected, strict=True))
    assert len(padded_with) > 1


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", absolute])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name_of_module", "method"), SERVED)
def test_padding_of_inputs_and_targets_contributes_nothing(method, bidirectional, loss, ours):
    torch.manual_seed(0)
    rnn, head = ours(3, 4, 2, bidirectional=bidirectional), nn.Linear(4 * (1 + bidirectional), 5)
    inputs = torch.randn(6, 3, 3)
    targets = torch.randint(5, (6, 3)) if loss == "cross_entropy" else torch.randn(6, 3, 5)
    lengths = [2, 6, 3]
    readout = "perturbed" if method == "np" else "exact"
    results = []
    for filler in (0.0, math.nan, math.inf, -1e38):
        for sample, length in enumerate(lengths):
            inputs[length:, sample] = filler
            targets[length:, sample] = (
                3 if loss == "cross_entropy" and filler else 0 if loss == "cross_entropy" else filler
            )
        rnn.zero_grad()
        head.zero_grad()
        anpgpu.load_estimator_state_(rnn, {})
        seen = anpgpu.estimate_grad_(
            rnn, head, inputs, targets, loss, lengths=lengths, generator=torch.Generator().manual_seed(1),
            perturbation=Perturbation(method, rollouts=5, readout=readout, warmup=2),
        )  # fmt: skip
        grads = [parameter.grad for module in (rnn, head) for parameter in module.parameters()]
        half = torch.nan_to_num(seen.split_half)
        results.append([*grads, seen.loss, seen.outputs, *states(seen.h_n), seen.skipped, half])
    assert bool(results[0][0].isfinite().all())
    for other in results[1:]:
        assert all(torch.equal(tensor, other_tensor) for tensor, other_tensor in zip(results[0], other, strict=True))
