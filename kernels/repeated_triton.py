"""A kernel launched once a step, compiled and bound once: what a step costs the host is one call.

Triton's launch binds the arguments, specialises on every one of them (its type, whether an address or a number is
divisible by 16) and looks up the kernel that was compiled for that. `Repeated` lets Triton do so at its first launch.
Those that follow differ in whole numbers alone that the kernel is not specialised on, so that the same compiled kernel
serves; it gets them directly, with addresses in place of the tensors, and with descriptors (TMA) encoded once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

NUMBERS_BELOW = 2**31
"""Whole numbers from here on have another type."""

ENCODING = {"launcher", "tensordesc_indices", "tensordesc_meta"}
"""What the function closes over through which Triton 3.6 and 3.7 launch a kernel that takes descriptors."""


class Repeated:
    """Launches of a kernel that differ in some whole numbers.

    Args:
        kernel: a function of `triton.jit`.
        grid: number of programs.
        arguments: every other argument by name. The tensors stay where they are as long as this lives.
        below: what the numbers are below, by name, in the order in which a call takes them.
        **options: of the launch, `num_warps` for one.

    Raises:
        ValueError: a number is one that the kernel is specialised on, or may leave the type of the others.
    """

    def __init__(
        self, kernel: Any, grid: int, arguments: Mapping[str, Any], below: Mapping[str, int], **options: Any
    ) -> None:
        self.kernel, self.grid, self.arguments, self.options = kernel, (grid, 1, 1), dict(arguments), options
        self.numbers = tuple(below)
        for name, bound in below.items():
            # Triton's interpreter specialises on nothing.
            if name not in getattr(kernel, "do_not_specialize", below):
                raise ValueError(f"{name} changes from launch to launch, but the kernel is specialised on it")
            if bound > NUMBERS_BELOW:
                raise ValueError(f"{name} must stay below {NUMBERS_BELOW} in every launch, got up to {bound}")
        self.run: Callable[..., None] = self._first

    def __call__(self, *numbers: int) -> None:
        """Launch the kernel with these numbers."""
        self.run(*numbers)

    def _first(self, *numbers: int) -> None:
        """Let Triton launch, which compiles."""
        compiled = self._ordinary(*numbers)
        watched = [knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook]
        # A profiler's hooks want Triton's own launches, and so do a kernel's; the interpreter compiles nothing.
        if compiled is None or self.kernel.pre_run_hooks or any(getattr(hook, "calls", hook) for hook in watched):
            self.run = self._ordinary
        else:
            self.run = functools.partial(self._second, compiled)

    def _second(self, compiled: Any, *numbers: int) -> None:
        """Bind what Triton compiled: only now, because some kernels are launched once."""
        self.run = self._bound(compiled)
        self.run(*numbers)

    def _ordinary(self, *numbers: int) -> Any:
        changing = dict(zip(self.numbers, numbers, strict=True))
        return self.kernel[self.grid](**self.arguments, **changing, **self.options)

    def _bound(self, compiled: Any) -> Callable[..., None]:
        """Return the launch of a compiled kernel with all arguments but the numbers bound."""
        names = self.kernel.arg_names
        bound = encoded(compiled.run, [self.arguments.get(name) for name in names])
        places = tuple(bound.places[names.index(name)] for name in self.numbers)
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        # What Triton hands to it, without hooks: grid, stream, kernel, what is known of it and of the launch.
        head = (*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
        launch, values = bound.launch, bound.values

        def run(*numbers: int) -> None:
            for place, number in zip(places, numbers, strict=True):
                values[place] = number
            launch(*head, *values)

        return run


class Bound(NamedTuple):
    """A launcher and what it takes."""

    launch: Callable[..., None]
    values: list[Any]
    places: Sequence[int]
    """Where in `values` each argument of the kernel is, or begins."""


def encoded(launcher: Any, arguments: list[Any]) -> Bound:
    """Return a launcher with a kernel's arguments, in which every descriptor is encoded as CUDA takes it.

    Triton's launcher encodes descriptors at each launch, in a function around the one that takes them encoded. Where it
    is not made like that, they stay as they are, and a warning says so.
    """
    described = [place for place, value in enumerate(arguments) if isinstance(value, TensorDescriptor)]
    values = [_addressed(value) for value in arguments]
    encoding = _encoding(launcher, described) if described else None
    if encoding is None:
        if described:
            warnings.warn(
                f"Triton {triton.__version__} launches kernels with tensor descriptors in a way that anpgpu does not "
                "know: they are encoded anew at every step, which costs the host some microseconds a step",
                RuntimeWarning,
                stacklevel=2,
            )
        return Bound(launcher, values, range(len(values)))
    flat: list[Any] = []
    places = []
    for place, value in enumerate(values):
        places.append(len(flat))
        metadata = encoding.metadata
        flat += map(_addressed, encoding.encode(value, metadata[place])) if place in metadata else [value]
    direct = copy.copy(launcher)
    direct.launch = encoding.launch
    return Bound(direct, flat, places)


class Encoding(NamedTuple):
    """How Triton's launcher encodes the descriptors of a kernel."""

    launch: Any
    """Takes them encoded."""
    encode: Any
    """Returns what stands for a descriptor, from it and what the compiler knows of it."""
    metadata: dict[int, Any]
    """What the compiler knows of each descriptor, by its place among the arguments."""


def _encoding(launcher: Any, described: list[int]) -> Encoding | None:
    """Return how a launcher encodes the descriptors at some places; None where it is not made like Triton's."""
    wrapper = getattr(launcher, "launch", None)
    if not inspect.isfunction(wrapper):
        return None
    closed = inspect.getclosurevars(wrapper).nonlocals
    encode = wrapper.__globals__.get("make_tensordesc_arg")
    if encode is None or set(closed) != ENCODING or not all(closed.values()):
        return None
    places, metadata = sorted(closed["tensordesc_indices"]), closed["tensordesc_meta"]
    if places != described or len(metadata) != len(described):
        return None
    return Encoding(closed["launcher"], encode, dict(zip(described, metadata, strict=True)))


def _addressed(value: Any) -> Any:
    """Return an argument with addresses in place of tensors: they need not be looked up and checked again."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(_addressed(part) for part in value) if isinstance(value, tuple) else value
