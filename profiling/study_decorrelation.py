"""Does decorrelation decorrelate, and does it help each method to learn?

    python profiling/study_decorrelation.py [--output FILE]

Task: Mackey-Glass (tau = 17, reservoirpy's generator), the value 15 steps ahead from the present one, in windows of a
training part cut into lanes; the state is carried from window to window. Two questions, both on held-out data:

1. W fixed, D learns: the mean squared correlation (Pearson's) between units, of D h, which W_hh sees, and of h.
2. W learns by each method with Adam, without D and with D. Both choose their learning rate from the same grid, on a
   validation part with a seed of its own; the error is that of other seeds on a test part, over the variance of the
   targets.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gate import estimate_check, require
from machine import line, machine, short_name
from report import table, write
from torch import Tensor, nn
from tqdm import tqdm

import anpgpu
from anpgpu.decorrelation import Decorrelation, squared_correlation

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("bptt", "np", "wp", "anp", "anp-ls")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
AHEAD, LANES, STEPS, HIDDEN, WASHOUT = 15, 8, 50, 64, 100
TRAIN, HELD_OUT = 10_000, 2_000
GAIN = 0.95
"""Gain of the initial, orthogonal W_hh: torch's default contracts so fast that all units just follow the input."""

DISCOUNT, RIDGE = 0.9, 0.1


