"""`RNN` and the ops under torch.func, forward mode, checkpointing, autocast and deepcopy: right, or a clear error.

The references are eager backward passes from the same seed.
"""

import copy

import pytest
import torch
import torch._dynamo.testing
from stepping import (
    FEATURES,
    HOW,
    WARNINGS,
    B,
    H,
    Model,
    P,
    T,
    assert_all_close,
    compiled,
    inputs_of,
    make_rnn,
    randn,
    same,
    step,
)
from tolerances import assert_close
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.utils.checkpoint import checkpoint

import anpgpu
from anpgpu import Perturbation, functional
from anpgpu.functional import LinearLoss
from anpgpu.kernels import rollout as rollout_kernel
from anpgpu.runtime.dispatch import implementation

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(11)


def test_gradients_of_torch_func_are_those_of_backward():
    rnn, inputs = make_rnn(num_layers=2), inputs_of()
    expected = step(rnn, inputs)[1:]

    def loss(parameters):
        return functional_call(rnn, parameters, (inputs,))[0].square().mean()

    attached = dict(rnn.named_parameters())
    for values in (attached, {name: parameter.detach() for name, parameter in attached.items()}):
        torch.manual_seed(7)
        assert same(list(grad(loss)(values).values()), expected)
        torch.manual_seed(7)
        assert same(list(vjp(loss, values)[1](torch.tensor(1.0))[0].values()), expected)
        torch.manual_seed(7)
        assert same(list(jacrev(loss)(values).values()), expected)


@pytest.mark.parametrize("over", ["inputs", "parameters"])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_gradients_is_a_loop_over_slices(randomness, over):
    rnn = make_rnn(num_layers=2)
    inputs = torch.stack([inputs_of(), 2 * inputs_of()])
    parameters = {
        name: torch.stack([parameter.detach(), 1.5 * parameter.detach()]) for name, parameter in rnn.named_parameters()
    }

    def loss(parameters, inputs):
        return functional_call(rnn, parameters, (inputs,))[0].square().mean()

    def slice_of(index):
        values = {name: stack[index if over == "parameters" else 0] for name, stack in parameters.items()}
        return values, inputs[index if over == "inputs" else 0]

    first = {name: stack[0] for name, stack in parameters.items()}
    arguments, dims = ((first, inputs), (None, 0)) if over == "inputs" else ((parameters, inputs[0]), (0, None))
    torch.manual_seed(7)
    mapped = vmap(grad(loss), in_dims=dims, randomness=randomness)(*arguments)
    torch.manual_seed(7)
    for index in range(2):
        if randomness == "same":
            torch.manual_seed(7)
        expected = grad(loss)(*slice_of(index))
        assert same([gradients[index] for gradients in mapped.values()], list(expected.values()))


def test_vmap_asks_how_to_draw_the_seed():
    rnn, inputs = make_rnn(), torch.stack([inputs_of(), 2 * inputs_of()])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(rnn)(inputs)
    outputs = vmap(lambda sequence: rnn(sequence)[0], randomness="different")(inputs)
    assert_close(outputs, torch.stack([rnn(sequence)[0] for sequence in inputs]), "float32")


def test_backward_through_vmap():
    rnn, inputs = make_rnn(), torch.stack([inputs_of(), 2 * inputs_of()])
    results = step(rnn, inputs, vmap(lambda sequence: rnn(sequence)[0], randomness="different"))
    assert rnn.last_estimate is None
    expected = step(rnn, inputs, lambda batch: torch.stack([rnn(sequence)[0] for sequence in batch]))
    assert_all_close(results, expected, "float32")


def test_vmap_of_the_ops():
    seeds = torch.arange(3)
    credit = randn(T, B, P)
    sums = vmap(lambda seed: functional.adjoint(credit, None, seed, method="np", units=H))(seeds)
    assert torch.equal(
        sums, torch.stack([functional.adjoint(credit, None, seed, method="np", units=H) for seed in seeds])
    )
    batches = randn(2, T, B, P)
    assert torch.equal(
        vmap(lambda delta_loss: functional.returns(delta_loss, 0.5), in_dims=1, out_dims=1)(
            batches.transpose(0, 1)
        ).transpose(0, 1),
        torch.stack([functional.returns(delta_loss, 0.5) for delta_loss in batches]),
    )


