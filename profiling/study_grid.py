"""The study's runs: which tasks, methods, learning rates and seeds, how long, in which order.

Every method is tuned alike: the learning rates of `Grid.rates` are tried with seed `TUNING_SEED` for a share
`Grid.tuning` of the updates, and the rate with the lowest validation loss is used for the seeds of the result. The
order is breadth first, seed by seed and decorrelation last, so that a study that is stopped early has the same seeds of
every task and method.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# The tasks and the training loop are those of the examples.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import tasks
import training

__all__ = [
    "FULL",
    "METHODS",
    "QUICK",
    "SHORTER",
    "TUNING_SEED",
    "Grid",
    "Planned",
    "Size",
    "best_rate",
    "final",
    "key_of",
    "last_valid_loss",
    "plan",
    "tasks",
    "training",
]

METHODS = ("bptt", "bptt-1", "np", "wp", "anp-0", "anp", "anp-1", "anp-ls", "published-anp")
"""Those that the study compares where nothing else is asked for; `study_feedback.py` has "anp-feedback"."""

TUNING_SEED = 100
"""Seed of the tuning runs; their weights and training data are not those of the results."""

SHORTER = "bptt"
"""The method that also runs with two thirds of the updates: beside that run, others have 1.5 times as many."""


class Size(NamedTuple):
    """Updates of a training run, and sequences per update."""

    updates: int
    batch: int


class Grid(NamedTuple):
    """The runs of a study."""

    sizes: dict[str, Size]
    rates: tuple[float, ...]
    tuning: float
    """Share of the updates that a tuning run makes."""
    hidden: int
    rollouts: int
    decorrelated: tuple[str, ...]
    """Tasks on which every method also runs with decorrelation."""


SIZES = {
    "mackey-glass-15": Size(600, 8),
    "copying-5": Size(900, 8),
    "copying-10": Size(900, 8),
    "copying-20": Size(900, 8),
    "weather-1h": Size(900, 8),
    "weather-24h": Size(900, 8),
    "digits": Size(750, 8),
    "digits-permuted": Size(750, 8),
    "adding": Size(1200, 32),
}

ONE_OF_A_KIND = ("mackey-glass-15", "copying-10", "weather-24h", "digits", "adding")

FULL = Grid(SIZES, (3e-4, 1e-3, 3e-3, 1e-2), 1 / 4, 64, 64, ONE_OF_A_KIND)

QUICK = Grid(
    {name: Size(size.updates // 3, size.batch) for name, size in SIZES.items()}, (1e-3, 3e-3), 1 / 2, 32, 32, ()
)


class Planned(NamedTuple):
    """A run to be made."""

    task: str
    settings: training.Settings
    """The learning rate is 0 where tuning chooses it."""
    candidates: tuple[str, ...] = ()
    """Keys of the tuning runs from which the learning rate is chosen."""


def key_of(task: str, settings: training.Settings) -> str:
    """Return the key of a run in the file of finished runs."""
    return json.dumps([task, settings._asdict()], sort_keys=True)


def plan(grid: Grid, names: Sequence[str], methods: Sequence[str], seeds: int) -> list[Planned]:
    """Return all runs, the most important first."""
    tuning: dict[bool, list[Planned]] = {}
    results: dict[tuple[bool, int], list[Planned]] = {}
    for decorrelated in (False, True):
        for task in names if not decorrelated else [name for name in names if name in grid.decorrelated]:
            size = grid.sizes[task]
            for method in methods:
                shared = training.Settings(
                    method,
                    TUNING_SEED,
                    decorrelated,
                    round(grid.tuning * size.updates),
                    hidden=grid.hidden,
                    batch=size.batch,
                    rollouts=grid.rollouts,
                )
                trials = [Planned(task, shared._replace(lr=rate)) for rate in grid.rates]
                tuning.setdefault(decorrelated, []).extend(trials)
                candidates = tuple(key_of(*trial[:2]) for trial in trials)
                lengths = [size.updates]
                if method == SHORTER and not decorrelated:
                    lengths.append(round(size.updates / 1.5))
                for seed in range(seeds):
                    results.setdefault((decorrelated, seed), []).extend(
                        Planned(task, shared._replace(seed=seed, updates=updates, lr=0.0), candidates)
                        for updates in lengths
                    )
    runs = []
    for decorrelated in (False, True):
        runs += tuning.get(decorrelated, [])
        for seed in range(seeds):
            runs += results.get((decorrelated, seed), [])
    return runs


def best_rate(candidates: Sequence[str], done: Mapping[str, dict]) -> float | None:
    """Return the learning rate with the lowest validation loss, or None while a candidate is not done."""
    if any(candidate not in done for candidate in candidates):
        return None
    best = min((done[candidate] for candidate in candidates), key=last_valid_loss)
    rate: float = best["settings"]["lr"]
    return rate


def last_valid_loss(run: dict) -> float:
    """Return the validation loss at the end of a run; infinite where it broke off."""
    return final(run, "valid")[0]


def final(run: dict, held_out: str) -> tasks.Score:
    """Return loss and accuracy on "valid" or "test" at the end of a run; an infinite loss where it broke off."""
    scores = run["curve"][held_out]
    if len(scores) < training.SHARES or not math.isfinite(scores[-1][0]):
        return tasks.Score(math.inf, None)
    return tasks.Score(*scores[-1])
