"""How far is an update on a GPU from what it is meant to take? Shapes, goals and shares of the ceiling in one call.

    python profiling/goals.py [--minutes 4] [--output FILE]

An update is everything up to the gradients, as in `compare.py`, which also checks results before anything is timed.
Goals in milliseconds are of an H200; on another card the CUDA graph is measured by cuDNN's BPTT in float32 of the same
run. Shares are of a large matrix product in the same run, with 2 H^2 operations per rollout and step. Without a GPU the
same rows of small shapes run, for which there are no goals.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from cases import BASELINE_ROWS, BATCH, Case
from compare import peers, reason
from compare_kernels import Work
from compare_peers import Task, captured, ours, task_of
from gate import Check, require
from machine import line, machine, short_name
from report import interleaved, quartiles, table, write
from time_ops import ceiling
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"

REPEATS, WARMUPS = 21, 3

EAGER, GRAPH, LEAST_SQUARES, LEAST_SQUARES_GRAPH = "anp", "anp, CUDA graph", "anp-ls", "anp-ls, CUDA graph"


class Goal(NamedTuple):
    """What an update of a shape is meant to take."""

    case: Case
    milliseconds: dict[str, float]
    """On an H200."""
    over_bptt: float
    """Of the CUDA graph, over cuDNN's BPTT in float32, on any card."""


GOALS = (
    Goal(Case(200, 32, 128, 512), {GRAPH: 4.0, EAGER: 4.5, LEAST_SQUARES_GRAPH: 8.0, LEAST_SQUARES: 9.0}, 0.47),
    Goal(Case(1000, 32, 128, 64), {GRAPH: 3.0, EAGER: 3.5}, 1.8),
    Goal(Case(100, 512, 128, 256), {GRAPH: 6.0, EAGER: 6.5}, 2.5),
)

SHARES = {128: (64, 0.10), 256: (64, 0.20), 512: (64, 0.34), 1024: (32, 0.47), 2048: (32, 0.65)}
"""Steps, and the share of the ceiling that a CUDA graph is meant to reach, by hidden units; of 16,384 rows."""

SMALL = (Goal(Case(12, 2, 8, 16), {EAGER: 0.0, LEAST_SQUARES: 0.0}, 0.0),)

BPTT = {"cuda": "BPTT, cuDNN fp32", "cpu": "BPTT, nn.RNN fp32"}
"""Its name in `compare.py`."""


def work_of(name: str, task: Task) -> Work:
    """Return what makes an update."""
    if name == BPTT[task.device.type]:
        return peers(task.device, None)[name].make(task)
    method = "anp-ls" if name.startswith("anp-ls") else "anp"

    def update() -> object:
        return ours(task, method=method)

    return captured(task, update) if name.endswith("graph") else update


def checks(device: torch.device) -> Iterator[Check]:
    """Yield what must hold before anything is timed."""
    known = peers(device, None)
    for name in ("ours", "ours, anp-ls", BPTT[device.type]):
        yield from known[name].checks(device)


def milliseconds(names: tuple[str, ...], case: Case, device: torch.device) -> dict[str, float]:
    """Return the median of every update, in turns; not a number for one that could not run, which is told."""
    works: dict[str, Work] = {}
    for name in names:
        try:
            work = work_of(name, task_of(case, device))
            work()
        except RuntimeError as problem:
            print(f"not run: {name}, {case}: {reason(problem)}", file=sys.stderr)
        else:
            works[name] = work
    taken = interleaved(works, REPEATS, device, warmups=WARMUPS)
    return {name: 1e3 * quartiles(taken[name]).median if name in taken else math.nan for name in names}


def goal_rows(goal: Goal, device: torch.device, *, has_goals: bool) -> list[dict[str, object]]:
    """Return the rows of a shape: updates beside their goals, and the graph beside BPTT."""
    names = (*goal.milliseconds, BPTT[device.type])
    taken = milliseconds(names, goal.case, device)
    bptt = taken[BPTT[device.type]]
    return [
        {
            **shape(goal.case),
            "update": name,
            "ms": taken[name],
            "goal": goal.milliseconds.get(name) if has_goals else None,
            "over BPTT": taken[name] / bptt,
            "goal over BPTT": goal.over_bptt if name == GRAPH else None,
            "of ceiling": None,
            "goal of ceiling": None,
        }
        for name in names
    ]


def share_row(hidden: int, peak: float, device: torch.device) -> dict[str, object]:
    """Return the row of a graph's share of the ceiling."""
    steps, wanted = SHARES[hidden]
    case = Case(steps, BATCH, BASELINE_ROWS // BATCH, hidden)
    taken = milliseconds((GRAPH,), case, device)[GRAPH]
    blank = dict.fromkeys(("goal", "over BPTT", "goal over BPTT"))
    share = case.flops / taken / 1e9 / peak
    return {**shape(case), "update": GRAPH, "ms": taken, **blank, "of ceiling": share, "goal of ceiling": wanted}


def shape(case: Case) -> dict[str, object]:
    """Return the columns of a shape."""
    return {"T": case.time, "B": case.batch, "P": case.rollouts, "H": case.hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4, help="start nothing new after so many")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/goals-<gpu>-<date>.json here")
    arguments = parser.parse_args()
    last = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = machine()
    output = arguments.output or RESULTS / f"goals-{short_name(host)}-{host['date']}.json"
    cuda = device.type == "cuda"
    print(f"{line(host)}\n{'' if cuda else 'no GPU was found: small shapes, no goals'}")
    record: dict[str, object] = {"machine": host, "checks": require(list(checks(device)))}
    record["ceiling"] = top = ceiling(device, REPEATS, quick=not cuda)
    peak = top["tflops"].median
    rows: list[dict[str, object]] = []
    left_out: list[str] = []
    record["results"], record["left_out"] = rows, left_out
    jobs = [
        functools.partial(goal_rows, goal, device, has_goals="h200" in short_name(host))
        for goal in (GOALS if cuda else SMALL)
    ]
    if cuda:
        jobs += [lambda hidden=hidden: [share_row(hidden, peak, device)] for hidden in SHARES]
    for number, job in enumerate(tqdm(jobs, desc="updates", unit="shape")):
        if time.monotonic() > last:
            left_out.append(f"{len(jobs) - number} of {len(jobs)} shapes: {arguments.minutes:g} minutes were over")
            break
        rows += job()
    said = [f"ceiling {peak:.3g} TFLOP/s ({top['dtype']})", *([table(rows)] if rows else []), *left_out]
    write(output, record, "\n\n".join((line(host), *said)))
    print("\n\n".join(said))
    if left_out:
        sys.exit(f"left out: {left_out[0]}")


if __name__ == "__main__":
    main()
