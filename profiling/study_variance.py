"""Which methods of variance reduction pay? Alignment with BPTT at an equal number of rollouts.

    python profiling/study_variance.py [--quick] [--output FILE]

The network copies the symbol of five steps ago (T = 25, B = 8, H = 64, W_hh orthogonal times .9); the figure is the
cosine between the estimate of dW_hh and BPTT's, mean over seeds. All variants have the same total number of rollouts:

    plain         as in the library
    antithetic    rollouts in pairs, xi and -xi
    baseline      the mean over rollouts is subtracted from the return of each step and sample
    half units    each rollout perturbs a random half of the units
    linear cell   the sigma -> 0 limit of the rollout, delta_h = phi'(a) delta_a, at the same sigma in the loss
    readout       independent noise on the outputs too, of the same sigma, as in the published rule

The rollouts are stepped in this file, so that a variant needs no code in the library before it has proved useful.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from gate import Check, require
from machine import line, machine
from report import table, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

TIME, BATCH, HIDDEN, SYMBOLS, DELAY = 25, 8, 64, 10, 5
VARIANTS = ("plain", "antithetic", "baseline", "half units", "linear cell", "readout")
METHODS = {"np": 1.0, "anp": 0.9, "anp-ls": 1.0}
"""Discount of each method."""

RIDGE = 0.1


class Clean(NamedTuple):
    """A network, its clean run, and BPTT's gradient of W_hh; float64."""

    weight_hh: Tensor
    readout: Tensor
    preact: Tensor
    hidden: Tensor
    logits: Tensor
    target: Tensor
    weight: Tensor
    gradient: Tensor


def clean_run(seed: int) -> Clean:
    """Run a network once; autograd gives BPTT's gradient."""
    torch.manual_seed(seed)
    rnn, readout = nn.RNN(SYMBOLS, HIDDEN).double(), nn.Linear(HIDDEN, SYMBOLS).double()
    nn.init.orthogonal_(rnn.weight_hh_l0, 0.9)
    symbols = torch.randint(SYMBOLS, (TIME, BATCH))
    inputs = F.one_hot(symbols, SYMBOLS).double()
    hidden, _ = rnn(inputs)
    logits = readout(hidden)
    target = symbols.roll(DELAY, 0)
    counted = (torch.arange(TIME) >= DELAY).double().unsqueeze(1) / ((TIME - DELAY) * BATCH)
    loss = (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(TIME, BATCH) * counted).sum()
    loss.backward()
    weight_hh, gradient = rnn.weight_hh_l0.detach(), rnn.weight_hh_l0.grad
    assert gradient is not None
    return Clean(
        weight_hh,
        readout.weight.detach(),
        torch.atanh(hidden.detach()),
        hidden.detach(),
        logits.detach(),
        target,
        counted.expand(TIME, BATCH),
        gradient,
    )


