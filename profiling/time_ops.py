"""How fast is every op, beside the peak of the hardware and beside what a user would write in plain PyTorch?

    python profiling/time_ops.py [--quick] [--hidden 128,500] [--rows 16384] [--output FILE]

Correctness is checked first; on wrong results nothing is timed. Operations are 2 H^2 per rollout and step, never noise;
the ceiling is a large matrix product in the same run. Without a GPU the CPU form runs: small shapes.
The result file is rewritten after every case, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import cases
import torch
from cases import Case
from compare_kernels import Clean, Work, backpropagation, graphed, rollouts_of
from gate import Check, cosine, estimate_check, require, rollout_check
from machine import line, machine, short_name
from report import Quartiles, interleaved, quartiles, table, write
from torch import nn

import anpgpu
from anpgpu import functional
from anpgpu.runtime.dispatch import choose_backend, weight_gradients_on

SIGMA = 1e-3
RESULTS = Path(__file__).resolve().parent / "results"
GATE_HIDDEN = {"cuda": (64, 128, 500, 1024), "cpu": (64, 100)}
UPDATES = {
    "update": {"method": "anp"},
    "update, discount 0": {"method": "anp", "discount": 0.0},
    "update, np": {"method": "np"},
}
COLUMNS = ("op", "T", "B", "P", "H", "ms", "lower", "upper", "rollout-steps/s", "TFLOP/s", "of ceiling", "rollout / it")


def ceiling(device: torch.device, repeats: int, *, quick: bool) -> dict[str, object]:
    """Return the speed of a large matrix product on random data: bf16 on a GPU, float32 on a CPU."""
    size = 8192 if device.type == "cuda" else 512 if quick else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"matmul": lambda: left @ right}, repeats, device, warmups=3)["matmul"]
    speeds = quartiles([2 * size**3 / taken / 1e12 for taken in times])
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "tflops": speeds}


def update_check(hidden: int, device: torch.device) -> Check:
    """Compare an update on this device with the reference on the CPU, at the same seed."""
    gradients = {}
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        rnn, readout = anpgpu.RNN(3, hidden), nn.Linear(hidden, 2)
        inputs, targets = torch.randn(6, 2, 3), torch.randn(6, 2, 2)
        rnn, readout = rnn.to(where), readout.to(where)
        rule = anpgpu.Perturbation(method="anp", rollouts=64, sigma=SIGMA)
        # A CUDA generator would draw another seed, so both draw it on the CPU.
        generator = torch.Generator().manual_seed(5)
        anpgpu.estimate_grad_(rnn, readout, inputs.to(where), targets.to(where), perturbation=rule, generator=generator)
        gradients[where] = [parameter.grad for parameter in rnn.parameters()]
    reference = [gradient for gradient in gradients[torch.device("cpu")] if gradient is not None]
    return Check(
        f"H = {hidden}: update against the reference: cosine", cosine(gradients[device], reference), 0.999, True
    )


def checks(device: torch.device, backend: str) -> list[Check]:
    """Return the checks that must pass before anything is timed."""
    all_checks = [estimate_check()]
    for hidden in GATE_HIDDEN[device.type]:
        all_checks += rollout_check(hidden, device, backend)
        all_checks.append(update_check(hidden, device))
    return all_checks


def clean_activity(case: Case, device: torch.device) -> Clean:
    """Return random clean activity that is neither zero nor saturated: those would run faster."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    preact = randn(case.time, case.batch, case.hidden) / 2
    weight = randn(case.hidden, case.hidden) / case.hidden**0.5
    return Clean(preact, preact.tanh(), randn(*preact.shape) / preact.numel(), weight, case.rollouts, SIGMA)


def our_ops(case: Case, clean: Clean, backend: str) -> Iterable[tuple[str, Callable[[], Work]]]:
    """Yield the name and the maker of every op's work; the maker allocates the op's tensors."""
    device = clean.weight.device
    seed = torch.tensor(7, device=device)
    options = {"rollouts": case.rollouts, "sigma": SIGMA, "backend": backend}
    loss = functional.LinearLoss(clean.grad)

    def noise() -> Work:
        shape = (case.time, case.batch, case.rollouts, case.hidden)
        dtype = clean.operand
        return lambda: functional.noise(seed, shape, sigma=SIGMA, dtype=dtype, backend=backend)

    def rollout(**more: object) -> Work:
        return lambda: functional.rollout(clean.preact, clean.hidden, clean.weight, loss, seed, **options, **more)

    def adjoint() -> Work:
        run = functional.rollout(clean.preact, clean.hidden, clean.weight, loss, seed, **options)
        credit = functional.returns(run.delta_loss, 0.9, backend=backend)
        return lambda: functional.adjoint(credit, run.delta_a, seed, sigma=SIGMA, backend=backend)

    def weight_gradients(precision: str) -> Work:
        # Of a layer's two halves of rollouts, for W_ih, W_hh and their bias.
        halves = torch.stack((clean.grad, clean.grad))
        inputs = torch.randn(case.time, case.batch, case.inputs, device=device)
        products = weight_gradients_on(choose_backend(backend, device, torch.float32), precision)
        return lambda: products(halves, (inputs, clean.hidden))

    yield "noise", noise
    yield "rollout", rollout
    yield "rollout, delta_a not stored", lambda: rollout(store_delta_a=False)
    yield "rollout, gaussian", lambda: rollout(noise="gaussian")
    if device.type == "cuda":
        yield "rollout, CUDA graph", lambda: graphed(rollout())
    yield "adjoint", adjoint
    for name, precision in (("weight gradients", "tf32"), ("weight gradients, fp32", "fp32")):
        yield name, lambda precision=precision: weight_gradients(precision)
    for name, rule in UPDATES.items():
        yield name, lambda rule=rule: update(case, device, backend, **rule)
    if device.type == "cuda":
        yield "update, CUDA graph", lambda: graphed(update(case, device, backend, method="anp"))


