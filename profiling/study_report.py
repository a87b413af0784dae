"""Tables and plots of the study: for every task, the methods beside BPTT and beside predictions without a network.

gain      memoryless loss - test loss
share     gain / BPTT's gain
spread    standard deviation over seeds
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import line
from study_grid import FULL, SHORTER, TUNING_SEED, Grid, final, tasks, training

FORWARD = ("np", "wp", "anp-0", "anp", "anp-1", "anp-ls", "published-anp")
OLDER = ("np", "wp")
OURS = ("anp", "anp-1", "anp-ls")
ENOUGH, POINT = 0.95, 0.01
"""The best forward-only method must reach this share of BPTT's gain, or come this near to BPTT's accuracy."""


class Row(NamedTuple):
    """One method on one task, over its seeds."""

    name: str
    method: str
    rate: float
    updates: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    """Empty for a regression."""
    per_update: float
    """Processor time of an update, in seconds: the median over seeds."""
    curves: tuple[dict, ...]

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.losses))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for a single one."""
        return spread(self.losses)


def spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else math.nan


def rows_of(runs: Sequence[dict]) -> list[Row]:
    """Return the result runs of one task, one row for every method."""
    groups: dict[tuple[str, bool, int], list[dict]] = {}
    for run in runs:
        settings = run["settings"]
        if settings["seed"] != TUNING_SEED:
            groups.setdefault((settings["method"], settings["decorrelated"], settings["updates"]), []).append(run)
    longest = max((updates for _, _, updates in groups), default=0)
    rows = []
    order = list(training.METHODS)
    for key in sorted(groups, key=lambda group: (order.index(group[0]), group[1], -group[2])):
        (method, decorrelated, updates), mine = key, groups[key]
        name = method + " + decorrelation" * decorrelated + ", 2/3 of the updates" * (updates < longest)
        ends = [final(run, "test") for run in mine]
        times = [run["curve"]["seconds"][-1] / updates for run in mine if run["curve"]["seconds"]]
        rows.append(
            Row(
                name,
                method + "+d" * decorrelated,
                mine[0]["settings"]["lr"],
                updates,
                tuple(loss for loss, _ in ends),
                tuple(accuracy for _, accuracy in ends if accuracy is not None),
                float(np.median(times)) if times else math.nan,
                tuple(run["curve"] for run in mine),
            )
        )
    return rows


class Findings(NamedTuple):
    """The conclusions of a task; None where runs are missing."""

    task: str
    best: str | None = None
    """Forward-only method with the lowest mean loss."""
    share: float | None = None
    """Its share of BPTT's gain after as many updates."""
    share_in_more: float | None = None
    """Its share of BPTT's gain in two thirds of the updates."""
    accuracy_below: float | None = None
    """How far its accuracy stays below BPTT's."""
    keeps: bool | None = None
    """Whether it meets `ENOUGH` or `POINT`."""
    margins: dict[str, float] | None = None
    """For each of `OURS`: (loss of the better of np and wp - its loss) / (sum of the two spreads)."""


def share_of_gain(loss: float, bptt: float, memoryless: float) -> float | None:
    """Return (memoryless - loss) / (memoryless - bptt), or None where BPTT is no better than the memoryless optimum."""
    return (memoryless - loss) / (memoryless - bptt) if bptt < memoryless else None


def findings(task: str, rows: Sequence[Row], memoryless: float) -> Findings:
    """Compute the conclusions of a task."""
    named = {row.name: row for row in rows}
    bptt, shorter = named.get(SHORTER), named.get(f"{SHORTER}, 2/3 of the updates")
    if bptt is None:
        return Findings(task)
    # A method with fewer seeds could win by a lucky one.
    whole = [row for row in rows if len(row.losses) >= len(bptt.losses)]
    forward = [row for row in whole if row.method.removesuffix("+d") in FORWARD]
    if not forward:
        return Findings(task)
    best = min(forward, key=lambda row: row.loss)
    share = share_of_gain(best.loss, bptt.loss, memoryless)
    more = None if shorter is None else share_of_gain(best.loss, shorter.loss, memoryless)
    below = float(np.mean(bptt.accuracies) - np.mean(best.accuracies)) if best.accuracies else None
    keeps = None
    if share is not None or below is not None:
        keeps = max(share or 0.0, more or 0.0) >= ENOUGH or (below is not None and below <= POINT)
    older = [named[name] for name in OLDER if name in named]
    margins = None
    if len(older) == len(OLDER):
        rival = min(older, key=lambda row: row.loss)
        margins = {
            name: (rival.loss - named[name].loss) / (rival.spread + named[name].spread)
            for name in OURS
            if name in named
        }
    return Findings(task, best.name, share, more, below, keeps, margins)


