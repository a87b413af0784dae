"""A task of neuroscience, from the package neurogym: a leaky rate network under Dale's law learns to decide.

    pip install 'anpgpu[neurogym]'                          into an environment of its own: neurogym pins numpy
    python examples/neurogym_task.py --output output/       which of two noisy signals was stronger
    python examples/neurogym_task.py --reward               by reward alone, one number a trial

The network is an nn.RNN whose weights are computed from what is learnt, h_t = tanh((1 - a) h_{t-1} + a (|V| s h_{t-1} +
U x_t + b)) with s = +-1 for units that excite and inhibit (`examples/constraints.py`). BPTT trains the same network
beside it. With `--reward` no gradient of a loss is used at all: only how likely the right choice was, trial by trial.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tasks
import torch
from constraints import LEAK, WEIGHT, Dale, Leaky, Scaled
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from torch.nn.utils import parametrize
from tqdm import tqdm

import anpgpu

__all__ = ["ABSENT", "decided", "expected_reward", "network", "padded", "trials_of"]

ABSENT = (
    "neurogym is not installed: pip install 'anpgpu[neurogym]', into an environment of its own, because neurogym 2.3 "
    "wants numpy 2.2 and matplotlib 3.10"
)

SIZES = {
    False: {"updates": 600, "batch": 16, "hidden": 64, "rollouts": 4, "lr": 3e-3},
    # In small batches even the exact gradient of the reward settles on one side.
    True: {"updates": 300, "batch": 64, "hidden": 32, "rollouts": 32, "lr": 1e-2},
}
"""Defaults, with a loss and by reward alone."""

TESTED = 500
"""Trials of a test."""

POINTS = 40
"""Points of a plotted curve."""


def trials_of(environment: str, seed: int, **options: object) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return endless trials of an environment with its options: observations (T, I) and the right actions (T,)."""
    with warnings.catch_warnings():
        # gymnasium finds fault with neurogym's metadata.
        warnings.simplefilter("ignore")
        import neurogym

        made = neurogym.make(environment, **options).unwrapped
    made.seed(seed)
    while True:
        made.new_trial()
        yield made.ob, made.gt


def padded(trials: list[tuple[np.ndarray, np.ndarray]]) -> tasks.Batch:
    """Return trials as one batch, shorter ones padded at the end; action 0, fixation, has no loss."""
    longest = max(len(actions) for _, actions in trials)
    inputs = torch.zeros(longest, len(trials), trials[0][0].shape[1])
    targets = torch.full((longest, len(trials)), tasks.IGNORED)
    for number, (observations, actions) in enumerate(trials):
        asked = torch.from_numpy(np.asarray(actions)).long()
        inputs[: len(asked), number] = torch.from_numpy(np.asarray(observations)).float()
        targets[: len(asked), number] = torch.where(asked > 0, asked, tasks.IGNORED)
    return tasks.Batch(inputs, targets)


