"""The call path of an update: files entered, frames above a rollout's first arithmetic, moves between rooms.

One update is `estimate_grad_` with "anp-ls" on the torch backend: `RNN` of one layer, Linear readout, mse, 32 rollouts,
more than hidden units, so that the primal form runs. The same update has run before, so that caches are full.

file    a file of anpgpu/ of which a function was called. Files of kernels/ do not count.
frame   a Python frame of anpgpu/ or kernels/ on the stack when the function `rollout` of kernels/rollout.py, or what it
        calls, first does arithmetic: from the outermost wrapper of `estimate_grad_` to the frame that asks torch, both
        included. Arithmetic is any operation of torch's but views and the making of memory.
entry   a Python frame of any file, torch's wrappers included, from the same wrapper to `rollout` itself.
room    a folder of anpgpu/, a file that lies in anpgpu/ itself, or kernels as a whole.
move    a call of a function of the package whose room is not that of the call before; the first call moves in. Returns
        do not count. A comprehension is a call before Python 3.12; a generator is called at each step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import anpgpu

PACKAGE = Path(anpgpu.__file__).resolve().parent
KERNELS = (PACKAGE / "kernels").resolve()
MOST_FILES, MOST_FRAMES, MOST_MOVES = 18, 8, 70
MEMORY = (
    "empty",
    "new_empty",
    "zeros",
    "new_zeros",
    "ones",
    "new_ones",
    "full",
    "new_full",
    "detach",
    "set_",
    "resize_",
)
"""Operations, `_like` included, that make memory or share it, beside those whose schema says that they are views."""


class Trace(NamedTuple):
    """The call path of an update."""

    files: int
    frames: int
    entry: int
    moves: int
    names: tuple[str, ...]
    """The files entered, in order."""
    stack: tuple[str, ...]
    """File, line and function of every frame above the first arithmetic, the outermost first."""
    rooms: tuple[str, ...]
    """Every call's room, in order."""

    def __str__(self) -> str:
        return (
            f"files {self.files} (at most {MOST_FILES}), frames {self.frames} (at most {MOST_FRAMES}), "
            f"frames to the rollout with torch's {self.entry}, moves {self.moves} (at most {MOST_MOVES})"
        )

    def report(self) -> str:
        """Return the figures, the stack and the rooms as text."""
        visits = [room for room, before in zip(self.rooms, (None, *self.rooms), strict=False) if room != before]
        return "\n".join((str(self), *self.stack, "files: " + " ".join(self.names), "rooms: " + " ".join(visits)))


def place_of(code: CodeType) -> str | None:
    """Return a function's file as a path in the package, kernels/... for its kernels; None for any other file."""
    path = Path(code.co_filename)
    if not path.is_absolute():
        return None
    path = path.resolve()
    if path.is_relative_to(KERNELS):
        return f"kernels/{path.relative_to(KERNELS).as_posix()}"
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def room_of(place: str) -> str:
    """Return the room of a file: its folder, or the file itself where it lies in none."""
    folder, slash, _ = place.partition("/")
    return folder if slash else folder.removesuffix(".py")


