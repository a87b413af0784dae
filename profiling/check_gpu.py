"""Do the kernels work on this GPU? Every test that needs one, and compute-sanitizer on five shapes, in five minutes.

    python profiling/check_gpu.py [--jobs 15] [--output FILE] [-- arguments of pytest]

Tests run side by side, as most of their time goes into compiling kernels. What pytest and its tests say is printed as
it comes; the result file has their number, those that failed and those that took longest, with the machine. The exit
status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

from machine import line, machine, short_name
from report import table, write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "profiling" / "results"

MOST_JOBS = 15
"""More processes would not find room on one GPU for their contexts and tensors."""

LONGEST = 15
"""Tests whose seconds are listed."""

SANITIZER = "test_compute_sanitizer"


class Ran(NamedTuple):
    """A test that ran."""

    name: str
    outcome: str
    """"passed", "failed", "error" or "skipped"."""
    seconds: float
    message: str


def ran(report: Path) -> list[Ran]:
    """Return the tests of pytest's JUnit file."""
    tests = []
    for case in ET.parse(report).iter("testcase"):
        ended = next((child for child in case if child.tag in {"failure", "error", "skipped"}), None)
        outcome = "passed" if ended is None else {"failure": "failed"}.get(ended.tag, ended.tag)
        message = "" if ended is None else (ended.get("message") or "").strip().split("\n")[0][:200]
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        tests.append(Ran(name, outcome, float(case.get("time", "nan")), message))
    return tests


def text_of(tests: list[Ran], seconds: float) -> str:
    """Return what is worth reading of tests that ran."""
    counts = Counter(test.outcome for test in tests)
    total = ", ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
    parts = [f"{total or 'no test ran'}, {seconds:.0f} s"]
    if bad := [test for test in tests if test.outcome != "passed"]:
        parts.append("\n".join(f"{test.outcome}: {test.name}: {test.message}" for test in bad))
    sanitized = [test for test in tests if SANITIZER in test.name]
    if tests:
        parts.append(
            f"{len(sanitized)} of them under compute-sanitizer, {sum(test.seconds for test in sanitized):.0f} s"
        )
        longest = sorted(tests, key=lambda test: -test.seconds)[:LONGEST]
        parts.append(table([{"seconds": test.seconds, "test": test.name} for test in longest]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(MOST_JOBS, os.cpu_count() or 1), help="processes side by side")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/tests-<gpu>-<date>.json here")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, in place of `tests -m gpu`")
    arguments = parser.parse_args()
    host = machine()
    output = arguments.output or RESULTS / f"tests-{short_name(host)}-{host['date']}.json"
    print(line(host), flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        chosen = arguments.pytest or ["tests", "-m", "gpu"]
        command = [sys.executable, "-m", "pytest", *chosen, "-n", str(arguments.jobs), f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        tests = ran(report) if report.exists() else []
    seconds = time.monotonic() - started
    record = {"machine": host, "seconds": seconds, "status": status, "tests": [test._asdict() for test in tests]}
    write(output, record, f"{line(host)}\n\n{text_of(tests, seconds)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
