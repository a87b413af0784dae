"""Activation checkpointing: free the activity around the RNN, and compute it again in the backward pass.

    python examples/checkpointing.py

The second forward pass restores torch's generator and so draws the same seed: the gradients are bitwise those of the
plain model. The RNN itself stores only its clean states, no graph through time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anpgpu


class Block(nn.Module):
    """An RNN after two wide layers, whose activity takes most of the memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(width, 8 * width), nn.GELU(), nn.Linear(8 * width, width))
        self.rnn = anpgpu.RNN(width, width, perturbation=anpgpu.Perturbation(rollouts=16))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(inputs + self.rnn(self.before(inputs))[0])


def gradients(*, checkpointed: bool, width: int = 16, blocks: int = 3) -> list[Tensor]:
    """Return the gradients of one update."""
    torch.manual_seed(0)
    model = nn.ModuleList(Block(width) for _ in range(blocks))
    values = torch.randn(12, 8, width)
    for block in model:
        values = checkpoint(block, values, use_reentrant=False) if checkpointed else block(values)
    values.square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    plain, checkpointed = gradients(checkpointed=False), gradients(checkpointed=True)
    same = all(torch.equal(grad, grad_again) for grad, grad_again in zip(plain, checkpointed, strict=True))
    print(f"{len(plain)} gradients, {'bitwise the same' if same else 'NOT the same'} with checkpointing")


if __name__ == "__main__":
    main()
