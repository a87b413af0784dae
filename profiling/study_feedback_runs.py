"""The runs of `study_feedback.py`: tasks, networks, and what is measured of them.

    shadow   one estimator trains, the others see the same weights and batches: cosines, and errors of sums
    train    one estimator trains: its losses

An estimator is spelled as arguments of `anpgpu.Perturbation`, "anp-feedback rollouts=8 warmup=0". `KNOWN` is what is
known without rollouts and without feedback: each step's loss through that step alone, phi'(a_t) dL/dh_t; in GRU and
LSTM also through what a step hands on past the recurrent product, z h and c (e-prop's approximation, Bellec et al.
2020).
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gate import cosine
from report import interleaved
from study_grid import tasks, training
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu

EXACT, KNOWN = "bptt", "known part"

SYMBOLS = 10
CLIP = 1.0
"""Of the norm of the recurrent network's gradient."""

EVERY = "all weights"
"""Of the recurrent network, as one vector; in gated cells."""

WINDOWS = ((0, 10), (20, 30), (50, 60), (90, 100), (90, 120))
"""Updates over which cosines are averaged, beside the last ten."""

TIMED_STEPS = 100

LOOKS, BETWEEN = 10, 10
"""A run is scored on held-out sequences so many times near its end, so many updates apart: single scores differ."""

CHUNKS = 20
"""A run's losses are kept as means over so many equal parts."""


def streaming(delay: int, steps: int, count: int = SYMBOLS) -> tasks.Task:
    """Name, at each step, the symbol of `delay` steps ago, one of `count`."""

    def draw(generator: torch.Generator, batch: int) -> tasks.Batch:
        symbols = torch.randint(count, (steps, batch), generator=generator)
        targets = torch.full((steps, batch), tasks.IGNORED)
        targets[delay:] = symbols[:-delay]
        return tasks.Batch(F.one_hot(symbols, count).float(), targets)

    def baselines() -> dict[str, tasks.Score]:
        return {"memoryless": tasks.Score(math.log(count), 1 / count)}

    valid, test = tasks.held_out(draw)
    name = f"streaming-{delay}"
    return tasks.Task(name, "cross_entropy", "nats", count, count, tasks.fresh(draw), valid, test, baselines)


