"""anpgpu's modules beside `torch.nn.RNN`, `GRU` and `LSTM`: the same outputs, gradients and types of error."""

import itertools
import os
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from tolerances import assert_close
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import anpgpu
from anpgpu import Perturbation

METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp")
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """The arguments of a constructor and a call."""

    module: str = "RNN"
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    bias: bool = True
    batch_first: bool = False
    nonlinearity: str = "tanh"
    form: str = "batched"
    hx: str = "none"
    input_needs_grad: bool = False
    frozen: bool = False
    training: bool = True
    dtype: str = "float32"
    method: str = "anp"
    features: int = 2
    hidden: int = 3
    time: int = 3
    batch: int = 2

    def modules(self, perturbation=None):
        """A module of ours and torch's with the same parameters."""
        names = ["num_layers", "bidirectional", "dropout", "bias", "batch_first"]
        names += ["nonlinearity"] * (self.module == "RNN")
        options = {name: getattr(self, name) for name in names} | {"dtype": DTYPES[self.dtype]}
        how = Perturbation(self.method, rollouts=3) if perturbation is None else perturbation
        torch.manual_seed(self.features)
        with warnings.catch_warnings():
            # Dropout without a second layer: torch says so, twice.
            warnings.simplefilter("ignore", UserWarning)
            rnn = getattr(anpgpu, self.module)(self.features, self.hidden, perturbation=how, **options)
            twin = getattr(nn, self.module)(self.features, self.hidden, **options)
        twin.load_state_dict(rnn.state_dict(), strict=True)
        for module in (rnn, twin):
            module.train(self.training).requires_grad_(not self.frozen)
        return rnn, twin

    def arguments(self):
        """Inputs and hx, new leaves each time, the same values each time."""
        dtype = DTYPES[self.dtype]
        generator = torch.Generator().manual_seed(self.time)
        unbatched = self.form == "unbatched"
        sizes = (self.time,) if unbatched else (self.time, self.batch)
        inputs = torch.randn(*sizes, self.features, generator=generator).to(dtype)
        if self.form == "batched" and self.batch_first:
            inputs = inputs.transpose(0, 1)
        inputs = inputs.clone().requires_grad_(self.input_needs_grad)
        if self.form.startswith("packed"):
            lengths = sorted((1 + (5 * b + 1) % self.time for b in range(self.batch)), reverse=True)
            if self.form == "packed, unsorted":
                lengths = lengths[::-1]
            inputs = pack_padded_sequence(inputs, lengths, enforce_sorted=self.form == "packed, sorted")
        if self.hx == "none":
            return inputs, None
        states = (self.num_layers * (1 + self.bidirectional), *(() if unbatched else (self.batch,)), self.hidden)
        hx = [
            torch.randn(states, generator=generator).to(dtype).requires_grad_(self.hx == "with gradient")
            for _ in range(1 + (self.module == "LSTM"))
        ]
        return inputs, tuple(hx) if len(hx) > 1 else hx[0]

    @property
    def packed(self):
        return self.form.startswith("packed")


