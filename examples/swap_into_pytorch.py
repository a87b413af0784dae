"""Swap: one added line trains an existing PyTorch model with `nn.RNN` without backpropagation through time.

    python examples/swap_into_pytorch.py --output output/

The model (embedding, two recurrent layers, dropout, layer norm, a head) and its training loop are plain PyTorch. It
learns to predict the text below, character by character.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu

TEXT = (
    "the rollouts are independent of each other, so a machine can run tens of thousands at once. "
    "how much the loss of each one moved, and how its activity moved, gives an estimate of the gradient. "
)


class Speller(nn.Module):
    """Predicts the next character of every character."""

    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 16)
        self.rnn = nn.RNN(16, hidden, num_layers=2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(characters))
        return self.head(self.norm(hidden))


def train(options: argparse.Namespace, *, swapped: bool) -> list[float]:
    """Return the loss of every update, in nats per character."""
    torch.manual_seed(0)
    symbols = sorted(set(TEXT))
    encoded = torch.tensor([symbols.index(character) for character in TEXT * 2])
    model = Speller(len(symbols), options.hidden)
    if swapped:
        how = anpgpu.Perturbation(method=options.method, rollouts=options.rollouts)
        # The added line: every nn.RNN in the model is replaced in place, with the same parameters.
        anpgpu.swap_(model, how)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    losses, generator = [], torch.Generator().manual_seed(0)
    bar = tqdm(range(options.updates), desc=options.method if swapped else "bptt", disable=options.quiet)
    for _ in bar:
        starts = torch.randint(len(TEXT), (options.batch, 1), generator=generator)
        window = encoded[starts + torch.arange(options.steps + 1)]
        loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, losses in curves.items():
        axis.plot(range(1, len(losses) + 1), losses, label=name)
    axis.set(xlabel="updates", ylabel="loss (nats per character)")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="anp-ls", choices=["anp", "np", "anp-ls"])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    curves = {options.method: train(options, swapped=True), "bptt": train(options, swapped=False)}
    for name, losses in curves.items():
        tqdm.write(f"{name:8s} loss {losses[0]:.2f} to {losses[-1]:.2f} nats per character")
    options.output.mkdir(parents=True, exist_ok=True)
    plot(curves, options.output / "swap_into_pytorch.png")


if __name__ == "__main__":
    main()
