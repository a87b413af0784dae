"""How does learned feedback train beside BPTT, anp-ls and np, update by update and second by second?

    python profiling/study_curves.py             copying after 10 steps, H = 128; results/curves/, 6 minutes of one core
    python profiling/study_curves.py --quick     H = 32, one seed, few updates: a look
    python profiling/study_curves.py --report    table and plot of what there is

Every method trains from the same start on the same batches, by Adam, whose rate falls linearly to zero. The rate is
that of `RATES` with the lowest validation loss after training with seed 100; three other seeds make the curves.
Seconds are processor time of one thread, of the training updates alone; the first of anp-feedback's has its warm-up.

Every finished run is one line of `runs.jsonl`, found by its complete configuration: a study that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from statistics import fmean

import machine
import numpy as np
import torch
from gate import estimate_check, require
from report import table, write
from study import Finished
from study_grid import TUNING_SEED, best_rate, final, key_of, tasks, training
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "curves"

RATES = (1e-3, 3e-3, 1e-2)
DELAY, SEEDS = 10, 3


def curves(*, quick: bool) -> dict[str, training.Settings]:
    """Return the settings of each curve by its label, without seed and rate."""
    shared = training.Settings("bptt", updates=72 if quick else 600, hidden=32 if quick else 128)
    hidden = shared.hidden
    return {
        "BPTT": shared,
        "anp-feedback, P = H/16": shared._replace(method="anp-feedback", rollouts=hidden // 16),
        "anp-ls, P = H/16": shared._replace(method="anp-ls", rollouts=hidden // 16),
        "anp-ls, P = H": shared._replace(method="anp-ls", rollouts=hidden),
        "np, P = H": shared._replace(method="np", rollouts=hidden),
    }


def study(finished: Finished, task: tasks.Task, *, quick: bool) -> None:
    """Make the runs that are missing."""
    commit = machine.commit(Path(__file__).resolve().parent)

    def make(settings: training.Settings) -> None:
        bar.set_postfix(method=settings.method, P=settings.rollouts, lr=settings.lr, seed=settings.seed)
        if key_of(task.name, settings) not in finished.runs:
            started = time.process_time()
            curve = training.train(task, settings)
            seconds = round(time.process_time() - started, 1)
            run = {"task": task.name, "settings": settings._asdict(), "curve": curve._asdict()}
            finished.add({**run, "seconds": seconds, "commit": commit})
        bar.update()

    settings = curves(quick=quick)
    seeds = 1 if quick else SEEDS
    with tqdm(total=len(settings) * (len(RATES) + seeds), desc="runs", unit="run") as bar:
        # Compiled code is loaded before anything is timed.
        for mine in settings.values():
            training.train(task, mine._replace(updates=2), progress=False)
        for mine in settings.values():
            trials = [mine._replace(seed=TUNING_SEED, lr=rate, updates=mine.updates // 3) for rate in RATES]
            for trial in trials:
                make(trial)
            rate = best_rate([key_of(task.name, trial) for trial in trials], finished.runs)
            for seed in range(seeds):
                make(mine._replace(seed=seed, lr=rate))


def results(finished: Finished, *, quick: bool) -> list[dict[str, object]]:
    """Return a row for each curve: final losses, seconds, and means over seeds of the curve itself."""
    rows = []
    for label, settings in curves(quick=quick).items():
        shared = settings._replace(seed=0, lr=0.0)
        runs = [
            run
            for run in finished.runs.values()
            if run["settings"]["seed"] != TUNING_SEED
            and training.Settings(**run["settings"])._replace(seed=0, lr=0.0) == shared
        ]
        if not runs:
            continue
        losses = [final(run, "test")[0] for run in runs]
        row = {"method": label, "lr": runs[0]["settings"]["lr"], "seeds": len(runs), "test loss": fmean(losses)}
        row |= {"lowest": min(losses), "highest": max(losses)}
        row["seconds"] = fmean(run["curve"]["seconds"][-1] for run in runs)
        rows.append(row)
        if all(math.isfinite(loss) for loss in losses):
            row["curve"] = {
                "updates": runs[0]["curve"]["updates"],
                "seconds": np.mean([run["curve"]["seconds"] for run in runs], 0).round(3).tolist(),
                "losses": [[score[0] for score in run["curve"]["test"]] for run in runs],
            }
    exact = rows[0]["seconds"] if rows and rows[0]["method"] == "BPTT" else math.nan
    return [{**row, "seconds over BPTT's": row["seconds"] / exact} for row in rows]


def plot(rows: list[dict[str, object]], memoryless: float, title: str, path: Path) -> None:
    """Plot test loss against updates and against processor time: mean over seeds, and the range shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for colour, row in enumerate(rows):
        if (curve := row.get("curve")) is None:
            continue
        losses = np.array(curve["losses"])
        for axis, name in zip(axes, ("updates", "seconds"), strict=True):
            axis.plot(curve[name], losses.mean(0), color=f"C{colour}", label=row["method"])
            axis.fill_between(curve[name], losses.min(0), losses.max(0), color=f"C{colour}", alpha=0.2, linewidth=0)
    for axis in axes:
        axis.axhline(memoryless, color="grey", linestyle="--", linewidth=1, label="without memory")
    axes[0].set(xlabel="updates", ylabel="test loss (nats)", yscale="log")
    axes[1].set(xlabel="processor time of one thread (s)", xscale="log")
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(finished: Finished, task: tasks.Task, checks: list[dict[str, object]], *, quick: bool) -> None:
    """Print the table; write curves.json, .txt and .png."""
    rows = results(finished, quick=quick)
    if not rows:
        return
    host = machine.machine()
    shown = [{name: value for name, value in row.items() if name != "curve"} for row in rows]
    hidden = curves(quick=quick)["BPTT"].hidden
    title = f"copying after {DELAY} steps, H = {hidden}"
    text = f"{machine.line(host)}\n\n{title}: test loss in nats\n\n{table(shown)}"
    print(text)
    commits = sorted({run["commit"] or "" for run in finished.runs.values()})
    path = finished.path.with_name("curves.json")
    write(path, {"machine": host, "checks": checks, "commits": commits, "results": rows}, text)
    plot(rows, task.baselines()["memoryless"].loss, title, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, one seed, few updates")
    parser.add_argument("--report", action="store_true", help="only table and plot of what there is")
    parser.add_argument("--output", type=Path, help="folder of the finished runs, table and plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = tasks.copying(DELAY)
    folder = options.output or (RESULTS.with_name("curves-quick") if options.quick else RESULTS)
    checks, finished = require([estimate_check()]), Finished(folder / "runs.jsonl")
    if not options.report:
        study(finished, task, quick=options.quick)
    report(finished, task, checks, quick=options.quick)


if __name__ == "__main__":
    main()
