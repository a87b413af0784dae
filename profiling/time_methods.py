"""What does an update of each method cost on a CPU, over one of `anp`?

    python profiling/time_methods.py --output profiling/results/time_methods-cpu.json
    python profiling/time_methods.py --threads 1 --clock cpu      # on a machine that is not free
    python profiling/time_methods.py --methods anp-ls,anp-feedback --hidden 64,512 --fractions 4,1

An update is `estimate_grad_`. The methods take turns, and ratios are taken turn by turn, so that another program's load
falls on all. The shapes: H of 64 to 512, P = H / 4 and P = H, T and B such that an update takes a fraction of a second.
The goals of `anp-ls` are 1.4 at P = H / 4 and 2.2 at P = H.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cases import METHOD_SHAPES, Case
from gate import estimate_check, require
from machine import line, machine
from report import CLOCKS, interleaved, quartiles, table, write
from torch import nn

import anpgpu

OVER = "anp"
GOALS = {("anp-ls", 4): 1.4, ("anp-ls", 1): 2.2}
"""By method and H / P."""


def update_of(case: Case, method: str) -> Callable[[], object]:
    """Return one update by a method with its own defaults."""
    torch.manual_seed(0)
    inputs = torch.randn(case.time, case.batch, case.inputs)
    targets = torch.randn(case.time, case.batch, case.outputs)
    rule = anpgpu.Perturbation(method, case.rollouts)
    rnn, readout = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule), nn.Linear(case.hidden, case.outputs)

    def update() -> None:
        rnn.zero_grad()
        readout.zero_grad()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)

    return update


def rows_of(case: Case, methods: list[str], repeats: int, clock: str) -> list[dict[str, object]]:
    """Time the methods in turns at one shape; return a row each."""
    works = {method: update_of(case, method) for method in (OVER, *methods)}
    times = interleaved(works, repeats, torch.device("cpu"), warmups=2, clock=clock)
    rows = []
    for method in methods:
        ratios = quartiles([taken / over for taken, over in zip(times[method], times[OVER], strict=True)])
        row: dict[str, object] = {"T": case.time, "B": case.batch, "P": case.rollouts, "H": case.hidden}
        row |= {"method": method, f"{OVER}, ms": 1e3 * quartiles(times[OVER]).median}
        row |= {"ms": 1e3 * quartiles(times[method]).median, f"over {OVER}'s": ratios.median}
        row |= {"lower": ratios.low, "upper": ratios.high}
        rows.append(row | {"goal": GOALS.get((method, case.hidden // case.rollouts))})
    return rows


def numbers(text: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="anp-ls", help="comma-separated")
    parser.add_argument("--hidden", type=numbers, help="hidden units, comma-separated; default: all")
    parser.add_argument("--fractions", type=numbers, help="H / P, comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error(f"--clock cpu adds up the time of all threads: use --threads 1 with it, got {options.threads}")
    torch.set_num_threads(options.threads)
    checks = require([estimate_check()])
    record = machine()
    heading = f"{line(record)}\n\n{options.threads} threads, {options.clock} clock"
    print(heading, flush=True)
    rows: list[dict[str, object]] = []
    for case in METHOD_SHAPES:
        if options.hidden and case.hidden not in options.hidden:
            continue
        if options.fractions and case.hidden // case.rollouts not in options.fractions:
            continue
        rows += rows_of(case, options.methods.split(","), options.repeats, options.clock)
        print(table(rows[-1:]), flush=True)
        if options.output:
            settings = {"threads": options.threads, "clock": options.clock, "repeats": options.repeats}
            record_all = {"machine": record, "checks": checks, "settings": settings, "results": rows}
            write(options.output, record_all, f"{heading}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
