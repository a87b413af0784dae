"""The benchmarks of `study_rivals.py`: those that the field reads, made from files or equations.

    mnist-rows, -7x7, -14x14, -28x28   a digit, row by row or pixel by pixel           LeCun et al. 1998; Le et al. 2015
    copying-10, -20, -40, -100         symbols again after a delay                     Arjovsky, Shah, Bengio 2016
    adding-50, -100                    the sum of two marked values                    Hochreiter & Schmidhuber 1997
    mackey-glass, lorenz               the next value of a series, one pass, online    the sketched-RTRL release
    characters                         the next character of a text                    Karpathy, Johnson, Fei-Fei 2015

Images are averaged to 7 x 7 or 14 x 14; `-permuted` puts the pixels in one fixed random order. Copying has four symbols
of eight, where Arjovsky et al. have ten. The series have the form of https://github.com/sonaradarcn/sketched-rtrl: its
equations and first states, lanes of mean 0 and variance 1 over all steps, 64 steps left out, the state set back to zero
every 200 steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from study_grid import tasks
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

__all__ = [
    "RESET",
    "Benchmark",
    "archive",
    "arrays_of",
    "benchmark",
    "by_name",
    "characters",
    "images",
    "lorenz",
    "mackey_glass",
]

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
ORIGINS = {
    "--mnist": f"an .npz of numpy arrays {', '.join(ARRAYS)}: 28 x 28 images and their digits, made by numpy.savez "
    "from the four files of MNIST (LeCun, Cortes, Burges), which torchvision.datasets.MNIST downloads",
    "--text": "a text in UTF-8 of at least 100,000 characters, such as a book of gutenberg.org",
}
"""What a file of an option holds, and where it comes from."""

VALIDATION = 2000
"""Training images that choose the learning rate instead, at most a tenth."""

MOST_HELD_OUT = 20_000
"""Characters of each held-out part that are read."""

MOST_STEPS_SEEN = 2_000_000
"""Steps of the test images that are read: all 10,000 images, but of 784 steps the first 2,551. Validation reads a fifth
of them at most."""

RESET, SKIPPED, LENGTH, HELD_OUT_STEPS = 200, 64, 20_000, 2000
"""Steps between two resets of the state; steps left out; steps of a series; steps of its held-out lanes."""


@dataclasses.dataclass(frozen=True)
class Benchmark(tasks.Task):
    """A task with what it takes to say that it is solved.

    Attributes:
        chance: loss of the best guess that looks at nothing.
        solved: a loss at or below it counts as solved: half of chance, unless the task says otherwise.
        reward: a black-box loss that training gets in place of `loss`, which still scores.
        correct: share of right decisions, from outputs (T, B, O) and targets, where accuracy over all steps is not it.
    """

    chance: float = math.nan
    solved: float = math.nan
    reward: Callable[[Tensor, Tensor], Tensor] | None = None
    correct: Callable[[Tensor, Tensor], float] | None = None

    def score(self, outputs: Tensor, targets: Tensor) -> tasks.Score:
        """Return loss and accuracy on held-out sequences."""
        scored = tasks.score(self, outputs, targets)
        return scored if self.correct is None else scored._replace(accuracy=self.correct(outputs, targets))


def benchmark(task: tasks.Task, chance: float, *, solved: float | None = None, **changes: object) -> Benchmark:
    """Return a task with its loss by chance, and other changes."""
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(tasks.Task)}
    return Benchmark(**{**fields, "chance": chance, "solved": chance / 2 if solved is None else solved, **changes})


def existing(path: Path | None, option: str) -> Path:
    """Return a path of data.

    Raises:
        FileNotFoundError: there is none; says what to pass and where such a file comes from.
    """
    if path is None or not path.is_file():
        given = "nothing was passed" if path is None else f"there is no file {str(path)!r}"
        raise FileNotFoundError(f"{given}: pass {option} PATH, {ORIGINS[option]}")
    return path


def archive(path: Path | None) -> NpzFile:
    """Open the file of MNIST; its arrays are read when they are asked for."""
    try:
        file = np.load(existing(path, "--mnist"))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is no .npz of numpy: pass --mnist PATH, {ORIGINS['--mnist']}") from error
    if not isinstance(file, NpzFile):
        raise ValueError(f"{str(path)!r} holds one array: pass --mnist PATH, {ORIGINS['--mnist']}")
    if missing := [name for name in ARRAYS if name not in file.files]:
        raise ValueError(f"{str(path)!r} has no array {', '.join(missing)}; it has {', '.join(file.files)}")
    return file


def arrays_of(path: Path | None) -> dict[str, np.ndarray]:
    """Read MNIST's images and labels."""
    with archive(path) as file:
        return {name: file[name] for name in ARRAYS}


