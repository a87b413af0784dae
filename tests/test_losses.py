"""Loss modules of torch's and weights of steps: values and gradients are autograd's, errors name what is wrong."""

import numpy as np
import pytest
import torch
from loss_cases import (
    BPTT,
    CLASS_WEIGHT,
    CLOSE,
    FORMS,
    MODULES,
    NETWORKS,
    B,
    Form,
    H,
    I,
    O,
    T,
    assert_same,
    draw,
    squared,
)
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

import anpgpu
from anpgpu import Perturbation
from anpgpu.task.losses import Steps, Targets

# Modules.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", MODULES)
def test_a_loss_module_is_torchs(module, form):
    problem = Form(form, MODULES[module])
    assert_same(problem, problem.expected(problem.loss))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("module", ["mse, sum", "everything", "everything, sum"])
def test_every_network_measures_a_module(module, network, head):
    loss = MODULES[module]
    if not head and isinstance(loss, nn.CrossEntropyLoss):
        width = 2 * H if network == "bidirectional" else H
        weight = torch.linspace(0.5, 2, width, dtype=torch.float64)
        loss = nn.CrossEntropyLoss(weight, ignore_index=1, label_smoothing=0.3, reduction=loss.reduction)
    problem = Form("lengths", loss, network, head=head)
    assert_same(problem, problem.expected(loss))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_takes_one_target_of_a_sequence(module):
    problem = Form("lengths", MODULES[module], per_sequence=True)
    assert_same(problem, problem.expected(problem.loss))


@pytest.mark.parametrize("segments", [False, True])
def test_a_smoothed_loss_does_not_depend_on_division(segments, monkeypatch):
    problem = Form("lengths", MODULES["everything"])
    problem.estimate(CLOSE, generator=torch.Generator().manual_seed(1))
    expected = problem.gradient
    memory = anpgpu.runtime.memory
    shape = memory.Shape.divide
    if segments:
        monkeypatch.setattr(memory.Shape, "divide", lambda self, *rest: shape(self, *rest)._replace(segments=3))
    else:
        monkeypatch.setattr(memory.Shape, "divide", lambda self, *rest: shape(self, *rest)._replace(samples=1))
    problem.estimate(CLOSE, generator=torch.Generator().manual_seed(1))
    assert_close(problem.gradient, expected, "unridged")