def calls(update: Callable[[], object]) -> list[str]:
    """Return the file of every call of a function of the package, in order."""
    places: list[str] = []
    known: dict[CodeType, str | None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in known:
                known[code] = place_of(code)
            place = known[code]
            if place is not None:
                places.append(place)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        update()
    finally:
        sys.setprofile(before)
    return places


class FirstArithmetic(TorchDispatchMode):
    """Records the stack, innermost frame first, of the first arithmetic inside a function of a file of the package."""

    def __init__(self, place: str, function: str) -> None:
        super().__init__()
        self.place, self.function = place, function
        self.stack: list[tuple[CodeType, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.stack and not makes_memory(func):
            stack = []
            frame = sys._getframe(1)
            while frame is not None:
                stack.append((frame.f_code, frame.f_lineno))
                frame = frame.f_back
            if any(self.is_inside(code) for code, _ in stack):
                self.stack = stack
        return func(*args, **(kwargs or {}))

    def is_inside(self, code: CodeType) -> bool:
        return code.co_name == self.function and place_of(code) == self.place


def makes_memory(func: Any) -> bool:
    """Return whether an operation only returns memory or a view, without arithmetic."""
    name = func.overloadpacket.__name__.removesuffix("_like")
    return func.is_view or name in MEMORY


def frames_of(stack: list[tuple[CodeType, int]]) -> tuple[list[str], int]:
    """Return the package's frames of a stack, outermost first, and how many of any file lead to the rollout."""
    stack = stack[::-1]
    inside = [number for number, (code, _) in enumerate(stack) if place_of(code) is not None]
    rollout = next(
        number
        for number, (code, _) in enumerate(stack)
        if code.co_name == "rollout" and place_of(code) == "kernels/rollout.py"
    )
    lines = [f"{place_of(stack[number][0])}:{stack[number][1]} {name_of(stack[number][0])}" for number in inside]
    return lines, rollout - inside[0] + 1


def name_of(code: CodeType) -> str:
    # Qualified names came with Python 3.11.
    return getattr(code, "co_qualname", code.co_name)


def update_of(hidden: int = 3, *, time: int = 4, batch: int = 2, **knobs: Any) -> Callable[[], object]:
    """Return one update of a small network, the same at each call."""
    torch.manual_seed(0)
    rnn, readout = anpgpu.RNN(2, hidden), nn.Linear(hidden, 1)
    inputs, targets = torch.randn(time, batch, 2), torch.randn(time, batch, 1)
    perturbation = anpgpu.Perturbation(**{"method": "anp-ls", "backend": "torch", **knobs})
    return lambda: anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=perturbation)


def traced_update(update: Callable[[], object] | None = None) -> Trace:
    """Trace an update, by default the one that this file is about."""
    update = update_of() if update is None else update
    update()
    places = calls(update)
    with FirstArithmetic("kernels/rollout.py", "rollout") as first:
        update()
    assert first.stack, "no arithmetic seen inside a rollout"
    stack, entry = frames_of(first.stack)
    names = tuple(dict.fromkeys(place for place in places if not place.startswith("kernels/")))
    rooms = tuple(room_of(place) for place in places)
    moves = sum(room != before for room, before in zip(rooms, (None, *rooms), strict=False))
    return Trace(len(names), len(stack), entry, moves, names, tuple(stack), rooms)


def test_one_update_stays_in_few_rooms():
    trace = traced_update()
    sys.stdout.write(f"one update: {trace}\n")
    assert trace.files <= MOST_FILES, trace.report()
    assert trace.frames <= MOST_FRAMES, trace.report()
    assert trace.entry <= MOST_FRAMES, trace.report()
    assert trace.moves <= MOST_MOVES, trace.report()


def test_neither_length_nor_batch_changes_the_figures():
    short, long = (traced_update(update_of(time=time, batch=batch)) for time, batch in ((3, 2), (7, 5)))
    assert short[:5] == long[:5]


def test_the_tracer_sees_the_whole_way():
    before = sys.getprofile()
    trace = traced_update()
    assert sys.getprofile() is before
    assert "estimate.py" in trace.names
    assert not any(name.startswith("kernels/") for name in trace.names)
    assert {"kernels", "estimate"} <= set(trace.rooms)
    assert len(trace.stack) == trace.frames
    functions = [line.split(":")[0] + line[line.rindex(" ") :] for line in trace.stack]
    assert functions.index("estimate.py estimate_grad_") < functions.index("kernels/rollout.py rollout")
    assert functions[-1].startswith("kernels/")


def test_views_and_memory_are_no_arithmetic():
    aten = torch.ops.aten
    assert all(makes_memory(op) for op in (aten.t.default, aten.empty_like.default, aten.select.int))
    assert not any(makes_memory(op) for op in (aten.abs.out, aten.add_.Tensor, aten.mm.default, aten.copy_.default))


def test_rooms_are_folders_and_faces():
    assert room_of("estimate.py") == "estimate"
    assert room_of("runtime/division.py") == room_of("runtime/ranges.py") == "runtime"
    assert room_of("kernels/noise.py") == "kernels"
    assert place_of(anpgpu.functional.rollout.__code__) == "functional.py"
    assert place_of(test_rooms_are_folders_and_faces.__code__) is None
