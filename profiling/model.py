"""What would an ANP update take on GPUs that are not at hand? An estimate from a cost model, not a measurement.

    python profiling/model.py [--hidden 128,512] [--case T,B,P] [--check RESULTS] [--output FILE]

On an H200 an update waits more than it computes, so the model counts waits:

    rollouts   T x waves of programs x the time of a wave: of a resident tile a constant, of a stepwise one
               epilogue + H x product (`TILES`)
    losses     stepwise: a launch and one read of the state, every step; of a narrow readout once, behind the last step
    adjoint    one read of delta_a
    clean run  of cuDNN, every step; up to 256 units as one launch, above with launches that grow as H^2
    weights    the products over T B samples in float32, as at commit 4b6f516; on tensor cores: not measured
    rest       a constant, and passes over what there is of each of T B P
    host       eager calls only: a constant and a time for each step of the stepwise form, or, where the device is
               slower, that constant lead before it

With n GPUs each has P / n rollouts of every sample and the whole clean run; gradients are summed by one all-reduce. On
another GPU than the H200 rollouts take the H200's time, times the ratio of what the slowest unit would need there and
here: products, special functions, instructions issued or stores (`bounds`, of data sheets and tests/compiled.json).

Sources. profiling/results/kernels-h200-2026-11-26.txt and peers-h200-2026-11-26.txt: commit 4b6f516 on one H200, and
prototypes of the kernels. Fitted to them: two numbers for each stepwise tile and one for each resident tile, to 9 and 3
measured times; and to 16 updates in a CUDA graph and the same 16 eager, the nine numbers of `Rest` and `Host` that are
called fitted there. For all of these an estimate is off by at most `BAND` either way (tests/test_model.py). How far
beyond them is not known.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

from cases import Case
from report import table, write

from anpgpu.kernels.tiles import RolloutLaunch, rollout_launch

DISCLAIMER = (
    "A model, not a measurement. Fitted to one H200 at commit 4b6f516 and to prototypes of kernels; other GPUs are "
    "scaled from it by their data sheets. profiling/model.py --check RESULTS compares it with a measurement."
)
COMPILED = Path(__file__).resolve().parent.parent / "tests" / "compiled.json"
BAND = 1.3
"""An estimate's lower and upper end are the estimate over and times this."""


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

MEASURED = "H200"
MATRIX_REACHED = 0.79
"""Share of the data sheet that a product of 8192^3 on random data reached on one H200."""

SPECIAL_PER_CLOCK = 16
LANES = 128
GAUSSIAN = {"issued": 15, "special": 2}
"""What Gaussian noise adds per element: the difference of the two kinds' rows in the compile table, sm_90."""

ALL_REDUCE_S = 20e-6
"""Assumed: an all-reduce of nothing."""


class Tile(NamedTuple):
    """A kind of program of the rollouts on Hopper, with 16-bit operands: how long a wave of them takes for one step."""

    programs: int
    """On a multiprocessor at a time, by registers and shared memory."""
    epilogue: float
    """Microseconds, fitted: what does not grow with the product's inner size."""
    product: float = 0.0
    """Microseconds for each unit of the product's inner size, fitted; resident: part of `epilogue`."""


TILES = {
    ("resident", 64, 64, 4, None, False): Tile(4, 3.1),
    ("resident", 64, 64, 4, 128, False): Tile(4, 1.9),
    ("resident", 64, 128, 4, None, False): Tile(2, 3.0),
    ("resident", 64, 128, 4, 168, False): Tile(3, 3.2),
    ("resident", 128, 128, 8, None, False): Tile(1, 4.0),
    ("resident", 64, 256, 4, None, False): Tile(1, 4.8),
    ("resident", 128, 256, 8, None, False): Tile(1, 8.0),
    ("stepwise", 128, 128, 8, None, False): Tile(1, 7.3, 0.0061),
    ("stepwise", 128, 256, 8, None, False): Tile(1, 10.0, 0.0124),
    ("stepwise", 128, 128, 8, None, True): Tile(1, 5.4, 0.0064),
    ("stepwise", 64, 256, 4, None, True): Tile(2, 4.7, 0.0127),
    ("stepwise", 128, 128, 4, None, False): Tile(2, 5.4, 0.0116),
}
"""By form, rows, units, warps, bound on registers, and whether clean rows come before the product; with delta_a stored,
Rademacher noise and tanh."""


