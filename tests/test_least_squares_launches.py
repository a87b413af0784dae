"""Operations and kernel launches of least squares on CUDA, counted without a GPU: fake tensors, idle launches.

`pytest tests/test_least_squares_launches.py -s` prints them.
"""

import sys

import pytest
import torch

from anpgpu.kernels import least_squares as reference
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import INTERPRETED

idle = pytest.importorskip("idle_driver", reason="needs Triton")
least_squares_triton = pytest.importorskip("anpgpu.kernels.least_squares_triton", reason="needs Triton")
noise_triton = pytest.importorskip("anpgpu.kernels.noise_triton", reason="needs Triton")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels are not launched")


def counted(shape, method, noise="rademacher", *, halves=True):
    """Return how many operations of torch and how many launches of Triton a call makes."""
    with idle.idle_driver() as issued, issued:
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
            halves=halves,
        )
    return issued.operations.total(), issued.launches.total()


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


@pytest.mark.parametrize("shape", [(10, 32, 128, 64), (10, 8, 256, 200)], ids=str)
def test_so_they_are_with_more_rollouts_than_units(shape):
    operations, launches = counted(shape, least_squares_triton.least_squares, halves=False)
    before = sum(counted(shape, library, halves=False))
    sys.stdout.write(f"T, B, P, H = {shape}: {before} on torch's batched operations, {operations + launches} kernels\n")
    assert operations <= 2
    assert launches <= (7 if shape[3] <= 128 else 14)
    assert before > 10 * shape[0]


@pytest.mark.parametrize("units", [512, 48])
def test_the_number_of_steps_changes_nothing(units):
    short, long = (
        counted((time, 32, 64, units), least_squares_triton.least_squares, halves=False) for time in (2, 2000)
    )
    assert short == long
