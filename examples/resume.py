"""Training that may be killed at any time, even while it saves, and resumes with bitwise the same results.

    python examples/resume.py --updates 400      # kill it (kill -9 if you like), run it again: it resumes

A checkpoint holds everything that an update depends on: weights and buffers (decorrelation's included), the optimiser,
the schedule, what the method keeps between updates (feedback matrices), torch's generators, and the version of the
noise stream, since versions make other noise of a seed.
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
    """Write a checkpoint so that `path` always holds a complete one, the old or the new."""
    state = {"noise_stream": anpgpu.NOISE_STREAM_VERSION, "rng": torch.get_rng_state(), **state}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    # Within one file system this is atomic.
    os.replace(unfinished, path)


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint and restore torch's generators.

    Raises:
        RuntimeError: the checkpoint's noise stream has another version.
    """
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


CELLS = {"RNN": anpgpu.RNN, "GRU": anpgpu.GRU, "LSTM": anpgpu.LSTM}


def train(path: Path, updates: int, interval: int, method: str = "anp", cell: str = "RNN") -> float:
    """Train for `updates` in all, from `path` if it exists, saving to it every `interval`; return the last loss."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": CELLS[cell](3, 32, 2, dropout=0.1), "head": nn.Linear(32, 3)})
    model["rnn"].perturbation = anpgpu.Perturbation(method)
    decorrelation = Decorrelation(model["rnn"], rate=1e-3)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    modules = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, loss = 0, torch.tensor(torch.nan)
    if path.exists():
        state = load(path)
        first, loss = state["update"], state["loss"]
        for name, module in modules.items():
            module.load_state_dict(state[name])
        anpgpu.load_estimator_state_(model, state["estimator"])
    for update in range(first, updates):
        inputs = torch.randn(20, 16, 3)
        hidden, _ = model["rnn"](inputs)
        # The target is the input of two steps ago.
        loss = nn.functional.mse_loss(model["head"](hidden[2:]), inputs[:-2])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        decorrelation.update_(inputs)
        if (update + 1) % interval == 0 or update + 1 == updates:
            states = {name: module.state_dict() for name, module in modules.items()}
            kept = anpgpu.estimator_state(model)
            save(path, {"update": update + 1, "loss": loss.detach(), "estimator": kept, **states})
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("resume.pt"))
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="updates between checkpoints")
    parser.add_argument("--method", default="anp-feedback")
    parser.add_argument("--cell", choices=CELLS, default="RNN")
    options = parser.parse_args()
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    print(f"loss {train(options.checkpoint, options.updates, options.every, options.method, options.cell):.4f}")


if __name__ == "__main__":
    main()
