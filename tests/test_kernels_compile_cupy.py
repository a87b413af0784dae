"""The CUDA C of the CuPy kernels, without a GPU.

NVRTC compiles it for every architecture. A C compiler builds the same text for the CPU, where it runs thread by thread
behind the public functions, which must equal the torch reference.
"""

import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import overflow_cases
import pytest
import tolerances
import torch

from anpgpu.kernels import (
    adjoint as adjoint_reference,
    adjoint_cupy,
    cell_cupy,
    cell_gated_cupy,
    loss_cupy,
    noise as noise_reference,
    noise_cupy,
    rollout as rollout_reference,
    rollout_cupy,
)
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS, ESTIMATORS

pytestmark = pytest.mark.compile

SOURCES = {
    "noise": noise_cupy.NOISE_KERNEL_SOURCE,
    "rollout": rollout_cupy.ROLLOUT_SOURCE,
    "cell": cell_cupy.CELL_SOURCE,
    "cell_gated": cell_gated_cupy.CELL_GATED_SOURCE,
    "loss": loss_cupy.LOSS_SOURCE,
    "adjoint": adjoint_cupy.ADJOINT_SOURCE,
}
ARCHITECTURES = ("compute_80", "compute_90", "compute_100")
TOLERANCE = {torch.float32: "float32_long", torch.float64: "float64"}

C_PRELUDE = """
#include <math.h>
#include <tgmath.h>
typedef struct { unsigned int x, y, z; } dim3;
static dim3 blockIdx, blockDim, threadIdx;
void set_thread(unsigned int block, unsigned int thread, unsigned int threads)
{
    blockIdx.x = block;
    threadIdx.x = thread;
    blockDim.x = threads;
}
#define __device__ static
#define __global__
"""


# The same text as plain C


@functools.cache
def compiled(source, dtype):
    """Build a source with the C compiler, as a library whose kernels are functions of one thread."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    compiler = next((name for name in compilers if name and shutil.which(name)), None)
    assert compiler is not None, "this test needs a C compiler: it runs the CUDA C kernels on the CPU"
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "kernels.c"), Path(folder, "kernels.so")
        text.write_text(C_PRELUDE + source.replace('extern "C" ', ""))
        flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wdouble-promotion", "-Werror", "-Wno-unused-function"]
        command = [compiler, *flags, f"-DREAL={noise_cupy.REAL_NAMES[dtype]}", "-shared", "-fPIC", text, "-o", library]
        subprocess.run([*command, "-lm"], check=True)
        return ctypes.CDLL(str(library))


GUARD = 16


class Guarded:
    """A copy of a tensor between two guard bands, which no thread may write and whose NaN no result may show."""

    def __init__(self, tensor):
        assert tensor.is_contiguous(), "a kernel takes contiguous tensors"
        self.tensor = tensor
        fill = float("nan") if tensor.is_floating_point() else 0x5A5A5A5A5A5A5A5A
        self.memory = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
        self.inside = self.memory[GUARD : GUARD + tensor.numel()]
        self.inside.copy_(tensor.flatten())
        self.before = self.memory.clone()

    def check(self):
        for band in (slice(0, GUARD), slice(GUARD + len(self.inside), None)):
            assert torch.equal(bits(self.memory[band]), bits(self.before[band])), "a thread wrote outside its tensor"

    def pointer(self):
        return ctypes.c_void_p(self.inside.data_ptr())


def bits(tensor):
    """Return the integers of the same bits, which compare equal where NaN does not."""
    return tensor.contiguous().view({4: torch.int32, 8: torch.int64}[tensor.element_size()])


def launch_on_cpu(source, name, dtype, threads, arguments):
    """Stand in for `noise_cupy.launch`: all threads in order, then in reverse order, with one result."""
    if threads == 0:
        return
    library = compiled(source, dtype)
    function = getattr(library, name)
    function.restype = None
    outcomes = []
    for order in (range, lambda count: reversed(range(count))):
        guarded = [Guarded(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        operands = [operand(argument) for argument in (*guarded, threads)]
        for index in order(-(-threads // 64) * 64):
            library.set_thread(index // 64, index % 64, 64)
            function(*operands)
        tensors = [argument for argument in guarded if isinstance(argument, Guarded)]
        for tensor in tensors:
            tensor.check()
        outcomes.append(tensors)
    for forward, backward in zip(*outcomes, strict=True):
        assert torch.equal(bits(forward.inside), bits(backward.inside)), "the result depends on the threads' order"
        # Only the first tensor is written.
        if forward is not outcomes[0][0]:
            assert torch.equal(bits(forward.memory), bits(forward.before))
    result = outcomes[0][0]
    result.tensor.copy_(result.inside.view_as(result.tensor))


def operand(argument):
    if isinstance(argument, Guarded):
        return argument.pointer()
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_longlong(int(argument))


@pytest.fixture(autouse=True)
def _cpu_launches(monkeypatch):
    for module in (noise_cupy, rollout_cupy, cell_cupy, cell_gated_cupy, loss_cupy, adjoint_cupy):
        monkeypatch.setattr(module, "launch", launch_on_cpu)
    # Memory nobody writes must show.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_close(actual, expected, tolerance):
    """Compare the finite values by a name of the table; NaN and infinities must sit in the same places."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    torch.testing.assert_close(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    tolerances.assert_close(actual[finite], expected[finite], tolerance)


