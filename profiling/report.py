"""Timing, quartiles, tables and result files for the scripts of this folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class Quartiles(NamedTuple):
    """A median with its quartiles."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return lower quartile, median and upper quartile."""
    return Quartiles(*(float(value) for value in np.percentile(values, (25, 50, 75))))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Processor time hardly depends on other programs, but equals the time taken only where one thread does the work."""


def seconds(work: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Return the seconds of one call: by CUDA events on a GPU, by a clock elsewhere."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    start_s = CLOCKS[clock]()
    work()
    return CLOCKS[clock]() - start_s


def interleaved(
    works: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    *,
    warmups: int = 1,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Return the seconds of every call. Works take turns, so that a slow phase of the machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warmups + repeats):
        for name, work in works.items():
            taken = seconds(work, device, clock)
            if turn >= warmups:
                times[name].append(taken)
    return times


def table(rows: Sequence[dict[str, object]]) -> str:
    """Return rows with the same keys as aligned text; None is blank."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    numeric = [all(not isinstance(row[name], str) for row in rows) for name in names]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def write(path: Path, record: dict[str, object], text: str) -> None:
    """Write the record as JSON, and the text beside it under the same name with .txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".txt").write_text(text + "\n")
