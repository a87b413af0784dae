"""`estimate_grad_`: clean results and readout gradients are torch's, gradients are added, any loss can be used."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

import anpgpu
from anpgpu import Perturbation

T, B, I, H, O = 6, 3, 4, 5, 7  # noqa: E741  (the design's names)
HOW = Perturbation("anp", rollouts=4, sigma=1e-3)
BPTT = Perturbation("bptt")


def networks(**options):
    torch.manual_seed(0)
    rnn = nn.RNN(I, H, dtype=torch.float64, **options)
    return rnn, nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=torch.float64)


def gradients(*modules):
    return torch.cat([parameter.grad.flatten() for module in modules for parameter in module.parameters()])


def clear(*modules):
    for module in modules:
        module.zero_grad()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def classes(*shape):
    return torch.randint(O, shape, generator=torch.Generator().manual_seed(sum(shape)))


def reference(outputs, targets, loss, valid):
    """torch's mean losses over the steps that count: outputs (T, B, O), valid (T, B) bool."""
    if targets.dim() == (3 if loss == "mse" else 2):
        rows, wanted = outputs[valid], targets[valid]
    else:
        last = valid.sum(0) - 1
        rows, wanted = outputs[last, torch.arange(len(last))], targets
    return F.mse_loss(rows, wanted) if loss == "mse" else F.cross_entropy(rows, wanted)


class Form:
    """The same problem in one form of inputs and targets, with torch's results for it."""

    def __init__(self, form, loss, network, *, per_sequence=False):
        batch_first = form == "batch first"
        self.rnn, self.head = networks(batch_first=batch_first, **NETWORKS[network])
        batch = 1 if form == "unbatched" else B
        self.lengths = [4, 6, 1] if form in {"lengths", "packed"} else None
        self.hx = 0.5 * draw(len(self.rnn.all_weights), batch, H) if form != "no hx" else None
        inputs = draw(T, batch, I)
        if loss == "mse":
            targets = draw(batch, O) if per_sequence else draw(T, batch, O)
        else:
            targets = classes(batch) if per_sequence else classes(T, batch)
            if not per_sequence:
                targets[0] = targets[3, 0] = -100
        valid = torch.arange(T).unsqueeze(1) < torch.tensor(self.lengths or [T] * batch)
        run = nn.utils.rnn.pack_padded_sequence(inputs, valid.sum(0), enforce_sorted=False)
        outputs, self.h_n = self.as_time_first()(run, self.hx)
        hidden = nn.utils.rnn.pad_packed_sequence(outputs)[0]
        self.outputs = torch.where(valid.unsqueeze(-1), self.head(hidden), 0)
        self.loss = reference(self.outputs, targets, loss, valid)
        self.inputs, self.targets = inputs, targets
        if form == "packed":
            self.inputs = nn.utils.rnn.pack_padded_sequence(inputs, valid.sum(0), enforce_sorted=False)
        if batch_first:
            self.inputs = inputs.transpose(0, 1)
            self.targets = targets if per_sequence else targets.transpose(0, 1)
            self.outputs = self.outputs.transpose(0, 1)
        if form == "unbatched":
            self.inputs, self.hx, self.h_n = inputs[:, 0], self.hx[:, 0], self.h_n[:, 0]
            self.targets = targets[0] if per_sequence else targets[:, 0]
            self.outputs = self.outputs[:, 0]

    def as_time_first(self):
        twin = nn.RNN(
            I, H, self.rnn.num_layers, bidirectional=self.rnn.bidirectional, nonlinearity=self.rnn.nonlinearity,
            bias=self.rnn.bias, dtype=torch.float64,
        )  # fmt: skip
        for name, parameter in self.rnn.named_parameters():
            setattr(twin, name, parameter)
        return twin

    def estimate(self, loss, perturbation):
        lengths = None if isinstance(self.inputs, nn.utils.rnn.PackedSequence) else self.lengths
        return anpgpu.estimate_grad_(
            self.rnn, self.head, self.inputs, self.targets, loss, perturbation=perturbation, hx=self.hx, lengths=lengths
        )


NETWORKS = {
    "one layer": {},
    "two layers of relu": {"num_layers": 2, "nonlinearity": "relu"},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}