def sentence(finding: Findings) -> str:
    """Return the conclusions of a task in words."""
    if finding.best is None:
        return "Not enough runs yet to say anything."
    verdict = "keeps" if finding.keeps else "falls short of"
    text = f"The best forward-only method, {finding.best}, has "
    if finding.share is None:
        text += "nothing to keep: BPTT after as many updates does not beat the memoryless optimum"
    else:
        text += f"{finding.share:.0%} of BPTT's gain over the memoryless optimum after as many updates"
    text += "" if finding.share_in_more is None else f", {finding.share_in_more:.0%} of it with 1.5 times the updates"
    if finding.accuracy_below is not None:
        points = 100 * abs(finding.accuracy_below)
        text += f"; its accuracy is {points:.1f} points {'below' if finding.accuracy_below > 0 else 'above'} BPTT's"
    text += "." if finding.keeps is None else f": it {verdict} what was asked ({ENOUGH:.0%}, or 1 point)."
    for name, margin in (finding.margins or {}).items():
        if math.isnan(margin):
            continue
        how = "beats" if margin > 1 else "is within the spread of" if margin >= -1 else "loses to"
        text += f" {name} {how} the better of np and wp (margin {margin:.1f} spreads)."
    return text


def table(rows: Sequence[Row], baselines: dict[str, tasks.Score], memoryless: float) -> str:
    """Return one task's markdown table."""
    accurate = any(score.accuracy is not None for score in baselines.values())
    names = ["", "learning rate", "seeds", "test loss", "share of BPTT's gain", "ms an update"]
    names[4:4] = ["accuracy"] * accurate
    bptt = next((row.loss for row in rows if row.name == SHORTER), math.nan)

    def share(loss: float) -> str:
        value = share_of_gain(loss, bptt, memoryless)
        return f"{value:.3f}" if value is not None and math.isfinite(value) else ""

    lines = []
    for name, score in baselines.items():
        cells = [f"*{name}*", "", "", f"{score.loss:.4f}", share(score.loss), ""]
        cells[4:4] = ["" if score.accuracy is None else f"{score.accuracy:.1%}"] * accurate
        lines.append(cells)
    for row in rows:
        loss = f"{row.loss:.4f} ± {row.spread:.4f}".replace(" ± nan", "") if math.isfinite(row.loss) else "broke off"
        cells = [row.name, f"{row.rate:g}", str(len(row.losses)), loss, share(row.loss), f"{1e3 * row.per_update:.1f}"]
        right = f"{np.mean(row.accuracies):.1%} ± {spread(row.accuracies):.1%}" if row.accuracies else ""
        cells[4:4] = [right.replace(" ± nan%", "")] * accurate
        lines.append(cells)
    rule = ["---"] + ["---:"] * (len(names) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, rule, *lines])


