"""What does an update cost the host, beside the GPU? Measured without a GPU.

    python profiling/host.py --output profiling/results/host-cpu.json
    python profiling/host.py --checkout OLD      # beside another checkout of the package, or several: NAME=OLD
    python profiling/host.py --table             # every operation and launch of an update, and where it is issued

Operations and launches are counted with fake tensors (`tests/idle_driver.py`); views and allocations do not count, a
clean run counts once. Times are those of updates on tensors of the CPU that say they are on CUDA: Triton compiles its
kernels for sm_90, and its launches do all but the calls of CUDA's driver. In an update's time torch's operations on
tiny tensors of the CPU stand for its launches, so that it is an estimate of the host's; the time of a step, the slope
over the number of steps of rollouts whose operations are the same, is all the host does for it but CUDA's own calls.
The least of many times counts, of processes that take turns: what else a machine does only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gate import estimate_check, require
from machine import line, machine
from report import table, write
from triton.runtime import driver

from anpgpu.kernels import rollout_triton
from anpgpu.kernels.loss import LinearLoss, SquaredLoss
from anpgpu.kernels.rollout import RolloutOptions

try:
    from anpgpu.kernels import tiles_measured
except ImportError:
    # A checkout from before the tables, and before descriptors.
    tiles_measured = None

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import idle_driver
from idle_driver import Driver, Update, as_on_cuda

ROOT = Path(__file__).resolve().parent.parent

UPDATES = (Update("estimate"), Update("estimate", "cross_entropy"), Update("backward"))
STEPS = (100, 500)
UNITS, ROLLOUTS = 300, 64
"""More units than the resident form holds."""
STEPS_OF = ("linear", "outputs", "linear, descriptors")
"""Steps that are timed: of a linear loss, of one of the outputs, and by descriptors (TMA), as many rollouts take it."""


def counted(update: Update) -> dict[str, Any]:
    """Return how many operations and launches an update issues."""
    issued = idle_driver.issued_by(update)
    operations, launches = issued.operations.total(), issued.launches.total()
    return {"operations": operations, "launches": launches, "both": operations + launches}


def time_of_update(update: Update, repeats: int) -> float:
    """Return the milliseconds of an update on tiny tensors."""
    with as_on_cuda():
        run = update._replace(time=2, batch=1, rollouts=64).prepared()
        return 1e3 * _least(run, repeats)


def time_of_step(kind: str, repeats: int) -> float:
    """Return the microseconds of one step of stepwise rollouts, of a row of `STEPS_OF`."""

    def work(steps: int) -> Any:
        preact = torch.zeros(steps, 1, UNITS)
        outputs, share = torch.zeros(steps, 1, 3), torch.ones(steps, 1)
        loss = SquaredLoss(torch.zeros(3, UNITS), outputs, share) if kind == "outputs" else LinearLoss(preact)
        options = RolloutOptions(ROLLOUTS, 1e-3, precision="bf16")
        weight, seed = torch.zeros(UNITS, UNITS), torch.tensor(1)
        return lambda: rollout_triton.rollout(preact, preact, weight, loss, seed, options=options)

    with as_on_cuda() as patch:
        if kind.endswith("descriptors") and tiles_measured is not None:
            patch.setattr(tiles_measured, "ONE_WAVE", 0)
        short, long = (_least(work(steps), repeats) for steps in STEPS)
    return 1e6 * (long - short) / (STEPS[1] - STEPS[0])


def _least(run: Any, repeats: int) -> float:
    for _ in range(3):
        run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def measured(repeats: int) -> dict[str, Any]:
    """Return everything about the package at hand."""
    driver.set_active(Driver())
    updates = [
        {
            "update": f"{update.way}, {update.loss}" if update.way == "estimate" else update.way,
            **counted(update),
            "host ms": time_of_update(update, repeats),
        }
        for update in UPDATES
    ]
    steps = [{"loss": kind, "host us a step": time_of_step(kind, repeats)} for kind in STEPS_OF]
    return {"updates": updates, "steps": steps}


def measured_of(checkout: Path, repeats: int) -> dict[str, Any]:
    """Return the same of the package of another checkout, in a process of its own."""
    paths = os.pathsep.join(map(str, (checkout, ROOT / "profiling", ROOT / "tests")))
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--repeats", str(repeats)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the least time of each row: other work of the machine only adds."""
    result = {}
    for part, rows in rounds[0].items():
        result[part] = [dict(row) for row in rows]
        for place, row in enumerate(result[part]):
            for name in row:
                if name.startswith("host "):
                    row[name] = min(measured[part][place][name] for measured in rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkout",
        action="append",
        default=[],
        help="a folder with another version of the package, which is measured before; NAME=FOLDER for several",
    )
    parser.add_argument("--repeats", type=int, default=30, help="of which the least time counts")
    parser.add_argument("--rounds", type=int, default=3, help="over all versions in turn, of which it counts, too")
    parser.add_argument("--table", action="store_true", help="print what an update issues, and where")
    parser.add_argument("--output", type=Path, help="JSON file; a text file is written beside it")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        # An older package may read what a fake tensor does not have.
        torch.Tensor.__bool__ = lambda _: True
        print(json.dumps(measured(arguments.repeats)))
        return
    checks = require([estimate_check()])
    if arguments.table:
        for update in UPDATES:
            print(f"{update}\n{idle_driver.issued_by(update)}\n")
        return
    folders = {}
    for checkout in arguments.checkout:
        name, _, folder = checkout.rpartition("=")
        folders[name or "before"] = Path(folder)
    folders["now"] = ROOT
    rounds = [
        {name: measured_of(folder, arguments.repeats) for name, folder in folders.items()}
        for _ in range(arguments.rounds)
    ]
    versions = {name: least([measured[name] for measured in rounds]) for name in folders}
    record = {"machine": machine(), "checks": checks, "results": versions}
    parts = [line(record["machine"])]
    for part in ("updates", "steps"):
        rows = [{"version": name, **row} for name, version in versions.items() for row in version[part]]
        parts.append(table(rows))
    text = "\n\n".join(parts)
    print(text)
    if arguments.output is not None:
        write(arguments.output, record, text)


if __name__ == "__main__":
    main()