FORMS = ("time first", "no hx", "batch first", "unbatched", "lengths", "packed")


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_clean_results_and_readout_gradients_are_torchs(network, form, loss, per_sequence):
    case = Form(form, loss, network, per_sequence=per_sequence)
    expected = torch.autograd.grad(case.loss, list(case.head.parameters()))
    seen = case.estimate(loss, HOW)
    assert_close(seen.loss, case.loss, "float64")
    assert_close(seen.outputs, case.outputs, "float64")
    assert_close(seen.h_n, case.h_n, "float64")
    for parameter, gradient in zip(case.head.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, "float64")
    assert int(seen.skipped) == 0
    assert not seen.outputs.requires_grad


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_bptt_is_autograd(network, form, loss, per_sequence):
    case = Form(form, loss, network, per_sequence=per_sequence)
    case.loss.backward()
    expected = gradients(case.rnn, case.head)
    clear(case.rnn, case.head)
    seen = case.estimate(loss, BPTT)
    assert_close(gradients(case.rnn, case.head), expected, "float64")
    assert_close(seen.loss, case.loss, "float64")
    assert_close(seen.outputs, case.outputs, "float64")
    assert_close(seen.h_n, case.h_n, "float64")


@pytest.mark.parametrize("method", ["anp", "np", "anp-ls", "anp-feedback", "wp", "bptt"])
def test_gradients_are_added(method):
    rnn, head = networks()
    inputs, targets, how = draw(T, B, I), draw(T, B, O), Perturbation(method, rollouts=4)

    def estimate(seed):
        anpgpu.load_estimator_state_(rnn, {})
        anpgpu.estimate_grad_(
            rnn, head, inputs, targets, perturbation=how, generator=torch.Generator().manual_seed(seed)
        )

    estimate(1)
    first = gradients(rnn, head)
    estimate(2)
    both = gradients(rnn, head)
    clear(rnn, head)
    estimate(2)
    assert_close(both, first + gradients(rnn, head), "float64")


def test_gradients_of_inputs_and_hx_go_to_leaves_that_want_them():
    rnn, head = networks(batch_first=True)
    inputs, hx = draw(B, T, I).requires_grad_(), draw(1, B, H).requires_grad_()
    targets = draw(B, T, O)
    F.mse_loss(head(rnn(inputs, hx)[0]), targets).backward()
    expected = inputs.grad.clone(), hx.grad.clone()
    inputs.grad = hx.grad = None
    clear(rnn, head)
    rnn.weight_ih_l0.requires_grad_(False)
    head.bias.requires_grad_(False)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, hx=hx, perturbation=BPTT)
    assert_close(inputs.grad, expected[0], "float64")
    assert_close(hx.grad, expected[1], "float64")
    assert rnn.weight_ih_l0.grad is None
    assert head.bias.grad is None
    assert rnn.weight_hh_l0.grad is not None


def test_hx_of_another_shape_is_quoted_as_it_was_given():
    rnn = anpgpu.RNN(2, 3)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 3\), got \(0, 0\)"):
        anpgpu.estimate_grad_(rnn, None, torch.zeros(4, 2), torch.zeros(4, 3), hx=torch.zeros(0, 0))


@pytest.mark.parametrize("name", ["inputs", "hx"])
def test_wp_says_that_it_has_no_gradient_of_inputs_and_hx(name):
    rnn, head = networks()
    tensors = {"inputs": draw(T, B, I), "hx": draw(1, B, H)}
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"'wp'.*{name} requires grad"):
        anpgpu.estimate_grad_(rnn, head, targets=draw(T, B, O), perturbation=Perturbation("wp", rollouts=2), **tensors)
    assert tensors[name].grad is None


def test_it_works_without_autograd_and_in_inference_mode():
    rnn, head = networks()
    inputs, targets = draw(T, B, I), draw(T, B, O)
    results, how = [], Perturbation("anp-ls")
    for mode in (torch.enable_grad, torch.no_grad):
        clear(rnn, head)
        with mode():
            generator = torch.Generator().manual_seed(0)
            anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=how, generator=generator)
        results.append(gradients(rnn, head))
    assert torch.equal(*results)


