"""`RNN` is an nn.RNN in all but its backward pass."""

import copy
import io
import math
import pickle

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation

HOW = Perturbation("anp", rollouts=4, sigma=1e-3)


def pair(*args, dtype=torch.float32, perturbation=HOW, **options):
    """An `RNN` and an nn.RNN with the same parameters."""
    torch.manual_seed(3)
    rnn = anpgpu.RNN(*args, dtype=dtype, perturbation=perturbation, **options)
    twin = nn.RNN(*args, dtype=dtype, **options)
    twin.load_state_dict(rnn.state_dict(), strict=True)
    return rnn, twin


def grads(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def step(rnn, inputs, seed=5, scale=1.0):
    """Gradients of one backward pass from a given seed."""
    rnn.zero_grad()
    torch.manual_seed(seed)
    (rnn(inputs)[0].square().sum() * scale).backward()
    return {name: grad.clone() for name, grad in grads(rnn).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


VARIANTS = {
    "plain": {},
    "relu": {"nonlinearity": "relu"},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "three layers, bidirectional": {"num_layers": 3, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "dropout, bidirectional": {"num_layers": 2, "dropout": 0.5, "bidirectional": True},
    "without bias": {"bias": False, "num_layers": 2},
    "batch first": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}


def inputs_of(form, features=4):
    torch.manual_seed(8)
    if form == "unbatched":
        return torch.randn(6, features)
    padded = torch.randn(6, 3, features)
    if form == "packed":
        return nn.utils.rnn.pack_padded_sequence(padded, [2, 6, 5], enforce_sorted=False)
    if form == "packed, sorted":
        return nn.utils.rnn.pack_padded_sequence(padded, [6, 5, 2])
    return padded


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "packed, sorted"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_clean_outputs_are_those_of_torch(variant, form, hx):
    rnn, twin = pair(4, 5, **VARIANTS[variant])
    inputs = inputs_of(form)
    state = None
    if hx:
        batch = 6 if rnn.batch_first and form == "batched" else 3
        shape = (len(rnn.all_weights), 5) if form == "unbatched" else (len(rnn.all_weights), batch, 5)
        state = torch.randn(shape)
    torch.manual_seed(6)
    outputs, h_n = rnn(inputs, state)
    torch.manual_seed(6)
    expected, expected_h_n = twin(inputs, state)
    if form.startswith("packed"):
        assert isinstance(outputs, nn.utils.rnn.PackedSequence)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            ours, torchs = getattr(outputs, name), getattr(expected, name)
            assert (ours is None and torchs is None) or torch.equal(ours, torchs)
        outputs, expected = outputs.data, expected.data
    assert outputs.requires_grad
    assert outputs.shape == expected.shape
    if form.startswith("packed") and "dropout" in variant:
        # torch draws masks for another number of elements.
        assert h_n.shape == expected_h_n.shape
    else:
        # Products round by the place of their operands in memory: even nn.RNN repeats only to rounding.
        assert_close(outputs, expected, "float32")
        assert_close(h_n, expected_h_n, "float32")
    rnn.eval()
    twin.eval()
    with torch.no_grad():
        assert_close(unpacked(rnn(inputs, state)[0]), unpacked(twin(inputs, state)[0]), "float32")


def unpacked(outputs):
    return outputs.data if isinstance(outputs, nn.utils.rnn.PackedSequence) else outputs


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_go_both_ways(variant):
    torch.manual_seed(1)
    rnn, twin = anpgpu.RNN(4, 5, **VARIANTS[variant]), nn.RNN(4, 5, **VARIANTS[variant])
    assert list(rnn.state_dict()) == list(twin.state_dict())
    rnn.load_state_dict(twin.state_dict(), strict=True)
    assert_same(rnn.state_dict(), twin.state_dict())
    anpgpu.RNN(4, 5, **VARIANTS[variant]).load_state_dict(rnn.state_dict(), strict=True)
    assert [tuple(weight.shape for weight in layer) for layer in rnn.all_weights] == [
        tuple(weight.shape for weight in layer) for layer in twin.all_weights
    ]
    rnn.flatten_parameters()


def test_constructor_is_that_of_torch():
    assert anpgpu.RNN(3, 4, 2, "relu").nonlinearity == "relu"
    assert repr(anpgpu.RNN(3, 4, 2)) == repr(nn.RNN(3, 4, 2))
    torch.manual_seed(4)
    rnn = anpgpu.RNN(3, 4, 2, bidirectional=True)
    torch.manual_seed(4)
    assert_same(rnn.state_dict(), nn.RNN(3, 4, 2, bidirectional=True).state_dict())
    assert isinstance(rnn, nn.RNN)
    assert anpgpu.RNN(3, 4, device="meta").weight_hh_l0.is_meta


CONSTRUCTIONS = {
    "hidden size 0": ((3, 0), {}),
    "hidden size a float": ((3, 2.5), {}),
    "no layers": ((3, 4, 0), {}),
    "nonlinearity": ((3, 4), {"nonlinearity": "gelu"}),
    "dropout a bool": ((3, 4), {"dropout": True}),
    "dropout above 1": ((3, 4), {"dropout": 1.5}),
    "unknown keyword": ((3, 4), {"colour": "red"}),
    "proj_size": ((3, 4), {"proj_size": 2}),
    "too few arguments": ((3,), {}),
}


def error_of(call):
    with pytest.raises(Exception, match=r"(?s).+") as caught:
        call()
    return caught.type


@pytest.mark.parametrize("case", CONSTRUCTIONS)
def test_bad_constructions_raise_what_torch_raises(case):
    args, options = CONSTRUCTIONS[case]
    assert error_of(lambda: anpgpu.RNN(*args, **options)) is error_of(lambda: nn.RNN(*args, **options))


CALLS = {
    "1D input": (torch.zeros(4), None),
    "4D input": (torch.zeros(1, 2, 3, 4), None),
    "wrong features": (torch.zeros(5, 2, 3), None),
    "no steps": (torch.zeros(0, 2, 4), None),
    "hx of another batch": (torch.zeros(5, 2, 4), torch.zeros(1, 3, 5)),
    "hx of other layers": (torch.zeros(5, 2, 4), torch.zeros(2, 2, 5)),
    "hx of another size": (torch.zeros(5, 2, 4), torch.zeros(1, 2, 6)),
    "2D hx with batched input": (torch.zeros(5, 2, 4), torch.zeros(1, 5)),
    "3D hx with unbatched input": (torch.zeros(5, 4), torch.zeros(1, 1, 5)),
    "input of another dtype": (torch.zeros(5, 2, 4).double(), None),
    "hx of another dtype": (torch.zeros(5, 2, 4), torch.zeros(1, 2, 5).double()),
    "input of whole numbers": (torch.zeros(5, 2, 4, dtype=torch.int64), None),
    "input a list": ([[0.0] * 4], None),
    "input None": (None, None),
    "packed with wrong features": (nn.utils.rnn.pack_sequence([torch.zeros(3, 7)]), None),
    "packed with hx of another batch": (nn.utils.rnn.pack_sequence([torch.zeros(3, 4)]), torch.zeros(1, 2, 5)),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls_raise_what_torch_raises(case):
    rnn, twin = pair(4, 5)
    assert error_of(lambda: rnn(*CALLS[case])) is error_of(lambda: twin(*CALLS[case]))


@pytest.mark.parametrize("variant", ["two layers", "three layers, bidirectional", "dropout", "batch first"])
def test_every_layer_reads_the_tensor_that_the_layer_below_wrote(variant, monkeypatch):
    # A view at an offset into a larger tensor makes products round differently on some processors.
    rnn, _ = pair(4, 5, **VARIANTS[variant])
    read, written, run = [], [], torch._VF.rnn_tanh

    def watched(inputs, *rest):
        read.append(inputs)
        results = run(inputs, *rest)
        written.append(results[0])
        return results

    monkeypatch.setattr(torch._VF, "rnn_tanh", watched, raising=False)
    rnn(inputs_of("batched"))
    assert len(read) == rnn.num_layers > 1
    for above, below in zip(read[1:], written[:-1], strict=True):
        assert above.storage_offset() == 0
        assert rnn.dropout or above.data_ptr() == below.data_ptr()


def test_nan_inputs_pass_through_forward():
    rnn, twin = pair(4, 5)
    inputs = torch.randn(6, 3, 4)
    inputs[2, 1, 0] = math.nan
    outputs, expected = rnn(inputs)[0], twin(inputs)[0]
    assert torch.equal(outputs.isnan(), expected.isnan())
    assert_close(outputs.nan_to_num(), expected.nan_to_num(), "float32")


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
@pytest.mark.parametrize("variant", ["plain", "three layers, bidirectional", "batch first"])
def test_empty_batch(variant, method):
    rnn, _ = pair(4, 5, **VARIANTS[variant], perturbation=Perturbation(method, rollouts=4))
    inputs = torch.zeros((0, 6, 4) if rnn.batch_first else (6, 0, 4))
    outputs, h_n = rnn(inputs)
    assert h_n.shape[1] == 0
    (outputs.sum() + h_n.sum()).backward()
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads(rnn).values())


def test_there_is_no_graph_through_time():
    rnn, _ = pair(4, 5)
    outputs, h_n = rnn(torch.randn(50, 3, 4))
    assert outputs.grad_fn is h_n.grad_fn
    below = {type(node).__name__ for node, _ in outputs.grad_fn.next_functions if node is not None}
    assert below == {"AccumulateGrad"}


@pytest.mark.parametrize("layers", [1, 2])
def test_what_is_kept_for_backward_is_inputs_weights_and_states(layers):
    rnn, _ = pair(4, 5, num_layers=layers)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda x: x):
        rnn(torch.randn(50, 3, 4))
    weights = sum(parameter.numel() for parameter in rnn.parameters())
    assert sum(saved) == 50 * 3 * 4 + layers * 51 * 3 * 5 + weights + 1


def test_sigma_does_not_change_the_clean_run():
    inputs = torch.randn(6, 3, 4)
    first, second = (pair(4, 5, perturbation=Perturbation(sigma=sigma))[0](inputs)[0] for sigma in (1e-6, 10.0))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
def test_the_same_seed_gives_the_same_gradients(method):
    rnn, _ = pair(4, 5, num_layers=2, perturbation=Perturbation(method, rollouts=6))
    inputs = torch.randn(6, 3, 4)
    first, again, other = step(rnn, inputs), step(rnn, inputs), step(rnn, inputs, seed=6)
    assert_same(first, again)
    assert not torch.equal(first["weight_hh_l0"], other["weight_hh_l0"])


def test_bptt_is_nn_rnn():
    rnn, twin = pair(4, 5, num_layers=2, perturbation=Perturbation("bptt"))
    inputs = torch.randn(6, 3, 4)
    assert_same(step(rnn, inputs), step(twin, inputs))


def test_deepcopy_and_pickle_give_the_same_module():
    rnn, _ = pair(4, 5, num_layers=2)
    inputs = torch.randn(6, 3, 4)
    expected = step(rnn, inputs)
    assert rnn.last_estimate is not None
    buffer = io.BytesIO()
    torch.save(rnn, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), torch.load(buffer, weights_only=False)):
        assert type(other) is anpgpu.RNN
        assert other.perturbation == rnn.perturbation
        assert_same(step(other, inputs), expected)
    assert copy.deepcopy(rnn).last_estimate is None


def test_a_copy_is_independent():
    rnn, _ = pair(4, 5)
    other = copy.deepcopy(rnn)
    step(other, torch.randn(6, 3, 4))
    assert rnn.last_estimate is None
    assert all(grad is None for grad in grads(rnn).values())


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(method):
    rnn, _ = pair(4, 5, num_layers=2, perturbation=Perturbation(method, rollouts=6))
    inputs = torch.randn(6, 3, 4)
    everything = step(rnn, inputs)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "bias_ih_l1"):
        getattr(rnn, name).requires_grad_(False)
    rnn.zero_grad()
    torch.manual_seed(5)
    rnn(inputs)[0].square().sum().backward()
    for name, parameter in rnn.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert parameter.grad is None or torch.equal(parameter.grad, everything[name])


