"""The peers that `compare.py` times: an update of ANP and one of true BPTT, as one would write them in PyTorch.

An ANP update is a clean run, P rollouts of each of B samples over T steps in deviation form, the measured squared
error, discounted credit, the mean over rollouts, and the gradients of all weights:

    delta_a = delta_h W_hh^T + xi;  th = tanh(delta_a);  delta_h = th (1 - h^2) / (1 + h th)
    delta_o = delta_h W_o^T;  delta_loss = weight sum_o delta_o (2 e + delta_o)
    c_t = delta_loss_t + discount c_{t+1};  lam = mean_p c H delta_a / |delta_a|^2
    dW_hh = sum lam_t h_{t-1}^T;  dW_ih = sum lam_t x_t^T;  db = sum lam_t;  dW_o = sum dL/do h^T

The peers differ in how they run one step. A step draws noise from torch's generator; the checks pass noise in. Operands
are bf16 on a GPU and float32 on a CPU, as ours are. Source: arXiv:2405.08967.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import Case
from compare_kernels import Work, graphed
from torch import Tensor, nn

import anpgpu

SIGMA = 1e-3
DISCOUNT = 0.9

LONGEST_CAPTURE = 2_000
"""Most steps of a CUDA graph. Each step is several nodes; longer graphs take longer to instantiate than to run."""


class Task(NamedTuple):
    """A network, its data and the amount of work."""

    case: Case
    rnn: anpgpu.RNN
    readout: nn.Linear
    inputs: Tensor
    """(T, B, I)."""
    targets: Tensor
    """(T, B, O)."""

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def operand(self) -> torch.dtype:
        """Type of the operands of the rollouts' products."""
        return torch.bfloat16 if self.inputs.is_cuda else self.inputs.dtype


def task_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Task:
    """Return random data and a network that they do not saturate, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rule = anpgpu.Perturbation(method="anp", rollouts=case.rollouts, sigma=SIGMA, discount=DISCOUNT)
    rnn, readout = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule), nn.Linear(case.hidden, case.outputs)
    with torch.no_grad():
        for weight in (*rnn.parameters(), *readout.parameters()):
            weight.copy_(randn(*weight.shape) / weight.shape[-1] ** 0.5)
    inputs = randn(case.time, case.batch, case.inputs)
    targets = randn(case.time, case.batch, case.outputs)
    where = {"device": device, "dtype": dtype}
    return Task(case, rnn.to(**where), readout.to(**where), inputs.to(**where), targets.to(**where))


class Parts(NamedTuple):
    """What a step reads besides its state; matrices are in the operands' type."""

    weight: Tensor
    """W_hh^T, (H, H)."""
    readout: Tensor
    """W_o^T, (H, O)."""
    hidden: Tensor
    """(T, B, 1, H)."""
    error: Tensor
    """(T, B, 1, O)."""
    scale: float
    """Weight of each squared error in the loss."""


