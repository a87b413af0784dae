"""Run every kernel once on small, odd shapes, for compute-sanitizer: `compute-sanitizer --tool memcheck python ...`.

Nothing is compared here; `test_gpu_kernels.py` starts this file and the comparisons are its own.
"""

import argparse
import sys
from pathlib import Path

import torch

# Appended, as in conftest.py: an uninstalled checkout can be imported.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import implementation, least_squares_on

OPS = ("noise", "rollout", "returns", "adjoint", "rollout_adjoint")
SHAPES = ((1, 1, 1, 1, 1), (2, 3, 5, 17, 3), (2, 1, 33, 130, 11))
"""(time, batch, rollouts, hidden, outputs)."""


def losses(time, batch, hidden, outputs, device):
    """Return every kind of loss for a clean run of these shapes."""
    readout = torch.randn(outputs, hidden, device=device)
    weight = torch.rand(time, batch, device=device)
    target = torch.randint(outputs, (time, batch), device=device)
    return (
        LinearLoss(torch.randn(time, batch, hidden, device=device)),
        SquaredLoss(readout, torch.randn(time, batch, outputs, device=device), weight),
        CrossEntropyLoss(readout, torch.randn(time, batch, outputs, device=device).softmax(-1), target, weight),
        OutputsOnly(readout),
        None,
    )


def run(backend, shape, device):
    """Run the ops of one backend."""
    time, batch, rollouts, hidden, outputs = shape
    noise, rollout, returns, adjoint, rollout_adjoint = (implementation(op, backend) for op in OPS)
    seed = torch.tensor(1234, device=device)
    counters = Counters(rollout=3, time=5)
    for kind in ("rademacher", "gaussian"):
        noise(seed, (time, batch, rollouts, hidden), kind=kind, counters=counters)
        for cell in ("tanh", "relu", "gru", "lstm"):
            forms = CELLS[cell].forms
            preact = torch.randn(time, batch, forms.clean * hidden, device=device)
            state = preact.relu() if cell == "relu" else preact[..., : forms.states * hidden].tanh()
            weight_hh = torch.randn(forms.gates * hidden, hidden, device=device) / hidden**0.5
            start = 1e-3 * torch.randn(batch, rollouts, forms.states * hidden, device=device)
            for precision in ("bf16", "fp32"):
                options = RolloutOptions(rollouts, 1e-3, kind, forms, precision, store_delta_a=True)
                for loss in losses(time, batch, hidden, outputs, device):
                    named = {"options": options, "counters": counters, "delta_h0": start}
                    part = rollout(preact, state, weight_hh, loss, seed, **named)
                    if part.delta_loss is None:
                        continue
                    credit = returns(part.delta_loss, 0.9, carry=part.delta_loss[0])
                    activity = part.delta_a[..., :hidden]
                    for weight_by in ("noise", "activity"):
                        rest = {"weight_by": weight_by, "options": options, "counters": counters}
                        adjoint(credit, activity if weight_by == "activity" else None, seed, units=hidden, **rest)
                        rollout_adjoint(preact, state, weight_hh, loss, seed, **rest, delta_h0=start)
                    if not isinstance(loss, LinearLoss):
                        continue
                    # More rollouts than a program inverts, too.
                    for count in (rollouts, 130) if cell == "tanh" and hidden >= 130 else (rollouts,):
                        moved = torch.randn(time, batch, count, hidden, device=device).to(part.delta_a.dtype)
                        least_squares_on(backend)(
                            torch.randn(time, batch, count, device=device),
                            moved,
                            torch.randn(batch, count, device=device),
                            seed,
                            finite=torch.rand(batch, count, device=device) > 0.1,
                            discount=0.9,
                            ridge=0.01,
                            baseline=True,
                            options=options._replace(rollouts=count),
                            counters=counters,
                        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("triton", "cupy"), default="triton")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for shape in SHAPES:
        run(arguments.backend, shape, torch.device(arguments.device))
    if arguments.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
