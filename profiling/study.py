"""Does learning from perturbed rollouts come near true BPTT, and how far ahead of older perturbation methods is it?

    python profiling/study.py --full --csv STATION.csv     all tasks, methods, seeds; results/study/
    python profiling/study.py --quick                      smaller networks, one seed: two minutes on two cores
    python profiling/study.py --full --report              tables and plots of what there is so far
    python profiling/study.py --scaling                    against width, length and number of rollouts
    python profiling/study.py --long                       100,000 steps within a fixed memory

The networks are `nn.RNN`, for which the published rules and BPTT cut to one step are defined; GRU and LSTM are studied
in `study_feedback.py`. Every finished run is one line of `runs.jsonl`, identified by its complete configuration, so
that a study which was stopped or killed resumes where it was. Worker processes of one thread each make the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import study_long
import study_report
import study_scaling
from gate import estimate_check, require
from machine import machine
from study_grid import FULL, METHODS, QUICK, Planned, best_rate, key_of, plan, tasks, training
from tqdm import tqdm

from anpgpu.estimators.found import NonFiniteRolloutsError

RESULTS = Path(__file__).resolve().parent / "results" / "study"

QUICK_MINUTES = 9.0


def key_of_line(run: dict) -> str:
    """Return what identifies a finished run of this study."""
    if missing := [name for name in ("curve", "seconds") if name not in run]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return key_of(run["task"], training.Settings(**run["settings"]))


class Finished:
    """The file of finished runs. Only one process may write to it at a time.

    Args:
        path: of the file, one JSON line for each run.
        key: returns what identifies a run.
    """

    def __init__(self, path: Path, key: Callable[[dict], str] | None = None) -> None:
        self.path, self.key = path, key or key_of_line
        self.runs: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        # A process that is killed while writing leaves a last line without its end; who adds a run takes it away.
        whole, unfinished = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
        self.cut = len(whole) if unfinished else None
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                run = json.loads(line)
                self.runs[self.key(run)] = run
            except (ValueError, TypeError, KeyError) as error:
                print(f"line {number} of {path.name} is no run and was skipped: {error}", file=sys.stderr)
        if unfinished:
            print(f"line {len(whole.splitlines()) + 1} of {path.name} is unfinished and was skipped", file=sys.stderr)

    def add(self, run: dict) -> None:
        """Add a run; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            if self.cut is not None:
                file.truncate(self.cut)
                self.cut = None
            file.write(json.dumps(run).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs[self.key(run)] = run


class Queue:
    """Hands out runs in the order of the plan; a run waits for those that its learning rate is chosen from."""

    def __init__(self, planned: Sequence[Planned], finished: Finished, deadline: float) -> None:
        self.waiting = [run for run in planned if self._settled(run, finished) not in finished.runs]
        self.finished, self.deadline = finished, deadline
        self.changed = threading.Condition()
        self.running = 0
        self.stopped = False

    @staticmethod
    def _settled(planned: Planned, finished: Finished) -> str | None:
        """Return the key of a run, or None while its learning rate is not chosen."""
        if not planned.candidates:
            return key_of(planned.task, planned.settings)
        rate = best_rate(planned.candidates, finished.runs)
        return None if rate is None else key_of(planned.task, planned.settings._replace(lr=rate))

    def take(self) -> Planned | None:
        """Wait for the next run that can be made and return it; None when all are made or time is up."""
        with self.changed:
            while self.waiting and not self.stopped and time.monotonic() < self.deadline:
                for planned in self.waiting:
                    if planned.candidates:
                        rate = best_rate(planned.candidates, self.finished.runs)
                        if rate is None:
                            continue
                        ready = planned._replace(settings=planned.settings._replace(lr=rate))
                    else:
                        ready = planned
                    self.waiting.remove(planned)
                    if key_of(*ready[:2]) in self.finished.runs:
                        break
                    self.running += 1
                    return ready
                else:
                    if not self.running:
                        raise RuntimeError(f"{len(self.waiting)} runs wait for runs that are not planned")
                    self.changed.wait()
            return None

    def done(self, run: dict | None) -> None:
        """Add a finished run. None means that it failed: no more runs are handed out."""
        with self.changed:
            self.running -= 1
            if run is None:
                self.stopped = True
            else:
                self.finished.add(run)
            self.changed.notify_all()


def work(csv_path: Path | None) -> None:
    """Make the runs that are read from standard input, one JSON line each, until the input ends."""
    made_tasks: dict[str, tasks.Task] = {}
    for line in sys.stdin:
        name, values = json.loads(line)
        if name not in made_tasks:
            made_tasks[name] = tasks.by_name(csv_path)[name]()
        started, reason = time.process_time(), None
        try:
            curve = training.train(made_tasks[name], training.Settings(**values), progress=False)
        except NonFiniteRolloutsError as error:
            # No rollout is finite: the run counts as broken off. Any other error is the study's own, and ends it.
            curve, reason = training.Curve([], [], [], [], []), str(error)
        run = {"task": name, "settings": values, "curve": curve._asdict(), "seconds": time.process_time() - started}
        print(json.dumps(run if reason is None else {**run, "broke_off": reason}), flush=True)


def attend(queue: Queue, command: Sequence[str], environment: Mapping[str, str], bar: tqdm) -> None:
    """Run one worker process until the queue is empty."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        while (planned := queue.take()) is not None:
            try:
                worker.stdin.write(json.dumps([planned.task, planned.settings._asdict()]) + "\n")
                answer = worker.stdout.readline()
            except OSError:
                answer = ""
            queue.done(json.loads(answer) if answer.endswith("\n") else None)
            bar.set_postfix_str(f"{planned.task} {planned.settings.method}")
            bar.update()
        worker.stdin.close()


def attended(queue: Queue, command: Sequence[str], jobs: int, *, gpu: bool = False) -> None:
    """Make the runs of a queue in worker processes of one thread each; exit where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    started = time.monotonic()
    with tqdm(total=len(queue.waiting), desc="runs", unit="run") as bar:
        threads = [
            threading.Thread(target=attend, args=(queue, command, environment, bar), daemon=True) for _ in range(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tqdm.write(f"{(time.monotonic() - started) / 60:.1f} minutes, {len(queue.waiting)} runs left")
    if queue.stopped:
        sys.exit("a worker process failed; its message is above")


def note_machine(folder: Path) -> None:
    """Check that estimates are right; write this machine, those of earlier runs, and all commits to machine.json."""
    checks = require([estimate_check()])
    path, host = folder / "machine.json", machine()
    before = json.loads(path.read_text()) if path.exists() else {}
    earlier = [*before.get("earlier", []), *([before["machine"]] if before else [])]
    record = {
        "machine": host,
        "earlier": [other for other in earlier if (other["cpu"], other["gpu"]) != (host["cpu"], host["gpu"])],
        "commits": list(dict.fromkeys([*before.get("commits", []), host["commit"]])),
        "checks": checks,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def study(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the runs that are missing."""
    grid = FULL if arguments.full else QUICK
    known = tasks.by_name(arguments.csv)
    names = [name for name in grid.sizes if name in known and (not arguments.tasks or name in arguments.tasks)]
    if unknown := set(arguments.tasks or ()) - set(known):
        sys.exit(
            f"no task {', '.join(sorted(unknown))} (those of the weather need --csv); there are {', '.join(known)}"
        )
    methods = arguments.methods or METHODS
    finished = Finished(folder / "runs.jsonl")
    minutes = arguments.minutes if arguments.full or arguments.minutes else QUICK_MINUTES
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    seeds = arguments.seeds or (3 if arguments.full else 1)
    queue = Queue(plan(grid, names, methods, seeds), finished, deadline)
    if queue.waiting:
        note_machine(folder)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    command += [] if arguments.csv is None else ["--csv", str(arguments.csv)]
    attended(queue, command, arguments.jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the whole grid")
    which.add_argument("--quick", action="store_true", help="the small grid (the default)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--scaling", action="store_true", help="alignment and updates against H, T and P")
    other.add_argument("--long", action="store_true", help="memory of a very long sequence")
    other.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots of what there is")
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(FULL.sizes)}")
    parser.add_argument("--methods", nargs="+", choices=training.METHODS)
    parser.add_argument("--seeds", type=int, help="runs of each method and task (full: 3, quick: 1)")
    parser.add_argument("--csv", type=Path, help="hourly station data; without it there is no weather task")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--minutes", type=float, help="start nothing new after so many")
    parser.add_argument("--output", type=Path, help="folder (default: results/study, for --quick results/study/quick)")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.csv)
        return
    if arguments.scaling or arguments.long:
        measurement = study_scaling if arguments.scaling else study_long
        measurement.main(arguments.output or RESULTS, quick=arguments.quick)
        return
    folder = arguments.output or (RESULTS if arguments.full else RESULTS / "quick")
    if not arguments.report:
        study(arguments, folder)
    study_report.report(folder, Finished(folder / "runs.jsonl").runs, FULL if arguments.full else QUICK, arguments.csv)


if __name__ == "__main__":
    main()