def pointwise(
    product: Tensor, readout: Tensor, hidden: Tensor, error: Tensor, scale: float, xi: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return delta_a and delta_h, (B, P, H) in the operands' type, and delta_loss, (B, P), of one step."""
    if xi is None:
        signs = torch.rand(product.shape, device=product.device) < 0.5
        xi = torch.where(signs, -SIGMA, SIGMA)
    delta_a = product.to(hidden.dtype) + xi
    bent = torch.tanh(delta_a)
    delta_h = (bent * (1 - hidden * hidden) / (1 + hidden * bent)).to(product.dtype)
    delta_o = (delta_h @ readout).to(hidden.dtype)
    return delta_a.to(product.dtype), delta_h, (delta_o * (2 * error + delta_o)).sum(-1) * scale


def whole_step(
    delta_h: Tensor, weight: Tensor, readout: Tensor, hidden: Tensor, error: Tensor, scale: float, xi: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `pointwise`, from the state before the step."""
    return pointwise(delta_h @ weight, readout, hidden, error, scale, xi)


Step = Callable[..., tuple[Tensor, Tensor, Tensor]]
Rollouts = Callable[[Task, Parts, Tensor | None], tuple[Tensor, Tensor]]
"""Takes noise (T, B, P, H), or None to draw it; returns delta_a (T, B, P, H) and delta_loss (T, B, P)."""


def stepwise(step: Step) -> Rollouts:
    """Return rollouts that call one function per step and reuse their output tensors."""
    outputs: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def run(task: Task, parts: Parts, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        case = task.case
        shape = (case.time, case.batch, case.rollouts, case.hidden)
        if shape not in outputs:
            outputs[shape] = (
                torch.empty(shape, dtype=parts.weight.dtype, device=task.device),
                torch.empty(shape[:3], dtype=parts.hidden.dtype, device=task.device),
            )
        delta_a, delta_loss = outputs[shape]
        delta_h = torch.zeros(shape[1:], dtype=parts.weight.dtype, device=task.device)
        for t in range(case.time):
            xi = None if noise is None else noise[t]
            delta_a_t, delta_h, change = step(
                delta_h, parts.weight, parts.readout, parts.hidden[t], parts.error[t], parts.scale, xi
            )
            delta_a[t].copy_(delta_a_t)
            delta_loss[t].copy_(change)
        return delta_a, delta_loss

    return run


def vectorised(task: Task, parts: Parts, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rollouts of a function of one rollout, mapped over all by `torch.func.vmap`."""
    hidden, error = parts.hidden.squeeze(2), parts.error.squeeze(2)

    def rollout(xi: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
        delta_h, activity, losses = start, [], []
        for t in range(task.case.time):
            xi_t = None if xi is None else xi[t]
            delta_a, delta_h, change = whole_step(
                delta_h, parts.weight, parts.readout, hidden[t], error[t], parts.scale, xi_t
            )
            activity.append(delta_a)
            losses.append(change)
        return torch.stack(activity), torch.stack(losses)

    case = task.case
    start = torch.zeros((case.rollouts, case.batch, case.hidden), dtype=parts.weight.dtype, device=task.device)
    mapped = torch.func.vmap(rollout, in_dims=(None if noise is None else 2, 0), out_dims=2, randomness="different")
    return mapped(noise, start)


@torch.no_grad()
def anp_update(task: Task, rollouts: Rollouts, noise: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of W_ih, W_hh, b, W_o and b_o."""
    case = task.case
    hidden, _ = nn.RNN.forward(task.rnn, task.inputs)
    error = task.readout(hidden) - task.targets
    scale = 1 / error.numel()
    weight = task.rnn.weight_hh_l0.t().to(task.operand)
    readout = task.readout.weight.t().to(task.operand)
    parts = Parts(weight, readout, hidden.unsqueeze(2), error.unsqueeze(2), scale)
    delta_a, delta_loss = rollouts(task, parts, noise)
    credit = torch.empty_like(delta_loss)
    carry = torch.zeros_like(delta_loss[0])
    for t in range(case.time - 1, -1, -1):
        carry = torch.add(delta_loss[t], carry, alpha=DISCOUNT, out=credit[t])
    norm = torch.linalg.vector_norm(delta_a, dim=-1, dtype=credit.dtype)
    share = credit * (case.hidden / case.rollouts) / norm.square()
    adjoint = (share.to(delta_a.dtype).unsqueeze(2) @ delta_a).squeeze(2).to(hidden.dtype)
    rows = adjoint.flatten(0, 1).t()
    before = torch.cat((torch.zeros_like(hidden[:1]), hidden[:-1]))
    outer = (2 * scale * error).flatten(0, 1).t()
    return [
        rows @ task.inputs.flatten(0, 1),
        rows @ before.flatten(0, 1),
        rows.sum(1),
        outer @ hidden.flatten(0, 1),
        outer.sum(1),
    ]


def ours(task: Task, generator: torch.Generator | None = None, **changed: str) -> list[Tensor]:
    """Return the gradients of `anp_update` from `estimate_grad_`; `changed` replaces fields of the perturbation."""
    task.rnn.zero_grad()
    task.readout.zero_grad()
    how = dataclasses.replace(task.rnn.perturbation, **changed)
    anpgpu.estimate_grad_(task.rnn, task.readout, task.inputs, task.targets, perturbation=how, generator=generator)
    return gradients(task.rnn, task.readout)


def ours_backward(task: Task) -> list[Tensor]:
    """Return the gradients of `anp_update`, with a linear loss, from `loss.backward()` through `anpgpu.RNN`."""
    task.rnn.zero_grad()
    task.readout.zero_grad()
    hidden, _ = task.rnn(task.inputs)
    nn.functional.mse_loss(task.readout(hidden), task.targets).backward()
    return gradients(task.rnn, task.readout)


def gradients(rnn: nn.RNN, readout: nn.Linear) -> list[Tensor]:
    """Return `.grad` in the order of `anp_update`; both recurrent biases have the same gradient."""
    weights = [rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, *readout.parameters()]
    return [weight.grad for weight in weights if weight.grad is not None]


def bptt(task: Task, precision: str) -> Callable[[], list[Tensor]]:
    """Return true BPTT by nn.RNN (on a GPU, cuDNN) in precision "fp32", "tf32", "fp16" or "fp64"."""
    dtype = {"fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.float32)
    where = {"device": task.device, "dtype": dtype}
    rnn = nn.RNN(task.case.inputs, task.case.hidden)
    rnn.load_state_dict(task.rnn.state_dict())
    readout = nn.Linear(task.case.hidden, task.case.outputs)
    readout.load_state_dict(task.readout.state_dict())
    rnn, readout = rnn.to(**where), readout.to(**where)
    inputs, targets = task.inputs.to(dtype), task.targets.to(dtype)
    # Gradients of a mean over many outputs underflow in half precision.
    scaling = 1024.0 if precision == "fp16" else 1.0
    units = torch.backends.cudnn.rnn

    def run() -> list[Tensor]:
        rnn.zero_grad()
        readout.zero_grad()
        before = units.fp32_precision
        if inputs.is_cuda:
            units.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        try:
            hidden, _ = rnn(inputs)
            (nn.functional.mse_loss(readout(hidden), targets) * scaling).backward()
        finally:
            if inputs.is_cuda:
                units.fp32_precision = before
        return [gradient / scaling for gradient in gradients(rnn, readout)]

    return run


def compiled(function: Step, *, cuda: bool) -> Step:
    """Return a function compiled by torch at its best setting without CUDA graphs."""
    mode = "max-autotune-no-cudagraphs" if cuda else "default"
    return torch.compile(function, mode=mode, dynamic=False)


def product_and_pointwise(fused: Step) -> Step:
    """Return a step of one cuBLAS product and one compiled pointwise function."""

    def step(delta_h: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        return fused(delta_h @ weight, *rest)

    return step


class CaptureTooLongError(RuntimeError):
    """A sequence is too long for a CUDA graph."""


def captured(task: Task, work: Work) -> Work:
    """Return the work as one CUDA graph.

    Raises:
        CaptureTooLongError: it has too many steps.
    """
    if task.case.time > LONGEST_CAPTURE:
        raise CaptureTooLongError(f"T = {task.case.time} is more than the {LONGEST_CAPTURE} steps that are captured")
    return graphed(work)


def anp_peers(*, cuda: bool) -> dict[str, Callable[[], Rollouts]]:
    """Return the makers of the rollouts of every ANP peer, by name."""
    makers: dict[str, Callable[[], Rollouts]] = {
        "eager torch": lambda: stepwise(whole_step),
        "torch.compile": lambda: stepwise(compiled(whole_step, cuda=cuda)),
        "torch.func.vmap": lambda: vectorised,
    }
    if cuda:
        makers["cuBLAS + pointwise, CUDA graph"] = lambda: stepwise(
            product_and_pointwise(compiled(pointwise, cuda=True))
        )
    return makers
