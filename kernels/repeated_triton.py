"""A kernel launched once a step, compiled and bound once: what a step costs the host is one call.

Triton's launch binds the arguments, specialises on every one of them (its type, whether an address or a number is
divisible by 16) and looks up the kernel that was compiled for that. `Repeated` lets Triton do so at its first launch.
Those that follow differ in whole numbers alone that the kernel is not specialised on, so that the same compiled kernel
serves; it gets them directly, with addresses in place of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

NUMBERS_BELOW = 2**31
"""Whole numbers from here on have another type."""


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
        """Let Triton launch, and bind what it compiled."""
        compiled = self._ordinary(*numbers)
        watched = [knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook]
        # A profiler's hooks want Triton's own launches, and so do a kernel's; the interpreter compiles nothing.
        if compiled is None or self.kernel.pre_run_hooks or any(getattr(hook, "calls", hook) for hook in watched):
            self.run = self._ordinary
        else:
            self.run = self._bound(compiled)

    def _ordinary(self, *numbers: int) -> Any:
        changing = dict(zip(self.numbers, numbers, strict=True))
        return self.kernel[self.grid](**self.arguments, **changing, **self.options)

    def _bound(self, compiled: Any) -> Callable[..., None]:
        """Return the launch of a compiled kernel with all arguments but the numbers bound."""
        names = self.kernel.arg_names
        values = [_addressed(self.arguments.get(name)) for name in names]
        places = tuple(names.index(name) for name in self.numbers)
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        # What Triton hands to it, without hooks: grid, stream, kernel, what is known of it and of the launch.
        head = (*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
        launch = compiled.run

        def run(*numbers: int) -> None:
            for place, number in zip(places, numbers, strict=True):
                values[place] = number
            launch(*head, *values)

        return run


def _addressed(value: Any) -> Any:
    """Return an argument with addresses in place of tensors: they need not be looked up and checked again."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(_addressed(part) for part in value) if isinstance(value, tuple) else value
