"""The runs of `study_feedback.py`, part by part, the most important first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from study_feedback_runs import EXACT, KNOWN, MNIST, SEVEN, Run

GATED = ("GRU", "LSTM")

WARMUPS = (0, 5, 10, 20, 30, 60)
DEFAULT_WARMUP = 30

CLOSED = ("copying 10, orthogonal", "copying 10", "copying 20", "adding, 10 steps", "permuted digits")
CLOSED_BATCH = {"adding, 10 steps": 32}
"""Sequences of an update where 8 are too few for BPTT to solve the task in as many updates."""

RATIO, FLOOR = 1.25, 0.01
"""A closed loop keeps up if its mean loss is at most RATIO times BPTT's plus FLOOR."""

LONG_RATE, LONG_BATCH = 2e-4, 32


def learned(rollouts: int, *, warmup: int = DEFAULT_WARMUP, follow: bool = True) -> str:
    """Spell an estimator with learned feedback."""
    return f"anp-feedback rollouts={rollouts} warmup={warmup}" + ("" if follow else " follow_weights=false")


PARTS_OF_METHOD = {
    "both": learned(8),
    "warm-up alone": learned(8, follow=False),
    "B moves with W alone": learned(8, warmup=0),
    "none": learned(8, warmup=0, follow=False),
}


def shadows(rollouts: int) -> tuple[str, ...]:
    """Return the estimators of one size of the protocol."""
    return (EXACT, learned(rollouts, warmup=0), f"anp-ls rollouts={rollouts}")


def cosine_runs(seeds: int) -> Iterator[Run]:
    estimators = (
        *shadows(8), learned(8), learned(8, warmup=0, follow=False), learned(4, warmup=0), learned(1, warmup=0), KNOWN
    )  # fmt: skip
    for seed, task in itertools.product(range(seeds), SEVEN):
        yield Run("cosine", task, estimators, seed, 150)


def sizes_runs(seeds: int) -> Iterator[Run]:
    first = SEVEN[0]
    for seed in range(seeds):
        yield Run("cosine", "copying 10, 400 steps", (*shadows(4), KNOWN), seed, 150, hidden=64)
        yield Run("cosine", first, shadows(8), seed, 150, nonlinearity="relu")
        yield Run("cosine", first, shadows(8), seed, 190, layers=2)
        yield Run("cosine", first, shadows(8), seed, 190, bidirectional=True)
        yield Run("cosine", first, (*shadows(8), learned(4, warmup=0), KNOWN), seed, 150, batch=1)
        yield Run("cosine", first, (*shadows(8), KNOWN), seed, 150, batch=32)
        yield Run("cosine", first, (*shadows(16), KNOWN), seed, 110, hidden=512)
        yield Run("cosine", first, (*shadows(64), KNOWN), seed, 110, hidden=1024)


def closed_runs(seeds: int) -> Iterator[Run]:
    def trained(task: str, estimator: str, seed: int) -> Run:
        return Run("train", task, (estimator,), seed, 1000, batch=CLOSED_BATCH.get(task, 8))

    for seed, task in itertools.product(range(seeds), CLOSED):
        yield from (trained(task, estimator, seed) for estimator in (EXACT, learned(8)))
    for task in CLOSED:
        yield from (trained(task, estimator, 0) for estimator in (KNOWN, learned(4), "anp-ls rollouts=8", learned(16)))


def long_runs(seeds: int) -> Iterator[Run]:
    how = {"lr": LONG_RATE, "batch": LONG_BATCH}

    def trained(estimator: str, seed: int) -> Run:
        return Run("train", MNIST, (estimator,), seed, 1200, **how)

    both, *others = PARTS_OF_METHOD.values()
    paths = [Run("path", MNIST, (EXACT, estimator), 0, 300, **how) for estimator in (both, *others)]
    yield from (trained(estimator, 0) for estimator in (EXACT, both))
    yield from paths[:3]
    for seed in range(1, seeds):
        yield from (trained(estimator, seed) for estimator in (EXACT, both))
    yield from paths[3:]
    yield from (trained(estimator, 0) for estimator in (*others, KNOWN))
    yield Run("path", MNIST, (both, EXACT), 0, 300, **how)


def time_runs(seeds: int) -> Iterator[Run]:
    for seed, threads, hidden in itertools.product(range(seeds), (1, 2), (128, 512)):
        half = f"anp-ls rollouts={hidden // 2}"
        methods = (EXACT, learned(8, warmup=0), learned(4, warmup=0))
        turns, few = (15, 5) if hidden == 128 else (7, 2)
        yield Run("time", "random", methods, seed, turns, hidden=hidden, batch=32, threads=threads)
        yield Run("time", "random", (methods[1], half), seed, few, hidden=hidden, batch=32, threads=threads)


def warmup_runs(seeds: int) -> Iterator[Run]:
    how = {MNIST: {"lr": LONG_RATE, "batch": LONG_BATCH}}
    for seed, task in itertools.product(range(seeds), (SEVEN[0], "permuted digits", MNIST)):
        estimators = (EXACT, *(learned(8, warmup=warmup) for warmup in WARMUPS))
        yield Run("cosine", task, estimators, seed, 10, **how.get(task, {}))
        for estimator in estimators:
            yield Run("train", task, (estimator,), seed, 300, **how.get(task, {}))


def without_feedback(rollouts: int) -> str:
    """Spell least squares against what is known without rollouts."""
    return f'anp-feedback rollouts={rollouts} prior="known"'


def gated_runs(seeds: int) -> Iterator[Run]:
    few = [of(rollouts) for rollouts in (8, 16, 32) for of in (without_feedback, "anp-ls rollouts={}".format)]
    shadowed = (EXACT, learned(8, warmup=0), KNOWN, *few)
    for seed, module, hold in itertools.product(range(seeds), GATED, (3.0, 0.0)):
        yield Run("cosine", "copying 10 of 8", shadowed, seed, 120, hidden=64, lr=2e-3, module=module, hold=hold)

    def trained(estimator: str, module: str, seed: int) -> Run:
        return Run("train", "copying 5 of 8", (estimator,), seed, 600, hidden=64, lr=1e-2, module=module)

    for seed, module in itertools.product(range(seeds), GATED):
        yield from (trained(estimator, module, seed) for estimator in (EXACT, learned(8), "anp-ls rollouts=64"))
    for module in GATED:
        yield from (trained(estimator, module, 0) for estimator in (KNOWN, without_feedback(8), "anp-ls rollouts=8"))
        yield from (trained(of(32), module, 0) for of in (without_feedback, "anp-ls rollouts={}".format))


PARTS: dict[str, Callable[[int], Iterator[Run]]] = {
    "cosine": cosine_runs,
    "closed": closed_runs,
    "long": long_runs,
    "time": time_runs,
    "warmup": warmup_runs,
    "sizes": sizes_runs,
    "gated": gated_runs,
}
SEEDS = {"cosine": 3, "closed": 3, "long": 5, "time": 3, "warmup": 2, "sizes": 1, "gated": 3}
