"""Runs scripts as `python SCRIPT` would, in forks of a process that has imported what most of them do.

The work: the folder to work in, the script, its arguments, whether every warning is an error.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

IMPORTED = ("torch", "torch._dynamo", "numba", "numpy", "matplotlib.pyplot", "tqdm", "scipy.stats")


def run(folder, script, arguments, strict):
    """Run a script; return 0 if it came to its end."""
    os.chdir(folder)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    if strict:
        warnings.simplefilter("error")
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    from forking import serve

    # This file's folder; a script has its own there.
    sys.path.pop(0)
    serve(run, IMPORTED)
