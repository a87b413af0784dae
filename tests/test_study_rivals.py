"""The study of rivals is fair, counts what it spends, goes on where it was, and its tables follow from its lines."""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

import study_rivals  # noqa: E402  (found through the line above)
import study_rivals_runs as runs  # noqa: E402
import study_tasks  # noqa: E402
from rivals import RIVALS  # noqa: E402
from study_grid import TUNING_SEED, Planned, final, key_of, tasks  # noqa: E402
from study_rivals_plan import CORE, FULL, QUICK, Grid, Way, left_out, plan, ways  # noqa: E402
from study_rivals_runs import METHODS, Settings  # noqa: E402
from study_tasks_neurogym import expected_reward  # noqa: E402

from anpgpu.estimators.found import NonFiniteRolloutsError  # noqa: E402


@pytest.fixture(scope="module")
def copying():
    return study_tasks.benchmark(tasks.copying(2), math.log(8))


SHORT = Settings("bptt", updates=24, hidden=6, rollouts=2, lr=1e-2)


def test_exact_methods_learn_alike_and_others_otherwise(copying):
    curves = {
        method: runs.train(copying, SHORT._replace(method=method), progress=False)
        for method in ("bptt", "rtrl", "bptt-1", "anp-ls")
    }
    exact = curves["bptt"]
    assert curves["rtrl"].training_loss == pytest.approx(exact.training_loss, rel=1e-4)
    assert exact.test[-1].loss < exact.test[0].loss
    for name in ("bptt-1", "anp-ls"):
        # The first loss is before any learning.
        assert curves[name].training_loss[0] == pytest.approx(exact.training_loss[0], rel=1e-4)
        assert curves[name].training_loss[-1] != pytest.approx(exact.training_loss[-1], rel=1e-4)
    assert exact.updates == list(range(1, 25))
    assert runs.train(copying, SHORT, progress=False).test == exact.test


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_an_orthogonal_start_rotates_every_gate(cell):
    rnn, _ = runs.network(SHORT._replace(cell=cell), 3, 2)
    for gate in rnn.weight_hh_l0.detach().split(6):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(6), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    plain = type(rnn)(3, 6)
    default, _ = runs.network(SHORT._replace(cell=cell, start="default"), 3, 2)
    assert torch.equal(default.weight_hh_l0, plain.weight_hh_l0)
    assert torch.equal(rnn.weight_ih_l0, plain.weight_ih_l0)
    with pytest.raises(ValueError, match="default, orthogonal, chrono, got 'x'"):
        runs.network(SHORT._replace(start="x"), 3, 2)


@pytest.mark.parametrize(("cell", "gate"), [("gru", 1), ("lstm", 1)])
def test_a_chrono_start_remembers_for_as_long_as_its_biases_say(cell, gate):
    settings = SHORT._replace(cell=cell, start="chrono", hidden=64)
    rnn, _ = runs.network(settings, 3, 2)
    plain, _ = runs.network(settings._replace(start="default"), 3, 2)
    assert torch.equal(rnn.weight_hh_l0, plain.weight_hh_l0)
    assert not rnn.bias_ih_l0.any()
    biases = rnn.bias_hh_l0.detach().split(64)
    # What a step keeps is sigmoid(log u) = u / (1 + u): u + 1 steps, evenly from 2 to 784.
    kept = torch.sigmoid(biases[gate])
    steps = 1 / (1 - kept)
    assert steps.min() > 2
    assert steps.max() < runs.LONGEST + 1
    assert 300 < steps.mean() < 500
    if cell == "lstm":
        torch.testing.assert_close(torch.sigmoid(biases[0]), 1 - kept)
    assert not any(bias.any() for number, bias in enumerate(biases) if number > 1)
    with pytest.raises(ValueError, match="start 'chrono' sets the biases of gates, which an RNN_TANH does not have"):
        runs.network(SHORT._replace(start="chrono"), 3, 2)


def test_a_network_under_dales_law_starts_by_its_seed(copying):
    settings = SHORT._replace(cell="dale", start="default", method="anp-feedback")
    one, again, other = (
        runs.network(settings._replace(seed=seed), copying.inputs, copying.outputs)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one.weight_hh_l0, again.weight_hh_l0)
    assert not torch.equal(one.weight_hh_l0, other.weight_hh_l0)
    learned = runs.train(copying, settings, progress=False)
    assert learned.test[-1].loss < learned.test[0].loss