def update(case: Case, device: torch.device, backend: str, **rule: object) -> Work:
    """Return a complete update by `estimate_grad_`: clean run, rollouts, credit, reduction, all gradients."""
    torch.manual_seed(0)
    memory = torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else None
    perturbation = anpgpu.Perturbation(rollouts=case.rollouts, sigma=SIGMA, backend=backend, max_memory=memory, **rule)
    rnn = anpgpu.RNN(case.inputs, case.hidden, perturbation=perturbation, device=device)
    readout = nn.Linear(case.hidden, case.outputs, device=device)
    inputs = torch.randn(case.time, case.batch, case.inputs, device=device)
    targets = torch.randn(case.time, case.batch, case.outputs, device=device)

    def run() -> None:
        rnn.zero_grad()
        readout.zero_grad()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)

    return run


def row_of(name: str, case: Case, times: Quartiles, peak: float, rollout_s: float | None) -> dict[str, object]:
    """Return one row of the table; only ops with the recurrent products have a TFLOP/s."""
    multiplies = name.partition(",")[0] not in {"noise", "adjoint", "weight gradients"} and not name.startswith("BPTT")
    tflops = case.flops / times.median / 1e12 if multiplies else None
    steps = None if name.startswith("BPTT") else case.rollout_steps / times.median
    milliseconds = [1e3 * taken for taken in (times.median, times.low, times.high)]
    share = rollout_s / times.median if multiplies and rollout_s is not None else None
    figures = (*milliseconds, steps, tflops, None if tflops is None else tflops / peak, share)
    shape = (case.time, case.batch, case.rollouts, case.hidden)
    return dict(zip(COLUMNS, (name, *shape, *figures), strict=True))


def time_case(
    case: Case, device: torch.device, backend: str, repeats: int, peak: float, *, with_baselines: bool
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Return the rows of one case, and the works that could not run, with the reason."""
    clean = clean_activity(case, device)
    works = list(our_ops(case, clean, backend))
    if with_baselines:
        works += rollouts_of(clean)
        works.append(("BPTT of the same B", lambda: _bptt(case, case.batch, clean)))
        works.append(("BPTT of B P sequences", lambda: _bptt(case, case.rows, clean)))
    rows, failed = [], []
    rollout_s = None
    for name, make in works:
        try:
            times = quartiles(interleaved({name: make()}, repeats, device, warmups=2)[name])
        except RuntimeError as error:
            # A graph that cannot be captured, or a baseline out of memory, does not stop the other rows.
            failed.append({"op": name, "case": case._asdict(), "error": str(error).splitlines()[0]})
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        rollout_s = times.median if name == "rollout" else rollout_s
        rows.append(row_of(name, case, times, peak, rollout_s))
    return rows, failed


def _bptt(case: Case, batch: int, clean: Clean) -> Work:
    return backpropagation(case.time, batch, case.hidden, case.inputs, clean.weight)


def chosen_cases(device: torch.device, arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for."""
    if device.type == "cuda":
        if arguments.quick:
            return list(cases.CUDA_QUICK)
        return cases.gpu_cases(arguments.hidden or cases.HIDDEN, arguments.rows or cases.ROWS)
    return [
        case
        for case in (cases.CPU_QUICK if arguments.quick else cases.CPU)
        if not arguments.hidden or case.hidden in arguments.hidden
    ]


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list."""
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: results/time_ops-<gpu>-<date>.json here")
    parser.add_argument("--quick", action="store_true", help="few small shapes, few repeats")
    parser.add_argument("--hidden", type=numbers, help="hidden units, comma-separated")
    parser.add_argument("--rows", type=numbers, help="B P, comma-separated (GPU form)")
    parser.add_argument("--baselines", type=numbers, help="hidden units at which baselines are timed; default: all")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "cupy", "numba", "torch"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = arguments.repeats or (3 if arguments.quick else 11)
    host = machine()
    output = arguments.output or RESULTS / f"time_ops-{short_name(host)}-{host['date']}.json"
    form = "GPU form" if device.type == "cuda" else "CPU form, no GPU was found: small shapes"
    print(f"{line(host)}\n{form}\n")
    record: dict[str, object] = {"machine": host, "form": device.type, "quick": arguments.quick, "repeats": repeats}
    record["backend"] = arguments.backend
    record["checks"] = require(checks(device, arguments.backend))
    record["ceiling"] = top = ceiling(device, repeats, quick=arguments.quick)
    assert isinstance(top["tflops"], Quartiles)
    peak = top["tflops"].median
    rows: list[dict[str, object]] = []
    failed: list[dict[str, object]] = []
    record["results"], record["not_run"] = rows, failed
    for case in chosen_cases(device, arguments):
        wanted = arguments.baselines is None or case.hidden in arguments.baselines
        with_baselines = wanted and (device.type == "cpu" or arguments.quick or case.rows == cases.BASELINE_ROWS)
        more, missing = time_case(case, device, arguments.backend, repeats, peak, with_baselines=with_baselines)
        rows += more
        failed += missing
        print(table(more), flush=True)
        for failure in missing:
            print(f"not run: {failure['op']}: {failure['error']}", flush=True)
        print()
        heading = f"{line(host)}\n{form}\nceiling {peak:.3g} TFLOP/s ({top['dtype']}, {top['size']}^3)"
        write(output, record, f"{heading}\n\n{table(rows)}")
    print(f"ceiling {peak:.3g} TFLOP/s ({top['dtype']}, {top['size']}^3); written to {output.name}")


if __name__ == "__main__":
    main()