def test_a_first_state_gets_its_gradient_from_frozen_layers():
    rnn, _ = pair(4, 5, num_layers=2, perturbation=Perturbation("np", rollouts=6))
    inputs, expected = torch.randn(6, 3, 4), []
    for frozen in (False, True):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(rnn, name).requires_grad_(not frozen)
        hx = torch.full((2, 3, 5), 0.1, requires_grad=True)
        torch.manual_seed(5)
        rnn(inputs, hx)[0].square().sum().backward()
        expected.append(hx.grad)
    assert expected[0][0].any()
    assert torch.equal(*expected)


def test_without_gradients_only_training_mode_draws_a_seed():
    # Activation checkpointing repeats such a pass with gradients; evaluation draws nothing, as nn.RNN's.
    rnn, _ = pair(4, 5)
    inputs, drawn = torch.randn(6, 3, 4), {}
    for training in (False, True):
        before = torch.get_rng_state()
        with torch.no_grad():
            rnn.train(training)(inputs)
        drawn[training] = not torch.equal(torch.get_rng_state(), before)
    assert drawn == {False: False, True: True}


def test_gradients_accumulate():
    rnn, _ = pair(4, 5)
    inputs = torch.randn(6, 3, 4)
    first, second = step(rnn, inputs, seed=1), step(rnn, inputs, seed=2)
    rnn.zero_grad()
    for seed in (1, 2):
        torch.manual_seed(seed)
        rnn(inputs)[0].square().sum().backward()
    for name, grad in grads(rnn).items():
        assert_close(grad, first[name] + second[name], "float32")


