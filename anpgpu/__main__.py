"""`python -m anpgpu diagnose`: the diagnostic from the command line, for a user's own network."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .diagnosis import diagnose

REQUIRED = ("rnn", "readout", "inputs", "targets")
OPTIONAL = ("loss", "perturbation", "hx", "lengths")

DESCRIPTION = """\
Compare perturbation estimates with the true gradient, by backpropagation through time, over a grid of methods,
rollouts, discounts and sigmas; print the table, what the current setting lacks, and a recommendation.

CASE names a function without arguments in a Python file, as PATH:FUNCTION. It returns what anpgpu.diagnose takes: a
tuple (rnn, readout, inputs, targets) with the loss as an optional fifth ("mse" where it is missing), or a dict of these
names, which may also hold perturbation, hx and lengths.

    python -m anpgpu diagnose examples/digits.py:diagnose_case --output output/diagnose.png
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, by default the process's, and run the command."""
    parser = argparse.ArgumentParser(prog="python -m anpgpu", description="anpgpu from the command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "diagnose",
        help="are method, rollouts, discount and sigma right for a network and a batch?",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("case", metavar="CASE", help="PATH:FUNCTION, for example model.py:case")
    command.add_argument("--methods", nargs="+", metavar="NAME", help="default: anp anp-ls np")
    command.add_argument("--rollouts", nargs="+", type=int, metavar="P", help="default: 4 16 64")
    command.add_argument("--discounts", nargs="+", type=float, metavar="D", help="default: 0 0.5 0.8 0.9 0.95 1")
    command.add_argument("--sigmas", nargs="+", type=float, metavar="S", help="default: 1e-4 1e-3 1e-2 1e-1")
    command.add_argument("--repeats", type=int, help="seeds per setting (default: 4)")
    command.add_argument("--tolerance", type=float, help="cosine given away for a lower cost (default: 0.05)")
    command.add_argument("--seed", type=int, help="which seeds (default: 0)")
    command.add_argument("--output", type=Path, metavar="PNG", help="write a heat map, needs matplotlib")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    options = vars(parser.parse_args(arguments))
    output, quiet = options.pop("output"), options.pop("quiet")
    names = ("methods", "rollouts", "discounts", "sigmas", "repeats", "tolerance", "seed")
    grid = {name: options[name] for name in names if options[name] is not None}
    try:
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--output: there is no folder {str(output.parent)!r}")
        diagnosis = diagnose(**load(options["case"]), **grid, progress=not quiet)
        sys.stdout.write(diagnosis.table() + "\n")
        sys.stdout.write(f"recommendation: {diagnosis.recommendation}\n")
        if output is not None:
            diagnosis.plot(output)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        command.exit(2, f"{command.prog}: error: {error}\n")


def load(case: str) -> dict[str, Any]:
    """Call the function of a user's file named by "PATH:FUNCTION"; return its arguments for `diagnose`.

    Raises:
        ValueError, TypeError: there is no such file or function, or it returns something else; the message quotes it.
    """
    path, colon, function = case.rpartition(":")
    if not (path and colon and function):
        raise ValueError(f"CASE must be PATH:FUNCTION, got {case!r}")
    if not Path(path).is_file():
        raise ValueError(f"CASE: there is no file {path!r}")
    # The file may import its neighbours, as when it is run as a script.
    sys.path.insert(0, str(Path(path).resolve().parent))
    make = runpy.run_path(path).get(function)
    if not callable(make):
        raise ValueError(f"CASE: {path!r} has no function {function!r}")
    arguments = make()
    if isinstance(arguments, tuple) and len(arguments) in {4, 5}:
        arguments = dict(zip((*REQUIRED, "loss"), arguments, strict=False))
    if not isinstance(arguments, Mapping):
        raise TypeError(f"{function}() must return a tuple of 4 or 5 or a dict, got {arguments!r:.200}")
    missing, unknown = set(REQUIRED) - set(arguments), set(arguments) - {*REQUIRED, *OPTIONAL}
    if missing or unknown:
        what = f"lacks {sorted(missing)}" if missing else f"holds the unknown {sorted(unknown)}"
        raise ValueError(f"the dict of {function}() {what}; it may hold {[*REQUIRED, *OPTIONAL]}")
    return dict(arguments)


if __name__ == "__main__":
    main()