def test_an_anpgpu_rnn_brings_its_own_perturbation():
    rnn, head = networks()
    own = anpgpu.RNN(I, H, dtype=torch.float64, perturbation=Perturbation("np", rollouts=3))
    own.load_state_dict(rnn.state_dict())
    results = []
    for module, how in ((own, None), (rnn, own.perturbation), (own, HOW)):
        clear(module, head)
        generator = torch.Generator().manual_seed(0)
        anpgpu.estimate_grad_(module, head, draw(T, B, I), draw(T, B, O), perturbation=how, generator=generator)
        results.append(gradients(module))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_a_readout_the_state_is_the_output(loss, bidirectional):
    rnn, _ = networks(bidirectional=bidirectional)
    width = H * (1 + bidirectional)
    targets = draw(T, B, width) if loss == "mse" else classes(T, B) % width
    outputs = rnn(draw(T, B, I))[0]
    expected = reference(outputs, targets, loss, torch.ones(T, B, dtype=torch.bool))
    expected.backward()
    exact = gradients(rnn)
    clear(rnn)
    seen = anpgpu.estimate_grad_(rnn, None, draw(T, B, I), targets, loss, perturbation=BPTT)
    assert_close(gradients(rnn), exact, "float64")
    clear(rnn)
    seen = anpgpu.estimate_grad_(rnn, None, draw(T, B, I), targets, loss, perturbation=HOW)
    assert_close(seen.loss, expected, "float64")
    assert_close(seen.outputs, outputs, "float64")


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_backward_through_the_module_is_the_same_estimate(loss):
    # At a tiny sigma the measured loss equals its linearisation, which backward() uses.
    torch.manual_seed(0)
    how = Perturbation("anp", rollouts=6, sigma=1e-9, discount=0.9)
    rnn, head = anpgpu.RNN(I, H, 2, dtype=torch.float64, perturbation=how), nn.Linear(H, O, dtype=torch.float64)
    inputs, targets = draw(T, B, I), draw(T, B, O) if loss == "mse" else classes(T, B)
    torch.manual_seed(5)
    reference(head(rnn(inputs)[0]), targets, loss, torch.ones(T, B, dtype=torch.bool)).backward()
    expected = gradients(rnn, head)
    clear(rnn, head)
    torch.manual_seed(5)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, loss)
    assert_close(gradients(rnn, head), expected, "two_runs")


def quartic(outputs, targets):
    return (outputs - targets).pow(4).mean(-1)


def quartic_of_sequence(outputs, targets):
    return quartic(outputs, targets).mean(0)


@pytest.mark.parametrize("lengths", [None, [4, 6, 1]])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_differentiable_callable_by_bptt_is_autograd(bidirectional, lengths):
    rnn, head = networks(bidirectional=bidirectional)
    inputs, targets = draw(T, B, I), draw(T, B, O)
    valid = torch.arange(T).unsqueeze(1) < torch.tensor(lengths or [T] * B)
    run = nn.utils.rnn.pack_padded_sequence(inputs, valid.sum(0), enforce_sorted=False)
    hidden = nn.utils.rnn.pad_packed_sequence(rnn(run)[0])[0]
    expected = quartic(head(hidden), targets)[valid].mean()
    expected.backward()
    exact = gradients(rnn, head)
    clear(rnn, head)
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, quartic, perturbation=BPTT, lengths=lengths)
    assert_close(gradients(rnn, head), exact, "float64")
    assert_close(seen.loss, expected, "float64")
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, quartic, perturbation=HOW, lengths=lengths)
    assert_close(seen.loss, expected, "float64")


def test_a_per_sequence_callable_is_averaged_over_samples():
    rnn, head = networks()
    inputs, targets = draw(T, B, I), draw(T, B, O)
    expected = quartic(head(rnn(inputs)[0]), targets).mean()
    for how in (HOW, BPTT):
        seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, quartic_of_sequence, perturbation=how)
        assert_close(seen.loss, expected, "float64")


def test_a_callable_sees_the_documented_shapes():
    rnn, head = networks()
    shapes = []

    def loss(outputs, targets):
        shapes.append((tuple(outputs.shape), tuple(targets.shape)))
        return outputs.sum(-1)

    for targets in (draw(T, B, O), classes(T, B), draw(B, 2), classes(B)):
        anpgpu.estimate_grad_(rnn, head, draw(T, B, I), targets, loss, perturbation=HOW)
        tail = targets.shape[2:] if targets.shape[:2] == (T, B) else targets.shape[1:]
        first = (T, B, 1) if targets.shape[:2] == (T, B) else (B, 1)
        assert {shape for _, shape in shapes} == {(*first, *tail)}
        assert {shape for shape, _ in shapes} == {(T, B, 1, O), (T, B, 4, O)}
        shapes.clear()


