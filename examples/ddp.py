"""Several processes train one model: each has its own samples, or all share the rollouts of the same samples.

    torchrun --nproc-per-node 2 examples/ddp.py                     # DistributedDataParallel: a batch per process
    torchrun --nproc-per-node 2 examples/ddp.py --share rollouts    # one batch, its rollouts divided

The task: the running sum of the inputs, five steps back.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import anpgpu


class Model(nn.Module):
    def __init__(self, perturbation: anpgpu.Perturbation) -> None:
        super().__init__()
        self.rnn = anpgpu.RNN(2, 32, perturbation=perturbation)
        self.head = nn.Linear(32, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.rnn(inputs)[0])


def train(share: str, steps: int, batch: int = 16) -> list[float]:
    """Return the mean loss over all processes of every step; the process group must be initialised."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    # All processes start from the same weights. Where they have their own samples their noise still differs, since the
    # counter of the noise holds their rank.
    torch.manual_seed(0)
    model: nn.Module = Model(anpgpu.Perturbation(rollouts=64, shard_rollouts=share == "rollouts")).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    if share == "samples":
        model = DistributedDataParallel(model)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        inputs = torch.rand(20, batch, 2, generator=data).sub_(0.5).to(device)
        targets = inputs.sum(-1, keepdim=True).cumsum(0).roll(5, 0)
        targets[:5] = 0
        if share == "samples":
            # For a data set, a DistributedSampler divides the batch.
            inputs, targets = inputs[:, rank::count], targets[:, rank::count]
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach()
        distributed.all_reduce(mean)
        losses.append(float(mean) / count)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", choices=("samples", "rollouts"), default="samples")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    losses = train(options.share, options.steps)
    if distributed.get_rank() == 0:
        first, last = (sum(window) / len(window) for window in (losses[:10], losses[-10:]))
        print(f"{distributed.get_world_size()} processes share {options.share}: loss {first:.4f} -> {last:.4f}")
    # DistributedDataParallel holds the group in reference cycles; a process that ends before gloo's threads aborts.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
