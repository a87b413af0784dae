"""Handwritten digits, read row by row: one recurrent network trained by perturbed rollouts and by BPTT.

Both start from the same weights and see the same batches in the same order, with the same optimiser. The 1,797 real
digits (8 x 8 pixels) come with scikit-learn. `--pixels` reads them pixel by pixel: 64 steps instead of 8.

    python examples/digits.py --output output/                     by anp-feedback, with 4 rollouts of 128 units
    python examples/digits.py --pixels --method anp-ls --rollouts 128 --epochs 15 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu

FEW = 4
"""Rollouts with a learned feedback matrix, which needs no more than a small share of the units."""


class Digits(NamedTuple):
    """Sequences (samples, T, I) and labels (samples,), for training and testing."""

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
    """The result of one training run."""

    method: str
    seed: int
    accuracy: list[float]
    """Test accuracy after each epoch."""
    loss: list[float]
    """Mean training loss of each epoch."""
    updates: int
    seconds: float
    """Wall time of the training updates alone."""
    peak_mib: float


def load(device: torch.device, *, pixels: bool, permuted: bool = False) -> Digits:
    digits = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)
    sequences = images.reshape(len(images), 64, 1) if pixels else images
    if permuted:
        sequences = sequences[:, np.random.default_rng(0).permutation(sequences.shape[1])]
    parts = train_test_split(sequences, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_inputs, test_inputs, train_labels, test_labels = (torch.from_numpy(array).to(device) for array in parts)
    return Digits(train_inputs, train_labels, test_inputs, test_labels)


def diagnose_case() -> tuple[nn.RNN, nn.Linear, Tensor, Tensor, str]:
    """Return an untrained network and a batch, for `python -m anpgpu diagnose examples/digits.py:diagnose_case`."""
    torch.manual_seed(0)
    data = load(torch.device("cpu"), pixels=False)
    model = Classifier(data.train_inputs.shape[2], 128)
    return model.rnn, model.head, data.train_inputs[:32], data.train_labels[:32], "cross_entropy"


def train(data: Digits, method: str, seed: int, options: argparse.Namespace) -> Result:
    device = data.train_inputs.device
    torch.manual_seed(seed)
    model = Classifier(data.train_inputs.shape[2], options.hidden).to(device)
    if method != "bptt":
        # This line alone replaces backpropagation through time.
        anpgpu.swap_(model, perturbation(method, options))
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    order = torch.Generator().manual_seed(seed)
    accuracy, losses, seconds, updates = [], [], 0.0, 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    progress = tqdm(range(options.epochs), desc=f"{method:12s} seed {seed}", unit="epoch", disable=options.quiet)
    for _ in progress:
        total = torch.zeros((), device=device)
        started = time.perf_counter()
        for batch in torch.randperm(len(data.train_inputs), generator=order).split(options.batch):
            loss = nn.functional.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach() * len(batch)
            updates += 1
        losses.append(float(total) / len(data.train_inputs))
        seconds += time.perf_counter() - started
        with torch.no_grad():
            right = model(data.test_inputs).argmax(1) == data.test_labels
        accuracy.append(float(right.float().mean()))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", test=f"{accuracy[-1]:.1%}")
    return Result(method, seed, accuracy, losses, updates, seconds, peak_mib(device))


def perturbation(method: str, options: argparse.Namespace) -> anpgpu.Perturbation:
    """Return the library's defaults, changed by the options of the command line."""
    rollouts = FEW if method == "anp-feedback" and options.rollouts is None else options.rollouts
    choices = {"rollouts": rollouts, "discount": options.discount, "sigma": options.sigma}
    return anpgpu.Perturbation(method=method, **{name: value for name, value in choices.items() if value is not None})


def peak_mib(device: torch.device) -> float:
    """Return the peak memory: on a GPU of the tensors, on the CPU of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def summary(results: list[Result]) -> str:
    """Return the final table: means over seeds, with the lowest and highest accuracy."""
    columns = f"{'method':13s}{'test accuracy':>16s}{'range':>18s}{'loss':>9s}"
    lines = [columns + f"{'updates':>9s}{'seconds':>9s}{'peak MiB':>10s}"]
    for method in dict.fromkeys(result.method for result in results):
        mine = [result for result in results if result.method == method]
        final = [result.accuracy[-1] for result in mine]
        lines.append(
            f"{method:13s}{np.mean(final):16.1%}{f'{min(final):.1%} - {max(final):.1%}':>18s}"
            f"{np.mean([result.loss[-1] for result in mine]):9.3f}{mine[0].updates:9d}"
            f"{np.mean([result.seconds for result in mine]):9.1f}{max(result.peak_mib for result in mine):10.0f}"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, method in enumerate(dict.fromkeys(result.method for result in results)):
        mine = [result for result in results if result.method == method]
        epochs = np.arange(1, len(mine[0].loss) + 1)
        for axis, values in ((left, [result.loss for result in mine]), (right, [result.accuracy for result in mine])):
            axis.plot(epochs, np.mean(values, axis=0), color=f"C{colour}", label=f"{method}, {len(mine)} seeds")
            axis.fill_between(epochs, np.min(values, axis=0), np.max(values, axis=0), color=f"C{colour}", alpha=0.2)
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy", ylim=(None, 1))
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", action="store_true", help="64 steps of one pixel instead of 8 steps of one row")
    parser.add_argument("--permuted", action="store_true", help="with --pixels: in one fixed random order")
    parser.add_argument(
        "--methods", nargs="+", default=["anp-feedback", "bptt"], help="anp-feedback, anp-ls, anp, np, wp, bptt"
    )
    parser.add_argument("--method", help="one method beside bptt: short for --methods METHOD bptt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate, the same for every method")
    parser.add_argument(
        "--rollouts", type=int, help="perturbed rollouts per sample (default: 4 with anp-feedback, else the library's)"
    )
    parser.add_argument("--discount", type=float, help="credit of later losses (default: the library's)")
    parser.add_argument("--sigma", type=float, help="standard deviation of the noise (default: the library's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot and the figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if options.method is not None:
        options.methods = [options.method, "bptt"]
    if options.permuted and not options.pixels:
        parser.error("--permuted goes with --pixels")
    device = torch.device(options.device)
    data = load(device, pixels=options.pixels, permuted=options.permuted)
    steps, features = data.train_inputs.shape[1:]
    title = f"{steps} steps of {features}, H = {options.hidden}, {len(data.train_inputs)} training digits, {device}"
    tqdm.write(title)
    results = [train(data, method, seed, options) for seed in range(options.seeds) for method in options.methods]
    options.output.mkdir(parents=True, exist_ok=True)
    name = "digits_permuted" if options.permuted else "digits_pixels" if options.pixels else "digits"
    plot(results, options.output / f"{name}.png", title)
    record = {"title": title, "results": [result._asdict() for result in results]}
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1))
    tqdm.write(summary(results))
    tqdm.write(f"learning curves: {options.output / f'{name}.png'}")


if __name__ == "__main__":
    main()