@pytest.mark.parametrize("sigma", [1e-3, 2.0])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("method", ["np", "anp-ls"])
def test_compiled_kernels_measure_a_smoothed_loss_as_torch_does(method, head, sigma):
    pytest.importorskip("numba", reason="needs Numba, which `make` installs")
    gradients = []
    for backend in ("torch", "numba"):
        torch.manual_seed(0)
        rnn, readout = nn.RNN(I, O), nn.Linear(O, O) if head else None
        loss = nn.CrossEntropyLoss(CLASS_WEIGHT.float(), ignore_index=1, label_smoothing=0.3)
        anpgpu.estimate_grad_(
            rnn, readout, draw(T, B, I).float(), torch.arange(T * B).view(T, B) % O, loss,
            perturbation=Perturbation(method, rollouts=8, sigma=sigma, backend=backend, precision="fp32"),
            step_weight=torch.rand(T, B, generator=torch.Generator().manual_seed(2)), lengths=[6, 0, 3],
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        gradients.append(rnn.weight_hh_l0.grad)
    assert_close(gradients[1], gradients[0], "float32_long")


@pytest.mark.parametrize("module", ["mse, sum", "everything"])
@pytest.mark.parametrize("method", ["np", "wp"])
def test_modules_are_measured_without_bias(method, module):
    problem = Form("time first", MODULES[module])
    _, gradient, _, _ = problem.expected(problem.loss)
    how, seeds = Perturbation(method, rollouts=4096, sigma=1e-5, discount=1.0), torch.Generator().manual_seed(1)
    found = []
    for _ in range(4):
        problem.estimate(how, generator=seeds)
        found.append(problem.gradient)
    of_rnn = sum(weight.numel() for weight in problem.rnn.parameters())
    for part in (slice(of_rnn), slice(of_rnn, None)):
        assert float(F.cosine_similarity(sum(found)[part], gradient[part], dim=0)) > 0.98
        assert float((sum(found)[part] / 4).norm() / gradient[part].norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("module", ["mse, sum", "class weights", "everything"])
def test_a_perturbed_readout_measures_a_module(module):
    problem = Form("lengths", MODULES[module])
    _, gradient, _, _ = problem.expected(problem.loss)
    problem.estimate(Perturbation("np", rollouts=20000, sigma=1e-5, discount=1.0, readout="perturbed"))
    of_readout = slice(-O * (H + 1), None)
    assert float(F.cosine_similarity(problem.gradient[of_readout], gradient[of_readout], dim=0)) > 0.99


@pytest.mark.parametrize("rule", ["published-np", "published-anp", "published-wp"])
def test_the_published_rules_do_not_depend_on_the_reduction(rule):
    found = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        rnn, head = (nn.RNN(I, H, bias=False), nn.Linear(H, O, bias=False))
        loss = nn.CrossEntropyLoss(label_smoothing=0.2, reduction=reduction)
        how = Perturbation(rule, rollouts=1, noise="gaussian")
        targets = torch.arange(T * B).view(T, B) % O
        generator = torch.Generator().manual_seed(3)
        inputs = draw(T, B, I).float()
        anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how, generator=generator)
        found.append(torch.cat([leaf.grad.flatten() for module in (rnn, head) for leaf in module.parameters()]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-2, 1.0, 30.0])
def test_the_difference_of_a_smoothed_loss_has_no_cancellation(size):
    loss = anpgpu.task.cross_entropy.CrossEntropy
    module = nn.CrossEntropyLoss(CLASS_WEIGHT, label_smoothing=0.3)
    outputs, readout, targets = draw(T, B, O), draw(O, H), (torch.arange(T * B).view(T, B) % O)
    canonical, steps = Targets(targets, True), Steps(T, B, None, targets.device)
    measured = loss(canonical, steps, loss.options_of(module))
    whole, everyone = slice(0, T), slice(0, B)
    spec = measured.spec(readout.float(), outputs.float(), whole, everyone, False, None)
    delta_h = size * draw(T, B, 7, H)
    delta_o = delta_h.float() @ spec.readout.T
    seen = spec.differences(whole, delta_o).double()
    # In float64 of twice the digits: the change along a straight line, integrated from its slope.
    nodes, weights = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(40))
    moved = delta_h @ readout.T
    expected = torch.zeros(T, B, 7, dtype=torch.float64)
    for node, weight in zip(nodes, weights, strict=True):
        for rollout in range(7):
            slope = measured.output_gradient(outputs + (0.5 + node) * moved[:, :, rollout], whole, everyone)
            expected[..., rollout] += weight * (slope * moved[:, :, rollout]).sum(-1)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=3e-6 * size / (T * B))


def test_a_subclass_that_computes_something_else_is_a_callable():
    class Own(nn.MSELoss):
        def forward(self, outputs, targets):
            return (outputs - targets).abs().mean(-1)

    problem = Form("time first", nn.MSELoss())
    assert_close(problem.estimate(BPTT, Own()).loss, problem.expected(F.l1_loss)[0], "float64")


