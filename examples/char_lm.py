"""A character language model (embedding, two nn.LSTM layers, linear head), trained by BPTT and by perturbed rollouts.

    python examples/char_lm.py                              Python's own reference, which Python ships
    python examples/char_lm.py --text BOOK.txt --updates 2000 --hidden 128

The text is cut into lanes that run side by side, and the state is carried from one window of a lane to the next,
detached: neither training looks back beyond its window. The last tenth of the text is held out. The second training
differs from the first by one line, `anpgpu.swap_(model)`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from tqdm import tqdm

import anpgpu

HELD_OUT, HELD_OUT_LANES = 0.1, 16
LOOKS = 12
"""Number of evaluations on the held-out text in a training."""

EMBEDDED = 32
"""Size of a character's embedding."""

State = tuple[Tensor, Tensor]


class CharacterModel(nn.Module):
    """Predicts the next character of every character."""

    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, EMBEDDED)
        self.lstm = nn.LSTM(EMBEDDED, hidden, num_layers=2)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return scores, (T, B, symbols), of the characters after `characters`, (T, B), and the final state."""
        hidden, state = self.lstm(self.embedding(characters), state)
        return self.head(hidden), state


class Text(NamedTuple):
    """A text as numbers."""

    symbols: str
    """The characters that occur, in the order of their numbers."""
    train: Tensor
    valid: Tensor


class Curve(NamedTuple):
    """What a training was like."""

    losses: list[float]
    """Of every update, in bits per character."""
    updates: list[int]
    """At which the held-out text was read."""
    valid: list[float]
    """Bits per character of the held-out text then."""
    seconds: float
    """Processor time of the updates."""


class Options(NamedTuple):
    """What both trainings share."""

    updates: int = 400
    hidden: int = 64
    steps: int = 40
    batch: int = 16
    lr: float = 1e-2
    seed: int = 0


def read(path: Path | None) -> Text:
    """Return a file's text, by default Python's reference; a tenth of it is held out."""
    text = "\n".join(topics[name] for name in sorted(topics)) if path is None else path.read_text(encoding="utf-8")
    symbols = "".join(sorted(set(text)))
    number = {symbol: index for index, symbol in enumerate(symbols)}
    encoded = torch.tensor([number[symbol] for symbol in text])
    cut = round(len(text) * (1 - HELD_OUT))
    return Text(symbols, encoded[:cut], encoded[cut:])


def lanes(text: Tensor, count: int) -> Tensor:
    """Return a text side by side in as many equal pieces, (T, count)."""
    length = len(text) // count
    return text[: count * length].view(count, length).t()


def windows(text: Tensor, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield characters and those after them, (T, B), and whether the lanes go on; endless."""
    pieces = lanes(text, batch)
    if len(pieces) <= steps:
        raise ValueError(f"a text of {len(text)} characters is too short for {batch} lanes of {steps} steps")
    for first in itertools.cycle(range(0, len(pieces) - steps, steps)):
        window = pieces[first : first + steps + 1]
        yield window[:-1], window[1:], first > 0


@torch.no_grad()
def bits(model: CharacterModel, text: Tensor) -> float:
    """Return the bits per character of a text, read in lanes from a state of zero."""
    pieces = lanes(text, HELD_OUT_LANES)
    scores, _ = model(pieces[:-1])
    return float(F.cross_entropy(scores.flatten(0, 1), pieces[1:].flatten())) / math.log(2)


@torch.no_grad()
def sample(model: CharacterModel, text: Text, length: int, temperature: float = 0.7) -> str:
    """Return characters that the model draws one after the other, after the first line of the held-out text."""
    generator = torch.Generator().manual_seed(0)
    scores, state = model(text.valid[:80].unsqueeze(1))
    drawn = []
    for _ in range(length):
        chances = torch.softmax(scores[-1, 0] / temperature, 0)
        drawn.append(torch.multinomial(chances, 1, generator=generator))
        scores, state = model(drawn[-1].unsqueeze(1), state)
    return "".join(text.symbols[int(number)] for number in drawn)


def train(
    text: Text, options: Options, change_: Callable[[nn.Module], object], *, name: str = "", quiet: bool = False
) -> tuple[CharacterModel, Curve]:
    """Train a model, which `change_` may change first."""
    torch.manual_seed(options.seed)
    model = CharacterModel(len(text.symbols), options.hidden)
    change_(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
    looks = {round(options.updates * (look + 1) / LOOKS) for look in range(LOOKS)}
    curve, state, seconds = Curve([], [], [], 0.0), None, 0.0
    batches = windows(text.train, options.batch, options.steps)
    bar = tqdm(range(1, options.updates + 1), desc=name, disable=quiet)
    for update, (characters, following, goes_on) in zip(bar, batches, strict=False):
        started = time.process_time()
        optimiser.param_groups[0]["lr"] = options.lr * (1 - (update - 1) / options.updates)
        scores, state = model(characters, state if goes_on else None)
        state = tuple(value.detach() for value in state)
        loss = F.cross_entropy(scores.flatten(0, 1), following.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seconds += time.process_time() - started
        curve.losses.append(float(loss.detach()) / math.log(2))
        if update in looks:
            curve.updates.append(update)
            curve.valid.append(bits(model, text.valid))
            bar.set_postfix(bits=f"{curve.valid[-1]:.3f}")
    return model, curve._replace(seconds=seconds)


def plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (name, curve) in enumerate(curves.items()):
        axis.plot(range(1, len(curve.losses) + 1), curve.losses, color=f"C{colour}", alpha=0.3, linewidth=0.7)
        axis.plot(curve.updates, curve.valid, color=f"C{colour}", marker=".", label=name)
    axis.set(xlabel="updates", ylabel="bits per character, held-out text (pale: training)")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = Options()
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: Python's reference)")
    parser.add_argument("--method", default="anp-feedback", help="of the perturbed training")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--updates", type=int, default=known.updates)
    parser.add_argument("--hidden", type=int, default=known.hidden)
    parser.add_argument("--steps", type=int, default=known.steps, help="of a window")
    parser.add_argument("--batch", type=int, default=known.batch, help="lanes of text")
    parser.add_argument("--lr", type=float, default=known.lr)
    parser.add_argument("--sample", type=int, default=200, help="characters to draw at the end")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    chosen = parser.parse_args()
    options = Options(chosen.updates, chosen.hidden, chosen.steps, chosen.batch, chosen.lr)
    text, how = read(chosen.text), anpgpu.Perturbation(chosen.method, chosen.rollouts)
    changes: dict[str, Callable[[nn.Module], object]] = {
        "bptt": lambda _: None,
        chosen.method: lambda model: anpgpu.swap_(model, how),
    }
    tqdm.write(f"{len(text.train):,} characters of {len(text.symbols)} kinds, {len(text.valid):,} held out")
    curves = {}
    for name, change_ in changes.items():
        model, curves[name] = train(text, options, change_, name=name, quiet=chosen.quiet)
        curve = curves[name]
        tqdm.write(f"{name}: {curve.valid[-1]:.3f} bits per character after {options.updates} updates")
        tqdm.write(f"{name}: {curve.seconds:.1f} s\n{sample(model, text, chosen.sample)}\n")
    chosen.output.mkdir(parents=True, exist_ok=True)
    plot(curves, chosen.output / "char_lm.png")


if __name__ == "__main__":
    main()
