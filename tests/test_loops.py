"""Training loops as people write them: mixed precision, accumulation, clipping, hooks, optimisers, trainers."""

import copy
import runpy
import sys
import warnings

import pytest
import torch
from distributed_cases import EXAMPLES, METHODS, example
from tolerances import assert_close, relative_error
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import anpgpu
from anpgpu import Perturbation

T, B, I, H, O = 6, 4, 3, 8, 2  # noqa: E741  (the design's names)


class Model(nn.Module):
    def __init__(self, method="anp", dtype=None, **options):
        super().__init__()
        torch.manual_seed(0)
        how = Perturbation(method, rollouts=8)
        self.rnn = anpgpu.RNN(I, H, perturbation=how, dtype=dtype, **options)
        self.head = nn.Linear(H, O, dtype=dtype)

    def forward(self, inputs):
        return self.head(self.rnn(inputs)[0])


def data(dtype=None):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(T, B, size, generator=generator, dtype=dtype) for size in (I, O)]


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def backward(model, inputs, targets, *, seed=2, scale=1.0):
    torch.manual_seed(seed)
    (scale * mse_loss(model(inputs), targets)).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_estimates_are_those_of_float32_but_for_rounding(method, dtype):
    inputs, targets = data()
    plain, mixed = Model(method), Model(method)
    backward(plain, inputs, targets)
    with torch.autocast("cpu", dtype):
        torch.manual_seed(2)
        outputs = mixed(inputs)
        loss = mse_loss(outputs.float(), targets)
    loss.backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(mixed))
    error = relative_error(flat(gradients(mixed)), flat(gradients(plain)))
    # The error is not 0, since the operands follow autocast. Least squares amplifies their rounding, 4e-3 and 5e-4.
    assert 1e-6 < error < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-12])
@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_is_linear_in_the_loss(method, scale):
    # Loss scaling relies on linearity; powers of two change no rounding.
    inputs, targets = data()
    plain, scaled = Model(method), Model(method)
    backward(plain, inputs, targets)
    backward(scaled, inputs, targets, scale=scale)
    assert_close(flat(gradients(scaled)) / scale, flat(gradients(plain)), "float32")


