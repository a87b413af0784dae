"""Named ranges for profilers: they tell which op or phase a kernel or a stretch of time belongs to.

A range has a constant name and a category. It appears in the NVTX domain `anpgpu` (Nsight Systems, Nsight Compute) and,
while torch.profiler records, in its trace as `anpgpu::<name>`. Whether a tool listens to NVTX is decided at the first
range, as in NVTX itself; without a tool or profiler, a range costs one comparison and one flag read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

try:
    import nvtx
except ImportError:
    # A base dependency, but no result depends on it.
    nvtx = None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DOMAIN = "anpgpu"

RANGES = {
    "estimate_grad_": "update",
    "backward": "update",
    "clean_run": "clean run",
    "noise": "noise",
    "rollout": "rollout",
    "rollout_adjoint": "rollout",
    "weight_perturbation": "rollout",
    "perturbed_readout": "rollout",
    "returns": "credit",
    "adjoint": "adjoint",
    "least_squares": "adjoint",
    "weight_gradients": "gradients",
}
"""All names, with their categories. Names must need no escape in a filter of Nsight Compute."""


@functools.cache
def listening() -> Any:
    """Return the NVTX domain, or None if no tool listens to it."""
    if nvtx is None or not nvtx.enabled():
        return None
    domain = nvtx.get_domain(DOMAIN)
    # Without a tool, nvtx returns a dummy domain, whose category ids are None.
    return None if domain.get_category_id("update") is None else domain


@functools.cache
def _attributes(domain: Any, name: str) -> Any:
    return domain.get_event_attributes(message=name, category=RANGES[name])


NOWHERE = contextlib.nullcontext()


def entered(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in the range `name`, one of `RANGES`, which begins at this call: use it in `with` directly."""
    # Compiled graphs hold no ranges of their own: the ops in them enter theirs.
    if torch.compiler.is_compiling():
        return NOWHERE
    domain = listening()
    recorded = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    if domain is None and not recorded:
        return NOWHERE
    stack = contextlib.ExitStack()
    if domain is not None:
        domain.push_range(_attributes(domain, name))
        stack.callback(domain.pop_range)
    if recorded:
        stack.enter_context(torch.profiler.record_function(f"{DOMAIN}::{name}"))
    return stack


def within(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that runs a function in the range `name`.

    Raises:
        ValueError: the name is none of `RANGES`.
    """
    if name not in RANGES:
        raise ValueError(f"a range is one of {', '.join(RANGES)}, got {name!r}")

    def wrap(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def inside(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            with entered(name):
                return function(*arguments, **named)

        return inside

    return wrap
