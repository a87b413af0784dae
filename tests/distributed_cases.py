"""What the processes of test_distributed.py run. Each process writes its results, by name of the case, to a file.

New processes import this file, so it holds no test.
"""

import dataclasses
import importlib.util
import math
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import ESTIMATORS
from anpgpu.runtime import memory as runtime_memory

T, B, I, H, O, P = 5, 5, 3, 4, 2, 7  # noqa: E741  (the design's names)
TIMEOUT = timedelta(seconds=60)
STATELESS = ("anp", "np", "anp-ls", "wp")
METHODS = (*STATELESS, "anp-feedback")
CELLS = {"RNN": (nn.RNN, anpgpu.RNN), "GRU": (nn.GRU, anpgpu.GRU), "LSTM": (nn.LSTM, anpgpu.LSTM)}
"""torch's module and ours."""
NETWORKS = {"one layer": {}, "two layers": {"num_layers": 2}, "bidirectional": {"num_layers": 2, "bidirectional": True}}
TIGHT = runtime_memory.FIXED_BYTES + 30_000
"""A `max_memory`, in bytes, under which time is cut into segments."""

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
LEARNT = {cell: 2 * 8 * ESTIMATORS["anp-feedback"].state_floats(P, H, gates) for cell, gates in GATES.items()}
"""Bytes of what two layers learn, however the work is divided."""

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    """Import an example by its path, since the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat(parts):
    return torch.cat([tensor.detach().double().flatten() for tensor in parts if tensor is not None])


def leaves(*modules):
    return [leaf for module in modules for leaf in module.parameters()]


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(T, B, size, dtype=dtype, generator=generator) for size in (I, O)]


def states_of(result):
    """States as a tuple; an LSTM has two."""
    return result if isinstance(result, tuple) else (result,)


def backward(how, *, cell="RNN", dtype=torch.float64, packed=False, **options):
    """Return all results of a backward pass as one vector."""
    torch.manual_seed(2)
    rnn = CELLS[cell][1](I, H, perturbation=how, dtype=dtype, **options)
    inputs = data(dtype)[0].requires_grad_(how.method != "wp" and not packed)
    sequences = nn.utils.rnn.pack_padded_sequence(inputs, [5, 2, 4, 1, 5], enforce_sorted=False) if packed else inputs
    outputs, finals = rnn(sequences)
    final = sum(state.square().sum() for state in states_of(finals))
    ((outputs.data if packed else outputs).sin().sum() + final).backward()
    seen = rnn.last_estimate
    return flat([*(leaf.grad for leaf in leaves(rnn)), inputs.grad, torch.nan_to_num(seen.split_half), seen.skipped])


def absolute(outputs, targets):
    """Distances, weighted so that noise of opposite signs does not cancel: `moved` counts what is not exactly zero."""
    return ((outputs - targets).abs() * torch.linspace(1, 0.7, O, dtype=outputs.dtype)).sum(-1)


class SometimesLost:
    """A loss that is not finite where a rollout raises the first output of the last step; the first call is clean."""

    def __call__(self, outputs, targets):
        losses = (outputs - targets).square().sum(-1)
        if losses.shape[2] == 1:
            self.clean = outputs[-1, ..., 0]
            return losses
        return torch.where(outputs[-1, ..., 0] > self.clean + 1e-4, math.nan, losses)


def estimate(how, loss="mse", *, cell="RNN", **options):
    """Return all results of `estimate_grad_` as one vector."""
    torch.manual_seed(2)
    rnn = CELLS[cell][0](I, H, dtype=torch.float64, **options)
    head = nn.Linear(H * (1 + rnn.bidirectional), O, dtype=torch.float64)
    inputs, targets = data()
    states = 1 + isinstance(rnn, nn.LSTM)
    shape = len(rnn.all_weights), B, H
    firsts = [torch.zeros(shape, dtype=torch.float64).requires_grad_(how.method != "wp") for _ in range(states)]
    hx = firsts[0] if states == 1 else tuple(firsts)
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how, hx=hx)
    grads = [leaf.grad for leaf in leaves(rnn, head)]
    moved = [] if seen.moved is None else [seen.moved]
    half = torch.nan_to_num(seen.split_half)
    grads += [first.grad for first in firsts]
    return flat([*grads, seen.loss, seen.outputs, *states_of(seen.h_n), *moved, half, seen.skipped])


def updates_of(cell, shard):
    """Make one update by every method, network and way of calling; return name to vector."""
    vectors = {}
    networks = NETWORKS if cell == "RNN" else {"bidirectional": NETWORKS["bidirectional"]}
    for method in METHODS:
        how = Perturbation(method, rollouts=P, sigma=1e-3, shard_rollouts=shard, warmup=2)
        for name, network in networks.items():
            vectors[f"backward {method} {name}"] = backward(how, cell=cell, **network)
            vectors[f"estimate {method} {name}"] = estimate(how, cell=cell, **network)
            if method != "wp":
                dropout = {"dropout": 0.5, "num_layers": 2, **network}
                vectors[f"dropout {method} {name}"] = estimate(how, cell=cell, **dropout)
        vectors[f"callable {method}"] = estimate(how, absolute, cell=cell, num_layers=2)
        vectors[f"lost rollouts {method}"] = estimate(dataclasses.replace(how, warmup=0), SometimesLost(), cell=cell)
        deep = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
        vectors[f"packed {method}"] = backward(how, cell=cell, packed=True, **deep)
        vectors[f"float32 {method}"] = backward(how, cell=cell, dtype=torch.float32)
        tight = dataclasses.replace(how, max_memory=TIGHT + (0 if method in STATELESS else LEARNT[cell]))
        segments = backward(tight, cell=cell, num_layers=2), estimate(tight, cell=cell, num_layers=2)
        vectors[f"segments {method}"] = torch.cat(segments)
    many = Perturbation("np", rollouts=P, sigma=1e-3, shard_rollouts=shard, readout="perturbed", noise="gaussian")
    vectors["perturbed readout"] = estimate(many, cell=cell)
    few = Perturbation("anp-ls", rollouts=2, shard_rollouts=shard)
    vectors["fewer rollouts than processes"] = estimate(few, cell=cell)
    return vectors


def updates(shard):
    """Make the updates of all cells."""
    return {f"{cell} {name}": vector for cell in CELLS for name, vector in updates_of(cell, shard).items()}


def train(shard, rank, cell):
    """Train some steps from this process's own seed; return the weights."""
    torch.manual_seed(4)
    how = Perturbation(rollouts=P, shard_rollouts=shard)
    rnn, head = CELLS[cell][1](I, H, perturbation=how), nn.Linear(H, O)
    optimiser = torch.optim.SGD(leaves(rnn, head), lr=0.1)
    inputs, targets = data(torch.float32)
    torch.manual_seed(10 + rank)
    for _ in range(4):
        optimiser.zero_grad()
        (head(rnn(inputs)[0]) - targets).square().mean().backward()
        optimiser.step()
    return flat(leaves(rnn, head))


