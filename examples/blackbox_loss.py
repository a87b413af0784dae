"""A loss without a derivative: train on the number of mistakes, which backpropagation cannot.

    python examples/blackbox_loss.py --output output/

The network is shown four bits a step and must recall the bits of `--delay` steps ago. The loss of a step is the share
of bits with the wrong sign: flat almost everywhere, so that its gradient is zero. Perturbed rollouts need only its
value, and noise large enough to change it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu

BITS = 4


def mistakes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the share of wrong signs, (T, B, p), of outputs (T, B, p, 4); targets are (T, B, 1, 4)."""
    return ((outputs > 0) != (targets > 0)).to(outputs.dtype).mean(-1)


def draw(delay: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return bits as -1 and 1, (T, B, 4), and those of `delay` steps before."""
    bits = 2.0 * torch.randint(2, (20 + delay, batch, BITS), generator=generator) - 1
    return bits[delay:], bits[: len(bits) - delay]


def plot(shares: list[float], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot(range(1, len(shares) + 1), shares)
    axis.axhline(0.5, color="grey", linestyle="--", label="guessing")
    axis.set(xlabel="updates", ylabel="share of wrong bits, fresh sequences", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--delay", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=0.1, help="standard deviation of the noise")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    torch.manual_seed(0)
    rnn, readout = nn.RNN(BITS, options.hidden), nn.Linear(options.hidden, BITS)
    nn.init.orthogonal_(rnn.weight_hh_l0, 0.95)
    how = anpgpu.Perturbation(
        method="anp", rollouts=options.rollouts, sigma=options.sigma, noise="gaussian", discount=0.9
    )
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=options.lr)
    generator, shares = torch.Generator().manual_seed(0), []
    bar = tqdm(range(options.updates), unit="update", disable=options.quiet)
    for _ in bar:
        inputs, targets = draw(options.delay, options.batch, generator)
        optimiser.zero_grad()
        estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, mistakes, perturbation=how)
        optimiser.step()
        shares.append(float(estimate.loss))
        bar.set_postfix(wrong=f"{shares[-1]:.1%}")
    last = shares[-20:]
    tqdm.write(f"wrong bits: {shares[0]:.1%} at first, {sum(last) / len(last):.1%} over the last {len(last)} updates")
    options.output.mkdir(parents=True, exist_ok=True)
    plot(shares, options.output / "blackbox_loss.png")


if __name__ == "__main__":
    main()
