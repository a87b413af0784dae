"""Mixed precision, gradient accumulation and clipping: the usual loop, with an RNN that learns by perturbation.

    python examples/amp.py [--dtype bf16|fp16] [--accumulate 2]

Autocast also sets the type of the operands of the rollouts' matrix products; noise, losses and estimates stay in
float32. fp16 needs loss scaling, which works because an estimate is linear in dL/d(outputs).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import mse_loss

import anpgpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(dtype: str = "fp16", accumulate: int = 2, steps: int = 150) -> list[float]:
    """Train to recall the input of three steps ago; return the loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.RNN(4, 64), "head": nn.Linear(64, 4)}).to(device)
    anpgpu.swap_(model, anpgpu.Perturbation(rollouts=32))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    scaler = torch.amp.GradScaler(device, enabled=dtype == "fp16")
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulate):
            inputs = torch.randn(20, 16, 4, device=device)
            with torch.autocast(device, DTYPES[dtype]):
                hidden, _ = model["rnn"](inputs)
                loss = mse_loss(model["head"](hidden[3:]).float(), inputs[:-3]) / accumulate
            # Every backward pass makes a new estimate and adds it to .grad.
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per update")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    losses = train(options.dtype, options.accumulate, options.steps)
    print(f"{options.dtype}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
