"""Chooses the implementation of an op, by the tensors' device or `backend=`; it never silently runs another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from anpgpu.kernels.cell import CellForms
from anpgpu.kernels.feedback import feedback
from anpgpu.kernels.least_squares import least_squares
from anpgpu.perturbation import AUTO
from anpgpu.registry import BACKENDS

OP_MODULES = {
    "noise": "noise",
    "rollout": "rollout",
    "returns": "adjoint",
    "adjoint": "adjoint",
    "rollout_adjoint": "adjoint",
}
"""Stem of the kernel file of each op; profiler ranges have the names of the ops."""

PART_MODULES = {
    "least_squares": "least_squares",
    "deflate": "least_squares",
    "factored": "least_squares",
    "feedback": "feedback",
    "descend": "feedback",
    "mark_finite": "finite",
    "clean_cross_entropy": "cross_entropy",
    "weight_gradients": "weight_gradients",
}
"""The same for functions that some backends have, whole or as part of an op."""


class Backend:
    """A set of implementations of the ops, and what they run on; base of every entry of `BACKENDS`."""

    suffix: str = ""
    """Suffix of its kernel files."""
    float64: bool = True
    """Whether it has float64 kernels."""
    instead: str = ""
    """Backends that an error suggests for float64, where it has no float64 kernels."""
    fuses: bool = False
    """Whether `rollout_adjoint` is one kernel, which credits rollouts without storing their activity."""
    narrow_activity: bool = False
    """Whether activity differences of 16-bit operands are stored as bfloat16."""
    own_least_squares: bool = False
    """Whether it has its own form of `least_squares`."""
    own_feedback: bool = False
    """Whether it has its own form of `feedback`."""
    own_marks: bool = False
    """Whether it has its own form of `mark_finite`."""
    own_cross_entropy: bool = False
    """Whether it has its own form of `clean_cross_entropy`."""
    own_weight_gradients: bool = False
    """Whether it has its own form of `weight_gradients`."""
    own_recursion: bool = False
    """Whether it has its own form of the least-squares recursion, `deflate`, of that of learned feedback, and of the
    factors that both solve with."""

    @staticmethod
    def check(device: torch.device) -> None:
        """Raise if it cannot run on tensors of a device.

        Raises:
            ImportError: a package that it needs is not installed.
            ValueError: it does not run on that device.
        """


@BACKENDS.add("triton")
class Triton(Backend):
    """Triton kernels, for CUDA tensors; on the CPU only in Triton's interpreter."""

    suffix, float64, instead = "_triton", False, "'torch' or 'cupy'"
    fuses, narrow_activity, own_least_squares, own_marks = True, True, True, True
    own_cross_entropy, own_weight_gradients, own_feedback = True, True, True

    @staticmethod
    def check(device: torch.device) -> None:
        """Raise without the package triton, or for tensors off a GPU outside the interpreter."""
        if importlib.util.find_spec("triton") is None:
            raise ImportError("backend='triton' needs the package triton, which is not installed")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"backend='triton' needs CUDA tensors (or TRITON_INTERPRET=1 in the environment), got {device}"
            )


@BACKENDS.add("cupy")
class CuPy(Backend):
    """Plain CUDA C, one thread per element: the oracle of the Triton kernels."""

    suffix = "_cupy"

    @staticmethod
    def check(device: torch.device) -> None:
        """Raise without CuPy, or for tensors off a GPU."""
        if device.type != "cuda":
            raise ValueError(f"backend='cupy' needs CUDA tensors, got {device}")
        _import("cupy", "CuPy: pip install 'anpgpu[cuda12]' or 'anpgpu[cuda13]', after the CUDA version")


@BACKENDS.add("numba")
class Numba(Backend):
    """Compiled loops, for float32 on the CPU."""

    suffix, float64, instead, own_recursion = "_numba", False, "'torch'", True

    @staticmethod
    def check(device: torch.device) -> None:
        """Raise without Numba, or for tensors off the CPU."""
        if device.type != "cpu":
            raise ValueError(f"backend='numba' needs CPU tensors, got {device}")
        _import("numba", "Numba: pip install 'anpgpu[cpu]'")


