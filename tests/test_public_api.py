"""Bad input raises a clear error that quotes the value; good input of any shape, stride and type works."""

import dataclasses
import math
import os
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, strategies as st

import anpgpu
from anpgpu import Perturbation, functional
from anpgpu.functional import Counters, CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss


class Bad(NamedTuple):
    """A call that must fail, how, and what the message must hold."""

    error: type
    match: str
    change: dict


def bad(error, match, **change):
    # Processes that share the tests compare these names: no addresses in them.
    said = ", ".join(f"{name}={re.sub(' at 0x[0-9a-f]+', '', str(value))[:40]}" for name, value in change.items())
    return pytest.param(Bad(error, match, change), id=said)


def expect(case, call, arguments):
    with pytest.raises(case.error, match=case.match):
        call(**(arguments | case.change))


PERTURBATIONS = [
    *[bad(ValueError, "sigma.*" + text, sigma=value) for value, text in ((0, "0"), (0.0, "0.0"), (-1e-3, "-0.001"))],
    *[bad(ValueError, f"sigma.*{value}", sigma=value) for value in (math.nan, math.inf, -math.inf)],
    bad(TypeError, "sigma.*'1e-3'", sigma="1e-3"),
    bad(TypeError, "sigma.*None", sigma=None),
    bad(TypeError, "sigma.*True", sigma=True),
    bad(ValueError, "rollouts.*0", rollouts=0),
    bad(ValueError, "rollouts.*-3", rollouts=-3),
    bad(ValueError, f"rollouts.*{2**32}", rollouts=2**32),
    bad(TypeError, r"rollouts.*2\.0", rollouts=2.0),
    bad(TypeError, "rollouts.*True", rollouts=True),
    *[bad(ValueError, f"discount.*{value}", discount=value) for value in (-0.1, 1.1, math.nan, math.inf)],
    bad(TypeError, "discount.*None", discount=None),
    *[bad(ValueError, f"ridge.*{value}", ridge=value) for value in (-1.0, math.nan, math.inf)],
    bad(ValueError, "rank.*0", rank=0),
    bad(TypeError, r"rank.*1\.5", rank=1.5),
    bad(ValueError, "max_memory.*0", max_memory=0),
    bad(TypeError, "max_memory.*'1 GB'", max_memory="1 GB"),
    bad(TypeError, r"max_memory.*1000000\.0", max_memory=1e6),
    *[
        bad(ValueError, f"{name}.*'nonsense'", **{name: "nonsense"})
        for name in ("method", "noise", "readout", "precision", "backend")
    ],
    *[bad(TypeError, f"{name}.*7", **{name: 7}) for name in ("method", "noise", "readout", "precision", "backend")],
]


@pytest.mark.parametrize("case", PERTURBATIONS)
def test_perturbation_rejects(case):
    expect(case, Perturbation, {})
    # dataclasses.replace checks too.
    expect(case, lambda **change: dataclasses.replace(Perturbation(), **change), {})


def test_perturbation_is_frozen_and_replaceable():
    rule = Perturbation()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.sigma = 1.0
    other = dataclasses.replace(rule, sigma=0.5, rollouts=3)
    assert (other.sigma, other.rollouts, other.method) == (0.5, 3, rule.method)
    assert rule == Perturbation()
    assert hash(rule) == hash(Perturbation())
    with pytest.raises(TypeError, match="unknown"):
        Perturbation(unknown=1)


def test_perturbation_has_the_documented_fields():
    fields = [field.name for field in dataclasses.fields(Perturbation)]
    expected = "method rollouts sigma noise discount ridge rank readout precision backend max_memory shard_rollouts"
    assert fields == [*expected.split(), "baseline", "split_half", "prior", "warmup", "follow_weights"]
    assert Perturbation("np", 8, 0.1).rollouts == 8


