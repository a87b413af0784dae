"""The tables of the study of rivals follow from the lines of its runs, and say what is missing and what holds."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

import study  # noqa: E402  (found through the line above)
import study_rivals  # noqa: E402
import study_rivals_claims as promised  # noqa: E402
import study_rivals_report as tables  # noqa: E402
import study_rivals_rows as made  # noqa: E402
from study_grid import TUNING_SEED, training  # noqa: E402
from study_rivals_plan import FULL, Entry, Grid  # noqa: E402
from study_rivals_runs import Settings  # noqa: E402


def line_of(method, seed, losses, *, seconds=1.0, accuracy=None, machine="here", **changes):
    settings = Settings(method, seed, **{"updates": 240, "rollouts": 0, **changes})
    count = training.SHARES
    heights = [*losses, *[losses[-1]] * (count - len(losses))]
    scores = [[loss, accuracy] for loss in heights]
    curve = {
        "updates": [10 * (look + 1) for look in range(count)],
        "seconds": [seconds * (look + 1) for look in range(count)],
        "rollout_steps": [100 * settings.rollouts * (look + 1) for look in range(count)],
        "training_loss": heights,
        "valid": scores,
        "test": scores,
        "records": [9.0, 1.0, 2.0, 3.0, 4.0, 5.0] if settings.window else [],
    }
    common = {"unit": "nats", "chance": 2.0, "solved": 1.0, "seconds": 2.0, "machine": machine}
    return {"task": "copying-2", "settings": settings._asdict(), "curve": curve, **common}


def rows_by_name(lines, every=()):
    return {row.name: row for row in tables.rows_of(lines, every)}


def test_a_table_computed_by_hand():
    lines = [
        *(line_of("bptt", seed, [2.0, 0.9, 0.5 + seed / 10]) for seed in range(3)),
        *(line_of("np", seed, [2.0, 1.5, 0.9, 1.2, 0.7 + seed / 10], seconds=3.0, rollouts=4) for seed in range(3)),
        *(line_of("bptt-1", seed, [2.0, 1.9], optimiser="rmsprop") for seed in range(3)),
        line_of("bptt", TUNING_SEED, [0.1]),
    ]
    ((group, mine),) = tables.groups_of(lines).items()
    assert (group.task, group.amount, group.window) == ("copying-2", 240, False)
    rows = rows_by_name(mine)
    assert list(rows) == ["bptt", "bptt-1, RMSprop", "np"]
    assert rows["bptt"].losses == (0.5, 0.6, 0.7)
    assert rows["bptt"].seconds == 2.0
    # At the third look np is only passing by.
    assert (rows["np"].seconds, rows["np"].rollout_steps, rows["np"].first_steps) == (15.0, 2000, False)
    assert (rows["bptt"].rollout_steps, rows["bptt-1, RMSprop"].seconds) == (None, None)
    assert rows["np"].per_update == pytest.approx(0.3)
    # Trapezia of width 10 over 230: (2 + .9) / 2 + (.9 + .5) / 2 + 21 of .5.
    assert rows["bptt"].areas[0] == pytest.approx((1.45 + 0.7 + 21 * 0.5) / 23)
    # No p of three pairs is below .25.
    assert tables.against(tables.rows_of(mine)) == {}
    text = tables.table(group, mine, tables.rows_of(mine))
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    shown = dict(zip(cells[0], cells[2], strict=True))
    # The mean of the curves' areas has its interval from the bootstrap, as the losses have.
    assert shown.pop("mean of the curve").startswith(f"{sum(rows['bptt'].areas) / 3:.4f} [")
    assert shown == {
        "": "bptt", "rollouts": "", "learning rate": "0.001", "seeds": "3", "test loss": "0.6000 [0.5000, 0.7000]",
        "ms an update": "100.0", "s until solved": "2.0", "rollout-steps until solved": "",
    }  # fmt: skip
    assert "2e+03" in text
    assert "right, %" not in text


def test_what_is_there_at_the_first_look_may_have_been_there_before():
    lines = [line_of("np", seed, [0.5 + seed], accuracy=0.9 - seed, rollouts=4) for seed in (0, 0.1, 0.8)]
    (row,) = tables.rows_of(lines)
    assert (row.first_seconds, row.first_steps, row.first_trials) == (True, True, True)
    ((group, mine),) = tables.groups_of(lines).items()
    cells = tables.table(group, mine, [row]).splitlines()[-1].split(" | ")
    assert cells[-3:] == ["≤ 1.0", "≤ 4e+02", "≤ 80 |"]
    # Seconds are of the seeds of one machine alone, rollout-steps of all.
    lines = [line_of("np", seed, [0.5], rollouts=4) for seed in range(3)]
    lines += [line_of("np", 3, [2.0, 0.5], rollouts=4, machine="there")]
    lines += [line_of(method, 0, [0.5], machine="there") for method in ("bptt", "wp")]
    slow = rows_by_name(lines)["np"]
    assert (slow.seconds, slow.first_seconds, slow.rollout_steps, slow.first_steps) == (2.0, False, 400, True)


def test_the_own_learning_rate_is_the_one_that_short_runs_chose():
    short = [line_of("np", TUNING_SEED, [loss], lr=lr, updates=60) for lr, loss in ((1e-3, 0.9), (1e-2, 0.4))]
    # Of another kind: its rate is nobody else's.
    short += [line_of("np", TUNING_SEED, [0.1], lr=1e-3, updates=60, optimiser="rmsprop")]
    lines = [line_of("np", 0, [0.5], lr=lr) for lr in (1e-3, 1e-2)] + [line_of("bptt", 0, [0.5])]
    rows = rows_by_name(lines, [*short, *lines])
    assert {name: row.own for name, row in rows.items()} == {"bptt": None, "np at 0.001": False, "np at 0.01": True}
    ((group, mine),) = tables.groups_of([*short, *lines]).items()
    assert "| 0.01 (own) |" in tables.table(group, mine, tables.rows_of(mine, short))
    rows = [row._replace(name=row.name.replace("np", "anp-feedback")) for row in rows.values()]
    claims = promised.claims_of(group._replace(task="copying-40"), rows, 1.0)
    assert [(claim.own, claim.rates[1]) for claim in claims] == [(True, 1e-2), (False, 1e-3)]
    # A rate that neither has chosen promises nothing.
    exact, *mine = rows
    aside = [exact._replace(rate=1.0), *mine]
    assert [claim.own for claim in promised.claims_of(group._replace(task="copying-40"), aside, 1.0)] == [True]


def test_seconds_are_of_one_machine():
    lines = [
        *(
            line_of("bptt", seed, [0.5], seconds=1.0 + 9 * (seed > 0), machine="there" if seed else "here")
            for seed in range(3)
        ),
        *(line_of("np", seed, [0.7], seconds=2.0, rollouts=4) for seed in range(2)),
        line_of("wp", 0, [0.9], seconds=5.0, rollouts=4, machine="there"),
        line_of("anp", 0, [0.6], seconds=3.0, rollouts=4),
    ]
    # Three methods ran here, two there; of two and two the latest counts.
    assert tables.timed_on(lines) == tables.timed_on(lines[::-1]) == "here"
    assert tables.timed_on(lines[:-1]) == "there"
    assert tables.timed_on(lines[-2::-1]) == "here"
    rows = rows_by_name(lines)
    assert rows["bptt"].losses == (0.5, 0.5, 0.5)
    assert (rows["bptt"].per_update, rows["bptt"].seconds) == (0.1, 1.0)
    assert (rows["wp"].per_update, rows["wp"].seconds, rows["wp"].rollout_steps) == (None, None, 400)
    assert [len(rows[name].curves) for name in ("bptt", "wp")] == [3, 1]
    assert [len(rows[name].timed) for name in ("bptt", "wp")] == [1, 0]
    (group,) = tables.groups_of(lines)
    text = tables.table(group, lines, tables.rows_of(lines))
    assert next(row for row in text.splitlines() if row.startswith("| wp ")).count("|  |") == 1
    result = tables.summarised(lines, grid_of())
    assert result["groups"][0]["timed_on"] == "here"
    assert result["spent"] == {
        "here": {"runs": 4, "processor_seconds": 8.0},
        "there": {"runs": 3, "processor_seconds": 6.0},
    }


def test_every_machine_of_a_study_is_kept(tmp_path, monkeypatch):
    def noted(cpu, date, commit):
        monkeypatch.setattr(study, "machine", lambda: {"cpu": cpu, "gpu": None, "date": date, "commit": commit})
        study.note_machine(tmp_path)
        return json.loads((tmp_path / "machine.json").read_text())

    monkeypatch.setattr(study, "require", list)
    monkeypatch.setattr(study, "estimate_check", dict)
    assert noted("one", 1, "a")["earlier"] == []
    record = noted("two", 2, "b")
    assert (record["machine"]["cpu"], [other["cpu"] for other in record["earlier"]]) == ("two", ["one"])
    record = noted("one", 3, "b")
    assert (record["machine"]["date"], [other["cpu"] for other in record["earlier"]]) == (3, ["two"])
    assert record["commits"] == ["a", "b"]


def test_a_task_counts_where_bptt_solves_it():
    solved, unsolved = ([line_of("bptt", 0, [loss])] for loss in (0.9, 1.1))
    assert tables.sentence(solved, tables.rows_of(solved)).startswith("BPTT solves it: 0.9;")
    assert "BPTT does not solve it: 1.1" in tables.sentence(unsolved, tables.rows_of(unsolved))
    without = [line_of("np", 0, [0.9])]
    assert "BPTT has not run" in tables.sentence(without, tables.rows_of(without))
    assert tables.against(tables.rows_of(without)) == {}


def grid_of(**changes):
    fields = {"task": "copying-2", "steps": 240, "batch": 8, "hidden": 128, "seeds": 3, **changes}
    return Grid((Entry(**fields, without=("uoro",)),), (1e-3, 3e-3), 0.25)


def test_what_is_missing_of_a_table_is_said():
    lines = [*(line_of("bptt", seed, [0.5]) for seed in range(3)), line_of("snap-1", 0, [0.7])]
    ((group, mine),) = tables.groups_of(lines).items()
    rows = tables.rows_of(mine)
    short = tables.lacking(grid_of().entries[0], "rnn", rows)
    assert (short["snap-1"], short["bptt-1, RMSprop"], short["anp-feedback"]) == ("1 of 3", "0 of 3", "0 of 3")
    assert not {"bptt", "uoro", "rtrl", "e-prop"} & set(short)
    said = tables.planned(group, grid_of(), rows)
    assert said.startswith("Learning rates: 0.001, 0.003. Not made yet, seeds: bptt-8 0 of 3, bptt-1 0 of 3, ")
    assert "snap-1 1 of 3" in said
    assert said.endswith("Left out for their time: uoro. RTRL is left out: its gradient is BPTT's.")
    assert tables.planned(group, grid_of(seeds=1, rates=(5e-3,)), rows).startswith("Learning rates: 0.005. Not made")
    assert tables.planned(group, grid_of(steps=9), rows) == "The plan no longer has runs of these sizes."
    result = tables.summarised(lines, Grid((*grid_of().entries, *grid_of(cells=("gru",)).entries), (1e-3,), 0.25))
    assert result["unmade"] == ["copying-2, gru, orthogonal start"]
    assert result["groups"][0]["lacking"] == short
    assert result["groups"][0]["rows"][0]["loss"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_rows_of_two_learning_rates_are_two():
    lines = [line_of("bptt", 0, [0.5]), line_of("np", 0, [0.6], lr=1e-2), line_of("np", 1, [0.7], lr=1e-3)]
    assert [(row.name, row.losses) for row in tables.rows_of(lines)] == [
        *(("bptt", (0.5,)), ("np at 0.001", (0.7,)), ("np at 0.01", (0.6,)))
    ]
    (group,) = tables.groups_of(lines)
    rows = [row._replace(name=row.name.replace("np", "anp-feedback")) for row in tables.rows_of(lines)]
    claims = promised.claims_of(group._replace(task="copying-40"), [*rows[:1], rows[2]], 1.0)
    assert [(claim.rates, claim.feedback) for claim in claims] == [((1e-3, 1e-2), 0.6)]
    assert tables.lacking(grid_of().entries[0], "rnn", rows)["anp-feedback"] == "1 of 3"


def test_bptt_at_several_rates_is_the_better_one():
    lines = [line_of("bptt", seed, [loss], lr=lr) for lr, loss in ((1e-2, 0.9), (1e-3, 0.2)) for seed in range(6)]
    lines += [line_of("anp-feedback", seed, [0.25], lr=1e-2) for seed in range(6)]
    rows = tables.rows_of(lines)
    assert tables.exact_of(rows).name == "bptt at 0.001"
    assert tables.exact_of(rows[2:]) is None
    # BPTT at another rate is no rival, and does not count among them.
    assert tables.against(rows) == {"anp-feedback": pytest.approx(2 / 64)}
    assert "BPTT solves it: 0.2;" in tables.sentence(lines, rows)
    (group,) = tables.groups_of(lines)
    (claim,) = promised.claims_of(group._replace(task="copying-40"), rows, 1.0)
    assert (claim.bptt, claim.rates) == (pytest.approx(0.2), (1e-3, 1e-2))
    assert "bptt" not in tables.lacking(grid_of(seeds=2).entries[0], "rnn", rows)


@pytest.mark.parametrize(
    ("task", "losses", "accuracies", "figure", "bound", "holds"),
    [
        ("copying-40", (0.2, 0.2599), (None, None), "loss, nats", 0.26, True),
        ("copying-40", (0.2, 0.2601), (None, None), "loss, nats", 0.26, False),
        ("characters", (2.0 * math.log(2), 2.059 * math.log(2)), (None, None), "bits per character", 2.06, True),
        ("characters", (2.0 * math.log(2), 2.061 * math.log(2)), (None, None), "bits per character", 2.06, False),
        ("mnist-rows", (0.1, 0.1), (0.97, 0.961), "right", 0.96, True),
        ("mnist-rows", (0.1, 0.1), (0.97, 0.959), "right", 0.96, False),
        ("mnist-7x7", (0.1, 0.1), (0.9, 0.881), "right", 0.88, True),
        ("context-decision", (0.1, 0.1), (0.9, 0.879), "right", 0.88, False),
    ],
)
def test_claims_have_the_bounds_that_were_promised(task, losses, accuracies, figure, bound, holds):
    # A third seed that only one of the two has does not count.
    lines = [line_of("bptt", seed, [losses[0]], accuracy=accuracies[0]) for seed in (0, 1)]
    lines += [line_of("anp-feedback", seed, [losses[1]], accuracy=accuracies[1]) for seed in (1, 0)]
    lines += [line_of("anp-feedback", 2, [9.0], accuracy=0.0)]
    for line in lines:
        line["task"] = task
    ((group, mine),) = tables.groups_of(lines).items()
    (claim,) = promised.claims_of(group, tables.rows_of(mine), losses[0])
    (unsolved,) = promised.claims_of(group, tables.rows_of(mine), 0.99 * losses[0])
    assert (claim.counts, unsolved.counts) == (True, False)
    assert (claim.task, claim.figure, claim.seeds, claim.holds) == (task, figure, 2, holds)
    assert claim.bound == pytest.approx(bound)
    gap = accuracies[1] - accuracies[0] if figure == "right" else losses[1] - losses[0]
    unit = math.log(2) if figure.startswith("bits") else 1
    assert claim.apart == pytest.approx((gap / unit, gap / unit))
    assert promised.claims_of(group, tables.rows_of(mine)[:1], 1.0) == []
    assert promised.claims_of(group._replace(task="copying-2"), tables.rows_of(mine), 1.0) == []


def test_a_run_that_broke_off_shows_as_such():
    lines = [*(line_of("bptt", seed, [0.5]) for seed in range(2)), *(line_of("np", seed, [0.5]) for seed in range(2))]
    lines[-1]["curve"] = {name: values[:3] for name, values in lines[-1]["curve"].items()}
    row = rows_by_name(lines)["np"]
    assert row.losses == (0.5, math.inf)
    assert row.areas == (0.5, math.inf)
    assert len(row.curves) == 1
    group, mine = next(iter(tables.groups_of(lines).items()))
    assert "| np | 0.001 | 2 | broke off |" in tables.table(group, mine, tables.rows_of(mine))


def test_pairs_are_of_one_seed():
    lines = [line_of("bptt", seed, [0.1 * (seed + 1)]) for seed in range(8)]
    lines += [line_of("np", seed, [0.1 * (seed + 1) + 0.01 * (seed + 1)]) for seed in (7, 6, 5, 4, 3, 2)]
    lines += [line_of("wp", seed, [0.1]) for seed in range(made.FEWEST_PAIRS - 1)]
    # Six pairs, all above: paired by place, some would lie below. Five are too few.
    assert tables.against(tables.rows_of(lines)) == {"np": pytest.approx(2 / 64)}


def test_online_runs_are_tested_on_their_online_figure():
    lines = [line_of("bptt", seed, [0.5], window=25) for seed in range(6)]
    lines += [line_of("snap-1", seed, [0.9], window=1) for seed in range(6)]
    for line in lines[6:]:
        line["curve"]["records"] = [0.5] * 6
    assert tables.against(tables.rows_of(lines)) == {"snap-1": pytest.approx(2 / 64)}
    for line in lines[6:]:
        line["curve"]["records"] = lines[0]["curve"]["records"]
    assert tables.against(tables.rows_of(lines)) == {"snap-1": 1.0}


def test_a_rival_in_windows_has_a_row_of_its_own():
    lines = [line_of("snap-1", 0, [0.5], window=window) for window in (1, 25)] + [line_of("bptt", 0, [0.5], window=25)]
    assert [row.name for row in tables.rows_of(lines)] == ["bptt", "snap-1", "snap-1 in windows"]
    entry = Entry("copying-2", 240, 8, seeds=1, window=25)
    assert not {"bptt", "snap-1", "snap-1 in windows"} & set(tables.lacking(entry, "rnn", tables.rows_of(lines)))
    assert tables.lacking(entry, "rnn", tables.rows_of(lines[2:]))["snap-1 in windows"] == "0 of 1"


def test_trials_to_criterion_and_online_figures():
    lines = [line_of("snap-1", 0, [0.5], accuracy=0.85, window=1)]
    ((group, mine),) = tables.groups_of(lines).items()
    (row,) = tables.rows_of(mine)
    assert group.window
    assert (row.trials, row.seconds) == (10 * 8, None)
    assert row.online == (3.0,)
    assert "sketched-RTRL" in tables.printed("lorenz")
    assert tables.printed("lorenz").count("\n") == 1 + len(tables.PRINTED["lorenz"])
    assert tables.printed("copying-2") == ""


def about(value):
    """Return a value of JSON with its numbers to nine digits, in which another version of numpy may differ."""
    if isinstance(value, dict):
        return {name: about(part) for name, part in value.items()}
    if isinstance(value, list):
        return [about(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_the_published_result_follows_from_its_lines(capsys):
    folder = study_rivals.RESULTS
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert len({study_rivals.key_of_line(line) for line in lines}) == len(lines)
    published = json.loads((folder / "rivals.json").read_text())
    computed = json.loads(json.dumps(tables.summarised(lines, FULL)))
    # NaN, the bounds of a single seed, is not equal to itself.
    for ours, theirs in zip(computed["groups"], published["groups"], strict=True):
        # Computed from the series anew, whose powers are not of every processor the same.
        assert ours.pop("guesses") == pytest.approx(theirs.pop("guesses"), rel=0.1)
    kept = {name: about(published[name]) for name in computed}
    assert json.dumps(kept) == json.dumps(about(computed))
    assert {"cpu", "date", "commit"} <= set(published["machine"])
    assert capsys.readouterr().err == ""
