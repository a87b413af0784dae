"""Modules, `estimate_grad_`, `diagnose` and the swaps on thousands of inputs, good, wild and wrong.

The clean run must be torch's. Gradients must be finite wherever torch's are, unless the call raises that no rollout is.
A refused call must leave no gradient, and its message must tell what was wrong.
"""

import functools
import math
import warnings

import pytest
import torch
from fuzzed_losses import absolute, classes, expected, losses, some_lengths, step_weights, takes_classes, whole_sequence
from fuzzed_states import check_loaded_state, check_state, state_calls
from fuzzing import CONTENTS, FLOATS, LEGS, MODERATE, REFUSED, TRIED, Call, fuzz, spoilt, tensor, tried
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation, decorrelation

METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp", "bptt")
"""Methods that train GRU and LSTM."""
NOTHING = ("no step has a loss", "must not sum to 0")
"""What errors say where no step counts."""
REFUSES = (ValueError, TypeError, RuntimeError, MemoryError)
FEATURES = 2


@st.composite
def perturbations(draw, methods=METHODS):
    return Perturbation(
        draw(st.sampled_from(methods)),
        rollouts=draw(st.sampled_from([1, 2, 5, 9])),
        sigma=draw(st.sampled_from([1e-3, 1e-3, 1e-6, 0.5])),
        noise=draw(st.sampled_from(["rademacher", "gaussian"])),
        discount=draw(st.sampled_from([0, 0.9, 1])),
        ridge=draw(st.sampled_from([0.1, 0.1, 0, 1e-6])),
        rank=draw(st.sampled_from([1, None, 2])),
        readout=draw(st.sampled_from(["exact", "perturbed"])),
        max_memory=draw(st.sampled_from([None, None, 2**26])),
        split_half=draw(st.booleans()),
        prior=draw(st.sampled_from(["learned", "learned", "known", "none"])),
        warmup=draw(st.sampled_from([0, 2])),
        follow_weights=draw(st.booleans()),
    )


@st.composite
def constructions(draw):
    """Valid arguments of a network."""
    return {
        "input_size": FEATURES,
        "hidden_size": draw(st.sampled_from([1, 3, 8])),
        "num_layers": draw(st.sampled_from([1, 1, 2])),
        "nonlinearity": draw(st.sampled_from(["tanh", "relu"])),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": 0.0,
        "bidirectional": draw(st.booleans()),
        "dtype": draw(st.sampled_from(FLOATS)),
    }


def built(arguments, seed=1):
    torch.manual_seed(seed)
    return nn.RNN(**arguments)


@st.composite
def sequences(draw, arguments, content):
    """Inputs of the network in any layout, with their sizes: (inputs, T, B or None)."""
    time, batch = draw(st.integers(1, 4)), draw(st.sampled_from([None, 0, 1, 2, 3]))
    shape = (time, FEATURES) if batch is None else (time, batch, FEATURES)
    values = draw(tensor(shape, arguments["dtype"], content))
    if batch is not None and arguments["batch_first"]:
        values = values.transpose(0, 1)
    return values, time, batch


@st.composite
def rnn_calls(draw, name="RNN"):
    construction = draw(constructions())
    if name != "RNN":
        del construction["nonlinearity"]
    content = draw(st.sampled_from(CONTENTS))
    inputs, time, batch = draw(sequences(construction, content))
    if batch and draw(st.booleans()):
        lengths = [1 + (3 * sample) % time for sample in range(batch)]
        inputs = pack_padded_sequence(inputs, lengths, batch_first=construction["batch_first"], enforce_sorted=False)
    how = draw(perturbations(METHODS))
    arguments = construction | {"perturbation": how}
    arguments, spoiled = draw(spoilt(arguments))
    return Call(arguments | {"inputs": inputs}, spoiled, content)


def joined(states):
    """The final states in one tensor."""
    return torch.stack(states) if isinstance(states, tuple) else states


def run_rnn(name, inputs, perturbation, **options):
    # In eval mode, since tests/test_conformance.py compares dropout.
    rnn = quietly(getattr(anpgpu, name), **options, perturbation=perturbation).eval()
    outputs, final = rnn(inputs)
    return rnn, outputs, joined(final)


