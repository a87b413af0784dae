"""Does a change cost time on the CPU? One update in an old checkout and in this one, in fresh processes, in turns.

    python profiling/compare_commits.py OLD_CHECKOUT [--shapes small,wide] [--methods anp,anp-ls] [--output FILE]

OLD_CHECKOUT is any folder with anpgpu/ in it, such as `git worktree add ../old COMMIT` makes. Both checkouts time the
same update by `anpgpu.estimate_grad_`, with the settings of this file and otherwise each checkout's own defaults. Each
turn is three processes: old, new, old. A process runs warm-up updates, in which Numba compiles or loads the cache of
its checkout, and then reports the median of several updates. A turn gives two ratios:

    new / old    the new time over the geometric mean of the two old ones, so that a machine that slows down steadily
                 slows both alike
    A/A          the second old time over the first: by how much the times of equal code differ

A row is slower where median(new / old) - BOUND > (max(A/A) - min(A/A)) / 2, with BOUND = 1.03. Half the range of A/A
is the noise of this run, so that a busy machine hides a slow-down and does not invent one; five ratios are too few for
quartiles. The exit status is 1 if any row is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cases import CPU_SHAPES, QUICK_SHAPES, Case, named_shapes
from gate import Check, estimate_check, require
from machine import commit, line, machine
from report import CLOCKS, seconds, table, write
from torch import nn
from tqdm import tqdm

import anpgpu

NEW = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BOUND = 1.03
QUICK_BOUND = 2.0
"""Wide, since updates of a millisecond cannot be compared to a few per cent."""

WARMUPS = 2
UPDATES, LEAST_S = 5, 1.0
"""A median is over at least this many updates, and over as many as fit into this time."""

QUICK_LEAST_S = 0.05
SIGMA, DISCOUNT = 1e-3, 0.9


def update_of(case: Case, method: str) -> Callable[[], object]:
    """Return one update. It uses only names that older commits have too."""
    torch.manual_seed(0)
    inputs = torch.randn(case.time, case.batch, case.inputs)
    targets = torch.randn(case.time, case.batch, case.outputs)
    rule = anpgpu.Perturbation(method=method, rollouts=case.rollouts, sigma=SIGMA, discount=DISCOUNT)
    rnn = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule)
    readout = nn.Linear(case.hidden, case.outputs)

    def update() -> None:
        rnn.zero_grad()
        readout.zero_grad()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)

    return update


def median_here(case: Case, method: str, least_s: float, clock: str) -> float:
    """Return the median seconds of an update in this process."""
    update = update_of(case, method)
    for _ in range(WARMUPS):
        update()
    times: list[float] = []
    while len(times) < UPDATES or sum(times) < least_s:
        times.append(seconds(update, CPU, clock))
    return statistics.median(times)


def answer(order: dict[str, object]) -> dict[str, object]:
    """Return what the order asks this process for: its version and a check, or a time."""
    if "check" in order:
        return {"version": anpgpu.__version__, "check": estimate_check()._asdict()}
    taken = median_here(Case(*order["case"]), str(order["method"]), float(order["least_s"]), str(order["clock"]))
    return {"seconds": taken}


def ask(checkout: Path, threads: int, order: dict[str, object]) -> dict[str, object]:
    """Return `answer` of a fresh process that imports anpgpu from a checkout.

    Raises:
        RuntimeError: the process failed, or imported another anpgpu than the checkout's.
    """
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, str(checkout), "--threads", str(threads), "--measure", json.dumps(order)]
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{order} failed in {str(checkout)!r}:\n{run.stderr}")
    reply: dict[str, object] = json.loads(run.stdout.splitlines()[-1])
    return reply


def checkout_of(path: Path) -> Path:
    """Return the folder of a checkout.

    Raises:
        ValueError: there is no anpgpu in it.
    """
    if not (path / "anpgpu" / "__init__.py").exists():
        raise ValueError(f"OLD_CHECKOUT must be a folder with anpgpu/ in it, got {str(path)!r}")
    return path.resolve()


def described(checkout: Path, threads: int) -> tuple[dict[str, object], Check]:
    """Return the commit and version of a checkout, and whether its estimate agrees with autograd."""
    reply = ask(checkout, threads, {"check": True})
    return {"commit": commit(checkout / "anpgpu"), "version": reply["version"]}, Check(**reply["check"])


def is_slower(ratios: list[float], same: list[float], bound: float) -> bool:
    """Return whether new / old is slower by the rule of this file; `same`: the A/A ratios of the same run."""
    return statistics.median(ratios) - bound > (max(same) - min(same)) / 2


def row_of(
    shape: str, case: Case, method: str, turns: list[tuple[float, float, float]], bound: float
) -> dict[str, object]:
    """Return one row of the table from the old, new and old seconds of every turn."""
    ratios = [new / (before * after) ** 0.5 for before, new, after in turns]
    same = [after / before for before, _, after in turns]
    return {
        "shape": shape,
        "T": case.time,
        "B": case.batch,
        "P": case.rollouts,
        "H": case.hidden,
        "method": method,
        "old ms": 1e3 * statistics.median([old for before, _, after in turns for old in (before, after)]),
        "new ms": 1e3 * statistics.median([new for _, new, _ in turns]),
        "new / old": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "A/A": statistics.median(same),
        "A/A least": min(same),
        "A/A most": max(same),
        "verdict": "SLOWER" if is_slower(ratios, same, bound) else "",
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("checkout", type=Path, metavar="OLD_CHECKOUT", help="a folder with the old anpgpu/ in it")
    command.add_argument("--shapes", help=f"comma-separated, of {', '.join(CPU_SHAPES)}; default: all")
    command.add_argument("--methods", default="anp,anp-ls", help="comma-separated")
    command.add_argument("--pairs", type=int, help="turns of old, new, old for each row; default: 5, with --quick 2")
    command.add_argument("--bound", type=float, help=f"see above; default: {BOUND}, with --quick {QUICK_BOUND}")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument(
        "--clock", default="wall", choices=tuple(CLOCKS), help="cpu: on a busy machine, with --threads 1"
    )
    command.add_argument("--quick", action="store_true", help="one tiny shape: does the script work?")
    command.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .txt")
    command.add_argument("--measure", help=argparse.SUPPRESS)
    return command


def main() -> None:
    command = parser()
    arguments = command.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        if not Path(anpgpu.__file__).resolve().is_relative_to(arguments.checkout.resolve()):
            raise RuntimeError(f"anpgpu came from {anpgpu.__file__!r}, not from {str(arguments.checkout)!r}")
        print(json.dumps(answer(json.loads(arguments.measure))))
        return
    pairs, bound = (2, QUICK_BOUND) if arguments.quick else (5, BOUND)
    pairs = pairs if arguments.pairs is None else arguments.pairs
    bound = bound if arguments.bound is None else arguments.bound
    if pairs < 2:
        command.error(f"--pairs must be at least 2, or there is no spread, got {pairs}")
    if arguments.clock == "cpu" and arguments.threads != 1:
        command.error(f"--clock cpu adds up the time of all threads: use --threads 1 with it, got {arguments.threads}")
    try:
        old = checkout_of(arguments.checkout)
        shapes = named_shapes(QUICK_SHAPES if arguments.quick else CPU_SHAPES, arguments.shapes)
    except ValueError as problem:
        command.error(str(problem))
    descriptions, checks = zip(*(described(checkout, arguments.threads) for checkout in (old, NEW)), strict=True)
    host = machine()
    names = [
        f"{name}: commit {version['commit']}, anpgpu {version['version']}"
        for name, version in zip(("old", "new"), descriptions, strict=True)
    ]
    heading = "\n".join([line(host), "; ".join(names), f"{pairs} turns, {arguments.clock} clock, bound {bound:g}"])
    print(f"{heading}\n")
    rows: list[dict[str, object]] = []
    turns_of: list[list[tuple[float, float, float]]] = []
    record: dict[str, object] = {
        "machine": host,
        "old": descriptions[0],
        "new": descriptions[1],
        "threads": arguments.threads,
        "clock": arguments.clock,
        "bound": bound,
        "checks": require(list(checks)),
        "results": rows,
        "seconds of old, new, old": turns_of,
    }
    work = [
        (shape, case, method)
        for shape, cases in shapes.items()
        for case in cases
        for method in arguments.methods.split(",")
    ]
    least_s = QUICK_LEAST_S if arguments.quick else LEAST_S
    with tqdm(total=3 * pairs * len(work), unit="process") as bar:
        for shape, case, method in work:
            bar.set_description(f"{shape} {method}")
            order = {"case": list(case), "method": method, "least_s": least_s, "clock": arguments.clock}
            turns = []
            for _ in range(pairs):
                taken = []
                for checkout in (old, NEW, old):
                    taken.append(float(ask(checkout, arguments.threads, order)["seconds"]))
                    bar.update()
                turns.append(tuple(taken))
            turns_of.append(turns)
            rows.append(row_of(shape, case, method, turns, bound))
            # Rewritten after every row, so that an interrupted run keeps its results.
            if arguments.output is not None:
                write(arguments.output, record, f"{heading}\n\n{table(rows)}")
    print(table(rows))
    slower = [f"{row['shape']} {row['method']}" for row in rows if row["verdict"]]
    if slower:
        sys.exit(f"slower: {', '.join(slower)}")


if __name__ == "__main__":
    main()
