"""What would an ANP update take on GPUs that are not at hand? An estimate from a cost model, not a measurement.

    python profiling/model.py [--hidden 128,512] [--case T,B,P] [--check RESULTS.json] [--output FILE]

Per (rollout, unit, step), on one multiprocessor and in clocks:

    tensor    2 H / (bf16 operations per clock)
    special   special functions of the compiled loop (tests/compiled.json), over 16 per clock
    issue     instructions of the same loop, over 128 lanes per clock
    memory    2 bytes of delta_a written by the rollouts and 2 read by the reduction, over the memory's speed

A tile's time is its elements times the clocks of the slowest unit; tiles run over the multiprocessors in waves. At best
all units overlap. At worst the products overlap with nothing, since Triton does not overlap the matrix unit with the
epilogue of the same warps. The reduction, the clean run's steps and the gaps between launches are added. With n GPUs
each has P / n rollouts of every sample and the whole clean run; gradients are summed by one all-reduce.

Sources: vendors' data sheets for the units; the shares of them that large products and copies reach were measured on
one H200; the times of a clean step and of a gap are assumed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from cases import Case
from report import table, write

from anpgpu.kernels.tiles import RolloutLaunch, rollout_launch

DISCLAIMER = (
    "A model, not a measurement. profiling/model.py --check RESULTS.json compares it with a result file of "
    "profiling/compare.py made on a GPU; there is none yet."
)
COMPILED = Path(__file__).resolve().parent.parent / "tests" / "compiled.json"


class Gpu(NamedTuple):
    """Figures of a data sheet."""

    arch: int
    """Compute capability, 10 major + minor."""
    multiprocessors: int
    gigahertz: float
    matrix: int
    """bf16 operations per clock of one multiprocessor, dense, accumulated in float32."""
    memory: float
    """Bytes per second."""
    link: float
    """Bytes per second to other GPUs, one way."""

    @property
    def flops(self) -> float:
        return self.multiprocessors * self.gigahertz * 1e9 * self.matrix


GPUS = {
    "A100": Gpu(80, 108, 1.41, 2048, 2.04e12, 300e9),
    "H100": Gpu(90, 132, 1.83, 4096, 3.35e12, 450e9),
    "H200": Gpu(90, 132, 1.83, 4096, 4.8e12, 450e9),
    "B200": Gpu(100, 148, 1.86, 8192, 8.0e12, 900e9),
    "4090": Gpu(89, 128, 2.52, 512, 1.008e12, 32e9),
}
"""SXM modules; the A100 with 80 GB; the 4090 behind PCIe 4."""

MATRIX_REACHED = 0.79
COPY_REACHED = 0.90
"""Shares of the data sheet that a product of 8192^3 on random data and a copy reached on one H200."""

SPECIAL_PER_CLOCK = 16
LANES = 128
GAUSSIAN = {"issued": 15, "special": 2}
"""What Gaussian noise adds per element: the difference of the two kinds' rows in the compile table, sm_90."""

CLEAN_STEP_S = 4e-6
LAUNCH_GAP_S = 1.5e-6
ALL_REDUCE_S = 20e-6
"""Assumed: one step of the clean run, the gap between two launches of a CUDA graph, an all-reduce of nothing."""

DELTA_A_BYTES = 2
HIDDEN = (128, 256, 512, 1024, 2048)
DEFAULT = (100, 128, 128)
MANY = 8


class Bounds(NamedTuple):
    """Seconds that each unit alone would need for the rollouts of an update, and the seconds added to them."""

    tensor: float
    special: float
    issue: float
    store: float
    added: float
    """The reduction, the clean run, launch gaps and the all-reduce."""

    @property
    def binds(self) -> str:
        """Name of the slowest unit."""
        return max(("tensor", "special", "issue", "store"), key=lambda name: getattr(self, name))

    @property
    def low(self) -> float:
        """Everything overlaps."""
        return max(self.tensor, self.special, self.issue, self.store) + self.added

    @property
    def high(self) -> float:
        """The products overlap with nothing."""
        return self.tensor + max(self.special, self.issue, self.store) + self.added