def test_grad_scaler_finds_overflow_skips_the_update_and_goes_on():
    inputs, targets = data()
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    # The loss is near 1: times 2**40 it is finite, but its gradient through fp16 operands of the head is not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    scales, moved = [], []
    for _ in range(30):
        before = flat(model.parameters())
        with torch.autocast("cpu", torch.float16):
            loss = mse_loss(model(inputs).float(), targets)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(flat(model.parameters()), before))
    skipped = moved.index(True)
    # While gradients overflow, the scale is halved and updates are skipped; then all updates are made.
    assert 5 < skipped < 29
    assert scales[:skipped] == [2.0 ** (39 - count) for count in range(skipped)]
    assert all(moved[skipped:])
    assert bool(flat(model.parameters()).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_halves_are_the_sum_of_their_estimates(method):
    inputs, targets = data(torch.float64)
    parts, state = [], {}
    for half in (slice(0, 2), slice(2, 4)):
        model = Model(method, torch.float64)
        # What the first half has taught.
        anpgpu.load_estimator_state_(model, state)
        backward(model, inputs[:, half], targets[:, half], seed=half.start, scale=0.5)
        parts.append(flat(gradients(model)))
        state = anpgpu.estimator_state(model)
    model = Model(method, torch.float64)
    for half in (slice(0, 2), slice(2, 4)):
        backward(model, inputs[:, half], targets[:, half], seed=half.start, scale=0.5)
    assert_close(flat(gradients(model)), parts[0] + parts[1], "float64")
    # Each backward pass draws its own noise.
    backward(model, inputs, targets, seed=9)
    again = Model(method, torch.float64)
    backward(again, inputs, targets, seed=0)
    assert relative_error(flat(gradients(model)) - parts[0] - parts[1], flat(gradients(again))) > 1e-3


def test_accumulated_halves_are_the_gradient_of_the_whole_batch():
    # With enough rollouts least squares is exact, so that halves and whole agree whatever the noise.
    inputs, targets = data(torch.float64)
    grads = []
    for halves in ((slice(0, 4),), (slice(0, 2), slice(2, 4))):
        model = Model("anp-ls", torch.float64)
        model.rnn.perturbation = Perturbation("anp-ls", rollouts=64, sigma=1e-6, discount=1.0, ridge=0.0)
        for half in halves:
            backward(model, inputs[:, half], targets[:, half], seed=half.start, scale=1 / len(halves))
        grads.append(flat(gradients(model)))
    assert relative_error(grads[1], grads[0]) < 1e-3


def test_clipping_by_norm_and_value():
    inputs, targets = data()
    model = Model()
    backward(model, inputs, targets)
    expected = flat(gradients(model))
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(norm) == pytest.approx(float(expected.norm()), rel=1e-5)
    assert_close(flat(gradients(model)), expected * 0.01 / expected.norm(), "float32_long")
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    assert float(flat(gradients(model)).abs().max()) <= 1e-4


def test_hooks_on_tensors_parameters_and_modules():
    inputs, targets = data()
    inputs.requires_grad_()
    plain, hooked = Model(), Model()
    backward(plain, inputs, targets)
    seen = []
    handles = [
        hooked.rnn.weight_hh_l0.register_hook(lambda grad: 3 * grad),
        hooked.rnn.weight_ih_l0.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone())),
        hooked.rnn.register_forward_pre_hook(lambda module, args: seen.append("before")),
        hooked.rnn.register_forward_hook(lambda module, args, result: seen.append("after")),
        hooked.rnn.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].clone())),
    ]
    backward(hooked, inputs, targets)
    for handle in handles:
        handle.remove()
    assert torch.equal(hooked.rnn.weight_hh_l0.grad, 3 * plain.rnn.weight_hh_l0.grad)
    assert torch.equal(hooked.rnn.bias_hh_l0.grad, plain.rnn.bias_hh_l0.grad)
    assert seen[:2] == ["before", "after"]
    shapes = {tuple(tensor.shape) for tensor in seen[2:]}
    assert shapes == {(H, I), (T, B, H)}
    hooked.zero_grad()
    backward(hooked, inputs, targets)
    assert torch.equal(hooked.rnn.weight_hh_l0.grad, plain.rnn.weight_hh_l0.grad)


def test_a_hook_on_the_outputs_changes_what_the_rollouts_answer_to():
    inputs, _ = data(torch.float64)
    model = Model(dtype=torch.float64)
    grads = []
    for factor in (1.0, 4.0):
        torch.manual_seed(2)
        model.zero_grad()
        outputs = model.rnn(inputs)[0]
        outputs.register_hook(lambda grad, factor=factor: factor * grad)
        outputs.sum().backward()
        grads.append(flat([model.rnn.weight_hh_l0.grad]))
    assert_close(grads[1], 4 * grads[0], "float64")


OPTIMISERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.02, "amsgrad": True},
    "AdamW": {"lr": 0.02, "fused": True},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.005, "centered": True},
    "Adagrad": {"lr": 0.05},
    "Adamax": {"lr": 0.02},
    "ASGD": {"lr": 0.2},
    "Rprop": {"lr": 0.01},
    "Adadelta": {"lr": 5.0},
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_lowers_the_loss(name):
    inputs, targets = data()
    targets = inputs[..., :O].roll(1, 0)
    model = Model()
    optimiser = getattr(torch.optim, name)(model.parameters(), **OPTIMISERS[name])
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_lbfgs_gets_the_same_noise_within_a_step():
    # L-BFGS calls the closure many times and needs the same function with its gradient: a fixed seed, many rollouts.
    inputs, _ = data()
    targets = inputs[..., :O].roll(1, 0)
    model = Model("anp-ls")
    model.rnn.perturbation = Perturbation("anp-ls", rollouts=16, discount=1.0, ridge=1e-3)
    optimiser = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=10)
    losses = []

    def closure():
        torch.manual_seed(3)
        optimiser.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(4):
        optimiser.step(closure)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimiser: torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5),
        lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 8),
        lambda optimiser: torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=8, cycle_momentum=False),
        lambda optimiser: torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=0, threshold=10),
    ],
    ids=["step", "cosine", "one cycle", "plateau"],
)
def test_schedules_move_the_learning_rate_and_the_weights_follow(schedule):
    inputs, targets = data()
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = schedule(optimiser)
    rates = []
    for _ in range(6):
        rate = optimiser.param_groups[0]["lr"]
        before = flat(model.parameters())
        optimiser.zero_grad()
        loss = mse_loss(model(inputs), targets)
        loss.backward()
        optimiser.step()
        expected = before - rate * flat(gradients(model))
        assert_close(flat(model.parameters()), expected, "float32")
        scheduler.step(*((loss.detach(),) if "Plateau" in type(scheduler).__name__ else ()))
        rates.append(rate)
    assert len(set(rates)) > 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing_gives_bitwise_the_same_gradients(method, reentrant, dropout):
    inputs, targets = data()
    plain, checkpointed = (Model(method, num_layers=2, dropout=dropout) for _ in range(2))
    backward(plain, inputs, targets)
    torch.manual_seed(2)
    start = torch.zeros(1, requires_grad=True)

    def run(start):
        return checkpointed(inputs + start.detach())

    mse_loss(checkpoint(run, start, use_reentrant=reentrant), targets).backward()
    assert all(torch.equal(*pair) for pair in zip(gradients(plain), gradients(checkpointed), strict=True))