def test_public_names_are_what_all_says():
    names = {name for name in vars(anpgpu) if not name.startswith("_")}
    modules = {name for name in names if type(getattr(anpgpu, name)).__name__ == "module"}
    assert names - modules == set(anpgpu.__all__) - {"__version__", "functional", "decorrelation"}
    assert set(anpgpu.__all__) >= {
        "RNN",
        "Estimate",
        "Perturbation",
        "estimate_grad_",
        "functional",
        "swap_",
        "unswap_",
    }
    assert sorted(set(anpgpu.__all__)) == sorted(anpgpu.__all__)
    assert set(functional.__all__) >= {"noise", "rollout", "returns", "adjoint", "least_squares"}
    assert all(hasattr(functional, name) for name in functional.__all__)


def test_every_public_entry_has_a_docstring():
    entries = [getattr(anpgpu, name) for name in anpgpu.__all__ if callable(getattr(anpgpu, name))]
    entries += [getattr(functional, name) for name in ("noise", "rollout", "returns", "adjoint", "least_squares")]
    assert all(entry.__doc__ and len(entry.__doc__) > 30 for entry in entries)


NOISE = {"seed": 1, "shape": (2, 2, 2, 8)}
NOISE_CASES = [
    *[bad(ValueError, str(size), shape=shape) for shape, size in (((0, 1, 1, 1), 0), ((1, -1, 1, 1), -1))],
    bad(ValueError, "0", shape=(1, 1, 0, 1)),
    bad(ValueError, "0", shape=(1, 1, 1, 0)),
    bad(ValueError, "shape", shape=(1, 1, 1)),
    bad(ValueError, "shape.*7", shape=7),
    bad(TypeError, "2.5", shape=(1, 1, 1, 2.5)),
    *[bad(ValueError, f"sigma.*{value}", sigma=value) for value in (0.0, -1.0, math.nan, math.inf)],
    bad(TypeError, "sigma.*'a'", sigma="a"),
    bad(ValueError, "kind.*'uniform'", kind="uniform"),
    bad(TypeError, "kind.*3", kind=3),
    bad(TypeError, "dtype.*int64", dtype=torch.int64),
    bad(TypeError, r"seed.*1\.5", seed=1.5),
    bad(TypeError, "seed.*None", seed=None),
    bad(ValueError, f"seed.*{2**64}", seed=2**64),
    bad(ValueError, "seed.*int32", seed=torch.tensor(1, dtype=torch.int32)),
    bad(ValueError, r"seed.*\(2,\)", seed=torch.tensor([1, 2])),
    bad(TypeError, "counters.*tuple", counters=(0, 0, 0, 0, 0, 0)),
    bad(ValueError, "layer.*256", counters=Counters(layer=256)),
    bad(ValueError, "purpose.*16", counters=Counters(purpose=16)),
    bad(ValueError, "sample.*-1", counters=Counters(sample=-1)),
    bad(ValueError, "backend.*'jax'", backend="jax"),
    bad(ValueError, "backend='cupy' needs CUDA tensors, got cpu", backend="cupy"),
]


@pytest.mark.parametrize("case", NOISE_CASES)
def test_noise_rejects(case):
    expect(case, functional.noise, NOISE)


def good_rollout():
    states = torch.zeros(3, 2, 4)
    return {
        "preact": states, "hidden": states, "weight_hh": torch.eye(4), "loss": LinearLoss(states), "seed": 1,
        "rollouts": 5,
    }  # fmt: skip


