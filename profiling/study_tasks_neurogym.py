"""Tasks of neuroscience for `study_rivals.py`, from the package neurogym, which is not one of this project's.

    perceptual-decision   which of two noisy signals was stronger                Britten et al. 1992
    context-decision      the same of one of two features, as a cue says         Mante et al. 2013
    delayed-match         whether a second stimulus is the first one again       Miller, Erickson, Desimone 1996
    perceptual-reward     the first one, by reward alone

The loss counts at decision steps, fixation is not asked for, and a batch's shorter trials are padded at the end. A
trial is right if its last decision step is. By reward alone, training sees one number a trial, the mean probability
of the right choice over its decision steps: the expected reward of choosing at random by the network's softmax.

How trials are read and scored is in examples/neurogym_task.py. neurogym is the extra `neurogym`, which pins numpy and
matplotlib: install it into an environment of its own, or without its requirements, `pip install --no-deps
neurogym==2.3.1 'gymnasium==0.29.*' farama-notifications cloudpickle loguru natsort tomlkit pydantic-settings pydantic
pydantic-core python-dotenv typing-inspection annotated-types`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator

from study_grid import tasks
from study_tasks import Benchmark, benchmark

# isort: split
# Of examples/, which study_grid makes importable.
from neurogym_task import ABSENT, decided, expected_reward, padded, trials_of

__all__ = ["ABSENT", "ENVIRONMENTS", "by_name", "decided", "expected_reward", "padded"]

ENVIRONMENTS: dict[str, tuple[str, dict[str, object]]] = {
    "perceptual-decision": ("PerceptualDecisionMaking-v0", {}),
    # By default one feature is relevant in all trials and no cue is shown.
    "context-decision": ("ContextDecisionMaking-v0", {"use_expl_context": True}),
    "delayed-match": ("DelayMatchSample-v0", {}),
    "perceptual-reward": ("PerceptualDecisionMaking-v0", {}),
}
"""Environments and their options; noise and timing are neurogym's."""

REWARDED = ("perceptual-reward",)
"""Tasks of which training sees the reward alone."""

CHOICES = 2


def decision(name: str, _window: int = 0) -> Benchmark:
    """Make a task of trials that are drawn afresh for every update."""
    environment, options = ENVIRONMENTS[name]

    def drawn(seed: int, batch: int) -> Iterator[tasks.Batch]:
        trials = trials_of(environment, seed, **options)
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
