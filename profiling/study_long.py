"""How much memory does the gradient of a very long sequence take, by rollouts and by BPTT?

Every figure is the peak resident memory of a fresh process that makes one update of a long sequence, minus that of
another process that makes one of `SHORT` steps, minus inputs, targets and outputs, which all methods hold. BPTT's
length is doubled until it does not fit into `LIMIT` bytes of address space; the rollouts run under the same limit.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import line, machine
from report import table, write
from torch import nn
from tqdm import tqdm

import anpgpu

INPUTS, HIDDEN, OUTPUTS, ROLLOUTS = 4, 64, 4, 16
SHORT, LONG = 100, 100_000
MIB = 2**20
MAX_MEMORY = 64 * MIB
LIMIT = 4096 * MIB
BPTT_LENGTHS = tuple(LONG * 2**power for power in range(8))


def update(method: str, steps: int, batch: int) -> dict[str, float]:
    """Make one update in this process; return its peak in bytes and its seconds."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    torch.manual_seed(0)
    rnn, readout = nn.RNN(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
    inputs, targets = torch.randn(steps, batch, INPUTS), torch.randn(steps, batch, OUTPUTS)
    how = anpgpu.Perturbation(method=method, rollouts=ROLLOUTS, max_memory=MAX_MEMORY)
    started = time.perf_counter()
    anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=how)
    seconds = time.perf_counter() - started
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}


def measured(method: str, steps: int, batch: int) -> dict[str, float] | None:
    """Return `update` of a fresh process, or None where it ran out of memory."""
    command = [sys.executable, __file__, json.dumps([method, steps, batch])]
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if run.returncode == 0:
        reply: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
        return reply
    if "DefaultCPUAllocator" in run.stderr or "MemoryError" in run.stderr or "bad_alloc" in run.stderr:
        return None
    raise RuntimeError(f"{method} of {steps} steps failed:\n{run.stderr}")


def row(method: str, steps: int, batch: int = 1) -> dict[str, object]:
    """Return one row of the table."""
    update_figures, short = measured(method, steps, batch), measured(method, SHORT, batch)
    assert short is not None
    held = 4 * (INPUTS + 2 * OUTPUTS) * (steps - SHORT) * batch
    used = None if update_figures is None else (update_figures["bytes"] - short["bytes"] - held) / MIB
    return {
        "method": method,
        "T": steps,
        "B": batch,
        "max_memory MiB": None if method == "bptt" else MAX_MEMORY / MIB,
        "peak MiB over T = 100": used,
        "seconds": None if update_figures is None else update_figures["seconds"],
        "outcome": "out of memory" if update_figures is None else "done",
    }


def main(folder: Path, *, quick: bool = False) -> None:
    """Measure, and write long.json, long.txt and long.png into `folder`; `quick`: a twentieth of the length."""
    shorter = 20 if quick else 1
    rows = [row(method, LONG // shorter) for method in tqdm(("np", "anp", "anp-ls"), desc="rollouts")]
    for steps in tqdm(BPTT_LENGTHS[:2] if quick else BPTT_LENGTHS, desc="bptt"):
        rows.append(row("bptt", steps // shorter))
        if rows[-1]["outcome"] != "done":
            rows.append(row("anp", steps // shorter))
            break
    host = machine()
    text = f"{line(host)}\n\naddress space {LIMIT / MIB:.0f} MiB, H = {HIDDEN}, P = {ROLLOUTS}\n\n{table(rows)}"
    write(folder / "long.json", {"machine": host, "limit": LIMIT, "results": rows}, text)
    plot(rows, folder / "long.png")
    print(text)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in dict.fromkeys(record["method"] for record in rows):
        mine = [record for record in rows if record["method"] == method and record["outcome"] == "done"]
        lengths, peaks = ([record[column] for record in mine] for column in ("T", "peak MiB over T = 100"))
        axis.plot(lengths, peaks, marker="o", label=method)
    axis.axhline(MAX_MEMORY / MIB, color="grey", linestyle="--", label="max_memory")
    axis.set(xlabel="T", ylabel="peak memory of an update (MiB)", xscale="log", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    print(json.dumps(update(*json.loads(sys.argv[1]))))
