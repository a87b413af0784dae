"""The published tables of the study of rivals, from profiling/results/rivals/rivals.json.

A table has a row for each method that has run, and under them one that names what is planned and not made yet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from statistics import median

from docs_tables import ABSENT, MINUS, Rows, percent, significant, without_zero

BOUNDS = (math.log(8) / 2, 0.5, 0.25)
"""Losses, in nats, of which seconds are published: the first is half of guessing."""

TUNING_SEED = 100

MNIST = ("mnist-rows", "mnist-7x7", "mnist-14x14")
PIXELS = "mnist-28x28"
OTHERS = ("copying-10", "copying-20", "copying-100", "adding-50", "adding-100", "mnist-7x7-permuted")
SERIES = ("mackey-glass", "lorenz")
DECIDING = ("perceptual-decision", "context-decision", "delayed-match")
DECISIONS = (*DECIDING, "perceptual-reward")

WORDS = {"bptt": "BPTT", "bptt-1": "BPTT cut to one step", "bptt-8": "BPTT cut to 8 steps"}
MACHINES = {"AMD EPYC": "EPYC", "Intel(R) Xeon(R) Processor": "Xeon"}
CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "dale": "Dale's law"}
WINDOWED = " in windows"


def name_of(row: str) -> str:
    row, at, rate = row.partition(" at ")
    if at:
        return f"{name_of(row)}, rate {rate}"
    if row.endswith(WINDOWED):
        return f"{name_of(row.removesuffix(WINDOWED))}, windows of 25"
    method, _, optimiser = row.partition(", ")
    return WORDS.get(method, f"`{method}`") + (f", {optimiser}" if optimiser else "")


def loss(value: float | None) -> str:
    if value is None:
        return ABSENT
    return without_zero(significant(value)) if math.isfinite(value) else "broke off"


def spread(found: dict | None, show: Callable[[float], str] = loss) -> str:
    """Return a mean with its interval, of which one seed has none."""
    if found is None:
        return ABSENT
    ends = [found["low"], found["high"]]
    bounds = f" [{', '.join(map(show, ends))}]" if all(math.isfinite(end) for end in ends) else ""
    return show(found["mean"]) + bounds


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def bits(value: float) -> str:
    return significant(value / math.log(2), 4)


def count(value: float | None, *, first: bool = False) -> str:
    """Return a cost, with "≤" where it is that of a curve's first look."""
    return ABSENT if value is None else ("≤ " if first else "") + significant(value, 2)


def milliseconds(value: float | None) -> str:
    return ABSENT if value is None else significant(1e3 * value, 2)


def machine(group: dict, row: dict) -> str:
    """Return the machine of a row's seconds, if it has any, and of how many seeds they are where not of all."""
    if row["per_update"] is None:
        return ABSENT
    share_of = f", {row['clocked']} of {len(row['seeds'])}" if row["clocked"] < len(row["seeds"]) else ""
    return MACHINES.get(group["timed_on"], group["timed_on"]) + share_of


def of(result: dict, *tasks: str) -> list[dict]:
    """Return the groups of some tasks, in the order of the tasks."""
    return [group for task in tasks for group in result["groups"] if group["task"] == task]


def missing(group: dict, columns: int) -> Rows:
    """Return a row that names the methods of which no seed is made, if there are any."""
    names = [name_of(name) for name, made in group["lacking"].items() if made.startswith("0 ")]
    return [[f"not made yet: {', '.join(names)}", *[ABSENT] * (columns - 1)]] if names else []


def seeds(group: dict, row: dict) -> str:
    """Return the number of seeds, "3 of 5" where more are planned."""
    planned = group["lacking"].get(row["name"].split(" at ")[0], "").partition(" of ")[2]
    return f"{len(row['seeds'])} of {planned}" if planned else str(len(row["seeds"]))


