"""Stepwise rollouts on a GPU: tiles and losses in all their variants against the CuPy oracle, and every time alike."""

import pytest
import torch
from test_gpu_kernels import COUNTERS, PRECISIONS, relative_error, setting, to

from anpgpu.kernels import tiles, tiles_measured
from anpgpu.runtime.dispatch import implementation

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def assert_equal_to_the_oracle(arguments, options, again):
    """Compare a rollout with that of float64, and with itself some times."""
    narrow, named = to(arguments, dtype=torch.float32), {"options": options, "counters": COUNTERS[1]}
    fast = implementation("rollout", "triton")(*narrow, **named)
    oracle = implementation("rollout", "cupy")(*to(narrow, dtype=torch.float64), **named)
    for name, actual, expected in zip(fast._fields, fast, oracle, strict=True):
        if actual is not None:
            stored = torch.finfo(actual.dtype).eps
            assert relative_error(actual, expected) <= max(PRECISIONS[options.precision], stored), name
    for _ in range(again):
        other = implementation("rollout", "triton")(*narrow, **named)
        assert all(torch.equal(left, right) for left, right in zip(other, fast, strict=True) if left is not None)


@pytest.mark.parametrize("wave", [0, 132], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("loss", ["linear", "squared"])
@pytest.mark.parametrize("shape", [(6, 3, 32, 512), (6, 5, 48, 500), (6, 2, 130, 1030), (6, 3, 16, 800)], ids=str)
def test_stepwise_tiles(shape, loss, precision, wave, monkeypatch):
    """Whole samples, tiles that clip, halves; steps that start before the one before is done, and every time alike."""
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", wave)
    arguments, options = setting(*shape, loss=loss, precision=precision)
    assert_equal_to_the_oracle(arguments, options, again=50)


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "apart"])
@pytest.mark.parametrize("wave", [0, 132], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("loss", "outputs"),
    [("squared", 1), ("squared", 17), ("cross_entropy", 10), ("cross_entropy", 32), ("outputs", 16)],
)
@pytest.mark.parametrize(
    ("shape", "cell"),
    [((6, 3, 32, 512), "tanh"), ((1, 2, 130, 1030), "relu"), ((5, 3, 5, 300), "gru"), ((4, 2, 128, 200), "lstm")],
    ids=str,
)
def test_outputs_of_the_step_before(shape, cell, loss, outputs, precision, wave, joined, monkeypatch):
    """Measured by the step behind, or by a launch of its own; the last step, and every time alike."""
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", wave)
    for name in ("JOINED_OUTPUTS", "JOINED_GATED_OUTPUTS"):
        monkeypatch.setattr(tiles, name, 32 if joined else 0)
    arguments, options = setting(*shape, outputs, cell, loss, precision=precision, noise="gaussian")
    assert_equal_to_the_oracle(arguments, options, again=10)
