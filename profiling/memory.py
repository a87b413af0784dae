"""How much memory does an update take at its peak, for any T, against the max_memory it was given?

    python profiling/memory.py [--output FILE]

Each figure is the peak resident memory of a fresh process that runs one `estimate_grad_`, minus that of a baseline
process with the same inputs, targets and outputs but no estimate. Both run a tiny estimate first, so that both have
imported everything and started their threads. On a GPU the figure is the peak of the caching allocator over what was
allocated before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import MEMORY, MEMORY_QUICK, MIB, Case
from gate import estimate_check, require
from machine import line, machine
from report import table, write
from torch import nn

import anpgpu

BOUND = 1.25
TINY = Case(time=4, batch=2, rollouts=4, hidden=8)


def estimate(case: Case, max_memory: int | None, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Run one complete update."""
    inputs, targets = tensors
    rule = anpgpu.Perturbation(method="anp", rollouts=case.rollouts, max_memory=max_memory)
    rnn = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule).to(inputs.device)
    readout = nn.Linear(case.hidden, case.outputs, device=inputs.device)
    result = anpgpu.estimate_grad_(rnn, readout, inputs, targets)
    if int(result.skipped):
        raise RuntimeError(f"{int(result.skipped)} rollouts were not finite")


def tensors_of(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs and targets."""
    torch.manual_seed(0)
    inputs = torch.randn(case.time, case.batch, case.inputs, device=device)
    return inputs, torch.randn(case.time, case.batch, case.outputs, device=device)


def peak_in_this_process(case: Case, max_memory: int, device: torch.device, *, baseline: bool) -> dict[str, float]:
    """Return the peak in bytes and the seconds of an update, or of the baseline."""
    tensors = tensors_of(case, device)
    estimate(TINY, None, tensors_of(TINY, device))
    start = time.perf_counter()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if not baseline:
            estimate(case, max_memory, tensors)
        torch.cuda.synchronize()
        outputs = 4 * case.time * case.batch * case.outputs
        peak = outputs if baseline else torch.cuda.max_memory_allocated() - held
    else:
        if baseline:
            # Alive until the peak is read, as the outputs of an estimate are.
            outputs = torch.ones(case.time, case.batch, case.outputs)
            assert outputs.isfinite().all()
        else:
            estimate(case, max_memory, tensors)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(text.split()[1]) for text in status if text.startswith("VmHWM:"))
    return {"bytes": peak, "seconds": time.perf_counter() - start}


def measured(case: Case, max_memory: int, device: str, threads: int, *, baseline: bool) -> dict[str, float]:
    """Return `peak_in_this_process` of a fresh process."""
    order = json.dumps({"case": list(case), "max_memory": max_memory, "baseline": baseline})
    command = [sys.executable, __file__, "--device", device, "--threads", str(threads), "--measure", order]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{case} under max_memory={max_memory} failed:\n{run.stderr}")
    reply: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return reply


def row_of(case: Case, max_memory: int, device: str, threads: int) -> dict[str, object]:
    """Return one row of the table."""
    baseline = measured(case, max_memory, device, threads, baseline=True)
    update = measured(case, max_memory, device, threads, baseline=False)
    used = update["bytes"] - baseline["bytes"]
    return {
        "T": case.time,
        "B": case.batch,
        "P": case.rollouts,
        "H": case.hidden,
        "max_memory MiB": max_memory / MIB,
        "used MiB": used / MIB,
        "used / max_memory": used / max_memory,
        "bound": BOUND,
        "kept": used <= BOUND * max_memory,
        "delta_a whole MiB": 4 * case.rollout_steps * case.hidden / MIB,
        "process MiB": update["bytes"] / MIB,
        "seconds": update["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .txt")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small shapes under 32 MiB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        order = json.loads(arguments.measure)
        case, device = Case(*order["case"]), torch.device(arguments.device)
        print(json.dumps(peak_in_this_process(case, order["max_memory"], device, baseline=order["baseline"])))
        return
    record: dict[str, object] = {"machine": machine(), "checks": require([estimate_check()])}
    rows = []
    for max_memory, cases in (MEMORY_QUICK if arguments.quick else MEMORY).items():
        for case in cases:
            rows.append(row_of(case, max_memory, arguments.device, arguments.threads))
    record["results"] = rows
    text = f"{line(machine())}\n\n{table(rows)}"
    print(text)
    if arguments.output is not None:
        write(arguments.output, record, text)


if __name__ == "__main__":
    main()
