"""The tasks of the examples and of `profiling/study.py`: data, losses, and scores of predictions without a network.

    copying       S symbols, a delay, a cue, then the same symbols again     Arjovsky, Shah, Bengio 2016
    adding        the sum of the two marked values of a sequence             Hochreiter & Schmidhuber 1997
    mackey_glass  x(t + 15) from x(t), tau = 17                              Mackey & Glass 1977, through reservoirpy
    weather       the wet-bulb temperature 1 or 24 hours ahead               hourly station data of NOAA
    digits        a handwritten digit, pixel by pixel                        scikit-learn's; permuted: Le et al. 2015

Copying and adding draw fresh sequences for every update. A time series is cut into training, validation and test part,
in this order. Its training part is cut into as many lanes as a batch has samples; the state is carried from one window
of a lane to the next. Scaling and baselines are fitted on the training part alone.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

IGNORED = -100
"""A step with this class has no loss, as in `torch.nn.CrossEntropyLoss`."""

HELD_OUT = 1000
"""Sequences in the validation and test sets of the tasks that draw their own."""

LANES = 8
"""A held-out part of a time series is cut into so many lanes, which run as one batch."""


class Batch(NamedTuple):
    """Sequences of one update, or of a held-out set."""

    inputs: Tensor
    """(T, B, I)."""
    targets: Tensor
    """Per step (T, B, O) or classes (T, B); per sequence classes (B,) or (B, O)."""
    continued: bool = False
    """Whether the state of the last batch is carried on."""


class Score(NamedTuple):
    """The loss and accuracy of predictions of a held-out set."""

    loss: float
    accuracy: float | None
    """Share of right classes; None for a regression."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: the name in tables.
        loss: "mse" or "cross_entropy", as `estimate_grad_` takes it.
        unit: what the loss is measured in.
        inputs: I.
        outputs: O.
        batches: endless training batches, from a seed and the number of samples.
        valid: held out to choose learning rates.
        test: held out for results.
        washout: first steps of a held-out sequence that do not count, while the state settles.
        baselines: computes scores on `test` by name; "memoryless" is the best a network without memory could reach.
    """

    name: str
    loss: str
    unit: str
    inputs: int
    outputs: int
    batches: Callable[[int, int], Iterator[Batch]]
    valid: Batch
    test: Batch
    baselines: Callable[[], dict[str, Score]]
    washout: int = 0


def per_sequence(task: Task, targets: Tensor) -> bool:
    """Return whether only the last step has a loss: the targets then have no time axis."""
    return targets.dim() == (2 if task.loss == "mse" else 1)


@torch.no_grad()
def score(task: Task, outputs: Tensor, targets: Tensor) -> Score:
    """Return the task's loss and the accuracy of outputs (T, B, O) on a held-out set."""
    if per_sequence(task, targets):
        outputs = outputs[-1]
    else:
        outputs, targets = outputs[task.washout :], targets[task.washout :]
    if task.loss == "mse":
        return Score(float(F.mse_loss(outputs, targets)), None)
    outputs, targets = outputs.reshape(-1, task.outputs), targets.flatten()
    counted = targets != IGNORED
    right = (outputs.argmax(1) == targets)[counted]
    return Score(float(F.cross_entropy(outputs[counted], targets[counted])), float(right.float().mean()))


