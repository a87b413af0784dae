"""Which method, rollouts, discount and ridge should be the defaults? Alignment with BPTT over tasks and sizes.

    python profiling/study_defaults.py             everything; results/defaults/
    python profiling/study_defaults.py --quick     two tasks, one small network
    python profiling/study_defaults.py --report    tables and plot of what there is

Tasks with short and with long delays; H from 64 to 1,024; P from 2 to 2 H, and to H / 2 above H = 256. W_hh starts
orthogonal times .95, BPTT trains, and estimates are made after 60 and after 200 of its updates. The figure is the
cosine between one estimate of the recurrent network's gradient and BPTT's, mean over tasks, stages and repeats. The
worst task stands beside it, since a default also has to serve tasks that were not studied. The cost is processor time
relative to BPTT's.

"anp-feedback" learns, so it sees the 60 updates before it is measured, on the same weights and batches; "first update"
is what it estimates without them, after its default warm-up. "known part" is what is known without rollouts.

The study is sized for twenty minutes of one core: batches of 4 sequences, so that a batch has at most 160 steps; three
repeats (one of a first update); from H = 256 on only two tasks, at 1,024 one, and only the later stage.

Every finished network and number of rollouts is one line of `runs.jsonl`, found by its complete configuration: a study
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine
import torch
from gate import estimate_check, require
from report import table, write
from study import Finished
from study_grid import tasks, training
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu
from anpgpu.diagnosis.alignment import alignment

RESULTS = Path(__file__).resolve().parent / "results" / "defaults"

TASKS: dict[str, Callable[[], tasks.Task]] = {
    "adding": tasks.adding,
    "copying-20": lambda: tasks.copying(20),
    "copying-2": lambda: tasks.copying(2),
    "mackey-glass-15": tasks.mackey_glass,
}
STAGES = (60, 200)
"""Updates of BPTT before the estimates are measured."""

LEARNING = 60
"""Updates that a method which learns sees before it is measured."""

BATCH, LEARNING_RATE = 4, 1e-3

ROLLOUTS = {
    32: (4, 32),
    64: (2, 4, 8, 16, 32, 64, 128),
    128: (2, 4, 8, 16, 64, 128, 256),
    256: (2, 4, 16, 64, 128, 256, 512),
    512: (4, 16, 32, 128, 256),
    1024: (4, 16, 64, 256, 512),
}
"""Numbers of rollouts by H."""


class Size(NamedTuple):
    """A width, and how many of the tasks and stages are measured at it."""

    hidden: int
    tasks: int
    stages: int = len(STAGES)


SIZES = (Size(64, 4), Size(128, 4), Size(256, 2, 1), Size(512, 2, 1), Size(1024, 1, 1))

EXACT, KNOWN, FIRST = "bptt", "known part", "anp-feedback 1 ridge 0.01, first update"


class Setting(NamedTuple):
    """A candidate for the defaults, without the number of rollouts."""

    method: str
    discount: float
    ridge: float | None = None

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.method} {self.discount:g}" + ("" if self.ridge is None else f" ridge {self.ridge:g}")

    def perturbation(self, rollouts: int, **options: int) -> anpgpu.Perturbation:
        """Return it with its number of rollouts."""
        ridge = {} if self.ridge is None else {"ridge": self.ridge}
        return anpgpu.Perturbation(self.method, rollouts, discount=self.discount, **ridge, **options)


STATELESS = [
    Setting("np", 1.0),
    *(Setting("anp", discount) for discount in (0.0, 0.9, 0.98, 1.0)),
    Setting("anp-ls", 0.98, 0.01),
    *(Setting("anp-ls", 1.0, ridge) for ridge in (0.01, 0.1, 1.0)),
]
LEARNED = Setting("anp-feedback", 1.0, 0.01)


class Case(NamedTuple):
    """One network on one task, and a number of rollouts: a line of the file."""

    task: str
    hidden: int
    updates: int
    rollouts: int
    repeats: int


def plan(*, quick: bool, repeats: int) -> list[Case]:
    """Return what the study measures, small networks first."""
    sizes = [Size(32, 2)] if quick else SIZES
    return [
        Case(task, size.hidden, updates, rollouts, repeats)
        for size in sizes
        for task in list(TASKS)[: size.tasks]
        for updates in STAGES[-size.stages :]
        for rollouts in ROLLOUTS[size.hidden]
    ]


def key_of(run: dict) -> str:
    """Return what identifies a finished case."""
    return json.dumps(run["case"], sort_keys=True)


class Network:
    """A task, a network that BPTT trains, a readout, and another module of the same parameters, which learns."""

    def __init__(self, case: Case) -> None:
        self.task = TASKS[case.task]()
        torch.manual_seed(0)
        self.rnn, self.readout = nn.RNN(self.task.inputs, case.hidden), nn.Linear(case.hidden, self.task.outputs)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, training.GAIN)
        self.learner = self.same_weights()
        self.batches = self.task.batches(0, BATCH)

    def same_weights(self) -> nn.RNN:
        """Return a module without a state, of the same parameters."""
        rnn = nn.RNN(self.task.inputs, self.rnn.hidden_size)
        for name, value in self.rnn.named_parameters():
            setattr(rnn, name, value)
        return rnn

    def gradient(self, rnn: nn.RNN, batch: tasks.Batch, how: anpgpu.Perturbation | None, seed: int = 0) -> Tensor:
        """Return the gradient of all the recurrent network's parameters, (N,); the known part where `how` is None."""
        rnn.zero_grad()
        self.readout.zero_grad()
        if how is None:
            training.one_step_truncated(self.task, rnn, self.readout, batch, None)
        else:
            generator = torch.Generator().manual_seed(seed)
            anpgpu.estimate_grad_(
                rnn,
                self.readout,
                batch.inputs,
                batch.targets,
                self.task.loss,
                perturbation=how,
                generator=generator,
            )
        return torch.cat([parameter.grad.flatten() for parameter in rnn.parameters() if parameter.grad is not None])