FORMS = ("batched", "unbatched", "packed, sorted", "packed, unsorted")
CASES = st.builds(
    Case,
    module=st.sampled_from(["RNN", "GRU", "LSTM"]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    batch_first=st.booleans(),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    form=st.sampled_from(FORMS),
    hx=st.sampled_from(["none", "given", "with gradient"]),
    input_needs_grad=st.booleans(),
    frozen=st.booleans(),
    training=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    method=st.sampled_from([*METHODS, "bptt"]),
    features=st.integers(1, 4),
    hidden=st.integers(1, 9),
    time=st.integers(1, 5),
    batch=st.integers(1, 4),
)


def flat(outputs):
    return outputs.data if isinstance(outputs, PackedSequence) else outputs


def as_tuple(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def call(module, inputs, hx):
    """Outputs and every final state."""
    torch.manual_seed(7)
    outputs, final = module(inputs, hx)
    assert isinstance(final, tuple) == isinstance(module, nn.LSTM)
    return outputs, *as_tuple(final)


def assert_same_layout(outputs, expected):
    assert type(outputs) is type(expected)
    if isinstance(outputs, PackedSequence):
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            ours, torchs = getattr(outputs, name), getattr(expected, name)
            assert (ours is None and torchs is None) or torch.equal(ours, torchs)
    ours, torchs = flat(outputs), flat(expected)
    assert (ours.shape, ours.dtype, ours.device) == (torchs.shape, torchs.dtype, torchs.device)
    # Equal strides, so that a view that works on torch's outputs works on ours.
    assert ours.stride() == torchs.stride() or not ours.numel()


@settings(max_examples=1500 if THOROUGH else 200)
@given(CASES)
@example(Case(num_layers=3, bidirectional=True, dropout=0.5, batch_first=True, hx="given"))
@example(Case(form="packed, unsorted", hx="with gradient", num_layers=2, bidirectional=True, dtype="bfloat16"))
def test_outputs_and_draws_are_those_of_torch(case):
    rnn, twin = case.modules()
    if case.method == "wp" and (case.input_needs_grad or case.hx == "with gradient"):
        with pytest.raises(RuntimeError, match="method='wp' estimates gradients of weights alone"):
            call(rnn, *case.arguments())
        rnn.perturbation = Perturbation("np", rollouts=3)
    inputs, hx = case.arguments()
    others = case.arguments()
    results = call(rnn, inputs, hx)
    drawn = torch.get_rng_state()
    expected = call(twin, *others)
    learns = flat(expected[0]).requires_grad and case.method != "bptt"
    if learns:
        # Our seed, one number, is drawn after torch's dropout masks.
        torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    masked = case.training and case.dropout == 0.5 and case.num_layers > 1
    for ours, torchs in zip(results, expected, strict=True):
        assert_same_layout(ours, torchs)
        if masked and case.packed and learns:
            # Our masks cover the padding too: they have the same distribution, but other values.
            assert bool(flat(ours).isfinite().all())
        else:
            # Products round by the place of their operands in memory: even nn.RNN repeats only to rounding.
            assert_close(flat(ours), flat(torchs), case.dtype)
            assert (case.packed and learns) or torch.equal(drawn, torch.get_rng_state())
    if flat(expected[0]).requires_grad:
        for outputs, *final in (results, expected):
            (flat(outputs).float().sum() + sum(state.float().square().sum() for state in final)).backward()
        for ours, torchs in gradients(
            rnn, twin, (inputs, others[0]), *zip(as_tuple(hx), as_tuple(others[1]), strict=True)
        ):
            assert_same_form(ours, torchs, case.dtype if case.method == "bptt" else None)


def assert_same_form(ours, torchs, tolerance):
    """Both gradients are None, or both have the same shape and type and agree within the named tolerance."""
    assert (ours is None) == (torchs is None)
    if ours is not None:
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        assert bool(ours.isfinite().all())
        if tolerance is not None:
            assert_close(ours, torchs, tolerance)


def gradients(rnn, twin, *pairs):
    """Pairs of .grad of both modules' parameters, and of those of the `pairs` that are leaves."""
    grads = [(ours.grad, torchs.grad) for ours, torchs in zip(rnn.parameters(), twin.parameters(), strict=True)]
    for ours, torchs in pairs:
        if isinstance(ours, torch.Tensor) and ours.is_leaf:
            grads.append((ours.grad, torchs.grad))
    return grads


@settings(max_examples=500 if THOROUGH else 40)
@given(CASES)
@example(Case(num_layers=2, bidirectional=True, form="packed, unsorted", hx="with gradient", input_needs_grad=True))
@example(Case(num_layers=2, batch_first=True, dropout=0.5, hx="with gradient", input_needs_grad=True))
def test_gradients_are_those_of_torch_where_rollouts_suffice(case):
    # Least squares with more rollouts than units and almost no ridge is exact to first order in sigma, for every form
    # of input. Dropout of packed sequences is left out, since torch draws masks for another number of elements.
    if case.packed and case.num_layers > 1:
        case = case._replace(dropout=0.0)
    how = Perturbation("anp-ls", rollouts=40, sigma=1e-7, noise="gaussian", discount=1.0, ridge=1e-10)
    # Without biases a silent relu layer puts the next layer exactly at the kink, which has no gradient.
    case = case._replace(dtype="float64", frozen=False, bias=case.bias or case.nonlinearity == "relu")
    rnn, twin = case.modules(how)
    first, second = case.arguments(), case.arguments()
    for module, (inputs, hx) in ((rnn, first), (twin, second)):
        outputs, *final = call(module, inputs, hx)
        ramp = torch.linspace(-1, 1, flat(outputs).numel(), dtype=torch.float64).view(flat(outputs).shape)
        (flat(outputs) * ramp).sum().add(sum(state.square().sum() for state in final)).backward()
    leaves = [(inputs, *as_tuple(hx)) for inputs, hx in (first, second)]
    pairs = gradients(rnn, twin, *zip(*leaves, strict=True))
    assert all((ours is None) == (torchs is None) for ours, torchs in pairs)
    # All gradients in one vector with a 1, because a relative error needs a norm and silent units have gradient 0.
    ours, torchs = (
        torch.cat([torch.ones(1), *(pair[side].flatten() for pair in pairs if pair[side] is not None)])
        for side in (0, 1)
    )
    assert_close(ours, torchs, "least_squares")


def without_a_step(inputs, case):
    return inputs[:, :0] if case.batch_first and case.form == "batched" else inputs[:0]


def on_data(change):
    """The same change to a tensor and to a PackedSequence's data."""

    def changed(inputs, case):
        if isinstance(inputs, PackedSequence):
            return PackedSequence(change(inputs.data), *inputs[1:])
        return change(inputs)

    return changed


INPUT_FAULTS = {
    "another dimension": on_data(lambda values: values.unsqueeze(0)),
    "two more dimensions": on_data(lambda values: values[None, None]),
    "a dimension less": on_data(lambda values: values[0]),
    "no dimensions": on_data(lambda values: values.sum()),
    "a feature more": on_data(lambda values: torch.cat((values, values[..., :1]), -1)),
    "no features": on_data(lambda values: values[..., :0]),
    "no steps": without_a_step,
    "float16": on_data(torch.Tensor.half),
    "float64": on_data(torch.Tensor.double),
    "int64": on_data(torch.Tensor.long),
    "bool": on_data(torch.Tensor.bool),
    "complex": on_data(lambda values: values + 0j),
    "meta": on_data(lambda values: values.to("meta")),
    "numpy": lambda inputs, case: flat(inputs).detach().float().numpy(),
    "list": lambda inputs, case: [0.0],
    "tuple": lambda inputs, case: (inputs,),
    "None": lambda inputs, case: None,
    "str": lambda inputs, case: "inputs",
}
STATE_FAULTS = {
    "a dimension more": lambda hx: hx.unsqueeze(0),
    "a dimension less": lambda hx: hx[0],
    "no dimensions": torch.Tensor.sum,
    "a layer more": lambda hx: torch.cat((hx, hx[:1])),
    "no layers": lambda hx: hx[:0],
    "a unit more": lambda hx: torch.cat((hx, hx[..., :1]), -1),
    "samples missing": lambda hx: hx[:, :0],
    "float16": torch.Tensor.half,
    "float64": torch.Tensor.double,
    "int64": torch.Tensor.long,
    "complex": lambda hx: hx + 0j,
    "meta": lambda hx: hx.to("meta"),
    "numpy": lambda hx: hx.detach().float().numpy(),
    "list": lambda hx: [hx],
    "tuple": lambda hx: (hx,),
    "str": lambda hx: "hx",
}
PAIR_FAULTS = {
    "h alone": lambda hx: hx[0],
    "one state": lambda hx: hx[:1],
    "no state": lambda hx: (),
    "joined": lambda hx: torch.cat(hx, -1),
    "str": lambda hx: "hx",
    "float64": lambda hx: tuple(state.double() for state in hx),
    "int64": lambda hx: tuple(state.long() for state in hx),
    "other types": lambda hx: (hx[0].double(), hx[1].float()),
    "on meta": lambda hx: tuple(state.to("meta") for state in hx),
}
"""Faults of an LSTM's (h, c)."""


def faulted(hx, name, which):
    """hx with a fault; in an LSTM's (h, c) of one of the two, or of the pair."""
    if not isinstance(hx, tuple):
        return STATE_FAULTS[name](hx)
    if which == "both":
        return list(PAIR_FAULTS.values())[list(STATE_FAULTS).index(name) % len(PAIR_FAULTS)](hx)
    return tuple(STATE_FAULTS[name](state) if number == which else state for number, state in enumerate(hx))


def reshaped(change):
    return lambda module: setattr(module, "weight_hh_l0", nn.Parameter(change(module.weight_hh_l0.detach())))


MODULE_FAULTS = {
    "on meta": lambda module: module.to("meta"),
    "in float16": nn.Module.half,
    "in another type": nn.Module.double,
    "weight_hh not square": reshaped(lambda weight: torch.cat((weight, weight[:1]))),
    "weight_hh of another size": reshaped(lambda weight: weight.new_zeros(weight.shape[0] + 1, weight.shape[0] + 1)),
    "weight_hh of another type": reshaped(torch.Tensor.double),
    "weight_hh on meta": reshaped(lambda weight: weight.to("meta")),
    "weight_ih None": lambda module: setattr(module, "weight_ih_l0", None),
}


@settings(max_examples=2500 if THOROUGH else 250)
@given(
    CASES.map(lambda case: case._replace(hx="given" if case.hx == "none" else case.hx)),
    st.one_of(
        st.tuples(st.just("input"), st.sampled_from(list(INPUT_FAULTS))),
        st.tuples(st.just("hx"), st.sampled_from(list(STATE_FAULTS))),
        st.tuples(st.just("module"), st.sampled_from(list(MODULE_FAULTS))),
    ),
    st.booleans(),
    st.sampled_from([0, 1, "both"]),
)
def test_errors_are_those_of_torch(case, fault, grad, which):
    where, name = fault
    results = []
    for module in case.modules():
        inputs, hx = case.arguments()
        if where == "input":
            inputs = INPUT_FAULTS[name](inputs, case)
        elif where == "hx":
            hx = faulted(hx, name, which)
        else:
            MODULE_FAULTS[name](module)
        with torch.set_grad_enabled(grad):
            results.append(outcome(module, inputs, hx))
    ours, torchs = results
    if case.form == "packed, unsorted" and where == "hx" and isinstance(torchs, type):
        # torch reorders the samples of hx before it checks hx, so that its type of error differs.
        assert isinstance(ours, type)
    elif isinstance(torchs, type):
        assert ours is torchs
    elif isinstance(ours, type):
        # Where sizes are 1 or sequences packed, torch accepts some mixed devices, types and shapes; we need not.
        assert ours is RuntimeError
    else:
        for result, torchs_result in zip(ours, torchs, strict=True):
            assert_same_layout(result, torchs_result)


def outcome(module, inputs, hx):
    """Outputs, or the type of the error."""
    try:
        return call(module, inputs, hx)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize(
    ("module", "args", "options", "most"),
    [
        *((module, (2, 1, 2**40), {}, 256) for module in ("RNN", "GRU", "LSTM")),
        *((module, (2, 1), {"num_layers": 257}, 256) for module in ("RNN", "GRU", "LSTM")),
        *((module, (2, 1), {"num_layers": 129, "bidirectional": True}, 128) for module in ("RNN", "GRU", "LSTM")),
        ("RNN", (2, 1, 129, "tanh", True, False, 0.0, True), {}, 128),
        ("GRU", (2, 1, 129, True, False, 0.0, True), {}, 128),
        ("LSTM", (2, 1, 129, True, False, 0.0, True), {}, 128),
    ],
)
def test_more_layers_than_the_noise_can_name_are_refused(module, args, options, most):
    layers = options.get("num_layers", 2**40 if len(args) == 3 else 129)
    with pytest.raises(ValueError, match=f"num_layers must be at most {most}, got {layers}"):
        getattr(anpgpu, module)(*args, **options)
    assert len(getattr(anpgpu, module)(2, 1, 256).all_weights) == 256


@pytest.mark.parametrize("module", ["RNN", "GRU", "LSTM"])
def test_hx_of_too_many_samples_raises_where_torch_takes_some_of_them(module):
    rnn, twin = Case(module=module).modules()
    inputs = pack_padded_sequence(torch.zeros(3, 2, 2), [2, 3], enforce_sorted=False)
    hx = torch.zeros(1, 3, 3) if module != "LSTM" else (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3))
    assert as_tuple(twin(inputs, hx)[1])[0].shape == (1, 2, 3)
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, 3\), got \[1, 3, 3\]"):
        rnn(inputs, hx)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((2, 3), {"proj_size": 1}),
        ((2, 3), {"proj_size": 0}),
        ((2, 3), {"device": "nowhere"}),
        ((2, 3), {"dtype": torch.int64}),
        ((2, 3), {"dtype": "float32"}),
        ((2, 3), {"dtype": torch.float64, "device": "cpu"}),
        ((2, 3), {"bias": 1}),
        ((2, 3), {"batch_first": "yes"}),
        ((2, 3), {"num_layers": 1.5}),
        ((2, 3), {"num_layers": -1}),
        ((2, 3), {"bidirectional": None}),
        ((2, 3, 1, None), {}),
        ((2, 3, 1, "relu", True, True, 0.0, True), {}),
        ((2, 3, 1, "relu", True, True, 0.0, True, 0), {}),
        ((2, 3, 1, "relu"), {"nonlinearity": "tanh"}),
        ((0, 3), {}),
        (("2", 3), {}),
    ],
)
@pytest.mark.parametrize("module", ["RNN", "GRU", "LSTM"])
def test_constructor_takes_and_refuses_what_torchs_does(module, args, options):
    ours, torchs = (constructed(getattr(kind, module), args, options) for kind in (anpgpu, nn))
    if isinstance(torchs, nn.LSTM) and torchs.proj_size:
        # Ours have no projections.
        assert ours is ValueError
    elif isinstance(torchs, type):
        assert ours is torchs
    else:
        assert repr(ours) == repr(torchs)
        assert [(name, parameter.shape, parameter.dtype) for name, parameter in ours.named_parameters()] == [
            (name, parameter.shape, parameter.dtype) for name, parameter in torchs.named_parameters()
        ]


def constructed(kind, args, options):
    """The module, or the type of the error."""
    try:
        return kind(*args, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("module", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("form", FORMS)
def test_flatten_parameters_and_all_weights_are_torchs(form, module):
    case = Case(module, num_layers=2, bidirectional=True, form=form)
    rnn, twin = case.modules()
    inputs, _ = case.arguments()
    before = flat(rnn(inputs)[0])
    assert rnn.flatten_parameters() is None
    assert_close(flat(rnn(inputs)[0]), before, case.dtype)
    assert [[weight.shape for weight in layer] for layer in rnn.all_weights] == [
        [weight.shape for weight in layer] for layer in twin.all_weights
    ]
    assert all(
        weight is parameter
        for weight, parameter in zip(itertools.chain(*rnn.all_weights), rnn.parameters(), strict=True)
    )
