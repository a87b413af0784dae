"""How the Numba kernels are compiled, on how many threads they run (torch's), and how they see tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

_MOST_THREADS: int = getattr(numba.config, "NUMBA_NUM_THREADS")  # noqa: B009  (set when it is imported)

_PROCESS = os.getpid()
"""A fork of this process must not use threads: GNU's OpenMP would end it."""

CONTRACT = {"contract"}
"""Products and sums may fuse. Nothing may assume that values are finite: NaN and infinity must stay."""

REASSOCIATE = {"contract", "reassoc", "nsz"}
"""Sums may also run in vectors, in any order."""


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function into the kernels that call it.

    A call instead would reach one of two roundings of the same thing: that of the function compiled alone, or, where
    the kernel came from the disk, that compiled with the kernel.
    """
    return _compiled(function, parallel=False, fastmath=CONTRACT, forceinline=True)


def summing(function: Callable[..., Any]) -> Any:
    """Compile a function whose sums may be taken in any order into the kernels that call it."""
    return _compiled(function, parallel=False, fastmath=REASSOCIATE, forceinline=True)


def kernel(function: Callable[..., Any]) -> Callable[..., None]:
    """Compile a function whose `prange` is spread over as many threads as torch uses.

    Its forms with and without threads are compiled when first needed. Numba's number of threads is set to torch's and
    left there: changing it back and forth starts new threads each time, which takes milliseconds. A forked process
    stays on one thread. The GIL stays held, since not every threading layer allows two kernels at once.
    """
    alone = _compiled(function, parallel=False, fastmath=CONTRACT)
    spread = _compiled(function, parallel=True, fastmath=CONTRACT)

    @functools.wraps(function)
    def run(*arguments: Any) -> None:
        threads = min(torch.get_num_threads(), _MOST_THREADS)
        if threads == 1 or os.getpid() != _PROCESS:
            alone(*arguments)
            return
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        spread(*arguments)

    return run


@functools.cache
def sources_version(folder: Path = Path(__file__).parent) -> str:
    """Return a hash of everything a kernel may be compiled from: all `*_numba.py` files and their references.

    Part of the name of everything that is compiled. For changes, Numba looks only at the file of a function, not at the
    files whose functions and constants are compiled into it, and would use what it stored.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*_numba.py")):
        for source in (path, path.with_name(path.name.replace("_numba", ""))):
            digest.update(source.read_bytes() if source.exists() else b"")
    return digest.hexdigest()[:12]


def _renamed(function: Callable[..., Any], ending: str) -> types.FunctionType:
    """Return a copy of another name: Numba stores what it compiled by name, whatever the options were."""
    assert isinstance(function, types.FunctionType)  # noqa: S101  (for the type checker)
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = function.__qualname__ + ending
    copy.__module__ = function.__module__
    return copy


def _compiled(function: Callable[..., Any], *, parallel: bool, fastmath: set[str], forceinline: bool = False) -> Any:
    """Compile a function at its first call and store the result on the disk."""
    function = _renamed(function, f"_{sources_version()}{'_parallel' if parallel else ''}")
    compiler: Any = numba.njit
    options = {"parallel": parallel, "fastmath": fastmath, "error_model": "numpy", "forceinline": forceinline}
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:
        # There is no folder to store it in: each process compiles it anew.
        return compiler(**options)(function)


def rows_of(activity: Tensor) -> Tensor:
    """Return (T, B, P, H) as (T B P, padded), without a copy where a rollout made it."""
    time, batch, rollouts, units = activity.shape
    length = activity.stride(2) if rollouts > 1 else units
    nested = (batch * rollouts * length, rollouts * length, length, 1)
    rows = time * batch * rollouts
    fits = activity.storage_offset() + rows * length <= activity.untyped_storage().nbytes() // activity.element_size()
    if length >= units and activity.stride() == nested and fits:
        return activity.as_strided((rows, length), (length, 1))
    return activity.reshape(rows, units).contiguous()