class Rest(NamedTuple):
    """Seconds of what is not the rollouts, on the H200."""

    constant: float = 250e-6
    """Fitted: kernels whose time depends on no size."""
    value: float = 0.18e-9
    """Fitted: for each of T B P, passes over loss differences and returns."""
    weight: float = 0.18e-9
    """Fitted: of the weight gradients for each of T B H; their products are long and few programs share them."""
    clean_unit: float = 7e-9
    """Fitted: of a clean step in one launch, for each unit."""
    clean_step: float = 5.5e-6
    """Fitted: of a clean step with launches of its own, where H is small."""
    clean_square: float = 5.4e-6
    """Fitted: of a clean step with launches of its own, for each (H / 1024)^2."""
    measure: float = 3e-6
    """Measured: of the loss of one step, where it has no state to read."""
    read: float = 0.67
    """Measured: share of the data sheet at which the adjoint and the losses read."""


class Host(NamedTuple):
    """Seconds of the host in an eager update at commit 4b6f516; in a CUDA graph there are none."""

    update: float = 3.4e-3
    """Fitted: of an update."""
    step: float = 58e-6
    """Fitted: of a step of the stepwise form, its clean step included."""
    lead: float = 1.5e-3
    """Fitted: before the device has work, where that is what takes long."""


REST, HOST = Rest(), Host()
PERSISTENT_UNITS = 256
"""Hidden units up to which cuDNN makes the clean run in one launch."""

DELTA_A_BYTES = 2
HIDDEN = (128, 256, 512, 1024, 2048)
DEFAULT = (100, 128, 128)
MANY = 8


class Bounds(NamedTuple):
    """Seconds that each unit of a GPU alone would need for the rollouts of an update."""

    tensor: float
    special: float
    issue: float
    store: float

    @property
    def binds(self) -> str:
        """Name of the slowest unit."""
        return max(self._fields, key=lambda name: getattr(self, name))


class Estimate(NamedTuple):
    """Seconds of the parts of an update in a CUDA graph, and of the host around it."""

    rollouts: float
    losses: float
    adjoint: float
    clean: float
    weights: float
    rest: float
    host: float
    """Of an eager update."""

    @property
    def graph(self) -> float:
        """The update in a CUDA graph."""
        return sum(self[:-1])

    @property
    def eager(self) -> float:
        """The eager update: the host's time, or the device's after a lead."""
        return max(self.host, HOST.lead + self.graph)


def launch_of(case: Case, arch: int) -> RolloutLaunch:
    """Return the launch that the kernels would choose for a measured loss of the outputs."""
    return rollout_launch(
        units=case.hidden,
        outputs=case.outputs,
        has_readout=True,
        returns_outputs=False,
        batch=case.batch,
        rollouts=case.rollouts,
        precision="bf16",
        arch=arch,
    )


def wave_of(launch: RolloutLaunch) -> Tile:
    """Return what is known of a launch's tile.

    Raises:
        ValueError: it was not measured.
    """
    key = (launch.form, launch.block_rows, launch.block_units, launch.warps, launch.registers, launch.early)
    if key not in TILES:
        raise ValueError(f"no tile {key} was measured, only {', '.join(map(str, TILES))}")
    return TILES[key]