def generators(shard):
    """Return whether an update advances the generator by exactly one draw."""
    torch.manual_seed(0)
    rnn = anpgpu.RNN(I, H, perturbation=Perturbation(rollouts=P, shard_rollouts=shard))
    torch.manual_seed(5)
    rnn(torch.ones(T, B, I))[0].sum().backward()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    return torch.equal(state, torch.get_rng_state())


def error_of(call):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank):
    """Return the error messages by case."""
    how = Perturbation("anp", P, shard_rollouts=True)
    torch.manual_seed(0)
    rnn, head = anpgpu.RNN(I, H, perturbation=how), nn.Linear(H, O)

    def own_batch():
        torch.manual_seed(rank)
        rnn(torch.randn(T, B, I))[0].sum().backward()

    def own_order():
        torch.manual_seed(0)
        inputs = torch.randn(T, B, I)
        rnn(inputs.flip(1) if rank else inputs)[0].sum().backward()

    def own_targets():
        inputs = torch.ones(T, B, I)
        anpgpu.estimate_grad_(rnn, head, inputs, torch.full((T, B, O), float(rank)), perturbation=how)

    def own_batch_size():
        rnn(torch.ones(T, B + rank, I))[0].sum().backward()

    def own_weights():
        torch.manual_seed(rank)
        anpgpu.RNN(I, H, perturbation=how)(torch.ones(T, B, I))[0].sum().backward()

    def own_dropout():
        torch.manual_seed(0)
        deep = anpgpu.RNN(I, H, 2, dropout=0.5, perturbation=how)
        torch.manual_seed(rank)
        anpgpu.estimate_grad_(deep, None, torch.ones(T, B, I), torch.ones(T, B, H))

    def wrapped():
        torch.manual_seed(0)
        model = DistributedDataParallel(Tagger(how))
        torch.manual_seed(rank)
        model(torch.randn(T, B, I)).sum().backward()

    def too_few():
        few = Perturbation("anp", 1, shard_rollouts=True)
        anpgpu.estimate_grad_(rnn, head, torch.ones(T, B, I), torch.ones(T, B, O), perturbation=few)

    def nothing_finite():
        def loss(outputs, targets):
            return outputs.sum(-1) * (1.0 if outputs.shape[2] == 1 else math.nan)

        torch.manual_seed(0)
        same, linear = nn.RNN(I, H), nn.Linear(H, O)
        anpgpu.estimate_grad_(same, linear, torch.ones(T, B, I), None, loss, perturbation=how)

    calls = (
        own_batch,
        own_order,
        own_targets,
        own_batch_size,
        own_weights,
        own_dropout,
        wrapped,
        too_few,
        nothing_finite,
    )
    return {call.__name__: error_of(call) for call in calls}


