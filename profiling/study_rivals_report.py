"""Tables and plots of `study_rivals.py`, from the lines of its finished runs alone.

A group is a task with a cell, a start and sizes; its rows are methods. Where not even BPTT comes to the loss that
counts as solved, the text above the table says so, and the table says nothing of credit through time. Runs that the
plan has and that are not made are said to be missing. Runs may come from several machines: losses are of all of them,
seconds of one, which is named.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import line
from study_grid import TUNING_SEED, final
from study_rivals_plan import Entry, Grid, left_out, ways
from study_rivals_runs import METHODS
from study_statistics import Interval, area, holm, interval, nmse, paired, reached

__all__ = ["PRINTED", "Group", "Row", "claims_of", "groups_of", "lacking", "report", "rows_of", "sentence", "table"]

EXACT, OURS = "bptt", "anp-feedback"

AT = " at "
"""Between a method and its learning rate, where a table has several of one method."""

NEUROGYM = ("perceptual-decision", "context-decision", "delayed-match")

POINTS = {"mnist-rows": 1, "mnist-7x7": 2, "mnist-14x14": 2, **dict.fromkeys(NEUROGYM, 2)}
"""Points of accuracy by which learned feedback may be behind BPTT, after as many updates."""

CRITERION = 0.8
"""Share of right decisions of "trials to criterion"."""

PRINTED = {
    "mackey-glass": {
        "rtrl": (0.0180, 0.0218, 10),
        "sketched, rank 16": (0.0105, 0.0091, 10),
        "sketched, rank 4": (0.0065, 0.0053, 10),
        "snap-1": (0.0050, 0.0010, 10),
        "rflo": (0.0572, 0.0331, 10),
        "uoro": (0.0497, 0.0238, 10),
        "BPTT in windows of 25": (0.0080, 0.0010, 5),
    },
    "lorenz": {
        "rtrl": (0.0051, 0.0040, 10),
        "sketched, rank 16": (0.0128, 0.0296, 10),
        "sketched, rank 4": (0.0038, 0.0021, 10),
        "snap-1": (0.0024, 0.0008, 10),
        "rflo": (0.0442, 0.0124, 10),
        "uoro": (0.0425, 0.0431, 10),
        "BPTT in windows of 25": (0.0054, 0.0007, 5),
    },
}
"""NMSE as printed in results/TIMESERIES_TABLES.md of github.com/sonaradarcn/sketched-rtrl (Table 6): mean, standard
deviation over seeds, seeds."""


CONDITIONS = (
    "Learning rates are those under a task's title, the same for all its methods; of several the one with the lowest "
    "validation loss in runs of a quarter of the updates, of a seed of their own. Intervals: 95 % of the bootstrap's "
    "means. p: exact Wilcoxon test of pairs of one seed, corrected by Holm for the rows of a table; of n seeds none is "
    "below 2^(1 - n). Until solved: the median over seeds, empty where half of them never are."
)


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
    online: tuple[float, ...]
    """NMSE of online runs, as the sketched-RTRL release computes it."""
    curves: tuple[dict, ...]
    timed: tuple[dict, ...]
    """Those of the curves whose seconds count."""


def name_of(method: str, optimiser: str) -> str:
    """Return the name of a row."""
    return method + ("" if optimiser == "adam" else ", RMSprop")


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
    methods = {(run["machine"], name_of(run["settings"]["method"], run["settings"]["optimiser"])) for run in runs}
    rows, latest = Counter(machine for machine, _ in methods), {run["machine"]: place for place, run in enumerate(runs)}
    return max(rows, key=lambda machine: (rows[machine], latest[machine]))


def median_cost(runs: Sequence[dict], column: str, height: Callable[[dict], list[float]], bound: float) -> float | None:
    """Return the median over runs of what was spent until a curve fell to a bound; None where half never did."""
    if not runs:
        return None
    spent = [reached(run["curve"][column], height(run["curve"]), bound) for run in runs]
    middle = float(np.median([math.inf if value is None else value for value in spent]))
    return middle if math.isfinite(middle) else None


def test_losses(curve: dict) -> list[float]:
    return [score[0] for score in curve["test"]]


def wrong(curve: dict) -> list[float]:
    return [1.0 if score[1] is None else 1 - score[1] for score in curve["test"]]


def area_of(run: dict) -> float:
    return area(run["curve"]["updates"], test_losses(run["curve"]))


def rows_of(runs: Sequence[dict]) -> list[Row]:
    """Return the rows of one group, in the order of `METHODS`."""
    where = timed_on(runs)
    by_rate: dict[str, dict[float, list[dict]]] = {}
    for run in runs:
        how = run["settings"]
        by_rate.setdefault(name_of(how["method"], how["optimiser"]), {}).setdefault(how["lr"], []).append(run)
    by_name = {
        name if len(rates) == 1 else f"{name}{AT}{rate:g}": mine
        for name, rates in by_rate.items()
        for rate, mine in sorted(rates.items())
    }
    order = {method: number for number, method in enumerate(METHODS)}
    rows = []
    for name, unordered in sorted(by_name.items(), key=lambda item: (order[item[1][0]["settings"]["method"]], item[0])):
        mine = sorted(unordered, key=lambda run: run["settings"]["seed"])
        ends = [final(run, "test") for run in mine]
        how, solved = mine[0]["settings"], mine[0]["solved"]
        timed = [run for run in mine if run["machine"] == where]
        times = [run["curve"]["seconds"][-1] / run["curve"]["updates"][-1] for run in timed if run["curve"]["updates"]]
        whole = [run for run, end in zip(mine, ends, strict=True) if math.isfinite(end[0])]
        to_criterion = median_cost(mine, "updates", wrong, 1 - CRITERION)
        rows.append(
            Row(
                name,
                how["lr"],
                how["rollouts"],
                tuple(run["settings"]["seed"] for run in mine),
                tuple(loss for loss, _ in ends),
                tuple(accuracy for _, accuracy in ends if accuracy is not None),
                tuple(math.inf if math.isinf(end[0]) else area_of(run) for run, end in zip(mine, ends, strict=True)),
                float(np.median(times)) if times else None,
                median_cost(timed, "seconds", test_losses, solved),
                median_cost(mine, "rollout_steps", test_losses, solved) if how["rollouts"] else None,
                None if to_criterion is None else to_criterion * how["batch"],
                tuple(nmse(run["curve"]["records"]) for run in mine) if how["window"] else (),
                tuple(run["curve"] for run in whole),
                tuple(run["curve"] for run in whole if run["machine"] == where),
            )
        )
    return rows


def exact_of(rows: Sequence[Row]) -> Row | None:
    """Return BPTT's row, of several learning rates that of the lowest mean loss; None where BPTT has not run."""
    mine = [row for row in rows if row.name.split(AT)[0] == EXACT]
    return min(mine, key=lambda row: float(np.mean(row.losses)), default=None)


