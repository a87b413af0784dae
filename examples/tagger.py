"""A sequence tagger as in the tutorials (embedding, two-layer bidirectional network, linear head), trained twice.

    python examples/tagger.py
    python examples/tagger.py --cell LSTM --seeds 1

Sentences of unequal length hold two kinds of brackets among other words. The tag of a word says which of ( and ) came
last before it, and which of [ and ] comes first after it, so that it needs memory in both directions. The second
training differs from the first by one line, `anpgpu.swap_(model)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

import anpgpu

WORDS, BRACKETS = 20, 4
"""Words 0 to 3 are the brackets ( ) [ ]; a word is a bracket with probability SHARE."""
SHARE, SHORTEST, LONGEST, PADDING = 0.4, 5, 12, -100


class Sentences(NamedTuple):
    words: Tensor
    """(B, T)."""
    lengths: Tensor
    tags: Tensor
    """(B, T), PADDING beyond the length."""


def sentences(count: int) -> Sentences:
    words = torch.randint(BRACKETS, WORDS, (count, LONGEST))
    words = torch.where(torch.rand(words.shape) < SHARE, torch.randint(BRACKETS, words.shape), words)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,))
    valid = torch.arange(LONGEST) < lengths.unsqueeze(1)
    words = torch.where(valid, words, 0)
    tags = torch.full(words.shape, PADDING)
    for row, line in enumerate(words.tolist()):
        end = int(lengths[row])
        last, following = 0, 0
        for step in range(end):
            tags[row, step] = 2 * last
            last = line[step] if line[step] < 2 else last
        for step in reversed(range(end)):
            tags[row, step] += following
            following = line[step] - 2 if line[step] in {2, 3} else following
    return Sentences(words, lengths, tags)


CELLS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}


class Tagger(nn.Module):
    def __init__(self, hidden: int, cell: str = "RNN") -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.rnn = CELLS[cell](16, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words.shape[1])
        return self.head(hidden)


class Training(NamedTuple):
    right: float
    """Share of test words with the right tag."""
    losses: list[float]
    """Of every update, in nats."""


def train(
    seed: int,
    updates: int,
    hidden: int,
    how: anpgpu.Perturbation | None = None,
    *,
    cell: str = "RNN",
    quiet: bool = False,
) -> Training:
    """Train by perturbed rollouts, or by BPTT where `how` is None."""
    torch.manual_seed(seed)
    model = Tagger(hidden, cell)
    if how is not None:
        anpgpu.swap_(model, how)
    data, test = sentences(2000), sentences(500)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    losses = []
    name = "bptt" if how is None else how.method
    for _ in tqdm(range(updates), desc=f"{cell}, seed {seed}, {name}", disable=quiet, leave=False):
        batch = torch.randint(len(data.words), (32,))
        scores = model(data.words[batch], data.lengths[batch])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), data.tags[batch].flatten(), ignore_index=PADDING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        right = model(test.words, test.lengths).argmax(-1) == test.tags
    return Training(float(right.sum() / test.lengths.sum()), losses)


def plot(trainings: dict[str, list[Training]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for colour, (name, seeds) in enumerate(trainings.items()):
        for number, training in enumerate(seeds):
            updates = range(1, len(training.losses) + 1)
            axis.plot(updates, training.losses, color=f"C{colour}", linewidth=0.8, label=None if number else name)
    axis.set(xlabel="updates", ylabel="loss (nats per word)", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = anpgpu.Perturbation()
    parser.add_argument("--cell", choices=CELLS, default="RNN")
    parser.add_argument("--method", default=default.method, help="of the perturbed training")
    parser.add_argument("--rollouts", type=int, default=default.rollouts)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    methods = {"bptt": None, options.method: anpgpu.Perturbation(options.method, options.rollouts)}
    trainings: dict[str, list[Training]] = {name: [] for name in methods}
    for seed in range(options.seeds):
        for name, how in methods.items():
            mine = train(seed, options.updates, options.hidden, how, cell=options.cell, quiet=options.quiet)
            trainings[name].append(mine)
        exact, perturbed = (mine[-1].right for mine in trainings.values())
        tqdm.write(
            f"seed {seed}: BPTT {exact:.2%}, perturbed {perturbed:.2%}, difference {100 * (exact - perturbed):.2f}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    plot(trainings, options.output / "tagger.png")


if __name__ == "__main__":
    main()
