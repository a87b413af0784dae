"""What the processes of test_failing_processes.py run: updates in which one process fails, and the normal ones after.

A process of its own has to import this, so it holds no test.
"""

import math
from functools import partial
from itertools import product

import pytest
import torch
from distributed_cases import LEARNT, TIGHT, B, H, I, O, P, T, absolute, backward, data, estimate
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.estimators.found import FoundOfProblem
from anpgpu.runtime import memory, processes

STATELESS = ("np", "anp", "anp-ls", "wp")
METHODS = (*STATELESS, "anp-feedback")
NETWORKS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
}
PLACES = (("one layer", None, 0), ("two layers", None, 1), ("bidirectional", None, 1), ("two layers", "cut", 2))
"""Networks, whether `cut` limits memory, and how many requests succeed before one fails: none, or some exchanges on."""
ROOM = {"equal": [1 << 40] * 3, "unequal": [1 << 40, memory.DEFAULT_SHARE * TIGHT, 1 << 40]}
"""What each host is said to have, in bytes."""


def knobs(method="np", **options):
    return Perturbation(method, **{"rollouts": P, "sigma": 1e-3, "shard_rollouts": True, "warmup": 1, **options})


def cut(method):
    """Bytes that cut time into segments, even where few rollouts run."""
    return memory.FIXED_BYTES + {"np": 8_000, "anp": 12_000, "anp-feedback": 30_000 + LEARNT["RNN"]}.get(method, 30_000)


class Failing:
    """Raises at a call, counted from 0."""

    def __init__(self, call, at, error):
        self.call, self.left, self.error = call, at, error

    def __call__(self, *args, **named):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.call(*args, **named)


def out_of_memory(patch, spared):
    """Let a process run out of memory after some requests: rollouts', or weight noise."""
    error = torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
    sweep, weight_rollouts = anpgpu.estimators.sweep, anpgpu.estimators.weight_rollouts
    rollout = Failing(sweep.implementation("rollout", "torch"), spared, error)
    implementation = sweep.implementation
    patch.setattr(sweep, "implementation", lambda op, name: rollout if op == "rollout" else implementation(op, name))
    patch.setattr(weight_rollouts, "noise", Failing(weight_rollouts.noise, spared, error))


def one_fails(failing, work, spared):
    """Run an update in which memory runs out in one process; return its results."""
    with pytest.MonkeyPatch.context() as patch:
        if failing:
            out_of_memory(patch, spared)
        return work()


def raises_at(failing, how, at):
    """Run an update whose callable loss raises in one process."""
    loss = Failing(absolute, at if failing else 10**9, KeyError("no such word"))
    estimate(how, loss)


def nan_sample(method, sample, face):
    """Run an update with a sample that only one process runs, by least squares, and that has no finite rollout."""
    torch.manual_seed(2)
    rnn = anpgpu.RNN(I, H, dtype=torch.float64, perturbation=knobs(method))
    inputs = data()[0]
    inputs[1, sample] = math.nan
    if face == "backward":
        rnn(inputs)[0].sum().backward()
    else:
        anpgpu.estimate_grad_(rnn, None, inputs, torch.zeros(T, B, H, dtype=torch.float64))


def wrong_class(failing):
    """Run an update whose targets hold, in one process, a class that there is not."""
    torch.manual_seed(2)
    rnn, head = nn.RNN(I, H), nn.Linear(H, O)
    targets = torch.full((T, B), O if failing else 0)
    anpgpu.estimate_grad_(rnn, head, torch.ones(T, B, I), targets, "cross_entropy", perturbation=knobs())


def last_exchange(failing):
    """Run an update in which one process fails after the last sum."""
    with pytest.MonkeyPatch.context() as patch:
        if failing:
            summed = FoundOfProblem.sum_

            def fail(found, share):
                summed(found, share)
                raise ValueError("summed and lost")

            patch.setattr(FoundOfProblem, "sum_", fail)
        estimate(knobs())


def ended(call):
    """How a call ended, in words, and its results."""
    try:
        return "no error", call()
    except (RuntimeError, ValueError, KeyError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", None


def failures(rank, count):
    """Name to how an update with a failure ended, and whether the next one was as ever.

    The last process fails, or, by the names that say so, the first, or two.
    """
    last = rank == count - 1
    calls = {}
    for method, (network, limit, spared), face in product(METHODS, PLACES, (backward, estimate)):
        work = partial(face, knobs(method, max_memory=limit and cut(method)), **NETWORKS[network])
        calls[f"memory {method} {face.__name__} {network}, {limit or 'whole'}"] = partial(one_fails, last, work, spared)
    for method, at in product(METHODS, range(3)):
        calls[f"callable {method}, call {at}"] = partial(raises_at, last, knobs(method), at)
    calls["first: callable"] = partial(raises_at, rank == 0, knobs(), 1)
    for sample, face in product((0, B - 1), ("backward", "estimate")):
        calls[f"{'last' if sample else 'first'}: nan sample, {face}"] = partial(nan_sample, "anp-ls", sample, face)
    calls["targets"] = partial(wrong_class, last)
    calls["last exchange"] = partial(last_exchange, last)
    calls["two: callable"] = partial(raises_at, rank < 2, knobs(), rank)
    usual = estimate(knobs())
    return {name: (ended(call)[0], torch.equal(estimate(knobs()), usual)) for name, call in calls.items()}


def unread(rank, count):
    """Updates where the host reads nothing of what is exchanged, as on CUDA: how they ended, and their results.

    One layer: a lower one would look for finite rollouts, which on CUDA it does not.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "reads", lambda device: False)
        failed = {
            (method, face.__name__, spared): ended(
                partial(one_fails, rank == count - 1, partial(face, knobs(method, max_memory=cut(method))), spared)
            )
            for method, face, spared in product(METHODS, (backward, estimate), (0, 1))
        }
        return {"failed": failed, "memories": updates_on_hosts(rank, "unequal")}


def results_of(how):
    """All results of updates: method, face and network to vector."""
    return {
        (method, face.__name__, network): face(how(method), **NETWORKS[network])
        for method, face, network in product(STATELESS, (backward, estimate), NETWORKS)
    }


def updates_on_hosts(rank, room):
    """All results of updates on hosts of some memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_host_memory", lambda: ROOM[room][rank])
        return results_of(knobs)


def memories(rank):
    """Updates on hosts of equal and of unequal memory, and with other limits as an argument in each process."""
    own = (1 << 30, TIGHT, None)[rank]
    return {
        "equal": updates_on_hosts(rank, "equal"),
        "unequal": updates_on_hosts(rank, "unequal"),
        "tight": results_of(partial(knobs, max_memory=TIGHT)),
        "own": results_of(partial(knobs, max_memory=own)),
    }


def all_cases(rank, count):
    """All cases of this file."""
    return {"failures": failures(rank, count), "memories": memories(rank), "unread": unread(rank, count)}