def decided(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of trials whose last decision step is right; outputs (T, B, O), targets (T, B)."""
    counted = targets != tasks.IGNORED
    last = len(targets) - 1 - counted.flip(0).int().argmax(0)
    everyone = torch.arange(targets.shape[1], device=targets.device)
    return float((outputs[last, everyone].argmax(-1) == targets[last, everyone]).float().mean())


def expected_reward(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return minus the expected reward of each trial, (B, P), from outputs (T, B, P, O) and targets (T, B, 1).

    A trial's reward is expected of choosing at random by the network's softmax, mean over its decision steps.
    """
    counted = (targets != tasks.IGNORED).to(outputs.dtype)
    right = torch.where(targets == tasks.IGNORED, 0, targets).unsqueeze(-1).expand(*outputs.shape[:-1], 1)
    probability = outputs.softmax(-1).gather(-1, right).squeeze(-1)
    return -(probability * counted).sum(0) / counted.sum(0)


def network(features: int, actions: int, hidden: int, *, seed: int = 0) -> tuple[nn.RNN, nn.Linear]:
    """Return a leaky rate network under Dale's law, and its readout."""
    torch.manual_seed(seed)
    rnn, readout = nn.RNN(features, hidden), nn.Linear(hidden, actions)
    # Parametrizations follow one another: first each unit's sign, then the leak.
    parametrize.register_parametrization(rnn, WEIGHT, Dale(hidden))
    parametrize.register_parametrization(rnn, WEIGHT, Leaky())
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        parametrize.register_parametrization(rnn, name, Scaled())
    return rnn, readout


@torch.no_grad()
def wrong_signs(rnn: nn.RNN) -> int:
    """Return how many recurrent weights break Dale's law, the leak taken off."""
    recurrent = (rnn.weight_hh_l0 - (1 - LEAK) * torch.eye(rnn.hidden_size)) / LEAK
    # (1 - a) + a v - (1 - a) of a float is a v to a few ulp of 1.
    return int((recurrent * rnn.parametrizations[WEIGHT][0].sign < -1e-6).sum())


def train(method: str, batches: Iterator[tasks.Batch], test: tasks.Batch, options: argparse.Namespace) -> list[float]:
    """Train a network; return the share of right decisions on training batches, update by update, then on the test."""
    rnn, readout = network(test.inputs.shape[2], int(test.targets.max()) + 1, options.hidden)
    how = anpgpu.Perturbation(method=method, rollouts=options.rollouts)
    if method != "bptt" and not options.reward:
        anpgpu.swap_(rnn, how)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.updates)
    shares = []
    bar = tqdm(range(options.updates), desc=method, disable=options.quiet, leave=False)
    for _ in bar:
        inputs, targets, _ = next(batches)
        optimiser.zero_grad()
        if options.reward:
            found = anpgpu.estimate_grad_(rnn, readout, inputs, targets, expected_reward, perturbation=how)
            outputs = found.outputs
        else:
            outputs = readout(rnn(inputs)[0])
            F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=tasks.IGNORED).backward()
        nn.utils.clip_grad_norm_(rnn.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        shares.append(decided(outputs.detach(), targets))
        bar.set_postfix(right=f"{np.mean(shares[-20:]):.0%}")
    with torch.no_grad():
        right = decided(readout(rnn(test.inputs)[0]), test.targets)
    tqdm.write(
        f"{method}: {right:.1%} of {test.inputs.shape[1]} new trials right, {wrong_signs(rnn)} weights break Dale's law"
    )
    return [*shares, right]


def plot(curves: dict[str, list[float]], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (*shares, right) in curves.items():
        parts = np.array_split(shares, min(POINTS, len(shares)))
        axis.plot(
            np.cumsum([len(part) for part in parts]), [part.mean() for part in parts], label=f"{name}: {right:.1%}"
        )
    axis.set(xlabel="updates", ylabel="share of right decisions", ylim=(0, 1.02), title=title)
    axis.legend(title="on new trials")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="PerceptualDecisionMaking-v0", help="an environment of neurogym with trials")
    parser.add_argument("--reward", action="store_true", help="train by reward alone, which BPTT cannot use")
    for name, value in SIZES[False].items():
        text = f"(default: {value}, by reward alone {SIZES[True][name]})"
        parser.add_argument(f"--{name}", type=type(value), help=text)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if importlib.util.find_spec("neurogym") is None:
        sys.exit(ABSENT)
    for name, value in SIZES[options.reward].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    curves = {}
    for method in ["np"] if options.reward else ["anp-feedback", "bptt"]:
        trials = trials_of(options.task, 0)
        batches = (padded([next(trials) for _ in range(options.batch)]) for _ in iter(int, 1))
        fresh = trials_of(options.task, 1)
        curves[method] = train(method, batches, padded([next(fresh) for _ in range(TESTED)]), options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("neurogym_reward.png" if options.reward else "neurogym.png")
    plot(curves, path, f"{options.task}, leaky units under Dale's law")
    tqdm.write(f"learning curves: {path}")


if __name__ == "__main__":
    main()
