"""The kernels on a GPU: Triton against the CuPy oracle, the oracle against the CPU, and what only a GPU can show."""

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_sanitize
import pytest
import tolerances
import torch

from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import implementation

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
COUNTERS = (
    Counters(),
    Counters(purpose=1, layer=7, time=2**32 - 60, rollout=2**32 - 5001, sample=2**20 - 40, rank=4095),
)
# Root mean square of the error over that of the values. Operands are rounded by 2^-24, 2^-11, 2^-11 and 2^-8 of their
# size, once a step, over a few steps; a loss difference has some cancellation among its terms.
PRECISIONS = {"fp32": 1e-5, "tf32": 4e-3, "fp16": 4e-3, "bf16": 3e-2}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make_seed(value=-(2**61) + 77):
    return torch.tensor(value, device=DEVICE)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype)


def relative_error(actual, expected):
    """Compare tensors of any two devices."""
    return tolerances.relative_error(actual.cpu(), expected.cpu())


def bound(name):
    return tolerances.TOLERANCES[name].bound


def to(value, device=None, dtype=None):
    """Move the tensors of a tuple, the floating ones to another type as well."""
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, tuple):
        moved = [to(field, device, dtype) for field in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def setting(time, batch, rollouts, hidden, outputs=10, nonlinearity="tanh", loss="linear", **options):
    """Return the positional arguments of a rollout, float64, and its options; `nonlinearity` names the cell."""
    forms = CELLS[nonlinearity].forms
    preact = randn(time, batch, forms.clean * hidden, dtype=torch.float64)
    state = preact.relu() if nonlinearity == "relu" else preact[..., : forms.states * hidden].tanh()
    weight_hh = randn(forms.gates * hidden, hidden, dtype=torch.float64) / hidden**0.5
    readout, weight = randn(outputs, hidden, dtype=torch.float64), torch.rand(time, batch, device=DEVICE).double()
    weight[0, 0] = 0
    chosen = {
        "linear": lambda: LinearLoss(randn(*state.shape, dtype=torch.float64)),
        "squared": lambda: SquaredLoss(readout, randn(time, batch, outputs, dtype=torch.float64), weight),
        "cross_entropy": lambda: CrossEntropyLoss(
            readout,
            randn(time, batch, outputs, dtype=torch.float64).softmax(-1),
            torch.randint(outputs, (time, batch), device=DEVICE),
            weight,
        ),
        "outputs": lambda: OutputsOnly(readout),
        "none": lambda: None,
    }[loss]()
    options = {"sigma": 1e-3, "cell": forms, "precision": "fp32", "store_delta_a": True, **options}
    return (preact, state, weight_hh, chosen, make_seed()), RolloutOptions(rollouts, **options)


SHAPES = ((1, 1, 1, 1), (4, 3, 5, 17), (4, 2, 33, 128), (3, 2, 64, 256), (3, 2, 70, 500), (2, 1, 130, 1030))
LOSSES = ("linear", "squared", "cross_entropy", "outputs", "none")
NONLINEARITIES = ("tanh", "relu", "gru", "lstm")


# Noise


@pytest.mark.parametrize("counters", COUNTERS)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 40, 5000, 3)])
def test_noise(shape, counters):
    for dtype in (torch.float32, torch.bfloat16):
        named = {"sigma": 0.3, "kind": "rademacher", "counters": counters, "dtype": dtype}
        fast = implementation("noise", "triton")(make_seed(), shape, **named)
        assert torch.equal(fast, implementation("noise", "cupy")(make_seed(), shape, **named))
        assert torch.equal(fast.cpu(), implementation("noise", "torch")(make_seed().cpu(), shape, **named))
    named = {"kind": "gaussian", "counters": counters}
    exact = implementation("noise", "cupy")(make_seed(), shape, **named, dtype=torch.float64)
    reference = implementation("noise", "torch")(make_seed().cpu(), shape, **named, dtype=torch.float64)
    torch.testing.assert_close(exact.cpu(), reference, rtol=0, atol=1e-13)
    slow = implementation("noise", "cupy")(make_seed(), shape, **named)
    fast = implementation("noise", "triton")(make_seed(), shape, **named)
    # float32 rounds the uniforms themselves, which moves a few numbers close to zero radius more than the rest.
    torch.testing.assert_close(slow.double(), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(fast.double(), slow.double(), rtol=0, atol=1e-3)
    assert (fast.double() - slow.double()).square().mean().sqrt() <= bound("gaussian")


# Rollouts


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_oracle_is_the_reference(shape, loss, nonlinearity):
    for sigma, kind in ((1e-4, "rademacher"), (1.5, "gaussian")):
        arguments, options = setting(*shape, nonlinearity=nonlinearity, loss=loss, sigma=sigma, noise=kind)
        options = options._replace(precision="fp64")
        start = sigma * randn(shape[1], shape[2], arguments[1].shape[-1], dtype=torch.float64)
        named = {"options": options, "counters": COUNTERS[1]}
        oracle = implementation("rollout", "cupy")(*arguments, **named, delta_h0=start)
        reference = implementation("rollout", "torch")(*to(arguments, "cpu"), **named, delta_h0=start.cpu())
        for actual, expected in zip(oracle, reference, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                assert relative_error(actual, expected) <= bound("float64")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rollout(shape, loss, nonlinearity, precision):
    for sigma, kind in ((1e-5, "gaussian"), (1e-3, "rademacher"), (0.5, "rademacher")):
        arguments, options = setting(
            *shape, nonlinearity=nonlinearity, loss=loss, sigma=sigma, noise=kind, precision=precision
        )
        start = sigma * randn(shape[1], shape[2], arguments[1].shape[-1], dtype=torch.float64)
        named = {"options": options, "counters": COUNTERS[1]}
        narrow = to(arguments, dtype=torch.float32)
        fast = implementation("rollout", "triton")(*narrow, **named, delta_h0=start.float())
        # The oracle starts from the rounded numbers.
        oracle = implementation("rollout", "cupy")(
            *to(narrow, dtype=torch.float64), **named, delta_h0=start.float().double()
        )
        for name, actual, expected in zip(fast._fields, fast, oracle, strict=True):
            assert (actual is None) == (expected is None), name
            if actual is not None:
                stored = torch.finfo(actual.dtype).eps
                assert relative_error(actual, expected) <= max(PRECISIONS[precision], stored), (
                    f"{name} at sigma {sigma}"
                )


@pytest.mark.parametrize("form", ["resident", "stepwise"])
@pytest.mark.parametrize("shape", [(3, 2, 70, 128), (4, 3, 20, 100), (4, 5, 64, 64), (3, 20, 3, 128)], ids=str)
@pytest.mark.parametrize("nonlinearity", ["gru", "lstm"])
def test_forms_of_gated_cells(nonlinearity, shape, form):
    """Tiles of one sample and of several; units that fill a tile, and not."""
    from anpgpu.kernels.rollout_triton import rollout_in_form

    for precision, noise in (("bf16", "rademacher"), ("fp16", "gaussian")):
        arguments, options = setting(*shape, nonlinearity=nonlinearity, precision=precision, noise=noise)
        start = 1e-3 * randn(shape[1], shape[2], arguments[1].shape[-1], dtype=torch.float64).float()
        narrow = to(arguments, dtype=torch.float32)
        fast = rollout_in_form(form, *narrow, options, COUNTERS[1], start)
        named = {"options": options, "counters": COUNTERS[1], "delta_h0": start.double()}
        oracle = implementation("rollout", "cupy")(*to(narrow, dtype=torch.float64), **named)
        for name in ("delta_loss", "delta_a", "delta_h"):
            actual, expected = getattr(fast, name), getattr(oracle, name)
            assert relative_error(actual, expected) <= max(PRECISIONS["bf16"], torch.finfo(actual.dtype).eps), name


@pytest.mark.parametrize("units", [64, 128, 256])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_rollout_whose_neighbouring_units_share_a_reciprocal(units, precision):
    """Nothing stored and no start, so that 256 units too take two rows; every other unit is saturated."""
    (preact, _, weight, loss, seed), options = setting(3, 2, 130, units, precision=precision, store_delta_a=False)
    preact[..., ::4], preact[..., 2::4] = 60.0, -60.0
    arguments = to((preact, preact.tanh(), weight, loss, seed), dtype=torch.float32)
    fast = implementation("rollout", "triton")(*arguments, options=options)
    oracle = implementation("rollout", "cupy")(*to(arguments, dtype=torch.float64), options=options)
    for name in ("delta_loss", "delta_h"):
        actual, expected = getattr(fast, name), getattr(oracle, name)
        assert relative_error(actual, expected) <= max(PRECISIONS[precision], torch.finfo(actual.dtype).eps), name


# Returns and adjoint

ADJOINT_SHAPES = (*SHAPES, (50, 16, 64, 500), (1, 1, 4096, 128), (2, 3, 17, 2048), (1, 1, 5, 20_000))


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("with_carry", [False, True])
def test_returns(discount, with_carry):
    for shape in ((1, 1, 1), (7, 3, 130), (501, 2, 33)):
        delta_loss = randn(*shape)
        carry = randn(*shape[1:]) if with_carry else None
        fast = implementation("returns", "triton")(delta_loss, discount, carry=carry)
        slow = implementation("returns", "cupy")(delta_loss, discount, carry=carry)
        reference = implementation("returns", "torch")(*to((delta_loss,), "cpu"), discount, carry=to(carry, "cpu"))
        assert relative_error(fast, slow) <= bound("float32")
        assert relative_error(slow, reference) <= bound("float32")


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("shape", ADJOINT_SHAPES, ids=str)
def test_adjoint(shape, weight_by):
    for sigma, kind, stored in ((1e-3, "rademacher", torch.bfloat16), (1e-20, "gaussian", torch.float32)):
        credit, delta_a = sigma * randn(*shape[:3]), (sigma * randn(*shape)).to(stored)
        options = RolloutOptions(shape[2], sigma, kind)
        for counters in COUNTERS:
            named = {"weight_by": weight_by, "units": shape[3], "options": options, "counters": counters}
            activity = delta_a if weight_by == "activity" else None
            fast = implementation("adjoint", "triton")(credit, activity, make_seed(), **named)
            wide = to((credit, activity), dtype=torch.float64)
            slow = implementation("adjoint", "cupy")(*wide, make_seed(), **named)
            assert relative_error(fast, slow) <= bound("float32_long")
            reference = implementation("adjoint", "torch")(*to((*wide, make_seed()), "cpu"), **named)
            assert relative_error(slow, reference) <= bound("float64")


def test_adjoint_leaves_out_what_does_not_count():
    credit, delta_a = randn(3, 2, 40), randn(3, 2, 40, 70)
    credit[0, 0, 3], delta_a[0, 0, 3] = 0, float("nan")
    delta_a[1, 1, 7, 69] = float("inf")
    delta_a[2, 0, 39] = 0
    named = {"weight_by": "activity", "units": 70, "options": RolloutOptions(40, 1.0)}
    fast = implementation("adjoint", "triton")(credit, delta_a, make_seed(), **named)
    slow = implementation("adjoint", "cupy")(*to((credit, delta_a), dtype=torch.float64), make_seed(), **named)
    assert torch.isfinite(fast).all()
    assert relative_error(fast, slow) <= bound("float32_long")


def test_addresses_beyond_32_bits():
    """The last step of an activity of more than 2^31 elements equals the same step by itself."""
    time, rollouts, hidden = 3, 2**20, 1024
    delta_a = torch.empty((time, 1, rollouts, hidden), dtype=torch.bfloat16, device=DEVICE).normal_()
    credit = randn(time, 1, rollouts)
    named = {"weight_by": "activity", "units": hidden, "options": RolloutOptions(rollouts, 1.0)}
    whole = implementation("adjoint", "triton")(credit, delta_a, make_seed(), **named)
    alone = implementation("adjoint", "triton")(credit[2:], delta_a[2:], make_seed(), **named)
    assert relative_error(whole[:, 2:], alone) <= 1e-4


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES[:3])
@pytest.mark.parametrize("nonlinearity", ["tanh", "gru", "lstm"])
def test_rollout_adjoint(nonlinearity, loss, precision, weight_by):
    for shape in SHAPES:
        arguments, options = setting(*shape, nonlinearity=nonlinearity, loss=loss, precision=precision)
        named = {"weight_by": weight_by, "options": options, "counters": COUNTERS[1]}
        narrow = to(arguments, dtype=torch.float32)
        fast = implementation("rollout_adjoint", "triton")(*narrow, **named)
        oracle = implementation("rollout_adjoint", "cupy")(*to(narrow, dtype=torch.float64), **named)
        for actual, expected in zip(fast, oracle, strict=True):
            assert relative_error(actual, expected) <= PRECISIONS[precision]


# What only a GPU can show


def ops(precision="bf16"):
    """Return each op as a function of the seed alone, on shapes that take every path of the launchers."""
    arguments, options = setting(4, 3, 70, 130, loss="cross_entropy", precision=precision)
    *rest, _ = to(arguments, dtype=torch.float32)
    named = {"options": options, "counters": COUNTERS[1]}
    (*gru, _), gru_options = setting(4, 3, 70, 130, nonlinearity="gru", precision=precision)
    (*lstm, _), lstm_options = setting(4, 3, 70, 130, nonlinearity="lstm", precision=precision)
    gru, lstm = (to(tuple(arguments), dtype=torch.float32) for arguments in (gru, lstm))
    shape, few = (4, 3, 70, 130), (1, 1, 2000, 130)
    credit, few_credit, delta_a = randn(*shape[:3]), randn(*few[:3]), randn(*few)
    few_named = {"units": 130, "options": options._replace(rollouts=2000)}
    return {
        "rademacher": lambda seed: implementation("noise", "triton")(seed, shape),
        "gaussian": lambda seed: implementation("noise", "triton")(seed, shape, kind="gaussian"),
        "rollout": lambda seed: implementation("rollout", "triton")(*rest, seed, **named),
        "rollout of a GRU": lambda seed: implementation("rollout", "triton")(*gru, seed, options=gru_options),
        "rollout of an LSTM": lambda seed: implementation("rollout", "triton")(*lstm, seed, options=lstm_options),
        "returns": lambda _: implementation("returns", "triton")(credit, 0.9),
        "np": lambda seed: implementation("adjoint", "triton")(
            credit, None, seed, weight_by="noise", units=130, **named
        ),
        "np, split": lambda seed: implementation("adjoint", "triton")(
            few_credit, None, seed, weight_by="noise", **few_named
        ),
        "anp, split": lambda seed: implementation("adjoint", "triton")(
            few_credit, delta_a, seed, weight_by="activity", **few_named
        ),
        "rollout_adjoint": lambda seed: implementation("rollout_adjoint", "triton")(
            *rest, seed, weight_by="activity", **named
        ),
    }


GATED = ("rollout of a GRU", "rollout of an LSTM")
OPS = ("rademacher", "gaussian", "rollout", *GATED, "returns", "np", "np, split", "anp, split", "rollout_adjoint")


def tensors(result):
    found = (result,) if isinstance(result, torch.Tensor) else result
    return [tensor for tensor in found if tensor is not None]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.mark.parametrize("name", OPS)
def test_bitwise_repeatable(name):
    op = ops()[name]
    first = op(make_seed())
    for _ in range(5):
        # Other memory, with other contents, and other work beside it.
        disturbance = torch.full((1 << 24,), float("nan"), device=DEVICE)
        del disturbance
        assert same(op(make_seed()), first)
    if name != "returns" and "anp" not in name:
        assert not same(op(make_seed(5)), first)


@pytest.mark.parametrize("name", OPS)
def test_cuda_graph(name):
    """Three replays, each with another seed, equal three eager calls; capture would fail on a synchronisation."""
    op, seed = ops()[name], make_seed()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(seed)
    for value in (1, 2, 3):
        seed.fill_(value)
        graph.replay()
        replayed = [tensor.clone() for tensor in tensors(captured)]
        assert same(replayed, op(make_seed(value)))


@pytest.mark.parametrize("name", OPS)
def test_no_host_synchronisation(name):
    op, seed = ops()[name], make_seed()
    op(seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = op(seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result is not None


GUARD_BYTES = 1024
NOISES = ("rademacher", "gaussian")


@contextlib.contextmanager
def guard_bands(monkeypatch):
    """Make every new tensor, holding NaN, between two bands of bytes that must be as before at the end."""
    made, real_empty = [], torch.empty

    def empty(*shape, dtype=None, device=None, **_):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        band = GUARD_BYTES // dtype.itemsize
        memory = real_empty(shape.numel() + 2 * band, dtype=dtype, device=device)
        memory.view(torch.uint8).fill_(0xFF)
        made.append((memory.view(torch.uint8), shape.numel() * dtype.itemsize))
        return memory[band : band + shape.numel()].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "zeros", lambda *shape, **named: empty(*shape, **named).zero_())
        patch.setattr(torch, "empty_like", lambda like, **named: empty(*like.shape, **options_of(like, named)))
        patch.setattr(torch.Tensor, "new_empty", lambda self, *size, **named: empty(*size, **options_of(self, named)))
        patch.setattr(
            torch.Tensor, "new_zeros", lambda self, *size, **named: empty(*size, **options_of(self, named)).zero_()
        )
        yield made
    for memory, inside in made:
        assert bool((memory[:GUARD_BYTES] == 0xFF).all()), "written before the beginning of a tensor"
        assert bool((memory[GUARD_BYTES + inside :] == 0xFF).all()), "written beyond the end of a tensor"


def options_of(tensor, named):
    return {"dtype": named.get("dtype") or tensor.dtype, "device": named.get("device") or tensor.device}


def in_guard_bands(value):
    """Return a copy of every floating tensor of a tuple between NaN, which a stray read brings into the result."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        band = GUARD_BYTES // value.dtype.itemsize
        memory = value.new_full((value.numel() + 2 * band,), float("nan"))
        inside = memory[band : band + value.numel()].view(value.shape)
        return inside.copy_(value)
    if isinstance(value, tuple):
        moved = [in_guard_bands(field) for field in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guard_bands(shape, nonlinearity, backend, monkeypatch):
    hidden = shape[3]
    for loss, precision in (("linear", "bf16"), ("squared", "fp32"), ("cross_entropy", "bf16"), ("outputs", "fp32")):
        arguments, options = setting(*shape, nonlinearity=nonlinearity, loss=loss, precision=precision)
        arguments = in_guard_bands(to(arguments, dtype=torch.float32))
        named = {"options": options, "counters": COUNTERS[1]}
        with guard_bands(monkeypatch) as made:
            results = list(tensors(implementation("rollout", backend)(*arguments, **named)))
            delta_loss, delta_a = results[0], results[1][..., :hidden]
            if loss != "outputs":
                credit = implementation("returns", backend)(delta_loss, 0.9)
                for weight_by, activity in (("noise", None), ("activity", delta_a)):
                    results += [
                        implementation("adjoint", backend)(
                            credit, activity, arguments[-1], weight_by=weight_by, units=hidden, **named
                        ),
                        *implementation("rollout_adjoint", backend)(*arguments, weight_by=weight_by, **named),
                    ]
            results += [implementation("noise", backend)(arguments[-1], shape, kind=kind) for kind in NOISES]
        assert made
        assert all(bool(torch.isfinite(result).all()) for result in results)


def find_sanitizer():
    """Return compute-sanitizer: of the CUDA toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.files("nvidia-cuda-sanitizer-api") or []
            found = next((str(file.locate()) for file in files if file.match("*/bin/compute-sanitizer")), None)
    return found


@pytest.mark.parametrize("part", gpu_sanitize.PARTS)
@pytest.mark.parametrize("shape", gpu_sanitize.SHAPES)
@pytest.mark.parametrize("backend", ["triton", "cupy"])
def test_compute_sanitizer(backend, shape, part):
    sanitizer = find_sanitizer()
    assert sanitizer, "needs compute-sanitizer: the CUDA toolkit's, or pip install nvidia-cuda-sanitizer-api"
    script = Path(gpu_sanitize.__file__)
    # Every tensor an allocation of its own, so that a neighbour does not hide a stray access.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # One after the other: the second finds the kernels compiled.
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
        command += ["--backend", backend, "--shapes", shape, "--parts", part]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=270)
        assert result.returncode == 0, f"{tool}\n{result.stdout[-4000:]}{result.stderr[-4000:]}"
