"""Which runs `study_rivals.py` makes: tasks, sizes, methods, seeds, and as many learning rates for everybody."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rivals import RIVALS
from study_grid import TUNING_SEED, Planned, key_of, tasks
from study_rivals_runs import METHODS, Settings, network, update_of
from study_tasks import benchmark
from study_tasks_neurogym import REWARDED

__all__ = ["FULL", "QUICK", "Entry", "Grid", "Way", "plan", "ways"]


class Way(NamedTuple):
    """A method with its optimiser; a row of a table."""

    method: str
    optimiser: str = "adam"


class Entry(NamedTuple):
    """A task in one size, for all methods."""

    task: str
    steps: int
    """Updates of a run; where the task is online, time steps."""
    batch: int
    hidden: int = 128
    seeds: int = 5
    cells: tuple[str, ...] = ("rnn",)
    starts: tuple[str, ...] = ("orthogonal",)
    window: int = 0
    """Steps of an update where the task is online, for methods that go backward in time or measure a window."""
    rates: tuple[float, ...] | None = None
    """In place of the grid's: the published form of a task has one."""
    rollouts: int = 0
    """In place of one for every `PER_UNIT` units."""


class Grid(NamedTuple):
    """The runs of a study."""

    entries: tuple[Entry, ...]
    rates: tuple[float, ...]
    tuning: float
    """Share of the updates that a tuning run makes."""


STREAMING = ("rtrl", "snap-1", "rflo", "e-prop", "uoro")
"""Rivals that carry on from step to step: where a task is online, they make an update every step."""

LARGEST_RTRL = {"rnn": 64}
"""Units up to which exact RTRL is run, by cell: its work is H^4 a step."""

PUBLISHED_RATE = (1e-3,)
"""The learning rate of the sketched-RTRL release."""

GATED = ("gru", "lstm")
BOTH = ("default", "orthogonal")

FULL = Grid(
    (
        Entry("copying-10", 1000, 8, hidden=32, seeds=10, starts=BOTH),
        Entry("mackey-glass", 15_000, 8, hidden=64, seeds=10, starts=("default",), window=25, rates=PUBLISHED_RATE),
        Entry("lorenz", 15_000, 8, hidden=64, seeds=10, starts=("default",), window=25, rates=PUBLISHED_RATE),
        Entry("copying-20", 1500, 8, seeds=5),
        Entry("copying-40", 3000, 8, seeds=5),
        Entry("adding-50", 2000, 32, seeds=5),
        Entry("adding-100", 2000, 32, seeds=3),
        Entry("characters", 800, 16, hidden=64, seeds=3, cells=("rnn", *GATED), starts=("default",), rollouts=8),
        Entry("mnist-rows", 4530, 64, seeds=3, starts=("default",)),
        Entry("mnist-7x7", 2000, 32, seeds=3),
        Entry("mnist-14x14", 1200, 32, seeds=3),
        Entry("mnist-7x7-permuted", 2000, 32, seeds=3),
        Entry("perceptual-decision", 1000, 16, hidden=64, seeds=5),
        Entry("context-decision", 2000, 16, hidden=64, seeds=3),
        Entry("delayed-match", 1500, 16, hidden=64, seeds=3, cells=("rnn", "gru")),
        Entry("perceptual-reward", 600, 16, hidden=64, seeds=5, rollouts=64),
        Entry("mnist-28x28", 300, 32, seeds=1, cells=GATED, starts=("default",)),
    ),
    (3e-4, 1e-3, 3e-3),
    1 / 4,
)

