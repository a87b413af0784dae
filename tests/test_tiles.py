"""Launch configurations: pure functions, no device."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from anpgpu.kernels import tiles, tiles_measured
from anpgpu.kernels.tiles import rollout_launch, shared_limit
from anpgpu.kernels.tiles_measured import ceil_div, next_power_of_two

KERNELS = (Path(__file__).resolve().parent.parent / "profiling" / "results" / "kernels-h200-2026-11-26.txt").read_text()
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
    precision=st.sampled_from(sorted(tiles_measured.OPERAND_BYTES)),
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
        filled = chosen.samples * min(next_power_of_two(named["rollouts"]), chosen.block_rows)
        assert filled in {0, chosen.block_rows}
        assert chosen.samples or named["rollouts"] < chosen.block_rows
        assert not chosen.described or (named["arch"] // 10 == 9 and chosen.samples and named["units"] >= 64)
        assert not chosen.described or chosen.measuring == (128, 8)


@pytest.mark.parametrize(
    ("outputs", "shared"),
    [(0, 2 * (128 * 128 + 64 * 128) + 1024), (60, 2 * (128 * 128 + 64 * 128 + 64 * 128) + 1024)],
)
def test_shared_memory_holds_both_matrices_and_a_tile_of_states(outputs, shared):
    """By hand: 16-bit W_hh, W_o padded to 64 rows, and 64 rows of states."""
    assert launch(has_readout=bool(outputs), outputs=outputs).shared_bytes == shared


@pytest.mark.parametrize(
    ("batch", "rollouts", "rows", "samples"),
    [(1024, 32, 128, 4), (1024, 48, 128, 2), (1024, 3, 64, 16), (1, 32, 64, 2), (256, 130, 64, 1), (256, 128, 128, 1)],
)
def test_tiles_are_filled_from_several_samples(batch, rollouts, rows, samples):
    chosen = launch(units=256, batch=batch, rollouts=rollouts)
    assert (chosen.block_rows, chosen.samples) == (rows, samples)


def measured(kind):
    """Return {(H, rows): {tile: microseconds}} of the lines of a kind of the result file of the H200."""
    found = {}
    for tile, rows, units, time in re.findall(
        rf"^kind={kind}=(.+) rows=(\d+) H=(\d+) us=([\d.]+)$", KERNELS, re.MULTILINE
    ):
        found.setdefault((int(units), int(rows)), {})[tile] = float(time)
    return found


@pytest.mark.parametrize(("units", "rows"), list(itertools.product((64, 128, 256), (4096, 16384, 65536))))
def test_a_resident_tile_is_the_fastest_that_was_measured(units, rows):
    chosen = launch(units=units, batch=16, rollouts=rows // 16)
    tiles_measured = measured("tile tile")[units, rows]
    assert f"{chosen.block_rows}/{chosen.warps}/{chosen.registers or 'none'}" == min(
        tiles_measured, key=tiles_measured.get
    )


def name_of_variant(chosen):
    """Return what the result file calls a stepwise tile."""
    kind = "tma+st" if chosen.described else "ptr"
    parts = {1: "", 2: " sub2"}[chosen.parts]
    flags = f"{' early' if chosen.early else ''}{parts}{' pdl' if chosen.dependent else ''}"
    return f"{kind} {chosen.block_rows}x{chosen.block_units} w{chosen.warps} s{chosen.stages}{flags}"


@pytest.mark.parametrize(("units", "rows"), list(itertools.product((512, 1024, 2048), (4096, 16384, 65536))))
def test_a_stepwise_tile_is_near_the_fastest_that_was_measured(units, rows):
    """Within 3 %: what is faster by less is persistent, or has one more kind of tile."""
    batch = 16 if rows >= 16384 else 4
    chosen = launch(units=units, batch=batch, rollouts=rows // batch)
    variants = {name: time for name, time in measured("step variant")[units, rows].items() if "cuBLAS" not in name}
    assert len(variants) > 30
    assert variants[name_of_variant(chosen)] <= 1.03 * min(variants.values())
    assert variants[name_of_variant(chosen)] <= 0.86 * variants["lib 128x256 w8 s3"]


@pytest.mark.parametrize(
    ("changes", "tile", "reason"),
    [
        ({"units": 512}, (64, 256, 1, True), "by descriptors"),
        ({"units": 768}, (64, 256, 1, True), "by descriptors"),
        ({"units": 769}, (128, 128, 1, True), "by descriptors"),
        ({"batch": 1024, "rollouts": 32}, (64, 256, 2, True), "by descriptors"),
        ({"batch": 1024, "rollouts": 16, "units": 1000}, (128, 128, 8, True), "by descriptors"),
        ({"rollouts": 48}, (64, 256, 1, True), "by descriptors"),
        ({"rollouts": 47}, (128, 128, 0, False), "47 rollouts of a sample do not fill 64 rows"),
        ({"rollouts": 5}, (128, 128, 0, False), "5 rollouts of a sample do not fill 64 rows"),
        ({"rollouts": 70, "units": 1000}, (128, 128, 0, False), "70 rollouts of a sample do not fill 128 rows"),
        ({"rollouts": 100, "units": 1000}, (128, 128, 1, True), "by descriptors"),
        ({"batch": 33, "rollouts": 128}, (128, 128, 1, False), "they are few"),
        ({"batch": 34, "rollouts": 128}, (64, 256, 1, True), "by descriptors"),
        ({"batch": 132, "rollouts": 32}, (128, 128, 4, False), "they are few"),
        ({"batch": 1, "rollouts": 3}, (128, 128, 0, False), "3 rollouts of a sample do not fill 64 rows"),
        ({"units": 63, "form": "stepwise"}, (128, 128, 1, False), "rows of 63 units are not aligned"),
        ({"precision": "fp16"}, (64, 256, 1, True), "by descriptors"),
        ({"precision": "tf32"}, (128, 128, 1, False), "512 hidden units are more than 256"),
        ({"arch": 100}, (128, 256, 1, False), "512 hidden units are more than 256"),
        ({"arch": 80}, (128, 128, 1, False), "512 hidden units are more than 256"),
    ],
    ids=str,
)
def test_stepwise_tiles(changes, tile, reason):
    """By descriptors on Hopper alone, with 16-bit operands, where rollouts fill the tiles."""
    chosen = launch(**{"units": 512, **changes})
    assert (chosen.block_rows, chosen.block_units, chosen.samples, chosen.described) == tile
    assert chosen.reason.endswith(reason) or (reason in chosen.reason and not chosen.described)
    assert chosen.dependent == chosen.described


@pytest.mark.parametrize(
    ("changes", "joined", "block"),
    [
        ({"outputs": 1}, True, 16),
        ({"outputs": 17}, True, 32),
        ({"outputs": 32}, True, 32),
        ({"outputs": 33}, False, 64),
        ({"outputs": 10, "returns_outputs": True}, True, 16),
        ({"outputs": 0}, False, 0),
        ({"outputs": 512, "has_readout": False}, False, 64),
        ({"outputs": 16, "gates": 3}, True, 16),
        ({"outputs": 17, "gates": 4}, False, 32),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", ARCHES)
def test_narrow_readouts_are_measured_by_the_step_behind(changes, joined, block, arch):
    """A step holds all outputs in one tile."""
    chosen = launch(**{"units": 512, "has_readout": True, "arch": arch, "form": "stepwise", **changes})
    assert (chosen.joined, chosen.block_outputs) == (joined, block)
    assert not launch(**{"units": 64, "has_readout": True, "arch": 90, **changes, "gates": 1}).joined


@pytest.mark.parametrize(
    ("changes", "programs"), [({"units": 512}, 2), ({"units": 1024}, 2), ({"batch": 1}, 2)], ids=str
)
def test_a_joined_readout_leaves_as_many_programs_on_a_multiprocessor(changes, programs):
    """By hand: on Hopper, whose multiprocessors have 228 KB, 1 KB of each program's the driver's."""
    named = {"units": 512, "outputs": tiles_measured.JOINED_OUTPUTS, **changes}
    alone, joined = (launch(**named, has_readout=readout) for readout in (False, True))
    assert joined.joined
    assert joined.shared_bytes - alone.shared_bytes == 2 * joined.stages * 32 * 64
    assert [228 * 1024 // (chosen.shared_bytes + 1024) for chosen in (alone, joined)] == [2, 2]


def test_a_readout_for_which_there_is_no_shared_memory_is_measured_apart():
    """By hand: three stages of 32 units in 4 bytes, 256 rows and 16 outputs, are 102 KB; such a GPU has 99."""
    for arch, joined in ((90, True), (89, False)):
        named = {"units": 512, "outputs": 10, "has_readout": True, "precision": "tf32", "arch": arch}
        assert launch(**named).joined == joined


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({"units": 60}, (64, 4, 128)),
        ({"units": 64, "outputs": 64}, (64, 4, None)),
        ({"units": 64, "outputs": 64, "has_readout": True}, (64, 4, 128)),
        ({"units": 32}, (64, 4, None)),
        ({"outputs": 10, "has_readout": True, "returns_outputs": True}, (64, 4, None)),
        ({"units": 128, "precision": "fp16"}, (64, 4, 168)),
        ({"units": 128, "precision": "tf32"}, (128, 8, None)),
        ({"units": 128, "arch": 100}, (128, 8, None)),
        ({"units": 128, "arch": 80}, (64, 4, None)),
        ({"units": 256, "arch": 80}, (64, 8, None)),
        ({"units": 64, "precision": "fp32"}, (32, 4, None)),
        ({"units": 256, "batch": 33, "rollouts": 256}, (64, 4, None)),
        ({"units": 256, "batch": 34, "rollouts": 256}, (128, 8, None)),
    ],
    ids=str,
)
def test_resident_tiles(changes, tile):
    """What was measured serves 16-bit operands on Hopper; elsewhere, and in tf32, tiles are as wide as rows allow."""
    chosen = launch(**changes, **({} if changes.get("arch", 90) == 90 else {"form": "resident"}))
    assert (chosen.block_rows, chosen.warps, chosen.registers) == tile


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
    for arch, precision in itertools.product(ARCHES, tiles_measured.OPERAND_BYTES):
        assert launch(arch=arch, precision=precision) == launch(arch=arch, precision=precision)


@pytest.mark.parametrize(("units", "stride"), [(1, 1), (63, 63), (64, 64), (65, 80), (1000, 1008)])
def test_rows_of_delta_a_are_padded_where_they_are_long(units, stride):
    assert tiles.delta_a_stride(units) == stride


@pytest.mark.parametrize(("count", "size", "quotient"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2)])
def test_ceil_div(count, size, quotient):
    assert ceil_div(count, size) == quotient


def test_steps_at_a_time_are_as_many_as_have_room_and_at_least_one():
    assert tiles.fused_steps(3, 2, 64) == tiles.STORED_BYTES // (8 * 3 * 2 * 64)
    assert tiles.fused_steps(10**4, 10**4, 10**4) == 1
