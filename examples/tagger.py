"""A sequence tagger as in the tutorials (embedding, two-layer bidirectional nn.RNN, linear head), trained twice.

    python examples/tagger.py

Sentences of unequal length hold two kinds of brackets among other words. The tag of a word says which of ( and ) came
last before it, and which of [ and ] comes first after it, so that it needs memory in both directions. The second
training differs from the first by one line, `anpgpu.swap_(model)`.
"""

from __future__ import annotations

import argparse
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


class Tagger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.rnn = nn.RNN(16, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=words.shape[1])
        return self.head(hidden)


def train(seed: int, updates: int, hidden: int, *, swapped: bool, quiet: bool = False) -> float:
    """Return the share of test words with the right tag."""
    torch.manual_seed(seed)
    model = Tagger(hidden)
    if swapped:
        anpgpu.swap_(model)
    data, test = sentences(2000), sentences(500)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for _ in tqdm(
        range(updates), desc=f"seed {seed}, {'perturbed' if swapped else 'bptt'}", disable=quiet, leave=False
    ):
        batch = torch.randint(len(data.words), (32,))
        scores = model(data.words[batch], data.lengths[batch])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), data.tags[batch].flatten(), ignore_index=PADDING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        right = model(test.words, test.lengths).argmax(-1) == test.tags
    return float(right.sum() / test.lengths.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=32)
    options = parser.parse_args()
    for seed in range(options.seeds):
        exact, perturbed = (train(seed, options.updates, options.hidden, swapped=swapped) for swapped in (False, True))
        print(f"seed {seed}: BPTT {exact:.2%}, perturbed {perturbed:.2%}, difference {100 * (exact - perturbed):.2f}")


if __name__ == "__main__":
    main()
