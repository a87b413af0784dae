"""Every public function on thousands of inputs: the right result, or an error that tells what was wrong.

A result is right if it equals that of the same values in plain float64 tensors, and if the result of a sample does not
depend on other samples. No input may crash, hang or give a wrong result silently. The inputs of each function are
counted, shown at the end of the run, and compared with the promised number.
"""

import dataclasses
import math

import pytest
import torch
from fuzzing import (
    CONTENTS,
    EVERY_DTYPE,
    FLOATS,
    LEGS,
    MODERATE,
    Call,
    assert_right,
    fuzz,
    plain,
    spoilt,
    tensor,
    tried,
)
from hypothesis import strategies as st

from anpgpu import Perturbation, functional
from anpgpu.functional import Counters, CrossEntropyLoss, LinearLoss, OutputsOnly, Purpose, SquaredLoss

SEEDS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-(2**63), 2**63 - 1).map(torch.tensor))
SIGMAS = st.sampled_from([1e-3, 1e-3, 1e-2, 0.5, 1e-6])
COUNTERS = st.builds(
    Counters,
    purpose=st.sampled_from([Purpose.HIDDEN, 3]),
    layer=st.sampled_from([0, 255]),
    time=st.sampled_from([0, 9]),
    rollout=st.sampled_from([0, 2**31]),
    sample=st.sampled_from([0, 77]),
    rank=st.sampled_from([0, 4095]),
)
SIZES = st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(1, 6), st.sampled_from([1, 2, 5, 8, 33]))
"""T, B, P, H."""


@st.composite
def noise_arguments(draw):
    arguments = {
        "seed": draw(SEEDS),
        "shape": draw(SIZES),
        "sigma": draw(SIGMAS),
        "kind": draw(st.sampled_from(["rademacher", "gaussian"])),
        "counters": draw(COUNTERS),
        "dtype": draw(st.sampled_from(EVERY_DTYPE[:4])),
        "device": draw(st.sampled_from([None, "cpu"])),
        "backend": draw(st.sampled_from(["auto", "torch"])),
    }
    if arguments["dtype"] == torch.float16:
        arguments["sigma"] = max(arguments["sigma"], 1e-2)
    return arguments


@st.composite
def noise_calls(draw):
    return Call(*draw(spoilt(draw(noise_arguments()))), autocast=draw(st.booleans()))


def check_noise(call, name="noise"):
    values = tried(name, functional.noise, call)
    if values is None:
        return
    arguments = call.arguments
    assert values.shape == tuple(arguments["shape"])
    assert values.dtype == arguments["dtype"]
    if values.is_meta or not values.numel():
        return
    unit = values.double() / arguments["sigma"]
    error = torch.finfo(values.dtype).eps
    if arguments["kind"] == "rademacher":
        assert bool(((unit.abs() - 1).abs() <= error).all())
    else:
        assert bool((unit.abs() < 6.8).all())
    # The last step and sample drawn alone, by their counters: noise does not depend on the block around it.
    steps, samples, rollouts, units = arguments["shape"]
    where = arguments["counters"]
    there = where._replace(time=where.time + steps - 1, sample=where.sample + samples - 1)
    row = functional.noise(**(arguments | {"shape": (1, 1, rollouts, units), "counters": there}))
    assert torch.equal(row[0, 0], values[-1, -1])


@st.composite
def counters_calls(draw):
    arguments = draw(noise_arguments()) | {"shape": (2, 1, 2, 3)}
    fields, spoiled = draw(spoilt(draw(COUNTERS)._asdict(), always=True))
    call = Call(arguments | {"counters": Counters(**fields)}, ("counters",))
    return call if spoiled else call._replace(spoiled=())


def check_counters(call):
    check_noise(call, "Counters")


@st.composite
def purpose_calls(draw):
    return Call({"value": draw(st.one_of(st.integers(-2, 7), st.text(), st.floats()))}, ("value",))


def check_purpose(call):
    purpose = tried("Purpose", Purpose, call)
    value = call.arguments["value"]
    assert (purpose is not None) == any(member == value for member in Purpose)


@st.composite
def returns_calls(draw):
    time, batch, rollouts, _ = draw(SIZES)
    dtype, content = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(CONTENTS))
    arguments = {
        "delta_loss": draw(tensor((time, batch, rollouts), dtype, content)),
        "discount": draw(st.sampled_from([0, 0.0, 0.5, 0.9, 1, 1.0])),
        "carry": draw(st.one_of(st.none(), tensor((batch, rollouts), dtype))),
        "backend": "auto",
    }
    return Call(*draw(spoilt(arguments)), content=content, autocast=draw(st.booleans()))


