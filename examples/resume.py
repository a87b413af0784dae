"""Training that may be killed at any time, also while it saves, and goes on bitwise as if it had not been.

    python examples/resume.py --updates 400      # kill it (kill -9 if you like), run it again: it goes on

A checkpoint holds everything that an update depends on: weights and buffers (decorrelation's included), the optimiser,
the schedule, torch's generators, and the version of the noise stream: in another the same seed means other noise.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anpgpu
from anpgpu.decorrelation import Decorrelation


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that `path` always holds a whole one: the old or the new."""
    state = {"noise_stream": anpgpu.NOISE_STREAM_VERSION, "rng": torch.get_rng_state(), **state}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    # Within one file system this is all or nothing, whenever the process is killed.
    os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint, and put torch's generators where they were; raise if its noise cannot be made any more."""
    state: dict[str, Any] = torch.load(path, map_location="cpu")
    if state["noise_stream"] != anpgpu.NOISE_STREAM_VERSION:
        raise RuntimeError(
            f"{path} was trained with noise stream {state['noise_stream']}, this anpgpu makes stream "
            f"{anpgpu.NOISE_STREAM_VERSION}: it would not go on as it began. Resume with the version that saved it"
        )
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state


def train(path: Path, updates: int, every: int, method: str = "anp") -> float:
    """Train until `updates`, from `path` if it is there, saving to it every so many updates; return the last loss."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": anpgpu.RNN(3, 32, 2, dropout=0.1), "head": nn.Linear(32, 3)})
    model["rnn"].perturbation = anpgpu.Perturbation(method)
    decorrelation = Decorrelation(model["rnn"], rate=1e-3)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, loss = 0, torch.tensor(torch.nan)
    if path.exists():
        state = load(path)
        first, loss = state["update"], state["loss"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for update in range(first, updates):
        inputs = torch.randn(20, 16, 3)
        hidden, _ = model["rnn"](inputs)
        # Remember the input of two steps ago.
        loss = nn.functional.mse_loss(model["head"](hidden[2:]), inputs[:-2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        decorrelation.update_(inputs)
        if (update + 1) % every == 0 or update + 1 == updates:
            states = {name: part.state_dict() for name, part in parts.items()}
            save(path, {"update": update + 1, "loss": loss.detach(), **states})
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("resume.pt"))
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="updates between checkpoints")
    parser.add_argument("--method", default="anp")
    options = parser.parse_args()
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    print(f"loss {train(options.checkpoint, options.updates, options.every, options.method):.4f}")


if __name__ == "__main__":
    main()
