"""Which method, rollouts, discount and ridge should be the defaults? Alignment with BPTT over tasks and sizes.

    python profiling/study_defaults.py [--quick] [--output FOLDER]

Tasks with short and with long delays, H from 64 to 512, P from 4 to 2 H, at the start (W_hh orthogonal times .95) and
after some updates of BPTT, since most of training is not the start. The figure is the cosine between one estimate of
the recurrent network's gradient and BPTT's, mean over tasks, stages and repeats. The worst task stands beside it, since
a default also has to serve tasks that were not studied. The cost is processor time relative to "anp" with the same
rollouts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gate import estimate_check, require
from machine import line, machine, short_name
from report import table, write
from torch import nn
from tqdm import tqdm

import anpgpu
from anpgpu.diagnosis.alignment import alignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import tasks
import training

TASKS: dict[str, Callable[[], tasks.Task]] = {
    "copying-2": lambda: tasks.copying(2),
    "copying-20": lambda: tasks.copying(20),
    "adding": tasks.adding,
    "mackey-glass-15": tasks.mackey_glass,
}
UPDATES = (0, 200)
"""Updates of BPTT before the estimates are measured."""

BATCH, LEARNING_RATE = 4, 1e-3


class Setting(NamedTuple):
    """A candidate for the defaults, without the number of rollouts."""

    method: str
    discount: float
    ridge: float = 0.1

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.method} {self.discount:g}" + (f" ridge {self.ridge:g}" if self.method == "anp-ls" else "")


SETTINGS = [
    Setting("np", 0.9),
    Setting("np", 1.0),
    *(Setting("anp", discount) for discount in (0.0, 0.8, 0.9, 0.95, 0.98, 1.0)),
    *(Setting("anp-ls", discount) for discount in (0.9, 0.98, 1.0)),
    *(Setting("anp-ls", 1.0, ridge) for ridge in (0.01, 1.0)),
]


class Cell(NamedTuple):
    """One network on one task."""

    task: str
    hidden: int
    updates: int


def sizes(quick: bool) -> Iterator[tuple[int, list[int]]]:
    """Yield H and the numbers of rollouts to measure."""
    for hidden in (32,) if quick else (64, 128, 256, 512):
        yield hidden, [4, hidden] if quick else sorted({4, 16, 64, hidden, 2 * hidden} - {64 if hidden == 512 else 0})


def network(cell: Cell) -> tuple[nn.RNN, nn.Linear, tasks.Task, tasks.Batch]:
    """Train by BPTT for the cell's updates; return the network and the next batch."""
    task = TASKS[cell.task]()
    torch.manual_seed(0)
    rnn, readout = nn.RNN(task.inputs, cell.hidden), nn.Linear(cell.hidden, task.outputs)
    nn.init.orthogonal_(rnn.weight_hh_l0, training.GAIN)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], LEARNING_RATE)
    batches = task.batches(0, BATCH)
    for _ in range(cell.updates):
        gradient(rnn, readout, task, next(batches), anpgpu.Perturbation("bptt"))
        optimiser.step()
    return rnn, readout, task, next(batches)


def gradient(
    rnn: nn.RNN, readout: nn.Linear, task: tasks.Task, batch: tasks.Batch, how: anpgpu.Perturbation, seed: int = 0
) -> torch.Tensor:
    """Return the gradient of all the rnn's parameters, (N,)."""
    rnn.zero_grad()
    readout.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    anpgpu.estimate_grad_(rnn, readout, batch.inputs, batch.targets, task.loss, perturbation=how, generator=generator)
    return torch.cat([parameter.grad.flatten() for parameter in rnn.parameters() if parameter.grad is not None])


def measure(cell: Cell, rollouts: list[int], repeats: int, bar: tqdm) -> Iterator[dict[str, object]]:
    """Yield the alignment of every setting with every number of rollouts."""
    case = network(cell)
    truth = gradient(*case, anpgpu.Perturbation("bptt"))
    for count, setting in itertools.product(rollouts, SETTINGS):
        how = anpgpu.Perturbation(setting.method, count, discount=setting.discount, ridge=setting.ridge)
        started = time.process_time()
        estimates = torch.stack([gradient(*case, how, seed) for seed in range(repeats)])
        seconds = (time.process_time() - started) / repeats
        along = alignment(estimates, truth)
        yield {
            **cell._asdict(),
            "rollouts": count,
            "setting": setting.name,
            "cosine": along.cosine,
            "limit": along.limit,
            "seconds": seconds,
        }
        bar.update()