def launch_of(gpu: Gpu, case: Case) -> RolloutLaunch:
    """Return the launch that the kernels would choose for a linear loss."""
    return rollout_launch(
        units=case.hidden,
        outputs=0,
        has_readout=False,
        returns_outputs=False,
        batch=case.batch,
        rollouts=case.rollouts,
        precision="bf16",
        arch=gpu.arch,
    )


def in_loop(rows: dict[str, dict[str, float]], gpu: Gpu, launch: RolloutLaunch, units: int, column: str) -> float:
    """Return a column of the compile table, "issued" or "special", per element and step.

    One iteration of the resident kernel's loop is a whole step. One of the stepwise kernel's is a block of its product;
    its epilogue lies outside any loop and is taken to cost a step of the resident kernel.
    """

    def found(*names: str) -> float:
        return next(rows[f"sm_{gpu.arch}:{name}"][column] for name in names if f"sm_{gpu.arch}:{name}" in rows)

    size = launch.block_units if launch.form == "resident" else 256
    step = found(*(f"resident-{wide}-bf16{kind}" for wide in (size, 128) for kind in ("-loss-stored", "")))
    if launch.form == "resident":
        return step
    return step + -(-units // launch.block_inner) * found("step-512-bf16")


def bounds(
    gpu: Gpu, case: Case, rows: dict[str, dict[str, float]], *, noise: str = "rademacher", gpus: int = 1
) -> Bounds:
    """Return the model of one update on GPUs that share its rollouts.

    Args:
        gpu: the kind of GPU.
        case: the whole update.
        rows: the rows of tests/compiled.json.
        noise: "rademacher" or "gaussian".
        gpus: number of GPUs; each has P / gpus rollouts of every sample, rounded up.
    """
    case = case._replace(rollouts=-(-case.rollouts // gpus))
    launch = launch_of(gpu, case)
    across = -(-case.hidden // launch.block_units)
    if launch.form == "resident" or launch.samples:
        # For each of its samples, a tile holds a power of two of rollouts.
        per_sample = max(1, launch.block_rows // max(launch.samples, 1))
        tiles = -(-case.batch * -(-case.rollouts // per_sample) // max(launch.samples, 1)) * across
    else:
        tiles = -(-case.rows // launch.block_rows) * across
    waves = -(-tiles // gpu.multiprocessors)
    elements = case.time * waves * launch.block_rows * launch.block_units
    clock = gpu.gigahertz * 1e9
    taken = {
        column: in_loop(rows, gpu, launch, case.hidden, column) + (more if noise == "gaussian" else 0)
        for column, more in GAUSSIAN.items()
    }
    moved = DELTA_A_BYTES * case.rollout_steps * case.hidden / (gpu.memory * COPY_REACHED)
    inner = launch.block_units if launch.form == "resident" else case.hidden
    added = moved + case.time * CLEAN_STEP_S
    if launch.form == "stepwise":
        added += case.time * LAUNCH_GAP_S
    if gpus > 1:
        weights = 4 * (case.hidden**2 + case.hidden * (case.inputs + 1))
        added += ALL_REDUCE_S + 2 * (gpus - 1) / gpus * weights / gpu.link
    return Bounds(
        tensor=elements * 2 * inner / (gpu.matrix * MATRIX_REACHED) / clock,
        special=elements * taken["special"] / SPECIAL_PER_CLOCK / clock,
        issue=elements * taken["issued"] / LANES / clock,
        store=moved,
        added=added,
    )


def row_of(name: str, case: Case, rows: dict[str, dict[str, float]], noise: str) -> dict[str, object]:
    """Return one row of the tables."""
    gpu = GPUS[name]
    single, many = (bounds(gpu, case, rows, noise=noise, gpus=count) for count in (1, MANY))
    reached = gpu.flops * MATRIX_REACHED
    return {
        "GPU": name,
        "T": case.time,
        "B": case.batch,
        "P": case.rollouts,
        "H": case.hidden,
        "form": launch_of(gpu, case).form,
        "binds": single.binds,
        **{f"{unit} ms": 1e3 * getattr(single, unit) for unit in ("tensor", "special", "issue", "store", "added")},
        "ms, low": 1e3 * single.low,
        "ms, high": 1e3 * single.high,
        "rollout-steps/s, low": case.rollout_steps / single.high,
        "rollout-steps/s, high": case.rollout_steps / single.low,
        "of matmul, low": case.flops / single.high / reached,
        "of matmul, high": case.flops / single.low / reached,
        f"{MANY} GPUs ms, low": 1e3 * many.low,
        f"{MANY} GPUs ms, high": 1e3 * many.high,
        "speed-up, low": single.low / many.low,
        "speed-up, high": single.high / many.high,
    }


def text_of(rows: list[dict[str, object]]) -> str:
    """Return rows as three tables: units, one GPU, several."""
    shape = ("GPU", "T", "B", "P", "H")
    names = list(rows[0])[len(shape) :]
    split = names.index("added ms") + 1, names.index(f"{MANY} GPUs ms, low")
    parts = (names[: split[0]], names[split[0] : split[1]], names[split[1] :])
    return "\n\n".join(table([{name: row[name] for name in (*shape, *columns)} for row in rows]) for columns in parts)


def check(record: dict[str, object], rows: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """Return the model beside the updates of a result of `compare.py` or `time_ops.py`.

    Raises:
        ValueError: the result was not measured on a GPU of the model, or holds no update.
    """
    machine = record["machine"]
    assert isinstance(machine, dict)
    measured_gpu = machine["gpu"]
    if not isinstance(measured_gpu, dict):
        raise ValueError("the results were measured on a CPU: the model is of GPUs")
    names = [name for name in GPUS if name in str(measured_gpu["name"])]
    if not names:
        raise ValueError(f"the results are from {measured_gpu['name']!r}: the model has {', '.join(GPUS)}")
    results = record["results"]
    assert isinstance(results, list)
    compared = []
    for row in results:
        kind = row.get("peer") or row.get("op")
        if kind not in {"ours", "ours, CUDA graph", "update", "update, CUDA graph"}:
            continue
        modelled = bounds(GPUS[names[0]], Case(*(row[size] for size in "TBPH")), rows)
        measured = row["ms"] / 1e3
        compared.append(
            {
                "GPU": names[0],
                **{size: row[size] for size in "TBPH"},
                "measured": kind,
                "ms": row["ms"],
                "model low": 1e3 * modelled.low,
                "model high": 1e3 * modelled.high,
                "measured / low": measured / modelled.low,
                "within": "yes" if modelled.low <= measured <= modelled.high else "NO",
            }
        )
    if not compared:
        raise ValueError("the results hold no update of ours")
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", default=",".join(map(str, HIDDEN)), help="hidden units, comma-separated")
    parser.add_argument("--case", default=",".join(map(str, DEFAULT)), help="T,B,P")
    parser.add_argument("--noise", default="rademacher", choices=("rademacher", "gaussian"))
    parser.add_argument("--check", type=Path, help="a result of compare.py or time_ops.py on a GPU to compare with")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .txt")
    arguments = parser.parse_args()
    rows = json.loads(COMPILED.read_text())["rows"]
    if arguments.check is not None:
        try:
            compared = check(json.loads(arguments.check.read_text()), rows)
        except ValueError as problem:
            parser.error(str(problem))
        print(table(compared))
        return
    time, batch, rollouts = (int(size) for size in arguments.case.split(","))
    cases = [Case(time, batch, rollouts, int(units)) for units in arguments.hidden.split(",")]
    modelled = [row_of(name, case, rows, arguments.noise) for name in GPUS for case in cases]
    text = f"{DISCLAIMER}\n{arguments.noise} noise, one update of ANP\n\n{text_of(modelled)}"
    print(text)
    if arguments.output is not None:
        write(arguments.output, {"kind": "model", "note": DISCLAIMER, "results": modelled}, text)


if __name__ == "__main__":
    main()