def test_a_second_backward_through_the_same_graph_repeats_the_estimate():
    inputs, targets = data()
    model = Model()
    loss = mse_loss(model(inputs), targets)
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert all(torch.equal(2 * single, double) for single, double in zip(first, gradients(model), strict=True))


def test_averaged_weights_and_copies_train_on():
    # torch.optim.swa_utils deep-copies the model and later runs the copy.
    inputs, targets = data()
    model = Model()
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        mse_loss(model(inputs), targets).backward()
        optimiser.step()
        averaged.update_parameters(model)
    copied = copy.deepcopy(averaged.module)
    backward(copied, inputs, targets)
    assert all(bool(grad.isfinite().all()) for grad in gradients(copied))
    assert relative_error(flat(averaged.module.parameters()), flat(model.parameters())) > 1e-4


def run_example(name, *arguments):
    """Run an example as its command does; return what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_example_mixed_precision(capsys):
    run_example("amp", "--steps", "40")
    first, last = (float(word) for word in capsys.readouterr().out.split("loss ")[1].split(" -> "))
    assert last < 0.6 * first


def test_example_checkpointing(capsys):
    run_example("checkpointing")
    assert "30 gradients, bitwise the same with checkpointing" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_example_lightning():
    # The trainer warns of its own dependencies, of few workers and of missing loggers.
    module = example("lightning_module")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    model, trainer = module.train(2, 512, accelerator="cpu", **quiet)
    assert trainer.global_step == 2 * 512 // 64
    assert float(trainer.callback_metrics["loss"]) < 0.6
    assert 0 < float(trainer.callback_metrics["split_half"]) < 1
    assert isinstance(model.rnn, anpgpu.RNN)


@pytest.mark.filterwarnings("ignore")
def test_example_accelerate():
    import accelerate

    losses = example("accelerate_loop").train(3, accelerate.Accelerator(cpu=True), sequences=512)
    assert losses[-1] < 0.9 * losses[0]


def tagger(seed, updates, hidden=32, cell="RNN"):
    """The share of right tags by BPTT and, with `anpgpu.swap_` and nothing else, by perturbation; in percent."""
    module = example("tagger")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods = (None, anpgpu.Perturbation())
        return [100 * module.train(seed, updates, hidden, how, cell=cell, quiet=True).right for how in methods]


def test_example_tagger():
    # So few updates that neither has learned all of it. A tagger with one direction alone gets at most 77.
    exact, perturbed = tagger(0, 80, 24)
    assert exact > 88
    assert perturbed > 80


@pytest.mark.parametrize("cell", [pytest.param("GRU", marks=pytest.mark.slow), "LSTM"])
def test_example_tagger_of_gated_cells(cell):
    # Gated cells learn later: BPTT has 84 and 80.
    exact, perturbed = tagger(0, 80, 24, cell)
    assert exact > 78
    assert perturbed > exact - 2


@pytest.mark.slow
def test_tagger_reaches_the_accuracy_of_backpropagation():
    for seed in range(3):
        exact, perturbed = tagger(seed, 400)
        assert exact > 98
        assert perturbed > exact - 2
