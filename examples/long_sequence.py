"""A sequence of 100,000 steps within a fixed memory, for which backpropagation would need gigabytes.

    python examples/long_sequence.py --steps 100000 --max-memory 64 --output output/

The network must tell at every step how many of the last two inputs were positive. `estimate_grad_` cuts time into
segments, stores the rollouts' states at their starts, and runs each segment again. Only inputs, targets and outputs
grow with the length. Peak memory is that of the whole process, with Python and PyTorch.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def draw(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return signs, (T, 1, 1), and how many of the last two were positive, (T, 1)."""
    positive = torch.randint(2, (steps + 1,), generator=generator)
    inputs = 2.0 * positive[1:] - 1
    return inputs.view(-1, 1, 1), (positive[1:] + positive[:-1]).unsqueeze(1)


def plot(losses: list[float], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(range(1, len(losses) + 1), losses, marker=".")
    axis.set(xlabel="updates", ylabel="cross-entropy (nats)", title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--max-memory", type=float, default=64, help="what the rollouts may use, in MiB")
    parser.add_argument("--method", default="anp", choices=["anp", "np", "anp-ls", "bptt"])
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    torch.manual_seed(0)
    how = anpgpu.Perturbation(
        options.method, options.rollouts, discount=0.9, max_memory=int(options.max_memory * 2**20)
    )
    rnn, readout = nn.RNN(1, options.hidden), nn.Linear(options.hidden, 3)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=options.lr)
    generator, losses, started = torch.Generator().manual_seed(0), [], time.perf_counter()
    before = peak_mib()
    for _ in tqdm(range(options.updates), unit="update", disable=options.quiet):
        inputs, targets = draw(options.steps, generator)
        optimiser.zero_grad()
        estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, "cross_entropy", perturbation=how)
        optimiser.step()
        losses.append(float(estimate.loss))
    seconds = (time.perf_counter() - started) / options.updates
    title = f"{options.method}, T = {options.steps:,}, {options.rollouts} rollouts"
    tqdm.write(
        f"{title}: loss {losses[0]:.3f} to {losses[-1]:.3f} nats, {seconds:.1f} s an update; "
        f"peak {before:.0f} MiB before, {peak_mib():.0f} MiB after (max_memory {options.max_memory:.0f} MiB)"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    plot(losses, options.output / "long_sequence.png", title)


if __name__ == "__main__":
    main()