def test_diagnose_takes_a_module_and_weights():
    torch.manual_seed(0)
    rnn, head = nn.RNN(I, H), nn.Linear(H, O)
    inputs, targets = draw(T, B, I).float(), torch.arange(T * B).view(T, B) % O
    grid = {"methods": ("anp-ls",), "rollouts": (16,), "discounts": (1.0,), "sigmas": (1e-3,), "repeats": 2}
    loss, weight = nn.CrossEntropyLoss(label_smoothing=0.1), torch.rand(T, B)
    found = anpgpu.diagnose(rnn, head, inputs, targets, loss, step_weight=weight, progress=False, **grid)
    assert found.best.total.cosine > 0.9
    with pytest.raises(ValueError, match="reduction='none'"):
        anpgpu.diagnose(rnn, head, inputs, targets, nn.CrossEntropyLoss(reduction="none"), progress=False, **grid)
    with pytest.raises(ValueError, match="step_weight"):
        anpgpu.diagnose(rnn, head, inputs, targets, loss, step_weight=-weight, progress=False, **grid)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.MSELoss(reduction="none"), ValueError, "loss must have reduction='mean' or 'sum', got reduction='none'"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "got reduction='none'"),
        (nn.CrossEntropyLoss(reduction="median"), ValueError, "got reduction='median'"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1\.5"),
        (nn.CrossEntropyLoss(torch.ones(O + 1)), ValueError, r"loss\.weight must have shape \(5,\).*\(6,\)"),
        (nn.CrossEntropyLoss(-torch.ones(O)), ValueError, r"loss\.weight must be finite and not negative, got \[-1"),
        (nn.CrossEntropyLoss(torch.zeros(O)), ValueError, r"loss\.weight must not sum to 0"),
        (nn.CrossEntropyLoss(torch.ones(O, device="meta")), RuntimeError, r"loss\.weight is on meta"),
        (nn.CrossEntropyLoss(ignore_index=-1), ValueError, r"in \[0, 4\] or -1, got -100"),
    ],
)
def test_a_module_that_cannot_be_honoured_says_what_is_wrong(loss, error, message):
    problem = Form("time first", nn.CrossEntropyLoss())
    with pytest.raises(error, match=message):
        problem.estimate(CLOSE, loss)
    assert all(leaf.grad is None for leaf in problem.leaves)


def test_targets_that_are_all_ignored_raise():
    problem = Form("time first", nn.CrossEntropyLoss(ignore_index=3))
    problem.targets = torch.full((T, B), 3)
    with pytest.raises(ValueError, match=r"no step has a loss: every target is ignore_index \(3\)"):
        problem.estimate(CLOSE)


def test_class_probabilities_are_refused_by_the_type_of_targets():
    problem = Form("time first", nn.CrossEntropyLoss())
    problem.targets = torch.softmax(draw(T, B, O), -1)
    with pytest.raises(ValueError, match="targets must have shape"):
        problem.estimate(CLOSE)


def test_a_frozen_readout_does_not_go_with_a_module():
    problem = Form("time first", nn.MSELoss(), head=False)
    problem.head = nn.Tanh()
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear or None with loss=MSELoss\(\), got Tanh"):
        problem.estimate(CLOSE)


