"""How does training from forward passes compare with its rivals, on the benchmarks the field reads?

    python profiling/study_rivals.py --quick                                     a look: 10 minutes on two cores
    python profiling/study_rivals.py --full --mnist MNIST.npz --text BOOK.txt    says its hours, then runs
    python profiling/study_rivals.py --full --hours                              says its hours
    python profiling/study_rivals.py --full --device cuda --mnist MNIST.npz --text BOOK.txt
    python profiling/study_rivals.py --full --report                             tables and plots of what there is

Rivals are in `rivals.py`, tasks in `study_tasks.py` and `study_tasks_neurogym.py`, sizes and learning rates in
`study_rivals_plan.py`. Every finished run is one line of results/rivals/runs.jsonl, found by its configuration: a study
that was stopped goes on where it was, and a part of it (--tasks, --methods, --seeds) can be made first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import study_rivals_report
import study_tasks
import study_tasks_neurogym
import torch
from machine import processor
from study import Finished, Queue, attended, note_machine
from study_grid import Planned, key_of, training
from study_rivals_plan import FULL, QUICK, Grid, plan
from study_rivals_runs import METHODS, Settings, clock, made, train
from study_tasks import Benchmark
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "rivals"

QUICK_MINUTES = 9.0

Makers = dict[str, Callable[[int], Benchmark]]


def makers_of(options: argparse.Namespace) -> Makers:
    """Return the makers of all tasks; they may still raise for want of a file."""
    return {**study_tasks.by_name(options.mnist, options.text), **study_tasks_neurogym.by_name()}


def lacking(name: str, options: argparse.Namespace) -> str | None:
    """Return what a task lacks here, or None."""
    if name in study_tasks_neurogym.ENVIRONMENTS:
        return None if importlib.util.find_spec("neurogym") else study_tasks_neurogym.ABSENT
    for start, option, path in (("mnist", "--mnist", options.mnist), ("characters", "--text", options.text)):
        if name.startswith(start):
            try:
                study_tasks.existing(path, option)
                if option == "--mnist":
                    study_tasks.archive(path).close()
            except (FileNotFoundError, ValueError) as error:
                return str(error)
    return None


def names_of(grid: Grid, options: argparse.Namespace) -> list[str]:
    """Return the tasks that can be made; exit where one that was asked for cannot, or a path leads nowhere."""
    every = list(dict.fromkeys(entry.task for entry in grid.entries))
    if unknown := set(options.tasks or ()) - set(every):
        sys.exit(f"no task {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    reasons = {name: lacking(name, options) for name in options.tasks or every}
    for name, reason in reasons.items():
        asked = options.tasks or (name.startswith("mnist") and options.mnist) or (name == "characters" and options.text)
        if reason and asked:
            sys.exit(f"{name}: {reason}")
        if reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    return [name for name, reason in reasons.items() if reason is None]


def key_of_line(run: dict) -> str:
    """Return what identifies a finished run."""
    if missing := [name for name in ("curve", "seconds", "machine") if name not in run]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return key_of(run["task"], Settings(**run["settings"]))


def kind_of(settings: Settings) -> Settings:
    """Return what the time of a run depends on."""
    return settings._replace(seed=0, lr=1e-4, updates=3, start="default", optimiser="adam")


def seconds_of(runs: Sequence[Planned], makers: Makers, finished: Finished) -> dict[str, float]:
    """Estimate the seconds of one process that runs take, by task.

    From a finished run of the same kind on this processor; where there is none, from three updates.
    """
    known: dict[tuple[str, Settings], dict] = {}
    for line in finished.runs.values():
        settings = Settings(**line["settings"])
        if line["machine"] == processor(settings.device) and line["curve"]["seconds"]:
            known[line["task"], kind_of(settings)] = line
    # As workers run.
    torch.set_num_threads(1)
    kinds: dict[tuple[str, Settings], list[Planned]] = {}
    for run in runs:
        kind = kind_of(run.settings)
        kinds.setdefault((run.task, kind), []).append(run)
    total: dict[str, float] = {}
    last: tuple[tuple[str, int], Benchmark] | None = None
    for (name, kind), mine in tqdm(kinds.items(), desc="timing", unit="kind", leave=False):
        if (line := known.get((name, kind))) is not None:
            training_s, whole = line["curve"]["seconds"][-1], line["seconds"]
            for run in mine:
                share = run.settings.updates / line["curve"]["updates"][-1]
                total[name] = total.get(name, 0.0) + whole - training_s + share * training_s
            continue
        if last is None or last[0] != (name, kind.window):
            last = (name, kind.window), makers[name](kind.window)
        started = clock(kind.device)
        learned = train(last[1], kind, progress=False)
        if not learned.seconds:
            # Its first loss is not finite: so will be those of its runs, which end there.
            continue
        looks = clock(kind.device) - started - learned.seconds[-1]
        update = (learned.seconds[-1] - learned.seconds[0]) / max(len(learned.seconds) - 1, 1)
        for run in mine:
            spent = learned.seconds[0] + update * run.settings.updates + looks / 3 * training.SHARES
            total[name] = total.get(name, 0.0) + spent
    return total


def say_hours(runs: Sequence[Planned], makers: Makers, finished: Finished, jobs: int) -> None:
    """Print how long runs take, about."""
    seconds = seconds_of(runs, makers, finished)
    for name, spent in seconds.items():
        print(f"{name:24s}{spent / 3600:8.2f} h of one process")
    whole = sum(seconds.values()) / 3600
    print(
        f"{len(runs)} runs, at most about {whole:.1f} hours of one process, {whole / jobs:.1f} with {jobs} jobs; "
        "of two learning rates that turn out equal only one runs",
        flush=True,
    )


def work(options: argparse.Namespace) -> None:
    """Make the runs that are read from standard input, one JSON line each, until the input ends."""
    torch.set_num_threads(1)
    makers, tasks_made = makers_of(options), {}
    for line in sys.stdin:
        name, values = json.loads(line)
        settings = Settings(**values)
        key = name, settings.window
        if key not in tasks_made:
            tasks_made[key] = makers[name](settings.window)
        print(json.dumps(made(tasks_made[key], settings)), flush=True)


def study(options: argparse.Namespace, grid: Grid) -> None:
    """Make the runs that are missing."""
    names = names_of(grid, options)
    planned = plan(grid, names, options.methods or METHODS, options.seeds, options.device)
    finished = Finished(options.output / "runs.jsonl", key_of_line)
    minutes = options.minutes if options.full or options.minutes else QUICK_MINUTES
    queue = Queue(planned, finished, time.monotonic() + 60 * minutes if minutes else float("inf"))
    if options.hours or (options.full and not options.tasks):
        say_hours(queue.waiting, makers_of(options), finished, options.jobs)
    if options.hours or not queue.waiting:
        return
    note_machine(options.output)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    for option, path in (("--mnist", options.mnist), ("--text", options.text)):
        command += [option, str(path)] if path else []
    attended(queue, command, options.jobs, gpu=options.device.startswith("cuda"))


def positive(text: str) -> int:
    """Read a number of at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the whole grid")
    which.add_argument("--quick", action="store_true", help="the small grid (the default)")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--seeds", type=positive, help="in place of each task's own number")
    parser.add_argument("--mnist", type=Path, help=f".npz of numpy arrays {', '.join(study_tasks.ARRAYS)}")
    parser.add_argument("--text", type=Path, help="a text in UTF-8")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--jobs", type=positive, default=2, help="worker processes")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many")
    parser.add_argument("--hours", action="store_true", help="run nothing: say how long it takes")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots of what there is")
    parser.add_argument("--output", type=Path, help="folder (default: results/rivals, for --quick its quick)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {options.device}: torch finds no GPU here")
    options.output = options.output or (RESULTS if options.full else RESULTS / "quick")
    grid = FULL if options.full else QUICK
    if not options.report:
        study(options, grid)
    if not options.hours:
        finished = Finished(options.output / "runs.jsonl", key_of_line)
        study_rivals_report.report(options.output, list(finished.runs.values()), grid)
        print(f"tables and plots: {options.output / 'rivals.md'}")


if __name__ == "__main__":
    main()
