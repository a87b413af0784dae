"""The study's tasks and baselines are right, no test data leaks into training, and a stopped study resumes."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

import study  # noqa: E402  (found through the line above)
import study_report  # noqa: E402
from study_grid import FULL, METHODS, QUICK, TUNING_SEED, best_rate, key_of, plan, tasks, training  # noqa: E402


def some(batches, count):
    return list(itertools.islice(batches, count))


def test_copying_shows_symbols_then_a_cue_and_asks_for_them_again():
    task = tasks.copying(3, symbols=5, length=2)
    first, second = some(task.batches(0, 4), 2)
    assert first.inputs.shape == (7, 4, 7)
    shown = first.inputs.argmax(-1)
    assert (first.inputs.sum(-1) == 1).all()
    blank, cue = 5, 6
    assert (shown[:2] < 5).all()
    assert shown[2:].t().tolist() == [[blank, blank, cue, blank, blank]] * 4
    assert (first.targets[:5] == -100).all()
    assert torch.equal(first.targets[5:], shown[:2])
    # Batches are fresh for every update, repeat with the seed, and are not those of the test.
    assert not torch.equal(first.inputs, second.inputs)
    assert torch.equal(next(task.batches(0, 4)).inputs, first.inputs)
    assert not torch.equal(task.valid.inputs, task.test.inputs)
    assert task.baselines()["memoryless"].loss == pytest.approx(math.log(5))


def test_adding_marks_one_value_in_each_half_and_never_the_last():
    task = tasks.adding(9)
    batch = next(task.batches(0, 500))
    values, marks = batch.inputs.unbind(-1)
    assert (marks[:4].sum(0) == 1).all()
    assert (marks[4:8].sum(0) == 1).all()
    assert (marks[8] == 0).all()
    assert torch.allclose(batch.targets.squeeze(-1), (values * marks).sum(0))
    # The variance of a sum of two uniform values; 1000 test sequences leave a standard error of 3 %.
    assert task.baselines()["memoryless"].loss == pytest.approx(1 / 6, rel=0.12)


def ramp(length=400):
    """Return two columns whose values give their row; the second is predicted."""
    rows = np.arange(length, dtype=np.float64)
    return np.stack((-rows, 2 * rows), 1)


def test_forecast_targets_lie_ahead_and_within_their_part():
    series, ahead = ramp(), 7
    task = tasks.forecast("ramp", series, 1, ahead, steps=5, washout=3)
    mean, deviation = series[:280, 1].mean(), series[:280, 1].std()

    def rows(values):
        return ((values.double() * deviation + mean) / 2).round().long()

    windows = some(task.batches(0, 4), 40)
    for batch, (low, high) in (
        (task.valid, (280, 320)),
        (task.test, (320, 400)),
        *((window, (0, 280)) for window in windows),
    ):
        now, then = rows(batch.inputs[..., 1]), rows(batch.targets[..., 0])
        assert torch.equal(then, now + ahead)
        assert now.min() >= low
        assert then.max() < high
    # Windows continue each other, lane by lane, until the lanes end.
    assert not windows[0].continued
    assert not all(window.continued for window in windows[1:])
    for before, after in itertools.pairwise(windows):
        if after.continued:
            assert torch.equal(rows(after.inputs[0, :, 1]), rows(before.inputs[-1, :, 1]) + 1)


def test_scaling_is_fitted_on_the_training_part_alone():
    series = np.random.default_rng(0).normal(3.0, 5.0, (1000, 2))
    other = series.copy()
    other[700:] = 1e3
    task, changed = (tasks.forecast("noise", values, 0, 1, steps=5, washout=3) for values in (series, other))
    whole = torch.cat([batch.inputs for batch in some(task.batches(0, 1), 138)], 0)
    assert whole.mean().abs() < 0.02
    assert whole.std() == pytest.approx(1, abs=0.02)
    for left, right in zip(some(task.batches(3, 4), 50), some(changed.batches(3, 4), 50), strict=True):
        assert torch.equal(left.inputs, right.inputs)
        assert torch.equal(left.targets, right.targets)
    assert changed.test.inputs.min() > 100


def test_lagged_inputs_end_at_the_present():
    inputs = torch.arange(5.0).view(5, 1, 1) + torch.tensor([[0.0], [10.0]])
    assert tasks.lagged(inputs, 2).tolist() == [
        [0, 1, 2], [10, 11, 12], [1, 2, 3], [11, 12, 13], [2, 3, 4], [12, 13, 14],
    ]  # fmt: skip


def test_baselines_of_a_series_that_only_lags_predict():
    # A sine is a linear function of two of its values; its present value alone leaves two possibilities.
    scores = tasks.forecast("sine", np.sin(0.25 * np.arange(4000))[:, None], 0, 6, steps=20).baselines()
    assert scores["linear"].loss < 1e-6
    # sin(a + b) given sin a: cos a sin b is unknown, of variance sin(b)^2 / 2, in units of the variance 1/2.
    assert scores["memoryless"].loss == pytest.approx(math.sin(0.25 * 6) ** 2, rel=0.1)
    # (sin(a + b) - sin a)^2 averages 1 - cos b, in units of 1/2 again.
    assert scores["persistence"].loss == pytest.approx(2 - 2 * math.cos(0.25 * 6), rel=0.05)


def test_baselines_of_a_series_that_the_present_predicts():
    series = [0.3]
    for _ in range(4000):
        series.append(3.9 * series[-1] * (1 - series[-1]))
    scores = tasks.forecast("logistic map", np.array(series)[:, None], 0, 1, steps=20).baselines()
    assert scores["memoryless"].loss < 1e-3
    assert scores["linear"].loss > 0.1


def test_mackey_glass_is_predicted_fifteen_steps_ahead():
    task = tasks.mackey_glass()
    batch = next(task.batches(0, 3))
    assert torch.equal(batch.targets[:-15], batch.inputs[15:])
    scores = task.baselines()
    assert scores["linear"].loss < scores["memoryless"].loss < scores["persistence"].loss


def test_digits_by_pixel_keep_their_parts_apart():
    plain, permuted = tasks.digits_by_pixel(), tasks.digits_by_pixel(permuted=True)
    assert plain.test.inputs.shape == (64, 360, 1)
    order = permuted.test.inputs
    assert not torch.equal(order, plain.test.inputs)
    assert torch.equal(order.sort(0).values, plain.test.inputs.sort(0).values)
    epoch = torch.cat([batch.inputs for batch in some(plain.batches(0, 8), 144)], 1)
    seen = {tuple(column.tolist()) for column in epoch[..., 0].t()}
    assert len(seen) > 1100
    held_out = [tuple(column.tolist()) for split in (plain.valid, plain.test) for column in split.inputs[..., 0].t()]
    assert not seen & set(held_out)


def station(path, hours=6000):
    """Write hourly measurements in NOAA's format: a daily cycle and a slow drift."""
    hour = np.arange(hours)
    columns = {"date": [f"1/1/2010 {number}:00" for number in hour]}
    for number, name in enumerate((*tasks.WEATHER, "WindDirection")):
        columns[name] = np.round(10 + np.sin(2 * np.pi * (hour + number) / 24) + hour / 4000, 3)
    text = "\n".join(",".join(str(cell) for cell in row) for row in zip(*columns.values(), strict=True))
    path.write_text(",".join(columns) + "\n" + text + "\n")
    return path