def rivals_claims(result: dict) -> Rows:
    """What learned feedback promises, beside BPTT: mean over seeds, and the bound; what is not made yet comes last."""

    def shown(claim: dict, name: str) -> str:
        return percent(claim[name], 1) if claim["figure"] == "right" else loss(claim[name])

    def apart(claim: dict) -> str:
        shown_of = (lambda value: f"{100 * value:+.1f}") if claim["figure"] == "right" else signed
        return f"{shown_of(claim['apart'][0])} to {shown_of(claim['apart'][1])}".replace("-", MINUS)

    promised = ("copying-40", *MNIST, "characters", *DECIDING)
    made = [claim for task in promised for claim in result["claims"] if claim["task"] == task]
    missing_tasks = [task for task in promised if task not in {claim["task"] for claim in made}]
    rows = [
        [
            f"{claim['task']}{sized(result, claim)}, {CELLS[claim['cell']]}",
            claim["figure"],
            str(claim["seeds"]),
            *(f"{rate:g}" for rate in claim["rates"]),
            {None: "the one there is", True: "its own", False: "BPTT's"}[claim["own"]],
            *(shown(claim, name) for name in ("bptt", "feedback")),
            apart(claim),
            ("≥ " if claim["figure"] == "right" else "≤ ") + shown(claim, "bound"),
            ("yes" if claim["holds"] else "no") + ("" if claim["counts"] else ", but BPTT does not solve it"),
        ]
        for claim in made
    ]
    return rows + [[task, *[ABSENT] * 9, "not made yet"] for task in missing_tasks]


def sized(result: dict, of_what: dict) -> str:
    """Return the updates of a group or claim where its task has several sizes; "" elsewhere."""
    sizes = {group["amount"] for group in of(result, of_what["task"]) if group["cell"] == of_what["cell"]}
    return f", {of_what['amount']:,} updates" if len(sizes) > 1 else ""


def signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + without_zero(significant(abs(value), 2))


def rivals_spent(result: dict) -> Rows:
    """How many runs each machine made, and how long they took."""
    return [
        [name, str(spent["runs"]), f"{spent['processor_seconds'] / 60:.0f}"] for name, spent in result["spent"].items()
    ]


def rate(row: dict) -> str:
    """Return a row's learning rate, and whether short runs chose it for this method."""
    return f"{row['rate']:g}" + (", own" if row["own"] else "")


def rivals_copying(result: dict) -> Rows:
    """Copying after 40 steps: test loss, and what it costs to solve it."""
    rows = []
    for group in of(result, "copying-40"):
        for row in group["rows"]:
            costs = [milliseconds(row["per_update"]), count(row["seconds"], first=row["first_seconds"])]
            costs += [machine(group, row), count(row["rollout_steps"], first=row["first_steps"])]
            how = [str(row["rollouts"] or ABSENT), rate(row), seeds(group, row)]
            rows.append([name_of(row["name"].split(" at ")[0]), *how, spread(row["loss"]), *costs])
        rows += missing(group, 9)
    return rows


def classified(result: dict, tasks: Sequence[str]) -> Rows:
    """Return rows of tasks with a right answer."""
    rows = []
    for task in tasks:
        groups = of(result, task)
        for group in groups:
            title = task + sized(result, group) + ("" if group["cell"] == "rnn" else f", {CELLS[group['cell']]}")
            for row in group["rows"]:
                how = [str(row["rollouts"] or ABSENT), seeds(group, row)]
                figures = [spread(row["accuracy"], share), spread(row["loss"])]
                costs = [milliseconds(row["per_update"]), count(row["seconds"], first=row["first_seconds"])]
                costs += [machine(group, row), count(row["trials"], first=row["first_trials"])]
                rows.append([title, name_of(row["name"]), *how, *figures, *costs])
            rows += [[title, *line] for line in missing(group, 9)]
        if not groups:
            rows.append([task, "no run is made yet", *[ABSENT] * 8])
    return rows


