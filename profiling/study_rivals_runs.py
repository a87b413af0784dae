"""The runs of `study_rivals.py`: one network, one way to its gradient, one task.

Every method starts from the same weights, sees the same sequences in the same order, and has the same clipping and
schedule. Those of the library are arguments of `anpgpu.Perturbation`, the others are in `rivals.py`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import commit, processor
from rivals import CELLS, RIVALS, Outcome, State
from study_grid import tasks, training
from study_tasks import RESET, Benchmark
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu
from anpgpu.estimators.found import NonFiniteRolloutsError

# isort: split
# Of examples/, which study_grid makes importable.
import neurogym_task

__all__ = ["LIBRARY", "METHODS", "OPTIMISERS", "STARTS", "Learned", "Settings", "clock", "made", "network", "train"]

LIBRARY: dict[str, dict[str, object]] = {
    "np": {"method": "np"},
    "wp": {"method": "wp"},
    "anp": {"method": "anp", "discount": 0.9},
    "anp-ls": {"method": "anp-ls"},
    "anp-feedback": {"method": "anp-feedback"},
    "published-anp": {"method": "published-anp", "rollouts": 1, "noise": "gaussian"},
}
"""Arguments of `Perturbation` by the name in tables."""

METHODS = (*RIVALS, *LIBRARY)

OPTIMISERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}

STARTS = ("default", "orthogonal", "chrono")
"""W_hh is as torch draws it, or every gate's is a random rotation, or biases of a GRU or LSTM make it remember."""

LONGEST = 784
"""Steps that a unit of the chrono start remembers at most."""

DALE = "dale"
"""The cell of a leaky rate network under Dale's law, that of examples/neurogym_task.py: an nn.RNN with
parametrizations, whose start is its own."""

CHUNK = 500
"""Held-out sequences of one forward pass."""

RECORDED = 500
"""Steps between two records of an online run, each a mean over `RESET` steps, as in the sketched-RTRL release."""


class Settings(NamedTuple):
    """The settings of a run on any task."""

    method: str
    seed: int = 0
    cell: str = "rnn"
    start: str = "orthogonal"
    optimiser: str = "adam"
    updates: int = 1000
    lr: float = 1e-3
    hidden: int = 128
    batch: int = 8
    rollouts: int = 8
    """Of the library's methods; 0 for rivals."""
    window: int = 0
    """Steps of an update where the task is online."""
    clip: float = 1.0
    """Of the norm of the recurrent network's gradient; 0 for none."""
    falling: bool = True
    """Whether the learning rate falls linearly to zero."""
    sigma: float = 1e-3
    device: str = "cpu"


class Learned(NamedTuple):
    """The learning curve of a run: one value per evaluation on the held-out sets."""

    updates: list[int]
    seconds: list[float]
    """Of the training updates so far: processor time, on a GPU wall clock."""
    rollout_steps: list[int]
    """Rollouts times sequences times steps so far; 0 for methods without rollouts."""
    training_loss: list[float]
    """Mean over the updates since the last evaluation."""
    valid: list[tasks.Score]
    test: list[tasks.Score]
    records: list[float]
    """Of an online run: mean training loss of the last 200 steps, every 500 steps."""


def network(settings: Settings, inputs: int, outputs: int) -> tuple[nn.RNNBase, nn.Linear]:
    """Return a network and its readout, the same for every method of a seed (but biases, where a rule has none)."""
    if settings.start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {settings.start!r}")
    if settings.cell == DALE:
        rnn, readout = neurogym_task.network(inputs, outputs, settings.hidden, seed=settings.seed)
        return rnn.to(settings.device), readout.to(settings.device)
    torch.manual_seed(settings.seed)
    rnn, readout = CELLS[settings.cell](inputs, settings.hidden), nn.Linear(settings.hidden, outputs)
    if settings.start == "orthogonal":
        for gate in rnn.weight_hh_l0.detach().split(settings.hidden):
            nn.init.orthogonal_(gate)
    elif settings.start == "chrono":
        chrono_(rnn)
    if settings.method.startswith("published"):
        whole = (rnn.weight_ih_l0, rnn.weight_hh_l0, readout.weight)
        rnn = CELLS[settings.cell](inputs, settings.hidden, bias=False)
        readout = nn.Linear(settings.hidden, outputs, bias=False)
        with torch.no_grad():
            for bare, value in zip((*rnn.parameters(), *readout.parameters()), whole, strict=True):
                bare.copy_(value)
    return rnn.to(settings.device), readout.to(settings.device)


@torch.no_grad()
def chrono_(rnn: nn.RNNBase) -> None:
    """Set the biases so that units remember for 1 to `LONGEST` steps, evenly (Tallec and Ollivier, ICLR 2018).

    A GRU's z and an LSTM's f have a bias of log(u), u uniform from 1 to `LONGEST` - 1, the LSTM's i its negative, all
    other biases are zero.

    Raises:
        ValueError: the cell has no gates.
    """
    if rnn.mode not in {"GRU", "LSTM"}:
        raise ValueError(f"start 'chrono' sets the biases of gates, which an {rnn.mode} does not have")
    rnn.bias_ih_l0.zero_()
    first, second, *_ = rnn.bias_hh_l0.zero_().split(rnn.hidden_size)
    # torch's order is r, z, n of a GRU and i, f, g, o of an LSTM.
    second.uniform_(1, LONGEST - 1).log_()
    if rnn.mode == "LSTM":
        first.copy_(-second)


Update = Callable[[tasks.Batch, State], Outcome]
"""Adds a batch's gradients to `.grad`."""


