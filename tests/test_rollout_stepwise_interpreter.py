"""Variants of the stepwise step kernel in Triton's interpreter: float32 against the torch reference in float64."""

from dataclasses import replace

import pytest
import torch
from test_rollout_interpreter import OFFSET, SEED, assert_close, narrow, oracle, problem, run
from tolerances import TOLERANCES, relative_error

from anpgpu.kernels.loss import loss_of_steps
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


@pytest.mark.parametrize(
    ("variant", "joined"),
    [(variant, True) for variant in VARIANTS] + [("pointers-early", False), ("descriptors", False)],
)
@pytest.mark.parametrize(
    ("kind", "outputs", "rollouts", "samples"),
    [
        ("squared", 1, 32, 1), ("cross_entropy", 10, 32, 1), ("outputs", 16, 8, 4), ("squared", 17, 40, 1),
        ("cross_entropy", 17, 16, 2), ("squared", 10, 5, 0), ("outputs", 1, 40, 0), ("cross_entropy", 16, 5, 0),
    ],
    ids=str,
)  # fmt: skip
def test_outputs_of_the_step_before(in_tiles, variant, joined, kind, outputs, rollouts, samples):
    """Measured by the programs of the last units, or by a launch behind every step; the last step by one anyway."""
    samples = 1 if VARIANTS[variant].get("described") and not samples else samples
    in_tiles(
        **VARIANTS[variant], block_rows=32, block_units=64, block_inner=32, samples=samples,
        joined=joined, block_outputs=16 * -(-outputs // 16),
    )  # fmt: skip
    noise = "gaussian" if rollouts == 16 else "rademacher"
    options = RolloutOptions(rollouts, sigma=1e-2, noise=noise, store_delta_a=kind == "outputs")
    arguments = problem((3, 2, 70, outputs, rollouts), kind, start=kind != "squared")
    assert_close(run("stepwise", arguments, options), oracle(arguments, options))


JOINED = [pytest.param(True, id="joined"), pytest.param(False, id="apart")]


@pytest.mark.parametrize(("outputs", "joined"), [(1, True), (32, True), (33, False)])
def test_wide_readouts_are_measured_apart(outputs, joined, monkeypatch):
    """And so is a state that is the output itself."""
    made, choose = [], rollout_triton.rollout_launch
    monkeypatch.setattr(rollout_triton, "rollout_launch", lambda **named: made.append(choose(**named)) or made[-1])
    options = RolloutOptions(32, sigma=1e-2)
    for readout in (True, False):
        arguments = problem((3, 2, 37, outputs, 32), "squared", readout)
        assert_close(run("stepwise", arguments, options), oracle(arguments, options))
    assert [launch.joined for launch in made] == [joined, False]


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
def test_losses_of_samples_of_any_length(in_tiles, kind, joined):
    """As with lengths, or targets for the whole sequence: most steps have no loss, whatever their signal holds."""
    time, batch, rollouts = 5, 3, 32
    arguments = problem((time, batch, 37, 10, rollouts), kind)
    loss = arguments[3]
    for sample, length in enumerate((5, 2, 3)):
        loss.weight[:, sample] = 0
        loss.weight[length - 1, sample] = 1.0
        (loss.error if kind == "squared" else loss.probs)[length:, sample] = float("nan")
    in_tiles(joined=joined)
    options = RolloutOptions(rollouts, sigma=1e-2)
    result = run("stepwise", arguments, options)
    assert_close(result, oracle(arguments, options))
    assert (result.delta_loss != 0).any(-1).sum() == batch


@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("kind", ["squared", "cross_entropy", "outputs"])
def test_losses_of_outputs_do_not_depend_on_segments(in_tiles, kind, joined):
    """The last step of a segment is measured within it, and its first step measures nothing of the segment before."""
    in_tiles(joined=joined)
    preact, hidden, weight, loss, start = map(narrow, problem((5, 2, 37, 10, 32), kind))
    options = RolloutOptions(32, sigma=1e-2)
    whole = rollout_triton.rollout_in_form("stepwise", preact, hidden, weight, loss, SEED, options, OFFSET, start)
    parts, state = [], start
    for steps in (slice(0, 1), slice(1, 4), slice(4, 5)):
        counters = OFFSET._replace(time=OFFSET.time + steps.start)
        part = rollout_triton.rollout_in_form(
            "stepwise", preact[steps], hidden[steps], weight, loss_of_steps(loss, steps), SEED, options, counters, state
        )
        parts.append(part.delta_o if kind == "outputs" else part.delta_loss)
        state = part.delta_h
    expected = whole.delta_o if kind == "outputs" else whole.delta_loss
    assert relative_error(torch.cat(parts), expected) <= TOLERANCES["float32"].bound
    assert relative_error(state, whole.delta_h) <= TOLERANCES["float32"].bound


@pytest.mark.parametrize(("kind", "noise"), [("squared", "rademacher"), ("none", "gaussian"), ("linear", "gaussian")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_with_other_losses_and_noise(in_tiles, variant, kind, noise):
    """The states that descriptors wrote are read by pointers where the last step's loss is measured."""
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