def test_a_callable_that_shapes_do_not_suit_is_told_which_it_got():
    rnn, readout = networks()
    inputs, targets = draw(T, B, I), draw(T, B, 2)
    told = r"must match.*outputs of shape \(6, 3, 1, 7\) and targets of shape \(6, 3, 1, 2\), torch.float64"
    with pytest.raises(RuntimeError, match=told):
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, lambda y, t: (y - t).abs().sum(-1), perturbation=HOW)

    class OwnError(RuntimeError):
        pass

    def stop(outputs, targets):
        raise OwnError("enough")

    with pytest.raises(OwnError, match=r"^enough$"):
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, stop, perturbation=HOW)


def test_bptt_of_a_loss_without_a_gradient_raises():
    rnn, head = networks()
    with pytest.raises(ValueError, match="differentiable"):
        anpgpu.estimate_grad_(rnn, head, draw(T, B, I), classes(T, B), wrong_classes, perturbation=BPTT)


def wrong_classes(outputs, targets):
    return (outputs.argmax(-1) != targets).to(outputs.dtype)


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
def test_a_readout_without_parameters_goes_with_a_callable(method):
    rnn, _ = networks()
    head = nn.Sequential(nn.Linear(H, O, dtype=torch.float64), nn.Tanh()).requires_grad_(False)
    inputs, targets = draw(T, B, I), draw(T, B, O)
    expected = quartic(head(rnn(inputs)[0]), targets).mean()
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, quartic, perturbation=Perturbation(method, rollouts=4))
    assert_close(seen.loss, expected, "float64")
    assert bool(gradients(rnn).isfinite().all())
    assert all(parameter.grad is None for parameter in head.parameters())
    through_head = Perturbation("np", rollouts=4096, sigma=1e-4, discount=1.0)
    clear(rnn)
    anpgpu.estimate_grad_(
        rnn, head, inputs, targets, quartic, perturbation=through_head, generator=torch.Generator().manual_seed(0)
    )
    grads = gradients(rnn)
    clear(rnn)
    expected.backward()
    assert float(F.cosine_similarity(grads, gradients(rnn), dim=0)) > 0.95


def test_an_empty_batch_gives_zero_gradients():
    rnn, head = networks()
    anpgpu.estimate_grad_(rnn, head, draw(T, 0, I), draw(T, 0, O), perturbation=HOW)
    assert torch.equal(gradients(rnn, head), torch.zeros_like(gradients(rnn, head)))


def error_rate_task(batch, generator):
    """A task: name the symbol, of two, of two steps ago. One-hot inputs (8, B, 2), classes (8, B)."""
    symbols = torch.randint(2, (8, batch), generator=generator)
    targets = torch.roll(symbols, 2, 0)
    return F.one_hot(symbols, 2).float(), targets


def judged(outputs, targets):
    """0/1 errors of the steps that have a target."""
    wrong = (outputs.argmax(-1) != targets).float()
    return torch.where((torch.arange(8) < 2).view(8, 1, 1), 0.0, wrong)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_error_rate_itself_can_be_trained(seed):
    torch.manual_seed(seed)
    rnn, head = nn.RNN(2, 16), nn.Linear(16, 2)
    optimiser = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.01)
    how = Perturbation("anp", rollouts=64, sigma=0.3, discount=0.9, noise="gaussian")
    generator = torch.Generator().manual_seed(seed)
    rates = []
    for _ in range(300):
        optimiser.zero_grad()
        inputs, targets = error_rate_task(16, generator)
        seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, judged, perturbation=how)
        optimiser.step()
        rates.append(float(seen.loss) * 8 / 6)
    # Guessing is wrong half of the time.
    assert 0.3 < sum(rates[:10]) / 10 < 0.7
    late = sum(rates[-20:]) / 20
    assert not math.isnan(late)
    assert late < 0.05, f"error rate {late:.3f}"