def exact_tangent(rnn, inputs):
    """The directional derivative of the clean run along its input, by an nn.RNN."""
    twin = nn.RNN(FEATURES, H).requires_grad_(False)
    twin.load_state_dict(rnn.state_dict())
    return jvp(lambda values: twin(values)[0], (inputs,), (inputs,))[1]


def test_forward_mode_is_exact_without_gradients_and_raises_with_them():
    rnn, inputs = make_rnn(), inputs_of()
    frozen = copy.deepcopy(rnn).requires_grad_(False)
    expected = exact_tangent(rnn, inputs)
    assert_close(jvp(lambda values: frozen(values)[0], (inputs,), (inputs,))[1], expected, "float32")
    run = torch.compile(lambda x: jvp(lambda values: frozen(values)[0], (x,), (x,))[1], fullgraph=True, backend="eager")
    assert_close(run(inputs), expected, "float32")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs, inputs)
        with torch.no_grad():
            assert_close(forward_ad.unpack_dual(rnn(dual)[0]).tangent, expected, "float32")
        assert_close(forward_ad.unpack_dual(compiled(frozen)(dual)[0]).tangent, expected, "float32")
        with pytest.raises(NotImplementedError, match="forward mode"):
            rnn(dual)
    with pytest.raises(NotImplementedError, match="forward mode"):
        jvp(lambda values: rnn(values)[0], (inputs,), (inputs,))
    for wrong in (lambda x: jvp(lambda values: rnn(values)[0], (x,), (x,))[1], lambda x: jvp(rnn, (x,), (x,))):
        with pytest.raises(Exception, match=r"Unsupported|jvp"):
            torch.compile(wrong, fullgraph=True, backend="eager")(inputs)
    with pytest.raises(Exception, match="functorch"):
        jvp(lambda values: compiled(rnn)(values)[0], (inputs,), (inputs,))


def functional_calls():
    hidden = torch.tanh(randn(T, B, H))
    loss = LinearLoss(randn(T, B, H))
    return {
        "rollout": (
            lambda preact: functional.rollout(preact, hidden, torch.eye(H), loss, 1, rollouts=P).delta_loss,
            hidden,
        ),
        "returns": (lambda delta_loss: functional.returns(delta_loss, 0.5), randn(T, B, P)),
        "adjoint": (lambda credit: functional.adjoint(credit, randn(T, B, P, H), 1), randn(T, B, P)),
        "least_squares": (
            lambda change: functional.least_squares(change, randn(T, B, P, H), 1)[0],
            randn(T, B, P),
        ),
    }