ROLLOUT_CASES = [
    bad(TypeError, "preact.*list", preact=[1.0]),
    bad(TypeError, "preact.*float16", preact=torch.zeros(3, 2, 4, dtype=torch.float16)),
    bad(TypeError, "preact.*int64", preact=torch.zeros(3, 2, 4, dtype=torch.int64)),
    bad(ValueError, r"preact.*\(3, 4\)", preact=torch.zeros(3, 4)),
    bad(ValueError, r"preact.*\(0, 2, 4\)", preact=torch.zeros(0, 2, 4)),
    bad(ValueError, r"preact.*\(3, 2, 0\)", preact=torch.zeros(3, 2, 0)),
    bad(ValueError, r"hidden.*\(3, 2, 5\)", hidden=torch.zeros(3, 2, 5)),
    bad(ValueError, "hidden.*float64", hidden=torch.zeros(3, 2, 4).double()),
    bad(ValueError, "hidden.*meta", hidden=torch.zeros(3, 2, 4, device="meta")),
    bad(ValueError, r"weight_hh.*\(4, 3\)", weight_hh=torch.zeros(4, 3)),
    bad(TypeError, "weight_hh.*NoneType", weight_hh=None),
    bad(TypeError, "loss.*str", loss="mse"),
    bad(TypeError, "loss.*Tensor", loss=torch.zeros(3, 2, 4)),
    bad(ValueError, r"loss.grad.*\(3, 2, 5\)", loss=LinearLoss(torch.zeros(3, 2, 5))),
    bad(ValueError, r"loss.readout.*\(7, 5\)", loss=OutputsOnly(torch.zeros(7, 5))),
    bad(
        ValueError,
        r"loss.weight.*\(2, 3\)",
        loss=SquaredLoss(None, torch.zeros(3, 2, 4), torch.zeros(2, 3)),
    ),
    bad(ValueError, r"loss.error.*\(3, 2, 9\)", loss=SquaredLoss(None, torch.zeros(3, 2, 9), torch.zeros(3, 2))),
    bad(
        ValueError,
        "loss.target.*4",
        loss=CrossEntropyLoss(None, torch.zeros(3, 2, 4), torch.full((3, 2), 4), torch.zeros(3, 2)),
    ),
    bad(
        ValueError,
        "loss.target.*-100",
        loss=CrossEntropyLoss(None, torch.zeros(3, 2, 4), torch.full((3, 2), -100), torch.zeros(3, 2)),
    ),
    bad(
        ValueError,
        "loss.target.*int32",
        loss=CrossEntropyLoss(None, torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)),
    ),
    bad(ValueError, "rollouts.*0", rollouts=0),
    bad(TypeError, "rollouts.*'5'", rollouts="5"),
    *[bad(ValueError, f"sigma.*{value}", sigma=value) for value in (0.0, -1.0, math.nan, math.inf)],
    bad(ValueError, "noise.*'cauchy'", noise="cauchy"),
    bad(ValueError, "nonlinearity.*'gelu'", nonlinearity="gelu"),
    bad(ValueError, "precision.*'fp8'", precision="fp8"),
    bad(ValueError, "precision.*'fp64'.*float32", precision="fp64"),
    bad(ValueError, r"delta_h0.*\(2, 4\)", delta_h0=torch.zeros(2, 4)),
    bad(ValueError, f"time.*{2**32 - 1}", counters=Counters(time=2**32 - 1)),
    bad(ValueError, "backend='cupy' needs CUDA tensors, got cpu", backend="cupy"),
]


@pytest.mark.parametrize("case", ROLLOUT_CASES)
def test_rollout_rejects(case):
    expect(case, functional.rollout, good_rollout())


RETURNS_CASES = [
    bad(TypeError, "delta_loss.*list", delta_loss=[0.0]),
    bad(TypeError, "delta_loss.*int64", delta_loss=torch.zeros(2, 2, 2, dtype=torch.int64)),
    bad(ValueError, r"delta_loss.*\(2, 2\)", delta_loss=torch.zeros(2, 2)),
    bad(ValueError, r"delta_loss.*\(0, 2, 2\)", delta_loss=torch.zeros(0, 2, 2)),
    *[bad(ValueError, f"discount.*{value}", discount=value) for value in (-0.5, 2, math.nan)],
    bad(TypeError, "discount.*None", discount=None),
    bad(ValueError, r"carry.*\(3,\)", carry=torch.zeros(3)),
    bad(ValueError, "carry.*float64", carry=torch.zeros(2, 2).double()),
    bad(ValueError, "backend='cupy' needs CUDA tensors, got cpu", backend="cupy"),
]


@pytest.mark.parametrize("case", RETURNS_CASES)
def test_returns_rejects(case):
    expect(case, functional.returns, {"delta_loss": torch.zeros(2, 2, 2), "discount": 0.5})