def check_returns(call):
    credit = tried("returns", functional.returns, call)
    if credit is not None:
        assert credit.dtype == call.arguments["delta_loss"].dtype
        if credit.is_meta:
            assert credit.shape == call.arguments["delta_loss"].shape
            return
        expected = functional.returns(**plain(call))
        if call.content in MODERATE and not call.spoiled:
            assert_right(credit, expected, wide=50)
        assert_alone(credit, call, functional.returns, ("delta_loss",))


def assert_alone(result, call, function, names):
    """Results of the other samples are the same where the first sample, which holds wild values, is set to zero."""
    if call.content in MODERATE or call.spoiled:
        return
    tame = {name: call.arguments[name].clone() for name in names}
    for value in tame.values():
        value[:, :1] = 0
    expected = function(**(call.arguments | tame))
    expected = expected if isinstance(expected, torch.Tensor) else expected.delta_loss
    assert torch.equal(result[:, 1:], expected[:, 1:])


@st.composite
def adjoint_calls(draw):
    time, batch, rollouts, units = draw(SIZES)
    dtype, content = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(CONTENTS))
    method = draw(st.sampled_from(["np", "anp"]))
    sigma = draw(SIGMAS)
    arguments = {
        "credit": draw(tensor((time, batch, rollouts), dtype, content)),
        "delta_a": sigma * draw(tensor((time, batch, rollouts, units), dtype)) if method == "anp" else None,
        "seed": draw(SEEDS),
        "method": method,
        "units": units if method == "np" else draw(st.sampled_from([None, units])),
        "sigma": sigma,
        "noise": draw(st.sampled_from(["rademacher", "gaussian"])),
        "counters": draw(COUNTERS),
        "backend": "auto",
    }
    return Call(*draw(spoilt(arguments)), content=content, autocast=draw(st.booleans()))


def check_adjoint(call):
    sums = tried("adjoint", functional.adjoint, call)
    if sums is not None:
        credit, delta_a = call.arguments["credit"], call.arguments["delta_a"]
        units = call.arguments["units"] if delta_a is None else delta_a.shape[-1]
        assert delta_a is None or delta_a.is_floating_point()
        assert sums.shape == (*credit.shape[:2], units)
        assert sums.dtype == credit.dtype
        if not sums.is_meta:
            if call.content in MODERATE and not call.spoiled:
                # Gaussian noise in float32 and float64 differs by the rounding of its angles.
                gaussian = call.arguments["noise"] == "gaussian" and delta_a is None
                wide = 1e4 if gaussian else 100
                assert_right(
                    sums * call.arguments["sigma"], functional.adjoint(**plain(call)) * call.arguments["sigma"], wide
                )
            assert_alone(sums, call, functional.adjoint, ("credit",))


@st.composite
def least_squares_calls(draw):
    time, batch, rollouts, units = draw(SIZES)
    dtype, content = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(CONTENTS))
    sigma = draw(SIGMAS)
    arguments = {
        "delta_loss": draw(tensor((time, batch, rollouts), dtype, content)),
        "delta_a": sigma * draw(tensor((time, batch, rollouts, units), dtype)),
        "seed": draw(SEEDS),
        "discount": draw(st.sampled_from([0, 0.5, 1.0])),
        "ridge": draw(st.sampled_from([0.1, 0.5])),
        "baseline": draw(st.booleans()),
        "sigma": sigma,
        "noise": draw(st.sampled_from(["rademacher", "gaussian"])),
        "counters": draw(COUNTERS),
        "carry": draw(st.one_of(st.none(), tensor((batch, rollouts), dtype))),
        "backend": "auto",
    }
    return Call(*draw(spoilt(arguments)), content=content, autocast=draw(st.booleans()))


def check_least_squares(call):
    found = tried("least_squares", functional.least_squares, call)
    if found is not None:
        delta_loss, delta_a = call.arguments["delta_loss"], call.arguments["delta_a"]
        estimate, carry = found
        assert estimate.shape == (*delta_loss.shape[:2], delta_a.shape[-1])
        assert carry.shape == delta_loss.shape[1:]
        assert estimate.dtype == carry.dtype == delta_loss.dtype
        if not estimate.is_meta:
            if call.content in MODERATE and not call.spoiled:
                assert bool(estimate.isfinite().all())
                assert bool(carry.isfinite().all())
            assert_alone(estimate, call, lambda **given: functional.least_squares(**given)[0], ("delta_loss",))


