"""Tasks of neuroscience for `study_rivals.py`, from the package neurogym, which is not one of this project's.

    perceptual-decision   which of two noisy signals was stronger                Britten et al. 1992
    context-decision      the same of one of two features, as a cue says         Mante et al. 2013
    delayed-match         whether a second stimulus is the first one again       Miller, Erickson, Desimone 1996
    perceptual-reward     the first one, by reward alone

The loss counts at decision steps, fixation is not asked for, and a batch's shorter trials are padded at the end. A
trial is right if its last decision step is. By reward alone, training sees one number a trial, the mean probability
of the right choice over its decision steps: the expected reward of choosing at random by the network's softmax.

neurogym 2.3.1 wants numpy 2.2 and matplotlib 3.10: install it into an environment of its own, or without its
requirements, `pip install --no-deps neurogym==2.3.1 'gymnasium==0.29.*' farama-notifications cloudpickle loguru
natsort tomlkit pydantic-settings pydantic python-dotenv`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from study_grid import tasks
from study_tasks import Benchmark, benchmark
from torch import Tensor

__all__ = ["ABSENT", "ENVIRONMENTS", "by_name", "decided", "expected_reward", "padded"]

ENVIRONMENTS = {
    "perceptual-decision": "PerceptualDecisionMaking-v0",
    "context-decision": "ContextDecisionMaking-v0",
    "delayed-match": "DelayMatchSample-v0",
    "perceptual-reward": "PerceptualDecisionMaking-v0",
}
REWARDED = ("perceptual-reward",)
"""Tasks of which training sees the reward alone."""

ABSENT = "neurogym is not installed: the first lines of profiling/study_tasks_neurogym.py say how"

CHOICES = 2


def decided(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of trials whose last decision step is right; outputs (T, B, O), targets (T, B)."""
    counted = targets != tasks.IGNORED
    last = len(targets) - 1 - counted.flip(0).int().argmax(0)
    everyone = torch.arange(targets.shape[1], device=targets.device)
    return float((outputs[last, everyone].argmax(-1) == targets[last, everyone]).float().mean())


def expected_reward(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return minus the expected reward of each trial, (B, P), from outputs (T, B, P, O) and targets (T, B, 1)."""
    counted = (targets != tasks.IGNORED).to(outputs.dtype)
    right = torch.where(targets == tasks.IGNORED, 0, targets).unsqueeze(-1).expand(*outputs.shape[:-1], 1)
    probability = outputs.softmax(-1).gather(-1, right).squeeze(-1)
    return -(probability * counted).sum(0) / counted.sum(0)


def padded(trials: list[tuple[np.ndarray, np.ndarray]]) -> tasks.Batch:
    """Return trials, observations (T, I) with actions (T,), as one batch; action 0, fixation, has no loss."""
    longest = max(len(actions) for _, actions in trials)
    inputs = torch.zeros(longest, len(trials), trials[0][0].shape[1])
    targets = torch.full((longest, len(trials)), tasks.IGNORED)
    for number, (observations, actions) in enumerate(trials):
        asked = torch.from_numpy(np.asarray(actions)).long()
        inputs[: len(asked), number] = torch.from_numpy(np.asarray(observations)).float()
        targets[: len(asked), number] = torch.where(asked > 0, asked, tasks.IGNORED)
    return tasks.Batch(inputs, targets)


def trials_of(environment: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return endless trials of an environment."""
    with warnings.catch_warnings():
        # gymnasium finds fault with neurogym's metadata.
        warnings.simplefilter("ignore")
        import neurogym

        made = neurogym.make(environment).unwrapped
    made.seed(seed)
    while True:
        made.new_trial()
        yield made.ob, made.gt


def decision(name: str, _window: int = 0) -> Benchmark:
    """Make a task of trials that are drawn afresh for every update."""
    environment = ENVIRONMENTS[name]

    def drawn(seed: int, batch: int) -> Iterator[tasks.Batch]:
        trials = trials_of(environment, seed)
        while True:
            yield padded([next(trials) for _ in range(batch)])

    # Its generators take seeds of 32 bits; those of training are small.
    valid, test = (next(drawn(seed, tasks.HELD_OUT)) for seed in (2**31, 2**31 + 1))
    features, actions = valid.inputs.shape[2], int(valid.targets.max()) + 1
    chance = math.log(CHOICES)
    made = tasks.Task(
        *(name, "cross_entropy", "nats", features, actions, drawn, valid, test),
        lambda: {"guessing": tasks.Score(chance, 1 / CHOICES)},
    )
    return benchmark(made, chance, correct=decided, reward=expected_reward if name in REWARDED else None)


def by_name() -> dict[str, Callable[[int], Benchmark]]:
    """Return the makers of these tasks; none where neurogym is not installed."""
    if importlib.util.find_spec("neurogym") is None:
        return {}
    return {name: functools.partial(decision, name) for name in ENVIRONMENTS}
