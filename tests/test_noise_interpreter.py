"""The Triton noise in Triton's interpreter against the torch reference."""

import pytest
import torch
from tolerances import TOLERANCES

from anpgpu.kernels import noise as reference
from anpgpu.kernels.noise import Counters

noise_triton = pytest.importorskip("anpgpu.kernels.noise_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SEEDS = (0, 987654321, 2**63 - 1, -(2**63), -1)
SHAPES = ((1, 1, 1, 1), (3, 2, 3, 5), (1, 3, 17, 17), (2, 1, 40, 65), (1, 2, 3, 130), (1, 1, 3, 520))
OFFSETS = {
    "origin": Counters(),
    "offset": Counters(purpose=4, layer=255, time=2**32 - 3, rollout=2**32 - 40, sample=2**20 - 3, rank=4095),
    # Both pairs of counter words are 2^63, the least that is no signed integer of 64 bits.
    "middle": Counters(time=2**31, rank=2**11),
}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert noise_triton.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(seed, shape, **named):
    return noise_triton.noise(torch.tensor(seed), shape, **named), reference.noise(torch.tensor(seed), shape, **named)


@pytest.mark.parametrize("counters", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs_are_the_reference_s(shape, counters):
    actual, expected = both(SEEDS[1], shape, sigma=0.37, counters=counters)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("counters", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussians_are_the_reference_s(shape, counters):
    actual, expected = both(SEEDS[1], shape, kind="gaussian", counters=counters)
    assert (actual - expected).abs().max() <= TOLERANCES["gaussian"].bound


@pytest.mark.parametrize("counters", OFFSETS.values(), ids=OFFSETS)
def test_counter_words_are_signed_integers_of_64_bits(counters):
    """Launchers take nothing else."""
    purpose, layer, time, rollout, sample, rank = counters
    words = noise_triton.counter_words(counters)
    assert all(-(2**63) <= word < 2**63 for word in words)
    low = time << 32 | purpose << 28 | layer << 20
    high = rank << 52 | sample << 32 | rollout
    assert [word % 2**64 for word in words] == [low, high]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_bit_of_the_seed_counts(seed):
    actual, expected = both(seed, (2, 1, 2, 40))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype(dtype):
    actual, expected = both(SEEDS[1], (2, 1, 2, 9), dtype=dtype, sigma=0.5)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_tile_sizes_change_nothing(monkeypatch):
    expected = noise_triton.noise(torch.tensor(SEEDS[1]), (2, 3, 5, 70))
    launch = noise_triton.NOISE_LAUNCH.__class__(block_rows=8, block_units=32, warps=1)
    monkeypatch.setattr(noise_triton, "NOISE_LAUNCH", launch)
    assert torch.equal(noise_triton.noise(torch.tensor(SEEDS[1]), (2, 3, 5, 70)), expected)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        noise_triton.noise(torch.tensor(0), (1, 1, 1, 1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(0, 1, 1, 1), (1, 0, 2, 3), (1, 1, 0, 2), (1, 1, 1, 0)])
def test_empty(shape):
    assert noise_triton.noise(torch.tensor(0), shape).shape == shape