QUICK = Grid(
    (
        Entry("copying-10", 240, 8, hidden=32, seeds=1),
        Entry("mackey-glass", 1000, 8, hidden=32, seeds=2, starts=("default",), window=25, rates=PUBLISHED_RATE),
        Entry("adding-50", 240, 16, hidden=32, seeds=1),
        Entry("characters", 120, 16, hidden=32, seeds=1, cells=("rnn", "gru"), starts=("default",)),
        Entry("mnist-rows", 240, 32, hidden=32, seeds=1, starts=("default",)),
        Entry("perceptual-decision", 360, 16, hidden=32, seeds=1),
        Entry("perceptual-reward", 300, 16, hidden=32, seeds=1, rollouts=32),
    ),
    (1e-3, 3e-3),
    1 / 2,
)

PER_UNIT = 16
"""Units for each rollout of the library's methods."""


@functools.cache
def defined(method: str, cell: str) -> bool:
    """Return whether a method takes a cell: it is asked for one update of a small network."""
    toy = benchmark(tasks.copying(1, length=1), math.nan)
    settings = Settings(method, cell=cell, hidden=4, rollouts=2)
    with torch.random.fork_rng():
        try:
            update, *_ = update_of(toy, settings, *network(settings, toy.inputs, toy.outputs))
            update(next(toy.batches(0, 1)), None)
        except ValueError:
            return False
    return True


def ways(entry: Entry, cell: str) -> list[Way]:
    """Return the methods that are defined for a task, a cell and a width."""
    if entry.task in REWARDED:
        # What learns from a reward alone; a return for each decision is not a loss for each output.
        return [Way(name) for name in ("np", "wp", "anp", "anp-ls")]
    largest = LARGEST_RTRL.get(cell, 0)
    chosen = [Way(name) for name in METHODS if defined(name, cell) and (name != "rtrl" or entry.hidden <= largest)]
    chosen.insert(1 + chosen.index(Way("bptt-1")), Way("bptt-1", "rmsprop"))
    return chosen


def settings_of(entry: Entry, way: Way, cell: str, start: str, device: str) -> Settings:
    """Return the settings of an entry's runs, with seed and learning rate still open."""
    window = 0 if not entry.window else 1 if way.method in STREAMING else entry.window
    rollouts = entry.rollouts or entry.hidden // PER_UNIT
    if way.method in RIVALS or way.method.startswith("published"):
        rollouts = int(way.method not in RIVALS)
    return Settings(
        way.method,
        cell=cell,
        start=start,
        optimiser=way.optimiser,
        updates=entry.steps // max(window, 1),
        hidden=entry.hidden,
        batch=entry.batch,
        rollouts=rollouts,
        window=window,
        # The published form of an online task has neither.
        clip=0.0 if window else 1.0,
        falling=not window,
        device=device,
    )


def plan(grid: Grid, names: Sequence[str], methods: Sequence[str], seeds: int | None, device: str) -> list[Planned]:
    """Return all runs, the most important first: seed by seed, each over all tasks.

    Args:
        grid: of tasks and learning rates.
        names: the tasks that can be made here.
        methods: only these.
        seeds: in place of each task's own number.
        device: where all run.
    """
    trials: list[Planned] = []
    results: dict[int, list[Planned]] = {}
    for entry in grid.entries:
        if entry.task not in names:
            continue
        rates = entry.rates or grid.rates
        for cell in entry.cells:
            for start in entry.starts:
                for way in ways(entry, cell):
                    if way.method not in methods:
                        continue
                    shared = settings_of(entry, way, cell, start, device)
                    tuned = shared._replace(seed=TUNING_SEED, updates=round(grid.tuning * shared.updates))
                    mine = [Planned(entry.task, tuned._replace(lr=rate)) for rate in rates] if len(rates) > 1 else []
                    trials += mine
                    candidates = tuple(key_of(trial.task, trial.settings) for trial in mine)
                    result = shared._replace(lr=0.0 if candidates else rates[0])
                    for seed in range(seeds or entry.seeds):
                        chosen = Planned(entry.task, result._replace(seed=seed), candidates)
                        results.setdefault(seed, []).append(chosen)
    return [*trials, *(run for seed in sorted(results) for run in results[seed])]
