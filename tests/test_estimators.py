"""The estimates against backpropagation in float64: unbiased where promised, converging as theory says.

z-tests: R independent estimates give a mean and a standard error for every element of every gradient; the largest |z|
over all elements is near 2.5 to 3.5 for correct code, and 8 or more where credit is assigned to the wrong noise. With
up to 300 elements and the bound 4.3 (5.2 for more elements), correct code would miss the bound for one seed in 100.
"""

import math

import pytest
import torch
from scipy import stats
from tolerances import TOLERANCES, assert_close

import anpgpu

T, B, I, H, O = 6, 2, 3, 5, 4  # noqa: E741  (the design's names)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def build(perturbation, **options):
    torch.manual_seed(11)
    rnn = anpgpu.RNN(I, H, perturbation=perturbation, dtype=torch.float64, **options)
    twin = torch.nn.RNN(I, H, dtype=torch.float64, **options)
    twin.load_state_dict(rnn.state_dict())
    return rnn, twin


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def backward_through(rnn, inputs, hx, lengths=None):
    """Gradients of weights, inputs and hx of a loss that needs every output and the final state."""
    leaves = [*rnn.parameters(), inputs, hx]
    sequences = inputs
    if lengths is not None:
        sequences = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    outputs, h_n = rnn(sequences, hx)
    if lengths is not None:
        outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs)
    loss = (outputs * draw(*outputs.shape, seed=3)).sum() + (h_n.square() * draw(*h_n.shape, seed=4)).sum()
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])


def largest_z(estimates, truth):
    table = torch.stack(estimates)
    error = table.std(0) / len(table) ** 0.5
    exact = error < 1e-9 * (1 + truth.abs())
    assert_close(table.mean(0)[exact], truth[exact], "two_runs")
    z = ((table.mean(0) - truth) / error)[~exact]
    return float(z.abs().max())


def assert_unbiased(estimates, truth):
    z = largest_z(estimates, truth)
    # Bonferroni: the 4.3 of one statistic in 300 elements.
    bound = TOLERANCES["z"].bound if len(truth) <= 300 else 5.2
    assert z < bound, f"largest |z| of {len(truth)} elements is {z:.1f}"