def test_the_published_rule_has_the_same_weights_and_no_biases():
    rnn, readout = runs.network(SHORT, 3, 2)
    bare, bare_readout = runs.network(SHORT._replace(method="published-anp"), 3, 2)
    assert (bare.bias, bare_readout.bias) == (False, None)
    for left, right in (
        (bare.weight_ih_l0, rnn.weight_ih_l0),
        (bare.weight_hh_l0, rnn.weight_hh_l0),
        (bare_readout.weight, readout.weight),
    ):
        assert torch.equal(left, right)


def test_rollout_steps_are_counted_and_those_of_the_warm_up_too(copying):
    steps, batch = 10, 8
    counted = {
        method: runs.train(copying, SHORT._replace(method=method), progress=False).rollout_steps
        for method in ("bptt", "np", "anp-feedback", "published-anp")
    }
    assert counted["bptt"] == [0] * 24
    assert counted["np"] == [2 * steps * batch * update for update in range(1, 25)]
    assert counted["published-anp"][-1] == 24 * steps * batch
    # B is learnt from 30 estimates before the first update.
    assert counted["anp-feedback"] == [2 * steps * batch * (30 + update) for update in range(1, 25)]


def test_clipping_and_the_schedule_are_those_of_the_settings(copying):
    class Recorded(torch.optim.SGD):
        rates, norms = [], []

        def step(self):
            self.rates.append(self.param_groups[0]["lr"])
            self.norms.append(
                float(nn.utils.get_total_norm([value.grad for value in self.param_groups[0]["params"][:4]]))
            )
            super().step()

    settings = SHORT._replace(optimiser="recorded", clip=1e-3, lr=0.24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.OPTIMISERS, "recorded", Recorded)
        runs.train(copying, settings, progress=False)
    assert Recorded.rates == pytest.approx([0.01 * left for left in range(24, 0, -1)])
    assert Recorded.norms == pytest.approx([1e-3] * 24, rel=1e-2)


def test_records_of_an_online_run_are_means_of_its_last_200_steps():
    task = study_tasks.series("mackey-glass", study_tasks.mackey_glass, 25)
    still = SHORT._replace(window=25, updates=60, lr=0.0, clip=0.0, falling=False)
    learned = runs.train(task, still, progress=False)
    rnn, readout = runs.network(still, 1, 1)
    errors, state = [], None
    for batch, _ in zip(task.batches(0, 8), range(60), strict=False):
        hidden, after = rnn(batch.inputs, state if batch.continued else None)
        state = after.detach()
        errors += (readout(hidden) - batch.targets).square().mean((1, 2)).tolist()
    assert learned.records == pytest.approx([sum(errors[300:500]) / 200, sum(errors[800:1000]) / 200], rel=1e-5)
    online = runs.train(task, still, progress=False)
    assert online.records == learned.records