@pytest.mark.parametrize("op", ["rollout", "returns", "adjoint", "least_squares"])
def test_the_ops_have_no_derivative(op):
    call, values = functional_calls()[op]
    with pytest.raises(NotImplementedError, match="forward mode"):
        jvp(call, (values,), (values,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        call(forward_ad.make_dual(values, values))
    with pytest.raises(RuntimeError, match="ops of anpgpu have no derivative"):
        call(values.clone().requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match="ops of anpgpu have no derivative"):
        grad(lambda tensor: call(tensor).sum())(values)
    run = torch.compile(lambda tensor: jvp(call, (tensor,), (tensor,))[1], fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="Unsupported"):
        run(values)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.compile(call, fullgraph=True, backend="eager")(values.clone().requires_grad_()).sum().backward()


def test_second_derivatives_raise():
    rnn, inputs = make_rnn(), inputs_of()
    parameters = dict(rnn.named_parameters())

    def loss(parameters):
        return functional_call(rnn, parameters, (inputs,))[0].square().mean()

    with pytest.raises(RuntimeError, match="once differentiable"):
        grad(lambda weights: grad(loss)(weights)["weight_hh_l0"].sum())(parameters)
    with pytest.raises(RuntimeError, match="randomness"):
        hessian(loss)(parameters)
    (first,) = torch.autograd.grad(rnn(inputs)[0].square().mean(), rnn.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        first.sum().backward()
    small = anpgpu.RNN(2, 2, perturbation=HOW).double()
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.gradgradcheck(lambda values: small(values)[0], randn(2, 1, 2).double().requires_grad_())


def test_batched_gradients_raise_or_are_right():
    rnn = make_rnn()
    total = rnn(inputs_of())[0].sum((0, 1))
    with pytest.raises(RuntimeError, match="Batching rule not implemented for anpgpu::rnn_backward"):
        torch.autograd.grad(total, rnn.weight_hh_l0, torch.eye(H), is_grads_batched=True, retain_graph=True)
    parameters = dict(rnn.named_parameters())
    torch.manual_seed(7)
    jacobian = jacrev(lambda weights: functional_call(rnn, weights, (inputs_of(),))[0].sum((0, 1)))(parameters)
    torch.manual_seed(7)
    total = rnn(inputs_of())[0].sum((0, 1))
    rows = [torch.autograd.grad(total, rnn.weight_hh_l0, row, retain_graph=True)[0] for row in torch.eye(H)]
    assert torch.equal(jacobian["weight_hh_l0"], torch.stack(rows))


def test_compiled_torch_func_raises():
    rnn, inputs = make_rnn(), inputs_of()
    parameters = {name: parameter.detach() for name, parameter in rnn.named_parameters()}
    run = torch.compile(
        grad(lambda weights: functional_call(rnn, weights, (inputs,))[0].sum()), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="setup_context"):
        run(parameters)


@pytest.mark.parametrize(
    ("method", "reentrant", "compile_it"),
    [
        ("anp", False, False),
        ("anp", True, False),
        ("anp", False, True),
        pytest.param("anp", True, True, marks=pytest.mark.slow),
        ("wp", False, False),
    ],
)
def test_activation_checkpointing_gives_the_same_gradients(method, reentrant, compile_it):
    rnn = make_rnn(Perturbation(method, rollouts=4), num_layers=2, dropout=0.3)
    # Reentrant checkpointing needs an input with a gradient, and "wp" has none for the RNN's inputs.
    scale = torch.ones(1, requires_grad=True)

    def block(inputs, scale):
        return rnn(inputs)[0] * scale

    def through(inputs):
        return checkpoint(block, inputs, scale, use_reentrant=reentrant)

    expected = step(rnn, inputs_of(), lambda inputs: block(inputs, scale))
    run = torch.compile(through, fullgraph=True, backend="aot_eager") if compile_it else through
    assert_all_close(step(rnn, inputs_of(), run), expected, "float32" if compile_it else "exact")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_follow_autocast_and_sums_do_not(dtype, inside, torch_backend, monkeypatch):
    seen = []
    original = rollout_kernel.rollout

    def spy(preact, *args, options, **rest):
        seen.append((options.precision, preact.dtype))
        return original(preact, *args, options=options, **rest)

    implementation.cache_clear()
    monkeypatch.setattr(rollout_kernel, "rollout", spy)
    rnn, inputs = make_rnn(num_layers=2), inputs_of()
    with torch.autocast("cpu", dtype):
        outputs, _ = rnn(inputs)
        loss = outputs.float().square().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert outputs.dtype == dtype
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert seen == [(name, torch.float32)] * 2
    assert all(
        parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all())
        for parameter in rnn.parameters()
    )
    implementation.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_skips_a_step_that_overflows(dtype):
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def update(factor):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(inputs_of()).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

    before = [parameter.detach().clone() for parameter in model.parameters()]
    update(torch.inf)
    assert same(before, [parameter.detach() for parameter in model.parameters()])
    assert scaler.get_scale() == 2.0**9
    update(1.0)
    assert not any(
        torch.equal(parameter, updated) for parameter, updated in zip(before, model.parameters(), strict=True)
    )
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("parametrization", [orthogonal, weight_norm])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_parametrized_module_is_copied_after_a_forward_pass(parametrization, swapped):
    rnn = make_rnn()
    if swapped:
        anpgpu.unswap_(rnn)
    rnn = parametrization(rnn, "weight_hh_l0")
    if swapped:
        anpgpu.swap_(rnn, HOW)
    expected = step(rnn, inputs_of())
    other = copy.deepcopy(copy.deepcopy(rnn))
    assert same(step(other, inputs_of()), expected)
    assert_close(copy.deepcopy(other)(inputs_of())[0], rnn(inputs_of())[0], "float32")


def test_a_trace_is_the_clean_run():
    rnn = make_rnn()
    traced = torch.jit.trace(rnn, (inputs_of(),))
    assert_close(traced(inputs_of())[0], rnn(inputs_of())[0], "float32")
