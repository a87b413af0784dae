"""The training loop of the examples and of `profiling/study.py`: methods differ in the estimator alone.

Every method starts from the same weights (W_hh orthogonal, gain 0.95), sees the same sequences in the same order and
uses Adam, its learning rate falling linearly to zero. The gradients come from `anpgpu.estimate_grad_`; true
backpropagation through time is its method "bptt".
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tasks
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu
from anpgpu.decorrelation import Decorrelation

GAIN = 0.95
"""Gain of the initial, orthogonal W_hh. With torch's default, of spectral radius near 0.6, memory fades."""

SHARES = 24
"""Number of evaluations on the held-out sets in a run, evenly spread over the updates."""

METHODS = {
    "bptt": {"method": "bptt"},
    "bptt-1": {},
    "np": {"method": "np", "discount": 1.0},
    "wp": {"method": "wp"},
    "anp-0": {"method": "anp", "discount": 0.0},
    "anp": {"method": "anp", "discount": 0.9},
    "anp-1": {"method": "anp", "discount": 1.0},
    "anp-ls": {"method": "anp-ls", "discount": 1.0},
    "published-anp": {"method": "published-anp", "rollouts": 1, "noise": "gaussian"},
    "anp-feedback": {"method": "anp-feedback", "discount": 1.0},
}
"""Arguments of `Perturbation` by the name in tables. "bptt-1" is `one_step_truncated`."""


class Settings(NamedTuple):
    """The settings of a run on any task."""

    method: str
    seed: int = 0
    decorrelated: bool = False
    updates: int = 600
    lr: float = 3e-3
    hidden: int = 64
    batch: int = 8
    rollouts: int = 64
    sigma: float = 1e-3
    decorrelation_rate: float = 1e-3


class Curve(NamedTuple):
    """The learning curve of a run: one value per evaluation on the held-out sets."""

    updates: list[int]
    seconds: list[float]
    """Processor time of the training updates so far."""
    training_loss: list[float]
    """Mean over the updates since the last evaluation."""
    valid: list[tasks.Score]
    test: list[tasks.Score]


def train(task: tasks.Task, settings: Settings, *, progress: bool = True) -> Curve:
    """Train one network; a loss that is not finite ends the training and the curve."""
    torch.manual_seed(settings.seed)
    published = settings.method.startswith("published")
    rnn = nn.RNN(task.inputs, settings.hidden, bias=not published)
    readout = nn.Linear(settings.hidden, task.outputs, bias=not published)
    nn.init.orthogonal_(rnn.weight_hh_l0, GAIN)
    decorrelation = Decorrelation(rnn, rate=settings.decorrelation_rate) if settings.decorrelated else None
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=settings.lr)
    how = None
    if settings.method != "bptt-1":
        shared = {"rollouts": settings.rollouts, "sigma": settings.sigma}
        how = anpgpu.Perturbation(**{**shared, **METHODS[settings.method]})

    curve = Curve([], [], [], [], [])
    looks = {round(settings.updates * (look + 1) / SHARES) for look in range(SHARES)}
    seconds, losses, state = 0.0, [], None
    batches = task.batches(settings.seed, settings.batch)
    title = f"{task.name} {settings.method}"
    bar = tqdm(range(1, settings.updates + 1), desc=title, disable=not progress, leave=False)
    for update in bar:
        batch = next(batches)
        state = state if batch.continued else None
        started = time.process_time()
        optimiser.zero_grad()
        optimiser.param_groups[0]["lr"] = settings.lr * (1 - (update - 1) / settings.updates)
        if how is None:
            loss, after = one_step_truncated(task, rnn, readout, batch, state)
        else:
            estimate = anpgpu.estimate_grad_(
                rnn, readout, batch.inputs, batch.targets, task.loss, perturbation=how, hx=state
            )
            loss, after = float(estimate.loss), estimate.h_n
        if not math.isfinite(loss):
            break
        optimiser.step()
        if decorrelation is not None:
            decorrelation.update_(batch.inputs, state)
        state = after
        seconds += time.process_time() - started
        losses.append(loss)
        if update in looks:
            curve.updates.append(update)
            curve.seconds.append(seconds)
            curve.training_loss.append(sum(losses) / len(losses))
            curve.valid.append(evaluate(task, rnn, readout, task.valid))
            curve.test.append(evaluate(task, rnn, readout, task.test))
            losses = []
            bar.set_postfix(test=f"{curve.test[-1].loss:.3f}")
    return curve


