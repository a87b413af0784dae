"""Constraints on a recurrent network, as parametrizations of a swapped `nn.RNN`: each is trained, then checked.

    python examples/constraints.py --output output/

    dale      a unit excites or inhibits all others: every column of W_hh has one sign     W_hh = |V| diag(sign)
    sparse    only some connections exist: the rest of W_hh stays zero                     W_hh = V * mask
    low rank  few directions carry the activity                                            W_hh = L R
    leaky     a rate unit, h_t = tanh((1 - a) h_{t-1} + a (V h_{t-1} + U x_t + b))         W_hh = (1 - a) I + a V

A parametrization computes the weight from what is learnt (`torch.nn.utils.parametrize`); the rollouts see the computed
weight, and its estimated gradient goes on through the parametrization by autograd. The task is copying memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import tasks
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from training import GAIN, loss_of

import anpgpu

WEIGHT = "weight_hh_l0"
"""The recurrent weight, H x H; a column holds what one unit sends out."""

CONNECTED, RANK, LEAK = 0.25, 8, 0.5
"""The share of connections there are, the rank of W_hh, and a."""


class Dale(nn.Module):
    """Gives every column one sign: every other unit is inhibitory."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.register_buffer("sign", 1.0 - 2 * (torch.arange(units) % 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs() * self.sign


class Sparse(nn.Module):
    """Keeps a random share of the connections."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(units, units) < CONNECTED).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class LowRank(nn.Module):
    """Makes a matrix of two factors; `right_inverse` finds those nearest to the first weight."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(weight)
        roots = sizes[:RANK].sqrt()
        return left[:, :RANK] * roots, roots.unsqueeze(1) * right[:RANK]


class Leaky(nn.Module):
    """Lets the state before through: (1 - a) I + a V."""

    def forward(self, weight: Tensor) -> Tensor:
        return (1 - LEAK) * torch.eye(len(weight)) + LEAK * weight


class Scaled(nn.Module):
    """Scales what enters a leaky unit by a."""

    def forward(self, weight: Tensor) -> Tensor:
        return LEAK * weight


def free(rnn: nn.RNN) -> None:
    """Leave the network as it is."""


def dale(rnn: nn.RNN) -> None:
    parametrize.register_parametrization(rnn, WEIGHT, Dale(rnn.hidden_size))


def sparse(rnn: nn.RNN) -> None:
    with torch.no_grad():
        # Fewer connections, each stronger: the spectral radius stays about the same.
        rnn.weight_hh_l0.div_(CONNECTED**0.5)
    parametrize.register_parametrization(rnn, WEIGHT, Sparse(rnn.hidden_size))


def low_rank(rnn: nn.RNN) -> None:
    parametrize.register_parametrization(rnn, WEIGHT, LowRank())


def leaky(rnn: nn.RNN) -> None:
    parametrize.register_parametrization(rnn, WEIGHT, Leaky())
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        parametrize.register_parametrization(rnn, name, Scaled())


def check_dale(rnn: nn.RNN) -> tuple[bool, str]:
    weight, sign = rnn.weight_hh_l0, rnn.parametrizations[WEIGHT][0].sign
    wrong = int((weight * sign < 0).sum())
    return wrong == 0, f"{wrong} of {weight.numel()} weights have the wrong sign"


def check_sparse(rnn: nn.RNN) -> tuple[bool, str]:
    absent = rnn.parametrizations[WEIGHT][0].mask == 0
    wrong = int((rnn.weight_hh_l0[absent] != 0).sum())
    return wrong == 0, f"{wrong} of {int(absent.sum())} absent connections are not zero"


def check_low_rank(rnn: nn.RNN) -> tuple[bool, str]:
    rank = int(torch.linalg.matrix_rank(rnn.weight_hh_l0))
    return rank <= RANK, f"rank {rank} of {rnn.hidden_size}"


def check_leaky(rnn: nn.RNN) -> tuple[bool, str]:
    """Compare with the leaky unit written out."""
    learnt = {name: entry.original for name, entry in rnn.parametrizations.items()}
    inputs = torch.randn(20, 4, rnn.input_size)
    state, largest = torch.zeros(4, rnn.hidden_size), 0.0
    bias = learnt["bias_ih_l0"] + learnt["bias_hh_l0"]
    for values, output in zip(inputs, rnn(inputs)[0], strict=True):
        driven = state @ learnt[WEIGHT].T + values @ learnt["weight_ih_l0"].T + bias
        state = torch.tanh((1 - LEAK) * state + LEAK * driven)
        largest = max(largest, float((state - output).abs().max()))
    return largest < 1e-5, f"differs from the leaky unit by {largest:.0e} at most"


def check_free(rnn: nn.RNN) -> tuple[bool, str]:
    return True, "no constraint"


class Constraint(NamedTuple):
    impose: Callable[[nn.RNN], None]
    """Registers the parametrizations."""
    check: Callable[[nn.RNN], tuple[bool, str]]
    """Returns whether the constraint holds, and what was seen."""


CONSTRAINTS = {
    "none": Constraint(free, check_free),
    "dale": Constraint(dale, check_dale),
    "sparse": Constraint(sparse, check_sparse),
    "low rank": Constraint(low_rank, check_low_rank),
    "leaky": Constraint(leaky, check_leaky),
}


class Result(NamedTuple):
    losses: list[float]
    """Of every update, in nats."""
    holds: bool
    seen: str


def train(name: str, task: tasks.Task, options: argparse.Namespace) -> Result:
    """Train a constrained network on a task, then check the constraint."""
    torch.manual_seed(0)
    constraint = CONSTRAINTS[name]
    rnn, readout = nn.RNN(task.inputs, options.hidden), nn.Linear(options.hidden, task.outputs)
    nn.init.orthogonal_(rnn.weight_hh_l0, GAIN)
    constraint.impose(rnn)
    anpgpu.swap_(rnn, anpgpu.Perturbation(rollouts=options.rollouts))
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.updates)
    losses, batches = [], task.batches(0, options.batch)
    bar = tqdm(range(options.updates), desc=name, disable=options.quiet, leave=False)
    for _ in bar:
        batch = next(batches)
        loss = loss_of(task, readout(rnn(batch.inputs)[0]), batch.targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    with torch.no_grad():
        return Result(losses, *constraint.check(rnn))


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def plot(results: dict[str, Result], path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, result in results.items():
        axis.plot(range(1, len(result.losses) + 1), result.losses, label=name, linewidth=1)
    axis.set(xlabel="updates", ylabel="loss (nats)", title=title)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=int, default=3, help="steps over which the symbols are remembered")
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the plot")
    parser.add_argument("--quick", action="store_true", help="few updates")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    if options.quick:
        options.updates = 40
    task = tasks.copying(options.delay)
    results = {name: train(name, task, options) for name in CONSTRAINTS}
    share = max(1, options.updates // 10)
    tqdm.write(f"{task.name}: training loss in nats, mean of the first and last {share} of {options.updates} updates\n")
    tqdm.write(f"{'constraint':12s}{'first':>8s}{'last':>8s}  holds")
    for name, result in results.items():
        first, last = mean(result.losses[:share]), mean(result.losses[-share:])
        tqdm.write(f"{name:12s}{first:8.3f}{last:8.3f}  {'yes' if result.holds else 'NO'}: {result.seen}")
    options.output.mkdir(parents=True, exist_ok=True)
    plot(results, options.output / "constraints.png", task.name)
    if not all(result.holds for result in results.values()):
        raise SystemExit("a constraint does not hold")


if __name__ == "__main__":
    main()
