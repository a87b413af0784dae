"""What a user would write in plain PyTorch: the baselines of `time_ops.py`.

The rollout in plain PyTorch is one matrix product and a few pointwise operations per step:

    delta_a = delta_h W_hh^T + xi;  th = tanh(delta_a);  delta_h = th (1 - h^2) / (1 + h th);  delta_loss = delta_h . g
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Work = Callable[[], object]


class Clean(NamedTuple):
    """Clean activity and weights of a case."""

    preact: Tensor
    """(T, B, H)."""
    hidden: Tensor
    """(T, B, H)."""
    grad: Tensor
    """dL/dh, (T, B, H)."""
    weight: Tensor
    """(H, H)."""
    rollouts: int
    sigma: float

    @property
    def operand(self) -> torch.dtype:
        """Type of the operands of the matrix products."""
        return torch.bfloat16 if self.weight.is_cuda else torch.float32


def pointwise(product: Tensor, hidden: Tensor, grad: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta_a and delta_h in the operands' type, (B, P, H), and delta_loss, (B, P), of one step."""
    signs = torch.rand(product.shape, device=product.device) < 0.5
    delta_a = product.float() + torch.where(signs, -sigma, sigma)
    bent = torch.tanh(delta_a)
    delta_h = bent * (1 - hidden * hidden) / (1 + hidden * bent)
    return delta_a.to(product.dtype), delta_h.to(product.dtype), (delta_h * grad).sum(-1)


Step = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def whole_step(
    delta_h: Tensor, weight: Tensor, hidden: Tensor, grad: Tensor, sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `pointwise`, from the state before the step."""
    return pointwise(delta_h @ weight.t(), hidden, grad, sigma)


def rollout_by(step: Step, clean: Clean) -> Work:
    """Return a rollout that calls one function per step and keeps delta_a and delta_loss."""
    time, batch, hidden = clean.hidden.shape
    weight = clean.weight.to(clean.operand)
    state = torch.zeros(batch, clean.rollouts, hidden, dtype=clean.operand, device=weight.device)
    all_delta_a = torch.empty(time, *state.shape, dtype=clean.operand, device=weight.device)
    delta_loss = torch.empty(time, batch, clean.rollouts, device=weight.device)
    rows = [(clean.hidden[step].unsqueeze(1), clean.grad[step].unsqueeze(1)) for step in range(time)]

    @torch.no_grad()
    def run() -> None:
        delta_h = state
        for number, (clean_h, grad) in enumerate(rows):
            delta_a, delta_h, change = step(delta_h, weight, clean_h, grad, clean.sigma)
            all_delta_a[number].copy_(delta_a)
            delta_loss[number].copy_(change)

    return run


def graphed(work: Work) -> Work:
    """Return a replay of the work, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def product_and_pointwise(fused: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Step:
    """Return a step of one cuBLAS product and one fused pointwise kernel."""

    def step(
        delta_h: Tensor, weight: Tensor, hidden: Tensor, grad: Tensor, sigma: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return fused(delta_h @ weight.t(), hidden, grad, sigma)

    return step


def backpropagation(time: int, batch: int, hidden: int, inputs: int, like: Tensor) -> Work:
    """Return true BPTT by nn.RNN (on a GPU, cuDNN): forward, squared error, backward."""
    dtype = torch.bfloat16 if like.is_cuda else torch.float32
    rnn = nn.RNN(inputs, hidden, device=like.device, dtype=dtype)
    values = torch.randn(time, batch, inputs, device=like.device, dtype=dtype)

    def run() -> None:
        rnn.zero_grad()
        outputs, _ = rnn(values)
        outputs.square().mean().backward()

    return run


def rollouts_of(clean: Clean) -> Iterable[tuple[str, Callable[[], Work]]]:
    """Yield the name and the maker of every rollout baseline for the device of `clean`."""
    yield "eager torch", lambda: rollout_by(whole_step, clean)
    if clean.weight.is_cuda:
        yield (
            "torch.compile max-autotune",
            lambda: rollout_by(torch.compile(whole_step, mode="max-autotune-no-cudagraphs", dynamic=False), clean),
        )
        yield (
            "torch.compile max-autotune, CUDA graph",
            lambda: graphed(
                rollout_by(torch.compile(whole_step, mode="max-autotune-no-cudagraphs", dynamic=False), clean)
            ),
        )
        yield (
            "cuBLAS + one pointwise kernel, CUDA graph",
            lambda: graphed(
                rollout_by(product_and_pointwise(torch.compile(pointwise, dynamic=False)), clean),
            ),
        )