def tiles_of(launch: RolloutLaunch, case: Case) -> int:
    """Return the number of a launch's programs."""
    across = -(-case.hidden // launch.block_units)
    if launch.samples:
        # For each of its samples, a tile holds a power of two of rollouts.
        per_sample = launch.block_rows // launch.samples
        return -(-case.batch // launch.samples) * -(-case.rollouts // per_sample) * across
    return -(-case.rows // launch.block_rows) * across


def rollout_time(launch: RolloutLaunch, case: Case) -> float:
    """Return the seconds of an update's rollouts on the H200."""
    tile = wave_of(launch)
    waves = -(-tiles_of(launch, case) // (GPUS[MEASURED].multiprocessors * tile.programs))
    return case.time * waves * 1e-6 * (tile.epilogue + tile.product * case.hidden)


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


def bounds(gpu: Gpu, case: Case, rows: dict[str, dict[str, float]], noise: str = "rademacher") -> Bounds:
    """Return what each unit of a GPU would need; `rows`: those of tests/compiled.json."""
    launch = launch_of(case, gpu.arch)
    elements = case.time * tiles_of(launch, case) * launch.block_rows * launch.block_units / gpu.multiprocessors
    clock = gpu.gigahertz * 1e9
    taken = {
        column: in_loop(rows, gpu, launch, case.hidden, column) + (more if noise == "gaussian" else 0)
        for column, more in GAUSSIAN.items()
    }
    inner = launch.block_units if launch.form == "resident" else case.hidden
    return Bounds(
        tensor=elements * 2 * inner / (gpu.matrix * MATRIX_REACHED) / clock,
        special=elements * taken["special"] / SPECIAL_PER_CLOCK / clock,
        issue=elements * taken["issued"] / LANES / clock,
        store=DELTA_A_BYTES * case.rollout_steps * case.hidden / (gpu.memory * REST.read),
    )


def estimate(gpu: Gpu, case: Case, launch: RolloutLaunch, *, slower: float = 1.0, gpus: int = 1) -> Estimate:
    """Return the model of one update.

    Args:
        gpu: the kind of GPU.
        case: an update's sizes; `rollouts`: those of one GPU.
        launch: of the rollouts on the H200.
        slower: time of rollouts over the H200's.
        gpus: number of GPUs that sum their gradients.
    """
    stepwise = launch.form == "stepwise"
    read = DELTA_A_BYTES * case.rows * case.hidden / (gpu.memory * REST.read)
    clean = REST.clean_step + REST.clean_square * (case.hidden / 1024) ** 2
    if case.hidden <= PERSISTENT_UNITS:
        clean = REST.clean_unit * case.hidden
    rest = REST.constant + REST.value * case.rollout_steps
    # What a step adds where it measures the step before is not known; it is left out.
    measured = 0 if not stepwise else 1 if launch.joined else case.time
    if gpus > 1:
        weights = 4 * (case.hidden**2 + case.hidden * (case.inputs + 1))
        rest += ALL_REDUCE_S + 2 * (gpus - 1) / gpus * weights / gpu.link
    return Estimate(
        rollouts=slower * rollout_time(launch, case),
        losses=measured * (REST.measure + read),
        adjoint=case.time * read,
        clean=case.time * clean,
        weights=REST.weight * case.time * case.batch * case.hidden,
        rest=rest,
        host=HOST.update + (HOST.step * case.time if stepwise else 0.0),
    )


def estimated(
    name: str, case: Case, rows: dict[str, dict[str, float]], *, noise: str = "rademacher", gpus: int = 1
) -> Estimate:
    """Return the model of one update on GPUs of a name that share its rollouts, with today's tiles."""
    case = case._replace(rollouts=-(-case.rollouts // gpus))
    gpu, known = GPUS[name], GPUS[MEASURED]
    needs = [bounds(*which, rows, kind) for which, kind in (((gpu, case), noise), ((known, case), "rademacher"))]
    slower = max(needs[0]) / max(needs[1])
    return estimate(gpu, case, launch_of(case, known.arch), slower=slower, gpus=gpus)


def row_of(name: str, case: Case, rows: dict[str, dict[str, float]], noise: str) -> dict[str, object]:
    """Return one row of the tables."""
    gpu = GPUS[name]
    single, many = (estimated(name, case, rows, noise=noise, gpus=count) for count in (1, MANY))
    reached = gpu.flops * MATRIX_REACHED
    return {
        "GPU": name,
        "T": case.time,
        "B": case.batch,
        "P": case.rollouts,
        "H": case.hidden,
        "form": launch_of(case, gpu.arch).form,
        "slowest unit": bounds(gpu, case, rows, noise).binds,
        **{f"{part} ms": 1e3 * getattr(single, part) for part in Estimate._fields[:-1]},
        **{f"ms, {end}": 1e3 * single.graph * by for end, by in BANDS.items()},
        **{f"eager ms, {end}": 1e3 * single.eager * by for end, by in BANDS.items()},
        "rollout-steps/s": case.rollout_steps / single.graph,
        "of matmul": case.flops / single.graph / reached,
        **{f"{MANY} GPUs ms, {end}": 1e3 * many.graph * by for end, by in BANDS.items()},
        "speed-up": single.graph / many.graph,
    }


BANDS = {"low": 1 / BAND, "high": BAND}


def text_of(rows: list[dict[str, object]]) -> str:
    """Return rows as three tables: parts, one GPU, several."""
    shape = ("GPU", "T", "B", "P", "H")
    names = list(rows[0])[len(shape) :]
    split = names.index("rest ms") + 1, names.index(f"{MANY} GPUs ms, low")
    parts = (names[: split[0]], names[split[0] : split[1]], names[split[1] :])
    return "\n\n".join(table([{name: row[name] for name in (*shape, *columns)} for row in rows]) for columns in parts)


UPDATES = {
    "ours": "eager",
    "ours anp": "eager",
    "update": "eager",
    "update anp": "eager",
    "ours, CUDA graph": "graph",
    "ours anp graph": "graph",
    "update, CUDA graph": "graph",
    "update anp graph": "graph",
}
"""How results call an update of ANP, and what the model calls it."""


def first_launch(case: Case) -> RolloutLaunch:
    """Return the launch of commit 4b6f516 on the H200 with 16-bit operands, for one sample a tile."""
    wide = case.hidden > 256 or case.rows >= 132 * 128
    units = 256 if case.hidden > 256 else max(64, 1 << (case.hidden - 1).bit_length())
    rows = 128 if wide else 64
    form = "stepwise" if case.hidden > 256 else "resident"
    return RolloutLaunch(form, rows, units, 64, 0, rows // 16, 3, 0, 1, "commit 4b6f516")


def read_record(path: Path) -> dict[str, object]:
    """Return a result file as JSON, or what is in the text of one in lines of kind=op and kind=peer."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        assert isinstance(record, dict)
        return record
    text = path.read_text()
    found = re.findall(
        r"^kind=(?:op|peer) (op|peer)=(.+) T=(\d+) B=(\d+) P=(\d+) H=(\d+) ms=([\d.]+)", text, re.MULTILINE
    )
    results = [
        {kind: name, **dict(zip("TBPH", map(int, sizes), strict=True)), "ms": float(ms)}
        for kind, name, *sizes, ms in found
    ]
    gpu, _, rest = text.partition(" | ")
    commit = re.search(r"commit (\w+)", rest.splitlines()[0])
    return {"machine": {"gpu": {"name": gpu}, "commit": commit and commit[1]}, "results": results}


def check(record: dict[str, object], rows: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """Return the model beside the updates of a result of `compare.py`, `time_ops.py` or a file of 2026-11-26.

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
        kind = str(row.get("peer") or row.get("op"))
        if kind not in UPDATES:
            continue
        case = Case(*(row[size] for size in "TBPH"))
        modelled = estimated(names[0], case, rows)
        if machine.get("commit") == "4b6f516":
            modelled = estimate(GPUS[names[0]], case, first_launch(case))
        milliseconds = 1e3 * getattr(modelled, UPDATES[kind])
        compared.append(
            {
                "GPU": names[0],
                **{size: row[size] for size in "TBPH"},
                "measured": kind,
                "ms": row["ms"],
                "model": milliseconds,
                "measured / model": row["ms"] / milliseconds,
                "within": "yes" if 1 / BAND <= row["ms"] / milliseconds <= BAND else "NO",
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
            compared = check(read_record(arguments.check), rows)
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