ADJOINT_CASES = [
    bad(TypeError, "credit.*NoneType", credit=None),
    bad(ValueError, r"credit.*\(2, 2\)", credit=torch.zeros(2, 2)),
    bad(TypeError, "delta_a.*NoneType", delta_a=None),
    bad(ValueError, r"delta_a.*\(2, 2, 3, 5\)", delta_a=torch.zeros(2, 2, 3, 5)),
    bad(ValueError, "delta_a.*meta", delta_a=torch.zeros(2, 2, 2, 5, device="meta")),
    bad(ValueError, "method.*'anp-xl'", method="anp-xl"),
    bad(ValueError, "np.*delta_a", method="np"),
    bad(ValueError, "units", method="np", delta_a=None),
    bad(ValueError, "units.*0", method="np", delta_a=None, units=0),
    *[bad(ValueError, f"sigma.*{value}", sigma=value) for value in (0.0, math.nan)],
    bad(TypeError, "seed.*'x'", seed="x"),
    bad(ValueError, "backend='cupy' needs CUDA tensors, got cpu", backend="cupy"),
]


@pytest.mark.parametrize("case", ADJOINT_CASES)
def test_adjoint_rejects(case):
    expect(case, functional.adjoint, {"credit": torch.zeros(2, 2, 2), "delta_a": torch.ones(2, 2, 2, 5), "seed": 1})


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_interpreter")
def test_triton_on_the_cpu_raises_without_the_interpreter():
    assert "TRITON_INTERPRET" not in os.environ
    wrong = (ValueError, ImportError)
    with pytest.raises(wrong, match="backend='triton' needs"):
        functional.noise(1, (1, 1, 1, 4), backend="triton")
    with pytest.raises(wrong, match="backend='triton' needs"):
        functional.rollout(**good_rollout(), backend="triton")
    rnn = anpgpu.RNN(2, 3, perturbation=Perturbation(backend="triton"))
    with pytest.raises(wrong, match="backend='triton' needs"):
        rnn(torch.zeros(1, 1, 2))
    with pytest.raises(wrong, match="backend='triton' needs"):
        anpgpu.estimate_grad_(rnn, None, torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))


def test_a_missing_backend_raises_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match="backend='triton' needs the package triton, which is not installed"):
        functional.noise(1, (1, 1, 1, 4), backend="triton")


def test_a_precision_that_does_not_go_with_float64_raises():
    rnn = anpgpu.RNN(2, 3, dtype=torch.float64, perturbation=Perturbation(precision="bf16"))
    with pytest.raises(ValueError, match="precision='bf16'"):
        rnn(torch.zeros(1, 1, 2).double())


@pytest.mark.parametrize("wrong", ["anp", 1, {"method": "np"}, Perturbation])
def test_what_is_no_perturbation_raises(wrong):
    with pytest.raises(TypeError, match=r"perturbation must be an anpgpu[.]Perturbation"):
        anpgpu.RNN(2, 3, perturbation=wrong)
    with pytest.raises(TypeError, match=r"perturbation must be an anpgpu[.]Perturbation"):
        anpgpu.swap_(torch.nn.RNN(2, 3), wrong)
    with pytest.raises(TypeError, match=r"perturbation must be an anpgpu[.]Perturbation"):
        anpgpu.estimate_grad_(torch.nn.RNN(2, 3), None, torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), perturbation=wrong)


@pytest.mark.parametrize("wrong", [None, "model", torch.zeros(2)])
def test_swap_rejects_what_is_no_module(wrong):
    with pytest.raises(TypeError, match=f"model.*{type(wrong).__name__}"):
        anpgpu.swap_(wrong)
    with pytest.raises(TypeError, match=f"model.*{type(wrong).__name__}"):
        anpgpu.unswap_(wrong)


def good_estimate():
    return {
        "rnn": torch.nn.RNN(3, 4), "readout": torch.nn.Linear(4, 2), "inputs": torch.zeros(5, 2, 3),
        "targets": torch.zeros(5, 2, 2),
    }  # fmt: skip


def packed(time=5, batch=2, features=3):
    return torch.nn.utils.rnn.pack_sequence([torch.zeros(time, features)] * batch)


