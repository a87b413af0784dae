"""Variants of the stepwise step kernel in Triton's interpreter: float32 against the torch reference in float64."""

from dataclasses import replace

import pytest
import torch
from test_rollout_interpreter import OFFSET, assert_close, oracle, problem, run
from tolerances import TOLERANCES

from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import INTERPRETED

rollout_triton = pytest.importorskip("anpgpu.kernels.rollout_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

VARIANTS = {
    "pointers-early": {"early": True},
    "pointers-halves": {"parts": 2},
    "descriptors": {"described": True},
    "descriptors-early": {"described": True, "early": True},
    "descriptors-halves": {"described": True, "parts": 2},
}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def in_tiles(monkeypatch):
    """Return a function that makes launches take other tiles, and the launches that were made."""
    choose = rollout_triton.rollout_launch

    def change(**changes):
        made = []

        def other(**named):
            made.append(replace(choose(**named), **changes))
            return made[-1]

        monkeypatch.setattr(rollout_triton, "rollout_launch", other)
        return made

    return change


# Rollouts of a sample, rows of a tile, samples of it.
WHOLE, CLIPPED, FEW = (32, 32, 1), (48, 32, 1), (5, 16, 1)
SEVERAL, MANY = (32, 64, 2), (8, 32, 4)  # the last tile goes beyond the batch
LOOSE, LOOSE_FEW = (48, 32, 0), (5, 16, 0)  # rows as they come


@pytest.mark.parametrize(
    ("variant", "place"),
    [
        *(("pointers-early", place) for place in (CLIPPED, MANY, LOOSE, LOOSE_FEW)),
        *(("pointers-halves", place) for place in (FEW, SEVERAL, LOOSE_FEW)),
        *(("descriptors", place) for place in (CLIPPED, MANY)),
        *(("descriptors-early", place) for place in (WHOLE, CLIPPED, FEW, SEVERAL, MANY)),
        *(("descriptors-halves", place) for place in (CLIPPED, SEVERAL, MANY)),
    ],
    ids=str,
)
def test_every_variant_equals_the_reference(in_tiles, variant, place):
    """70 units: more than a tile of them, no multiple of 16."""
    rollouts, rows, samples = place
    sizes = (2, 3, 70, 2, rollouts)
    made = in_tiles(**VARIANTS[variant], block_rows=rows, block_units=64, block_inner=32, samples=samples)
    options = RolloutOptions(rollouts, sigma=1e-2, store_delta_a=True)
    arguments = problem(sizes)
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))
    assert len(made) == 1


@pytest.mark.parametrize(("kind", "noise"), [("squared", "rademacher"), ("none", "gaussian"), ("linear", "gaussian")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_with_other_losses_and_noise(in_tiles, variant, kind, noise):
    """With a loss of the outputs the states that descriptors wrote are read by pointers."""
    sizes = (2, 3, 65, 3, 16)
    in_tiles(**VARIANTS[variant], block_rows=32, block_units=64, block_inner=32, samples=2)
    options = RolloutOptions(16, sigma=1e-2, noise=noise, store_delta_a=kind == "none")
    arguments = problem(sizes, kind, start=kind != "linear")
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_with_scaled_operands(in_tiles, variant):
    """As with fp16, whose operands the interpreter rounds."""
    sizes = (2, 2, 65, 3, 24)
    in_tiles(**VARIANTS[variant], block_rows=16, block_units=64, block_inner=32, samples=1)
    options = RolloutOptions(24, sigma=1e-3, precision="fp16")
    arguments = problem(sizes, sigma=1e-3)
    assert_close(run("stepwise", arguments, options), oracle(arguments, options), TOLERANCES["bf16_adjoint"].bound)


def test_tiles_write_no_rollout_of_the_next_sample(in_tiles):
    """A tile that clips leaves what lies behind it as it is, though it computes there what is not finite."""
    sizes = (2, 3, 70, 2, 5)
    preact, hidden, weight, loss, start = problem(sizes)
    start[1] = float("nan")
    in_tiles(described=True, early=True, block_rows=16, block_units=64, block_inner=16, samples=1)
    result = run("stepwise", (preact, hidden, weight, loss, start), RolloutOptions(5, 1e-2, store_delta_a=True), OFFSET)
    for part in (result.delta_loss.movedim(0, 2), result.delta_h, result.delta_a.movedim(0, 2)):
        assert part[1].isnan().all()
        assert part[::2].isfinite().all()