def quietly(kind, **options):
    """A network, without torch's warning that dropout needs a second layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return kind(**options)


def check_rnn(name, call):
    options = {name: value for name, value in call.arguments.items() if name not in {"inputs", "perturbation"}}
    # The constructor's messages are torch's, which do not always quote the value.
    torchs = bool(call.spoiled) and call.spoiled != ("perturbation",)
    result = tried(name, functools.partial(run_rnn, name), call, errors=(*REFUSES, AttributeError), quoting=not torchs)
    if result is None:
        # tests/test_conformance.py compares types of errors. With this many layers torch would not come to an end.
        endless = isinstance(call.arguments["num_layers"], int) and call.arguments["num_layers"] >= 2**40
        if torchs and not endless:
            assert refused(lambda: quietly(getattr(nn, name), **options)(call.arguments["inputs"])) is not None
        return
    rnn, outputs, h_n = result
    twin = quietly(getattr(nn, name), **options).eval()
    twin.load_state_dict(rnn.state_dict(), strict=True)
    if refused(lambda: twin(call.arguments["inputs"])) is not None:
        # torch's constructor accepts numbers for flags and flags for numbers, with which its forward pass fails.
        assert call.spoiled
        return
    expected, final = twin(call.arguments["inputs"])
    expected_h_n = joined(final)
    values, right = (states if isinstance(states, torch.Tensor) else states.data for states in (outputs, expected))
    assert_same_states(values, right)
    assert_same_states(h_n, expected_h_n)
    if not values.requires_grad:
        return
    (right.sum() + expected_h_n.sum()).backward()
    finite = all(bool(parameter.grad.isfinite().all()) for parameter in twin.parameters())
    refusal = refused((values.sum() + h_n.sum()).backward)
    if refusal is not None:
        assert call.content not in MODERATE
        assert "is not finite" in refusal
        return
    for ours, theirs in zip(rnn.parameters(), twin.parameters(), strict=True):
        assert (ours.grad.shape, ours.grad.dtype) == (theirs.grad.shape, theirs.grad.dtype)
        assert not finite or bool(ours.grad.isfinite().all())


def refused(call):
    """The message of the error that a call raised, or None."""
    try:
        call()
    except (*REFUSES, AttributeError) as error:
        return str(error)
    return None


def assert_same_states(states, expected):
    assert (states.shape, states.dtype) == (expected.shape, expected.dtype)
    rounding = 1e-5 if states.dtype == torch.float32 else 1e-13
    assert torch.allclose(states, expected, rtol=rounding, atol=rounding, equal_nan=True)


@st.composite
def estimate_arguments(draw, content):
    construction = draw(constructions())
    wild_targets = draw(st.booleans())
    inputs, time, batch = draw(sequences(construction, "moderate" if wild_targets else content))
    rnn = built(construction)
    width = construction["hidden_size"] * (1 + construction["bidirectional"])
    outputs = draw(st.sampled_from([None, 1, 3]))
    torch.manual_seed(2)
    readout = None if outputs is None else nn.Linear(width, outputs, dtype=construction["dtype"])
    outputs = outputs or width
    loss = draw(losses(outputs))
    sizes = (time,) if batch is None else (batch, time) if construction["batch_first"] else (time, batch)
    if takes_classes(loss):
        targets = draw(classes(sizes, outputs, loss))
    else:
        targets = draw(tensor((*sizes, outputs), construction["dtype"], content if wild_targets else "moderate"))
    states = (construction["num_layers"] * (1 + construction["bidirectional"]), *(() if batch is None else (batch,)))
    return {
        "rnn": rnn,
        "readout": readout,
        "inputs": inputs,
        "targets": targets,
        "loss": loss,
        "perturbation": draw(perturbations()),
        "hx": draw(st.one_of(st.none(), tensor((*states, construction["hidden_size"]), construction["dtype"]))),
        "lengths": draw(some_lengths(time, batch)),
        "step_weight": draw(step_weights(sizes, loss, construction["dtype"])),
        "generator": draw(st.sampled_from([None, torch.Generator()])),
    }


@st.composite
def estimate_calls(draw):
    content = draw(st.sampled_from(CONTENTS))
    return Call(*draw(spoilt(draw(estimate_arguments(content)))), content=content)


def check_estimate(call):
    arguments = call.arguments
    wild = call.content not in MODERATE
    leaves = [leaf for name in ("rnn", "readout") for leaf in parameters_of(arguments[name])]
    # A callable loss raises its own errors.
    quoting = call.spoiled != ("loss",) or not callable(arguments["loss"])
    excuses = ("is not finite",) if wild else ()
    # Where an argument is wrong and nothing counts besides, the message may name either.
    excuses += NOTHING if call.spoiled or wild else ()
    if not call.spoiled and not wild and told_by_torch(arguments, clean_run(arguments)[0]).nothing:
        TRIED["estimate_grad_"] += 1
        REFUSED["estimate_grad_"] += 1
        message = refused(lambda: anpgpu.estimate_grad_(**arguments)) or ""
        assert any(reason in message for reason in NOTHING)
        assert all(leaf.grad is None for leaf in leaves)
        return
    estimate = tried("estimate_grad_", anpgpu.estimate_grad_, call, errors=REFUSES, quoting=quoting, excuses=excuses)
    if estimate is None:
        assert all(leaf.grad is None for leaf in leaves)
        return
    outputs, h_n = clean_run(arguments)
    assert_same_states(estimate.outputs, outputs)
    assert_same_states(estimate.h_n, h_n)
    if not call.spoiled and not wild and outputs.numel():
        loss = told_by_torch(arguments, outputs).loss
        assert loss.isnan() or torch.allclose(estimate.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert estimate.outputs.dim() == 2 + (arguments["inputs"].dim() == 3)
    assert estimate.loss.shape == estimate.skipped.shape == estimate.split_half.shape == ()
    if not call.spoiled:
        counted = arguments["loss"] in {absolute, whole_sequence} and arguments["perturbation"].method != "bptt"
        assert (estimate.moved is not None) == counted
    if not wild:
        assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves if leaf.requires_grad)


@torch.no_grad()
def clean_run(arguments):
    """Outputs and final states of torch's network and readout, sample by sample; outputs past a length are 0."""
    rnn, inputs, hx, lengths = (arguments[name] for name in ("rnn", "inputs", "hx", "lengths"))
    readout = arguments["readout"] or nn.Identity()
    if lengths is None:
        outputs, h_n = rnn(inputs, hx)
        return readout(outputs), h_n
    time_dim = int(rnn.batch_first)
    hx = inputs.new_zeros(len(rnn.all_weights), len(lengths), rnn.hidden_size) if hx is None else hx
    outputs, h_n = torch.zeros_like(readout(rnn(inputs)[0])), hx.clone()
    for sample, length in enumerate(lengths):
        if length:
            sequence = inputs.select(1 - time_dim, sample)[:length]
            states, h_n[:, sample] = rnn(sequence, hx[:, sample].contiguous())
            outputs.select(1 - time_dim, sample)[:length] = readout(states)
    return outputs, h_n


