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
    warmup   how many estimates should B be learnt from before weights move?

Every finished run is one line of results/feedback/<part>.jsonl, found by its complete configuration: a study that was
stopped goes on where it was. Parts can run in processes of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import machine
import torch
from gate import estimate_check, require
from report import quartiles, table, write
from study import Finished
from study_feedback_runs import CASES, EXACT, KNOWN, MNIST, SEVEN, Run, made
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "feedback"

WARMUPS = (0, 5, 10, 20, 30, 60)
DEFAULT_WARMUP = 30

CLOSED = ("copying 10, orthogonal", "copying 10", "copying 20", "adding, 10 steps", "permuted digits")
CLOSED_BATCH = {"adding, 10 steps": 32}
"""Sequences of an update where 8 are too few for BPTT to solve the task in as many updates."""

RATIO, FLOOR = 1.25, 0.01
"""A closed loop keeps up if its mean loss is at most RATIO times BPTT's plus FLOOR."""

LONG_RATE, LONG_BATCH = 2e-4, 32


def learned(rollouts: int, *, warmup: int = DEFAULT_WARMUP, follow: bool = True) -> str:
    """Spell an estimator with learned feedback."""
    return f"anp-feedback rollouts={rollouts} warmup={warmup}" + ("" if follow else " follow_weights=false")


PARTS_OF_METHOD = {
    "both": learned(8),
    "B moves with W alone": learned(8, warmup=0),
    "warm-up alone": learned(8, follow=False),
    "none": learned(8, warmup=0, follow=False),
}


def shadows(rollouts: int) -> tuple[str, ...]:
    """Return the estimators of one size of the protocol."""
    return (EXACT, learned(rollouts, warmup=0), f"anp-ls rollouts={rollouts}")


def cosine_runs(seeds: int) -> Iterator[Run]:
    estimators = (
        *shadows(8), learned(8), learned(8, warmup=0, follow=False), learned(4, warmup=0), learned(1, warmup=0), KNOWN
    )  # fmt: skip
    for seed, task in itertools.product(range(seeds), SEVEN):
        yield Run("cosine", task, estimators, seed, 150)


def sizes_runs(seeds: int) -> Iterator[Run]:
    first = SEVEN[0]
    for seed in range(seeds):
        yield Run("cosine", "copying 10, 400 steps", (*shadows(4), KNOWN), seed, 150, hidden=64)
        yield Run("cosine", first, shadows(8), seed, 150, nonlinearity="relu")
        yield Run("cosine", first, shadows(8), seed, 190, layers=2)
        yield Run("cosine", first, shadows(8), seed, 190, bidirectional=True)
        yield Run("cosine", first, (*shadows(8), learned(4, warmup=0), KNOWN), seed, 150, batch=1)
        yield Run("cosine", first, (*shadows(8), KNOWN), seed, 150, batch=32)
        yield Run("cosine", first, (*shadows(16), KNOWN), seed, 110, hidden=512)
        yield Run("cosine", first, (*shadows(64), KNOWN), seed, 110, hidden=1024)


def closed_runs(seeds: int) -> Iterator[Run]:
    for seed, task in itertools.product(range(seeds), CLOSED):
        more = (learned(4), learned(16), "anp-ls rollouts=8") if not seed else ()
        for estimator in (EXACT, learned(8), *more):
            yield Run("train", task, (estimator,), seed, 1000, batch=CLOSED_BATCH.get(task, 8))


def long_runs(seeds: int) -> Iterator[Run]:
    how = {"lr": LONG_RATE, "batch": LONG_BATCH}

    def trained(estimator: str, seed: int) -> Run:
        return Run("train", MNIST, (estimator,), seed, 1200, **how)

    for seed in range(min(2, seeds)):
        yield from (trained(estimator, seed) for estimator in (EXACT, learned(8)))
    yield Run("path", MNIST, (EXACT, *PARTS_OF_METHOD.values()), 0, 300, **how)
    yield from (trained(estimator, 0) for estimator in reversed(PARTS_OF_METHOD.values()))
    for seed in range(2, seeds):
        yield from (trained(estimator, seed) for estimator in (EXACT, learned(8)))
    yield Run("path", MNIST, (learned(8), EXACT), 0, 300, **how)


def time_runs(seeds: int) -> Iterator[Run]:
    for seed, threads, hidden in itertools.product(range(seeds), (2, 1), (128, 512)):
        half = f"anp-ls rollouts={hidden // 2}"
        methods = (EXACT, learned(8, warmup=0), learned(4, warmup=0))
        turns, few = (15, 5) if hidden == 128 else (7, 2)
        yield Run("time", "random", methods, seed, turns, hidden=hidden, batch=32, threads=threads)
        yield Run("time", "random", (methods[1], half), seed, few, hidden=hidden, batch=32, threads=threads)


def warmup_runs(seeds: int) -> Iterator[Run]:
    how = {MNIST: {"lr": LONG_RATE, "batch": LONG_BATCH}}
    for seed, task in itertools.product(range(seeds), (SEVEN[0], "permuted digits", MNIST)):
        estimators = (EXACT, *(learned(8, warmup=warmup) for warmup in WARMUPS))
        yield Run("cosine", task, estimators, seed, 10, **how.get(task, {}))
        for estimator in estimators:
            yield Run("train", task, (estimator,), seed, 300, **how.get(task, {}))


PARTS: dict[str, Callable[[int], Iterator[Run]]] = {
    "cosine": cosine_runs,
    "closed": closed_runs,
    "long": long_runs,
    "time": time_runs,
    "warmup": warmup_runs,
    "sizes": sizes_runs,
}
SEEDS = {"cosine": 3, "closed": 3, "long": 5, "time": 3, "warmup": 2, "sizes": 1}


def smaller(run: Run) -> Run:
    """Return a run for a look."""
    return run._replace(hidden=min(run.hidden, 32), updates=min(run.updates, 1 if run.kind == "time" else 20))


def key_of(run: dict) -> str:
    """Return what identifies a finished run."""
    return json.dumps(run["settings"], sort_keys=True)


def study(part: str, options: argparse.Namespace) -> None:
    """Make the runs of a part that are missing."""
    finished = Finished(options.output / f"{part}.jsonl", key_of)
    runs = list(PARTS[part](options.seeds or (1 if options.quick else SEEDS[part])))
    runs = [smaller(run) for run in runs] if options.quick else runs
    if options.mnist is None:
        runs = [run for run in runs if run.task != MNIST]
    runs = [run for run in dict.fromkeys(runs) if key_of({"settings": run._asdict()}) not in finished.runs]
    commit = machine.commit(Path(__file__).resolve().parent)
    for run in tqdm(runs, desc=part, unit="run"):
        finished.add({**made(run, options.mnist), "commit": commit})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--seeds", type=int, help="instead of each part's own number")
    parser.add_argument("--mnist", type=Path, help="numpy arrays train_images, train_labels, test_images, test_labels")
    parser.add_argument("--quick", action="store_true", help="one seed, small networks, few updates")
    parser.add_argument("--report", action="store_true", help="run nothing: tables of what there is")
    parser.add_argument("--output", type=Path, help="folder (default: results/feedback, for --quick its quick)")
    options = parser.parse_args()
    options.output = options.output or (RESULTS / "quick" if options.quick else RESULTS)
    # A single rollout is part of the study.
    warnings.filterwarnings("ignore", message=".*with rollouts=1 learns.*")
    if not options.report:
        torch.set_num_threads(1)
        require([estimate_check()])
        for part in options.only:
            study(part, options)


if __name__ == "__main__":
    main()