class Data(NamedTuple):
    """Inputs and the values 15 steps later, (time, lanes, 1)."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Data:
    """Return the task, standardised by its training part; validation and test parts follow it in time."""
    from reservoirpy.datasets import mackey_glass

    series = mackey_glass(TRAIN + 2 * HELD_OUT + AHEAD, tau=17, seed=0)[:, 0]
    series = torch.from_numpy((series - series[:TRAIN].mean()) / series[:TRAIN].std()).float()
    parts = []
    for first, count, lanes in ((0, TRAIN, LANES), (TRAIN, HELD_OUT, 1), (TRAIN + HELD_OUT, HELD_OUT, 1)):
        both = (series[first : first + count], series[first + AHEAD : first + AHEAD + count])
        parts.append(tuple(values.view(lanes, -1).t().unsqueeze(-1) for values in both))
    return Data(*parts)


def network(seed: int, rule: anpgpu.Perturbation | None = None) -> tuple[anpgpu.RNN, nn.Linear]:
    """Return an untrained network and its readout."""
    torch.manual_seed(seed)
    rnn = anpgpu.RNN(1, HIDDEN, perturbation=rule)
    nn.init.orthogonal_(rnn.weight_hh_l0, GAIN)
    return rnn, nn.Linear(HIDDEN, 1)


def window(values: Tensor, number: int) -> slice:
    """Return the steps of an update's window; after the last window the sequence starts again."""
    first = number % (len(values) // STEPS) * STEPS
    return slice(first, first + STEPS)


@torch.no_grad()
def correlations(rnn: anpgpu.RNN, matrix: Tensor | None, inputs: Tensor) -> dict[str, float]:
    """Return the squared correlations of h and of D h, and the power of D h over that of h."""
    hidden = rnn(inputs)[0][WASHOUT:]
    seen = hidden if matrix is None else hidden @ matrix.t()
    return {
        "corr^2 of h": float(squared_correlation(hidden)),
        "corr^2 of D h": float(squared_correlation(seen)),
        "power of D h / h": float(seen.square().mean() / hidden.square().mean()),
    }


@torch.no_grad()
def with_fixed_weights(data: Data, rate: float, seed: int, checkpoints: list[int]) -> list[dict[str, object]]:
    """Return the correlations at the checkpoints while only D learns."""
    rnn, _ = network(seed)
    decorrelation = Decorrelation(rnn, rate=rate)
    values, rows, state = data.train[0], [], None
    for update in tqdm(range(max(checkpoints)), desc=f"D alone, rate {rate:g}, seed {seed}", leave=False):
        inputs = values[window(values, update)]
        state = None if window(values, update).start == 0 else state
        decorrelation.update_(inputs, state)
        state = rnn(inputs, state)[1]
        if update + 1 in checkpoints:
            measured = correlations(rnn, decorrelation.matrices["weight_hh_l0"], data.test[0])
            lowered = measured["corr^2 of h"] / measured["corr^2 of D h"]
            rows.append({"rate": rate, "seed": seed, "updates": update + 1, **measured, "lowered": lowered})
    return rows


def train(
    data: Data, method: str, decorrelation_rate: float | None, lr: float, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Return errors and correlations after training; where it diverged, infinite errors alone."""
    how = anpgpu.Perturbation(method, rollouts=options.rollouts, discount=DISCOUNT, ridge=RIDGE)
    rnn, readout = network(seed, how)
    decorrelation = None if decorrelation_rate is None else Decorrelation(rnn, readout, rate=decorrelation_rate)
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=lr)
    state = None
    diverged = {"valid": math.inf, "test": math.inf}
    for update in range(options.updates):
        steps = window(data.train[0], update)
        inputs, targets = (values[steps] for values in data.train)
        before = None if steps.start == 0 else state
        optimiser.zero_grad()
        try:
            estimate = anpgpu.estimate_grad_(rnn, readout, inputs, targets, hx=before)
            optimiser.step()
            if decorrelation is not None:
                decorrelation.update_(inputs, before)
        except RuntimeError as error:
            tqdm.write(f"{method}, D {decorrelation_rate}, lr {lr:g}, seed {seed}: update {update}: {error}")
            return diverged
        state = estimate.h_n
    matrix = None if decorrelation is None else decorrelation.matrices["weight_hh_l0"]
    errors = {name: error_of(rnn, readout, *getattr(data, name)) for name in ("valid", "test")}
    return {**errors, **correlations(rnn, matrix, data.test[0])} if math.isfinite(errors["test"]) else diverged


@torch.no_grad()
def error_of(rnn: anpgpu.RNN, readout: nn.Linear, inputs: Tensor, targets: Tensor) -> float:
    """Return the mean squared error over the variance of the targets."""
    outputs = readout(rnn(inputs)[0])
    return float((outputs - targets)[WASHOUT:].square().mean() / targets[WASHOUT:].var())


def rows_of_method(data: Data, method: str, options: argparse.Namespace, bar: tqdm) -> list[dict[str, object]]:
    """Return the results of one method, without decorrelation and at each of its rates."""
    rows = []
    for rate in (None, *options.training_rates):
        errors = []
        for lr in LEARNING_RATES:
            errors.append(train(data, method, rate, lr, TUNING_SEED, options)["valid"])
            bar.update()
        lr = LEARNING_RATES[int(np.argmin(errors))]
        runs = []
        for seed in range(options.seeds):
            runs.append(train(data, method, rate, lr, seed, options))
            bar.update()
        tests = [run["test"] for run in runs]
        last = [run for run in runs if "corr^2 of h" in run]
        rows.append(
            {
                "method": method,
                "D rate": "none" if rate is None else f"{rate:g}",
                "lr": lr,
                "test error": float(np.mean(tests)),
                "lowest": min(tests),
                "highest": max(tests),
                **{
                    name: float(np.mean([run[name] for run in last])) if last else None
                    for name in ("corr^2 of h", "corr^2 of D h", "power of D h / h")
                },
                "diverged": len(runs) - len(last),
            }
        )
    return rows


def verdict(rows: list[dict[str, object]]) -> str:
    """Return one sentence per method: does decorrelation help, by more than the spread over seeds?"""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        plain, *others = [row for row in rows if row["method"] == method]
        best = min(others, key=lambda row: row["test error"])
        if best["highest"] < plain["lowest"]:
            says = "helps: every seed with it is better than every seed without"
        elif best["lowest"] > plain["highest"]:
            says = "hurts: every seed with it is worse than every seed without"
        else:
            says = "makes no difference beyond the spread over seeds"
        lines.append(f"{method}: decorrelation {says} ({best['test error']:.3g} against {plain['test error']:.3g}).")
    return "\n".join(lines)


def plot(alone: list[dict[str, object]], trained: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for colour, rate in enumerate(dict.fromkeys(row["rate"] for row in alone)):
        for seed in dict.fromkeys(row["seed"] for row in alone):
            mine = [row for row in alone if row["rate"] == rate and row["seed"] == seed]
            label = f"rate {rate:g}" if seed == 0 else None
            updates = [row["updates"] for row in mine]
            left.plot(updates, [row["lowered"] for row in mine], "o-", color=f"C{colour}", label=label)
    left.axhline(10, color="grey", linestyle=":")
    left.set(xlabel="updates of D", ylabel="squared correlation of h over that of D h", yscale="log")
    left.legend()
    methods = list(dict.fromkeys(row["method"] for row in trained))
    kinds = list(dict.fromkeys(row["D rate"] for row in trained))
    for index, kind in enumerate(kinds):
        mine = [row for row in trained if row["D rate"] == kind]
        mean = np.array([row["test error"] for row in mine])
        spread = np.abs(np.array([[row["lowest"] for row in mine], [row["highest"] for row in mine]]) - mean)
        where = np.arange(len(methods)) + (index - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        label = "without" if kind == "none" else f"with, rate {kind}"
        right.bar(where, mean, 0.8 / len(kinds), yerr=spread, capsize=3, label=label)
    right.set(ylabel="test error / variance", yscale="log", xticks=range(len(methods)), xticklabels=methods)
    right.legend()
    figure.suptitle(f"Mackey-Glass, {AHEAD} steps ahead, H = {HIDDEN}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: results/decorrelation-<machine>-<date>.json")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300, help="updates of training")
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2], help="of D, W fixed")
    parser.add_argument("--training-rates", type=float, nargs="+", default=[0.01], help="of D, W learning")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[100, 300, 1000, 2000], help="updates of D")
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = machine()
    output = options.output or RESULTS / f"decorrelation-{short_name(host)}-{host['date']}.json"
    print(line(host), flush=True)
    record: dict[str, object] = {"machine": host, "checks": require([estimate_check()])}
    data = load()
    jobs = [(rate, seed) for rate in options.rates for seed in range(options.seeds)]
    alone = [row for rate, seed in jobs for row in with_fixed_weights(data, rate, seed, options.checkpoints)]
    record["fixed weights"] = alone
    tqdm.write(f"\n{table(alone)}\n")
    trained: list[dict[str, object]] = []
    runs_of_method = (1 + len(options.training_rates)) * (len(LEARNING_RATES) + options.seeds)
    with tqdm(total=len(options.methods) * runs_of_method, unit="run") as bar:
        for method in options.methods:
            bar.set_description(method)
            trained += rows_of_method(data, method, options, bar)
    inputs, targets = data.test
    persistence = float((inputs - targets).square().mean() / targets.var())
    says = f"{verdict(trained)}\nThe present value as the prediction has the error {persistence:.3g}."
    record |= {"trained": trained, "persistence": persistence, "says": says.splitlines()}
    record["options"] = {name: value for name, value in vars(options).items() if name != "output"}
    how = (
        f"{options.updates} updates, {options.rollouts} rollouts, {options.seeds} seeds; persistence {persistence:.3g}"
    )
    print(f"{table(trained)}\n{how}\n\n{says}")
    write(output, record, f"{line(host)}\n\nD alone, W fixed\n{table(alone)}\n\n{how}\n{table(trained)}\n\n{says}")
    plot(alone, trained, output.with_suffix(".png"))
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