def test_weather_reads_station_data(tmp_path):
    task = tasks.weather(station(tmp_path / "station.csv"), 24, steps=24)
    assert task.inputs == len(tasks.WEATHER)
    batch = next(task.batches(0, 2))
    assert batch.inputs.shape == (24, 2, task.inputs)
    # A day later only the drift differs.
    assert task.baselines()["persistence"].loss < 0.1
    (tmp_path / "other.csv").write_text("date,WindSpeed\n1,2\n")
    with pytest.raises(ValueError, match="WetBulbCelsius"):
        tasks.weather(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="300 steps"):
        tasks.weather(station(tmp_path / "short.csv", 300))


@pytest.mark.parametrize("make", [lambda: tasks.copying(3), lambda: tasks.adding(5), tasks.mackey_glass])
def test_scores_are_the_losses_that_are_trained(make):
    task = make()
    rnn, readout = nn.RNN(task.inputs, 6), nn.Linear(6, task.outputs)
    batch = next(task.batches(0, 5))
    how = anpgpu.Perturbation(method="bptt")
    estimate = anpgpu.estimate_grad_(rnn, readout, batch.inputs, batch.targets, task.loss, perturbation=how)
    with torch.no_grad():
        outputs = readout(rnn(batch.inputs)[0])
    assert float(training.loss_of(task, outputs, batch.targets)) == pytest.approx(float(estimate.loss), rel=1e-5)
    # The score leaves out the washout, which covers all of so short a window.
    if not task.washout:
        assert tasks.score(task, outputs, batch.targets).loss == pytest.approx(float(estimate.loss), rel=1e-5)