@pytest.mark.parametrize("method", ["anp", "np", "wp"])
def test_gradients_are_linear_in_the_incoming_gradient(method):
    rnn, _ = pair(4, 5, num_layers=2, bidirectional=True, perturbation=Perturbation(method, rollouts=6))
    inputs = torch.randn(6, 3, 4)
    plain = step(rnn, inputs)
    for scale in (1024.0, -3.0):
        for name, grad in step(rnn, inputs, scale=scale).items():
            assert_close(grad, scale * plain[name], "float32_long")


def test_grad_scaler_unscales_to_the_same_step():
    inputs = torch.randn(6, 3, 4)
    rnn, _ = pair(4, 5)
    expected = step(rnn, inputs)
    rnn.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimiser = torch.optim.SGD(rnn.parameters(), lr=0.1)
    torch.manual_seed(5)
    scaler.scale(rnn(inputs)[0].square().sum()).backward()
    scaler.unscale_(optimiser)
    for name, grad in grads(rnn).items():
        assert_close(grad, expected[name], "float32_long")
    before = rnn.weight_hh_l0.detach().clone()
    rnn.weight_hh_l0.grad[0, 0] = math.inf
    optimiser = torch.optim.SGD(rnn.parameters(), lr=0.1)
    scaler.step(optimiser)
    assert torch.equal(rnn.weight_hh_l0, before)