class Tagger(nn.Module):
    """A model for DistributedDataParallel."""

    def __init__(self, how, cell="RNN"):
        super().__init__()
        self.rnn = CELLS[cell][1](I, H, dtype=torch.float64, perturbation=how)
        self.head = nn.Linear(H, O, dtype=torch.float64)

    def forward(self, inputs):
        return self.head(self.rnn(inputs.to(self.head.weight.dtype))[0])


def samples_sharded(rank, count, cell, wrap=DistributedDataParallel):
    """Return the gradients by method where every process has its own samples, but the same seed and inputs."""
    gradients = {}
    for method in (*STATELESS, "bptt"):
        torch.manual_seed(6)
        model = Tagger(Perturbation(method, rollouts=P, ridge=1.0), cell)
        wrapped = wrap(model)
        torch.manual_seed(7)
        targets = torch.full((T, 2, O), 1.0 + rank % count, dtype=torch.float64)
        (wrapped(torch.ones(T, 2, I)) - targets).square().mean().backward()
        gradients[method] = flat(leaf.grad for leaf in model.parameters())
    return gradients


def feedback_matrices(rank, cell):
    """Return a module's B after three updates of DistributedDataParallel; every process has samples of its own."""
    torch.manual_seed(6)
    model = Tagger(Perturbation("anp-feedback", rollouts=P, warmup=2), cell)
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(torch.randn(T, 2, I, generator=generator)).square().mean().backward()
        optimiser.step()
    state = anpgpu.estimator_state(model)["rnn"]
    weight = model.rnn.weight_hh_l0.detach()
    return {"feedback": state["weight_hh_l0.feedback"], "updates": state["updates"], "weight": weight}


def everything(rank, count):
    """All cases of this file."""
    return {
        "updates": updates(True),
        "train": {cell: train(True, rank, cell) for cell in CELLS},
        "generators": generators(True),
        "errors": errors(rank),
        "ddp": {cell: samples_sharded(rank, count, cell) for cell in CELLS},
        "feedback": {cell: feedback_matrices(rank, cell) for cell in CELLS},
        "example": {share: example("ddp").train(share, 3, batch=12) for share in ("samples", "rollouts")},
    }


def process(rank, count, folder, work, timeout):
    """One of `count` processes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=timeout
    )
    try:
        torch.save(work(rank, count), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def run(count, folder, work=everything, timeout=TIMEOUT):
    """Run `work(rank, count)` in processes to their end, or to the first that fails; return the report of each."""
    context = multiprocessing.start_processes(
        process, args=(count, str(folder), work, timeout), nprocs=count, join=False, start_method="spawn"
    )
    # `join` returns False while a process still runs, and raises the error of one that failed.
    for _ in range(180):
        if context.join(timeout=1):
            return [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
    for worker in context.processes:
        worker.kill()
    raise TimeoutError(f"{count} processes did not finish")