def losses(time, batch, units, dtype, content, kind=None):
    """Every kind of loss, with or without a readout."""

    @st.composite
    def draw_loss(draw):
        outputs = draw(st.sampled_from([1, 3]))
        readout = draw(st.one_of(st.none(), tensor((outputs, units), dtype)))
        outputs = units if readout is None else outputs
        weight = draw(tensor((time, batch), dtype)).abs()
        chosen = kind or draw(st.sampled_from([LinearLoss, SquaredLoss, CrossEntropyLoss, OutputsOnly]))
        if chosen is LinearLoss:
            return LinearLoss(draw(tensor((time, batch, units), dtype, content)))
        if chosen is SquaredLoss:
            return SquaredLoss(readout, draw(tensor((time, batch, outputs), dtype, content)), weight)
        if chosen is OutputsOnly:
            return OutputsOnly(readout)
        logits = draw(tensor((time, batch, outputs), dtype))
        target = torch.arange(time * batch).view(time, batch) % outputs
        return CrossEntropyLoss(readout, torch.softmax(logits, -1), target, weight)

    return draw_loss()


@st.composite
def rollout_calls(draw, kind=None):
    time, batch, rollouts, units = draw(SIZES)
    dtype, content = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(CONTENTS))
    wild_loss = draw(st.booleans())
    nonlinearity = draw(st.sampled_from(["tanh", "relu"]))
    preact = draw(tensor((time, batch, units), dtype, "moderate" if wild_loss else content))
    loss = draw(losses(time, batch, units, dtype, content if wild_loss else "moderate", kind))
    arguments = {
        "preact": preact,
        "hidden": torch.tanh(preact) if nonlinearity == "tanh" else torch.relu(preact),
        "weight_hh": draw(tensor((units, units), dtype)) / (2 * math.sqrt(units)),
        "loss": loss,
        "seed": draw(SEEDS),
        "rollouts": rollouts,
        "sigma": draw(SIGMAS),
        "noise": draw(st.sampled_from(["rademacher", "gaussian"])),
        "nonlinearity": nonlinearity,
        "precision": "auto",
        "store_delta_a": draw(st.booleans()),
        "counters": draw(COUNTERS),
        "delta_h0": draw(
            st.one_of(st.none(), tensor((batch, rollouts, units), dtype).map(lambda values: values * 1e-3))
        ),
        "backend": "auto",
    }
    if kind is not None:
        fields, spoiled = draw(spoilt(loss._asdict()))
        return Call(arguments | {"loss": kind(**fields)}, ("loss",) if spoiled else (), content)
    return Call(*draw(spoilt(arguments)), content=content, autocast=draw(st.booleans()))


def check_rollout(call, name="rollout"):
    run = tried(name, functional.rollout, call)
    if run is None:
        return
    arguments = call.arguments
    time, batch, units = arguments["preact"].shape
    shape, loss = (time, batch, arguments["rollouts"]), arguments["loss"]
    outputs = units if getattr(loss, "readout", None) is None else loss.readout.shape[0]
    expected = {
        "delta_loss": None if loss is None or isinstance(loss, OutputsOnly) else shape,
        "delta_a": (*shape, units) if arguments["store_delta_a"] else None,
        "delta_h": (*shape[1:], units),
        "delta_o": (*shape, outputs) if isinstance(loss, OutputsOnly) else None,
    }
    assert {field: None if value is None else tuple(value.shape) for field, value in run._asdict().items()} == expected
    assert all(value is None or value.dtype == arguments["preact"].dtype for value in run)
    if run.delta_h.is_meta or call.spoiled:
        return
    if call.content in MODERATE:
        right = functional.rollout(**plain(call))
        for actual, expected_tensor in zip(run, right, strict=True):
            if actual is not None:
                assert_right(actual, expected_tensor, wide=1e4 if arguments["noise"] == "gaussian" else 2e3)
    elif run.delta_loss is not None:
        assert_alone(run.delta_loss, call, functional.rollout, ("preact", "hidden"))


def test_a_sample_of_nan_changes_no_other():
    # For large deviations of a saturated unit, the form for small ones is imprecise and finally 0 / 0.
    preact = torch.tensor([[[math.nan], [6.0]], [[0.0], [-6.0]]])
    options = {"weight_hh": torch.eye(1), "seed": 1, "rollouts": 8, "sigma": 7.0}
    states = torch.tanh(preact)
    run = functional.rollout(preact, states, loss=LinearLoss(torch.ones(2, 2, 1)), **options)
    both = preact.nan_to_num(0.0)
    expected = functional.rollout(both, torch.tanh(both), loss=LinearLoss(torch.ones(2, 2, 1)), **options)
    assert bool(run.delta_loss[:, 0].isnan().all())
    assert torch.equal(run.delta_loss[:, 1], expected.delta_loss[:, 1])