def injected(variant: str, rollouts: int, sigma: float) -> Tensor:
    """Return noise, (T, B, P, H)."""
    shape = (TIME, BATCH, rollouts, HIDDEN)
    if variant == "antithetic":
        half = torch.randn(TIME, BATCH, rollouts // 2, HIDDEN).sign()
        return sigma * torch.cat((half, -half), dim=2).double()
    noise = sigma * torch.randn(shape).sign().double()
    if variant == "half units":
        chosen = torch.rand(BATCH, rollouts, HIDDEN).argsort(-1) < HIDDEN // 2
        return noise * chosen
    return noise


def run(clean: Clean, noise: Tensor, variant: str, sigma: float) -> tuple[Tensor, Tensor]:
    """Return loss differences, (T, B, P), and activity differences, (T, B, P, H)."""
    delta_h = torch.zeros_like(noise[0])
    losses, moved = [], []
    log_probs = clean.logits.log_softmax(-1)
    for step in range(TIME):
        delta_a = delta_h @ clean.weight_hh.t() + noise[step]
        hidden = clean.hidden[step].unsqueeze(1)
        if variant == "linear cell":
            delta_h = (1 - hidden**2) * delta_a
        else:
            delta_h = torch.tanh(clean.preact[step].unsqueeze(1) + delta_a) - hidden
        delta_o = delta_h @ clean.readout.t()
        if variant == "readout":
            delta_o = delta_o + sigma * torch.randn_like(delta_o)
        index = clean.target[step].view(-1, 1, 1).expand(-1, delta_o.shape[1], 1)
        perturbed = (clean.logits[step].unsqueeze(1) + delta_o).log_softmax(-1).gather(-1, index).squeeze(-1)
        before = log_probs[step].gather(-1, index[:, 0])
        losses.append((before - perturbed) * clean.weight[step].unsqueeze(-1))
        moved.append(delta_a)
    return torch.stack(losses), torch.stack(moved)


def gradient_of(clean: Clean, method: str, variant: str, rollouts: int, sigma: float) -> Tensor:
    """Return one estimate of dW_hh."""
    noise = injected(variant, rollouts, sigma)
    losses, moved = run(clean, noise, variant, sigma)
    carry = torch.zeros_like(losses[0])
    gradient = torch.zeros_like(clean.weight_hh)
    for step in range(TIME - 1, 0, -1):
        credit = losses[step] + METHODS[method] * carry
        if variant == "baseline":
            credit = credit - credit.mean(-1, keepdim=True)
        carry = credit
        if method == "anp-ls":
            gram = moved[step] @ moved[step].mT
            ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
            system = gram + ridge[:, None, None] * torch.eye(rollouts)
            adjoint = (moved[step].mT @ torch.linalg.solve(system, credit.unsqueeze(-1))).squeeze(-1)
            carry = credit - (noise[step] @ adjoint.unsqueeze(-1)).squeeze(-1)
        elif method == "anp":
            share = credit * HIDDEN / moved[step].square().sum(-1)
            adjoint = (share.unsqueeze(-1) * moved[step]).mean(1)
        else:
            adjoint = (credit.unsqueeze(-1) * noise[step]).mean(1) / sigma**2
        gradient += adjoint.t() @ clean.hidden[step - 1]
    return gradient


def measure(rollouts: int, sigma: float, method: str, seeds: int) -> dict[str, object]:
    """Return the mean cosine of every variant, and the largest of their standard errors."""
    row: dict[str, object] = {"method": method, "rollouts": rollouts, "sigma": sigma}
    widest = 0.0
    for variant in VARIANTS:
        cosines = []
        for seed in range(seeds):
            clean = clean_run(seed)
            estimate = gradient_of(clean, method, variant, rollouts, sigma)
            cosines.append(float(F.cosine_similarity(estimate.flatten(), clean.gradient.flatten(), dim=0)))
        values = torch.tensor(cosines)
        row[variant] = float(values.mean())
        widest = max(widest, float(values.std()) / math.sqrt(seeds))
    return {**row, "+-": widest}


def stepping_check() -> Check:
    """Compare this file's least squares with BPTT, at twice as many rollouts as units."""
    clean = clean_run(0)
    estimate = gradient_of(clean, "anp-ls", "plain", 2 * HIDDEN, 1e-3)
    figure = float(F.cosine_similarity(estimate.flatten(), clean.gradient.flatten(), dim=0))
    return Check("least squares stepped by hand against autograd: cosine", figure, 0.95, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--output", type=Path, help="where the JSON goes; a .txt beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid = [
        (rollouts, sigma, method)
        for method in METHODS
        for rollouts in ((16,) if options.quick else (16, 64))
        for sigma in ((1e-3, 0.3) if options.quick else (1e-3, 0.1, 0.3, 1.0))
    ]
    rows = [measure(*cell, options.seeds) for cell in tqdm(grid, desc="cells")]
    checks = require([stepping_check()])
    record = machine()
    text = f"{line(record)}\n\ncosine to BPTT's dW_hh, mean of {options.seeds} seeds\n\n{table(rows)}"
    print(text)
    if options.output:
        write(options.output, {"machine": record, "checks": checks, "seeds": options.seeds, "rows": rows}, text)


if __name__ == "__main__":
    main()