NETWORKS = {
    "one layer": {},
    "relu": {"nonlinearity": "relu"},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("network", NETWORKS)
def test_np_through_backward_is_unbiased(network, noise):
    how = anpgpu.Perturbation("np", rollouts=32, sigma=1e-4, discount=1.0, noise=noise)
    rnn, twin = build(how, **NETWORKS[network])
    inputs = draw(T, B, I).requires_grad_()
    hx = draw(len(rnn.all_weights), B, H, seed=1).mul_(0.5).requires_grad_()
    truth = flat(backward_through(twin, inputs, hx))
    torch.manual_seed(21)
    assert_unbiased([flat(backward_through(rnn, inputs, hx)) for _ in range(100)], truth)


@pytest.mark.parametrize("network", ["one layer", "two layers, bidirectional"])
def test_np_of_sequences_of_unequal_length_is_unbiased(network):
    how = anpgpu.Perturbation("np", rollouts=32, sigma=1e-4, discount=1.0)
    rnn, twin = build(how, **NETWORKS[network])
    inputs = draw(T, 3, I).requires_grad_()
    hx = draw(len(rnn.all_weights), 3, H, seed=1).mul_(0.5).requires_grad_()
    lengths = torch.tensor([3, 6, 1])
    truth = flat(backward_through(twin, inputs, hx, lengths))
    torch.manual_seed(22)
    assert_unbiased([flat(backward_through(rnn, inputs, hx, lengths)) for _ in range(100)], truth)


@pytest.mark.parametrize(
    ("network", "rank"), [("one layer", None), ("one layer", 1), ("one layer", 2), ("two layers, bidirectional", 1)]
)
def test_wp_is_unbiased(network, rank):
    how = anpgpu.Perturbation("wp", rollouts=64, sigma=1e-4, rank=rank)
    rnn, twin = build(how, **NETWORKS[network])
    inputs, hx = draw(T, B, I), draw(len(rnn.all_weights), B, H, seed=1)
    truth = flat(backward_through(twin, inputs, hx))
    torch.manual_seed(23)
    assert_unbiased([flat(backward_through(rnn, inputs, hx)) for _ in range(100)], truth)


def per_step_targets(loss, batch=B):
    if loss == "mse":
        return draw(T, batch, O, seed=5)
    target = draw(T, batch, seed=5).mul(100).long().abs() % O
    target[1, 0] = target[4] = -100
    return target


def textbook_loss(outputs, targets, loss, lengths=None):
    """Means over the steps (and outputs) that count, by torch's own functions; (T, B, O) outputs."""
    batch = outputs.shape[1]
    lengths = torch.full((batch,), T) if lengths is None else lengths
    if targets.dim() == (3 if loss == "mse" else 2):
        pairs = [(outputs[t, b], targets[t, b]) for b in range(batch) for t in range(lengths[b])]
    else:
        pairs = [(outputs[lengths[b] - 1, b], targets[b]) for b in range(batch)]
    rows, wanted = (torch.stack(column) for column in zip(*pairs, strict=True))
    if loss == "mse":
        return torch.nn.functional.mse_loss(rows, wanted)
    return torch.nn.functional.cross_entropy(rows, wanted)


def truth_and_estimates(how, loss, targets, count, *, lengths=None, callable_loss=None, **options):
    """Autograd's gradients of weights, readout, inputs and hx, and `count` estimates of them."""
    rnn, twin = build(how, **options)
    batch = B if lengths is None else len(lengths)
    readout = torch.nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=torch.float64)
    inputs = draw(T, batch, I).requires_grad_()
    hx = draw(len(rnn.all_weights), batch, H, seed=1).mul_(0.5).requires_grad_()
    sequences = inputs
    if lengths is not None:
        sequences = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    outputs = twin(sequences, hx)[0]
    if lengths is not None:
        outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs)
    value = loss(readout(outputs)) if callable(loss) else textbook_loss(readout(outputs), targets, loss, lengths)
    truth = flat(torch.autograd.grad(value, [*twin.parameters(), *readout.parameters(), inputs, hx]))
    leaves = [*rnn.parameters(), *readout.parameters(), inputs, hx]
    estimates = []
    for number in range(count):
        for leaf in leaves:
            leaf.grad = None
        generator = torch.Generator().manual_seed(number)
        anpgpu.estimate_grad_(
            rnn, readout, inputs, targets, callable_loss or loss, hx=hx, lengths=lengths, generator=generator
        )
        estimates.append(flat([leaf.grad for leaf in leaves]))
    return truth, estimates


MEASURED = anpgpu.Perturbation("np", rollouts=64, sigma=1e-4, discount=1.0)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("network", ["one layer", "relu", "two layers", "two layers, bidirectional"])
def test_np_of_measured_losses_is_unbiased(network, loss):
    truth, estimates = truth_and_estimates(MEASURED, loss, per_step_targets(loss), 100, **NETWORKS[network])
    assert_unbiased(estimates, truth)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("network", ["two layers", "bidirectional"])
def test_np_of_one_target_per_sequence_is_unbiased(network, loss):
    targets = draw(3, O, seed=5) if loss == "mse" else torch.tensor([1, 3, 0])
    lengths = torch.tensor([6, 2, 5])
    truth, estimates = truth_and_estimates(MEASURED, loss, targets, 100, lengths=lengths, **NETWORKS[network])
    assert_unbiased(estimates, truth)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("network", ["one layer", "bidirectional"])
def test_perturbed_readout_is_unbiased(network, loss):
    how = anpgpu.Perturbation("np", rollouts=64, sigma=1e-4, discount=1.0, readout="perturbed")
    truth, estimates = truth_and_estimates(how, loss, per_step_targets(loss), 100, **NETWORKS[network])
    assert_unbiased(estimates, truth)