CLASSES = torch.zeros(5, 2, dtype=torch.int64)
ESTIMATE_CASES = [
    bad(TypeError, "rnn.*GRUCell", rnn=torch.nn.GRUCell(3, 4)),
    bad(ValueError, "proj_size=2", rnn=torch.nn.LSTM(3, 4, proj_size=2)),
    bad(TypeError, r"hx.*\(h_0, c_0\).*Tensor", rnn=torch.nn.LSTM(3, 4), hx=torch.zeros(1, 2, 4)),
    bad(TypeError, r"hx.*\(h_0, c_0\).*tuple of 1", rnn=torch.nn.LSTM(3, 4), hx=(torch.zeros(1, 2, 4),)),
    bad(TypeError, "hx must be a tensor, got tuple", rnn=torch.nn.GRU(3, 4), hx=(torch.zeros(1, 2, 4),)),
    bad(TypeError, "rnn.*NoneType", rnn=None),
    bad(ValueError, "readout.*4.*5", readout=torch.nn.Linear(5, 2)),
    bad(TypeError, "readout.*str", readout="linear"),
    bad(TypeError, "readout.*Sequential", readout=torch.nn.Sequential(torch.nn.Linear(4, 2))),
    bad(
        TypeError,
        "readout Sequential",
        readout=torch.nn.Sequential(torch.nn.Linear(4, 2)),
        loss=lambda outputs, targets: outputs.sum(-1),
    ),
    bad(TypeError, "inputs.*list", inputs=[0.0]),
    bad(ValueError, "1D", inputs=torch.zeros(3)),
    bad(ValueError, "4D", inputs=torch.zeros(1, 5, 2, 3)),
    bad(RuntimeError, "sequence length.*0", inputs=torch.zeros(0, 2, 3)),
    bad(RuntimeError, "3.*7", inputs=torch.zeros(5, 2, 7)),
    bad(ValueError, "graph", inputs=torch.zeros(5, 2, 3, requires_grad=True) * 2),
    bad(TypeError, "targets.*NoneType", targets=None),
    bad(ValueError, r"targets.*\(5, 2, 2\).*\(5, 2, 3\)", targets=torch.zeros(5, 2, 3)),
    bad(TypeError, "targets.*int64", targets=torch.zeros(5, 2, 2, dtype=torch.int64)),
    bad(TypeError, "targets.*float32", targets=torch.zeros(5, 2), loss="cross_entropy"),
    bad(ValueError, "class.*2", targets=CLASSES + 2, loss="cross_entropy"),
    bad(ValueError, "class.*-1", targets=CLASSES - 1, loss="cross_entropy"),
    bad(ValueError, "-100", targets=CLASSES - 100, loss="cross_entropy"),
    bad(ValueError, "loss.*'mae'", loss="mae"),
    bad(TypeError, "loss.*3", loss=3),
    bad(TypeError, "loss.*float", loss=lambda outputs, targets: 0.0),
    bad(ValueError, r"loss.*\(5, 2, 1, 2\)", loss=lambda outputs, targets: outputs),
    bad(RuntimeError, "hx", hx=torch.zeros(2, 4)),
    bad(RuntimeError, r"hidden size.*\(1, 2, 4\)", hx=torch.zeros(1, 3, 4)),
    bad(TypeError, "hx.*tuple", hx=(torch.zeros(1, 2, 4),)),
    bad(ValueError, r"lengths.*\(3,\)", lengths=[5, 5, 5]),
    bad(ValueError, "lengths.*-1", lengths=[5, -1]),
    bad(ValueError, "lengths.*0", lengths=[0, 0]),
    bad(ValueError, "lengths.*6", lengths=[6, 5]),
    bad(TypeError, "lengths.*float32", lengths=torch.tensor([5.0, 5.0])),
    bad(ValueError, "PackedSequence.*lengths", inputs=packed(), lengths=[5, 5]),
]


@pytest.mark.parametrize("case", ESTIMATE_CASES)
def test_estimate_grad_rejects(case):
    arguments = good_estimate()
    expect(case, anpgpu.estimate_grad_, arguments)
    leaves = [*arguments["rnn"].parameters(), *arguments["readout"].parameters()]
    assert all(leaf.grad is None for leaf in leaves)


