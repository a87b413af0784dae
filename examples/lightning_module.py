"""A LightningModule that needs no change but `anpgpu.RNN` for `nn.RNN`. Needs the package lightning.

python examples/lightning_module.py
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import anpgpu


class Majority(lightning.LightningModule):
    """Says after every bit whether the last three hold more ones than zeros."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = anpgpu.RNN(
            1, hidden, batch_first=True, perturbation=anpgpu.Perturbation(rollouts=64, split_half=True)
        )
        self.head = nn.Linear(hidden, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.rnn(bits)[0])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        bits, more = batch
        loss = nn.functional.cross_entropy(self(bits).flatten(0, 1), more.flatten())
        # How well two halves of the rollouts agree, in the last backward pass.
        if self.rnn.last_estimate is not None:
            self.log("split_half", self.rnn.last_estimate.split_half)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def data(sequences: int, steps: int = 10) -> TensorDataset:
    bits = torch.randint(2, (sequences, steps))
    ones = nn.functional.pad(bits, (2, 0)).unfold(1, 3, 1).sum(-1)
    return TensorDataset(bits.unsqueeze(-1).float(), (ones > 1).long())


def train(epochs: int, sequences: int = 1024, **options: object) -> tuple[Majority, lightning.Trainer]:
    lightning.seed_everything(0, verbose=False)
    model = Majority()
    trainer = lightning.Trainer(max_epochs=epochs, gradient_clip_val=1.0, log_every_n_steps=1, **options)
    trainer.fit(model, DataLoader(data(sequences), batch_size=64, shuffle=True))
    return model, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    _, trainer = train(parser.parse_args().epochs, enable_checkpointing=False, logger=False)
    print(f"loss after {trainer.global_step} updates: {float(trainer.callback_metrics['loss']):.3f}")


if __name__ == "__main__":
    main()
