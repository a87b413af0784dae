"""How long does one update take here, and in everything one could use instead, on one machine in one run?

    python profiling/compare.py [--shapes published,small] [--peers ours,bptt] [--published CHECKOUT] [--output FILE]

Every peer does the same work on the same data: an update from P rollouts of each of B samples over T steps, or one of
true BPTT of the B samples. Results are checked before anything is timed: other ANP updates against ours at the same
noise, ours against a float64 estimate and autograd, BPTT against autograd in float64, EGGROLL against dense matrices. A
wrong result stops the program. Peers take turns; figures are medians with quartiles.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import compare_eggroll as eggroll
import torch
from cases import CPU_SHAPES, MIB, QUICK_SHAPES, SHAPES, Case, named_shapes
from compare_kernels import Work
from compare_peers import (
    SIGMA,
    Task,
    anp_peers,
    anp_update,
    bptt,
    captured,
    ours,
    ours_backward,
    task_of,
)
from compare_published import published_update
from gate import Check, estimate_check, require
from machine import line, machine, short_name
from report import CLOCKS, interleaved, quartiles, seconds, table, write
from torch import Tensor

from anpgpu import functional
from anpgpu.runtime.settings import new_seed

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")

GATE = Case(time=6, batch=3, rollouts=8, hidden=20, inputs=3, outputs=2)
NARROW_GATE = GATE._replace(rollouts=64, hidden=64)
BOUNDS = {"cpu": 1e-4, "cuda": 3e-2}
"""Largest relative error of a gradient: float32 operands, or bf16's on a GPU, which round by 2^-9 once a step."""

BPTT_BOUNDS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 3e-2}
EGGROLL_BOUND = 1e-3


class Peer(NamedTuple):
    """Something that makes one update."""

    make: Callable[[Task], Work]
    steps: Callable[[Case], int | None]
    """Rollout-steps of one update; None for BPTT, which has no rollouts."""
    checks: Callable[[torch.device], Iterable[Check]]
    """What must hold before it is timed."""


def rollout_steps(case: Case) -> int:
    return case.rollout_steps


def one_rollout(case: Case) -> int:
    return case.time * case.batch


def no_rollouts(case: Case) -> None:
    """Return None: BPTT has no rollouts."""