def trained(case: Case) -> tuple[Network, tasks.Batch]:
    """Train by BPTT for the case's updates, while the learner sees the last ones; return the next batch, too."""
    network = Network(case)
    optimiser = torch.optim.Adam([*network.rnn.parameters(), *network.readout.parameters()], LEARNING_RATE)
    learned = LEARNED.perturbation(case.rollouts, warmup=0)
    for update in range(case.updates):
        batch = next(network.batches)
        if update >= case.updates - LEARNING:
            network.gradient(network.learner, batch, learned, update)
        network.gradient(network.rnn, batch, anpgpu.Perturbation(EXACT))
        optimiser.step()
    return network, next(network.batches)


def measured(case: Case) -> list[dict[str, object]]:
    """Return the alignment of every setting, and its processor time."""
    network, batch = trained(case)
    truth = network.gradient(network.rnn, batch, anpgpu.Perturbation(EXACT))
    kept = anpgpu.estimator_state(network.learner)
    rows = []

    def row(name: str, repeats: int, work: Callable[[int], Tensor], before: Callable[[], object] = int) -> None:
        estimates, seconds = [], 0.0
        for seed in range(repeats):
            before()
            started = time.process_time()
            estimates.append(work(seed))
            seconds += time.process_time() - started
        along = alignment(torch.stack(estimates), truth)
        figures = {"cosine": round(along.cosine, 5), "limit": round(along.limit, 5) if repeats > 1 else None}
        rows.append({"setting": name, **figures, "seconds": seconds / repeats})

    exact, learned = anpgpu.Perturbation(EXACT), LEARNED.perturbation(case.rollouts, warmup=0)
    first = LEARNED.perturbation(case.rollouts)
    row(EXACT, case.repeats, lambda _: network.gradient(network.rnn, batch, exact))
    row(KNOWN, 1, lambda _: network.gradient(network.rnn, batch, None))
    for setting in STATELESS:
        how = setting.perturbation(case.rollouts)
        row(setting.name, case.repeats, lambda seed, how=how: network.gradient(network.rnn, batch, how, seed))
    # An estimate moves what was learnt; every repeat starts from the same.
    row(
        LEARNED.name,
        case.repeats,
        lambda seed: network.gradient(network.learner, batch, learned, seed),
        lambda: anpgpu.load_estimator_state_(network.learner, kept),
    )
    row(FIRST, 1, lambda seed: network.gradient(network.same_weights(), batch, first, seed))
    return rows


def flat(runs: list[dict]) -> list[dict]:
    """Return a row for each case and setting, its time also over that of BPTT."""
    return [
        {**run["case"], **row, "cost": row["seconds"] / run["rows"][0]["seconds"]}
        for run in runs
        for row in run["rows"]
    ]


RANGES = ((0, 0.04), (0.04, 0.1), (0.1, 0.3), (0.3, 0.8), (0.8, 1.5), (1.5, 3))
"""Of P / H, for tables."""


def inside(rows: list[dict], low: float, high: float) -> list[dict]:
    """Return the rows with P / H in a range."""
    return [row for row in rows if low < row["rollouts"] / row["hidden"] <= high]


