"""What does an update of a GRU or LSTM cost, over that of a plain RNN of the same size?

    python profiling/time_cells.py --output profiling/results/time_cells-cpu.json
    python profiling/time_cells.py --threads 1 --clock cpu       # on a machine that is not free
    python profiling/time_cells.py --method anp-ls --hidden 128

An update is `loss.backward()` of a network whose outputs are squared, forward pass included; the three cells take
turns, and ratios are taken turn by turn, so that another program's load falls on all. The products alone are 3 (GRU)
and 4 times (LSTM) the RNN's; the goals for "anp" at H = 256 and B P = 1,024 are 4.5 and 6.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case
from gate import Check, cosine, estimate_check, require
from machine import line, machine
from report import CLOCKS, interleaved, quartiles, table, write
from torch import nn

import anpgpu

CELLS = {"RNN": (nn.RNN, anpgpu.RNN), "GRU": (nn.GRU, anpgpu.GRU), "LSTM": (nn.LSTM, anpgpu.LSTM)}
GOALS = {"GRU": 4.5, "LSTM": 6.0}
"""For `anp` at H = 256 and B P = 1,024."""


def gradients(rnn: nn.RNNBase, inputs: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of all parameters."""
    rnn.zero_grad()
    rnn(inputs)[0].square().sum().backward()
    return [parameter.grad for parameter in rnn.parameters()]


def cell_check(name: str) -> Check:
    """Compare least squares with more rollouts than units, in float64, with torch's own cell."""
    plain, ours = CELLS[name]
    torch.manual_seed(0)
    how = anpgpu.Perturbation("anp-ls", rollouts=16, ridge=1e-5)
    perturbed, exact = ours(3, 8, perturbation=how).double(), plain(3, 8).double()
    exact.load_state_dict(perturbed.state_dict())
    inputs = torch.randn(6, 2, 3, dtype=torch.float64)
    figure = cosine(gradients(perturbed, inputs), [value for value in gradients(exact, inputs) if value is not None])
    return Check(f"{name}: anp-ls, P = 2 H, against autograd: cosine", figure, 0.9999, True)


def works(case: Case, how: anpgpu.Perturbation) -> dict[str, Callable[[], object]]:
    """Return an update of each cell by name."""
    torch.manual_seed(0)
    inputs = torch.randn(case.time, case.batch, case.inputs)

    def work(rnn: nn.RNNBase) -> Callable[[], object]:
        return lambda: gradients(rnn, inputs)

    return {name: work(ours(case.inputs, case.hidden, perturbation=how)) for name, (_, ours) in CELLS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="anp")
    parser.add_argument("--time", type=int, default=50, help="T")
    parser.add_argument("--batch", type=int, default=32, help="B")
    parser.add_argument("--rollouts", type=int, default=32, help="P")
    parser.add_argument("--hidden", type=int, default=256, help="H")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, metavar="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checks = require([estimate_check(), *map(cell_check, CELLS)])
    record = machine()
    case = Case(options.time, options.batch, options.rollouts, options.hidden)
    how = anpgpu.Perturbation(options.method, options.rollouts)
    times = interleaved(works(case, how), options.repeats, torch.device("cpu"), clock=options.clock)
    rows = []
    for name, mine in times.items():
        ratios = quartiles([taken / plain for taken, plain in zip(mine, times["RNN"], strict=True)])
        row = {"cell": name, "ms": 1e3 * quartiles(mine).median, "over the RNN's": ratios.median}
        row |= {"lower": ratios.low, "upper": ratios.high, "goal": GOALS.get(name)}
        rows.append(row)
    shape = f"{options.method}, T = {case.time}, B = {case.batch}, P = {case.rollouts}, H = {case.hidden}"
    text = f"{line(record)}\n\n{shape}, {options.threads} threads, {options.clock} clock\n\n{table(rows)}"
    print(text)
    if options.output:
        settings = {**case._asdict(), "method": options.method, "threads": options.threads, "clock": options.clock}
        write(options.output, {"machine": record, "checks": checks, "settings": settings, "results": rows}, text)


if __name__ == "__main__":
    main()