@BACKENDS.add("torch")
class Torch(Backend):
    """The reference, for every device and type."""


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, forms: CellForms | None = None) -> str:
    """Return the name of the backend that runs.

    Args:
        requested: a name of `BACKENDS`, or "auto": triton for CUDA tensors; numba for CPU tensors, where it is
            installed; torch otherwise, for float64, and for a cell that the fast backend has no form of.
        device: of the tensors.
        dtype: the rollouts' working type.
        forms: of the cell whose rollouts are run; None for an op that does not depend on the cell.

    Raises:
        ImportError: the requested backend is not installed.
        ValueError: there is no such backend, or it cannot run on that device or type, or has no form of the cell.
    """
    if requested == AUTO:
        fast = "triton" if device.type == "cuda" else "numba" if device.type == "cpu" and _has_numba() else "torch"
        serves = BACKENDS[fast].float64 or dtype != torch.float64
        return fast if serves and (forms is None or getattr(forms, fast) is not None) else "torch"
    backend = BACKENDS[requested]
    if dtype == torch.float64 and not backend.float64:
        raise ValueError(f"backend={requested!r} has no float64 kernels; use backend={backend.instead}, or float32")
    backend.check(device)
    if forms is not None and getattr(forms, requested, None) is None:
        forms.on(requested)
    return requested


def _import(package: str, needs: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"backend={package!r} needs {needs} ({error})") from error


@functools.cache
def _has_numba() -> bool:
    """Return whether Numba can be used; warn where it is installed but does not import."""
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


def stored_dtype(backend: str, precision: str, working: torch.dtype) -> torch.dtype:
    """Return the type in which a backend's rollouts store activity differences."""
    narrow = BACKENDS[backend].narrow_activity and precision in {"bf16", "fp16"}
    return torch.bfloat16 if narrow else working


@functools.cache
def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return the function that implements `op` on `backend`."""
    stem = {**OP_MODULES, **PART_MODULES}[op]
    module = importlib.import_module(f"anpgpu.kernels.{stem}{BACKENDS[backend].suffix}")
    function: Callable[..., Any] = getattr(module, op)
    return function


@functools.cache
def marks_on(backend: str) -> Callable[..., Any]:
    """Return `mark_finite` of a backend, which is the reference's where it has none of its own."""
    return implementation("mark_finite", backend if BACKENDS[backend].own_marks else "torch")


@functools.cache
def cross_entropy_on(backend: str) -> Callable[..., Any]:
    """Return `clean_cross_entropy` of a backend, which is the reference's where it has none of its own."""
    return implementation("clean_cross_entropy", backend if BACKENDS[backend].own_cross_entropy else "torch")


@functools.cache
def weight_gradients_on(backend: str, precision: str) -> Callable[..., Any]:
    """Return `weight_gradients` of a backend, or the reference's, for rollouts of a precision."""
    own = BACKENDS[backend].own_weight_gradients
    return functools.partial(implementation("weight_gradients", backend if own else "torch"), precision=precision)


@functools.cache
def least_squares_on(backend: str) -> Callable[..., Any]:
    """Return `least_squares` of a backend: its own form, or the reference with what the backend has of its parts."""
    if BACKENDS[backend].own_least_squares:
        return implementation("least_squares", backend)
    return functools.partial(least_squares, **_parts("deflate", backend))


@functools.cache
def feedback_on(backend: str) -> Callable[..., Any]:
    """Return `feedback` of a backend: its own form, or the reference with what the backend has of its parts."""
    if BACKENDS[backend].own_feedback:
        return implementation("feedback", backend)
    return functools.partial(feedback, **_parts("descend", backend))


def _parts(recursion: str, backend: str) -> dict[str, Any]:
    """Return a backend's noise, recursion over time and factors, the last two None where it has none."""
    own = BACKENDS[backend].own_recursion
    parts = {"recursion": recursion, "factors": "factored"}
    found = {name: implementation(part, backend) if own else None for name, part in parts.items()}
    return {"draw": implementation("noise", backend), **found}