def fresh(draw: Callable[[torch.Generator, int], Batch]) -> Callable[[int, int], Iterator[Batch]]:
    """Return endless batches of freshly drawn sequences."""

    def batches(seed: int, batch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(generator, batch)

    return batches


def held_out(draw: Callable[[torch.Generator, int], Batch]) -> tuple[Batch, Batch]:
    """Return validation and test sequences, from seeds that training does not use."""
    valid, test = (draw(torch.Generator().manual_seed(seed), HELD_OUT) for seed in (2**40, 2**40 + 1))
    return valid, test


def copying(delay: int, *, symbols: int = 8, length: int = 4) -> Task:
    """Copying memory: recall `length` symbols after `delay` steps, the last of which shows a cue.

    Without memory nothing is known of the symbols, so that the best loss is log(symbols).
    """

    def draw(generator: torch.Generator, batch: int) -> Batch:
        sequence = torch.randint(symbols, (length, batch), generator=generator)
        shown = torch.full((length + delay + length, batch), symbols)
        shown[:length] = sequence
        shown[length + delay - 1] = symbols + 1
        targets = torch.full_like(shown, IGNORED)
        targets[-length:] = sequence
        return Batch(F.one_hot(shown, symbols + 2).float(), targets)

    def baselines() -> dict[str, Score]:
        return {"memoryless": Score(float(np.log(symbols)), 1 / symbols)}

    valid, test = held_out(draw)
    return Task(f"copying-{delay}", "cross_entropy", "nats", symbols + 2, symbols, fresh(draw), valid, test, baselines)


def adding(steps: int = 10) -> Task:
    """Adding: two of the uniform values are marked, one in each half; their sum is due after the last step.

    The last step is never marked. Without memory the best guess is thus 1, with loss 1/6, the variance of the sum.
    """

    def draw(generator: torch.Generator, batch: int) -> Batch:
        values = torch.rand((steps, batch), generator=generator)
        half, everyone = steps // 2, torch.arange(batch)
        first = torch.randint(half, (batch,), generator=generator)
        second = torch.randint(half, steps - 1, (batch,), generator=generator)
        marks = torch.zeros((steps, batch))
        marks[first, everyone] = marks[second, everyone] = 1
        targets = values[first, everyone] + values[second, everyone]
        return Batch(torch.stack((values, marks), -1), targets.unsqueeze(-1))

    valid, test = held_out(draw)

    def baselines() -> dict[str, Score]:
        train = draw(torch.Generator().manual_seed(0), 20_000)
        seen, test_seen = (batch.inputs.transpose(0, 1).flatten(1) for batch in (train, test))
        predictions = {
            "memoryless": torch.ones_like(test.targets),
            "linear": regression(seen, train.targets, test_seen),
        }
        return {name: Score(float(F.mse_loss(values, test.targets)), None) for name, values in predictions.items()}

    return Task("adding", "mse", "squared error", 2, 1, fresh(draw), valid, test, baselines)


def digits_by_pixel(*, permuted: bool = False) -> Task:
    """Handwritten digits, one pixel a step, the loss after the last; `permuted`: in one fixed random order."""
    from digits import load

    data = load(torch.device("cpu"), pixels=True, permuted=permuted)
    order = torch.randperm(len(data.train_inputs), generator=torch.Generator().manual_seed(0))
    valid, train = order.split((len(order) // 5, len(order) - len(order) // 5))

    def time_first(inputs: Tensor, labels: Tensor) -> Batch:
        return Batch(inputs.transpose(0, 1).contiguous(), labels)

    def batches(seed: int, batch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in train[torch.randperm(len(train), generator=generator)].split(batch):
                yield time_first(data.train_inputs[chosen], data.train_labels[chosen])

    def baselines() -> dict[str, Score]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss

        scores = {}
        for name, pixels in (("memoryless", slice(-1, None)), ("linear", slice(None))):
            model = LogisticRegression(max_iter=500)
            model.fit(data.train_inputs[train, pixels, 0].numpy(), data.train_labels[train].numpy())
            features, labels = data.test_inputs[:, pixels, 0].numpy(), data.test_labels.numpy()
            loss = log_loss(labels, model.predict_proba(features))
            scores[name] = Score(float(loss), float(model.score(features, labels)))
        return scores

    return Task(
        "digits-permuted" if permuted else "digits",
        "cross_entropy",
        "nats",
        1,
        10,
        batches,
        time_first(data.train_inputs[valid], data.train_labels[valid]),
        time_first(data.test_inputs, data.test_labels),
        baselines,
    )


def mackey_glass(ahead: int = 15, *, steps: int = 40, length: int = 10_000) -> Task:
    """Mackey-Glass: the value of the series `ahead` steps in the future, from the present value and the state."""
    from reservoirpy.datasets import mackey_glass as generate

    # The first 500 steps still depend on the random initial history.
    series = generate(length + 500, tau=17, seed=0)[500:]
    return forecast(f"mackey-glass-{ahead}", series, 0, ahead, steps=steps)


WEATHER = (
    "WetBulbCelsius",
    "DryBulbCelsius",
    "DewPointCelsius",
    "RelativeHumidity",
    "StationPressure",
    "WindSpeed",
    "Visibility",
)
"""Columns of the station data that are used; the first is predicted."""


def weather(path: Path, ahead: int = 1, *, steps: int = 48) -> Task:
    """Station data: the wet-bulb temperature `ahead` hours in the future, from all measurements of this hour.

    Raises:
        ValueError: a column is missing, or a value is not a number.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in WEATHER if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path.name} has no column {', '.join(missing)}; it has {reader.fieldnames}")
        series = np.array([[float(row[name]) for name in WEATHER] for row in reader])
    return forecast(f"weather-{ahead}h", series, 0, ahead, steps=steps)


def forecast(name: str, series: np.ndarray, predicted: int, ahead: int, *, steps: int, washout: int = 48) -> Task:
    """Prediction of one column of a series, (N, I), `ahead` steps in the future.

    The first 70 % of the series are for training, then 10 % for validation and 20 % for testing. No target reaches into
    the next part. Columns are scaled to mean 0 and variance 1 over the training part, so that losses are in units of
    the predicted column's variance there.
    """
    bounds = (0, 7 * len(series) // 10, 8 * len(series) // 10, len(series))
    training = series[: bounds[1]]
    scaled = torch.from_numpy(((series - training.mean(0)) / training.std(0)).astype(np.float32))
    parts = [scaled[start:stop] for start, stop in itertools.pairwise(bounds)]
    if min((len(stretch) - ahead) // LANES for stretch in parts) <= washout:
        raise ValueError(
            f"{len(series)} steps are too few to predict {ahead} ahead: {LANES} lanes of a tenth must exceed {washout}"
        )

    def lanes(stretch: Tensor, count: int) -> Batch:
        length = (len(stretch) - ahead) // count
        inputs, targets = (
            values[: length * count].unflatten(0, (count, length)).transpose(0, 1).contiguous()
            for values in (stretch, stretch[ahead:, predicted : predicted + 1])
        )
        return Batch(inputs, targets)

    def batches(seed: int, batch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        whole = lanes(parts[0], batch)
        if len(whole.inputs) < 2 * steps:
            raise ValueError(f"a training part of {len(parts[0])} steps is too short for {batch} lanes of {2 * steps}")
        while True:
            # The offset is random, so that windows do not always end at the same steps.
            first = int(torch.randint(steps, (), generator=generator))
            for start in range(first, len(whole.inputs) - steps + 1, steps):
                window = slice(start, start + steps)
                yield Batch(whole.inputs[window], whole.targets[window], continued=start > first)

    valid, test = (lanes(stretch, LANES) for stretch in parts[1:])

    def baselines() -> dict[str, Score]:
        from sklearn.ensemble import HistGradientBoostingRegressor

        train, after = lanes(parts[0], LANES), slice(washout, None)
        target = test.targets[after]
        present = [batch.inputs[after].flatten(0, 1) for batch in (train, test)]
        boosted = HistGradientBoostingRegressor(random_state=0).fit(
            present[0].numpy(), train.targets[after].flatten().numpy()
        )
        predictions = {
            "memoryless": torch.from_numpy(boosted.predict(present[1].numpy())).view_as(target),
            "persistence": test.inputs[after, :, predicted : predicted + 1],
            "linear": regression(
                lagged(train.inputs, washout), train.targets[after].flatten(0, 1), lagged(test.inputs, washout)
            ).view_as(target),
        }
        return {name: Score(float((values - target).square().mean()), None) for name, values in predictions.items()}

    sizes = (scaled.shape[1], 1)
    return Task(name, "mse", "training variance", *sizes, batches, valid, test, baselines, washout)


def lagged(inputs: Tensor, lags: int) -> Tensor:
    """Return the inputs of a linear prediction: the present and the last `lags` inputs of every step from `lags` on.

    (T, B, I) becomes ((T - lags) * B, (lags + 1) * I).
    """
    return inputs.unfold(0, lags + 1, 1).flatten(2).flatten(0, 1)


def regression(inputs: Tensor, targets: Tensor, test_inputs: Tensor) -> Tensor:
    """Fit least squares with a constant on `inputs` and `targets`; return its predictions for `test_inputs`."""
    fitted, predicted = (
        torch.cat((values.double(), torch.ones(len(values), 1).double()), 1) for values in (inputs, test_inputs)
    )
    coefficients = torch.linalg.lstsq(fitted, targets.double(), driver="gelsd").solution
    return (predicted @ coefficients).to(targets.dtype)


def by_name(csv_path: Path | None) -> dict[str, Callable[[], Task]]:
    """Return the makers of the study's tasks; those of the weather only where there is a file."""
    tasks: dict[str, Callable[[], Task]] = {
        "mackey-glass-15": mackey_glass,
        "copying-5": lambda: copying(5),
        "copying-10": lambda: copying(10),
        "copying-20": lambda: copying(20),
        "digits": digits_by_pixel,
        "digits-permuted": lambda: digits_by_pixel(permuted=True),
        "adding": adding,
    }
    if csv_path is not None:
        tasks["weather-1h"] = lambda: weather(csv_path, 1)
        tasks["weather-24h"] = lambda: weather(csv_path, 24)
    return tasks