def summary(rows: list[dict], key: Callable[[dict], object]) -> dict[object, dict[str, dict[str, float]]]:
    """Return, by key and setting: mean cosine, the worst task's mean cosine, and the cost against "anp 0.9"."""
    groups: dict[object, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[key(row)][row["setting"]].append(row)
    figures: dict[object, dict[str, dict[str, float]]] = {}
    for where, by_setting in groups.items():
        plain = sum(row["seconds"] for row in by_setting["anp 0.9"])
        figures[where] = {}
        for name, mine in by_setting.items():
            by_task: dict[str, list[float]] = defaultdict(list)
            for row in mine:
                by_task[row["task"]].append(row["cosine"])
            means = {task: sum(values) / len(values) for task, values in by_task.items()}
            figures[where][name] = {
                "mean": sum(means.values()) / len(means),
                "worst": min(means.values()),
                "cost": sum(row["seconds"] for row in mine) / plain,
                **means,
            }
    return figures


def tables(rows: list[dict]) -> str:
    """Return two tables of the cosine by setting: by task, and by P / H."""
    names = list(dict.fromkeys(row["setting"] for row in rows))
    tasks_seen = list(dict.fromkeys(row["task"] for row in rows))
    overall = summary(rows, lambda row: None)[None]
    first = table(
        [
            {"setting": name, **{key: overall[name][key] for key in ("mean", "worst", *tasks_seen, "cost")}}
            for name in names
        ]
    )
    by_ratio = summary(rows, lambda row: row["rollouts"] / row["hidden"])
    below = "\n\n".join(
        f"{title} by rollouts per hidden unit\n\n{table([_by_ratio(by_ratio, name, key) for name in names])}"
        for title, key in (("Cosine", "mean"), ('Processor time, against "anp 0.9",', "cost"))
    )
    return f"Cosine, mean over H, P and stages\n\n{first}\n\n{below}"


def _by_ratio(by_ratio: dict, name: str, key: str) -> dict[str, object]:
    """Return a setting's row of a table with a column for each range of P / H."""
    row: dict[str, object] = {"setting": name}
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.8), (0.8, 1.5), (1.5, 3)):
        inside = [by_setting[name][key] for ratio, by_setting in by_ratio.items() if low < ratio <= high]
        row[f"P/H {low:g}-{high:g}"] = sum(inside) / len(inside) if inside else None
    return row


def plot(rows: list[dict], path: Path) -> None:
    """Plot cosine against processor time per update, one line per setting and one panel per task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = ("np 1", "anp 0", "anp 0.9", "anp 1", "anp-ls 1 ridge 0.01", "anp-ls 1 ridge 0.1", "anp-ls 1 ridge 1")
    tasks_seen = list(dict.fromkeys(row["task"] for row in rows))
    hidden = sorted({row["hidden"] for row in rows})[len({row["hidden"] for row in rows}) // 2]
    figure, axes = plt.subplots(
        1, len(tasks_seen), figsize=(3.6 * len(tasks_seen), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, task in zip(axes[0], tasks_seen, strict=True):
        for name in names:
            mine: dict[int, list[dict]] = defaultdict(list)
            for row in rows:
                if (row["task"], row["hidden"], row["setting"]) == (task, hidden, name):
                    mine[row["rollouts"]].append(row)
            points = [
                (
                    1e3 * sum(result["seconds"] for result in group) / len(group),
                    sum(result["cosine"] for result in group) / len(group),
                )
                for _, group in sorted(mine.items())
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(title=task, xlabel="processor time of an update (ms)", xscale="log", ylim=(0, 1))
    axes[0, 0].set_ylabel(f"cosine to BPTT's gradient, H = {hidden}")
    axes[0, -1].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one small network")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of the noise")
    parser.add_argument("--output", type=Path, help="folder for JSON, text and plot")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of a result again")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text())["rows"], options.plot.with_suffix(".png"))
        return
    torch.set_num_threads(1)
    chosen = list(TASKS)[:2] if options.quick else list(TASKS)
    plan = [
        (Cell(task, hidden, updates), rollouts)
        for hidden, rollouts in sizes(options.quick)
        for task in chosen
        for updates in UPDATES
    ]
    checks = require([estimate_check()])
    record = machine()
    rows: list[dict] = []
    with tqdm(total=sum(len(rollouts) for _, rollouts in plan) * len(SETTINGS), desc="settings") as bar:
        for cell, rollouts in plan:
            bar.set_postfix(task=cell.task, H=cell.hidden)
            rows += measure(cell, rollouts, options.repeats, bar)
    text = f"{line(record)}\n\n{tables(rows)}"
    print(text)
    if options.output:
        path = options.output / f"defaults-{short_name(record)}-{record['date']}.json"
        write(path, {"machine": record, "checks": checks, "rows": rows}, text)
        plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
