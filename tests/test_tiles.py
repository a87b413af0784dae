"""Launch configurations: pure functions, no device."""

import itertools

import pytest
from hypothesis import given, strategies as st

from anpgpu.kernels import tiles
from anpgpu.kernels.tiles import next_power_of_two, rollout_launch, shared_limit

ARCHES = (80, 86, 89, 90, 100, 120)


def launch(**changes):
    named = {
        "units": 128,
        "outputs": 0,
        "has_readout": False,
        "returns_outputs": False,
        "batch": 64,
        "rollouts": 1024,
        "precision": "bf16",
        "arch": 90,
    }
    return rollout_launch(**{**named, **changes})


@pytest.mark.parametrize(
    ("count", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (255, 256), (256, 256), (257, 512)]
)
def test_next_power_of_two(count, power):
    assert next_power_of_two(count) == power


def test_shared_limit_of_an_unknown_architecture_is_the_nearest_below():
    assert shared_limit(90) == 232448
    assert shared_limit(103) == shared_limit(100)
    assert shared_limit(75) == shared_limit(86)


@pytest.mark.parametrize("units", [1, 17, 64, 128, 250, 256])
def test_small_networks_are_resident_on_hopper(units):
    chosen = launch(units=units)
    assert chosen.form == "resident"
    assert chosen.block_units >= max(units, 16)
    assert "fits" in chosen.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"units": 257}, "257 hidden units"),
        ({"has_readout": True, "outputs": 1000}, "1000 outputs"),
        ({"returns_outputs": True, "units": 65, "outputs": 65}, "65 outputs"),
        ({"units": 256, "precision": "tf32"}, "shared memory"),
        ({"units": 256, "arch": 89}, "shared memory"),
        ({"gates": 3, "outputs": 10, "has_readout": True}, "losses of the outputs of a cell of 3 gates"),
        ({"gates": 4, "units": 129}, "129 units of 4 gates are more than 128"),
        ({"gates": 4, "precision": "tf32"}, "shared memory"),
        ({"gates": 3, "arch": 89}, "shared memory"),
        ({"gates": 4, "arch": 100}, "does not serve 4 resident gates on compute capability 100"),
    ],
)
def test_what_cannot_be_resident_goes_stepwise_and_says_why(changes, reason):
    chosen = launch(**changes)
    assert chosen.form == "stepwise"
    assert reason in chosen.reason
    with pytest.raises(ValueError, match=reason):
        launch(**changes, form="resident")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": 80}, "made for compute capability 90, not 80"),
        ({"precision": "tf32", "units": 64}, "operands of 4 bytes"),
        ({"wide": True}, "exact differences of 3 gates of 128 units"),
    ],
)
def test_what_a_gated_cell_could_run_resident_but_slowly(changes, reason):
    named = {"gates": 3, **changes}
    assert reason in launch(**named).reason
    assert launch(**named).form == "stepwise"
    assert launch(**named, form="resident").form == "resident"


@pytest.mark.parametrize("gates", [3, 4])
@pytest.mark.parametrize("units", [1, 17, 64, 100, 128])
def test_small_gated_cells_are_resident_on_hopper(units, gates):
    """By hand: 16-bit W_hh of every gate, padded, and 64 rows of states."""
    chosen = launch(units=units, gates=gates, rollouts=48)
    block = max(16, next_power_of_two(units))
    assert (chosen.form, chosen.block_rows, chosen.block_units, chosen.samples) == ("resident", 64, block, 1)
    assert chosen.shared_bytes == 2 * (gates * block * block + 64 * block) + 1024
    assert launch(units=units, gates=gates, rollouts=5).samples == 8


def test_a_form_can_be_asked_for():
    assert launch(form="stepwise").form == "stepwise"
    assert launch(units=256, arch=80, form="resident").form == "resident"
    with pytest.raises(ValueError, match="'neither'"):
        launch(form="neither")


@pytest.mark.parametrize(
    ("changes", "units"),
    [({}, 64), ({"rollouts": 127}, 32), ({"wide": True}, 32), ({"arch": 80}, 32), ({"gates": 3, "wide": True}, 64)],
)
def test_a_gated_cell_has_units_for_whose_gates_there_are_registers(changes, units):
    chosen = launch(units=512, **{"gates": 4, **changes})
    assert (chosen.block_rows, chosen.block_units) == (128, units)
    size = 2 * chosen.stages * chosen.block_inner
    assert chosen.shared_bytes == size * (128 + changes.get("gates", 4) * units)