def told_by_torch(arguments, outputs):
    """What torch says of the loss of clean outputs."""
    loss, targets, lengths, weight = (arguments[name] for name in ("loss", "targets", "lengths", "step_weight"))
    valid = torch.ones(outputs.shape[:-1], dtype=torch.bool)
    if lengths is not None and lengths:
        steps = torch.arange(outputs.shape[int(arguments["rnn"].batch_first)])
        before = steps.unsqueeze(1) < torch.tensor(lengths)
        valid = before.T if arguments["rnn"].batch_first else before
    return expected(loss, outputs, targets, valid, weight)


OURS = (anpgpu.RNN, anpgpu.GRU, anpgpu.LSTM)


def parameters_of(value):
    return list(value.parameters()) if isinstance(value, nn.Module) else []


@st.composite
def models(draw, depth=0):
    """A module with recurrent networks inside, some of them ours."""
    kind = draw(
        st.sampled_from(
            ["rnn", "ours", "gru", "lstm", "our lstm", "cell", "linear", "parametrized", "nested", "nested"]
        )
    )
    if kind == "nested" and depth < 3:
        return nn.Sequential(*draw(st.lists(models(depth + 1), max_size=3)))
    if kind == "parametrized":
        return nn.utils.parametrizations.weight_norm(nn.RNN(2, 3), "weight_hh_l0")
    torchs = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "cell": nn.GRUCell}
    return (torchs | {"ours": anpgpu.RNN, "our lstm": anpgpu.LSTM}).get(kind, nn.Linear)(2, 3)