SEED = torch.tensor(-(2**61) + 12345)
COUNTERS = (
    Counters(),
    Counters(purpose=4, layer=255, time=2**32 - 3, rollout=2**32 - 17, sample=2**20 - 3, rank=2**12 - 1),
    Counters(purpose=1, layer=3, time=7, rollout=9, sample=11, rank=13),
)


@pytest.mark.parametrize("counters", COUNTERS)
@pytest.mark.parametrize("hidden", [1, 17, 130, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise(counters, hidden, dtype):
    for kind, tolerance in (("rademacher", "exact"), ("gaussian", TOLERANCE[dtype])):
        arguments = {"sigma": 0.3, "kind": kind, "counters": counters, "dtype": dtype}
        shape = (3, 2, 5 if hidden < 1000 else 1, hidden)
        assert_close(
            noise_cupy.noise(SEED, shape, **arguments), noise_reference.noise(SEED, shape, **arguments), tolerance
        )


def test_noise_known_answers():
    """The signs of 512 units are the bits of four Philox blocks; the zero and the all-ones vector of Random123."""
    answers = {
        0: (0, 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        -1: (2**32 - 1, 0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    library = compiled(noise_cupy.NOISE_KERNEL_SOURCE.replace("__device__ void philox", "void philox"), torch.float32)
    for key, (counter, *words) in answers.items():
        block = (ctypes.c_uint32 * 4)(*[counter] * 4)
        library.philox(block, ctypes.c_uint64(key & (2**64 - 1)))
        assert list(block) == words


def test_noise_in_bfloat16():
    actual = noise_cupy.noise(SEED, (1, 2, 3, 20), sigma=0.3, dtype=torch.bfloat16)
    assert torch.equal(actual, noise_reference.noise(SEED, (1, 2, 3, 20), sigma=0.3, dtype=torch.bfloat16))


# Rollouts


def clean_run(time, batch, hidden, outputs, dtype, nonlinearity):
    generator = torch.Generator().manual_seed(time + 10 * batch + 100 * hidden)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    preact = draw(time, batch, hidden)
    state = preact.tanh() if nonlinearity == "tanh" else preact.relu()
    weight = draw(time, batch).abs()
    weight[0, 0] = 0
    readout = draw(outputs, hidden)
    target = torch.randint(outputs, (time, batch), generator=generator)
    losses = {
        "linear": LinearLoss(draw(time, batch, hidden)),
        "squared": SquaredLoss(readout, draw(time, batch, outputs), weight),
        "squared_hidden": SquaredLoss(None, draw(time, batch, hidden), weight),
        "cross_entropy": CrossEntropyLoss(readout, draw(time, batch, outputs).softmax(-1), target, weight),
        "cross_entropy_hidden": CrossEntropyLoss(None, draw(time, batch, hidden).softmax(-1), target % hidden, weight),
        "outputs": OutputsOnly(readout),
        "outputs_hidden": OutputsOnly(None),
        "none": None,
    }
    return preact, state, draw(hidden, hidden) / hidden**0.5, losses, draw


LOSSES = (
    "linear",
    "squared",
    "squared_hidden",
    "cross_entropy",
    "cross_entropy_hidden",
    "outputs",
    "outputs_hidden",
    "none",
)
SHAPES = ((1, 1, 1, 1, 1), (3, 2, 3, 5, 2), (2, 3, 5, 17, 7))


def assert_same_rollout(actual, expected, tolerance):
    for name, value in actual._asdict().items():
        reference = getattr(expected, name)
        assert (value is None) == (reference is None), name
        if value is not None:
            assert_close(value, reference, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_rollout(shape, dtype, nonlinearity, loss):
    time, batch, rollouts, hidden, outputs = shape
    preact, state, weight_hh, losses, draw = clean_run(time, batch, hidden, outputs, dtype, nonlinearity)
    # Small deviations take the forms without cancellation, large ones the plain difference.
    for sigma, kind in ((1e-4, "rademacher"), (1.5, "gaussian")):
        options = RolloutOptions(
            rollouts=rollouts,
            sigma=sigma,
            noise=kind,
            cell=CELLS[nonlinearity].forms,
            precision="fp64" if dtype == torch.float64 else "fp32",
            store_delta_a=sigma > 1,
        )
        for delta_h0 in (None, sigma * draw(batch, rollouts, hidden)):
            arguments = (preact, state, weight_hh, losses[loss], SEED)
            named = {"options": options, "counters": COUNTERS[2], "delta_h0": delta_h0}
            actual = rollout_cupy.rollout(*arguments, **named)
            expected = rollout_reference.rollout(*arguments, **named)
            assert_same_rollout(actual, expected, TOLERANCE[dtype])


def test_rollout_of_strided_tensors_ignores_precision():
    preact, state, weight_hh, losses, draw = clean_run(2, 3, 6, 4, torch.float32, "tanh")
    loss = losses["cross_entropy"]
    loss = loss._replace(probs=strided(loss.probs), readout=strided(loss.readout), weight=strided(loss.weight))
    options = RolloutOptions(rollouts=3, sigma=1e-2, store_delta_a=True)
    delta_h0 = draw(3, 3, 6)
    expected = rollout_reference.rollout(
        preact, state, weight_hh, losses["cross_entropy"], SEED, options=options, delta_h0=delta_h0
    )
    actual = rollout_cupy.rollout(
        strided(preact),
        strided(state),
        strided(weight_hh),
        loss,
        SEED,
        options=options._replace(precision="bf16"),
        delta_h0=strided(delta_h0),
    )
    assert_same_rollout(actual, expected, TOLERANCE[torch.float32])


def strided(tensor):
    """Return the same values in memory of another order."""
    result = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)[..., ::2]
    return result.copy_(tensor)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rollout_keeps_non_finite_values_where_the_reference_does(nonlinearity):
    preact, state, weight_hh, losses, draw = clean_run(3, 2, 5, 3, torch.float64, nonlinearity)
    delta_h0 = draw(2, 3, 5)
    delta_h0[0, 1, 2], delta_h0[1, 0, 3] = float("nan"), 1e300
    options = RolloutOptions(
        rollouts=3, sigma=0.1, cell=CELLS[nonlinearity].forms, precision="fp64", store_delta_a=True
    )
    for name in LOSSES:
        arguments, named = (preact, state, weight_hh, losses[name], SEED), {"options": options, "delta_h0": delta_h0}
        actual = rollout_cupy.rollout(*arguments, **named)
        expected = rollout_reference.rollout(*arguments, **named)
        for left, right in zip(actual, expected, strict=True):
            if left is not None:
                assert torch.equal(left.isfinite(), right.isfinite()), name


# Returns and adjoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("with_carry", [False, True])
def test_returns(dtype, discount, with_carry):
    delta_loss = torch.randn(5, 2, 3, dtype=dtype)
    carry = torch.randn(2, 3, dtype=dtype) if with_carry else None
    delta_loss[3, 0, 1] = float("inf")
    expected = adjoint_reference.returns(delta_loss, discount, carry=carry)
    assert_close(adjoint_cupy.returns(strided(delta_loss), discount, carry=carry), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 3, 5), (2, 3, 17, 65), (1, 2, 2, 520)], ids=str)
def test_adjoint(dtype, weight_by, shape):
    rollouts, hidden = shape[2:]
    for counters, sigma, kind in zip(COUNTERS, (1e-3, 1e-20, 2.0), ("gaussian", "rademacher", "gaussian"), strict=True):
        delta_a = sigma * torch.randn(shape, dtype=torch.float64).to(dtype)
        credit = torch.randn(shape[:3], dtype=torch.float64).to(dtype)
        options = RolloutOptions(rollouts=rollouts, sigma=sigma, noise=kind)
        arguments = (credit, strided(delta_a) if weight_by == "activity" else None, SEED)
        named = {"weight_by": weight_by, "units": hidden, "options": options, "counters": counters}
        expected = adjoint_reference.adjoint(*arguments, **named)
        assert_close(adjoint_cupy.adjoint(*arguments, **named), expected, TOLERANCE[dtype])


def test_adjoint_leaves_out_what_does_not_count():
    delta_a, credit = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    delta_a[0, 0, 0], credit[0, 0, 0] = float("nan"), 0
    delta_a[0, 1, 1, 2] = float("inf")
    delta_a[0, 2, 0, 1], credit[0, 2, 0] = -float("inf"), float("inf")
    delta_a[1, 2, 3] = 0
    options = RolloutOptions(rollouts=4, sigma=1.0)
    arguments, named = (credit, delta_a, SEED), {"weight_by": "activity", "units": 5, "options": options}
    actual = adjoint_cupy.adjoint(*arguments, **named)
    assert torch.isfinite(actual).all()
    assert_close(actual, adjoint_reference.adjoint(*arguments, **named), TOLERANCE[torch.float32])


def test_adjoint_takes_bfloat16_deviations():
    delta_a, credit = torch.randn(2, 3, 4, 5).bfloat16(), torch.randn(2, 3, 4)
    arguments = (credit, delta_a, SEED)
    named = {"weight_by": "activity", "units": 5, "options": RolloutOptions(rollouts=4, sigma=1.0)}
    expected = adjoint_reference.adjoint(*arguments, **named)
    assert_close(adjoint_cupy.adjoint(*arguments, **named), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("weight_by", ["noise", "activity"])
@pytest.mark.parametrize("with_start", [False, True])
def test_rollout_adjoint(weight_by, with_start):
    preact, state, weight_hh, losses, draw = clean_run(4, 2, 5, 3, torch.float64, "tanh")
    options = RolloutOptions(rollouts=3, sigma=1e-2, precision="fp64")
    for name in ("linear", "squared", "cross_entropy"):
        arguments = (preact, state, weight_hh, losses[name], SEED)
        start = draw(2, 3, 5) if with_start else None
        named = {"weight_by": weight_by, "options": options, "counters": COUNTERS[2], "delta_h0": start}
        actual = adjoint_cupy.rollout_adjoint(*arguments, **named)
        for left, right in zip(actual, adjoint_reference.rollout_adjoint(*arguments, **named), strict=True):
            assert_close(left, right, TOLERANCE[torch.float64])


@pytest.mark.parametrize("method", ["np", "anp"])
def test_a_rollout_that_overflows_later_adds_nothing_before(method):
    arguments, named, finite = overflow_cases.case(7, SEED, COUNTERS[2])
    found = adjoint_cupy.rollout_adjoint(*arguments, weight_by=ESTIMATORS[method].weight_by, **named)
    overflow_cases.assert_left_out(found, arguments, named, finite, method, TOLERANCE[torch.float32])


# NVRTC


@functools.cache
def nvrtc():
    """Return the NVRTC library of the wheel nvidia-cuda-nvrtc."""
    files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    libraries = []
    # NVRTC finds its builtins on the loader's path or already loaded.
    for pattern in (r"libnvrtc-builtins\.so\.[\d.]+", r"libnvrtc\.so\.\d+"):
        paths = [file.locate() for file in files if re.fullmatch(pattern, file.name)]
        assert paths, f"the wheel nvidia-cuda-nvrtc has no {pattern}"
        libraries.append(ctypes.CDLL(str(paths[0]), mode=ctypes.RTLD_GLOBAL))
    return libraries[-1]


def compile_with_nvrtc(source, options):
    """Return NVRTC's status, its log and the PTX."""
    library, program = nvrtc(), ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = library.nvrtcCompileProgram(program, len(options), flags)
    texts = []
    for size_of, content_of in (("nvrtcGetProgramLogSize", "nvrtcGetProgramLog"), ("nvrtcGetPTXSize", "nvrtcGetPTX")):
        size = ctypes.c_size_t()
        getattr(library, size_of)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(max(1, size.value))
        getattr(library, content_of)(program, buffer)
        texts.append(buffer.value.decode())
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return status, *texts


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC's wheel is installed on Linux only")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOURCES)
def test_nvrtc_compiles(name, dtype, architecture):
    source = SOURCES[name]
    real = noise_cupy.REAL_NAMES[dtype]
    options = (f"-DREAL={real}", f"--gpu-architecture={architecture}", "--std=c++17")
    status, log, ptx = compile_with_nvrtc(source, options)
    assert status == 0, log
    assert "warning" not in log
    kernels = re.findall(r'extern "C" __global__ void (\w+)', source)
    assert kernels
    assert set(re.findall(r"\.entry (\w+)", ptx)) == set(kernels)


def test_missing_cupy_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"anpgpu\[cuda12\].*anpgpu\[cuda13\]"):
        noise_cupy.import_cupy()