def against(rows: Sequence[Row]) -> dict[str, float]:
    """Return Holm's p of every row's losses against BPTT's, over the seeds that both have; {} without BPTT."""
    exact = exact_of(rows)
    if exact is None:
        return {}
    reference = dict(zip(exact.seeds, exact.losses, strict=True))
    names, p_values = [], []
    for row in rows:
        pairs = [(loss, reference[seed]) for seed, loss in zip(row.seeds, row.losses, strict=True) if seed in reference]
        if row.name != exact.name and pairs:
            names.append(row.name)
            p_values.append(paired(*zip(*pairs, strict=True)))
    return dict(zip(names, holm(p_values), strict=True))


def sentence(runs: Sequence[dict], rows: Sequence[Row]) -> str:
    """Say whether BPTT solves the task, and what the bound is."""
    chance, solved, unit = (runs[0][name] for name in ("chance", "solved", "unit"))
    bound = f"{solved:.4g} {unit} (a guess that looks at nothing: {chance:.4g})"
    exact = exact_of(rows)
    if exact is None:
        return f"Solved means {bound}. BPTT has not run: nothing says whether the task can be solved so."
    mean = float(np.mean(exact.losses))
    if mean <= solved:
        return f"BPTT solves it: {mean:.4g}; solved means {bound}."
    return f"**BPTT does not solve it: {mean:.4g}, where solved means {bound}. The table does not count.**"


