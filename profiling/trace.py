"""Where does an update spend its time? A trace of named ranges, for chrome://tracing or Perfetto, and a table of them.

    python profiling/trace.py [--case T,B,P,H] [--way estimate|backward] [--method anp] [--output FILE]
    profiling/nsys.sh ...     the same updates under Nsight Systems
    profiling/ncu.sh OP ...   the kernels of one op under Nsight Compute

With --capture this script traces nothing: after a warm-up the updates run between cudaProfilerStart and
cudaProfilerStop, for an outside profiler such as Nsight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Case
from compare_kernels import graphed
from gate import estimate_check, require
from machine import line, machine
from report import table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import anpgpu
from anpgpu.runtime.ranges import DOMAIN, RANGES

WARMUPS = 3
OUTPUT = Path(__file__).resolve().parent.parent / "output"


def update_of(case: Case, device: torch.device, way: str, method: str) -> Callable[[], None]:
    """Return a complete update of random data by `estimate_grad_` or `loss.backward()`."""
    torch.manual_seed(0)
    rule = anpgpu.Perturbation(method=method, rollouts=case.rollouts)
    rnn = anpgpu.RNN(case.inputs, case.hidden, perturbation=rule, device=device)
    readout = nn.Linear(case.hidden, case.outputs, device=device)
    inputs = torch.randn(case.time, case.batch, case.inputs, device=device)
    targets = torch.randn(case.time, case.batch, case.outputs, device=device)

    def run() -> None:
        rnn.zero_grad()
        readout.zero_grad()
        if way == "estimate":
            anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        else:
            hidden, _ = rnn(inputs)
            nn.functional.mse_loss(readout(hidden), targets).backward()

    return run


def traced(update: Callable[[], None], device: torch.device, updates: int) -> profile:
    """Return the profile of `updates` updates."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(updates):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return trace


def ranges_of(trace: profile, updates: int) -> list[dict[str, object]]:
    """Return one row for every range: calls per update, time on host and device, and its share of the longest range.

    Ranges nest: those inside `estimate_grad_` or `backward` add up to less than the range around them.
    """
    events = {event.key.removeprefix(f"{DOMAIN}::"): event for event in trace.key_averages()}
    recorded = [events[name] for name in RANGES if name in events]
    longest = max((event.cpu_time_total for event in recorded), default=0.0)
    return [
        {
            "range": event.key.removeprefix(f"{DOMAIN}::"),
            "category": RANGES[event.key.removeprefix(f"{DOMAIN}::")],
            "per update": event.count / updates,
            "host ms": event.cpu_time_total / 1e3 / updates,
            "device ms": event.device_time_total / 1e3 / updates,
            "of the longest": event.cpu_time_total / longest,
        }
        for event in recorded
    ]


def case_of(text: str) -> Case:
    """Return the case of "T,B,P,H".

    Raises:
        argparse.ArgumentTypeError: the text is not of that form.
    """
    parts = text.split(",")
    if len(parts) != 4 or not all(size.strip().isdigit() and int(size) for size in parts):
        raise argparse.ArgumentTypeError(f"a case is T,B,P,H, four positive numbers, got {text!r}")
    return Case(*(int(size) for size in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=case_of, help="T,B,P,H; default 200,32,128,512 on a GPU, 50,4,64,256 on a CPU")
    parser.add_argument("--way", default="estimate", choices=("estimate", "backward"))
    parser.add_argument("--method", default="anp", choices=("anp", "np", "anp-ls", "wp"))
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--graph", action="store_true", help="replay the update as one CUDA graph")
    parser.add_argument("--capture", action="store_true", help="for Nsight: mark the updates, trace nothing here")
    parser.add_argument("--output", type=Path, default=OUTPUT / "trace.json")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (arguments.capture or arguments.graph) and device.type != "cuda":
        parser.error("--capture and --graph need a CUDA device, and there is none")
    case = arguments.case or (Case(200, 32, 128, 512) if device.type == "cuda" else Case(50, 4, 64, 256))
    require([estimate_check()])
    update = update_of(case, device, arguments.way, arguments.method)
    for _ in range(WARMUPS):
        update()
    update = graphed(update) if arguments.graph else update
    if arguments.capture:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        for _ in range(arguments.updates):
            update()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
        return
    trace = traced(update, device, arguments.updates)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(arguments.output))
    shape = f"T {case.time}, B {case.batch}, P {case.rollouts}, H {case.hidden}, {arguments.method}, {arguments.way}"
    print(f"{line(machine())}\n{shape}\n\n{table(ranges_of(trace, arguments.updates))}")
    print(f"\nwritten to {arguments.output.name}: open it at https://ui.perfetto.dev or chrome://tracing")


if __name__ == "__main__":
    main()
