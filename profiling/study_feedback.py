"""What does learned feedback (method="anp-feedback") reach, beside BPTT, anp-ls and what is known without rollouts?

    python profiling/study_feedback.py --mnist MNIST.npz       everything; results/feedback/
    python profiling/study_feedback.py --only cosine closed    a part
    python profiling/study_feedback.py --quick                 smaller networks, few updates: a look
    python profiling/study_feedback.py --report                tables of what there is

    cosine   BPTT trains, the others see the same weights and batches: cosine of dW_hh to BPTT's
    sizes    the same at other widths, lengths, batches and structures
    closed   each estimator trains: final losses
    long     MNIST averaged to 14 x 14 by pixel, 196 steps; the error of sums of clipped dW_hh; the parts of the method
    time     time of an update over BPTT's
    gated    GRU and LSTM: cosines, and each trains by itself
    warmup   how many estimates should B be learnt from before weights move?

Every finished run is one line of results/feedback/<part>.jsonl, found by its complete configuration: a study that was
stopped goes on where it was. Parts can run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import machine
import torch
from gate import estimate_check, require
from report import table, write
from study import Finished
from study_feedback_plan import PARTS, SEEDS
from study_feedback_report import TABLES
from study_feedback_runs import CASES, MNIST, Run, made
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "feedback"


def smaller(run: Run) -> Run:
    """Return a run for a look."""
    return run._replace(hidden=min(run.hidden, 32), updates=min(run.updates, 1 if run.kind == "time" else 20))


def key_of(run: dict) -> str:
    """Return what identifies a finished run; one that is older than a setting had its default."""
    return json.dumps(Run(**run["settings"])._asdict(), sort_keys=True)


def study(part: str, options: argparse.Namespace) -> None:
    """Make the runs of a part that are missing."""
    finished = Finished(options.output / f"{part}.jsonl", key_of)
    runs = list(PARTS[part](options.seeds or (1 if options.quick else SEEDS[part])))
    runs = [smaller(run) for run in runs] if options.quick else runs
    runs = [run for run in runs if not options.tasks or run.task in options.tasks]
    if options.mnist is None:
        runs = [run for run in runs if run.task != MNIST]
    runs = [run for run in dict.fromkeys(runs) if key_of({"settings": run._asdict()}) not in finished.runs]
    commit = machine.commit(Path(__file__).resolve().parent)
    for run in tqdm(runs, desc=part, unit="run"):
        finished.add({**made(run, options.mnist), "commit": commit})


def report(folder: Path, checks: list[dict[str, object]]) -> None:
    """Write feedback.json and feedback.txt: the machine and the tables of the runs that there are."""
    runs = {part: list(Finished(folder / f"{part}.jsonl", key_of).runs.values()) for part in PARTS}
    every = [run for mine in runs.values() for run in mine]
    if not every:
        return
    host = machine.machine()
    results = {name: make(runs[part]) for name, (part, make) in TABLES.items() if runs[part]}
    record = {
        "machine": host,
        "checks": checks,
        "commits": sorted({run["commit"] or "" for run in every}),
        "processor_seconds": round(sum(run["seconds"] for run in every)),
        "results": results,
    }
    parts = [machine.line(host), f"{len(every)} runs, {record['processor_seconds'] / 60:.0f} minutes of processor time"]
    for name, rows in results.items():
        shown = [{column: value for column, value in row.items() if not isinstance(value, dict)} for row in rows]
        # `table` is of one type a column.
        columns = list(dict.fromkeys(column for row in shown for column in row))
        parts.append(
            f"{name}\n\n{table([{column: row.get(column) for column in columns} for row in shown])}" if rows else name
        )
    write(folder / "feedback.json", record, "\n\n".join(parts))
    print("\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--tasks", nargs="+", choices=[*CASES, MNIST], help="only these")
    parser.add_argument("--seeds", type=int, help="instead of each part's own number")
    parser.add_argument("--mnist", type=Path, help="numpy arrays train_images, train_labels, test_images, test_labels")
    parser.add_argument("--quick", action="store_true", help="one seed, small networks, few updates")
    parser.add_argument("--report", action="store_true", help="run nothing: tables of what there is")
    parser.add_argument("--output", type=Path, help="folder (default: results/feedback, for --quick its quick)")
    options = parser.parse_args()
    options.output = options.output or (RESULTS / "quick" if options.quick else RESULTS)
    # A single rollout is part of the study.
    warnings.filterwarnings("ignore", message=".*with rollouts=1 learns.*")
    torch.set_num_threads(1)
    checks = require([estimate_check()])
    if not options.report:
        for part in options.only:
            study(part, options)
    report(options.output, checks)


if __name__ == "__main__":
    main()
