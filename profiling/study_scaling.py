"""How do alignment with BPTT and the number of updates to a target depend on width, length and number of rollouts?

    alignment   cosine between an estimate of all the RNN's gradients and BPTT's, at the start of training
    updates     until the training loss, averaged over 20 updates, is below `TARGET`

The task is copying memory; its length is varied by the delay. One of H, T and P is varied, the others stay at `CENTRE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from gate import cosine
from machine import line, machine
from report import table, write
from study_grid import tasks, training
from torch import nn
from tqdm import tqdm

import anpgpu

BATCH = 8
METHODS = ("np", "anp-0", "anp", "anp-ls")
SEEDS = 3


class Shape(NamedTuple):
    """The sizes of one measurement."""

    hidden: int = 64
    time: int = 25
    rollouts: int = 64


CENTRE = Shape()
WIDTHS = (64, 128, 256, 512, 1024)
LENGTHS = (25, 50, 100, 250, 500, 1000)
ROLLOUTS = (4, 8, 16, 32, 64, 128)
"""P up to 2 H."""

SYMBOLS_SHOWN = 4
TARGET, MOST_UPDATES = 1.0, 900
"""Nats per symbol; log 8 = 2.08 is guessing."""

UPDATE_WIDTHS, UPDATE_LENGTHS = (64, 128, 256), (13, 25, 50)
UPDATE_METHODS = ("bptt", "np", "anp", "anp-ls")


def alignment_shapes() -> dict[str, list[Shape]]:
    """Return the shapes of the alignment figures, by the letter of the size that varies."""
    return {
        "H": [CENTRE._replace(hidden=hidden) for hidden in WIDTHS],
        "T": [CENTRE._replace(time=time) for time in LENGTHS],
        "P": [CENTRE._replace(rollouts=rollouts) for rollouts in ROLLOUTS],
    }


def gradients(task: tasks.Task, shape: Shape, method: str, seed: int) -> list[torch.Tensor | None]:
    """Return the estimated gradient of every parameter of an untrained RNN."""
    torch.manual_seed(seed)
    rnn, readout = nn.RNN(task.inputs, shape.hidden), nn.Linear(shape.hidden, task.outputs)
    nn.init.orthogonal_(rnn.weight_hh_l0, training.GAIN)
    batch = next(task.batches(seed, BATCH))
    how = anpgpu.Perturbation(**{"rollouts": shape.rollouts, **training.METHODS[method]})
    anpgpu.estimate_grad_(rnn, readout, batch.inputs, batch.targets, task.loss, perturbation=how)
    return [parameter.grad for parameter in rnn.parameters()]


def alignments(shape: Shape, methods: Sequence[str]) -> dict[str, float]:
    """Return the mean cosine with BPTT's gradient over seeds."""
    task = tasks.copying(shape.time - 2 * SYMBOLS_SHOWN, length=SYMBOLS_SHOWN)
    cosines = dict.fromkeys(methods, 0.0)
    for seed in range(SEEDS):
        exact = [grad for grad in gradients(task, shape, "bptt", seed) if grad is not None]
        for method in methods:
            cosines[method] += cosine(gradients(task, shape, method, seed), exact) / SEEDS
    return cosines


def updates_to_target(shape: Shape, method: str, seed: int = 0) -> int | None:
    """Return after how many updates the mean loss of the last 20 is below `TARGET`; None: not in `MOST_UPDATES`."""
    task = tasks.copying(shape.time - 2 * SYMBOLS_SHOWN, length=SYMBOLS_SHOWN)
    torch.manual_seed(seed)
    rnn, readout = nn.RNN(task.inputs, shape.hidden), nn.Linear(shape.hidden, task.outputs)
    nn.init.orthogonal_(rnn.weight_hh_l0, training.GAIN)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=1e-3)
    how = anpgpu.Perturbation(**{"rollouts": shape.rollouts, **training.METHODS[method]})
    losses: list[float] = []
    for batch in task.batches(seed, BATCH):
        optimiser.zero_grad()
        estimate = anpgpu.estimate_grad_(rnn, readout, batch.inputs, batch.targets, task.loss, perturbation=how)
        optimiser.step()
        losses.append(float(estimate.loss))
        if len(losses) >= 20 and sum(losses[-20:]) / 20 < TARGET:
            return len(losses)
        if len(losses) == MOST_UPDATES:
            break
    return None


def plot(record: dict[str, list[dict[str, object]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(-(-len(record) // 3), 3, figsize=(13, 3.8 * -(-len(record) // 3)), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(training.METHODS)}
    for axis, (name, rows) in zip(axes.flat, record.items(), strict=True):
        letter = name.split()[-1]
        for method in [column for column in rows[0] if column not in {"H", "T", "P"}]:
            points = [(row[letter], row[method]) for row in rows if row[method] is not None]
            horizontal, vertical = [x for x, _ in points], [x for _, x in points]
            axis.plot(horizontal, vertical, marker="o", markersize=4, color=colours[method], label=method)
        axis.set(xlabel=letter, ylabel=name.split()[0], xscale="log", title=name)
        ticks = [row[letter] for row in rows]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path, *, quick: bool = False) -> None:
    """Measure, and write scaling.json, scaling.txt and scaling.png into `folder`; `quick`: the smallest shapes."""
    record: dict[str, list[dict[str, object]]] = {}
    for letter, shapes in alignment_shapes().items():
        rows = record[f"alignment against {letter}"] = []
        for shape in tqdm(shapes[:2] if quick else shapes, desc=f"alignment against {letter}"):
            rows.append({**named(shape), **alignments(shape, METHODS)})
    ways = {
        "H": [CENTRE._replace(hidden=hidden) for hidden in UPDATE_WIDTHS],
        "T": [CENTRE._replace(time=time) for time in UPDATE_LENGTHS],
        "P": [CENTRE._replace(rollouts=rollouts) for rollouts in ROLLOUTS[::2]],
    }
    for letter, shapes in {} if quick else ways.items():
        rows = record[f"updates against {letter}"] = []
        for shape in tqdm(shapes, desc=f"updates against {letter}"):
            rows.append({**named(shape), **{method: updates_to_target(shape, method) for method in UPDATE_METHODS}})
    host = machine()
    text = "\n\n".join([line(host), *(f"{name}\n\n{table(rows)}" for name, rows in record.items())])
    settings = {"batch": BATCH, "seeds": SEEDS, "target": TARGET, "most_updates": MOST_UPDATES}
    write(folder / "scaling.json", {"machine": host, **settings, "results": record}, text)
    plot(record, folder / "scaling.png")
    print(text)


def named(shape: Shape) -> dict[str, object]:
    return {"H": shape.hidden, "T": shape.time, "P": shape.rollouts}
