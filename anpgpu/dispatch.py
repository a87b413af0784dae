"""Which implementation of an op runs: by the tensors' device, or as `backend=` says; never silently another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
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
SUFFIXES = {"torch": "", "triton": "_triton", "cupy": "_cupy"}


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "triton", "cupy" or "torch".

    Args:
        requested: one of these, or "auto": triton for CUDA tensors, torch otherwise. Triton's kernels have no float64;
            "auto" runs float64 in torch.
        device: where the tensors are.
        dtype: the rollouts' working type.

    Raises:
        ImportError: the requested backend is not installed.
        ValueError: it cannot run on that device or type.
    """
    on_cuda = device.type == "cuda"
    if requested == "auto":
        return "triton" if on_cuda and dtype != torch.float64 else "torch"
    if requested == "torch":
        return "torch"
    if requested == "triton":
        if dtype == torch.float64:
            raise ValueError("backend='triton' has no float64 kernels; use backend='torch' or 'cupy', or float32")
        if importlib.util.find_spec("triton") is None:
            raise ImportError("backend='triton' needs the package triton, which is not installed")
        if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1 in the environment), got {device}"
            )
        return "triton"
    if not on_cuda:
        raise ValueError(f"backend='cupy' needs CUDA tensors, got {device}")
    try:
        importlib.import_module("cupy")
    except ImportError as error:
        raise ImportError(
            "backend='cupy' needs CuPy: pip install 'anpgpu[cuda12]' or 'anpgpu[cuda13]', after the CUDA version"
        ) from error
    return "cupy"


@functools.cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return the function that is `op` on `backend`, in the range of its name."""
    module = importlib.import_module(f"anpgpu.kernels.{OP_MODULES[op]}{SUFFIXES[backend]}")
    return within(op)(getattr(module, op))