class Derived(nn.RNN):
    """A user's subclass of nn.RNN."""


@st.composite
def swap_calls(draw, with_perturbation):
    model = draw(models())
    if not draw(st.integers(0, 9)):
        model = nn.Sequential(model, Derived(2, 3))
    arguments = {"model": model} | ({"perturbation": draw(perturbations())} if with_perturbation else {})
    arguments, spoiled = draw(spoilt(arguments))
    return Call(arguments, spoiled)


def check_swap(call):
    model = call.arguments["model"]
    before = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    weights = [id(parameter) for parameter in parameters_of(model)]
    derived = Derived in before
    excuses = ("Derived is a subclass",) if derived else ("there is no nn.RNN, nn.GRU or nn.LSTM to swap",)
    excuses = excuses if derived or not any(issubclass(kind, nn.RNNBase) for kind in before) else ()
    count = tried("swap_", anpgpu.swap_, call, excuses=excuses)
    assert count is None or not derived
    after = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    assert [id(parameter) for parameter in parameters_of(model)] == weights
    if count is None:
        assert after == before
        return
    assert count == sum(issubclass(kind, nn.RNNBase) for kind in before)
    assert count == sum(issubclass(kind, OURS) for kind in after)
    assert anpgpu.unswap_(model) == count


def check_unswap(call):
    model = call.arguments["model"]
    count = tried("unswap_", anpgpu.unswap_, call)
    if count is not None:
        assert not any(isinstance(module, OURS) for module in model.modules())
        assert anpgpu.unswap_(model) == 0


@st.composite
def diagnose_calls(draw):
    arguments = draw(estimate_arguments(draw(st.sampled_from(CONTENTS))))
    arguments.pop("generator")
    grid = {
        "methods": draw(st.sampled_from([("anp",), ["np"], ("wp",), ("anp-feedback",)])),
        "rollouts": draw(st.sampled_from([(1,), [3]])),
        "discounts": draw(st.sampled_from([(0,), (0.9,)])),
        "sigmas": draw(st.sampled_from([(1e-3,), [1e-2]])),
        "repeats": 2,
        "tolerance": draw(st.sampled_from([0, 0.05])),
        "seed": draw(st.sampled_from([0, 2**62])),
        "progress": False,
    }
    return Call(*draw(spoilt(arguments | grid)))


def check_diagnose(call):
    arguments = call.arguments
    leaves = [leaf for name in ("rnn", "readout") for leaf in parameters_of(arguments[name])]
    before = [leaf.detach().clone() for leaf in leaves]
    state = torch.get_rng_state()
    quoting = call.spoiled != ("loss",) or not callable(arguments["loss"])
    excuses = ("no setting of the grid gives", *NOTHING)
    diagnosis = tried("diagnose", anpgpu.diagnose, call, errors=REFUSES, quoting=quoting, excuses=excuses)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(leaf.grad is None for leaf in leaves)
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(leaves, before, strict=True))
    if diagnosis is not None:
        assert diagnosis.rows
        assert all(math.isnan(row.total.cosine) or -1.001 <= row.total.cosine <= 1.001 for row in diagnosis.rows)
        assert isinstance(diagnosis.table(), str)


@st.composite
def decorrelate_calls(draw):
    size = draw(st.sampled_from([1, 3]))
    dtype, content = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(CONTENTS))
    arguments = {
        "size": size,
        "rate": draw(st.sampled_from([1e-3, 0.05])),
        "every": draw(st.sampled_from([1, 2])),
        "dtype": dtype,
        "activity": draw(tensor((draw(st.integers(1, 3)), 2, size), dtype, content)),
    }
    return Call(*draw(spoilt(arguments)), content=content)


def decorrelate(activity, **options):
    module = decorrelation.Decorrelate(**options)
    module.update_(activity)
    return module, module(activity)


