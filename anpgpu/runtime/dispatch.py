"""Which implementation of an op runs: by the tensors' device, or as `backend=` says; never silently another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .ranges import within

OP_MODULES = {
    "noise": "noise",
    "rollout": "rollout",
    "returns": "adjoint",
    "adjoint": "adjoint",
    "rollout_adjoint": "adjoint",
}
SPECIAL_FORMS = {("deflate", "numba"): "least_squares_numba"}
SUFFIXES = {"torch": "", "numba": "_numba", "triton": "_triton", "cupy": "_cupy"}


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "triton", "cupy", "numba" or "torch".

    Args:
        requested: one of these, or "auto": triton for CUDA tensors, numba for the CPU's where it is installed, torch
            otherwise. Triton's and Numba's kernels have no float64; "auto" runs float64 in torch.
        device: where the tensors are.
        dtype: the rollouts' working type.

    Raises:
        ImportError: the requested backend is not installed.
        ValueError: it cannot run on that device or type.
    """
    on_cuda, on_cpu = device.type == "cuda", device.type == "cpu"
    if requested == "auto":
        if dtype == torch.float64:
            return "torch"
        return "triton" if on_cuda else "numba" if on_cpu and _has_numba() else "torch"
    if requested == "torch":
        return "torch"
    if requested in {"triton", "numba"} and dtype == torch.float64:
        others = "'torch' or 'cupy'" if requested == "triton" else "'torch'"
        raise ValueError(f"backend={requested!r} has no float64 kernels; use backend={others}, or float32")
    if requested == "numba":
        if not on_cpu:
            raise ValueError(f"backend='numba' needs CPU tensors, got {device}")
        return _imported("numba", "Numba: pip install 'anpgpu[cpu]'")
    if requested == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ImportError("backend='triton' needs the package triton, which is not installed")
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1 in the environment), got {device}"
            )
        return "triton"
    if not on_cuda:
        raise ValueError(f"backend='cupy' needs CUDA tensors, got {device}")
    return _imported("cupy", "CuPy: pip install 'anpgpu[cuda12]' or 'anpgpu[cuda13]', after the CUDA version")


def _imported(backend: str, needs: str) -> str:
    try:
        importlib.import_module(backend)
    except ImportError as error:
        raise ImportError(f"backend={backend!r} needs {needs} ({error})") from error
    return backend


@functools.cache
def _has_numba() -> bool:
    """Say whether Numba can be used; warn where it is installed in vain."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except ImportError as error:
        warnings.warn(
            f"Numba is installed but does not import ({error}); rollouts on the CPU run in torch, several times slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return the function that is `op` on `backend`, in the range of its name."""
    module = importlib.import_module(f"anpgpu.kernels.{OP_MODULES[op]}{SUFFIXES[backend]}")
    return within(op)(getattr(module, op))


@functools.cache
def special_form(op: str, backend: str) -> Callable[..., Any] | None:
    """Return a backend's own form of a step that every other takes in torch; None where it has none."""
    if (op, backend) not in SPECIAL_FORMS:
        return None
    form: Callable[..., Any] = getattr(importlib.import_module(f"anpgpu.kernels.{SPECIAL_FORMS[op, backend]}"), op)
    return form