@pytest.mark.parametrize(
    "loss",
    [
        nn.L1Loss(),
        nn.BCELoss(),
        nn.NLLLoss(),
        nn.GaussianNLLLoss(),
        F.cross_entropy,
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_other_modules_hint_at_the_forms_that_fit(loss):
    problem = Form("time first", nn.CrossEntropyLoss())
    hint = r"(?s)loss='mse', loss='cross_entropy', torch\.nn\.MSELoss\(\.\.\.\)"
    with pytest.raises((RuntimeError, ValueError, TypeError), match=hint if "Gaussian" not in repr(loss) else "var"):
        problem.estimate(CLOSE, loss)


# Weights of steps.


def weighted(module, weight):
    """torch's loss of single steps, weighed by hand."""

    def loss(outputs, targets):
        if isinstance(module, nn.MSELoss):
            total = module.reduction == "sum"
            each = (outputs - targets).square().mean(-1)
            return (weight * each).sum() * O if total else (weight * each).sum() / weight.sum()
        each = F.cross_entropy(
            outputs, targets, module.weight, ignore_index=module.ignore_index, reduction="none",
            label_smoothing=module.label_smoothing,
        )  # fmt: skip
        if module.reduction == "sum":
            return (weight * each).sum()
        shares = (targets != module.ignore_index).double()
        if module.weight is not None:
            shares = shares * module.weight[targets.clamp(min=0)]
        return (weight * each).sum() / (weight * shares).sum()

    return loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", ["mse", "mse, sum", "cross-entropy", "class weights", "everything, sum"])
def test_step_weight_is_a_weighted_mean(module, form):
    problem = Form(form, MODULES[module])
    problem.step_weight = torch.rand(T, problem.batch, generator=torch.Generator().manual_seed(4)).double()
    problem.step_weight[1] = 0
    weight = problem.step_weight[problem.valid]
    expected = problem.expected(weighted(problem.loss, weight))
    # What stands in padding is not read.
    problem.step_weight = torch.where(problem.valid, problem.step_weight, torch.nan)
    assert_same(problem, expected)


@pytest.mark.parametrize("form", FORMS)
def test_step_weight_weighs_a_callable(form):
    problem = Form(form, nn.MSELoss())
    problem.step_weight = torch.rand(T, problem.batch, generator=torch.Generator().manual_seed(4)).double()
    problem.step_weight[1] = 0
    weight = problem.step_weight[problem.valid]
    expected = problem.expected(weighted(problem.loss, weight))
    problem.loss = squared
    assert_same(problem, expected, bptt_only=True)
    seen = problem.estimate(CLOSE)
    assert_close(seen.loss, expected[0], "float64")
    of_rnn = sum(weight.numel() for weight in problem.rnn.parameters())
    assert float(F.cosine_similarity(problem.gradient[:of_rnn], expected[1][:of_rnn], dim=0)) > 0.9999


def test_a_weight_of_one_changes_nothing_and_a_mask_may_be_bool():
    problem = Form("lengths", nn.MSELoss())
    problem.estimate(CLOSE, generator=torch.Generator().manual_seed(1))
    expected = problem.gradient
    problem.step_weight = torch.ones(T, B, dtype=torch.bool)
    problem.estimate(CLOSE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(problem.gradient, expected)


def test_a_step_of_weight_0_may_have_a_target_of_any_value():
    problem = Form("time first", nn.MSELoss())
    problem.step_weight = torch.ones(T, B).double()
    problem.step_weight[2, 1] = 0
    problem.targets[2, 1] = torch.nan
    assert float(problem.estimate(CLOSE).loss) > 0
    assert bool(problem.gradient.isfinite().all())


@pytest.mark.parametrize("loss", [nn.MSELoss(), squared])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-torch.ones(T, B), ValueError, r"step_weight must be finite and not negative, got -1\.0"),
        (torch.full((T, B), torch.nan), ValueError, "step_weight must be finite and not negative, got nan"),
        (torch.full((T, B), torch.inf), ValueError, "step_weight must be finite and not negative, got inf"),
        (torch.zeros(T, B), ValueError, "step_weight must not sum to 0"),
        (torch.ones(B, T), ValueError, r"step_weight must have shape \(6, 3\), got \(3, 6\)"),
        (torch.ones(T, B, 1), ValueError, r"step_weight must have shape \(6, 3\), got \(6, 3, 1\)"),
        (torch.ones(T, B, dtype=torch.complex64), TypeError, "step_weight must be real, got torch.complex64"),
        ([1.0] * T, TypeError, "step_weight must be a tensor, got list"),
        (torch.ones(T, B, device="meta"), RuntimeError, "step_weight is on meta"),
    ],
)
def test_a_wrong_step_weight_is_named(weight, error, message, loss):
    problem = Form("time first", nn.MSELoss())
    with pytest.raises(error, match=message):
        problem.estimate(CLOSE, loss, step_weight=weight)
    assert all(leaf.grad is None for leaf in problem.leaves)


def test_the_loss_of_a_sequence_has_no_steps_to_weigh():
    problem = Form("time first", nn.MSELoss(), per_sequence=True)
    with pytest.raises(ValueError, match=rf"but targets are one for each sequence: got targets of shape \({B},"):
        problem.estimate(CLOSE, step_weight=torch.ones(T, B))
    with pytest.raises(ValueError, match=rf"but the loss returns one of each sequence, shape \(B, p\) = \({B}, "):
        problem.estimate(CLOSE, lambda outputs, targets: outputs.sum((0, -1)), step_weight=torch.ones(T, B))