def update_of(task: Benchmark, settings: Settings, rnn: nn.RNNBase, readout: nn.Linear) -> tuple[Update, int, int]:
    """Return a method's update, and how many rollouts it runs of a sequence: every update, and before the first one.

    Raises:
        ValueError: the method is unknown, or needs a loss of every step where a trial has only a reward.
    """
    if settings.method in RIVALS:
        if task.reward is not None and settings.method != "bptt":
            raise ValueError(f"{settings.method!r} needs a loss of every step, and {task.name} has one reward a trial")
        rival = RIVALS[settings.method](rnn, readout)

        def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
            if task.reward is not None:
                # What a black box does not give: the exact gradient of the expected reward.
                return task.reward(outputs.unsqueeze(2), targets.unsqueeze(-1)).mean()
            return training.loss_of(task, outputs, targets)

        return lambda batch, state: rival.grad_(batch.inputs, batch.targets, loss_of, state), 0, 0
    if settings.method not in LIBRARY:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {settings.method!r}")
    arguments: dict[str, Any] = {"rollouts": settings.rollouts, "sigma": settings.sigma, **LIBRARY[settings.method]}
    how = anpgpu.Perturbation(**arguments)
    loss = task.loss if task.reward is None else task.reward

    def estimated(batch: tasks.Batch, state: State) -> Outcome:
        estimate = anpgpu.estimate_grad_(rnn, readout, batch.inputs, batch.targets, loss, perturbation=how, hx=state)
        return Outcome(float(estimate.loss), estimate.h_n)

    return estimated, how.rollouts, how.rollouts * how.warmup if settings.method == "anp-feedback" else 0


def on(batch: tasks.Batch, device: str) -> tasks.Batch:
    """Return a batch on a device."""
    return batch._replace(inputs=batch.inputs.to(device), targets=batch.targets.to(device))


def train(task: Benchmark, settings: Settings, *, progress: bool = True) -> Learned:
    """Train one network; a loss that is not finite ends the training and the curve."""
    rnn, readout = network(settings, task.inputs, task.outputs)
    update, rollouts, warming = update_of(task, settings, rnn, readout)
    parameters = [*rnn.parameters(), *readout.parameters()]
    optimiser = OPTIMISERS[settings.optimiser](parameters, settings.lr)
    held_out = [on(part, settings.device) for part in (task.valid, task.test)]
    looks = {round(settings.updates * (look + 1) / training.SHARES) for look in range(training.SHARES)}
    learned = Learned([], [], [], [], [], [], [])
    recent: deque[float] = deque(maxlen=RESET // settings.window if settings.window else 1)
    seconds, spent, losses, state = 0.0, 0, [], None
    batches = task.batches(settings.seed, settings.batch)
    title = f"{task.name} {settings.method}"
    for number in tqdm(range(1, settings.updates + 1), desc=title, disable=not progress, leave=False):
        batch = on(next(batches), settings.device)
        state = state if batch.continued else None
        started = clock(settings.device)
        optimiser.zero_grad()
        if settings.falling:
            optimiser.param_groups[0]["lr"] = settings.lr * (1 - (number - 1) / settings.updates)
        loss, state = update(batch, state)
        if not math.isfinite(loss):
            break
        if settings.clip:
            nn.utils.clip_grad_norm_(rnn.parameters(), settings.clip)
        optimiser.step()
        seconds += clock(settings.device) - started
        size = batch.inputs.shape[0] * batch.inputs.shape[1]
        spent += size * (rollouts + (warming if number == 1 else 0))
        losses.append(loss)
        recent.append(loss)
        # The release makes its last record before the last step, not after it.
        due = settings.window and number * settings.window % RECORDED < settings.window
        if due and number < settings.updates:
            learned.records.append(sum(recent) / len(recent))
        if number in looks:
            learned.updates.append(number)
            learned.seconds.append(seconds)
            learned.rollout_steps.append(spent)
            learned.training_loss.append(sum(losses) / len(losses))
            learned.valid.append(evaluate(task, rnn, readout, held_out[0]))
            learned.test.append(evaluate(task, rnn, readout, held_out[1]))
            losses = []
    return learned


def clock(device: str) -> float:
    """Return processor time, on a GPU wall clock, in seconds."""
    if torch.device(device).type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def evaluate(task: Benchmark, rnn: nn.RNNBase, readout: nn.Linear, held_out: tasks.Batch) -> tasks.Score:
    """Score a network on held-out sequences, from a state of zero."""
    last = tasks.per_sequence(task, held_out.targets)
    outputs = [readout(rnn(part)[0][-1:] if last else rnn(part)[0]) for part in held_out.inputs.split(CHUNK, 1)]
    return task.score(torch.cat(outputs, 1), held_out.targets)


def made(task: Benchmark, settings: Settings) -> dict[str, object]:
    """Make a run; return its line: configuration, curve, what counts as solved, and its seconds, tests included."""
    started, reason = time.process_time(), None
    try:
        curve = train(task, settings, progress=False)
    except NonFiniteRolloutsError as error:
        # No rollout is finite: the run counts as broken off. Any other error is the study's own, and ends it.
        curve, reason = Learned([], [], [], [], [], [], []), str(error)
    line = {
        "task": task.name,
        "settings": settings._asdict(),
        "curve": curve._asdict(),
        "unit": task.unit,
        "chance": task.chance,
        "solved": task.solved,
        "seconds": time.process_time() - started,
        "machine": processor(settings.device),
        "commit": commit(Path(__file__).resolve().parent),
    }
    return line if reason is None else {**line, "broke_off": reason}
