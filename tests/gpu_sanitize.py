"""Run every kernel on small, odd shapes, for compute-sanitizer: `compute-sanitizer --tool memcheck python ...`.

Nothing is compared here; `test_gpu_kernels.py` starts this file and the comparisons are its own. Most of the time goes
into compiling kernels, so that a shape has every cell with every loss, but not every such pair with every noise and
precision: those come in turns, and the shapes together have them all.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

# Appended, as in conftest.py: an uninstalled checkout can be imported.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import anpgpu
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import cross_entropy_on, implementation, least_squares_on, weight_gradients_on

SHAPES = {
    "least": (1, 1, 1, 1, 1),
    # Several samples in a tile of rows.
    "odd": (2, 3, 5, 17, 3),
    # Units padded to 256, and a second tile of rows with one rollout.
    "padded": (2, 1, 33, 130, 11),
    # Tiles of 64 rows by descriptors that clip.
    "clipped": (3, 2, 48, 520, 10),
    # The same, of two samples each, and more programs than one wave.
    "halves": (2, 136, 32, 512, 5),
}
"""(time, batch, rollouts, hidden, outputs)."""
MORE_ROLLOUTS = {"odd": (20,), "padded": (130, 140)}
"""Of least squares, too: more than units, more than a program inverts, and both."""

LOSSES = ("linear", "squared", "cross-entropy", "outputs alone", "hidden states")
CELL_NAMES = ("tanh", "relu", "gru", "lstm")
PARTS = (*CELL_NAMES, "least squares", "feedback", "clean")
"""What runs of a shape: blocks of rollouts of a cell, the least squares, updates by learned feedback, or what an update
computes beside rollouts."""

NOISES = ("rademacher", "gaussian")
PRECISIONS = ("bf16", "fp32")
WEIGHTS = ("noise", "activity")


class Combination(NamedTuple):
    """What a block of rollouts is made with."""

    loss: str
    noise: str
    precision: str
    weight_by: str
    """What weights the adjoint."""


def combinations(shape, cell):
    """Return what a cell runs of a shape: every loss."""
    turn = tuple(SHAPES).index(shape) + PARTS.index(cell)
    return [
        Combination(
            loss, NOISES[(turn + number) % 2], PRECISIONS[(turn + number) // 2 % 2], WEIGHTS[(turn // 2 + number) % 2]
        )
        for number, loss in enumerate(LOSSES)
    ]


def loss_of(name, time, batch, hidden, outputs, device):
    """Return a loss for a clean run of these shapes."""
    readout = torch.randn(outputs, hidden, device=device)
    values = torch.randn(time, batch, outputs, device=device)
    weight = torch.rand(time, batch, device=device)
    if name == "linear":
        return LinearLoss(torch.randn(time, batch, hidden, device=device))
    if name == "squared":
        return SquaredLoss(readout, values, weight)
    if name == "cross-entropy":
        target = torch.randint(outputs, (time, batch), device=device)
        return CrossEntropyLoss(readout, values.softmax(-1), target, weight)
    return OutputsOnly(readout) if name == "outputs alone" else None


def run_rollouts(backend, shape, cell, device):
    """Run the noise, and blocks of rollouts with what is summed of them."""
    time, batch, rollouts, hidden, outputs = SHAPES[shape]
    noise, rollout, returns, adjoint, rollout_adjoint = (
        implementation(op, backend) for op in ("noise", "rollout", "returns", "adjoint", "rollout_adjoint")
    )
    seed, counters, forms = torch.tensor(1234, device=device), Counters(rollout=3, time=5), CELLS[cell].forms
    for kind in NOISES:
        noise(seed, (time, batch, rollouts, hidden), kind=kind, counters=counters)
    preact = torch.randn(time, batch, forms.clean * hidden, device=device)
    state = preact.relu() if cell == "relu" else preact[..., : forms.states * hidden].tanh()
    weight_hh = torch.randn(forms.gates * hidden, hidden, device=device) / hidden**0.5
    named = {
        "counters": counters,
        "delta_h0": 1e-3 * torch.randn(batch, rollouts, forms.states * hidden, device=device),
    }
    for made in combinations(shape, cell):
        options = RolloutOptions(rollouts, 1e-3, made.noise, forms, made.precision, store_delta_a=True)
        loss = loss_of(made.loss, time, batch, hidden, outputs, device)
        part = rollout(preact, state, weight_hh, loss, seed, options=options, **named)
        if part.delta_loss is None:
            continue
        credit = returns(part.delta_loss, 0.9, carry=part.delta_loss[0])
        activity = part.delta_a[..., :hidden] if made.weight_by == "activity" else None
        rest = {"weight_by": made.weight_by, "options": options}
        adjoint(credit, activity, seed, units=hidden, counters=counters, **rest)
        rollout_adjoint(preact, state, weight_hh, loss, seed, **rest, **named)


def run_least_squares(backend, shape, device):
    """Run the least squares on random activity, some of its rollouts lost."""
    time, batch, rollouts, hidden, _ = SHAPES[shape]
    for precision, kind in zip(PRECISIONS, NOISES, strict=True):
        for count in (rollouts, *MORE_ROLLOUTS.get(shape, ())):
            operand = torch.bfloat16 if precision == "bf16" else torch.float32
            least_squares_on(backend)(
                torch.randn(time, batch, count, device=device),
                torch.randn(time, batch, count, hidden, device=device).to(operand),
                torch.randn(batch, count, device=device),
                torch.tensor(1234, device=device),
                finite=torch.rand(batch, count, device=device) > 0.1,
                discount=0.9,
                ridge=0.01,
                baseline=True,
                options=RolloutOptions(count, 1e-3, kind, CELLS["tanh"].forms, precision, store_delta_a=True),
                counters=Counters(rollout=3, time=5),
                halves=count <= hidden,
            )


def run_feedback(backend, shape, device):
    """Run updates by learned feedback, of which its recursion and its inverses have no op."""
    time, batch, rollouts, hidden, outputs = SHAPES[shape]
    rnn, readout = anpgpu.RNN(outputs, hidden, device=device), nn.Linear(hidden, outputs, device=device)
    inputs, targets = (torch.randn(time, batch, outputs, device=device) for _ in range(2))
    for kind, precision in zip(NOISES, PRECISIONS, strict=True):
        how = anpgpu.Perturbation("anp-feedback", rollouts, noise=kind, precision=precision, backend=backend, warmup=0)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=how)


def run_clean(backend, shape, device):
    """Run weight gradients, of two weights and added to earlier ones, and cross-entropy at the clean outputs."""
    time, batch, _, hidden, outputs = SHAPES[shape]
    halves, states = torch.randn(2, time, batch, hidden, device=device), torch.randn(time, batch, hidden, device=device)
    inputs = torch.randn(batch, time, outputs, device=device).transpose(0, 1)
    for precision in PRECISIONS:
        products = weight_gradients_on(backend, precision)
        products(halves, (inputs, states), products(halves, (inputs, states)))
    targets, weight = (
        torch.randint(outputs, (time, batch), device=device),
        torch.rand(time, batch, device=device).double(),
    )
    cross_entropy_on(backend)(torch.randn(time, batch, outputs, device=device), targets, weight, ignore_index=-100)


def run(backend, shape, part, device):
    """Run a part of a shape on one backend."""
    torch.manual_seed(0)
    if part == "least squares":
        run_least_squares(backend, shape, device)
    elif part == "feedback":
        run_feedback(backend, shape, device)
    elif part == "clean":
        run_clean(backend, shape, device)
    else:
        run_rollouts(backend, shape, part, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("triton", "cupy", "torch"), default="triton")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    for shape, part in itertools.product(arguments.shapes, arguments.parts):
        run(arguments.backend, shape, part, torch.device(arguments.device))
    if arguments.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
