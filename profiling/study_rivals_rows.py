"""Rows of the tables of `study_rivals.py`: what the runs of one task say of each method, over seeds and machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from study_grid import TUNING_SEED, final, last_valid_loss
from study_rivals_plan import WINDOWS
from study_rivals_runs import METHODS
from study_statistics import area, holm, nmse, paired, reached

__all__ = [
    "AT",
    "EXACT",
    "FEWEST_PAIRS",
    "Group",
    "Row",
    "against",
    "exact_of",
    "groups_of",
    "name_of",
    "rows_of",
    "test_losses",
    "timed_on",
]

EXACT = "bptt"

AT = " at "
"""Between a method and its learning rate, where a table has several of one method."""

WINDOWED = " in windows"
"""Of a rival that updates as often as BPTT where it could more often."""

KIND = ("method", "optimiser", "cell", "start", "hidden", "batch", "rollouts", "window", "device")
"""Settings that a run shares with those that chose its learning rate."""

CRITERION = 0.8
"""Share of right decisions of "trials to criterion"."""

FEWEST_PAIRS = 6
"""Of fewer, no p of Wilcoxon's test is below .05."""


class Group(NamedTuple):
    """What the rows of a table have in common."""

    task: str
    cell: str
    start: str
    hidden: int
    batch: int
    window: bool
    """Whether the task is online: then updates differ and time steps are equal."""
    amount: int
    """Updates, or time steps."""
    device: str


class Row(NamedTuple):
    """A method in a group, over its seeds."""

    name: str
    rate: float
    rollouts: int
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    """Empty for a regression."""
    areas: tuple[float, ...]
    per_update: float | None
    """Seconds: the median over the seeds that ran on the machine of `timed_on`; None without any."""
    seconds: float | None
    """Median over those seeds to the loss that counts as solved; None where half of them or more never come there."""
    rollout_steps: float | None
    trials: float | None
    """Median number of sequences to `CRITERION`."""
    first_seconds: bool
    first_steps: bool
    first_trials: bool
    """Whether the median of `seconds`, `rollout_steps` or `trials` is that of the first look: it may have been less."""
    own: bool | None
    """Whether its tuning chose the learning rate; None where nothing was to be chosen."""
    clocked: int
    """Runs whose seconds count."""
    online: tuple[float, ...]
    """NMSE of online runs, as the sketched-RTRL release computes it."""
    curves: tuple[dict, ...]
    timed: tuple[dict, ...]
    """Those of the curves whose seconds count."""


def name_of(method: str, optimiser: str, *, windowed: bool = False) -> str:
    """Return the name of a row."""
    return method + ("" if optimiser == "adam" else ", RMSprop") + (WINDOWED if windowed else "")


def row_of(run: dict) -> str:
    """Return the name of the row of a run, without its learning rate."""
    how = run["settings"]
    windowed = how["window"] > WINDOWS.get(how["method"], how["window"])
    return name_of(how["method"], how["optimiser"], windowed=windowed)


def groups_of(runs: Sequence[dict]) -> dict[Group, list[dict]]:
    """Sort the result runs by group, in the order of their first lines."""
    groups: dict[Group, list[dict]] = {}
    for run in runs:
        how = run["settings"]
        if how["seed"] == TUNING_SEED:
            continue
        amount = how["updates"] * max(how["window"], 1)
        place = (how["cell"], how["start"], how["hidden"], how["batch"], how["window"] > 0, amount, how["device"])
        groups.setdefault(Group(run["task"], *place), []).append(run)
    return groups


def timed_on(runs: Sequence[dict]) -> str:
    """Return the machine whose seconds count for a group: where most of its methods ran, of equal ones the latest."""
    methods = {(run["machine"], row_of(run)) for run in runs}
    rows, latest = Counter(machine for machine, _ in methods), {run["machine"]: place for place, run in enumerate(runs)}
    return max(rows, key=lambda machine: (rows[machine], latest[machine]))


def median_cost(runs: Sequence[dict], column: str, height: Callable[[dict], list[float]], bound: float) -> float | None:
    """Return the median over runs of what was spent until a curve fell to a bound; None where half never did."""
    if not runs:
        return None
    spent = [reached(run["curve"][column], height(run["curve"]), bound) for run in runs]
    middle = float(np.median([math.inf if value is None else value for value in spent]))
    return middle if math.isfinite(middle) else None


def at_first(runs: Sequence[dict], height: Callable[[dict], list[float]], bound: float) -> bool:
    """Return whether the median of runs is below a bound at their first look."""
    looks = {run["curve"]["updates"][0] for run in runs if run["curve"]["updates"]}
    return median_cost(runs, "updates", height, bound) in looks


def test_losses(curve: dict) -> list[float]:
    return [score[0] for score in curve["test"]]


def wrong(curve: dict) -> list[float]:
    return [1.0 if score[1] is None else 1 - score[1] for score in curve["test"]]