def plot(task: tasks.Task, rows: Sequence[Row], baselines: dict[str, tasks.Score], path: Path) -> None:
    """Plot test loss against updates and against processor time: mean over seeds, lowest to highest."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    colours = {name: f"C{number}" for number, name in enumerate(training.METHODS)}
    longest = max((row.updates for row in rows), default=0)
    for row in rows:
        whole = [curve for curve in row.curves if len(curve["updates"]) == training.SHARES]
        if row.updates < longest or not whole:
            continue
        losses = np.array([[score[0] for score in curve["test"]] for curve in whole])
        times = np.mean([curve["seconds"] for curve in whole], axis=0)
        colour, style = colours[row.method.removesuffix("+d")], "--" if row.method.endswith("+d") else "-"
        for axis, horizontal in zip(axes, (whole[0]["updates"], times), strict=True):
            axis.plot(horizontal, losses.mean(0), style, color=colour, label=row.name, linewidth=1.3)
            axis.fill_between(horizontal, losses.min(0), losses.max(0), color=colour, alpha=0.12)
    for (name, score), style in zip(baselines.items(), (":", "-.", (0, (5, 5))), strict=False):
        for axis in axes:
            axis.axhline(score.loss, color="grey", linestyle=style, linewidth=1, label=name)
    axes[0].set(xlabel="updates", ylabel=f"test loss ({task.unit})", yscale="log")
    axes[1].set(xlabel="processor time of the updates (s)", xscale="log")
    axes[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{task.name}: mean over seeds, lowest to highest shaded")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, finished: dict[str, dict], grid: Grid, csv_path: Path | None) -> None:
    """Write study.json, study.md and one PNG a task into `folder`, from the runs that are finished."""
    known = tasks.by_name(csv_path)
    summary, parts, all_findings = {}, [], []
    rows_by_task: dict[str, list[Row]] = {}
    for name, size in grid.sizes.items():
        rows = rows_of([run for run in finished.values() if run["task"] == name and fits(run, grid)])
        if not rows or name not in known:
            continue
        task, rows_by_task[name] = known[name](), rows
        baselines = task.baselines()
        memoryless = baselines["memoryless"].loss
        plot(task, rows, baselines, folder / f"{name}.png")
        all_findings.append(findings(name, rows, memoryless))
        parts.append(
            f"## {name}\n\n{sentence(all_findings[-1])}\n\nTest loss in {task.unit}; {size.updates} updates of "
            f"{size.batch} sequences.\n\n{table(rows, baselines, memoryless)}\n\n![{name}]({name}.png)"
        )
        summary[name] = {
            "baselines": {baseline: score._asdict() for baseline, score in baselines.items()},
            "methods": [{**row._replace(curves=())._asdict(), "loss": row.loss, "spread": row.spread} for row in rows],
            "findings": all_findings[-1]._asdict(),
        }
    machine = folder / "machine.json"
    record = json.loads(machine.read_text()) if machine.exists() else {}
    spent = sum(run["seconds"] for run in finished.values())
    command = f"python profiling/study.py --{'full' if grid == FULL else 'quick'}"
    conditions = (
        f"All: Adam, its rate (of {', '.join(f'{rate:g}' for rate in grid.rates)}, by validation loss after "
        f"{grid.tuning:.0%} of the updates of seed {TUNING_SEED}) falling linearly to zero; W_hh orthogonal, gain "
        f"{training.GAIN}; H = {grid.hidden}; {grid.rollouts} rollouts (published-anp: 1); sigma 0.001. anp-0, anp and "
        "anp-1 have discounts 0, 0.9 and 1; 1, the library's default, is also that of np and anp-ls. ± is the standard "
        "deviation over seeds."
    )
    head = [
        "# The study",
        f"`{command}`: {len(finished)} runs, {spent / 60:.0f} minutes of processor time, one thread each.",
        f"{line(record['machine'])}; runs of commits {', '.join(record.get('commits', []))}" if record else "",
        conditions,
        overview(all_findings),
        decorrelation_table(rows_by_task),
    ]
    (folder / "study.md").write_text("\n\n".join([section for section in head if section] + parts) + "\n")
    text = json.dumps({**record, "processor_seconds": spent, "runs": len(finished), "tasks": summary}, indent=1)
    (folder / "study.json").write_text(text + "\n")
    print(overview(all_findings), decorrelation_table(rows_by_task), sep="\n\n")


def fits(run: dict, grid: Grid) -> bool:
    """Return whether a run has the sizes of this grid."""
    settings = run["settings"]
    size = grid.sizes[run["task"]]
    lengths = {size.updates, round(size.updates / 1.5)}
    same = (settings["hidden"], settings["rollouts"], settings["batch"]) == (grid.hidden, grid.rollouts, size.batch)
    return same and (settings["seed"] == TUNING_SEED or settings["updates"] in lengths)


def decorrelation_table(rows: dict[str, list[Row]]) -> str:
    """Return the table of decorrelation's effect on each method and task; "" where no pair of runs exists."""
    margins: dict[str, dict[str, float]] = {}
    for task, mine in rows.items():
        named = {row.name: row for row in mine}
        for name, plain in named.items():
            helped = named.get(f"{name} + decorrelation")
            if helped is not None:
                margins.setdefault(name, {})[task] = (plain.loss - helped.loss) / (plain.spread + helped.spread)
    columns = [task for task in rows if any(task in by_task for by_task in margins.values())]
    if not columns:
        return ""
    lines = [
        f"| | {' | '.join(columns)} | lower | higher |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name, by_task in margins.items():
        cells = [f"{by_task[task]:.1f}" if task in by_task else "" for task in columns]
        lower, higher = (sum(sign * margin > 1 for margin in by_task.values()) for sign in (1, -1))
        lines.append(f"| {name} | {' | '.join(cells)} | {lower} | {higher} |")
    return (
        "What decorrelation does: the loss without it minus the loss with it, in units of the two spreads added; above "
        "1 it lowers the loss, below -1 it raises it.\n\n" + "\n".join(lines)
    )


def overview(all_findings: Sequence[Findings]) -> str:
    """Return the table of all tasks."""
    lines = [
        "| task | best forward-only | share of BPTT's gain | with 1.5x the updates | enough | "
        + " | ".join(OURS)
        + " |",
        "|---|---|---:|---:|---|" + "---:|" * len(OURS),
    ]
    for finding in all_findings:
        shares = ["" if value is None else f"{value:.3f}" for value in (finding.share, finding.share_in_more)]
        margins = [f"{(finding.margins or {}).get(name, math.nan):.1f}" for name in OURS]
        enough = "" if finding.keeps is None else "yes" if finding.keeps else "no"
        cells = [finding.task, finding.best or "", *shares, enough, *margins]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        "Last columns: the better of np and wp minus it, in units of the two spreads added; above 1 it is ahead."
    )
    return "\n".join(lines)