def test_records_are_as_often_where_updates_do_not_fall_on_them():
    task = study_tasks.series("mackey-glass", study_tasks.mackey_glass, 8)
    still = SHORT._replace(window=8, updates=2000 // 8, lr=0.0, clip=0.0, falling=False)
    # After 504, 1,000 and 1,504 steps, and not after the last one.
    assert len(runs.train(task, still, progress=False).records) == 3


def test_a_run_that_finds_nothing_finite_breaks_off_and_other_errors_end_the_study(copying, monkeypatch):
    def broken(error):
        def raising(*_arguments, **_options):
            raise error

        monkeypatch.setattr(runs, "train", raising)

    broken(NonFiniteRolloutsError("no rollout of sample 3 is finite"))
    line = runs.made(copying, SHORT)
    assert line["broke_off"] == "no rollout of sample 3 is finite"
    assert line["curve"]["test"] == []
    broken(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        runs.made(copying, SHORT)


def test_held_out_sequences_in_chunks_are_scored_as_a_whole(copying):
    rnn, readout = runs.network(SHORT, copying.inputs, copying.outputs)
    whole = tasks.score(copying, readout(rnn(copying.test.inputs)[0]), copying.test.targets)
    assert copying.test.inputs.shape[1] > runs.CHUNK
    assert runs.evaluate(copying, rnn, readout, copying.test) == pytest.approx(whole, rel=1e-5)


def rewarded():
    def draw(generator, batch):
        shown = torch.randint(1, 3, (3, batch), generator=generator)
        targets = torch.full_like(shown, tasks.IGNORED)
        targets[-1] = shown[-1]
        return tasks.Batch(F.one_hot(shown, 3).float(), targets)

    parts = tasks.held_out(draw)
    made = tasks.Task("choice", "cross_entropy", "nats", 3, 3, tasks.fresh(draw), *parts, dict)
    return study_tasks.benchmark(made, math.log(2), reward=expected_reward)


def test_a_reward_alone_teaches():
    settings = Settings("anp-ls", updates=120, hidden=8, rollouts=16, lr=1e-2, batch=16)
    learned = runs.train(rewarded(), settings, progress=False)
    # The training loss is minus the expected reward. A guess among three has a third, the best guess without looking a
    # half: three quarters lie halfway to all of it.
    assert learned.training_loss[0] > -0.5
    assert learned.training_loss[-1] < -0.75
    assert learned.test[-1].accuracy == 1.0
    # Beside it the exact gradient of the expected reward.
    exact = runs.train(rewarded(), SHORT._replace(updates=120, hidden=8, batch=16), progress=False)
    assert exact.training_loss[0] == pytest.approx(learned.training_loss[0], rel=1e-2)
    assert exact.training_loss[-1] < -0.75
    with pytest.raises(ValueError, match="'rtrl' needs a loss of every step, and choice has one reward a trial"):
        runs.train(rewarded(), SHORT._replace(method="rtrl"), progress=False)
    with pytest.raises(ValueError, match=r"method must be one of bptt, .*, got 'x'"):
        runs.train(rewarded(), SHORT._replace(method="x"), progress=False)


def test_everybody_is_tuned_alike_and_online_tasks_have_equal_steps():
    entries = {entry.task: entry for entry in FULL.entries}
    steps = {"bptt-8": 8, **dict.fromkeys(("bptt-1", "rtrl", "snap-1", "rflo", "uoro"), 1)}
    planned = plan(FULL, list(entries), METHODS, None, "cpu")
    keys = [(*run[:2], run.candidates) for run in planned]
    assert len(keys) == len(set(keys))
    place = {key_of(*run[:2]): number for number, run in enumerate(planned)}
    for number, run in enumerate(planned):
        if run.settings.seed == TUNING_SEED:
            continue
        rates = entries[run.task].rates or FULL.rates
        assert [json.loads(candidate)[1]["lr"] for candidate in run.candidates] == list(rates if len(rates) > 1 else ())
        assert (run.settings.lr == 0) == bool(run.candidates)
        assert all(place[candidate] < number for candidate in run.candidates)
        if run.settings.window:
            assert rates == (1e-3,)
            # SnAp-1 in BPTT's windows too: what does it owe to its many updates?
            assert run.settings.window in {steps.get(run.settings.method, 25), 25 * (run.settings.method == "snap-1")}
            assert run.settings.updates * run.settings.window == 15_000
            assert (run.settings.clip, run.settings.falling) == (0.0, False)
    for task in entries:
        counts = {}
        for run in planned:
            if run.task == task and run.settings.seed != TUNING_SEED:
                row = run.settings._replace(seed=0, lr=0.0), run.candidates
                counts[row] = counts.get(row, 0) + 1
        for cell in {settings.cell for settings, _ in counts}:
            assert len({number for (settings, _), number in counts.items() if settings.cell == cell}) == 1


def test_what_a_claim_stands_on_comes_first():
    claims = {entry.task for entry in FULL.entries if entry.claim}
    assert claims >= {"copying-40", "mnist-rows", "mnist-7x7", "mnist-14x14", "mackey-glass", "characters"}
    planned = plan(FULL, [entry.task for entry in FULL.entries], METHODS, None, "cpu")
    # The network under Dale's law promises nothing.
    ranks = [
        (
            run.settings.seed in range(3, TUNING_SEED),
            run.task not in claims or run.settings.cell == "dale",
            run.settings.method not in CORE,
        )
        for run in planned
    ]
    assert ranks == sorted(ranks)
    assert set(ranks) == {(late, other, rival) for late in (0, 1) for other in (0, 1) for rival in (0, 1)}
    assert planned[0].task == "copying-40"
    # A task's learning rates and first seeds before the next task.
    first = [run.task for run in planned[: ranks.index((False, False, True))]]
    assert list(dict.fromkeys(first)) == [task for task, _ in itertools.groupby(first)]


def test_everybody_has_bptts_learning_rate_too_and_bptt_that_of_learned_feedback():
    planned = plan(FULL, ["copying-40", "mackey-glass", "perceptual-reward"], METHODS, 1, "cpu")
    mine = [run for run in planned if run.settings.method == "anp-feedback" and run.settings.seed == 0]
    (own, exact), (single,) = ([run for run in mine if run.task == task] for task in ("copying-40", "mackey-glass"))
    assert own.settings == exact.settings
    assert {json.loads(candidate)[1]["method"] for candidate in own.candidates} == {"anp-feedback"}
    assert {json.loads(candidate)[1]["method"] for candidate in exact.candidates} == {"bptt"}
    other = [run for run in planned if run.settings.method == "bptt" and run.candidates == own.candidates]
    assert [run.task for run in other] == ["copying-40"]
    # Where there is one rate it is everybody's.
    assert single.settings.lr == 1e-3
    tuning = [run for run in planned if run.settings.seed == TUNING_SEED and run.settings.method == "bptt"]
    assert [run.task for run in tuning] == ["copying-40"] * len(FULL.rates) + ["perceptual-reward"] * len(FULL.rates)
    others = [way for way in ways(FULL.entries[0], "rnn") if way.rate_of == "bptt"]
    assert {way.method for way in others} == set(METHODS) - {"bptt", "rtrl", "e-prop"}
    alone = plan(FULL, ["copying-40"], ["anp-feedback"], 1, "cpu")
    assert [run.candidates for run in alone if run.settings.seed == 0] == [own.candidates]


def test_methods_are_those_that_are_defined():
    entries = {entry.task: entry for entry in FULL.entries}
    small, large = (ways(entries[name], "rnn") for name in ("mackey-glass", "copying-40"))
    assert {way.method for way in small} == set(METHODS) - {"e-prop"}
    assert {way.method for way in large} == set(METHODS) - {"e-prop", "rtrl"}
    own = [way for way in large if not way.rate_of]
    assert [way for way in own if way.method == "bptt-1"] == [Way("bptt-1"), Way("bptt-1", "rmsprop")]
    assert [way for way in own if way.method == "bptt"] == [Way("bptt")]
    assert Way("bptt", "rmsprop") in ways(entries["characters"], "lstm")
    assert [way for way in small if way.windowed] == [Way("snap-1", windowed=True)]
    # Rivals are written for networks whose weights are their parameters.
    assert {way.method for way in ways(entries["perceptual-decision"], "dale")} & set(RIVALS) == {"bptt"}
    gated = {way.method for way in ways(entries["characters"], "lstm")}
    assert not gated & {"rflo", "rtrl", "published-anp"}
    assert gated >= {"bptt", "bptt-8", "bptt-1", "snap-1", "e-prop", "np", "anp-ls"}
    # What needs a loss of every step cannot learn from a reward.
    assert {way.method for way in ways(entries["perceptual-reward"], "rnn")} == {"bptt", "np", "wp", "anp", "anp-ls"}


def test_who_is_left_out_can_be_said():
    entries = {entry.task: entry for entry in FULL.entries}
    # Where the gradient of RTRL is that of BPTT it runs only if it costs little.
    assert left_out(entries["copying-40"], "rnn") == ("rtrl",)
    assert left_out(entries["copying-10"], "rnn") == left_out(entries["lorenz"], "rnn") == ()
    assert set(left_out(entries["mnist-rows"], "rnn")) == {"rtrl", "uoro", "wp", "published-anp"}
    assert set(left_out(entries["characters"], "gru")) == {"rtrl", "uoro", "wp"}
    for entry in entries.values():
        for cell in entry.cells:
            assert not {way.method for way in ways(entry, cell)} & set(left_out(entry, cell))


def test_the_quick_grid_is_a_smaller_one():
    sizes = {entry.task: entry.steps for entry in FULL.entries}
    assert all(entry.steps < sizes[entry.task] and entry.hidden <= 32 for entry in QUICK.entries)
    planned = plan(QUICK, list(sizes), METHODS, None, "cpu")
    # One row for each method and optimiser.
    rows = [(run.task, run.settings._replace(lr=0.0)) for run in planned if run.settings.seed == 0]
    assert len(rows) == len(set(rows))


def command(folder, *arguments):
    script = [sys.executable, str(ROOT / "profiling" / "study_rivals.py"), "--jobs", "1", "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*script, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_a_study_goes_on_where_it_was_and_its_report_follows_from_its_lines(tmp_path):
    arguments = ("--quick", "--tasks", "copying-10", "--methods", "bptt", "snap-1")
    run = command(tmp_path, *arguments)
    assert run.returncode == 0, run.stderr
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    # Two learning rates and a result of two methods.
    assert len(lines) == 6
    record = json.loads((tmp_path / "rivals.json").read_text())
    (group,) = record["groups"]
    assert [row["name"] for row in group["rows"]] == ["bptt", "snap-1"]
    assert record["checks"]
    assert (tmp_path / "rivals.md").read_text().count("| bptt |") == 1
    assert any(tmp_path.glob("*.png"))
    path.write_text("\n".join((*lines[:5], lines[5][:50])) + "\n")
    again = command(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert "line 6 of runs.jsonl is no run" in again.stderr
    kept = [line for line in path.read_text().splitlines() if line != lines[5][:50]]
    assert kept[:5] == lines[:5]
    losses = [final(json.loads(line), "test") for line in (lines[5], kept[5])]
    assert losses[0] == losses[1]


def test_hours_are_those_of_finished_runs_where_there_are_any(tmp_path, copying, monkeypatch):
    finished = study_rivals.Finished(tmp_path / "runs.jsonl", study_rivals.key_of_line)
    line = runs.made(copying, SHORT._replace(updates=240))
    line["seconds"], line["curve"]["seconds"][-1] = 5.0, 3.0
    finished.add(line)
    longer = [Planned(copying.name, SHORT._replace(seed=seed, updates=480, optimiser="rmsprop")) for seed in range(2)]
    # Twice the updates and as many looks; nothing is timed.
    assert study_rivals.seconds_of(longer, {}, finished) == {"copying-2": pytest.approx(2 * (2 + 6))}
    other = Planned(copying.name, SHORT._replace(method="np"))
    (timed,) = study_rivals.seconds_of([other], {"copying-2": lambda _window: copying}, finished).values()
    assert 0 < timed < 60
    monkeypatch.setattr(study_rivals, "train", lambda *_, **__: runs.Learned([], [], [], [], [], [], []))
    assert study_rivals.seconds_of([other], {"copying-2": lambda _window: copying}, finished) == {}


def options(**changes):
    return argparse.Namespace(**{"tasks": None, "mnist": None, "text": None, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["mnist-rows"]}, "mnist-rows: nothing was passed: pass --mnist PATH"),
        ({"text": Path("absent.txt")}, "characters: there is no file 'absent.txt': pass --text PATH"),
        ({"mnist": Path("absent.npz")}, "mnist-rows: there is no file 'absent.npz': pass --mnist PATH"),
        ({"mnist": Path(__file__)}, "test_study_rivals.py' is no .npz of numpy: pass --mnist PATH"),
        ({"tasks": ["sorting"]}, "no task sorting; there are copying-10"),
    ],
)
def test_a_missing_file_or_task_stops_the_study(changes, message):
    with pytest.raises(SystemExit) as stopped:
        study_rivals.names_of(QUICK, options(**changes))
    assert message in str(stopped.value)


def test_what_is_not_here_is_left_out_and_said(capsys, monkeypatch):
    monkeypatch.setattr(study_rivals.importlib.util, "find_spec", lambda name: None)
    assert study_rivals.names_of(QUICK, options()) == ["copying-10", "mackey-glass", "adding-50"]
    printed = capsys.readouterr().err
    assert "left out: mnist-rows: nothing was passed" in printed
    assert "left out: perceptual-decision: neurogym is not installed" in printed


def clocked(monkeypatch):
    times = iter([0.0, 14.0 + 0.3] * 2)
    monkeypatch.setattr(study_rivals, "clock", lambda device: next(times))


def test_hours_are_those_of_the_updates(copying, capsys, monkeypatch, tmp_path):
    none = study_rivals.Finished(tmp_path / "runs.jsonl")

    def timed(task, settings, *, progress):
        # A first update of 10 s, others of 2 s.
        return runs.Learned([1, 2, 3], [10.0, 12.0, 14.0], [], [], [], [], [])

    monkeypatch.setattr(study_rivals, "train", timed)
    clocked(monkeypatch)
    planned = [
        study_rivals.Planned("copying-2", SHORT._replace(method=method, seed=seed, updates=100))
        for method in ("bptt", "np")
        for seed in (0, 1, TUNING_SEED)
    ]
    study_rivals.say_hours(planned, {"copying-2": lambda window: copying}, none, 2)
    # Six runs of 10 + 100 x 2 and 24 evaluations of .1 s: 1274.4 s.
    assert "6 runs, at most about 0.4 hours of one process, 0.2 with 2 jobs" in capsys.readouterr().out
    clocked(monkeypatch)
    total = study_rivals.seconds_of(planned, {"copying-2": lambda window: copying}, none)
    assert total == {"copying-2": pytest.approx(6 * (10 + 200 + 2.4))}


def test_a_plan_of_one_method_has_its_tuning_and_results():
    grid = Grid(QUICK.entries[:1], QUICK.rates, QUICK.tuning)
    planned = plan(grid, ["copying-10"], ["np"], 2, "cuda")
    assert [run.settings.seed for run in planned] == [TUNING_SEED] * 2 + [0, 1]
    assert {run.settings.device for run in planned} == {"cuda"}
    assert [run.settings.updates for run in planned] == [120, 120, 240, 240]
    assert planned[0].settings.rollouts == 2
