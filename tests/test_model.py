"""The cost model of profiling/ is held to every update and every tile that was measured, by bands that are narrow."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results"
KERNELS = (RESULTS / "kernels-h200-2026-11-26.txt").read_text()
ROWS = json.loads((ROOT / "tests" / "compiled.json").read_text())["rows"]
MULTIPROCESSORS = 132


@pytest.fixture
def script(monkeypatch):
    """Import a script of profiling/ by name."""
    monkeypatch.syspath_prepend(ROOT / "profiling")
    return importlib.import_module


@pytest.fixture
def model(script):
    return script("model")


@pytest.fixture
def record(model):
    """All updates measured at commit 4b6f516."""
    records = [model.read_record(RESULTS / f"{name}-h200-2026-11-26.txt") for name in ("kernels", "peers")]
    return {**records[0], "results": [row for one in records for row in one["results"]]}


def times(pattern):
    """Return {sizes: time} of the lines of the result file that match `pattern`, whose groups are sizes and a time."""
    found = re.findall(f"^{pattern}$", KERNELS, re.MULTILINE)
    return {tuple(map(int, sizes)): float(time) for *sizes, time in found}


def test_the_band_holds_every_update_that_was_measured(model, record):
    assert model.BAND <= 1.3
    compared = model.check(record, ROWS)
    assert len(compared) == 2 * (11 + 5)
    assert [row for row in compared if row["within"] != "yes"] == []


@pytest.mark.parametrize("part", ["rollouts", "adjoint", "clean", "weights", "rest", "host"])
def test_without_one_of_its_parts_the_model_leaves_the_band(model, record, monkeypatch, part):
    """Losses are a tenth of an update: see the test of single kernels."""
    whole = model.estimate
    monkeypatch.setattr(model, "estimate", lambda *given, **named: whole(*given, **named)._replace(**{part: 0.0}))
    assert any(row["within"] == "NO" for row in model.check(record, ROWS))


VARIANTS = {
    ("stepwise", 128, 128, 8, None, False): "lib 128x128 w8 s3",
    ("stepwise", 128, 256, 8, None, False): "lib 128x256 w8 s3",
    ("stepwise", 128, 128, 8, None, True): "ptr 128x128 w8 s3 early",
    ("stepwise", 64, 256, 4, None, True): r"tma\+st 64x256 w4 s2 early pdl",
    ("stepwise", 128, 128, 4, None, False): r"tma\+st 128x128 w4 s3 sub2 pdl",
}
"""How the result file calls the tiles of the stepwise form."""


def waves(rows, units, key, tile):
    """Return the waves of programs of one step, by hand: whole tiles, whole waves."""
    _, block_rows, block_units, *_ = key
    return -(-rows // block_rows * (units // block_units) // (MULTIPROCESSORS * tile.programs))


def test_the_band_holds_every_tile_that_was_measured(model):
    for key, tile in model.TILES.items():
        form, rows, units, warps, registers, _ = key
        if form == "stepwise":
            measured = times(rf"kind=step variant={VARIANTS[key]} rows=(\d+) H=(\d+) us=([\d.]+)")
            assert len(measured) == 9
        else:
            bound = registers or "none"
            measured = times(rf"kind=tile tile={rows}/{warps}/{bound} rows=(\d+) H=({units}) us=([\d.]+)")
            assert len(measured) == 3
        for (count, hidden), microseconds in measured.items():
            modelled = waves(count, hidden, key, tile) * (tile.epilogue + tile.product * hidden)
            assert 1 / model.BAND <= microseconds / modelled <= model.BAND, (key, count, hidden)


def test_kernels_that_read_once_take_what_the_model_says(model, script):
    """In a profile of eager updates; within the band, or a tenth of a millisecond off."""
    for kernel, part in (("measure_kernel", "losses"), ("_activity_sum_kernel", "adjoint")):
        measured = times(rf"kind=kernel kernel={kernel} T=(\d+) B=(\d+) P=(\d+) H=(\d+) ms=([\d.]+)")
        assert len(measured) >= 2
        for sizes, milliseconds in measured.items():
            case = script("cases").Case(*sizes)
            modelled = 1e3 * getattr(model.estimate(model.GPUS["H200"], case, model.first_launch(case)), part)
            within = 1 / model.BAND <= milliseconds / modelled <= model.BAND
            assert within or abs(milliseconds - modelled) < 0.1, (kernel, sizes)


def test_an_update_by_hand(model, script):
    case = script("cases").Case(100, 128, 128, 512)
    found = model.estimate(model.GPUS["H200"], case, model.first_launch(case))
    # 16,384 rows of 512 units in tiles of 128 x 256: 256 tiles, two waves on 132 multiprocessors; 100 steps.
    assert found.rollouts == pytest.approx(100 * 2 * (10 + 0.0124 * 512) * 1e-6)
    state = 2 * 16384 * 512 / (4.8e12 * 0.67)
    assert found.losses == pytest.approx(100 * (3e-6 + state))
    assert found.adjoint == pytest.approx(100 * state)
    assert found.clean == pytest.approx(100 * (5.5 + 5.4 / 4) * 1e-6)
    assert found.weights == pytest.approx(100 * 128 * 512 * 0.18e-9)
    assert found.rest == pytest.approx(250e-6 + 100 * 16384 * 0.18e-9)
    assert found.graph == pytest.approx(sum(found) - found.host)
    # 9.2 ms of the host, against 1.5 ms and the device's 7.
    assert found.host == pytest.approx(3.4e-3 + 100 * 58e-6)
    assert found.eager == pytest.approx(max(found.host, 1.5e-3 + found.graph))


def test_a_narrow_readout_is_read_once(model, script):
    launches = {
        outputs: model.launch_of(script("cases").Case(100, 128, 128, 512, 10, outputs), 90) for outputs in (10, 99)
    }
    assert {outputs: launch.joined for outputs, launch in launches.items()} == {10: True, 99: False}
    case, gpu = script("cases").Case(100, 128, 128, 512), model.GPUS["H200"]
    once, every = (model.estimate(gpu, case, launch).losses for launch in launches.values())
    assert every == pytest.approx(100 * once)
    assert once == pytest.approx(3e-6 + 2 * 16384 * 512 / (4.8e12 * 0.67))


def test_a_resident_update_by_hand(model, script):
    case = script("cases").Case(64, 16, 1024, 128)
    found = model.estimate(model.GPUS["H200"], case, model.first_launch(case))
    # 256 tiles of 64 rows, two on a multiprocessor: one wave.
    assert (found.rollouts, found.losses) == (pytest.approx(64 * 3e-6), 0)
    assert found.clean == pytest.approx(64 * 128 * 7e-9)


def test_units_by_hand(model, script):
    case = script("cases").Case(100, 128, 128, 512)
    launch = model.launch_of(case, 80)
    assert (launch.block_rows, launch.block_units, launch.block_inner) == (128, 128, 32)
    rows = {
        "sm_80:resident-128-bf16": {"issued": 20.0, "special": 2.0},
        "sm_80:step-512-bf16": {"issued": 1.0, "special": 0.0},
    }
    found = model.bounds(model.GPUS["A100"], case, rows)
    clocks = 100 * 16384 * 512 / 108 / 1.41e9
    assert found.tensor == pytest.approx(clocks * 1024 / (2048 * 0.79))
    assert found.special == pytest.approx(clocks * 2.0 / 16)
    # Sixteen blocks of 32 units in the product, and the resident kernel's step as the epilogue.
    assert found.issue == pytest.approx(clocks * (20 + 16 * 1.0) / 128)
    assert found.store == pytest.approx(2 * 100 * 16384 * 512 / (2.04e12 * 0.67))
    assert found.binds == "tensor"


def test_other_gpus_are_scaled_by_their_slowest_unit(model, script):
    case = script("cases").Case(100, 128, 128, 2048)
    known, other = (model.estimated(name, case, ROWS) for name in ("H200", "A100"))
    needs = [max(model.bounds(model.GPUS[name], case, ROWS)) for name in ("H200", "A100")]
    assert other.rollouts / known.rollouts == pytest.approx(needs[1] / needs[0])
    assert other.adjoint / known.adjoint == pytest.approx(4.8 / 2.04)
    assert other.clean == known.clean


def test_several_gpus_share_rollouts_but_not_the_clean_run(model, script):
    case = script("cases").Case(100, 128, 128, 2048)
    single, eight = (model.estimated("H200", case, ROWS, gpus=count) for count in (1, 8))
    gradients = 4 * (2048**2 + 2048 * 11)
    assert eight.clean == single.clean
    assert eight.adjoint == pytest.approx(single.adjoint / 8)
    reduced = 20e-6 + 2 * 7 / 8 * gradients / 450e9
    assert eight.rest - single.rest == pytest.approx(reduced - 7 / 8 * 100 * 16384 * 0.18e-9)
    assert 1 < single.graph / eight.graph < 8


def test_there_is_a_row_for_every_gpu_and_it_says_what_it_is(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model.py"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("A model, not a measurement. ")
    assert all(name in printed for name in ("A100", "H100", "H200", "B200", "4090", "8 GPUs"))


def test_a_tile_that_was_not_measured_raises(model, script):
    case = script("cases").Case(100, 128, 128, 512)
    with pytest.raises(ValueError, match=r"no tile \('stepwise', 16, 256, 8, None, False\)"):
        model.wave_of(replace(model.first_launch(case), block_rows=16))


def test_a_measurement_is_compared(model):
    row = {"T": 100, "B": 128, "P": 128, "H": 512, "peer": "ours, CUDA graph", "ms": 7.0}
    other = {**row, "peer": "eager torch", "ms": 9.0}
    record = {"machine": {"gpu": {"name": "NVIDIA H200"}, "commit": "4b6f516"}, "results": [row, other]}
    (comparison,) = model.check(record, ROWS)
    assert comparison["GPU"] == "H200"
    assert comparison["measured / model"] == pytest.approx(7.0 / comparison["model"])
    assert comparison["within"] == "yes"
    (slow,) = model.check({**record, "results": [{**row, "ms": 23.0}]}, ROWS)
    assert slow["within"] == "NO"
    with pytest.raises(ValueError, match="measured on a CPU"):
        model.check({"machine": {"gpu": None}, "results": [row]}, ROWS)
    with pytest.raises(ValueError, match=r"'NVIDIA T4': the model has A100"):
        model.check({"machine": {"gpu": {"name": "NVIDIA T4"}}, "results": [row]}, ROWS)
    with pytest.raises(ValueError, match="no update of ours"):
        model.check({**record, "results": [other]}, ROWS)