def check_decorrelate(call):
    excuses = () if call.content in MODERATE else ("a step is stable",)
    # Where dtype is None, a message quotes torch's default instead.
    quoting = call.arguments["dtype"] is not None
    result = tried("Decorrelate", decorrelate, call, errors=REFUSES, quoting=quoting, excuses=excuses)
    if result is not None:
        module, seen = result
        assert bool(module.matrix.isfinite().all())
        assert seen.shape == call.arguments["activity"].shape


@st.composite
def decorrelation_calls(draw):
    construction = draw(constructions())
    content = draw(st.sampled_from(CONTENTS))
    inputs, _, _ = draw(sequences(construction, content))
    width = construction["hidden_size"] * (1 + construction["bidirectional"])
    arguments = {
        "rnn": built(construction),
        "readout": draw(st.sampled_from([None, nn.Linear(width, 2, dtype=construction["dtype"])])),
        "hidden": True,
        "inputs": draw(st.booleans()),
        "rate": draw(st.sampled_from([1e-3, 0.05])),
        "every": draw(st.sampled_from([1, 2])),
        "average_over_time": draw(st.booleans()),
    }
    arguments, spoiled = draw(spoilt(arguments))
    return Call(arguments | {"sequences": inputs}, spoiled, content)


def decorrelated(sequences, **options):
    attached = decorrelation.Decorrelation(**options)
    attached.update_(sequences)
    return attached


def check_decorrelation(call):
    excuses = () if call.content in MODERATE else ("a step is stable",)
    attached = tried("Decorrelation", decorrelated, call, errors=REFUSES, excuses=excuses)
    if attached is not None:
        assert attached.matrices
        assert all(bool(matrix.isfinite().all()) for matrix in attached.matrices.values())


@st.composite
def correlation_calls(draw):
    content = draw(st.sampled_from(CONTENTS))
    shape = (draw(st.integers(2, 5)), draw(st.sampled_from([2, 4])))
    arguments = {
        "activity": draw(tensor(shape, draw(st.sampled_from(FLOATS)), content)),
        "centred": draw(st.booleans()),
    }
    return Call(*draw(spoilt(arguments)), content=content)


def check_correlation(call):
    figure = tried("squared_correlation", decorrelation.squared_correlation, call, errors=REFUSES)
    if figure is not None and not call.spoiled:
        assert figure.shape == ()
        assert figure.dtype == torch.float64
        assert (
            call.content in {"nan", "inf", "-inf", "huge"} or bool(figure.isnan()) or -1e-9 <= float(figure) <= 1 + 1e-9
        )


TARGETS = {
    **{name: (rnn_calls(name), functools.partial(check_rnn, name)) for name in ("RNN", "GRU", "LSTM")},
    "estimate_grad_": (estimate_calls(), check_estimate),
    "swap_": (swap_calls(with_perturbation=True), check_swap),
    "unswap_": (swap_calls(with_perturbation=False), check_unswap),
    "diagnose": (diagnose_calls(), check_diagnose),
    "estimator_state": (state_calls(models(), loads=False), check_state),
    "load_estimator_state_": (state_calls(models(), loads=True), check_loaded_state),
    "Decorrelate": (decorrelate_calls(), check_decorrelate),
    "Decorrelation": (decorrelation_calls(), check_decorrelation),
    "squared_correlation": (correlation_calls(), check_correlation),
}

ELSEWHERE = {"Perturbation", "functional", "decorrelation"}
"""Fuzzed in tests/test_fuzz.py, or a module whose functions and classes are targets here."""

RESULTS = {"Estimate", "NOISE_STREAM_VERSION", "__version__"}
"""Names that are results or constants, never called."""


def test_everything_public_is_fuzzed():
    assert set(anpgpu.__all__) - RESULTS - ELSEWHERE <= set(TARGETS)


@pytest.mark.filterwarnings("ignore:swap_ left alone:UserWarning")
# A relu unit that is 0 everywhere.
@pytest.mark.filterwarnings("ignore:no rollout changed the loss:UserWarning")
@pytest.mark.filterwarnings("ignore:method='anp-feedback' with rollouts=1:UserWarning")
@pytest.mark.parametrize("inputs", LEGS)
@pytest.mark.parametrize("name", TARGETS)
def test_modules_answer_or_refuse(name, inputs):
    assert fuzz(name, *TARGETS[name], inputs) >= inputs