def test_accuracy_counts_steps_with_a_target():
    task = tasks.copying(1, symbols=3, length=2)
    outputs = F.one_hot(torch.tensor([0, 0, 0, 1, 2]), 3).float().unsqueeze(1)
    targets = torch.tensor([-100, -100, -100, 1, 0]).unsqueeze(1)
    assert tasks.score(task, outputs, targets).accuracy == 0.5


@pytest.mark.parametrize("carried", [False, True])
def test_one_step_truncation_is_a_loop_that_detaches(carried):
    torch.manual_seed(0)
    task = tasks.copying(3)
    batch = next(task.batches(0, 4))
    batch = batch._replace(inputs=batch.inputs.double())
    rnn, readout = nn.RNN(task.inputs, 6).double(), nn.Linear(6, task.outputs).double()
    hx = torch.randn(1, 4, 6, dtype=torch.float64) if carried else None
    parameters = [*rnn.parameters(), *readout.parameters()]
    state = torch.zeros(4, 6, dtype=torch.float64) if hx is None else hx[0]
    outputs = []
    for step in batch.inputs:
        state = torch.tanh(
            step @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0 + state.detach() @ rnn.weight_hh_l0.t() + rnn.bias_hh_l0
        )
        outputs.append(readout(state))
    expected = F.cross_entropy(torch.stack(outputs).flatten(0, 1), batch.targets.flatten())
    gradients = torch.autograd.grad(expected, parameters)
    loss, h_n = training.one_step_truncated(task, rnn, readout, batch, hx)
    assert loss == pytest.approx(float(expected.detach()))
    assert torch.allclose(h_n[0], state)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient)


def test_every_method_starts_alike_and_a_seed_repeats():
    task = tasks.copying(2)
    short = training.Settings("bptt", updates=24, hidden=8, rollouts=4)
    first, again = (training.train(task, short, progress=False) for _ in range(2))
    assert first.test == again.test
    assert first.updates == list(range(1, 25))
    other = training.train(task, short._replace(method="anp", decorrelated=True), progress=False)
    # The first update's loss is before any learning.
    assert other.training_loss[0] == pytest.approx(first.training_loss[0], rel=1e-4)
    assert other.training_loss[-1] != first.training_loss[-1]


def test_the_plan_goes_breadth_first_and_tunes_all_alike():
    planned = plan(FULL, list(FULL.sizes), METHODS, 3)
    cells = {(run.task, run.settings.method, run.settings.decorrelated) for run in planned}
    assert len(cells) == (len(FULL.sizes) + len(FULL.decorrelated)) * len(METHODS)
    assert {task for task, _, decorrelated in cells if decorrelated} == set(FULL.decorrelated)
    tuning = [run for run in planned if run.settings.seed == TUNING_SEED]
    assert len(tuning) == len(cells) * len(FULL.rates)
    results = [run for run in planned if run.settings.seed != TUNING_SEED]
    assert {len(set(run.candidates)) for run in results} == {len(FULL.rates)}
    order = [(run.settings.decorrelated, run.settings.seed) for run in results]
    assert order == sorted(order)
    place = {key_of(*run[:2]): number for number, run in enumerate(planned)}
    for number, run in enumerate(planned):
        assert all(place[candidate] < number for candidate in run.candidates)
    assert len(place) == len(planned)


