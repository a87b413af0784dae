"""Which of the machine's limits binds each kernel, and how near to it is it?

    python profiling/roofline.py [--hidden 128,500] [--rows 16384] [--device cpu] [--output FILE]

Ceilings are measured in the same run: large matrix products in every operand type, a copy, and tanh alone (on a GPU a
chain of tanh.approx in registers, on a CPU torch.tanh in the first-level cache). A kernel has three bounds; the largest
binds, and its share of the measured time says how near the kernel is to it:

    tensor     2 H^2 per rollout and step, over the product's rate in the operands' type
    special    tanh and its division per unit, rollout and step (a CPU: tanh alone), over tanh's rate
    bandwidth  bytes of delta_a or noise written or read, and of the clean activity, over the copy's rate

Time that no bound explains goes to instructions issued, barriers or launch gaps: see model.py, ncu.sh and nsys.sh.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cases
import torch
from cases import Case
from gate import require
from machine import line, machine, short_name
from report import Quartiles, interleaved, quartiles, table, write
from time_ops import checks, clean_activity, numbers, our_ops

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = ("noise", "rollout", "rollout, delta_a not stored", "rollout, gaussian", "adjoint", "update")
UNITS = ("tensor", "special", "bandwidth")


class Ceilings(NamedTuple):
    """The measured peak rates of the machine."""

    products: dict[str, Quartiles]
    """Floating-point operations per second by operand type."""
    copy: Quartiles
    """Bytes read and written per second."""
    special: Quartiles
    """Values of tanh per second."""


class Work(NamedTuple):
    """The operations and bytes of one call of a kernel."""

    flops: float
    special: float
    bytes: float


def product(size: int, dtype: torch.dtype, device: torch.device, *, tf32: bool) -> Callable[[], object]:
    """Return a square matrix product of random data."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    settings = torch.backends.cuda.matmul

    def run() -> None:
        before, settings.fp32_precision = settings.fp32_precision, "tf32" if tf32 else "ieee"
        torch.mm(left, right)
        settings.fp32_precision = before

    return run


