"""How much faster is one update here than in the published research code, and how much of it is the matrix products?

    python profiling/compare_published.py CHECKOUT [--output FILE]

CHECKOUT is a checkout of the published code (on GitHub: jesusgf96/NP_RNNs); it is run, never copied. Its method
`node_perturbation_activity` is called as its own training loop calls it: one clean and one perturbed run of B
sequences, then T weight updates, so B T rollout-steps a call. Ours is a complete ANP update: clean run, P rollouts of
each sample, credit, reduction, gradients of all weights, optimiser step; B P T rollout-steps. All run in turns in one
process with the same number of threads.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from cases import PUBLISHED, PUBLISHED_QUICK, Case
from gate import estimate_check, require
from machine import line, machine
from report import CLOCKS, interleaved, quartiles, table, write
from torch import Tensor, nn

import anpgpu

CPU = torch.device("cpu")
GOALS = {1: 100.0, 32: 6.0}
"""Our rollout-steps per second over the published code's, by batch."""

MATMUL_GOAL = 0.6
LEARNING_RATE = 1e-3
SIGMA = 1e-3


def load(checkout: Path, name: str) -> types.ModuleType:
    """Import one file of the checkout under a name of its own."""
    path = checkout / f"{name}.py"
    if not path.exists():
        sys.exit(f"{path} does not exist: the argument must be a checkout of the published code")
    # Its utils.py imports yaml only to save experiments.
    sys.modules.setdefault("yaml", types.ModuleType("yaml"))
    spec = importlib.util.spec_from_file_location(f"published_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_task(case: Case) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of the copy task, (T, B, 10): random bits, then the same bits after a delay."""
    generator = torch.Generator().manual_seed(0)
    length = case.time * 10 // 21
    bits = torch.randint(0, 2, (length, case.batch, case.inputs), generator=generator).float()
    inputs, targets = torch.zeros(2, case.time, case.batch, case.inputs).unbind(0)
    inputs[:length], targets[case.time - length :] = bits, bits
    return inputs, targets


def published_update(checkout: Path, case: Case, device: torch.device = CPU) -> Callable[[], object]:
    """Return a call of the published update, with the settings of the published main.py."""
    models, utils = load(checkout, "models"), load(checkout, "utils")
    sizes = [case.inputs, case.hidden, case.outputs]
    model = models.RNN(sizes, case.batch, utils.tanh(), utils.linear(), decor_input=False, seed=42, device=device)
    model.to(device)
    inputs, targets = (tensor.to(device) for tensor in copy_task(case))
    criterion = nn.MSELoss()
    before = copy.deepcopy(model.state_dict())
    model.node_perturbation_activity(inputs, targets, loss=criterion, lr=LEARNING_RATE, noise_std=SIGMA)
    if all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        sys.exit("the published update left its weights as they were: nothing is timed")

    def update() -> None:
        model.node_perturbation_activity(inputs, targets, loss=criterion, lr=LEARNING_RATE, noise_std=SIGMA)

    return update


def our_updates(case: Case) -> dict[str, Callable[[], object]]:
    """Return a complete update by `estimate_grad_`, and one through `loss.backward()`."""
    torch.manual_seed(0)
    inputs, targets = copy_task(case)
    rule = anpgpu.Perturbation(method="anp", rollouts=case.rollouts, sigma=SIGMA)
    rnn = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule)
    readout = nn.Linear(case.hidden, case.outputs)
    optimizer = torch.optim.SGD([*rnn.parameters(), *readout.parameters()], lr=LEARNING_RATE)

    def forward_only() -> None:
        optimizer.zero_grad()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        optimizer.step()

    def backward() -> None:
        optimizer.zero_grad()
        hidden, _ = rnn(inputs)
        nn.functional.mse_loss(readout(hidden), targets).backward()
        optimizer.step()

    return {"estimate_grad_": forward_only, "loss.backward()": backward}