def area_of(run: dict) -> float:
    return area(run["curve"]["updates"], test_losses(run["curve"]))


def chosen(run: dict, every: Sequence[dict]) -> float | None:
    """Return the learning rate that tuning chose for runs of the same kind; None where it had nothing to choose."""

    def kind(line: dict) -> tuple:
        return line["task"], *(line["settings"][name] for name in KIND)

    trials = [line for line in every if line["settings"]["seed"] == TUNING_SEED and kind(line) == kind(run)]
    best = min(trials, key=last_valid_loss, default=None)
    return None if best is None else best["settings"]["lr"]


def rows_of(runs: Sequence[dict], every: Sequence[dict] = ()) -> list[Row]:
    """Return the rows of one group, in the order of `METHODS`; `every` has the runs that chose learning rates."""
    by_rate: dict[str, dict[float, list[dict]]] = {}
    for run in runs:
        by_rate.setdefault(row_of(run), {}).setdefault(run["settings"]["lr"], []).append(run)
    by_name = {
        name if len(rates) == 1 else f"{name}{AT}{rate:g}": mine
        for name, rates in by_rate.items()
        for rate, mine in sorted(rates.items())
    }
    order = {method: number for number, method in enumerate(METHODS)}
    named = sorted(by_name.items(), key=lambda item: (order[item[1][0]["settings"]["method"]], item[0]))
    # What counts as solved is what the latest run says.
    where, solved = timed_on(runs), runs[-1]["solved"]
    return [_row(name, mine, where, solved, every) for name, mine in named]


def _row(name: str, runs: Sequence[dict], where: str, solved: float, every: Sequence[dict]) -> Row:
    """Return a row from the runs of a method at one learning rate."""
    mine = sorted(runs, key=lambda run: run["settings"]["seed"])
    how, rate = mine[0]["settings"], chosen(mine[0], every)
    ends = {run["settings"]["seed"]: final(run, "test") for run in mine}
    whole = [run for run in mine if math.isfinite(ends[run["settings"]["seed"]].loss)]
    timed = [run for run in mine if run["machine"] == where]
    times = [run["curve"]["seconds"][-1] / run["curve"]["updates"][-1] for run in timed if run["curve"]["updates"]]
    # An online run has no such loss: its task is to learn fast, and persistence is its scale.
    online = how["window"] > 0
    counted = how["rollouts"] > 0 and not online
    to_criterion = median_cost(mine, "updates", wrong, 1 - CRITERION)
    return Row(
        name=name,
        rate=how["lr"],
        rollouts=how["rollouts"],
        seeds=tuple(ends),
        losses=tuple(end.loss for end in ends.values()),
        accuracies=tuple(end.accuracy for end in ends.values() if end.accuracy is not None),
        areas=tuple(area_of(run) if run in whole else math.inf for run in mine),
        per_update=float(np.median(times)) if times else None,
        seconds=None if online else median_cost(timed, "seconds", test_losses, solved),
        rollout_steps=median_cost(mine, "rollout_steps", test_losses, solved) if counted else None,
        trials=None if to_criterion is None else to_criterion * how["batch"],
        first_seconds=at_first(timed, test_losses, solved),
        first_steps=at_first(mine, test_losses, solved),
        first_trials=at_first(mine, wrong, 1 - CRITERION),
        own=None if rate is None else rate == how["lr"],
        clocked=len(timed),
        online=tuple(nmse(run["curve"]["records"]) for run in mine) if online else (),
        curves=tuple(run["curve"] for run in whole),
        timed=tuple(run["curve"] for run in whole if run["machine"] == where),
    )


def exact_of(rows: Sequence[Row]) -> Row | None:
    """Return BPTT's row, of several learning rates that of the lowest mean loss; None where BPTT has not run."""
    mine = [row for row in rows if row.name.split(AT)[0] == EXACT]
    return min(mine, key=lambda row: float(np.mean(row.losses)), default=None)


def against(rows: Sequence[Row]) -> dict[str, float]:
    """Return Holm's p of every row against BPTT, over the seeds that both have; {} without BPTT.

    Of test losses, of an online task of its NMSE. `FEWEST_PAIRS` are needed, and BPTT is not tested against itself.
    """
    exact = exact_of(rows)
    if exact is None:
        return {}

    def by_seed(row: Row) -> dict[int, float]:
        return dict(zip(row.seeds, row.online or row.losses, strict=True))

    reference = by_seed(exact)
    names, p_values = [], []
    for row in rows:
        pairs = [(loss, reference[seed]) for seed, loss in by_seed(row).items() if seed in reference]
        if row.name.split(AT)[0] != EXACT and len(pairs) >= FEWEST_PAIRS:
            names.append(row.name)
            p_values.append(paired(*zip(*pairs, strict=True)))
    return dict(zip(names, holm(p_values), strict=True))