def entry_of(group: Group, grid: Grid) -> Entry | None:
    """Return the entry of a grid that plans a group; None where the grid has changed since."""
    for entry in grid.entries:
        same = (entry.task, entry.hidden, entry.batch, entry.steps) == (*group[:1], *group[3:5], group.amount)
        if same and group.cell in entry.cells and group.start in entry.starts:
            return entry
    return None


def lacking(entry: Entry, cell: str, rows: Sequence[Row]) -> dict[str, str]:
    """Return how many seeds of a planned group were made, "0 of 5", by the names of the rows that lack some."""
    made: dict[str, int] = {}
    for row in rows:
        name = row.name.split(AT)[0]
        made[name] = max(made.get(name, 0), len(row.seeds))
    names = [name_of(*way[:2]) for way in ways(entry, cell) if not way.rate_of]
    return {name: f"{made.get(name, 0)} of {entry.seeds}" for name in names if made.get(name, 0) < entry.seeds}


def planned(group: Group, grid: Grid, rows: Sequence[Row]) -> str:
    """Say with which learning rates a group is tuned, what of it is missing, and who is left out."""
    entry = entry_of(group, grid)
    if entry is None:
        return "The plan no longer has runs of these sizes."
    said = [f"Learning rates: {', '.join(f'{rate:g}' for rate in entry.rates or grid.rates)}."]
    if short := lacking(entry, group.cell, rows):
        said.append(f"Not made yet, seeds: {', '.join(f'{name} {count}' for name, count in short.items())}.")
    if slow := left_out(entry, group.cell):
        said.append(f"Left out for their time: {', '.join(slow)}.")
    return " ".join(said)


class Claim(NamedTuple):
    """A bound on learned feedback beside BPTT, mean over the seeds that both have."""

    task: str
    cell: str
    figure: str
    rates: tuple[float, float]
    """Learning rates of BPTT and of learned feedback."""
    seeds: int
    bptt: float
    feedback: float
    bound: float
    """The largest, of an accuracy the smallest, that `feedback` may be."""
    holds: bool
    counts: bool
    """Whether BPTT solves the task."""


def claims_of(group: Group, rows: Sequence[Row], solved: float) -> list[Claim]:
    """Return what learned feedback promises of a group, for each learning rate it has; [] where nothing is promised."""
    exact = exact_of(rows)
    if exact is None or group.task not in ("copying-40", "characters", *POINTS):
        return []
    claims = []
    for ours in (row for row in rows if row.name.split(AT)[0] == OURS):
        seeds = sorted(set(exact.seeds) & set(ours.seeds))
        # A run that broke off has no accuracy, so that seeds and accuracies differ in number: the claim then fails.
        figures = [row.accuracies if group.task in POINTS else row.losses for row in (exact, ours)]
        by_seed = [dict(zip(row.seeds, found, strict=False)) for row, found in zip((exact, ours), figures, strict=True)]
        whole = all(len(found) == len(row.seeds) for row, found in zip((exact, ours), figures, strict=True))
        bptt, feedback = (float(np.mean([found[seed] for seed in seeds])) if whole else math.nan for found in by_seed)
        figure, bound = "right", bptt - POINTS.get(group.task, 0) / 100
        if group.task == "copying-40":
            figure, bound = "loss, nats", 1.25 * bptt + 0.01
        elif group.task == "characters":
            bptt, feedback = bptt / math.log(2), feedback / math.log(2)
            figure, bound = "bits per character", 1.03 * bptt
        holds = feedback >= bound if figure == "right" else feedback <= bound
        how = (group.task, group.cell, figure, (exact.rate, ours.rate), len(seeds))
        claims.append(Claim(*how, bptt, feedback, bound, holds, float(np.mean(exact.losses)) <= solved))
    return claims


