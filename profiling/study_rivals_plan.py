"""Which runs `study_rivals.py` makes: tasks, sizes, methods, seeds, and as many learning rates for everybody."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rivals import RIVALS
from study_grid import TUNING_SEED, Planned, key_of, tasks
from study_rivals_runs import DALE, METHODS, OPTIMISERS, Settings, network, update_of
from study_tasks import benchmark
from study_tasks_neurogym import REWARDED

__all__ = ["CORE", "FULL", "QUICK", "Entry", "Grid", "Way", "left_out", "plan", "ways"]


class Way(NamedTuple):
    """A method with its optimiser; a row of a table."""

    method: str
    optimiser: str = "adam"
    rate_of: str = ""
    """The method whose learning rate it has; "" for its own."""
    windowed: bool = False
    """Whether a rival that could make an update every step of an online task makes as many as BPTT."""


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
    """In place of the grid's: the published form of a task has one, costly tasks have fewer."""
    rollouts: int = 0
    """In place of one for every `PER_UNIT` units."""
    claim: bool = False
    """Whether the task is one of those by which learned feedback stands or falls: they come first."""
    without: tuple[str, ...] = ()
    """Methods that would take too long."""
    rmsprop: tuple[str, ...] = ("bptt-1",)
    """Methods that run with RMSprop too."""


class Grid(NamedTuple):
    """The runs of a study."""

    entries: tuple[Entry, ...]
    rates: tuple[float, ...]
    tuning: float
    """Share of the updates that a tuning run makes."""
    shared: bool = True
    """Whether everybody has a row at BPTT's learning rate too."""


WINDOWS = {**dict.fromkeys(("bptt-1", "rtrl", "snap-1", "rflo", "e-prop", "uoro"), 1), "bptt-8": 8}
"""Steps of an update of rivals that need no more of an online task at once."""

CORE = ("bptt", "anp-feedback", "bptt-1", "e-prop")
"""What comes first of a task: BPTT, learned feedback, and what is known of an adjoint without rollouts."""

FIRST_SEEDS = 3
"""Every table has so many before any has more."""

LARGEST_RTRL = 32
"""Units up to which exact RTRL runs on whole sequences, where its gradient is that of BPTT; its work is H^4 a step."""

PUBLISHED_RATE = (1e-3,)
"""The learning rate of the sketched-RTRL release."""

GATED = ("gru", "lstm")
LONG = ("bptt", "bptt-1", "e-prop", "anp-feedback")
"""Methods that run where all of them would take the night."""
BOTH = ("default", "orthogonal")
ONLINE = {"batch": 8, "hidden": 64, "seeds": 10, "starts": ("default",), "window": 25, "rates": PUBLISHED_RATE}
SLOW = ("uoro", "wp", "published-anp")

FULL = Grid(
    (
        Entry("copying-40", 3000, 8, seeds=5, claim=True),
        Entry("mnist-rows", 4530, 64, seeds=3, starts=("default",), claim=True, without=SLOW),
        Entry("mnist-7x7", 2000, 32, seeds=3, claim=True, without=SLOW),
        Entry("mackey-glass", 15_000, **ONLINE, claim=True),
        Entry("lorenz", 15_000, **ONLINE, claim=True),
        Entry(
            *("characters", 1600, 16),
            hidden=64,
            seeds=3,
            cells=("rnn", *GATED),
            starts=("default",),
            rollouts=8,
            rates=(1e-3, 3e-3, 1e-2),
            claim=True,
            without=SLOW,
            rmsprop=("bptt", "bptt-1", "anp-feedback"),
        ),
        Entry("perceptual-decision", 1000, 16, hidden=64, seeds=5, claim=True),
        Entry("perceptual-decision", 1000, 16, hidden=64, seeds=3, cells=(DALE,), starts=("default",)),
        # In batches of 16 even the exact gradient of the reward settles on one side.
        Entry("perceptual-reward", 400, 64, hidden=32, seeds=5, rollouts=32, claim=True),
        # BPTT of an nn.RNN stays at chance in delayed-match for twice as many updates.
        Entry("context-decision", 1000, 16, hidden=64, seeds=3, cells=("gru",), claim=True),
        Entry("delayed-match", 1000, 16, hidden=64, seeds=3, cells=("gru",), claim=True),
        # At 1e-3 BPTT itself falls back to chance.
        Entry("mnist-14x14", 2400, 32, seeds=5, rates=(2e-4,), claim=True, without=(*SLOW, "np", "anp")),
        Entry("copying-10", 1000, 8, hidden=32, seeds=10, starts=BOTH),
        Entry("copying-20", 1500, 8, seeds=5),
        Entry("adding-50", 2000, 32, seeds=5, without=SLOW),
        Entry("adding-100", 2000, 32, seeds=3, without=SLOW),
        Entry("mnist-7x7-permuted", 2000, 32, seeds=3, without=SLOW),
        # Gates must remember for long before they can learn what to remember.
        Entry(
            *("mnist-28x28", 300, 32),
            seeds=1,
            cells=GATED,
            starts=("chrono",),
            rates=(3e-3,),
            without=tuple(name for name in METHODS if name not in LONG),
        ),
        Entry("copying-100", 3000, 8, seeds=3, without=tuple(name for name in METHODS if name not in LONG)),
    ),
    (3e-4, 1e-3, 3e-3),
    1 / 4,
)

