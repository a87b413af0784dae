"""Memory runs out in the middle of an update: the update is made in smaller pieces, or an error tells why not."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import ESTIMATORS
from anpgpu.runtime import memory as runtime_memory
from anpgpu.runtime.memory import FIXED_BYTES, within_memory

T, B, I, H, O, P = 7, 4, 3, 6, 3, 8  # noqa: E741  (the design's names)
METHODS = ("anp", "np", "anp-ls", "anp-feedback", "wp")
NETWORKS = {"one layer": {}, "two layers": {"num_layers": 2}, "bidirectional": {"num_layers": 2, "bidirectional": True}}
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 21474836480 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "driver": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "numpy": MemoryError("Unable to allocate 20.0 GiB for an array"),
}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    runtime_memory._lowered.clear()
    yield
    runtime_memory._lowered.clear()


LEARNT = 2 * 8 * ESTIMATORS["anp-feedback"].state_floats(P, H)
"""Bytes of what two layers learn, however the work is divided."""


class Memory:
    """Simulates a device with room for a number of perturbed steps at a time."""

    def __init__(self, monkeypatch, room, error=ERRORS["cuda"], spared=0):
        self.room, self.error, self.spared, self.refused = room, error, spared, 0
        self.implementation = anpgpu.estimators.sweep.implementation
        self.noise = anpgpu.estimators.weight_rollouts.noise
        monkeypatch.setattr("anpgpu.estimators.sweep.implementation", self.watched)
        monkeypatch.setattr("anpgpu.estimators.weight_rollouts.noise", self.watched_noise)

    def take(self, amount):
        if amount > self.room:
            self.spared -= 1
            if self.spared < 0:
                self.refused += 1
                raise self.error

    def watched(self, op, backend):
        def rollout(preact, *args, options, **more):
            self.take(preact.shape[0] * preact.shape[1] * options.rollouts)
            return self.implementation(op, backend)(preact, *args, options=options, **more)

        return rollout if op == "rollout" else self.implementation(op, backend)

    def watched_noise(self, seed, shape, **more):
        # (rank, b, p, size): as many steps as every method has.
        self.take(T * shape[1] * shape[2])
        return self.noise(seed, shape, **more)


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def backward(how, **options):
    """Return all results of a backward pass as one vector, and the generator's state after it."""
    torch.manual_seed(2)
    rnn = anpgpu.RNN(I, H, perturbation=how, dtype=torch.float64, **options)
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=how.method != "wp")
    outputs, h_n = rnn(inputs)
    (outputs.sin().sum() + h_n.square().sum()).backward()
    grads = [leaf.grad.flatten() for leaf in (*rnn.parameters(), inputs) if leaf.grad is not None]
    return torch.cat([*grads, rnn.last_estimate.skipped.view(1)]), torch.get_rng_state()


def estimate(how, loss="mse", **options):
    """Return all results of `estimate_grad_` as one vector, and the generator's state after it."""
    torch.manual_seed(2)
    rnn = nn.RNN(I, H, dtype=torch.float64, **options)
    head = nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=torch.float64)
    inputs, targets = torch.randn(T, B, I).double(), torch.randn(T, B, O).double()
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how)
    grads = [leaf.grad.flatten() for leaf in (*rnn.parameters(), *head.parameters())]
    rest = [tensor.flatten().double() for tensor in (seen.loss, seen.outputs, seen.h_n, seen.skipped)]
    rest += [] if seen.moved is None else [seen.moved.double().view(1)]
    return torch.cat([*grads, *rest]), torch.get_rng_state()


def assert_goes_on(monkeypatch, work, room, **memory):
    """With too little room the work warns, and gives the same results and generator state as with enough."""
    expected, state = work()
    with monkeypatch.context() as patch:
        short = Memory(patch, room, **memory)
        with pytest.warns(RuntimeWarning, match=r"out of memory on cpu with .*; going on with .*max_memory=\d+"):
            results, after = work()
        assert short.refused
        assert_close(results, expected, "float64")
        assert torch.equal(after, state)
        # The lower limit is remembered, so that the next update fits at once.
        refused = short.refused
        assert_close(work()[0], expected, "float64")
        assert short.refused == refused


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_backward_goes_on_in_less_memory(monkeypatch, method, network):
    how = Perturbation(method, rollouts=P, sigma=1e-3, warmup=1)
    options = {"dropout": 0.5, **NETWORKS[network]} if len(NETWORKS[network]) else {}
    assert_goes_on(monkeypatch, lambda: backward(how, **options), T * P + 1)