@pytest.mark.parametrize("form", ["per step", "per sequence"])
@pytest.mark.parametrize("network", ["one layer", "two layers", "bidirectional"])
def test_np_of_a_callable_loss_is_unbiased(network, form):
    targets = draw(T, B, O, seed=6)

    def measured(outputs, wanted):
        assert outputs.dim() == 4
        assert wanted.shape == (T, outputs.shape[1], 1, O)
        losses = (outputs - wanted).pow(4).sum(-1)
        return losses if form == "per step" else losses.mean(0)

    def by_hand(outputs):
        return (outputs - targets).pow(4).sum(-1).mean()

    truth, estimates = truth_and_estimates(MEASURED, by_hand, targets, 100, callable_loss=measured, **NETWORKS[network])
    assert_unbiased(estimates, truth)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_wp_of_measured_losses_is_unbiased(loss, rank):
    rnn, twin = build(anpgpu.Perturbation("wp", rollouts=64, sigma=1e-4, rank=rank), num_layers=2)
    readout = torch.nn.Linear(H, O, dtype=torch.float64)
    inputs, targets = draw(T, B, I), per_step_targets(loss)
    value = textbook_loss(readout(twin(inputs)[0]), targets, loss)
    truth = flat(torch.autograd.grad(value, [*twin.parameters(), *readout.parameters()]))
    estimates = []
    for number in range(100):
        rnn.zero_grad()
        readout.zero_grad()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, loss, generator=torch.Generator().manual_seed(number))
        estimates.append(flat([leaf.grad for leaf in (*rnn.parameters(), *readout.parameters())]))
    assert_unbiased(estimates, truth)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_np_through_backward_is_unbiased_to_a_percent(network):
    # A hundred times the rollouts show a bias ten times smaller than the normal leg does.
    how = anpgpu.Perturbation("np", rollouts=512, sigma=1e-4, discount=1.0)
    rnn, twin = build(how, **NETWORKS[network])
    inputs = draw(T, B, I).requires_grad_()
    hx = draw(len(rnn.all_weights), B, H, seed=1).mul_(0.5).requires_grad_()
    truth = flat(backward_through(twin, inputs, hx))
    torch.manual_seed(24)
    assert_unbiased([flat(backward_through(rnn, inputs, hx)) for _ in range(1000)], truth)


def test_the_z_test_has_teeth():
    # It must catch the same noise at two steps, by which the credit of step t also reaches step t + 1.
    how = anpgpu.Perturbation("np", rollouts=32, sigma=1e-4, discount=1.0)
    rnn, twin = build(how)
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)
    truth = flat(backward_through(twin, inputs, hx))
    philox = anpgpu.kernels.noise.philox
    torch.manual_seed(21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anpgpu.kernels.noise, "philox", lambda c0, c1, *rest: philox(c0, c1 // 2, *rest))
        z = largest_z([flat(backward_through(rnn, inputs, hx)) for _ in range(100)], truth)
    assert z > 8


def relative_errors(rollouts, sigma, count, first=0, noise="rademacher"):
    """Root mean square of ||estimate - truth|| / ||truth|| over independent estimates, and the error of their mean."""
    how = anpgpu.Perturbation("np", rollouts=rollouts, sigma=sigma, discount=1.0, noise=noise)
    rnn, twin = build(how)
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)
    truth = flat(backward_through(twin, inputs, hx))
    torch.manual_seed(first)
    table = torch.stack([flat(backward_through(rnn, inputs, hx)) for _ in range(count)]) - truth
    scale = truth.norm()
    return float(table.square().sum(1).mean().sqrt() / scale), float(table.mean(0).norm() / scale)


def test_error_falls_with_the_square_root_of_rollouts():
    sizes = [8, 32, 128]
    errors = [relative_errors(size, 1e-4, 32, first=size)[0] for size in sizes]
    slope = stats.linregress([math.log(value) for value in sizes], [math.log(value) for value in errors]).slope
    assert abs(slope + 0.5) < TOLERANCES["slope"].bound, f"slope {slope:.3f}, errors {errors}"


def test_bias_falls_with_the_square_of_sigma():
    # Noise is symmetric, so that the bias has no term of first order in sigma. With the same seeds the variance
    # cancels: the change from a tiny sigma is the bias plus the third derivative's term, both of second order.
    how = anpgpu.Perturbation("np", rollouts=16384, discount=1.0)
    rnn, _ = build(how)
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)

    def estimate(sigma):
        rnn.perturbation = anpgpu.Perturbation("np", rollouts=16384, discount=1.0, sigma=sigma)
        torch.manual_seed(5)
        return flat(backward_through(rnn, inputs, hx))

    base = estimate(1e-5)
    sigmas = [0.05, 0.1, 0.2]
    moved = [float((estimate(sigma) - base).norm() / base.norm()) for sigma in sigmas]
    slope = stats.linregress([math.log(value) for value in sigmas], [math.log(value) for value in moved]).slope
    # First-order terms, odd in the noise, average out over rollouts like 1 / sqrt(P) and lower the slope a little.
    assert 1.6 < slope < 2.2, f"slope {slope:.2f}, changes {moved}"


