"""Tables and plots of `study_rivals.py`, from the lines of its finished runs alone.

A group is a task with a cell, a start and sizes; its rows are methods. Where not even BPTT comes to the loss that
counts as solved, the text above the table says so, and the table says nothing of credit through time. Runs that the
plan has and that are not made are said to be missing. Runs may come from several machines: losses are of all of them,
seconds of one, which is named.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import study_tasks
from machine import line
from study_rivals_claims import claims_of
from study_rivals_plan import Entry, Grid, left_out, ways
from study_rivals_rows import AT, Group, Row, against, exact_of, groups_of, name_of, rows_of, test_losses, timed_on
from study_statistics import Interval, interval

__all__ = ["PRINTED", "lacking", "report", "sentence", "summarised", "table"]

PRINTED = {
    "mackey-glass": {
        "rtrl": (0.0180, 0.0218, 10),
        "sketched, rank 32": (0.0070, 0.0030, 5),
        "sketched, rank 16": (0.0105, 0.0091, 10),
        "sketched, rank 4": (0.0065, 0.0053, 10),
        "snap-1": (0.0050, 0.0010, 10),
        "KF-RTRL": (0.0286, 0.0181, 10),
        "rflo": (0.0572, 0.0331, 10),
        "uoro": (0.0497, 0.0238, 10),
        "BPTT in windows of 25": (0.0080, 0.0010, 5),
    },
    "lorenz": {
        "rtrl": (0.0051, 0.0040, 10),
        "sketched, rank 32": (0.0130, 0.0184, 5),
        "sketched, rank 16": (0.0128, 0.0296, 10),
        "sketched, rank 4": (0.0038, 0.0021, 10),
        "snap-1": (0.0024, 0.0008, 10),
        "KF-RTRL": (0.0126, 0.0079, 10),
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
    "means; of three seeds these are the lowest and the highest. p: exact Wilcoxon test of pairs of one seed, of test "
    "losses, online of online NMSE, corrected by Holm for the rows of a table; fewer than six pairs are not tested, "
    "because none of their p is below .05. Until solved: the median over seeds of the first of 24 looks from which two "
    "in a row are, empty where half of them never are; ≤ where that is the first look."
)


def sentence(runs: Sequence[dict], rows: Sequence[Row]) -> str:
    """Say whether BPTT solves the task, and what the bound is."""
    chance, solved, unit = (runs[-1][name] for name in ("chance", "solved", "unit"))
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
    names = [name_of(*way[:2], windowed=way.windowed) for way in ways(entry, cell) if not way.rate_of]
    return {name: f"{made.get(name, 0)} of {entry.seeds}" for name in names if made.get(name, 0) < entry.seeds}


def planned(group: Group, grid: Grid, rows: Sequence[Row]) -> str:
    """Say with which learning rates a group is tuned, what of it is missing, and who is left out."""
    entry = entry_of(group, grid)
    if entry is None:
        return "The plan no longer has runs of these sizes."
    said = [f"Learning rates: {', '.join(f'{rate:g}' for rate in entry.rates or grid.rates)}."]
    if short := lacking(entry, group.cell, rows):
        said.append(f"Not made yet, seeds: {', '.join(f'{name} {count}' for name, count in short.items())}.")
    slow = [name for name in left_out(entry, group.cell) if name != "rtrl"]
    if slow:
        said.append(f"Left out for their time: {', '.join(slow)}.")
    if "rtrl" in left_out(entry, group.cell):
        said.append("RTRL is left out: its gradient is BPTT's.")
    return " ".join(said)


def spelled(found: Interval, scale: float = 1.0, places: int = 4) -> str:
    """Return a mean with its interval, "broke off" where a run did."""
    if not math.isfinite(found.mean):
        return "broke off"
    mean, low, high = (f"{scale * value:.{places}f}" for value in found)
    return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"


def table(group: Group, runs: Sequence[dict], rows: Sequence[Row]) -> str:
    """Return a group's markdown table; columns that say nothing are left out."""
    p_values, in_bits = against(rows), group.task == "characters"

    def count(value: float | None, shape: str, first: bool) -> str:
        return "" if value is None else ("≤ " if first else "") + format(value, shape)

    own = {True: " (own)", False: "", None: ""}
    columns: dict[str, list[str]] = {
        "": [row.name for row in rows],
        "rollouts": [str(row.rollouts or "") for row in rows],
        "learning rate": [f"{row.rate:g}{own[row.own]}" for row in rows],
        "seeds": [str(len(row.losses)) for row in rows],
        "test loss": [spelled(interval(row.losses)) for row in rows],
        "bits per character": [spelled(interval(row.losses), 1 / math.log(2), 3) for row in rows] if in_bits else [],
        "right, %": [spelled(interval(row.accuracies), 100, 1) if row.accuracies else "" for row in rows],
        "online NMSE": [spelled(interval(row.online)) if row.online else "" for row in rows],
        "mean of the curve": [spelled(interval(row.areas)) for row in rows],
        "p against BPTT": [f"{p_values[row.name]:.3f}" if row.name in p_values else "" for row in rows],
        "ms an update": ["" if row.per_update is None else f"{1e3 * row.per_update:.1f}" for row in rows],
        "s until solved": [count(row.seconds, ".1f", row.first_seconds) for row in rows],
        "rollout-steps until solved": [count(row.rollout_steps, ".2g", row.first_steps) for row in rows],
        "sequences until 80 % right": [count(row.trials, ".0f", row.first_trials) for row in rows],
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


@functools.cache
def guesses(task: str) -> dict[str, float]:
    """Return the NMSE of guesses that need no network, where a task is online; {} elsewhere."""
    if task not in PRINTED:
        return {}
    found = study_tasks.by_name(None, None)[task](25).baselines()
    return {name: float(f"{score.loss:.2g}") for name, score in found.items()}


def summary_of(group: Group, runs: Sequence[dict], every: Sequence[dict], grid: Grid) -> dict[str, object]:
    """Return what rivals.json has of a group: its rows with their intervals, and what is missing."""
    rows, entry = rows_of(runs, every), entry_of(group, grid)
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
        "chance": runs[-1]["chance"],
        "solved": runs[-1]["solved"],
        "sentence": sentence(runs, rows),
        "planned": planned(group, grid, rows),
        "lacking": lacking(entry, group.cell, rows) if entry else {},
        "timed_on": timed_on(runs),
        "p": against(rows),
        "printed": PRINTED.get(group.task, {}),
        "guesses": guesses(group.task),
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
            for claim in claims_of(group, rows_of(mine, runs), mine[-1]["solved"])
        ],
        "unmade": unmade(grid, list(groups)),
        "groups": [summary_of(group, mine, runs, grid) for group, mine in groups.items()],
    }


def report(folder: Path, runs: Sequence[dict], grid: Grid) -> None:
    """Write rivals.json, rivals.md and one PNG a group into `folder`, from the runs that are finished."""
    parts = []
    for group, mine in groups_of(runs).items():
        rows = rows_of(mine, runs)
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
    # A picture is nothing to a terminal.
    print("\n\n".join(text for part in parts for text in part.split("\n\n") if not text.startswith("![")))