def check_loss(kind):
    return lambda call: check_rollout(call, kind.__name__)


FIELDS = {
    "method": (["anp", "np", "anp-ls", "anp-feedback", "wp", "bptt"], lambda value: value in METHODS),
    "rollouts": ([1, 32, 2**32 - 1], lambda value: type(value) is int and 1 <= value < 2**32),
    "sigma": ([1e-3, 5, 1e-300], lambda value: is_real(value) and 0 < value < math.inf),
    "noise": (["rademacher", "gaussian"], lambda value: value in {"rademacher", "gaussian"}),
    "discount": ([0, 0.5, 1], lambda value: is_real(value) and 0 <= value <= 1),
    "ridge": ([0, 0.1, 10], lambda value: is_real(value) and 0 <= value < math.inf),
    "baseline": ([False, True], lambda value: type(value) is bool),
    "split_half": ([False, True], lambda value: type(value) is bool),
    "shard_rollouts": ([False, True], lambda value: type(value) is bool),
    "prior": (["learned", "known", "none"], lambda value: value in {"learned", "known", "none"}),
    "warmup": ([0, 1, 100], lambda value: type(value) is int and value >= 0),
    "follow_weights": ([False, True], lambda value: type(value) is bool),
    "rank": ([None, 1, 7], lambda value: value is None or (type(value) is int and 1 <= value < 2**32)),
    "readout": (["exact", "perturbed"], lambda value: value in {"exact", "perturbed"}),
    "precision": (["auto", "bf16", "fp32"], lambda value: value in {"auto", "bf16", "fp16", "tf32", "fp32"}),
    "backend": (["auto", "torch"], lambda value: value in {"auto", "torch", "triton", "cupy", "numba"}),
    "max_memory": ([None, 1, 2**40], lambda value: value is None or (type(value) is int and value >= 1)),
}


WHOLE = {"anp-ls", "anp-feedback"}
METHODS = {"anp", "np", "anp-ls", "anp-feedback", "wp", "bptt"}


def is_real(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@st.composite
def perturbation_calls(draw):
    arguments = {name: draw(st.sampled_from(good)) for name, (good, _) in FIELDS.items()}
    return Call(*draw(spoilt(arguments)))


def check_perturbation(call):
    arguments = call.arguments
    valid = all(
        isinstance(arguments[name], (str, int, float, type(None))) and accepts(arguments[name])
        for name, (_, accepts) in FIELDS.items()
    )
    if valid and arguments["baseline"]:
        # The baseline needs a second rollout in the same process.
        valid = arguments["rollouts"] > 1 and (arguments["method"] in WHOLE or not arguments["shard_rollouts"])
    perturbation = tried("Perturbation", Perturbation, call if valid else call._replace(spoiled=tuple(arguments)))
    assert (perturbation is not None) == valid
    assert not valid or dataclasses.asdict(perturbation) == arguments


TARGETS = {
    "noise": (noise_calls(), check_noise),
    "Counters": (counters_calls(), check_counters),
    "Purpose": (purpose_calls(), check_purpose),
    "returns": (returns_calls(), check_returns),
    "adjoint": (adjoint_calls(), check_adjoint),
    "least_squares": (least_squares_calls(), check_least_squares),
    "rollout": (rollout_calls(), check_rollout),
    **{
        kind.__name__: (rollout_calls(kind), check_loss(kind))
        for kind in (LinearLoss, SquaredLoss, CrossEntropyLoss, OutputsOnly)
    },
    "Perturbation": (perturbation_calls(), check_perturbation),
}

RESULTS = {"Rollout"}
"""Tuples that are results only, never arguments."""


NO_ARGUMENTS = {"release_memory"}


def test_every_public_op_is_fuzzed():
    assert set(functional.__all__) - RESULTS - NO_ARGUMENTS <= set(TARGETS)
    assert {field.name for field in dataclasses.fields(Perturbation)} == set(FIELDS)
    for name, (good, accepts) in FIELDS.items():
        assert all(accepts(value) for value in good), name


@pytest.mark.filterwarnings("ignore:method='anp-feedback' with rollouts=1:UserWarning")
@pytest.mark.parametrize("inputs", LEGS)
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_answered_or_refused(name, inputs):
    assert fuzz(name, *TARGETS[name], inputs) >= inputs