def ceilings(device: torch.device, repeats: int, *, quick: bool) -> Ceilings:
    """Measure the peak rates of the machine."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 256 if quick else 2048
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if cuda:
        kinds |= {"fp16": torch.float16, "tf32": torch.float32}
    products = {name: product(size, dtype, device, tf32=name == "tf32") for name, dtype in kinds.items()}
    times = interleaved(products, repeats, device, warmups=2)
    flops = {name: quartiles([2 * size**3 / taken for taken in taken_by]) for name, taken_by in times.items()}
    count = (1 << 30 if cuda else 1 << 22 if quick else 1 << 26) // 4
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    copied = interleaved({"copy": lambda: target.copy_(source)}, repeats, device, warmups=2)["copy"]
    values, tanh = special(device, quick=quick)
    tanh_s = interleaved({"tanh": tanh}, repeats, device, warmups=2)["tanh"]
    return Ceilings(
        flops, quartiles([8 * count / taken for taken in copied]), quartiles([values / taken for taken in tanh_s])
    )


def special(device: torch.device, *, quick: bool) -> tuple[int, Callable[[], object]]:
    """Return how many values of tanh a call computes, and the call."""
    if device.type == "cuda":
        from roofline_special import tanh_chain

        steps = 4096
        return tanh_chain(device, steps), lambda: tanh_chain(device, steps)
    # 16 KiB per thread fit into a core's first-level cache.
    values = torch.linspace(-2, 2, 4096 * torch.get_num_threads())
    result, turns = torch.empty_like(values), 20 if quick else 500

    def run() -> None:
        for _ in range(turns):
            torch.tanh(values, out=result)

    return turns * values.numel(), run


def work_of(kernel: str, case: Case, *, cuda: bool) -> Work:
    """Return the operations and bytes of one call of a kernel."""
    elements = case.rollout_steps * case.hidden
    operand = 2 if cuda else 4
    clean = 4 * case.time * case.batch * case.hidden
    if kernel == "noise":
        return Work(0, 0, operand * elements)
    if kernel == "adjoint":
        return Work(0, 0, operand * elements + clean)
    per_element = (2 if cuda else 1) + (2 if cuda and kernel.endswith("gaussian") else 0)
    stored = 0 if kernel.endswith("not stored") else operand * elements
    # An update reads delta_a again.
    return Work(case.flops, per_element * elements, stored * (2 if kernel == "update" else 1) + 3 * clean)


def row_of(kernel: str, case: Case, seconds: Quartiles, top: Ceilings, *, cuda: bool) -> dict[str, object]:
    """Return one row of the table."""
    work = work_of(kernel, case, cuda=cuda)
    rates = (top.products["bf16" if cuda else "fp32"].median, top.special.median, top.copy.median)
    bound = dict(zip(UNITS, (amount / rate for amount, rate in zip(work, rates, strict=True)), strict=True))
    binds = max(UNITS, key=lambda unit: bound[unit])
    return {
        "kernel": kernel,
        "T": case.time,
        "B": case.batch,
        "P": case.rollouts,
        "H": case.hidden,
        "ms": 1e3 * seconds.median,
        "lower": 1e3 * seconds.low,
        "upper": 1e3 * seconds.high,
        **{f"{unit} ms": 1e3 * bound[unit] for unit in UNITS},
        "binds": binds,
        "of its bound": bound[binds] / seconds.median,
        "flop per byte": work.flops / work.bytes,
        "TFLOP/s": work.flops / seconds.median / 1e12,
    }


def measured(case: Case, device: torch.device, top: Ceilings, repeats: int) -> list[dict[str, object]]:
    """Return the rows of one case."""
    rows = []
    for name, make in our_ops(case, clean_activity(case, device), "auto"):
        if name not in KERNELS:
            continue
        times = quartiles(interleaved({name: make()}, repeats, device, warmups=2)[name])
        rows.append(row_of(name, case, times, top, cuda=device.type == "cuda"))
    return rows


def text_of(top: Ceilings) -> str:
    """Return the ceilings as text."""
    flops = [f"{name} products {1e-12 * rate.median:.3g} TFLOP/s" for name, rate in top.products.items()]
    return ", ".join([*flops, f"copy {1e-9 * top.copy.median:.3g} GB/s", f"tanh {1e-9 * top.special.median:.3g} G/s"])


def plot(rows: list[dict[str, object]], top: Ceilings, path: Path, heading: str) -> None:
    """Draw the roofline with the kernels that hold matrix products, and every kernel's bounds beside its time."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 3 + 0.28 * len(rows)), layout="constrained", width_ratios=(1, 1.2)
    )
    multiplying = [row for row in rows if row["TFLOP/s"]]
    intensity = np.geomspace(1, 4 * max(float(str(row["flop per byte"])) for row in multiplying), 100)
    for number, (name, rate) in enumerate(top.products.items()):
        roof = 1e-12 * np.minimum(rate.median, intensity * top.copy.median)
        left.plot(intensity, roof, color=f"C{number}", label=f"{name} products")
    for marker, kernel in zip("osD^v", dict.fromkeys(str(row["kernel"]) for row in multiplying), strict=False):
        points = [row for row in multiplying if row["kernel"] == kernel]
        left.plot(
            [row["flop per byte"] for row in points],
            [row["TFLOP/s"] for row in points],
            marker,
            color="black",
            fillstyle="none",
            label=kernel,
        )
    left.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="roofline")
    left.legend(fontsize=7)
    places = np.arange(len(rows))[::-1]
    right.plot([float(str(row["ms"])) for row in rows], places, "ko", label="measured")
    for number, unit in enumerate(UNITS):
        amounts = [float(str(row[f"{unit} ms"])) or float("nan") for row in rows]
        right.plot(amounts, places, "|", color=f"C{number}", markersize=12, markeredgewidth=3, label=f"{unit} bound")
    right.grid(alpha=0.3)
    names = [f"{row['kernel']}, H {row['H']}, {row['binds']}" for row in rows]
    right.set_yticks(places, names, fontsize=7)
    right.set(xlabel="ms", xscale="log", title="time, its bounds, and the one that binds")
    right.legend(fontsize=7)
    figure.suptitle(heading, fontsize=7)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for."""
    if arguments.quick:
        return [Case(4, 2, 8, 16)]
    if arguments.device == "cuda":
        return cases.gpu_cases(arguments.hidden or cases.HIDDEN, arguments.rows or (16_384,))
    return [case for case in cases.CPU if not arguments.hidden or case.hidden in arguments.hidden]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden", type=numbers, help="hidden units, comma-separated")
    parser.add_argument("--rows", type=numbers, help="B P, comma-separated (GPU)")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one tiny shape")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/roofline-<machine>-<date>.json here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    host = machine()
    output = arguments.output or RESULTS / f"roofline-{short_name(host)}-{host['date']}.json"
    record: dict[str, object] = {"machine": host, "checks": require(checks(device, "auto"))}
    top = ceilings(device, arguments.repeats, quick=arguments.quick)
    record["ceilings"] = top._asdict()
    rows: list[dict[str, object]] = []
    record["results"] = rows
    heading = f"{line(host)}\n{text_of(top)}"
    print(f"{heading}\n")
    for case in chosen_cases(arguments):
        rows += measured(case, device, top, arguments.repeats)
        write(output, record, f"{heading}\n\n{table(rows)}")
    print(table(rows))
    try:
        plot(rows, top, output.with_suffix(".png"), text_of(top))
    except ImportError:
        print("no plot: matplotlib is not installed")
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