def test_too_little_memory_says_how_much_is_needed():
    how = Perturbation(max_memory=1000)
    with pytest.raises(MemoryError, match=r"max_memory=1000 .* needs? [0-9]+ bytes"):
        anpgpu.estimate_grad_(**good_estimate(), perturbation=how)
    rnn = anpgpu.RNN(3, 4, perturbation=how)
    with pytest.raises(MemoryError, match="max_memory=1000"):
        rnn(torch.zeros(5, 2, 3))[0].sum().backward()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


@st.composite
def tensors(draw, dims):
    """A tensor of `dims` dimensions, sometimes fewer or more, of any type and stride, with sizes 0 to 5."""
    count = draw(st.sampled_from([dims] * 6 + [dims - 1, dims + 1]))
    sizes = [draw(st.sampled_from([1, 2, 2, 3, 5, 0])) for _ in range(count)]
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float64] * 4 + DTYPES))
    values = torch.ones([size * 2 for size in sizes]).to(dtype)
    step = draw(st.sampled_from([1, 2]))
    cut = values[tuple(slice(None, size * step, step) for size in sizes)]
    return cut.movedim(0, -1).contiguous().movedim(-1, 0) if draw(st.booleans()) else cut


WORKS_OR_SAYS_WHY = (ValueError, TypeError)


def works_or_says_why(call):
    """The result, or None where the call raised a ValueError or TypeError with a message."""
    try:
        return call()
    except WORKS_OR_SAYS_WHY as error:
        if len(str(error)) < 10:
            raise
        return None


@given(tensors(3), st.one_of(st.none(), tensors(2)), st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan]))
def test_returns_of_anything(delta_loss, carry, discount):
    result = works_or_says_why(lambda: functional.returns(delta_loss, discount, carry=carry))
    usable = delta_loss.dim() == 3 and delta_loss.dtype in {torch.float32, torch.float64}
    usable = usable and delta_loss.shape[0] > 0 and delta_loss.shape[2] > 0 and 0 <= discount <= 1
    if carry is not None:
        usable = usable and carry.shape == delta_loss.shape[1:] and carry.dtype == delta_loss.dtype
    assert (result is not None) == usable
    assert result is None or result.shape == delta_loss.shape


@given(tensors(3), tensors(4), st.sampled_from(["np", "anp"]))
def test_adjoint_of_anything(credit, delta_a, method):
    def call():
        activity = delta_a if method == "anp" else None
        return functional.adjoint(credit, activity, 3, method=method, units=delta_a.shape[-1])

    result = works_or_says_why(call)
    assert result is None or result.shape == (*credit.shape[:2], delta_a.shape[-1])


@given(tensors(3), tensors(3), tensors(2), tensors(3), st.integers(-1, 3), st.booleans())
def test_rollout_of_anything(preact, hidden, weight_hh, grad, rollouts, alike):
    if alike:
        hidden, grad = preact.clone(), preact * 1
        weight_hh = torch.ones(preact.shape[-1], preact.shape[-1]).to(preact.dtype) if preact.dim() else weight_hh
    result = works_or_says_why(
        lambda: functional.rollout(preact, hidden, weight_hh, LinearLoss(grad), 3, rollouts=rollouts)
    )
    fits = preact.dim() == 3 and preact.dtype in {torch.float32, torch.float64} and rollouts > 0
    if alike and fits and preact.shape[0] and preact.shape[2]:
        assert result.delta_loss.shape == (*preact.shape[:2], rollouts)
        assert bool(torch.isfinite(result.delta_loss).all())


@given(
    st.tuples(*[st.integers(-1, 5)] * 4),
    st.sampled_from(["rademacher", "gaussian"]),
    st.sampled_from(DTYPES),
    st.integers(-(2**65), 2**65),
)
def test_noise_of_anything(shape, kind, dtype, seed):
    result = works_or_says_why(lambda: functional.noise(seed, shape, kind=kind, dtype=dtype))
    assert result is None or (result.shape == shape and result.dtype == dtype)
    usable = min(shape[0], shape[2], shape[3]) > 0 and shape[1] >= 0 and dtype in DTYPES[:4]
    assert (result is not None) == (usable and -(2**63) <= seed < 2**64)