def by_task(rows: list[dict], figure: str = "cosine") -> dict[str, float]:
    """Return the mean of a figure for each task."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["task"]].append(row[figure])
    return {task: sum(mine) / len(mine) for task, mine in values.items()}


def mean(rows: list[dict], figure: str = "cosine") -> float | None:
    """Return the mean over tasks; None without rows."""
    means = by_task(rows, figure).values()
    return sum(means) / len(means) if means else None


def tables(rows: list[dict]) -> str:
    """Return tables of cosine and cost by setting, and of learned feedback's by size."""
    names = list(dict.fromkeys(row["setting"] for row in rows))
    tasks_seen = list(dict.fromkeys(row["task"] for row in rows))
    groups = {name: [row for row in rows if row["setting"] == name] for name in names}
    first = []
    for name, mine in groups.items():
        means = by_task(mine)
        spread = {"mean": mean(mine), "worst": min(means.values())}
        first.append({"setting": name, **spread, **{task: means.get(task) for task in tasks_seen}})
    parts = [f"Cosine, mean over H, P and stages\n\n{table(first)}"]
    for title, figure in (("Cosine", "cosine"), ("Processor time over BPTT's", "cost")):
        lines = [
            {
                "setting": name,
                **{f"P/H {low:g}-{high:g}": mean(inside(mine, low, high), figure) for low, high in RANGES},
            }
            for name, mine in groups.items()
        ]
        parts.append(f"{title}, by rollouts per hidden unit\n\n{table(lines)}")
    counts = sorted({row["rollouts"] for row in rows})
    for name in (LEARNED.name, "anp-ls 1 ridge 0.01"):
        lines = [
            {
                "H": str(hidden),
                **{
                    f"P {count}": mean(
                        [row for row in groups[name] if (row["hidden"], row["rollouts"]) == (hidden, count)]
                    )
                    for count in counts
                },
            }
            for hidden in sorted({row["hidden"] for row in rows})
        ]
        parts.append(f"Cosine of {name}\n\n{table(lines)}")
    return "\n\n".join(parts)


PLOTTED = ("np 1", "anp 0", "anp 0.9", "anp-ls 1 ridge 0.01", LEARNED.name)


def plot(rows: list[dict], path: Path) -> None:
    """Plot cosine against processor time over BPTT's, one line per setting and one panel per task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # The largest network that all tasks were studied with.
    tasks_of = {row["hidden"]: {other["task"] for other in rows if other["hidden"] == row["hidden"]} for row in rows}
    hidden = max(tasks_of, key=lambda size: (len(tasks_of[size]), size))
    rows = [row for row in rows if row["hidden"] == hidden]
    tasks_seen = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks_seen), figsize=(3.6 * len(tasks_seen), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, task in zip(axes[0], tasks_seen, strict=True):
        for name in PLOTTED:
            mine = [row for row in rows if (row["task"], row["setting"]) == (task, name)]
            counts = sorted({row["rollouts"] for row in mine})
            groups = [[row for row in mine if row["rollouts"] == count] for count in counts]
            axis.plot(
                [mean(group, "cost") for group in groups],
                [mean(group) for group in groups],
                marker="o",
                markersize=3,
                label=name,
            )
        known = mean([row for row in rows if (row["task"], row["setting"]) == (task, KNOWN)])
        axis.axhline(known, color="grey", linestyle="--", linewidth=1, label=KNOWN)
        axis.set(title=task, xlabel="processor time of an update over BPTT's", xscale="log", ylim=(0, 1.02))
    axes[0, 0].set_ylabel(f"cosine to BPTT's gradient, H = {hidden}")
    axes[0, -1].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def study(cases: list[Case], finished: Finished) -> None:
    """Make the cases that are missing."""
    missing = [case for case in cases if key_of({"case": case._asdict()}) not in finished.runs]
    commit = machine.commit(Path(__file__).resolve().parent)
    if missing:
        # Compiled code is loaded before anything is timed.
        measured(Case("adding", hidden=8, updates=LEARNING, rollouts=2, repeats=1))
    for case in (bar := tqdm(missing, desc="networks", unit="network")):
        bar.set_postfix(task=case.task, H=case.hidden, P=case.rollouts)
        started = time.process_time()
        rows = measured(case)
        seconds = round(time.process_time() - started, 1)
        finished.add({"case": case._asdict(), "rows": rows, "seconds": seconds, "commit": commit})


def report(finished: Finished, cases: list[Case], checks: list[dict[str, object]]) -> None:
    """Print the tables; write defaults.json, .txt and .png of the finished cases."""
    keys = [key_of({"case": case._asdict()}) for case in cases]
    runs = [finished.runs[key] for key in keys if key in finished.runs]
    if not runs:
        return
    host, rows = machine.machine(), flat(runs)
    minutes = sum(run["seconds"] for run in runs) / 60
    made = f"{len(runs)} of {len(cases)} cases, {minutes:.0f} minutes of processor time"
    text = f"{machine.line(host)}\n\n{made}\n\n{tables(rows)}"
    print(text)
    path = finished.path.with_name("defaults.json")
    commits = sorted({run["commit"] or "" for run in runs})
    write(path, {"machine": host, "checks": checks, "commits": commits, "rows": rows}, text)
    plot(rows, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tasks, one small network")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of the noise")
    parser.add_argument("--output", type=Path, help="folder of the finished cases, tables and plot")
    parser.add_argument("--report", action="store_true", help="only tables and plot of what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = plan(quick=options.quick, repeats=options.repeats)
    folder = options.output or (RESULTS.with_name("defaults-quick") if options.quick else RESULTS)
    checks, finished = require([estimate_check()]), Finished(folder / "runs.jsonl", key_of)
    if not options.report:
        study(cases, finished)
    report(finished, cases, checks)


if __name__ == "__main__":
    main()