def error(estimates: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative error of a gradient."""
    pairs = [(left.double().cpu(), right.double().cpu()) for left, right in zip(estimates, exact, strict=True)]
    return max(float((left - right).norm() / right.norm()) for left, right in pairs)


@functools.cache
def exact_update() -> tuple[list[Tensor], Tensor]:
    """Return our gradients of `GATE` in float64 on the CPU, and the noise they came from."""
    generator = torch.Generator().manual_seed(3)
    estimates = [grad.clone() for grad in ours(task_of(GATE, CPU, torch.float64), generator)]
    seed = new_seed(CPU, torch.Generator().manual_seed(3))
    shape = (GATE.time, GATE.batch, GATE.rollouts, GATE.hidden)
    return estimates, functional.noise(seed, shape, sigma=SIGMA, dtype=torch.float64)


def ours_checks(device: torch.device) -> Iterable[Check]:
    """Yield ours against autograd, and against float64 at the same seed."""
    yield estimate_check()
    estimates = ours(task_of(GATE, device), torch.Generator().manual_seed(3))
    yield Check("ours against float64", error(estimates, exact_update()[0]), BOUNDS[device.type], False)


def torch_checks(device: torch.device) -> Iterable[Check]:
    """Yield ours without compiled loops against float64."""
    estimates = ours(task_of(GATE, device), torch.Generator().manual_seed(3), backend="torch")
    yield Check("ours in torch against float64", error(estimates, exact_update()[0]), BOUNDS[device.type], False)


def least_squares_checks(device: torch.device) -> Iterable[Check]:
    """Yield least squares against float64 at the same seed."""
    estimates, exact = (
        [grad.clone() for grad in ours(task_of(GATE, *where), torch.Generator().manual_seed(3), method="anp-ls")]
        for where in ((device,), (CPU, torch.float64))
    )
    yield Check("anp-ls against float64", error(estimates, exact), 10 * BOUNDS[device.type], False)


def narrow_checks(device: torch.device) -> Iterable[Check]:
    """Yield ours with bfloat16 operands against float32, at a size that takes the processor's tiles."""
    task = task_of(NARROW_GATE, device)
    estimates, exact = (
        [grad.clone() for grad in ours(task, torch.Generator().manual_seed(3), precision=precision)]
        for precision in ("bf16", "fp32")
    )
    yield Check("ours with bf16 operands against float32", error(estimates, exact), BOUNDS["cuda"], False)


def backward_checks(device: torch.device) -> Iterable[Check]:
    """Yield `loss.backward()` against `estimate_grad_`: at this sigma the measured loss is nearly linear."""
    task = task_of(GATE, device)
    torch.manual_seed(3)
    through = [grad.clone() for grad in ours_backward(task)]
    torch.manual_seed(3)
    measured = ours(task)
    yield Check("loss.backward() against estimate_grad_", error(through, measured), 3e-2, False)


def anp_checks(name: str, device: torch.device) -> Iterable[Check]:
    """Yield the check of a peer's ANP update against ours in float64, at the same noise."""
    exact, noise = exact_update()
    rollouts = anp_peers(cuda=device.type == "cuda")[name]()
    task = task_of(GATE, device)
    estimates = anp_update(task, rollouts, noise.to(device, task.inputs.dtype))
    yield Check(f"{name} against ours in float64", error(estimates, exact), BOUNDS[device.type], False)


def bptt_checks(precision: str, device: torch.device) -> Iterable[Check]:
    """Yield BPTT against autograd in float64."""
    estimates, exact = bptt(task_of(GATE, device), precision)(), bptt(task_of(GATE, CPU), "fp64")()
    yield Check(f"BPTT {precision} against float64", error(estimates, exact), BPTT_BOUNDS[precision], False)


def eggroll_checks(_device: torch.device) -> Iterable[Check]:
    """Yield EGGROLL against the same estimate from full matrices."""
    for antithetic in (False, True):
        worst = eggroll.error_against_dense(task_of(GATE, CPU), antithetic=antithetic)
        yield Check(f"EGGROLL against dense matrices, antithetic {antithetic}", worst, EGGROLL_BOUND, False)


def peers(device: torch.device, checkout: Path | None) -> dict[str, Peer]:
    """Return all peers that could run on a device, by name; ours first."""
    cuda = device.type == "cuda"
    all_peers = {
        "ours": Peer(lambda task: lambda: ours(task), rollout_steps, ours_checks),
        "ours, loss.backward()": Peer(lambda task: lambda: ours_backward(task), rollout_steps, backward_checks),
    }
    all_peers["ours, anp-ls"] = Peer(
        lambda task: lambda: ours(task, method="anp-ls"), rollout_steps, least_squares_checks
    )
    if not cuda:
        all_peers["ours, without Numba"] = Peer(
            lambda task: lambda: ours(task, backend="torch"), rollout_steps, torch_checks
        )
    if torch.cpu.get_capabilities().get("amx_bf16") and not cuda:
        all_peers["ours, bf16 operands"] = Peer(
            lambda task: lambda: ours(task, precision="bf16"), rollout_steps, narrow_checks
        )
    if cuda:
        all_peers["ours, CUDA graph"] = Peer(
            lambda task: captured(task, lambda: ours(task)), rollout_steps, ours_checks
        )
    for name, make in anp_peers(cuda=cuda).items():
        work = functools.partial(anp_work, make, graph="graph" in name)
        all_peers[name] = Peer(work, rollout_steps, functools.partial(anp_checks, name))
    for precision in ("fp32", "tf32", "fp16") if cuda else ("fp32",):
        name = f"BPTT, {'cuDNN' if cuda else 'nn.RNN'} {precision}"
        work = functools.partial(bptt, precision=precision)
        all_peers[name] = Peer(work, no_rollouts, functools.partial(bptt_checks, precision))
    all_peers["EGGROLL, JAX"] = Peer(eggroll.update, rollout_steps, eggroll_checks)
    if checkout is not None:
        # `published_update` itself checks that an update changes the weights.
        all_peers["published code"] = Peer(
            lambda task: published_update(checkout, task.case, task.device), one_rollout, lambda _: ()
        )
    return all_peers


def anp_work(make: Callable[[], Callable[..., object]], task: Task, *, graph: bool) -> Work:
    """Return the work of an ANP update by one kind of rollouts."""
    rollouts = make()

    def work() -> object:
        return anp_update(task, rollouts)

    return captured(task, work) if graph else work


def waited(work: Work, device: torch.device) -> Work:
    """Return the work followed by a wait for the GPU: torch's CUDA events do not cover what JAX launches."""
    if device.type != "cuda":
        return work

    def run() -> None:
        work()
        torch.cuda.synchronize(device)

    return run


Failure = dict[str, object]


class TooSlowError(RuntimeError):
    """An update took longer than --patience."""


def not_run(failure: Failure) -> str:
    """Return a failure as one line of text."""
    return f"not run: {failure['peer']}, {failure['case'] or 'anywhere'}: {failure['reason']}"


def reason(problem: Exception) -> str:
    """Return the first line of an error: a compiler's message can be pages long."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]


def usable(chosen: dict[str, Peer], device: torch.device) -> tuple[dict[str, Peer], list[Check], list[Failure]]:
    """Return the peers that run on the device, their checks, and the peers that do not run, with the reason."""
    runnable, checks, missing = {}, [], []
    for name, peer in chosen.items():
        obstacle = eggroll.obstacle(device.type) if name.startswith("EGGROLL") else None
        try:
            if obstacle is not None:
                raise RuntimeError(obstacle)
            checks += peer.checks(device)
        except (RuntimeError, ImportError) as problem:
            missing.append({"peer": name, "case": None, "reason": reason(problem)})
        else:
            runnable[name] = peer
    return runnable, checks, missing


def time_case(
    case: Case, chosen: dict[str, Peer], device: torch.device, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], list[Failure]]:
    """Return every peer's seconds, turn by turn, and the peers that could not run or were slower than --patience."""
    works, missing = {}, []
    for name, peer in chosen.items():
        try:
            work = waited(peer.make(task_of(case, device)), device)
            # The first call compiles.
            work()
            taken = seconds(work, CPU, arguments.clock)
            if taken > arguments.patience:
                raise TooSlowError(f"one update took {taken:.3g} s, more than --patience {arguments.patience:g}")
        except RuntimeError as problem:
            missing.append({"peer": name, "case": case._asdict(), "reason": reason(problem)})
            continue
        works[name] = work
    return interleaved(works, arguments.repeats, CPU, warmups=0, clock=arguments.clock), missing


def peak_here(name: str, case: Case, device: torch.device, checkout: Path | None) -> float | None:
    """Return the bytes that one update takes beyond what is held before, in this process, or None where unknown."""
    peer = peers(device, checkout)[name]
    # Starts threads, compilers and libraries.
    peer.make(task_of(Case(4, 2, 4, 8, case.inputs, case.outputs), device))()
    task = task_of(case, device)
    if device.type == "cuda":
        if name.startswith("EGGROLL"):
            return None
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        peer.make(task)()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    # Writing 5 resets the peak to the present resident size.
    reset.write_text("5")
    held = resident("VmRSS")
    peer.make(task)()
    return resident("VmHWM") - held


def resident(field: str) -> float:
    """Return a field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(text.split()[1]) for text in status if text.startswith(f"{field}:"))


def peak(name: str, case: Case, arguments: argparse.Namespace) -> float | None:
    """Return `peak_here` of a process that has done nothing else, or None where it fails."""
    order = json.dumps({"peer": name, "case": list(case)})
    command = [sys.executable, __file__, "--measure", order, "--device", arguments.device]
    command += ["--threads", str(arguments.threads)]
    if arguments.published is not None:
        command += ["--published", str(arguments.published)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if run.returncode else json.loads(run.stdout.splitlines()[-1])


def rows_of(
    shape: str, case: Case, chosen: dict[str, Peer], times: dict[str, list[float]], peaks: dict[str, float | None]
) -> list[dict[str, object]]:
    """Return one row for every peer of a case; ratios are taken turn by turn."""
    rows = []
    for name, durations in times.items():
        taken, steps = quartiles(durations), chosen[name].steps(case)
        mine = times.get("ours")
        slower = None
        if mine is not None:
            slower = quartiles([peer_s / ours_s for peer_s, ours_s in zip(durations, mine, strict=True)]).median
        held = peaks.get(name)
        rows.append(
            {
                "shape": shape,
                "T": case.time,
                "B": case.batch,
                "P": case.rollouts,
                "H": case.hidden,
                "peer": name,
                "ms": 1e3 * taken.median,
                "lower": 1e3 * taken.low,
                "upper": 1e3 * taken.high,
                "rollout-steps/s": None if steps is None else steps / taken.median,
                "GFLOP/s": None if steps is None else 2e-9 * case.hidden**2 * steps / taken.median,
                "time / ours": slower,
                "our steps/s over its": None
                if slower is None or steps is None
                else slower * case.rollout_steps / steps,
                "peak MiB": None if held is None else held / MIB,
            }
        )
    return rows


def plot(rows: list[dict[str, object]], path: Path, heading: str) -> None:
    """Draw every peer's time of an update and its rollout-steps per second, by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(str(row["peer"]) for row in rows))
    groups = list(dict.fromkeys(tuple(row[key] for key in ("shape", *"TBPH")) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for number, name in enumerate(names):
        mine = [row for row in rows if row["peer"] == name]
        # Peers of one case stand side by side, or equal values would hide each other.
        aside = 0.5 * (number / max(1, len(names) - 1) - 0.5)
        places = [groups.index(tuple(row[key] for key in ("shape", *"TBPH"))) + aside for row in mine]
        for axis, key in zip(axes, ("ms", "rollout-steps/s"), strict=True):
            heights = [float("nan") if row[key] is None else float(str(row[key])) for row in mine]
            axis.plot(places, heights, "osD^v<>ph*"[number % 10], color=f"C{number % 10}", label=name)
    labels = [f"{shape}\nT {time}, B {batch}\nP {count}, H {units}" for shape, time, batch, count, units in groups]
    for axis, title in zip(axes, ("one update, ms (lower is better)", "rollout-steps per second"), strict=True):
        axis.set(yscale="log", title=title, xlim=(-0.5, len(groups) - 0.5))
        axis.set_xticks(range(len(groups)), labels, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    handles, entries = axes[0].get_legend_handles_labels()
    figure.legend(handles, entries, loc="outside right upper", fontsize=8)
    figure.suptitle(heading, fontsize=7)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def chosen_peers(known: dict[str, Peer], wanted: str | None) -> dict[str, Peer]:
    """Return the peers whose names begin with one of a comma-separated list.

    Raises:
        ValueError: no peer's name begins with an entry of the list.
    """
    if wanted is None:
        return known
    chosen = {}
    for start in wanted.split(","):
        matching = {name: peer for name, peer in known.items() if name.lower().startswith(start.strip().lower())}
        if not matching:
            raise ValueError(f"no peer begins with {start.strip()!r}: there are {'; '.join(known)}")
        chosen.update(matching)
    return chosen


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    command.add_argument("--shapes", help=f"comma-separated, of {', '.join(SHAPES)}; default: all")
    command.add_argument("--peers", help="beginnings of names, comma-separated; default: all")
    command.add_argument("--published", type=Path, help="a checkout of the published code")
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--patience", type=float, default=30.0, help="seconds that an update may take")
    command.add_argument("--threads", type=int, default=torch.get_num_threads())
    command.add_argument(
        "--clock", default="wall", choices=tuple(CLOCKS), help="cpu: on a busy machine, with --threads 1 --device cpu"
    )
    command.add_argument("--quick", action="store_true", help="one tiny shape")
    command.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process for every figure")
    command.add_argument("--output", type=Path, help="JSON file; default: results/compare-<machine>-<date>.json here")
    command.add_argument("--measure", help=argparse.SUPPRESS)
    return command


def main() -> None:
    command = parser()
    arguments = command.parse_args()
    device = torch.device(arguments.device)
    if arguments.clock == "cpu" and (arguments.threads != 1 or arguments.device != "cpu"):
        command.error("--clock cpu adds up the time of all threads and none of a GPU: use --threads 1 --device cpu")
    torch.set_num_threads(arguments.threads)
    eggroll.prepare(arguments.threads)
    if arguments.measure:
        order = json.loads(arguments.measure)
        print(json.dumps(peak_here(order["peer"], Case(*order["case"]), device, arguments.published)))
        return
    try:
        known = QUICK_SHAPES if arguments.quick else SHAPES if arguments.device == "cuda" else CPU_SHAPES
        shapes = named_shapes(known, arguments.shapes)
        wanted = chosen_peers(peers(device, arguments.published), arguments.peers)
    except ValueError as problem:
        command.error(str(problem))
    host = machine()
    output = arguments.output or RESULTS / f"compare-{short_name(host)}-{host['date']}.json"
    chosen, checks, missing = usable(wanted, device)
    heading = f"{line(host)}\n{arguments.clock} clock"
    print(f"{heading}\n")
    rows: list[dict[str, object]] = []
    record: dict[str, object] = {
        "machine": host,
        "device": device.type,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "clock": arguments.clock,
        "checks": require(checks),
        "results": rows,
        "not_run": missing,
    }
    for shape, cases in shapes.items():
        for case in cases:
            times, failed = time_case(case, chosen, device, arguments)
            missing += failed
            peaks = {} if arguments.no_memory else {name: peak(name, case, arguments) for name in times}
            more = rows_of(shape, case, chosen, times, peaks)
            rows += more
            print(f"{table(more)}\n", flush=True)
            # Rewritten after every case, so that an interrupted run keeps its results.
            notes = [not_run(failure) for failure in missing]
            write(output, record, "\n".join([heading, "", table(rows), "", *notes]))
    for failure in missing:
        print(not_run(failure))
    try:
        plot(rows, output.with_suffix(".png"), heading)
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