QUICK = Grid(
    (
        Entry("copying-10", 240, 8, hidden=32, seeds=1),
        Entry("mackey-glass", 1000, **{**ONLINE, "hidden": 32, "seeds": 2}),
        Entry("adding-50", 240, 16, hidden=32, seeds=1),
        Entry(
            *("characters", 120, 16),
            hidden=32,
            seeds=1,
            cells=("rnn", "gru"),
            starts=("default",),
            without=("rtrl",),
        ),
        Entry("mnist-rows", 240, 32, hidden=32, seeds=1, starts=("default",)),
        Entry("perceptual-decision", 360, 16, hidden=32, seeds=1),
        Entry("perceptual-reward", 200, 64, hidden=32, seeds=1, rollouts=32),
    ),
    (1e-3, 3e-3),
    1 / 2,
    shared=False,
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
    """Return the methods that are defined for a task, a cell and a width.

    Where BPTT's learning rate is a method's own, the two ways are one: runs are found by their settings.
    """
    if entry.task in REWARDED:
        # What learns from a reward alone, and the exact gradient, which a black box does not give; a return for each
        # decision is not a loss for each output.
        return [Way(name) for name in ("bptt", "np", "wp", "anp", "anp-ls")]
    names = [name for name in METHODS if defined(name, cell) and name not in left_out(entry, cell)]
    chosen = [
        Way(name, optimiser)
        for name in names
        for optimiser in OPTIMISERS
        if optimiser == "adam" or name in entry.rmsprop
    ]
    if entry.window:
        # How much of a rival's lead is that it makes more updates?
        chosen.append(Way("snap-1", windowed=True))
    # A short run can choose a rate that a long one does not stand: beside it, all at BPTT's rate, and BPTT at ours.
    again = [Way(*way[:2], rate_of="bptt") for way in chosen if way != Way("bptt")]
    return [*chosen, *again, Way("bptt", rate_of="anp-feedback")]


def left_out(entry: Entry, cell: str) -> tuple[str, ...]:
    """Return the methods that would take too long on a task, or would say again what BPTT says."""
    again = "rtrl" if entry.hidden > LARGEST_RTRL and not entry.window else ""
    return tuple(name for name in METHODS if defined(name, cell) and (name in entry.without or name == again))


def settings_of(entry: Entry, way: Way, cell: str, start: str, device: str) -> Settings:
    """Return the settings of an entry's runs, with seed and learning rate still open."""
    window = entry.window
    if window and not way.windowed:
        window = WINDOWS.get(way.method, window)
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
    """Return all runs, the most important first; those that choose a learning rate before those that use it.

    The tasks of claims come before others, `CORE` before other methods, and `FIRST_SEEDS` of everything before more.

    Args:
        grid: of tasks and learning rates.
        names: the tasks that can be made here.
        methods: only these.
        seeds: in place of each task's own number.
        device: where all run.
    """
    runs: list[tuple[tuple[bool, bool, bool], Planned]] = []
    for entry in grid.entries:
        if entry.task not in names:
            continue
        rates = entry.rates or grid.rates
        for cell, start in itertools.product(entry.cells, entry.starts):
            for way in ways(entry, cell):
                if not {way.method, way.rate_of or way.method} <= set(methods):
                    continue
                if way.rate_of and (len(rates) == 1 or not grid.shared):
                    continue
                shared = settings_of(entry, way, cell, start, device)
                alike = settings_of(entry, Way(way.rate_of), cell, start, device) if way.rate_of else shared
                tuned = alike._replace(seed=TUNING_SEED, updates=round(grid.tuning * alike.updates))
                trials = [Planned(entry.task, tuned._replace(lr=rate)) for rate in rates] if len(rates) > 1 else []
                candidates = tuple(key_of(trial.task, trial.settings) for trial in trials)
                result = shared._replace(lr=0.0 if candidates else rates[0])
                results = [
                    Planned(entry.task, result._replace(seed=seed), candidates) for seed in range(seeds or entry.seeds)
                ]
                for run in (*(() if way.rate_of else trials), *results):
                    late = FIRST_SEEDS <= run.settings.seed < TUNING_SEED
                    runs.append(((late, not entry.claim, way.method not in CORE), run))
    # Of equal rank, the order of the grid: the sort is stable.
    return [run for _, run in sorted(runs, key=lambda ranked: ranked[0])]