def run_of(planned, valid, seed_loss=1.0):
    scores = [[valid, None]] * training.SHARES
    curve = {"updates": [1] * training.SHARES, "seconds": [1.0] * training.SHARES, "training_loss": []}
    curve |= {"valid": scores, "test": [[seed_loss, None]] * training.SHARES}
    return {"task": planned.task, "settings": planned.settings._asdict(), "curve": curve, "seconds": 1.0}


def test_the_learning_rate_is_the_one_of_the_lowest_validation_loss(tmp_path):
    planned = plan(QUICK, ["adding"], ["np"], 1)
    finished = study.Finished(tmp_path / "runs.jsonl")
    queue = study.Queue(planned, finished, math.inf)
    trials = [queue.take() for _ in QUICK.rates]
    assert [trial.settings.lr for trial in trials] == list(QUICK.rates)
    queue.done(run_of(trials[0], math.nan))
    assert best_rate(planned[-1].candidates, finished.runs) is None
    queue.done(run_of(trials[1], 0.5))
    result = queue.take()
    assert result.settings.lr == QUICK.rates[1]
    queue.done(run_of(result, 0.1))
    assert queue.take() is None


def test_a_line_that_was_cut_off_is_run_again(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    first, second = plan(QUICK, ["adding"], ["np"], 1)[:2]
    finished = study.Finished(path)
    finished.add(run_of(first, 0.5))
    with path.open("a") as file:
        file.write(json.dumps(run_of(second, 0.5))[:40])
    cut = path.read_bytes()
    again = study.Finished(path)
    assert list(again.runs) == [key_of(*first[:2])]
    assert capsys.readouterr().err == "line 2 of runs.jsonl is unfinished and was skipped\n"
    # Who only reads leaves a line alone that may still be in the making.
    assert path.read_bytes() == cut
    again.add(run_of(second, 0.5))
    assert path.read_text().splitlines() == [json.dumps(run_of(planned, 0.5)) for planned in (first, second)]
    assert len(study.Finished(path).runs) == 2


def test_a_damaged_line_is_reported_by_its_number_and_skipped(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    first, second = plan(QUICK, ["adding"], ["np"], 1)[:2]
    whole = [json.dumps(run_of(planned, 0.5)) for planned in (first, second)]
    without = json.dumps({name: value for name, value in run_of(first, 0.5).items() if name != "curve"})
    lines = (whole[0], whole[0][:40], whole[1], '{"task": "adding"}', without)
    path.write_bytes("\n".join((*lines, "")).encode() + b'{"task": "\xff"}\n')
    assert list(study.Finished(path).runs) == [key_of(*first[:2]), key_of(*second[:2])]
    printed = capsys.readouterr().err
    assert [number for number in range(1, 7) if f"line {number} of runs.jsonl is no run" in printed] == [2, 4, 5, 6]
    assert "it has no curve" in printed
    assert printed.count("\n") == 4


def command(folder, *arguments):
    quick = [sys.executable, str(ROOT / "profiling" / "study.py"), "--quick", "--jobs", "1", "--output", str(folder)]
    return [*quick, *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    arguments = ("--tasks", "copying-5", "--methods", "bptt")
    path = tmp_path / "runs.jsonl"
    with subprocess.Popen(
        command(tmp_path, *arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (path.exists() and path.read_text().count("\n")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 1 <= len(before) < 4
    run = subprocess.run(command(tmp_path, *arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = path.read_text().splitlines(keepends=True)
    assert lines[: len(before)] == before
    keys = [key_of(run["task"], training.Settings(**run["settings"])) for run in map(json.loads, lines)]
    # Two learning rates, the result, and the run with two thirds of the updates; none twice.
    assert len(keys) == len(set(keys)) == 4
    assert {path.name for path in tmp_path.iterdir()} >= {"study.md", "study.json", "copying-5.png"}


def row(name, losses, accuracies=()):
    method = name.split(",")[0].replace(" + decorrelation", "+d")
    return study_report.Row(name, method, 1e-3, 100, tuple(losses), tuple(accuracies), 1e-3, ())


def test_findings_of_a_table_computed_by_hand():
    rows = [
        row("bptt", [0.1, 0.3]),
        row("bptt, 2/3 of the updates", [0.4, 0.4]),
        row("np", [0.9, 1.1]),
        row("wp", [1.5, 1.5]),
        row("anp", [0.9, 1.0]),
        row("anp-ls", [0.3, 0.3]),
    ]
    finding = study_report.findings("task", rows, memoryless=2.2)
    assert finding.best == "anp-ls"
    assert finding.share == pytest.approx((2.2 - 0.3) / (2.2 - 0.2))
    assert finding.share_in_more == pytest.approx((2.2 - 0.3) / (2.2 - 0.4))
    assert finding.keeps
    spread = math.sqrt(2) / 10
    assert finding.margins["anp-ls"] == pytest.approx((1.0 - 0.3) / spread)
    assert finding.margins["anp"] == pytest.approx(0.05 / (1.5 * spread))
    text = study_report.sentence(finding)
    assert "anp-ls beats" in text
    assert "anp is within the spread" in text
    # One seed is not compared with the mean of two.
    lucky = study_report.findings("task", [*rows, row("np + decorrelation", [0.1])], memoryless=2.2)
    assert lucky == finding
    worse = study_report.findings("task", [*rows[:4], row("anp-ls", [0.9, 0.9])], memoryless=2.2)
    assert not worse.keeps
    # Where BPTT gains nothing over the memoryless optimum there is no share of its gain.
    none = study_report.findings("task", rows, memoryless=0.15)
    assert none.share is none.share_in_more is none.keeps is None
    assert "BPTT after as many updates does not beat the memoryless optimum" in study_report.sentence(none)
    # Within a point of BPTT's accuracy is enough.
    near = [row("bptt", [0.1], [0.95]), row("anp-ls", [0.5], [0.945])]
    assert study_report.findings("task", near, memoryless=1.0).keeps


def test_decorrelation_is_set_beside_the_spread():
    plain, helped = row("np", [0.9, 1.1]), row("np + decorrelation", [0.3, 0.5])
    tasks_rows = {
        "first": [plain, helped],
        "second": [row("np", [0.3, 0.5]), row("np + decorrelation", [0.9, 1.1]), row("wp", [1.0, 2.0])],
        "third": [plain],
    }
    text = study_report.decorrelation_table(tasks_rows)
    # Both spreads are sqrt(2) / 10, and the means .6 apart.
    assert [line for line in text.splitlines() if line.startswith("| np")] == ["| np | 2.1 | -2.1 | 1 | 1 |"]
    assert "wp" not in text
    assert "third" not in text
    assert study_report.decorrelation_table({"third": [plain]}) == ""


@pytest.mark.slow
def test_quick_grid_orders_the_methods(tmp_path):
    names = ("copying-5", "mackey-glass-15")
    arguments = ("--tasks", *names, "--minutes", 8)
    run = subprocess.run(command(tmp_path, *arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "study.json").read_text())["tasks"]
    for name in names:
        loss = {method["name"]: method["loss"] for method in record[name]["methods"]}
        assert loss["bptt"] < loss["bptt-1"]
        assert loss["anp-ls"] < loss["bptt-1"]
        assert loss["anp-ls"] < loss["published-anp"]
        assert loss["anp-ls"] < record[name]["baselines"]["memoryless"]["loss"]
    copying = {method["name"]: method["loss"] for method in record["copying-5"]["methods"]}
    assert copying["anp-ls"] < min(copying["np"], copying["wp"], copying["anp"])