def spelled(found: Interval, scale: float = 1.0, places: int = 4) -> str:
    """Return a mean with its interval, "broke off" where a run did."""
    if not math.isfinite(found.mean):
        return "broke off"
    mean, low, high = (f"{scale * value:.{places}f}" for value in found)
    return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"


def table(group: Group, runs: Sequence[dict], rows: Sequence[Row]) -> str:
    """Return a group's markdown table; columns that say nothing are left out."""
    p_values, in_bits = against(rows), group.task == "characters"
    count = {None: ""}
    columns: dict[str, list[str]] = {
        "": [row.name for row in rows],
        "rollouts": [str(row.rollouts or "") for row in rows],
        "learning rate": [f"{row.rate:g}" for row in rows],
        "seeds": [str(len(row.losses)) for row in rows],
        "test loss": [spelled(interval(row.losses)) for row in rows],
        "bits per character": [spelled(interval(row.losses), 1 / math.log(2), 3) for row in rows] if in_bits else [],
        "right, %": [spelled(interval(row.accuracies), 100, 1) if row.accuracies else "" for row in rows],
        "online NMSE": [spelled(interval(row.online)) if row.online else "" for row in rows],
        "mean of the curve": [spelled(interval(row.areas)) for row in rows],
        "p against BPTT": [f"{p_values[row.name]:.3f}" if row.name in p_values else "" for row in rows],
        "ms an update": ["" if row.per_update is None else f"{1e3 * row.per_update:.1f}" for row in rows],
        "s until solved": [count.get(row.seconds, f"{row.seconds or 0:.1f}") for row in rows],
        "rollout-steps until solved": [count.get(row.rollout_steps, f"{row.rollout_steps or 0:.2g}") for row in rows],
        "sequences until 80 % right": [count.get(row.trials, f"{row.trials or 0:.0f}") for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(shown), ["---"] + ["---:"] * (len(shown) - 1), *map(list, zip(*shown.values(), strict=True))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def printed(task: str) -> str:
    """Return the published table of a task beside which ours stands; "" where there is none."""
    if task not in PRINTED:
        return ""
    lines = [
        f"| {name} | {mean:.4f} ± {spread:.4f} | {seeds} |" for name, (mean, spread, seeds) in PRINTED[task].items()
    ]
    head = ["| printed by the sketched-RTRL release | online NMSE, ± over seeds | seeds |", "|---|---:|---:|"]
    return "\n".join((*head, *lines))


def title_of(group: Group) -> str:
    amount = f"{group.amount} time steps" if group.window else f"{group.amount} updates"
    return (
        f"{group.task}, {group.cell}, {group.start} start, H = {group.hidden}, {amount} of {group.batch} sequences"
        + ("" if group.device == "cpu" else f", on {group.device}")
    )


def plot(group: Group, unit: str, rows: Sequence[Row], path: Path) -> None:
    """Plot test loss against updates and against seconds: mean over seeds, lowest to highest shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for number, row in enumerate(row for row in rows if row.curves):
        losses = np.array([test_losses(curve) for curve in row.curves])
        shares = np.arange(1, losses.shape[1] + 1) / losses.shape[1]
        horizontals = [shares * group.amount]
        if row.timed:
            horizontals.append(np.mean([curve["seconds"] for curve in row.timed], axis=0))
        for axis, horizontal in zip(axes, horizontals, strict=False):
            axis.plot(horizontal, losses.mean(0), "-" if number < 10 else "--", color=f"C{number % 10}", label=row.name)
            axis.fill_between(horizontal, losses.min(0), losses.max(0), color=f"C{number % 10}", alpha=0.1)
    axes[0].set(xlabel="time steps" if group.window else "updates", ylabel=f"test loss ({unit})", yscale="log")
    axes[1].set(xlabel="seconds of the updates", xscale="log")
    axes[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title_of(group), fontsize="medium")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def summary_of(group: Group, runs: Sequence[dict], grid: Grid) -> dict[str, object]:
    """Return what rivals.json has of a group: its rows with their intervals, and what is missing."""
    rows, entry = rows_of(runs), entry_of(group, grid)
    kept = [
        {
            **{name: value for name, value in row._asdict().items() if name not in {"curves", "timed"}},
            "loss": interval(row.losses)._asdict(),
            "accuracy": interval(row.accuracies)._asdict() if row.accuracies else None,
            "nmse": interval(row.online)._asdict() if row.online else None,
            "area": interval(row.areas)._asdict(),
        }
        for row in rows
    ]
    return {
        **group._asdict(),
        "unit": runs[0]["unit"],
        "chance": runs[0]["chance"],
        "solved": runs[0]["solved"],
        "sentence": sentence(runs, rows),
        "planned": planned(group, grid, rows),
        "lacking": lacking(entry, group.cell, rows) if entry else {},
        "timed_on": timed_on(runs),
        "p": against(rows),
        "printed": PRINTED.get(group.task, {}),
        "rows": kept,
    }


def unmade(grid: Grid, groups: Sequence[Group]) -> list[str]:
    """Return the groups of a plan of which there is no run."""
    there = {(group.task, group.cell, group.start, group.amount) for group in groups}
    return [
        ", ".join((entry.task, cell, f"{start} start"))
        for entry in grid.entries
        for cell in entry.cells
        for start in entry.starts
        if (entry.task, cell, start, entry.steps) not in there
    ]


def spent_on(runs: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Return the number of runs that each machine made, and their processor time in seconds, tests included."""
    spent: dict[str, dict[str, float]] = {}
    for run in runs:
        so_far = spent.setdefault(run["machine"], {"runs": 0, "processor_seconds": 0.0})
        so_far["runs"] += 1
        so_far["processor_seconds"] += run["seconds"]
    return spent


def summarised(runs: Sequence[dict], grid: Grid) -> dict[str, object]:
    """Return what rivals.json has beside the machine: all of it follows from the runs."""
    groups = groups_of(runs)
    return {
        "spent": spent_on(runs),
        "claims": [
            claim._asdict()
            for group, mine in groups.items()
            for claim in claims_of(group, rows_of(mine), mine[0]["solved"])
        ],
        "unmade": unmade(grid, list(groups)),
        "groups": [summary_of(group, mine, grid) for group, mine in groups.items()],
    }


def report(folder: Path, runs: Sequence[dict], grid: Grid) -> None:
    """Write rivals.json, rivals.md and one PNG a group into `folder`, from the runs that are finished."""
    parts = []
    for group, mine in groups_of(runs).items():
        rows = rows_of(mine)
        name = "-".join(str(value) for value in (group.task, group.cell, group.start, group.hidden, group.amount))
        picture = f"{name}.png" if group.device == "cpu" else f"{name}-{group.device.replace(':', '')}.png"
        plot(group, mine[0]["unit"], rows, folder / picture)
        said = [f"## {title_of(group)}", sentence(mine, rows), planned(group, grid, rows)]
        said += [f"Seconds: {timed_on(mine)}.", table(group, mine, rows), printed(group.task)]
        parts.append("\n\n".join([part for part in said if part] + [f"![{group.task}]({picture})"]))
    machine = folder / "machine.json"
    record = json.loads(machine.read_text()) if machine.exists() else {}
    result, machines = summarised(runs, grid), [*record.get("earlier", []), *([record["machine"]] if record else [])]
    amounts = [
        f"{spent['runs']} on {name}, {spent['processor_seconds'] / 60:.0f} minutes of processor time"
        for name, spent in result["spent"].items()
    ]
    head = [
        "# Rivals",
        f"`python profiling/study_rivals.py`: {len(runs)} runs; {'; '.join(amounts)}.",
        *map(line, machines),
        f"Runs of commits {', '.join(record['commits'])}." if record else "",
        CONDITIONS,
        f"No run is made yet of: {'; '.join(result['unmade'])}." if result["unmade"] else "",
    ]
    (folder / "rivals.md").write_text("\n\n".join([section for section in head if section] + parts) + "\n")
    (folder / "rivals.json").write_text(json.dumps({**record, **result}, indent=1) + "\n")
    print("\n\n".join(parts))
