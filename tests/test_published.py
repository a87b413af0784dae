"""The published rules against the design's equations written out: two networks run side by side and subtracted."""

import math
from typing import NamedTuple

import pytest
import torch
from oracles import PHI, noise_block
from tolerances import TOLERANCES, assert_close, relative_error
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from torch.nn.utils import parametrize

import anpgpu
from anpgpu import Perturbation
from anpgpu.kernels.noise import Purpose
from anpgpu.network.stack import run_network
from anpgpu.runtime.memory import FIXED_BYTES

METHODS = ("published-anp", "published-np", "published-wp")
T, B, I, H, O = 5, 3, 3, 7, 4  # noqa: E741  (the design's names)
SIGMA = 1e-2


def how(method, sigma=SIGMA, **options):
    return Perturbation(method, rollouts=1, noise="gaussian", sigma=sigma, **options)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def classes(*shape, outputs=O):
    return torch.randint(outputs, shape, generator=torch.Generator().manual_seed(sum(shape)))


def networks(inputs=I, hidden=H, outputs=O, *, kind=nn.RNN, dtype=torch.float64, **options):
    torch.manual_seed(5)
    rnn = kind(inputs, hidden, bias=False, dtype=dtype, **options)
    return rnn, nn.Linear(hidden, outputs, bias=False, dtype=dtype)


def gradients(rnn, head):
    # Copies: the next update is added in place.
    return Update(rnn.weight_ih_l0.grad.clone(), rnn.weight_hh_l0.grad.clone(), head.weight.grad.clone())


class Update(NamedTuple):
    ih: torch.Tensor
    hh: torch.Tensor
    o: torch.Tensor


def drawn_seed(number):
    """The seed that an update draws from a generator seeded with `number`."""
    generator = torch.Generator().manual_seed(number)
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator))


def estimated(method, rnn, head, inputs, targets, loss, number=0, **options):
    """The update of the library, from zeroed gradients."""
    rnn.zero_grad()
    head.zero_grad()
    perturbation = how(method, **options.pop("how", {}))
    generator = torch.Generator().manual_seed(number)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=perturbation, generator=generator, **options)
    return gradients(rnn, head)


def loss_of_step(outputs, targets, loss):
    """L_t: averaged over the batch, and the outputs for mse; 0 where no sample has a target."""
    if loss == "mse":
        return ((outputs - targets) ** 2).mean()
    counted = targets != -100
    if not counted.any():
        return outputs.new_zeros(())
    return F.cross_entropy(outputs[counted], targets[counted])


