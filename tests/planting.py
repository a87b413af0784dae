"""Planting bugs: copies of the package or the checkout in which one line is wrong, and what tests say about them."""

import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from forking import Forks

import anpgpu

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = Path(anpgpu.__file__).resolve().parent

CACHES = shutil.ignore_patterns("__pycache__", ".git", ".venv", ".*_cache", ".hypothesis", "output")

LEGS = {
    "named": ((), {}),
    "reference": (("-m", "not slow and not gpu and not interpreter and not compile"), {}),
    "interpreter": (("-m", "interpreter and not slow"), {"TRITON_INTERPRET": "1"}),
    "compile": (("-m", "compile and not slow"), {}),
}
"""What each of make's legs adds to pytest's arguments and to its environment; "named" runs what is named."""


class Outcome(NamedTuple):
    """What a run of pytest found."""

    status: int
    """pytest's exit status."""
    failures: dict[str, str]
    """Message of each failed test, by its name."""
    ids: list[str]
    """The tests that failed or whose fixtures did, as pytest takes them, file::name."""
    said: str
    """The end of what was printed."""


class Mutation(NamedTuple):
    """One error, made in a copy of the checkout."""

    file: str
    """Path in the package."""
    right: str
    """Occurs exactly once in the file."""
    wrong: str
    tests: tuple[str, ...]
    """Files of tests, or tests, that ought to notice."""
    wider: tuple[str, ...] = ()
    """Further files, run where those notice nothing."""
    leg: str = "reference"
    """Of make: "reference", "interpreter" or "compile"."""


def copy_package(folder):
    """Make a copy of the package with the kernels in it.

    What Numba has stored for them comes along: its names hold a hash of all sources it is compiled from, so that a bug
    in one of these makes all of it anew.
    """
    # Files that another process is about to rename.
    shutil.copytree(PACKAGE, folder / "anpgpu", ignore=shutil.ignore_patterns("*.tmp.*", "*.pyc.*"))
    return folder / "anpgpu"


def copy_checkout(folder):
    """Make a copy of this checkout; the link to the kernels stays a link."""
    shutil.copytree(ROOT, folder, ignore=CACHES, symlinks=True)
    return folder


def changed(source, right, wrong):
    """Return a source text with `right` replaced by `wrong`.

    Raises:
        ValueError: `right` does not occur exactly once; the message says how often.
    """
    if source.count(right) != 1:
        raise ValueError(f"found {source.count(right)} times, not once: {right}")
    return source.replace(right, wrong)


# One thread: several of these run side by side.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1"
}
# Triton reads its variable when it is imported, which the process that forks has done.
RUNS = {leg: Forks(TESTS / "planted_run.py", ENVIRONMENT | variables) for leg, (_, variables) in LEGS.items()}


def run_tests(folder, detectors, *, tests=TESTS, leg="named", options=(), timeout=None):
    """Run some tests, of the folder `tests`, on the package in `folder`; a run is a process of its own.

    Raises:
        TimeoutError: they took longer than `timeout` seconds.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    selected, _ = LEGS[leg]
    config = ["-c", str(tests.parent / "pyproject.toml"), "-p", "no:cacheprovider", f"--junitxml={report}"]
    names = [str(tests / detector) for detector in detectors]
    arguments = ["-q", *config, *selected, *options, *names]
    environment = {"PYTHONPATH": str(folder)}
    status, said, warned = RUNS[leg].ask(str(folder), arguments, environment, timeout=timeout)
    cases = ET.parse(report).getroot().iter("testcase") if report.exists() else ()
    wrong = [(case, case.find("failure")) for case in cases if not {"failure", "error"}.isdisjoint(e.tag for e in case)]
    failures = {case.get("name"): failure.get("message") for case, failure in wrong if failure is not None}
    ids = [f"{case.get('classname').rpartition('.')[2]}.py::{case.get('name')}" for case, _ in wrong]
    return Outcome(status, failures, ids, (said + warned)[-2000:])