def one_step_truth(twin, inputs, hx):
    """The truncated gradient, from states that are detached at every step."""
    state, loss = hx[0], 0.0
    weights = twin.weight_hh_l0
    scale = draw(T, B, H, seed=3)
    for t in range(T):
        state = torch.tanh(
            inputs[t] @ twin.weight_ih_l0.T + twin.bias_ih_l0 + twin.bias_hh_l0 + state.detach() @ weights.T
        )
        loss = loss + (state * scale[t]).sum()
    return flat(torch.autograd.grad(loss, list(twin.parameters())))


@pytest.mark.parametrize("method", ["np", "anp"])
def test_without_discount_the_one_step_gradient_is_what_rollouts_converge_to(method):
    how = anpgpu.Perturbation(method, rollouts=8192, sigma=1e-4, discount=0.0)
    rnn, twin = build(how)
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)
    torch.manual_seed(9)
    loss = (rnn(inputs, hx)[0] * draw(T, B, H, seed=3)).sum()
    estimated = flat(torch.autograd.grad(loss, list(rnn.parameters())))
    truncated = one_step_truth(twin, inputs, hx)
    truth = flat(torch.autograd.grad((twin(inputs, hx)[0] * draw(T, B, H, seed=3)).sum(), list(twin.parameters())))

    def cosine(left, right):
        return float(torch.nn.functional.cosine_similarity(left, right, dim=0))

    assert cosine(estimated, truncated) > (0.99 if method == "np" else 0.9)
    assert cosine(estimated, truncated) > cosine(estimated, truth)


def test_anp_with_discount_points_along_the_gradient():
    rnn, twin = build(anpgpu.Perturbation("anp", rollouts=8192, sigma=1e-4, discount=1.0))
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)
    torch.manual_seed(9)
    estimated, truth = (flat(backward_through(module, inputs, hx)) for module in (rnn, twin))
    assert float(torch.nn.functional.cosine_similarity(estimated, truth, dim=0)) > 0.9


def test_split_half_grows_with_rollouts():
    inputs, hx = draw(T, B, I), draw(1, B, H, seed=1)
    seen = []
    for rollouts in (1, 16, 256, 4096):
        rnn, _ = build(anpgpu.Perturbation("np", rollouts=rollouts, sigma=1e-4, discount=1.0))
        torch.manual_seed(2)
        backward_through(rnn, inputs, hx)
        seen.append(float(rnn.last_estimate.split_half))
    assert math.isnan(seen[0])
    assert seen[1] < seen[2] < seen[3]
    assert seen[3] > 0.95
