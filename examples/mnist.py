"""MNIST read row by row (28 steps): a recurrent network trained by perturbed rollouts, and by BPTT beside it.

Both start from the same weights and see the same batches in the same order, with the same optimiser. `--side 7` or
`--side 14` averages the images and reads them pixel by pixel: 49 or 196 steps.

    python examples/mnist.py --mnist MNIST.npz --output output/            by anp-feedback, with 8 rollouts of 128 units
    python examples/mnist.py --mnist MNIST.npz --side 7 --epochs 2 --seeds 3

MNIST.npz holds numpy arrays train_images, train_labels, test_images and test_labels. This makes it of torchvision's
files:

    train, test = (torchvision.datasets.MNIST("data", train, download=True) for train in (True, False))
    numpy.savez("MNIST.npz", train_images=train.data, train_labels=train.targets, test_images=test.data,
                test_labels=test.targets)
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

METHODS = ("anp-feedback", "anp-ls", "anp", "np", "wp", "bptt")

LONG = 100
"""Steps from which Adam's learning rate is 2e-4: at 1e-3 BPTT itself falls back to chance on 14 x 14 pixels."""

CHUNK = 1000
"""Test images of one forward pass."""

CURVE = 40
"""Points of a plotted curve: each is a mean over as many updates."""


class Digits(NamedTuple):
    """Sequences (samples, T, I) and labels (samples,)."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class Classifier(nn.Module):
    """An RNN that names the digit after the last step."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        _, h_n = self.rnn(inputs)
        return self.head(h_n[-1])


class Result(NamedTuple):
    """One training run."""

    method: str
    losses: list[float]
    """Training loss of every update, in nats."""
    accuracy: list[float]
    """Test accuracy after each epoch."""
    seconds: float
    """Wall time of the updates."""


def load(path: Path, side: int | None) -> Digits:
    """Read the arrays of a file; with `side`, average the images to side x side and make each pixel a step.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz, an array is missing, or `side` does not divide the images.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}: --mnist wants an .npz of numpy arrays {', '.join(ARRAYS)}, made of what "
            f"torchvision.datasets.MNIST downloads as the first lines of {Path(__file__).name} show"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is no .npz: the first lines of {Path(__file__).name} show how to make one")
    with np.load(path) as file:
        if missing := [name for name in ARRAYS if name not in file.files]:
            raise ValueError(f"{str(path)!r} has no array {', '.join(missing)}; it has {', '.join(file.files)}")
        arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
    parts = {}
    whole = arrays["train_images"].shape[-1]
    if side is not None and (side < 1 or whole % side):
        raise ValueError(f"--side must divide the {whole} x {whole} pixels of an image, got {side}")
    deviation, mean = torch.std_mean(arrays["train_images"].float())
    for kind in ("train", "test"):
        images = (arrays[f"{kind}_images"].float() - mean) / deviation
        if side is not None:
            images = F.avg_pool2d(images.unsqueeze(1), whole // side).flatten(1).unsqueeze(2)
        parts[kind] = images
    return Digits(parts["train"], arrays["train_labels"].long(), parts["test"], arrays["test_labels"].long())


def train(data: Digits, method: str, seed: int, options: argparse.Namespace) -> Result:
    """Train one network."""
    torch.manual_seed(seed)
    model = Classifier(data.train_inputs.shape[2], options.hidden).to(options.device)
    if options.side is not None:
        # Over so many steps memory fades from torch's default start.
        nn.init.orthogonal_(model.rnn.weight_hh_l0)
    if method != "bptt":
        # This line alone replaces backpropagation through time.
        anpgpu.swap_(model, anpgpu.Perturbation(method=method, rollouts=options.rollouts))
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    order, losses, accuracy, seconds = torch.Generator().manual_seed(seed), [], [], 0.0
    batches = -(-len(data.train_inputs) // options.batch)
    bar = tqdm(total=options.epochs * batches, desc=f"{method} seed {seed}", unit="update", disable=options.quiet)
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(data.train_inputs), generator=order).split(options.batch):
            started = time.perf_counter()
            inputs, labels = data.train_inputs[chosen], data.train_labels[chosen]
            loss = F.cross_entropy(model(inputs.to(options.device)), labels.to(options.device))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.rnn.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            seconds += time.perf_counter() - started
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
        accuracy.append(tested(model, data, options.device))
        tqdm.write(f"{method} seed {seed}, {len(accuracy)} epochs: {accuracy[-1]:.1%} of the test images right")
    bar.close()
    return Result(method, losses, accuracy, seconds)


@torch.no_grad()
def tested(model: Classifier, data: Digits, device: str) -> float:
    """Return the share of test images that are named right."""
    named = torch.cat([model(part.to(device)).argmax(1).cpu() for part in data.test_inputs.split(CHUNK)])
    return float((named == data.test_labels).float().mean())


def plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, method in enumerate(dict.fromkeys(result.method for result in results)):
        for number, result in enumerate(mine := [result for result in results if result.method == method]):
            parts = np.array_split(result.losses, min(CURVE, len(result.losses)))
            ends = np.cumsum([len(part) for part in parts])
            label = f"{method}, {len(mine)} seeds" if number == 0 else None
            left.plot(ends, [part.mean() for part in parts], color=f"C{colour}", linewidth=1, label=label)
            right.plot(range(1, len(result.accuracy) + 1), result.accuracy, "o-", color=f"C{colour}", markersize=3)
    left.set(xlabel="updates", ylabel="training loss (nats)", yscale="log")
    right.set(xlabel="epochs", ylabel="test accuracy")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help=f".npz of numpy arrays {', '.join(ARRAYS)}")
    parser.add_argument(
        "--side", type=int, help="7 or 14: average to so many pixels a side, one a step (default: rows)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["anp-feedback", "bptt"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=8, help="perturbed rollouts of each image")
    parser.add_argument(
        "--lr", type=float, help=f"Adam's learning rate for every method (default: 1e-3, from {LONG} steps on 2e-4)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    try:
        data = load(options.mnist, options.side)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    steps, features = data.train_inputs.shape[1:]
    if options.lr is None:
        options.lr = 2e-4 if steps >= LONG else 1e-3
    images = len(data.train_inputs)
    title = f"{steps} steps of {features}, H = {options.hidden}, {images} images, Adam {options.lr:g}, {options.device}"
    tqdm.write(title)
    results = [train(data, method, seed, options) for seed in range(options.seeds) for method in options.methods]
    tqdm.write(f"\n{'method':14s}{'test accuracy':>14s}{'seconds':>10s}")
    for method in options.methods:
        mine = [result for result in results if result.method == method]
        right, seconds = (
            np.mean(values) for values in zip(*((run.accuracy[-1], run.seconds) for run in mine), strict=True)
        )
        tqdm.write(f"{method:14s}{right:14.1%}{seconds:10.1f}")
    options.output.mkdir(parents=True, exist_ok=True)
    name = "mnist" if options.side is None else f"mnist_{options.side}x{options.side}"
    plot(results, options.output / f"{name}.png", title)
    tqdm.write(f"learning curves: {options.output / f'{name}.png'}")


if __name__ == "__main__":
    main()