def images(name: str, arrays: Mapping[str, np.ndarray], *, side: int, rows: bool = False) -> Benchmark:
    """Name a digit after its last pixel or row; each epoch is in a new order.

    Args:
        name: ends in "-permuted" where pixels are put in one fixed random order.
        arrays: as `ARRAYS`; images are square.
        side: they are averaged to side x side; it divides their side.
        rows: a row a step in place of a pixel.
    """
    whole = arrays["train_images"].shape[-1]
    if whole % side:
        raise ValueError(f"{whole} x {whole} images cannot be averaged to {side} x {side}: {side} must divide {whole}")
    mean, deviation = float(arrays["train_images"].mean()), float(arrays["train_images"].std())
    order = torch.arange(side * side)
    if name.endswith("-permuted"):
        order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))

    def part(kind: str) -> tuple[Tensor, Tensor]:
        scaled = (torch.from_numpy(arrays[f"{kind}_images"]).float() - mean) / deviation
        pixels = F.avg_pool2d(scaled.unsqueeze(1), whole // side).flatten(1)[:, order]
        steps = pixels.unflatten(1, (side, side) if rows else (side * side, 1))
        return steps, torch.from_numpy(arrays[f"{kind}_labels"]).long()

    (inputs, labels), test = part("train"), part("test")
    test = tuple(values[: MOST_STEPS_SEEN // inputs.shape[1]] for values in test)
    held = min(VALIDATION, len(labels) // 10, MOST_STEPS_SEEN // inputs.shape[1] // 5)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    valid, train = shuffled[:held], shuffled[held:]

    def sequences(images_of: Tensor, labels_of: Tensor) -> tasks.Batch:
        return tasks.Batch(images_of.transpose(0, 1).contiguous(), labels_of)

    def batches(seed: int, batch: int) -> Iterator[tasks.Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in train[torch.randperm(len(train), generator=generator)].split(batch):
                yield sequences(inputs[chosen], labels[chosen])

    made = tasks.Task(
        *(name, "cross_entropy", "nats", inputs.shape[2], 10, batches),
        *(sequences(inputs[valid], labels[valid]), sequences(*test), _guessing(math.log(10), 1 / 10)),
    )
    return benchmark(made, math.log(10))


def _guessing(loss: float, accuracy: float | None = None) -> Callable[[], dict[str, tasks.Score]]:
    return lambda: {"guessing": tasks.Score(loss, accuracy)}


def mackey_glass(lanes: int, steps: int, seed: int) -> np.ndarray:
    """Return dx/dt = .2 y / (1 + y^10) - .1 x by Euler steps of 1, (lanes, steps).

    The release's delayed y is 16 steps before the present x (the 17th from the end of its list).
    """
    generator = np.random.default_rng(seed)
    past = list(1.2 + 0.2 * generator.random((18, lanes)))
    for _ in range(steps):
        delayed = past[-17]
        past.append(past[-1] + 0.2 * delayed / (1 + delayed**10) - 0.1 * past[-1])
    return np.stack(past[18:], 1)


def lorenz(lanes: int, steps: int, seed: int) -> np.ndarray:
    """Return x of the Lorenz system (10, 28, 8/3): every second Euler step of .01 after 100, (lanes, steps)."""
    x, y, z = 1 + 0.1 * np.random.default_rng(seed).standard_normal((3, lanes))
    seen = []
    for step in range(100 + 2 * steps):
        x, y, z = (
            x + 0.01 * (10.0 * (y - x)),
            y + 0.01 * (x * (28.0 - z) - y),
            z + 0.01 * (x * y - 8.0 / 3.0 * z),
        )
        if step >= 100 and step % 2 == 0:
            seen.append(x)
    return np.stack(seen, 1)


def series(name: str, generate: Callable[[int, int, int], np.ndarray], window: int) -> Benchmark:
    """Predict the next value of a series online, an update every `window` steps, the state carried on.

    Raises:
        ValueError: the window does not divide the steps between two resets.
    """
    if RESET % window:
        raise ValueError(f"a window of {window} steps does not divide the {RESET} steps between two resets")

    def scaled(lanes: int, steps: int, seed: int) -> Tensor:
        values = generate(lanes, SKIPPED + steps + 1, seed)
        mean, deviation = values.mean(1, keepdims=True), values.std(1, ddof=1, keepdims=True)
        return torch.from_numpy((values - mean) / deviation).float()[:, SKIPPED:].t().unsqueeze(-1).contiguous()

    def batches(seed: int, batch: int) -> Iterator[tasks.Batch]:
        values = scaled(batch, LENGTH, seed)
        while True:
            for start in range(0, LENGTH, window):
                inputs, targets = values[start : start + window], values[start + 1 : start + window + 1]
                yield tasks.Batch(inputs, targets, continued=start % RESET > 0)

    def held_out(seed: int) -> tasks.Batch:
        # Every stretch between two resets is a sequence of its own.
        values = scaled(tasks.LANES, HELD_OUT_STEPS, seed)
        inputs, targets = (
            part.unflatten(0, (-1, RESET)).transpose(0, 1).flatten(1, 2).contiguous()
            for part in (values[:-1], values[1:])
        )
        return tasks.Batch(inputs, targets)

    valid, test = held_out(2**40), held_out(2**40 + 1)

    persistence = float((test.inputs - test.targets).square().mean())

    def baselines() -> dict[str, tasks.Score]:
        return {"persistence": tasks.Score(persistence, None), "linear": tasks.Score(_linear(valid, test), None)}

    # The last value again: a guess that needs no memory and nothing learnt.
    return benchmark(tasks.Task(name, "mse", "NMSE", 1, 1, batches, valid, test, baselines), persistence)


def _linear(fitted: tasks.Batch, test: tasks.Batch, past: int = 4) -> float:
    """Return the squared error of the best linear prediction from the last `past` values."""

    def parts(batch: tasks.Batch) -> tuple[Tensor, Tensor]:
        values = batch.inputs[..., 0].double().unfold(0, past, 1).flatten(0, 1)
        ones = torch.ones_like(values[:, :1])
        return torch.cat((values, ones), 1), batch.targets[past - 1 :, :, 0].double().flatten()

    features, targets = parts(fitted)
    weights = torch.linalg.lstsq(features, targets).solution
    features, targets = parts(test)
    return float((features @ weights - targets).square().mean())


def characters(path: Path | None, *, steps: int = 64, lanes: int = 50) -> Benchmark:
    """Predict the next character of a text; its first 90 % train, then 5 % each, or 20,000 characters, are held out.

    The state is carried along each of a batch's lanes of the text. Solved means: better than what the last character
    alone tells (the training part's pairs, each counted once more than it was seen).
    """
    text = existing(path, "--text").read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    codes = {letter: code for code, letter in enumerate(alphabet)}
    symbols = torch.tensor([codes[letter] for letter in text])
    bounds = (0, 90 * len(text) // 100, 95 * len(text) // 100, len(text))
    train, *others = (symbols[low:high] for low, high in itertools.pairwise(bounds))
    others = [part[:MOST_HELD_OUT] for part in others]
    if len(others[0]) < lanes * 2:
        raise ValueError(f"{len(text)} characters are too few: a twentieth must fill {lanes} lanes")

    def cut(part: Tensor, count: int) -> tasks.Batch:
        length = (len(part) - 1) // count
        now, then = (shifted[: length * count].view(count, length).t() for shifted in (part[:-1], part[1:]))
        return tasks.Batch(now, then)

    def shown(now: Tensor, then: Tensor, continued: bool = False) -> tasks.Batch:
        return tasks.Batch(F.one_hot(now, len(alphabet)).float(), then.contiguous(), continued)

    def batches(seed: int, batch: int) -> Iterator[tasks.Batch]:
        generator = torch.Generator().manual_seed(seed)
        now, then, _ = cut(train, batch)
        if len(now) < 2 * steps:
            raise ValueError(f"{len(train)} characters to train on are too few for {batch} lanes of {2 * steps}")
        while True:
            first = int(torch.randint(steps, (), generator=generator))
            for start in range(first, len(now) - steps + 1, steps):
                yield shown(now[start : start + steps], then[start : start + steps], start > first)

    valid, test = (shown(*cut(part, lanes)[:2]) for part in others)
    counts = torch.bincount(train, minlength=len(alphabet)).double() + 1
    pairs = torch.bincount(train[:-1] * len(alphabet) + train[1:], minlength=len(alphabet) ** 2).double() + 1
    pairs = pairs.view(len(alphabet), -1)
    last = test.inputs.argmax(-1)
    alone = -float((counts / counts.sum()).log()[test.targets].mean())
    pair = -float((pairs / pairs.sum(1, keepdim=True)).log()[last, test.targets].mean())

    def baselines() -> dict[str, tasks.Score]:
        return {"guessing": tasks.Score(alone, None), "memoryless": tasks.Score(pair, None)}

    sizes = (len(alphabet), len(alphabet))
    made = tasks.Task("characters", "cross_entropy", "nats", *sizes, batches, valid, test, baselines)
    return benchmark(made, alone, solved=pair)


def by_name(mnist: Path | None, text: Path | None) -> dict[str, Callable[[int], Benchmark]]:
    """Return the makers of the benchmarks; they take the steps of an update, which only online tasks use."""
    arrays = functools.cache(lambda: arrays_of(mnist))
    makers: dict[str, Callable[[int], Benchmark]] = {}
    for suffix in ("", "-permuted"):
        for form, side, rows in (("rows", 28, True), ("7x7", 7, False), ("14x14", 14, False), ("28x28", 28, False)):
            name = f"mnist-{form}{suffix}"
            makers[name] = functools.partial(_images, name, arrays, side, rows)
    for delay in (10, 20, 40, 100):
        makers[f"copying-{delay}"] = functools.partial(_copying, delay)
    for steps in (50, 100):
        makers[f"adding-{steps}"] = functools.partial(_adding, steps)
    makers["mackey-glass"] = functools.partial(series, "mackey-glass", mackey_glass)
    makers["lorenz"] = functools.partial(series, "lorenz", lorenz)
    makers["characters"] = lambda _window: characters(text)
    return makers


def _images(name: str, arrays: Callable[[], dict[str, np.ndarray]], side: int, rows: bool, _window: int) -> Benchmark:
    return images(name, arrays(), side=side, rows=rows)


def _copying(delay: int, _window: int) -> Benchmark:
    return benchmark(tasks.copying(delay), math.log(8))


def _adding(steps: int, _window: int) -> Benchmark:
    return benchmark(tasks.adding(steps), 1 / 6, name=f"adding-{steps}")