def transcribed(method, rnn, head, inputs, targets, loss, number=0, *, hx=None, sigma=SIGMA):
    """The page's equations in float64, step by step: a clean and a perturbed network, their differences, the sums."""
    w_ih, w_hh, w_o = (weight.detach().double() for weight in (rnn.weight_ih_l0, rnn.weight_hh_l0, head.weight))
    (time, batch, fan_in), (outputs, units) = inputs.shape, w_o.shape
    inputs, phi, seed = inputs.double(), PHI[rnn.nonlinearity], drawn_seed(number)

    def gaussian(purpose, shape, layer=0):
        return sigma * noise_block(seed, shape, "gaussian", purpose=purpose, layer=layer)

    xi = gaussian(Purpose.HIDDEN, (time, batch, 1, units)).squeeze(2)
    zeta = gaussian(Purpose.READOUT, (time, batch, 1, outputs)).squeeze(2)
    both = gaussian(Purpose.WEIGHTS, (time, units, 1, fan_in + units)).squeeze(2)
    e_ih, e_hh = both.split((fan_in, units), -1)
    e_o = gaussian(Purpose.WEIGHTS, (time, outputs, 1, units), layer=1).squeeze(2)
    if method == "published-wp":
        xi, zeta = 0 * xi, 0 * zeta
    else:
        e_ih, e_hh, e_o = 0 * e_ih, 0 * e_hh, 0 * e_o

    d_ih, d_hh, d_o = torch.zeros_like(w_ih), torch.zeros_like(w_hh), torch.zeros_like(w_o)
    h = torch.zeros(batch, units, dtype=torch.float64) if hx is None else hx[0].double()
    h_perturbed = h
    size = fan_in + units + outputs
    for t in range(time):
        before = h
        a = inputs[t] @ w_ih.T + h @ w_hh.T
        h = phi(a)
        o = h @ w_o.T
        a_perturbed = inputs[t] @ (w_ih + e_ih[t]).T + h_perturbed @ (w_hh + e_hh[t]).T + xi[t]
        h_perturbed = phi(a_perturbed)
        o_perturbed = h_perturbed @ (w_o + e_o[t]).T + zeta[t]
        change = loss_of_step(o_perturbed, targets[t], loss) - loss_of_step(o, targets[t], loss)
        if method == "published-wp":
            d_ih += change * e_ih[t] / sigma
            d_o += change * e_o[t] / sigma
            if t > 0:
                d_hh += change * e_hh[t] / sigma
            continue
        if method == "published-np":
            hidden, output = change * xi[t] / sigma, change * zeta[t] / sigma
        else:
            da, do = a_perturbed - a, o_perturbed - o
            hidden = math.sqrt(size) * change * da / (da**2).sum()
            output = math.sqrt(size) * change * do / (do**2).sum()
        for sample in range(batch):
            d_ih += torch.outer(hidden[sample], inputs[t, sample])
            d_o += torch.outer(output[sample], h[sample])
            if t > 0:
                d_hh += torch.outer(hidden[sample], before[sample])
    return Update(d_ih, d_hh, d_o)


def assert_update(actual, expected, tolerance="two_runs"):
    for name, actual_field, expected_field in zip(Update._fields, actual, expected, strict=True):
        assert relative_error(actual_field, expected_field) <= TOLERANCES[tolerance].bound, name
        assert float(expected_field.norm()) > 0, name


