"""Operations and kernel launches of least squares on CUDA, counted without a GPU: fake tensors, idle launches.

`pytest tests/test_least_squares_launches.py -s` prints them.
"""

import contextlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anpgpu.kernels import least_squares as reference
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import INTERPRETED

jit = pytest.importorskip("triton.runtime.jit", reason="needs Triton")
least_squares_triton = pytest.importorskip("anpgpu.kernels.least_squares_triton", reason="needs Triton")
noise_triton = pytest.importorskip("anpgpu.kernels.noise_triton", reason="needs Triton")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels are not launched")

FREE = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "device", "item"}
"""Operations that start no kernel, beside views."""


class Count(TorchDispatchMode):
    """Counts operations that start a kernel on a GPU: a lower bound, since some start several."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        del types
        name = function._schema.name.split("::")[1]
        self.number += not (function.is_view or name in FREE)
        return function(*arguments, **(named or {}))


def counted(shape, method, noise="rademacher"):
    """Return how many operations of torch and how many launches of Triton a call makes."""
    launches = []
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Count() as operations:
        patch.setattr(jit.JITFunction, "__getitem__", lambda kernel, grid: lambda *_, **__: launches.append(kernel))
        # Tensors of the CPU that say they are on CUDA: torch without CUDA indexes no others.
        patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        patch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        patch.setitem(reference.BLOCK_BYTES, "cpu", reference.BLOCK_BYTES["cuda"])
        time, batch, rollouts, _ = shape
        arguments = (
            torch.empty(time, batch, rollouts),
            torch.empty(shape, dtype=torch.bfloat16),
            torch.empty(batch, rollouts),
            torch.empty((), dtype=torch.int64),
        )
        method(
            *arguments,
            finite=torch.empty((batch, rollouts), dtype=torch.bool),
            discount=0.9,
            ridge=0.01,
            baseline=True,
            options=RolloutOptions(rollouts, 1e-3, noise, precision="bf16"),
            counters=Counters(),
        )
    return operations.number, len(launches)


def library(*arguments, **named):
    """Least squares on torch's batched operations, with Triton's noise."""
    return reference.least_squares(*arguments, draw=noise_triton.noise, recursion=None, **named)


@pytest.mark.parametrize("shape", [(10, 32, 128, 512), (10, 8, 200, 512)], ids=str)
def test_the_kernels_are_a_handful_of_launches(shape):
    operations, launches = counted(shape, least_squares_triton.least_squares)
    before = sum(counted(shape, library))
    sys.stdout.write(f"T, B, P, H = {shape}: {before} on torch's batched operations, {operations + launches} kernels\n")
    assert operations <= 2
    assert launches <= (9 if shape[2] <= 128 else 16)
    assert before > 10 * shape[0]


def test_the_number_of_steps_changes_nothing():
    short, long = ((time, 32, 64, 512) for time in (2, 2000))
    assert counted(short, least_squares_triton.least_squares) == counted(long, least_squares_triton.least_squares)