@given(
    units=st.integers(1, 5000),
    outputs=st.integers(0, 5000),
    has_readout=st.booleans(),
    returns_outputs=st.booleans(),
    batch=st.integers(1, 10**5),
    rollouts=st.integers(1, 10**6),
    precision=st.sampled_from(sorted(tiles.OPERAND_BYTES)),
    arch=st.sampled_from(ARCHES),
    gates=st.sampled_from([1, 3, 4]),
    wide=st.booleans(),
)
def test_every_shape_has_a_launch_that_fits(**named):
    chosen = rollout_launch(**named)
    assert chosen.form == "stepwise" or named["gates"] == 1 or not named["outputs"]
    assert chosen.shared_bytes <= shared_limit(named["arch"])
    assert chosen.reason
    for size in (chosen.block_rows, chosen.block_units):
        assert size >= 16
        assert size == next_power_of_two(size)
    if chosen.form == "resident":
        assert chosen.block_units >= named["units"]
        assert not named["has_readout"] or chosen.block_outputs >= named["outputs"]
        assert chosen.samples * min(next_power_of_two(named["rollouts"]), chosen.block_rows) == chosen.block_rows
    else:
        assert chosen.samples == int(named["rollouts"] >= chosen.block_rows)


@pytest.mark.parametrize(
    ("outputs", "shared"),
    [(0, 2 * (128 * 128 + 128 * 128) + 1024), (60, 2 * (128 * 128 + 64 * 128 + 128 * 128) + 1024)],
)
def test_shared_memory_holds_both_matrices_and_a_tile_of_states(outputs, shared):
    """By hand: 16-bit W_hh, W_o padded to 64 rows, and 128 rows of states."""
    assert launch(has_readout=bool(outputs), outputs=outputs).shared_bytes == shared


@pytest.mark.parametrize(
    ("batch", "rollouts", "rows", "samples"),
    [(1024, 32, 128, 4), (1024, 48, 128, 2), (1024, 3, 64, 16), (1, 32, 64, 2), (256, 130, 64, 1), (256, 128, 128, 1)],
)
def test_tiles_are_filled_from_several_samples(batch, rollouts, rows, samples):
    chosen = launch(batch=batch, rollouts=rollouts)
    assert (chosen.block_rows, chosen.samples) == (rows, samples)


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"keeps": True}, True),
        ({"noise": "gaussian"}, True),
        ({"units": 64}, True),
        ({"units": 256}, True),
        ({"units": 256, "keeps": True}, False),
        ({"units": 256, "noise": "gaussian"}, False),
        ({"units": 100}, False),
        ({"units": 16}, False),
        ({"units": 512}, False),
        ({"rollouts": 32}, False),
        ({"precision": "tf32"}, True),
        ({"precision": "fp16"}, False),
        ({"precision": "fp32", "units": 64}, False),
        ({"arch": 80}, False),
        ({"arch": 100}, False),
    ],
    ids=str,
)
def test_two_rows_of_the_quotient_where_they_cost_neither_spills_nor_barriers(changed, taken):
    asked = {"units": 128, "precision": "bf16", "arch": 90, "noise": "rademacher", "keeps": False, **changed}
    chosen = launch(**{key: asked[key] for key in asked.keys() - {"noise", "keeps"}})
    asked.pop("rollouts", None)
    assert tiles.takes_quotient_rows(chosen, **asked) == taken


def test_the_choice_is_the_same_every_time():
    for arch, precision in itertools.product(ARCHES, tiles.OPERAND_BYTES):
        assert launch(arch=arch, precision=precision) == launch(arch=arch, precision=precision)


@pytest.mark.parametrize(("units", "stride"), [(1, 1), (63, 63), (64, 64), (65, 80), (1000, 1008)])
def test_rows_of_delta_a_are_padded_where_they_are_long(units, stride):
    assert tiles.delta_a_stride(units) == stride


@pytest.mark.parametrize(("count", "size", "quotient"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2)])
def test_ceil_div(count, size, quotient):
    assert tiles.ceil_div(count, size) == quotient


def test_steps_at_a_time_are_as_many_as_have_room_and_at_least_one():
    assert tiles.stored_steps(2, 8, 64) == tiles.STORED_BYTES // (4 * 2 * 8 * 64)
    assert tiles.fused_steps(3, 2, 64) == tiles.STORED_BYTES // (8 * 3 * 2 * 64)
    assert tiles.stored_steps(10**4, 10**4, 10**4) == tiles.fused_steps(10**4, 10**4, 10**4) == 1