def test_double_backward_raises():
    rnn, _ = pair(4, 5)
    loss = rnn(torch.randn(6, 3, 4))[0].square().sum()
    (first,) = torch.autograd.grad(loss, rnn.weight_hh_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        first.sum().backward()


def test_a_retained_graph_gives_the_same_gradient_twice():
    rnn, _ = pair(4, 5, num_layers=2)
    loss = rnn(torch.randn(6, 3, 4))[0].square().sum()
    first = torch.autograd.grad(loss, list(rnn.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(rnn.parameters()))
    assert all(torch.equal(grad, grad_again) for grad, grad_again in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_wp_raises_where_it_has_no_estimate():
    rnn, _ = pair(4, 5, perturbation=Perturbation("wp"))
    with pytest.raises(RuntimeError, match="the input requires grad"):
        rnn(torch.randn(6, 3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="hx requires grad"):
        rnn(torch.randn(6, 3, 4), torch.zeros(1, 3, 5, requires_grad=True))


def test_last_estimate_tells_what_the_backward_pass_found():
    rnn, _ = pair(4, 5, num_layers=2)
    outputs, _ = rnn(torch.randn(6, 3, 4))
    assert rnn.last_estimate is None
    outputs.sum().backward()
    estimate = rnn.last_estimate
    assert isinstance(estimate, anpgpu.Estimate)
    assert int(estimate.skipped) == 0
    assert -1 <= float(estimate.split_half) <= 1
    assert (estimate.loss, estimate.outputs, estimate.h_n) == (None, None, None)
    with pytest.raises(AttributeError):
        rnn.last_estimate = None


def test_the_perturbation_may_be_replaced():
    rnn, _ = pair(4, 5)
    inputs = torch.randn(6, 3, 4)
    before = step(rnn, inputs)
    rnn.perturbation = Perturbation("np", rollouts=4)
    assert not torch.equal(step(rnn, inputs)["weight_hh_l0"], before["weight_hh_l0"])
    rnn.perturbation = "np"
    with pytest.raises(TypeError, match=r"perturbation.*'np'"):
        rnn(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_type_of_their_parameters(dtype):
    rnn, _ = pair(4, 5, dtype=dtype, perturbation=Perturbation("np", rollouts=512, discount=1.0))
    inputs = torch.randn(6, 3, 4).to(dtype).requires_grad_()
    outputs, _ = rnn(inputs)
    assert outputs.dtype == dtype
    outputs.float().square().sum().backward()
    assert all(grad.dtype == dtype and bool(grad.isfinite().all()) for grad in grads(rnn).values())
    assert inputs.grad.dtype == dtype