def one_step_truncated(
    task: tasks.Task, rnn: nn.RNN, readout: nn.Linear, batch: tasks.Batch, hx: Tensor | None
) -> tuple[float, Tensor]:
    """Backpropagate through single steps, from detached states; return the loss and the final state."""
    with torch.no_grad():
        hidden, h_n = rnn(batch.inputs, hx)
        before = torch.cat((torch.zeros_like(hidden[:1]) if hx is None else hx, hidden[:-1]))
    inputs = F.linear(batch.inputs, rnn.weight_ih_l0, rnn.bias_ih_l0)
    outputs = readout(torch.tanh(inputs + F.linear(before, rnn.weight_hh_l0, rnn.bias_hh_l0)))
    loss = loss_of(task, outputs, batch.targets)
    loss.backward()
    return float(loss.detach()), h_n


def loss_of(task: tasks.Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of outputs (T, B, O), as `estimate_grad_` averages it."""
    if tasks.per_sequence(task, targets):
        outputs = outputs[-1]
    if task.loss == "mse":
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(task: tasks.Task, rnn: nn.RNN, readout: nn.Linear, held_out: tasks.Batch) -> tasks.Score:
    """Score a network on held-out sequences, from a state of zero."""
    return tasks.score(task, readout(rnn(held_out.inputs)[0]), held_out.targets)


def arguments(description: str, **defaults: float) -> argparse.ArgumentParser:
    """Return the options that all examples share; `defaults` replace those of `Settings`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = Settings("anp")._replace(**defaults)
    parser.add_argument("--methods", nargs="+", default=["anp-ls", "anp", "np", "bptt"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--updates", type=int, default=known.updates)
    parser.add_argument("--lr", type=float, default=known.lr, help="Adam's learning rate, the same for every method")
    parser.add_argument("--hidden", type=int, default=known.hidden)
    parser.add_argument("--batch", type=int, default=known.batch)
    parser.add_argument("--rollouts", type=int, default=known.rollouts, help="perturbed rollouts per sample")
    parser.add_argument("--sigma", type=float, default=known.sigma, help="standard deviation of the noise")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot and the figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def compare(task: tasks.Task, options: argparse.Namespace) -> None:
    """Train by every method and seed of the options; print a table, write a plot and the figures."""
    baselines = task.baselines()
    shared = {name: getattr(options, name) for name in ("updates", "lr", "hidden", "batch", "rollouts", "sigma")}
    runs: dict[str, list[Curve]] = {method: [] for method in options.methods}
    for seed in range(options.seeds):
        for method in options.methods:
            settings = Settings(method, seed, **shared)
            runs[method].append(train(task, settings, progress=not options.quiet))
    rows = list(baselines.items())
    rows += [(method, curve.test[-1]) for method, curves in runs.items() for curve in curves if curve.test]
    tqdm.write(f"{task.name}: test loss in {task.unit}, after {options.updates} updates\n")
    for name, score in rows:
        right = "" if score.accuracy is None else f"{score.accuracy:10.1%} right"
        tqdm.write(f"{name:16s}{score.loss:10.4f}{right}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{task.name}.png"
    plot(task, baselines, runs, path)
    record = {"task": task.name, "settings": shared, "baselines": baselines}
    record["runs"] = {method: [curve._asdict() for curve in curves] for method, curves in runs.items()}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1))
    tqdm.write(f"\nlearning curves: {path}")


def plot(task: tasks.Task, baselines: dict[str, tasks.Score], runs: dict[str, Sequence[Curve]], path: Path) -> None:
    """Plot test loss against updates and against processor time; the baselines as dashed lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for colour, (method, curves) in enumerate(runs.items()):
        for number, curve in enumerate(curves):
            losses = [score.loss for score in curve.test]
            label = method if number == 0 else None
            for axis, horizontal in zip(axes, (curve.updates, curve.seconds), strict=True):
                axis.plot(horizontal, losses, color=f"C{colour}", label=label)
    for axis in axes:
        for (name, score), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
            axis.axhline(score.loss, color="grey", linestyle=style, linewidth=1, label=name)
    axes[0].set(xlabel="updates", ylabel=f"test loss ({task.unit})", yscale="log")
    axes[1].set(xlabel="processor time (s)", xscale="log")
    axes[0].legend(fontsize="small")
    figure.suptitle(task.name)
    figure.savefig(path, dpi=120)
    plt.close(figure)
