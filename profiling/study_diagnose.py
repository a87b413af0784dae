"""Do the settings that `anpgpu.diagnose` recommends at the initial weights train tasks that no default was chosen on?

    adding  two random numbers of a sequence are marked; their sum after the last step    mse, one per sequence
    xor     the exclusive or of the bits one and three steps ago, at every step           cross-entropy

For each seed: diagnose the untrained network (torch's own initial weights), train it with Adam by the recommended
setting, and train the same network on the same data by BPTT and by the library's default. The recommended setting is
diagnosed again half way and at the end, since alignment can change during training. Tasks: adding after Hochreiter and
Schmidhuber 1997; xor after Elman 1990.

    python profiling/study_diagnose.py --output profiling/results/diagnose_blind-cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from gate import estimate_check, require
from machine import line, machine
from report import table, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu
from anpgpu.diagnosis.advice import Diagnosis

BATCH = 16
METHODS = ("bptt", "recommended", "default")


class Task(NamedTuple):
    """How a task's batches are drawn, and how its network is trained."""

    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    """Inputs (T, B, 2) or (T, B, 1), and targets."""
    inputs: int
    outputs: int
    loss: str
    unlearned: float
    """Loss of the best constant prediction."""
    updates: int


def adding(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    time = 10  # at 20 steps BPTT learns nothing from these weights within the updates of the task
    values = torch.rand(time, BATCH, generator=generator)
    first = torch.randint(time // 2, (BATCH,), generator=generator)
    second = torch.randint(time // 2, time, (BATCH,), generator=generator)
    marks = F.one_hot(first, time).t() + F.one_hot(second, time).t()
    return torch.stack((values, marks.float()), dim=-1), (values * marks).sum(0).unsqueeze(-1)


def xor(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    bits = torch.randint(2, (20, BATCH), generator=generator)
    targets = torch.full(bits.shape, -100)
    targets[3:] = bits[2:-1] ^ bits[:-3]
    return (2.0 * bits - 1).unsqueeze(-1), targets


TASKS = {
    "adding": Task(adding, 2, 1, "mse", 1 / 6, 1500),
    "xor": Task(xor, 1, 2, "cross_entropy", math.log(2), 600),
}


def network(task: Task, hidden: int, seed: int) -> tuple[nn.RNN, nn.Linear]:
    torch.manual_seed(seed)
    return nn.RNN(task.inputs, hidden), nn.Linear(hidden, task.outputs)


def train(
    task: Task, how: anpgpu.Perturbation, seed: int, options: argparse.Namespace, name: str
) -> tuple[float, list[Diagnosis]]:
    """Train; return the mean loss of the last twentieth of the updates, and diagnoses half way and at the end."""
    rnn, readout = network(task, options.hidden, seed)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=options.lr)
    data = torch.Generator().manual_seed(1000 + seed)
    noise = torch.Generator().manual_seed(2000 + seed)
    updates = options.updates or task.updates
    losses, later = [], []
    for number in tqdm(range(updates), desc=name, unit="update", disable=options.quiet):
        inputs, targets = task.draw(data)
        if name.endswith("recommended") and number in {updates // 2, updates - 1}:
            later.append(
                anpgpu.diagnose(
                    rnn, readout, inputs, targets, task.loss, perturbation=how, progress=False, **options.grid
                )
            )
        optimiser.zero_grad()
        estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, task.loss, perturbation=how, generator=noise)
        optimiser.step()
        losses.append(float(estimate.loss))
    last = losses[-max(1, updates // 20) :]
    return sum(last) / len(last), later


def spelled(how: anpgpu.Perturbation) -> str:
    return f"{how.method} P={how.rollouts} d={how.discount:g} s={how.sigma:g}"


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, object]:
    task = TASKS[name]
    rnn, readout = network(task, options.hidden, seed)
    inputs, targets = task.draw(torch.Generator().manual_seed(3000 + seed))
    diagnosis = anpgpu.diagnose(rnn, readout, inputs, targets, task.loss, progress=not options.quiet, **options.grid)
    settings = {
        "bptt": anpgpu.Perturbation("bptt"),
        "recommended": diagnosis.recommendation,
        "default": anpgpu.Perturbation(),
    }
    losses, later = {}, []
    for method in METHODS:
        losses[method], diagnoses = train(task, settings[method], seed, options, f"{name} {seed} {method}")
        later += diagnoses
    half, end = later
    return {
        "task": name,
        "seed": seed,
        "setting": spelled(diagnosis.recommendation),
        "unlearned": task.unlearned,
        **losses,
        "cosine start": diagnosis.best.total.cosine,
        "cosine half": half.current.total.cosine,
        "cosine end": end.current.total.cosine,
        "default's start": diagnosis.current.total.cosine,
        "advice": diagnosis.advice,
        "setting half": spelled(half.recommendation),
        "its cosine": half.best.total.cosine,
        "perturbation": dataclasses.asdict(diagnosis.recommendation),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="instead of the task's own number")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="Adam's learning rate, for every method")
    parser.add_argument("--quick", action="store_true", help="one seed, few updates, a small grid: a look")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.grid = {}
    if options.quick:
        options.seeds, options.updates, options.hidden = 1, options.updates or 20, min(options.hidden, 16)
        options.grid = {"rollouts": (4, 8), "discounts": (0, 1), "sigmas": (1e-3,), "repeats": 2}
    checks = require([estimate_check()])
    rows = [run(name, seed, options) for name in options.tasks for seed in range(options.seeds)]
    where = machine()
    hidden = {"advice", "perturbation"}
    text = "\n".join(
        (
            line(where),
            f"H = {options.hidden}, B = {BATCH}, Adam {options.lr:g}; losses: mean of the last 5 % of the updates",
            "",
            table([{name: value for name, value in row.items() if name not in hidden} for row in rows]),
        )
    )
    tqdm.write(text)
    if options.output:
        write(options.output, {"machine": where, "checks": checks, "results": rows}, text)


if __name__ == "__main__":
    main()