@pytest.mark.parametrize("loss", ["mse", absolute], ids=["mse", "callable"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_estimate_grad_goes_on_in_less_memory(monkeypatch, method, network, loss):
    how = Perturbation(method, rollouts=P, sigma=1e-3, warmup=1)
    options = {"dropout": 0.5, **NETWORKS[network]} if len(NETWORKS[network]) and method != "wp" else NETWORKS[network]
    assert_goes_on(monkeypatch, lambda: estimate(how, loss, **options), T * P + 1)


@pytest.mark.parametrize("error", ERRORS)
def test_every_way_to_say_it_is_understood(monkeypatch, error):
    how = Perturbation("anp", rollouts=P, sigma=1e-3)
    assert_goes_on(monkeypatch, lambda: backward(how), 3, error=ERRORS[error])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spared", [1, 3])
def test_what_a_failed_attempt_had_found_is_thrown_away(monkeypatch, method, spared):
    # The first few requests succeed: gradients, losses and outputs are partly added up when memory runs out.
    extra, room = {"np": (12_000, P), "anp-ls": (80_000, 2 * P), "anp-feedback": (80_000 + LEARNT, 2 * P)}.get(
        method, (40_000, T * P // 2)
    )
    how = Perturbation(method, rollouts=P, sigma=1e-3, max_memory=FIXED_BYTES + extra, warmup=1)
    memory = {"room": room, "spared": spared}
    for work in (lambda: backward(how, num_layers=2), lambda: estimate(how, num_layers=2)):
        runtime_memory._lowered.clear()
        assert_goes_on(monkeypatch, work, **memory)


def test_the_warning_names_a_max_memory_that_divides_the_same_from_the_start(monkeypatch):
    how = Perturbation("anp", rollouts=P, sigma=1e-3)
    with monkeypatch.context() as patch:
        Memory(patch, 2 * P)
        with pytest.warns(RuntimeWarning) as warned:
            expected, _ = backward(how)
    runtime_memory._lowered.clear()
    named = int(str(warned[-1].message).partition("max_memory=")[2].partition(" ")[0])
    grads, _ = backward(Perturbation("anp", rollouts=P, sigma=1e-3, max_memory=named))
    assert torch.equal(grads, expected)


@pytest.mark.filterwarnings("ignore:out of memory on cpu")
@pytest.mark.parametrize("work", [backward, estimate], ids=["backward", "estimate_grad_"])
@pytest.mark.parametrize("method", METHODS)
def test_when_nothing_fits_it_says_what_is_needed(monkeypatch, method, work):
    Memory(monkeypatch, 0)
    how = Perturbation(method, rollouts=P, sigma=1e-3)
    least = P if ESTIMATORS[method].whole_samples else 1
    # Tools that search a batch size look for a RuntimeError with "out of memory".
    with pytest.raises(torch.OutOfMemoryError, match=r"needs about \d+ bytes on cpu.*Tried to allocate 20") as error:
        work(how)
    words = str(error.value)
    assert f"samples=1, rollouts={least}" in words or f"(1, {least})" in words
    assert int(words.partition("needs about ")[2].split()[0]) < FIXED_BYTES + 100_000 + (
        LEARNT if method == "anp-feedback" else 0
    )


@pytest.mark.filterwarnings("ignore:out of memory on cpu")
def test_gradients_are_as_they_were_when_nothing_fits(monkeypatch):
    Memory(monkeypatch, 0)
    rnn, head = anpgpu.RNN(I, H, 2), nn.Linear(H, O)
    with pytest.raises(torch.OutOfMemoryError):
        anpgpu.estimate_grad_(rnn, head, torch.randn(T, B, I), torch.randn(T, B, O))
    loss = rnn(torch.randn(T, B, I))[0].sum()
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    assert all(leaf.grad is None for leaf in (*rnn.parameters(), *head.parameters()))


class Whole:
    """Work divided by two functions: from bytes to a number of parts, and back."""

    def __init__(self, choose, needed=lambda parts: parts):
        self.choose, self.needed_bytes = choose, needed

    def divide(self, max_memory, device_type):
        assert device_type == "cpu"
        return self.choose(max_memory)


def test_processes_that_share_rollouts_do_not_divide_further_on_their_own():
    # Dividing further in one process would leave the others waiting for exchanges.
    def work(parts):
        raise ERRORS["cuda"]

    with pytest.raises(torch.OutOfMemoryError, match=r"lower max_memory, in all of them, below 512 bytes.*20\.00 GiB"):
        within_memory(Whole(lambda limit: limit // 2), 1024, torch.device("cpu"), work, alone=False)
    assert runtime_memory._lowered == {}


def test_other_errors_are_not_taken_for_it(monkeypatch):
    Memory(monkeypatch, 0, error=RuntimeError("a kernel failed"))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        backward(Perturbation("anp", rollouts=P))
    assert runtime_memory._lowered == {}


def test_a_failed_attempt_is_freed_before_the_next():
    # A failed attempt's tensors must be freed before the next one: no traceback and no reference may hold them.
    alive = []

    class Held:
        def __init__(self):
            alive.append(1)

        def __del__(self):
            alive.pop()

    def work(parts):
        held = Held()
        assert len(alive) == 1
        if parts > 2:
            raise MemoryError(f"{held}")
        return parts

    def choose(limit):
        if limit < FIXED_BYTES + 1:
            raise MemoryError
        return 2 ** int(math.log2(limit - FIXED_BYTES))

    whole = Whole(choose, lambda parts: FIXED_BYTES + parts)
    with pytest.warns(RuntimeWarning) as warned:
        result = within_memory(whole, FIXED_BYTES + 16, torch.device("cpu"), work, alone=True)
    assert result == 2
    # 16, 8, 4, 2: halved every time.
    assert len(warned) == 3


REAL = """
import resource, sys, warnings
import torch, anpgpu
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
rnn, head = anpgpu.RNN(8, 128), nn.Linear(128, 4)
inputs, targets = torch.randn(200, 16, 8), torch.randn(200, 16, 4)


def update():
    torch.manual_seed(1)
    rnn.zero_grad()
    head.zero_grad()
    anpgpu.estimate_grad_(rnn, head, inputs, targets, perturbation=anpgpu.Perturbation("anp", rollouts=64))
    return torch.cat([leaf.grad.flatten() for leaf in (*rnn.parameters(), *head.parameters())])


anpgpu.estimate_grad_(rnn, head, inputs[:2], targets[:2], perturbation=anpgpu.Perturbation("anp", rollouts=2))
with open("/proc/self/statm") as statm:
    held = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (60 << 20), resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    short = update()
print([str(one.message) for one in warned])
assert any("out of memory on cpu" in str(one.message) for one in warned), warned
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
anpgpu.runtime.memory._lowered.clear()
enough = update()
error = float((short - enough).norm() / enough.norm())
assert error < 2e-5, error
"""


def test_the_allocators_own_error_is_understood():
    # A real shortage: delta_a alone, 100 MiB, exceeds the limit of the process.
    env = {**os.environ, "PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", REAL],
        cwd=Path(__file__).parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def lose(monkeypatch, first):
    """Make the loss of every rollout from number `first` on not finite."""
    implementation, delta_loss = (
        anpgpu.estimators.sweep.implementation,
        anpgpu.estimators.weight_rollouts._Run.delta_loss,
    )

    def lossy(op, backend):
        def rollout(*args, counters, **more):
            run = implementation(op, backend)(*args, counters=counters, **more)
            run.delta_loss[..., max(first - counters.rollout, 0) :] = math.nan
            return run

        return rollout if op == "rollout" else implementation(op, backend)

    def lossy_weights(self, segment, noises, rollouts):
        losses = delta_loss(self, segment, noises, rollouts)
        losses[..., max(first - rollouts.start, 0) :] = math.inf
        return losses

    monkeypatch.setattr("anpgpu.estimators.sweep.implementation", lossy)
    monkeypatch.setattr("anpgpu.estimators.weight_rollouts._Run.delta_loss", lossy_weights)


@pytest.mark.parametrize("work", [backward, estimate], ids=["backward", "estimate_grad_"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_with_half_of_the_rollouts_lost_the_estimate_is_that_of_the_other_half(monkeypatch, method, network, work):
    options = NETWORKS[network]
    # At most H rollouts, and no ridge, so that least squares has the same system to solve.
    expected, _ = work(Perturbation(method, rollouts=H // 2, sigma=1e-3, ridge=0.0, warmup=1), **options)
    lose(monkeypatch, H // 2)
    estimated, _ = work(Perturbation(method, rollouts=H, sigma=1e-3, ridge=0.0, warmup=1), **options)
    assert_close(estimated[:-1], expected[:-1], "unridged" if ESTIMATORS[method].whole_samples else "float64")
    # The last number is the count: of every sample, layer and direction; weight perturbation has all layers at once.
    rounds = 1 if method == "wp" else options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    assert int(expected[-1]) == 0
    assert int(estimated[-1]) == rounds * B * H // 2