def matmuls(case: Case) -> Callable[[], object]:
    """Return the recurrent products of one update alone: T times (B P, H) by (H, H), float32."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(case.rows, case.hidden, generator=generator)
    weight = torch.randn(case.hidden, case.hidden, generator=generator) / case.hidden**0.5
    product = torch.empty_like(state)

    def run() -> None:
        for _ in range(case.time):
            torch.mm(state, weight.t(), out=product)

    return run


def compare(checkout: Path, case: Case, repeats: int, clock: str) -> dict[str, object]:
    """Measure one case; figures are quartiles over turns, of ratios too."""
    works = {"published": published_update(checkout, case), **our_updates(case), "matmuls": matmuls(case)}
    times = interleaved(works, repeats, CPU, clock=clock)
    steps = dict.fromkeys(works, case.rollout_steps) | {"published": case.time * case.batch}
    speed = {name: [steps[name] / taken for taken in values] for name, values in times.items()}

    def per_turn(values: list[float], others: list[float]) -> tuple[float, ...]:
        return quartiles([value / other for value, other in zip(values, others, strict=True)])

    ratio = per_turn(speed["estimate_grad_"], speed["published"])
    share = per_turn(times["matmuls"], times["estimate_grad_"])
    goal = GOALS.get(case.batch)
    return {
        "case": case._asdict(),
        "milliseconds": {name: quartiles([1e3 * taken for taken in values]) for name, values in times.items()},
        "rollout_steps_per_second": {name: quartiles(values) for name, values in speed.items()},
        "ratio": ratio,
        "ratio_goal": goal,
        "ratio_met": None if goal is None else ratio[1] >= goal,
        "ratio_backward": per_turn(speed["loss.backward()"], speed["published"]),
        "matmul_share": share,
        "matmul_share_goal": MATMUL_GOAL,
        "matmul_share_met": share[1] >= MATMUL_GOAL,
        "matmul_share_backward": per_turn(times["matmuls"], times["loss.backward()"]),
        "repeats": repeats,
        "clock": clock,
    }


def text_of(results: list[dict[str, object]]) -> str:
    """Return the tables that are printed."""
    rows, verdicts = [], []
    for result in results:
        case, speeds, taken = result["case"], result["rollout_steps_per_second"], result["milliseconds"]
        assert isinstance(case, dict)
        assert isinstance(speeds, dict)
        assert isinstance(taken, dict)
        for name, (low, median, high) in taken.items():
            rows.append(
                {
                    "B": case["batch"],
                    "P": case["rollouts"],
                    "T": case["time"],
                    "H": case["hidden"],
                    "work": name,
                    "ms": median,
                    "lower": low,
                    "upper": high,
                    "rollout-steps/s": speeds[name][1],
                }
            )
        for what, key in (("times the published rollout-steps/s", "ratio"), ("of it is matmuls", "matmul_share")):
            low, median, high = result[key]
            goal, met = result[f"{key}_goal"], result[f"{key}_met"]
            verdict = "no goal" if goal is None else f"goal {goal:g}: {'met' if met else 'MISSED'}"
            backward = result[f"{key}_backward"][1]
            verdicts.append(
                f"B = {case['batch']}: {median:.3g} {what} (quartiles {low:.3g} to {high:.3g}; {verdict}); "
                f"through loss.backward() {backward:.3g}"
            )
    return "\n".join([table(rows), "", *verdicts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of the published code")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .txt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument(
        "--clock", default="wall", choices=tuple(CLOCKS), help="cpu: on a busy machine, with --threads 1"
    )
    arguments = parser.parse_args()
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error(f"--clock cpu adds up the time of all threads: use --threads 1 with it, got {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    record: dict[str, object] = {"machine": machine(), "checks": require([estimate_check()])}
    results = []
    for case in PUBLISHED_QUICK if arguments.quick else PUBLISHED:
        results.append(compare(arguments.checkout, case, arguments.repeats, arguments.clock))
    record["results"] = results
    text = f"{line(machine())}\n{arguments.clock} clock\n\n{text_of(results)}"
    print(text)
    if arguments.output is not None:
        write(arguments.output, record, text)


if __name__ == "__main__":
    main()