def drawn(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tasks.Task:
    """Return a task of naming sequences, (N, T, I) with labels (N,), drawn with replacement."""

    def sequences(inputs: Tensor, labels: Tensor) -> tasks.Batch:
        return tasks.Batch(inputs.transpose(0, 1).contiguous(), labels)

    def batches(seed: int, batch: int) -> Iterator[tasks.Batch]:
        generator = torch.Generator().manual_seed(3 + seed)
        while True:
            chosen = torch.randint(len(train[0]), (batch,), generator=generator)
            yield sequences(train[0][chosen], train[1][chosen])

    def baselines() -> dict[str, tasks.Score]:
        return {"guessing": tasks.Score(math.log(10), 1 / 10)}

    held_out = sequences(*test)
    features = train[0].shape[2]
    return tasks.Task(name, "cross_entropy", "nats", features, 10, batches, held_out, held_out, baselines)


def digits_by_row() -> tasks.Task:
    """scikit-learn's digits, a row of 8 pixels a step."""
    from digits import load

    data = load(torch.device("cpu"), pixels=False)
    return drawn("digits-rows", data[:2], data[2:])


def mnist(path: Path, side: int = 14) -> tasks.Task:
    """MNIST averaged to `side` x `side`, a pixel a step; 2,000 test images.

    Args:
        path: a file of numpy arrays train_images (60000, 28, 28), train_labels, test_images and test_labels.
        side: divides 28.
    """
    data = np.load(path)

    def part(kind: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        images = (torch.tensor(data[f"{kind}_images"][:count]).float() / 255 - 0.1307) / 0.3081
        smaller = F.avg_pool2d(images.unsqueeze(1), 28 // side)
        return smaller.flatten(1).unsqueeze(-1), torch.tensor(data[f"{kind}_labels"][:count]).long()

    return drawn(f"mnist-{side}", part("train"), part("test", 2000))


class Case(NamedTuple):
    """A task and the start of its network."""

    make: Callable[[], tasks.Task]
    orthogonal: bool
    """W_hh is a random rotation, or torch's default."""
    chance: float
    """Loss of the best guess without memory."""


GUESSING = math.log(10)
CASES = {
    "copying 10, orthogonal": Case(lambda: streaming(10, 25), True, GUESSING),
    "copying 10": Case(lambda: streaming(10, 25), False, GUESSING),
    "digits by row": Case(digits_by_row, False, GUESSING),
    "Mackey-Glass": Case(lambda: tasks.mackey_glass(steps=50), False, 0.88),
    "adding": Case(lambda: tasks.adding(50), False, 1 / 6),
    "permuted digits": Case(lambda: tasks.digits_by_pixel(permuted=True), True, GUESSING),
    "copying 20": Case(lambda: streaming(20, 50), True, GUESSING),
    "adding, 10 steps": Case(lambda: tasks.adding(10), True, 1 / 6),
    "copying 10, 400 steps": Case(lambda: streaming(10, 400), True, GUESSING),
    "copying 10 of 8": Case(lambda: streaming(10, 30, 8), False, math.log(8)),
    "copying 5 of 8": Case(lambda: streaming(5, 30, 8), False, math.log(8)),
}
SEVEN = tuple(CASES)[:7]
MNIST = "MNIST 14 x 14"


@functools.cache
def case_of(name: str, mnist_path: Path | None) -> tuple[tasks.Task, bool]:
    """Return a task, and whether its start is orthogonal."""
    if name == MNIST:
        assert mnist_path is not None
        return mnist(mnist_path), True
    return CASES[name].make(), CASES[name].orthogonal


class Run(NamedTuple):
    """The complete configuration of a run."""

    kind: str
    """A name of `KINDS`."""
    task: str
    estimators: tuple[str, ...]
    """The first one trains."""
    seed: int
    updates: int
    hidden: int = 128
    batch: int = 8
    lr: float = 1e-3
    nonlinearity: str = "tanh"
    layers: int = 1
    bidirectional: bool = False
    threads: int = 1
    module: str = "RNN"
    """A class of this library, for the cell."""
    hold: float = 0.0
    """Added to the biases of the update gates of a GRU, the forget gates of an LSTM."""


def perturbation(spelled: str) -> anpgpu.Perturbation:
    """Return what "method name=value ..." says; the known part is made of autograd."""
    method, *values = (EXACT if spelled == KNOWN else spelled).split()
    pairs = (value.split("=") for value in values)
    return anpgpu.Perturbation(method, **{name: json.loads(value) for name, value in pairs})


def gated(run: Run) -> bool:
    """Say whether a run's network has gates."""
    return issubclass(getattr(anpgpu, run.module), nn.GRU | nn.LSTM)


def network(run: Run, task: tasks.Task, orthogonal: bool) -> tuple[dict[str, nn.RNNBase], nn.Linear]:
    """Return a network for each estimator, all of the same parameters, and a readout."""
    torch.manual_seed(run.seed)
    kind = getattr(anpgpu, run.module)
    structure = {"num_layers": run.layers, "bidirectional": run.bidirectional}
    if not gated(run):
        structure["nonlinearity"] = run.nonlinearity
    trained = kind(task.inputs, run.hidden, **structure)
    for name, value in trained.named_parameters():
        if orthogonal and "weight_hh" in name:
            nn.init.orthogonal_(value)
        if run.hold and "bias_ih" in name:
            with torch.no_grad():
                value[run.hidden : 2 * run.hidden] += run.hold
    readout = nn.Linear(run.hidden * (1 + run.bidirectional), task.outputs)
    networks, state = {}, torch.get_rng_state()
    for estimator in run.estimators:
        networks[estimator] = kind(task.inputs, run.hidden, perturbation=perturbation(estimator), **structure)
        for name, value in trained.named_parameters():
            setattr(networks[estimator], name, value)
    # The noise does not depend on how many estimators there are.
    torch.set_rng_state(state)
    return networks, readout


def clipped(rnn: nn.RNNBase) -> dict[str, Tensor]:
    """Clip the gradient of a recurrent network; return a copy of each W_hh's, and, of a gated one, of all together."""
    nn.utils.clip_grad_norm_(rnn.parameters(), CLIP)
    found = {name: value.grad.clone() for name, value in rnn.named_parameters() if "weight_hh" in name}
    if not isinstance(rnn, nn.RNN):
        found[EVERY] = torch.cat([value.grad.flatten() for value in rnn.parameters()])
    return found


def past_the_product(rnn: nn.RNNBase, inputs: Tensor) -> Tensor:
    """Run a GRU or LSTM of one layer whose recurrent product sees detached states; return its outputs, (T, B, H).

    What is left of its gradient is what is known without rollouts: z h' in a GRU, the path along c in an LSTM.
    """
    (w_ih, w_hh, b_ih, b_hh), *others = rnn.all_weights
    if others:
        raise ValueError(f"the known part is that of one layer and direction, got {1 + len(others)}")
    hidden = memory = inputs.new_zeros((inputs.shape[1], rnn.hidden_size))
    outputs = []
    for driven in F.linear(inputs, w_ih, b_ih):
        recurrent = F.linear(hidden.detach(), w_hh, b_hh)
        if isinstance(rnn, nn.GRU):
            (r, z, n), (of_r, of_z, q) = driven.chunk(3, -1), recurrent.chunk(3, -1)
            update, value = torch.sigmoid(z + of_z), torch.tanh(n + torch.sigmoid(r + of_r) * q)
            hidden = value + update * (hidden - value)
        else:
            enter, keep, value, leave = (driven + recurrent).chunk(4, -1)
            memory = torch.sigmoid(keep) * memory + torch.sigmoid(enter) * torch.tanh(value)
            hidden = torch.sigmoid(leave) * torch.tanh(memory)
        outputs.append(hidden)
    return torch.stack(outputs)


class Update(NamedTuple):
    """A training update between its gradient and its step."""

    number: int
    loss: float
    batch: tasks.Batch
    gradients: dict[str, Tensor]
    """Clipped, of each W_hh, by the estimator that trains."""


class Training:
    """A run's task and networks; iterate to train by the first estimator."""

    def __init__(self, run: Run, mnist_path: Path | None) -> None:
        self.run = run
        self.task, orthogonal = case_of(run.task, mnist_path)
        self.networks, self.readout = network(run, self.task, orthogonal)

    def __iter__(self) -> Iterator[Update]:
        """Yield between an update's gradient and its step; the caller may use the gradients' places meanwhile."""
        run, trained = self.run, self.networks[self.run.estimators[0]]
        parameters = [*trained.parameters(), *self.readout.parameters()]
        optimiser = torch.optim.Adam(parameters, run.lr)
        batches = itertools.islice(self.task.batches(run.seed, run.batch), run.updates)
        for number, batch in enumerate(tqdm(batches, total=run.updates, desc=run.task, leave=False, mininterval=5)):
            loss, recurrent = self.by(run.estimators[0], batch)
            gradients = [value.grad.clone() for value in parameters if value.grad is not None]
            yield Update(number, loss, batch, recurrent)
            for value, gradient in zip(parameters, gradients, strict=True):
                value.grad = gradient
            optimiser.step()

    def by(self, estimator: str, batch: tasks.Batch) -> tuple[float, dict[str, Tensor]]:
        """Set all gradients by an estimator; return the loss and the clipped gradient of each W_hh."""
        rnn = self.networks[estimator]
        for module in (rnn, self.readout):
            module.zero_grad()
        if estimator == KNOWN and not isinstance(rnn, nn.RNN):
            loss = training.loss_of(self.task, self.readout(past_the_product(rnn, batch.inputs)), batch.targets)
            loss.backward()
            value = float(loss.detach())
        elif estimator == KNOWN:
            value, _ = training.one_step_truncated(self.task, rnn, self.readout, batch, None)
        else:
            loss = training.loss_of(self.task, self.readout(rnn(batch.inputs)[0]), batch.targets)
            loss.backward()
            value = float(loss.detach())
        return value, clipped(rnn)

    def score(self) -> list[float | None]:
        """Return loss and accuracy on held-out sequences."""
        scored = training.evaluate(self.task, self.networks[self.run.estimators[0]], self.readout, self.task.test)
        return [None if value is None else round(value, 5) for value in scored]


def shadow(run: Run, mnist_path: Path | None) -> dict[str, object]:
    """Return, for each estimator and W_hh: cosines with BPTT, and the error of the sum of clipped gradients."""
    windows = [*WINDOWS, (max(0, run.updates - 10), run.updates)]
    windows = list(dict.fromkeys(window for window in windows if window[1] <= run.updates))
    others = [name for name in run.estimators if name != EXACT]
    cosines: dict[str, dict[str, dict[int, float]]] = {name: {} for name in others}
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in run.estimators}
    walks: dict[str, dict[str, float]] = {name: {} for name in others}
    every = run.kind == "path"
    process = Training(run, mnist_path)
    for number, _loss, batch, gradients in process:
        inside = any(low <= number < high for low, high in windows)
        # Only learned feedback needs the updates between: it keeps something from one to the next.
        needed = [name for name in run.estimators[1:] if every or inside or "feedback" in name or name == EXACT]
        found = {run.estimators[0]: gradients} | {name: process.by(name, batch)[1] for name in needed}
        for name, by_weight in found.items():
            for key, gradient in by_weight.items():
                sums[name][key] = sums[name].get(key, 0) + gradient.double()
                if name == EXACT:
                    continue
                exact = found[EXACT][key]
                walks[name][key] = walks[name].get(key, 0.0) + float((gradient - exact).double().square().sum())
                if inside:
                    cosines[name].setdefault(key, {})[number] = cosine([gradient], [exact])
    result: dict[str, object] = {
        "cosine": {
            name: {
                key: {
                    f"{low}-{high}": round(sum(by_number[n] for n in range(low, high)) / (high - low), 4)
                    for low, high in windows
                }
                for key, by_number in by_weight.items()
            }
            for name, by_weight in cosines.items()
        },
    }
    if every:
        result["sum"] = {
            name: {
                key: {
                    "error": float((total - sums[EXACT][key]).norm() / sums[EXACT][key].norm()),
                    "random walk": math.sqrt(walks[name][key]) / float(sums[EXACT][key].norm()),
                }
                for key, total in sums[name].items()
            }
            for name in others
        }
    return result


def train(run: Run, mnist_path: Path | None) -> dict[str, object]:
    """Return the losses of training by one estimator, means over equal parts, and its score on held-out sequences."""
    process, losses, looks = Training(run, mnist_path), [], []
    for update in process:
        losses.append(update.loss)
        if not math.isfinite(update.loss):
            break
        left = run.updates - update.number
        if left <= LOOKS * BETWEEN and left % BETWEEN == 0:
            looks.append(process.score())
    size = max(1, run.updates // CHUNKS)
    parts = [losses[first : first + size] for first in range(0, len(losses), size)]
    return {"losses": [round(sum(part) / len(part), 5) for part in parts], "test": process.score(), "looks": looks}


def timed(run: Run, mnist_path: Path | None) -> dict[str, object]:
    """Return the milliseconds of updates, in turns: by wall clock, or of one thread's processor.

    A turn of an estimator is a forward and a backward pass; `run.updates` turns after one that is not counted.
    """
    del mnist_path
    torch.manual_seed(run.seed)
    inputs = torch.randn(TIMED_STEPS, run.batch, SYMBOLS)
    targets = torch.randint(SYMBOLS, (TIMED_STEPS, run.batch))
    readout = nn.Linear(run.hidden, SYMBOLS)
    networks = {name: anpgpu.RNN(SYMBOLS, run.hidden, perturbation=perturbation(name)) for name in run.estimators}
    clock = "cpu" if run.threads == 1 else "wall"

    def update(rnn: nn.RNN) -> None:
        F.cross_entropy(readout(rnn(inputs)[0]).flatten(0, 1), targets.flatten()).backward()

    works = {name: functools.partial(update, rnn) for name, rnn in networks.items()}
    times = interleaved(works, run.updates, torch.device("cpu"), clock=clock)
    return {"clock": clock, "ms": {name: [round(1e3 * value, 3) for value in mine] for name, mine in times.items()}}


KINDS: dict[str, Callable[[Run, Path | None], dict[str, object]]] = {
    "cosine": shadow,
    "path": shadow,
    "train": train,
    "time": timed,
}


def made(run: Run, mnist_path: Path | None) -> dict[str, object]:
    """Make a run; return its configuration, its result and its processor time."""
    torch.set_num_threads(run.threads)
    started = time.process_time()
    result = KINDS[run.kind](run, mnist_path)
    return {"settings": run._asdict(), **result, "seconds": round(time.process_time() - started, 1)}