SIZES = {"odd": (T, B, I, H, O), "one sample": (T, 1, I, H, O), "more than a block": (3, 2, 17, 33, 19)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("initial", ["zero", "given"])
def test_updates_are_the_pages_equations(method, sizes, loss, initial):
    time, batch, fan_in, units, outputs = SIZES[sizes]
    rnn, head = networks(fan_in, units, outputs)
    inputs, hx = draw(time, batch, fan_in), draw(1, batch, units).tanh() if initial == "given" else None
    targets = draw(time, batch, outputs) if loss == "mse" else classes(time, batch, outputs=outputs)
    actual = estimated(method, rnn, head, inputs, targets, loss, hx=hx)
    assert_update(actual, transcribed(method, rnn, head, inputs, targets, loss, hx=hx))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", [1e-3, 2.0])
def test_relu_and_any_sigma(method, sigma):
    rnn, head = networks(nonlinearity="relu")
    inputs, targets = draw(T, B, I), draw(T, B, O)
    actual = estimated(method, rnn, head, inputs, targets, "mse", how={"sigma": sigma})
    assert_update(actual, transcribed(method, rnn, head, inputs, targets, "mse", sigma=sigma))


@pytest.mark.parametrize("method", METHODS)
def test_float32_loses_nothing_to_a_small_sigma(method):
    rnn, head = networks(dtype=torch.float32)
    inputs, targets = draw(T, B, I).float(), draw(T, B, O).float()
    actual = estimated(method, rnn, head, inputs, targets, "mse", how={"sigma": 1e-6})
    expected = transcribed(method, rnn, head, inputs, targets.double(), "mse", sigma=1e-6)
    assert_update(actual, expected, "deviation_float32")


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_averaged_over_the_targets_that_count(method):
    rnn, head = networks()
    inputs, targets = draw(T, B, I), classes(T, B)
    targets[1, 0] = targets[2] = -100
    actual = estimated(method, rnn, head, inputs, targets, "cross_entropy")
    assert_update(actual, transcribed(method, rnn, head, inputs, targets, "cross_entropy"))


def squared_error(outputs, targets):
    return (outputs - targets).square().mean(-1)


def last_squared_error(outputs, targets):
    return (outputs[-1] - targets).square().mean(-1)


@pytest.mark.parametrize("method", METHODS)
def test_a_callable_is_as_the_loss_it_computes(method):
    rnn, head = networks()
    inputs, targets = draw(T, B, I), draw(T, B, O)
    for loss, wanted in ((squared_error, targets), (last_squared_error, targets[-1])):
        named = estimated(method, rnn, head, inputs, wanted, "mse")
        assert_update(estimated(method, rnn, head, inputs, wanted, loss), named)


@pytest.mark.parametrize("method", ["published-anp", "published-np"])
def test_a_loss_at_the_end_credits_the_last_step_alone(method):
    # With one sample every update is an outer product with the last step's input; through time it would be a sum.
    rnn, head = networks()
    inputs, target = draw(T, 1, I), draw(1, O)
    update = estimated(method, rnn, head, inputs, target, "mse")
    hidden = rnn(inputs)[0][:, 0].detach()
    for gradient, presynaptic in ((update.ih, inputs[-1, 0]), (update.hh, hidden[-2]), (update.o, hidden[-1])):
        along = torch.outer(gradient @ presynaptic, presynaptic) / presynaptic.square().sum()
        assert float(gradient.norm()) > 0
        assert_close(along, gradient, "float64")


def truncated(rnn, head, inputs, targets, hx):
    """Gradients of sum_t L_t truncated to one step; W_hh from the second step on."""
    total, state = 0, hx[0]
    for t, step in enumerate(inputs):
        w_hh = rnn.weight_hh_l0 if t else rnn.weight_hh_l0.detach()
        state = torch.tanh(step @ rnn.weight_ih_l0.T + state.detach() @ w_hh.T)
        total = total + F.mse_loss(head(state), targets[t])
    return torch.autograd.grad(total, [rnn.weight_ih_l0, rnn.weight_hh_l0, head.weight])


@pytest.mark.parametrize("method", ["published-np", "published-wp"])
def test_expected_update_is_sigma_times_the_one_step_gradient(method):
    """z of 36 elements over 1,200 updates: correct code would miss the bound once in 1,600 choices of seeds.

    The gradient through time is outside the bound, so that the test tells the two apart.
    """
    rnn, head = networks(2, 4, 3)
    inputs, targets, hx = draw(4, 2, 2), draw(4, 2, 3), draw(1, 2, 4).tanh()
    rows = [
        torch.cat([field.flatten() for field in estimated(method, rnn, head, inputs, targets, "mse", number, hx=hx)])
        for number in range(1200)
    ]
    table = torch.stack(rows) / SIGMA
    error = table.std(0) / math.sqrt(len(table))

    def largest_z(gradient):
        return float(((table.mean(0) - torch.cat([field.flatten() for field in gradient])) / error).abs().max())

    assert largest_z(truncated(rnn, head, inputs, targets, hx)) < TOLERANCES["z"].bound
    loss = len(inputs) * F.mse_loss(head(rnn(inputs, hx)[0]), targets)
    through_time = torch.autograd.grad(loss, [rnn.weight_ih_l0, rnn.weight_hh_l0, head.weight])
    assert largest_z(through_time) > TOLERANCES["z_many"].bound


class Decorrelate(nn.Module):
    """W D, with D fixed."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, weight):
        return weight @ self.matrix


@pytest.mark.parametrize("method", ["published-anp", "published-np"])
def test_with_decorrelation_the_presynaptic_activity_is_the_decorrelated(method):
    rnn, head = networks()
    inputs, targets = draw(T, B, I), draw(T, B, O)
    matrix = torch.eye(H, dtype=torch.float64) + 0.2 * draw(H, H)
    parametrize.register_parametrization(rnn, "weight_hh_l0", Decorrelate(matrix))
    plain, _ = networks()
    with torch.no_grad():
        plain.weight_hh_l0.copy_(rnn.weight_hh_l0)
    expected = transcribed(method, plain, head, inputs, targets, "mse")
    perturbation, generator = how(method), torch.Generator().manual_seed(0)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=perturbation, generator=generator)
    # sum_t s_t (D h_{t-1})^T = (sum_t s_t h_{t-1}^T) D^T
    original = rnn.parametrizations.weight_hh_l0.original
    actual = Update(rnn.weight_ih_l0.grad, original.grad, head.weight.grad)
    assert_update(actual, expected._replace(hh=expected.hh @ matrix.T))


@pytest.mark.parametrize("method", METHODS)
def test_clean_results_are_the_networks(method):
    rnn, head = networks(batch_first=True)
    inputs, targets, hx = draw(B, T, I), draw(B, T, O), draw(1, B, H)
    outputs, h_n = rnn(inputs, hx)
    estimate = anpgpu.estimate_grad_(rnn, head, inputs, targets, hx=hx, perturbation=how(method))
    assert_close(estimate.outputs, head(outputs), "float64")
    assert_close(estimate.h_n, h_n, "float64")
    assert_close(estimate.loss, F.mse_loss(head(outputs), targets), "float64")
    assert int(estimate.skipped) == 0
    assert math.isnan(estimate.split_half)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_updates_do_not_depend_on_max_memory(method, loss, monkeypatch):
    rnn, head = networks()
    time = 60
    inputs, targets = draw(time, B, I), draw(time, B, O) if loss == "mse" else classes(time, B)
    whole = estimated(method, rnn, head, inputs, targets, loss)
    # Beyond the fixed part: 12 (H padded to 32) + 8 O floats per step and sample.
    memory = FIXED_BYTES + 20_000 + 10 * 8 * B * (12 * 32 + 8 * O)
    segments = []

    def counted(network, values, state):
        segments.append(len(values))
        return run_network(network, values, state)

    monkeypatch.setattr("anpgpu.estimators.published.run_network", counted)
    parts = estimated(method, rnn, head, inputs, targets, loss, how={"max_memory": memory})
    assert max(segments) < time / 4
    assert sum(segments) == time
    assert_update(parts, whole, "float64")
    with pytest.raises(MemoryError, match=r"max_memory=1000 .*T=60, B=3, H=7"):
        estimated(method, rnn, head, inputs, targets, loss, how={"max_memory": 1000})


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_added_and_seeds_make_the_noise(method):
    rnn, head = networks()
    inputs, targets = draw(T, B, I), draw(T, B, O)
    update_1, update_2 = (estimated(method, rnn, head, inputs, targets, "mse", number) for number in (1, 2))
    assert relative_error(update_1.hh, update_2.hh) > 0.1
    generator = torch.Generator().manual_seed(1)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=how(method), generator=generator)
    both = gradients(rnn, head)
    assert_update(both, [first + second for first, second in zip(update_1, update_2, strict=True)], "float64")


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_changes_nothing(method):
    rnn, head = networks()
    update = estimated(method, rnn, head, draw(T, 0, I), draw(T, 0, O), "mse")
    assert all(torch.equal(field, torch.zeros_like(field)) for field in update)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_not_finite_raises_and_leaves_gradients_alone(method):
    rnn, head = networks()
    inputs = draw(T, B, I)
    inputs[2, 1] = math.inf
    with pytest.raises(RuntimeError, match="sample 1 is not finite"):
        estimated(method, rnn, head, inputs, draw(T, B, O), "mse")
    assert rnn.weight_hh_l0.grad is None
    assert head.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_the_perturbation_must_say_what_the_rule_is(method):
    for options in ({}, {"rollouts": 1}, {"noise": "gaussian"}, {"rollouts": 2, "noise": "gaussian"}):
        with pytest.raises(ValueError, match=f"'{method}'.*rollouts=1 and noise='gaussian', got rollouts="):
            Perturbation(method, **options)
    assert how(method).method == method


WRONG = {
    "num_layers=2": (lambda: nn.RNN(I, H, 2, bias=False), lambda: nn.Linear(H, O, bias=False)),
    "bidirectional=True": (
        lambda: nn.RNN(I, H, bias=False, bidirectional=True),
        lambda: nn.Linear(2 * H, O, bias=False),
    ),
    "rnn with bias=True": (lambda: nn.RNN(I, H), lambda: nn.Linear(H, O, bias=False)),
    "readout with bias=True": (lambda: nn.RNN(I, H, bias=False), lambda: nn.Linear(H, O)),
    "readout must be a torch.nn.Linear": (lambda: nn.RNN(I, O, bias=False), lambda: None),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("message", WRONG)
def test_other_networks_raise(method, message):
    rnn, head = (make() for make in WRONG[message])
    inputs, targets = torch.randn(T, B, I), torch.randn(T, B, O)
    with pytest.raises(ValueError, match=f"'{method}'.*{message}"):
        anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=how(method))


@pytest.mark.parametrize("method", METHODS)
def test_other_arguments_raise(method):
    rnn, head = networks()
    inputs, targets, hx = draw(T, B, I), draw(T, B, O), draw(1, B, H)
    equal = estimated(method, rnn, head, inputs, targets, "mse", lengths=[T] * B)
    assert_update(equal, estimated(method, rnn, head, inputs, targets, "mse"), "float64")
    with pytest.raises(ValueError, match=rf"'{method}'.*lengths=\[5, 4, 5\]"):
        estimated(method, rnn, head, inputs, targets, "mse", lengths=[T, T - 1, T])
    with pytest.raises(ValueError, match=f"'{method}'.*inputs requires grad"):
        estimated(method, rnn, head, inputs.clone().requires_grad_(), targets, "mse")
    with pytest.raises(ValueError, match=f"'{method}'.*hx requires grad"):
        estimated(method, rnn, head, inputs, targets, "mse", hx=hx.clone().requires_grad_())


@pytest.mark.parametrize("method", METHODS)
def test_the_module_says_that_the_rule_is_for_estimate_grad_alone(method):
    rnn, head = networks(kind=anpgpu.RNN, perturbation=how(method))
    inputs, targets = draw(T, B, I), draw(T, B, O)
    for sequence in (inputs, nn.utils.rnn.pack_padded_sequence(inputs, [T] * B)):
        with pytest.raises(RuntimeError, match=f"'{method}'.*anpgpu.estimate_grad_"):
            rnn(sequence)
    with torch.no_grad():
        assert_close(rnn(inputs)[0], networks()[0](inputs)[0], "float64")
    anpgpu.estimate_grad_(rnn, head, inputs, targets)
    assert float(rnn.weight_hh_l0.grad.norm()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_sgd_learns_a_task_without_memory(method):
    # y_t = M x_t needs no memory, so that the published rule can learn it.
    rnn, head = networks(I, 16, 2, dtype=torch.float32)
    matrix, generator = draw(I, 2).float() / 2, torch.Generator().manual_seed(3)
    rate = {"published-anp": 0.05, "published-np": 0.5, "published-wp": 0.5}[method]
    optimizer = torch.optim.SGD([*rnn.parameters(), *head.parameters()], lr=rate)
    losses = []
    for _ in range(200):
        inputs = torch.randn(4, 16, I, generator=generator)
        optimizer.zero_grad()
        estimate = anpgpu.estimate_grad_(
            rnn, head, inputs, inputs @ matrix, perturbation=how(method), generator=generator
        )
        optimizer.step()
        losses.append(float(estimate.loss))
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
