"""A loop under Hugging Face accelerate: `prepare`, `accumulate`, `backward`, and nothing else to change.

accelerate launch examples/accelerate_loop.py      # or: python examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anpgpu


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(2, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.rnn(inputs)[0][:, -1])


def adding(sequences: int, steps: int = 6) -> TensorDataset:
    """Numbers, of which two are marked; their sum is the target (the adding problem)."""
    numbers = torch.rand(sequences, steps)
    marks = torch.zeros(sequences, steps).scatter(1, torch.rand(sequences, steps).topk(2).indices, 1.0)
    return TensorDataset(torch.stack((numbers, marks), -1), (numbers * marks).sum(1, keepdim=True))


def train(epochs: int, accelerator: Accelerator, sequences: int = 2048) -> list[float]:
    """Return the mean loss of every epoch."""
    torch.manual_seed(0)
    model = Model()
    anpgpu.swap_(model, anpgpu.Perturbation(rollouts=64, discount=1.0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(adding(sequences), batch_size=32, shuffle=True)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
            total += float(accelerator.gather(loss.detach()).mean())
        losses.append(total / len(loader))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    losses = train(parser.parse_args().epochs, accelerator)
    accelerator.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} (guessing the mean: 0.1667)")


if __name__ == "__main__":
    main()
