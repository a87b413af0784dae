"""Do the tests notice small errors? Each mutation of a list is made in a copy of this checkout, and tests run on it.

    python profiling/mutations.py --list
    python profiling/mutations.py [--only PART]... [--output FILE]

The list stands in `tests/mutations_kernels.py`, `mutations_regression.py` and `mutations_package.py`. The tests that a
mutation names run first, up to the first failure; only where they pass, the wider set that it names. The test that
fails must pass without the mutation, or the result is an error: so is a mutation whose text is not found exactly once,
and one that keeps tests from being collected. With --output, mutations that the file holds already are not run again,
unless their code, their tests or the tests' outcome ("survived", "error") call for it; --only all of those whose name
or file contains PART.

The copy is temporary; the checkout itself is never changed. The exit status is 1 if any mutation survives.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import line, machine
from report import table, write
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import mutations_kernels
import mutations_package
import mutations_regression
from planting import Mutation, changed, copy_checkout, run_tests

MUTATIONS = {**mutations_kernels.MUTATIONS, **mutations_regression.MUTATIONS, **mutations_package.MUTATIONS}

PASSED, FAILED = 0, 1
"""pytest's exit statuses of a run that took place."""

TIMEOUT_S = 1800
"""Seconds after which a mutation counts as noticed: it keeps the tests from ending."""


class Bench:
    """A copy of the checkout on which mutations are tried, one at a time; its compiled kernels are kept."""

    def __init__(self, folder: Path) -> None:
        self.checkout = copy_checkout(folder / "checkout")

    def run(self, tests: tuple[str, ...], leg: str) -> tuple[int | None, str, str]:
        """Return pytest's exit status (None after the timeout), the first failed test, and what was printed."""
        try:
            outcome = run_tests(
                self.checkout, tests, tests=self.checkout / "tests", leg=leg, options=["-x"], timeout=TIMEOUT_S
            )
        except TimeoutError:
            return None, f"no end after {TIMEOUT_S} s", ""
        return outcome.status, next(iter(outcome.ids), ""), outcome.said

    def verdict(self, mutation: Mutation) -> dict[str, object]:
        """Return whether tests notice a mutation, and which."""
        path = self.checkout / "anpgpu" / mutation.file
        right = path.read_text(encoding="utf-8")
        try:
            wrong = changed(right, mutation.right, mutation.wrong)
        except ValueError as error:
            return {"verdict": "error", "by": str(error)}
        path.write_text(wrong, encoding="utf-8")
        try:
            status, by, said = self.run(mutation.tests, mutation.leg)
            wider = status == PASSED and bool(mutation.wider)
            if wider:
                status, by, said = self.run(mutation.wider, mutation.leg)
        finally:
            path.write_text(right, encoding="utf-8")
        if status == PASSED:
            return {"verdict": "survived", "by": ""}
        if status is None:
            return {"verdict": "killed", "by": by}
        if status != FAILED or not by:
            return {"verdict": "error", "by": said}
        control, _, said = self.run((by,), mutation.leg)
        if control != PASSED:
            return {"verdict": "error", "by": f"{by} fails without the mutation: {said}"}
        return {"verdict": "killed", "by": by, "wider": wider}


def fingerprint(mutation: Mutation) -> list[object]:
    """Return what a mutation is, as a result file holds it."""
    return json.loads(json.dumps(mutation))


def stored(path: Path | None) -> dict[str, dict[str, object]]:
    """Return the results that a file holds of mutations that are killed and still the same."""
    if path is None or not path.exists():
        return {}
    results = json.loads(path.read_text())["results"]
    return {
        result["name"]: result
        for result in results
        if result["verdict"] == "killed"
        and result["name"] in MUTATIONS
        and result["mutation"] == fingerprint(MUTATIONS[result["name"]])
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    command.add_argument("--only", metavar="PART", action="append", help="mutations whose name or file contains PART")
    command.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it as .txt")
    return command


def main() -> None:
    command = parser()
    arguments = command.parse_args()
    parts = arguments.only or [""]
    chosen = {name: one for name, one in MUTATIONS.items() if any(part in name or part in one.file for part in parts)}
    if not chosen:
        command.error(f"no mutation's name or file contains any of {parts}")
    if arguments.list:
        print("\n".join(f"{one.file:<40} {one.leg:<12} {name}" for name, one in chosen.items()))
        return
    host, results = machine(), stored(arguments.output)
    waiting = [name for name in chosen if name not in results or arguments.only]
    heading = line(host)
    with tempfile.TemporaryDirectory() as folder, tqdm(waiting, unit="mutation") as bar:
        bench = Bench(Path(folder))
        for name in bar:
            bar.set_description(name[:50])
            started = time.perf_counter()
            verdict = bench.verdict(chosen[name])
            taken = round(time.perf_counter() - started, 1)
            results[name] = {"name": name, "mutation": fingerprint(chosen[name]), **verdict, "seconds": taken}
            bar.write(f"{verdict['verdict']:<9} {name}  {verdict['by']}")
            if arguments.output is not None:
                write(arguments.output, *report(host, heading, results))
    _, text = report(host, heading, results)
    print(text)
    if any(result["verdict"] != "killed" for result in results.values()):
        sys.exit(1)


def report(
    host: dict[str, object], heading: str, results: dict[str, dict[str, object]]
) -> tuple[dict[str, object], str]:
    """Return the record and the text of the results, in the order of the list."""
    ordered = [results[name] for name in MUTATIONS if name in results]
    counts = {verdict: sum(one["verdict"] == verdict for one in ordered) for verdict in ("killed", "survived", "error")}
    rows = [
        {
            "file": one["mutation"][0],
            "mutation": one["name"],
            "verdict": one["verdict"],
            "by": str(one["by"]).strip().splitlines()[-1] if one["by"] else "",
        }
        for one in ordered
    ]
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    text = f"{heading}\n\n{len(ordered)} of {len(MUTATIONS)} mutations: {said}\n\n{table(rows)}"
    return {"machine": host, "counts": counts, "results": ordered}, text


if __name__ == "__main__":
    main()
