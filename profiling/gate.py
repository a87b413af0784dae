"""Small checks that run before anything is timed, each a figure and its bound.

They repeat a few of the tests, so that no speed is printed on a machine where the estimates are wrong.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

import anpgpu
from anpgpu import functional


class Check(NamedTuple):
    """A figure and its bound."""

    name: str
    figure: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        """Whether the figure is within its bound; NaN never is."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


def estimate_check() -> Check:
    """Compare an "np" estimate at discount 1 with autograd; 16,384 rollouts of 8 units leave an error of about 3 %."""
    generator = torch.Generator().manual_seed(0)
    rnn, readout = anpgpu.RNN(3, 8).double(), nn.Linear(8, 2).double()
    with torch.no_grad():
        for parameter in (*rnn.parameters(), *readout.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    inputs = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(6, 2, 2, generator=generator, dtype=torch.float64)
    hidden, _ = nn.RNN.forward(rnn, inputs)
    exact = torch.autograd.grad(nn.functional.mse_loss(readout(hidden), targets), list(rnn.parameters()))
    rule = anpgpu.Perturbation(method="np", rollouts=16_384, sigma=1e-4, discount=1.0)
    anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=rule, generator=generator)
    estimates = [parameter.grad for parameter in rnn.parameters()]
    return Check("np at discount 1 against autograd: cosine", cosine(estimates, exact), 0.98, True)


def cosine(left: list[Tensor | None], right: list[Tensor] | tuple[Tensor, ...]) -> float:
    """Return the cosine between two lists of gradients."""
    first = torch.cat([grad.flatten() for grad in left if grad is not None]).double().cpu()
    second = torch.cat([grad.flatten() for grad in right]).double().cpu()
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def rollout_check(hidden: int, device: torch.device, backend: str) -> list[Check]:
    """Compare noise, rollout, returns and adjoint of one backend with the reference in float64 on the CPU."""
    time, batch, rollouts, sigma = 5, 2, 33, 1e-2
    generator = torch.Generator().manual_seed(hidden)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    preact, grad, weight = randn(time, batch, hidden) / 2, randn(time, batch, hidden), randn(hidden, hidden)
    weight /= hidden**0.5
    exact_noise = functional.noise(7, (time, batch, rollouts, hidden), sigma=sigma)
    found_noise = functional.noise(7, (time, batch, rollouts, hidden), sigma=sigma, device=device, backend=backend)
    options = {"rollouts": rollouts, "sigma": sigma}
    exact = functional.rollout(preact, preact.tanh(), weight, functional.LinearLoss(grad), 7, **options)
    tensors = [tensor.float().to(device) for tensor in (preact, preact.tanh(), weight, grad)]
    measured = functional.rollout(*tensors[:3], functional.LinearLoss(tensors[3]), 7, **options, backend=backend)
    # bf16 rounds operands by 2^-9 of their size in every step.
    bound = 3e-2 if device.type == "cuda" else 1e-4
    checks = [
        Check(f"H = {hidden}: noise, largest error", float((found_noise.cpu() - exact_noise).abs().max()), 1e-6, False),
        Check(f"H = {hidden}: delta_a", relative_error(measured.delta_a, exact.delta_a), bound, False),
        Check(f"H = {hidden}: delta_loss", relative_error(measured.delta_loss, exact.delta_loss), 2 * bound, False),
    ]
    credit = functional.returns(measured.delta_loss, 0.9, backend=backend)
    for method, delta_a in (("anp", measured.delta_a), ("np", None)):
        arguments = {"method": method, "units": hidden, "sigma": sigma}
        sums = functional.adjoint(credit, delta_a, 7, **arguments, backend=backend)
        expected = functional.adjoint(
            functional.returns(measured.delta_loss.double().cpu(), 0.9),
            None if delta_a is None else delta_a.double().cpu(),
            7,
            **arguments,
        )
        checks.append(Check(f"H = {hidden}: {method} adjoint", relative_error(sums, expected), 1e-4, False))
    return checks


def relative_error(measured: Tensor | None, exact: Tensor | None) -> float:
    """Return |measured - exact| / |exact|, Euclidean norms in float64."""
    assert measured is not None
    assert exact is not None
    difference = measured.double().cpu() - exact.double().cpu()
    return float(difference.norm() / exact.double().cpu().norm())


def require(checks: list[Check]) -> list[dict[str, object]]:
    """Return the checks as records, or end the program if any fails."""
    failed = [check for check in checks if not check.passed]
    for check in failed:
        wanted = "at least" if check.at_least else "at most"
        print(f"{check.name} is {check.figure:.4g}, must be {wanted} {check.bound:g}", file=sys.stderr)
    if failed:
        sys.exit("wrong results: nothing is timed")
    return [check._asdict() for check in checks]