def rivals_seconds(lines: Sequence[str]) -> Rows:
    """Seconds to a loss, medians over the seeds of study_curves.py, and over BPTT's to the middle one."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for run in map(json.loads, lines):
        how = run["settings"]
        if how["seed"] != TUNING_SEED:
            groups.setdefault((how["method"], how["rollouts"]), []).append(run["curve"])

    def reached(curve: dict, bound: float) -> float:
        pairs = zip(curve["seconds"], curve["test"], strict=True)
        return next((spent for spent, (score, _) in pairs if score <= bound), math.inf)

    times = {
        name: [median(reached(curve, bound) for curve in curves) for bound in BOUNDS] for name, curves in groups.items()
    }
    exact = next(spent for (method, _), spent in times.items() if method == "bptt")
    rows = []
    for (method, rollouts), spent in times.items():
        shown = [significant(value, 2) if math.isfinite(value) else "never" for value in spent]
        over = significant(spent[1] / exact[1], 2) if math.isfinite(spent[1]) else ABSENT
        rows.append([name_of(method), ABSENT if method == "bptt" else str(rollouts), *shown, over])
    return rows


def rivals_mnist(result: dict) -> Rows:
    """MNIST: test accuracy and loss."""
    return [row[:-1] for row in classified(result, MNIST)]


def rivals_pixels(result: dict) -> Rows:
    """MNIST, all 784 pixels one by one."""
    return [row[:-1] for row in classified(result, (PIXELS,))]


def rivals_others(result: dict) -> Rows:
    """Tasks that nothing was promised of: mean test loss of each method at its own learning rate, and seeds."""
    rows = []
    for group in of(result, *OTHERS):
        for row in group["rows"]:
            if row["own"] is not False:
                costs = [milliseconds(row["per_update"]), machine(group, row)]
                how = [str(row["rollouts"] or ABSENT), rate(row), seeds(group, row)]
                solved = "yes" if row["loss"]["mean"] <= group["solved"] else "no"
                title = f"{group['task']}, {group['start']}"
                rows.append([title, name_of(row["name"].split(" at ")[0]), *how, spread(row["loss"]), solved, *costs])
    return rows


def rivals_decisions(result: dict) -> Rows:
    """Tasks of neurogym: share of right decisions on new trials, and trials to 80 %."""
    return classified(result, DECISIONS)


def rivals_series(result: dict) -> Rows:
    """Online NMSE beside what the sketched-RTRL release prints: mean with interval, mean ± deviation."""
    groups = [of(result, task)[0] for task in SERIES]
    ours = [{row["name"]: row for row in group["rows"]} for group in groups]
    theirs = [{PRINTED_AS.get(name, name): value for name, value in group["printed"].items()} for group in groups]
    rows = []
    for guess in groups[0]["guesses"]:
        cells = [cell for group in groups for cell in (ABSENT, significant(group["guesses"][guess], 2), ABSENT)]
        rows.append([GUESSES[guess], *cells])
    for name in dict.fromkeys(name for part in (*ours, *theirs) for name in part):
        cells = []
        for group, mine, published in zip(groups, ours, theirs, strict=True):
            cells.append("{:.4f} ± {:.4f} ({})".format(*published[name]) if name in published else ABSENT)
            row = mine.get(name)
            cells += (
                [spread(row["nmse"], nmse), seeds(group, row)] if row else [ABSENT, group["lacking"].get(name, ABSENT)]
            )
        rows.append([name if name.startswith(("sketched", "KF")) else name_of(name), *cells])
    silent = {name: made for name, made in groups[0]["lacking"].items() if name not in theirs[0]}
    return rows + missing({"lacking": silent}, 7)


GUESSES = {"persistence": "the last value again", "linear": "linear, of four values"}

PRINTED_AS = {"BPTT in windows of 25": "bptt"}
"""Rows of the release by our name."""


def nmse(value: float) -> str:
    return f"{value:.4f}"


def over(row: dict, exact: dict) -> str:
    """Return a row's mean loss over another's, of the seeds that both have."""
    mine, other = (dict(zip(part["seeds"], part["losses"], strict=True)) for part in (row, exact))
    shared = sorted(set(mine) & set(other))
    ratio = sum(mine[seed] for seed in shared) / sum(other[seed] for seed in shared) if shared else math.nan
    return without_zero(f"{ratio:.3f}") if shared else ABSENT


def rivals_characters(result: dict) -> Rows:
    """Bits per character of a text's held-out part at own learning rates, and the loss over BPTT's, seed by seed."""
    rows = []
    for group in of(result, "characters"):
        own = {row["name"].split(" at ")[0]: row for row in group["rows"] if row["own"] is not False}
        for name, row in own.items():
            how = [str(row["rollouts"] or ABSENT), rate(row), seeds(group, row)]
            costs = [milliseconds(row["per_update"]), machine(group, row)]
            figures = [spread(row["loss"], bits), over(row, own["bptt"])]
            rows.append([CELLS[group["cell"]], name_of(name), *how, *figures, *costs])
        rows += [[CELLS[group["cell"]], *line] for line in missing(group, 8)]
    return rows


TABLES: dict[str, Callable[..., Rows]] = {
    table.__name__: table
    for table in (
        rivals_characters,
        rivals_claims,
        rivals_copying,
        rivals_decisions,
        rivals_mnist,
        rivals_others,
        rivals_pixels,
        rivals_seconds,
        rivals_series,
        rivals_spent,
    )
}
