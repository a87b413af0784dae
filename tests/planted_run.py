"""Runs pytest on a copy of the package, in a fork of a process that has imported no other.

The work: the folder of the copy, pytest's arguments, variables of the environment.
"""

import os
import sys

IMPORTED = ("torch", "torch._dynamo", "numba", "scipy.stats", "pytest")


def run(folder, arguments, variables):
    """Return pytest's exit status."""
    import pytest

    os.chdir(folder)
    os.environ.update(variables)
    sys.path.insert(0, folder)
    sys.argv[0] = "pytest"
    return pytest.main(arguments)


if __name__ == "__main__":
    from forking import serve

    # This file's folder: tests come from the one that pytest is told.
    sys.path.pop(0)
    serve(run, IMPORTED)
