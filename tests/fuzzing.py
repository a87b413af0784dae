"""Inputs and checks of the fuzz tests: odd tensors, wrong values, time limits, error messages."""

import contextlib
import math
import signal
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

LEGS = [60, pytest.param(2000, marks=pytest.mark.slow)]
"""Inputs per function, in every run and in the thorough one."""

TRIED: Counter[str] = Counter()
"""Number of inputs so far, by function, for the summary that conftest.py writes."""

REFUSED: Counter[str] = Counter()
"""Number of refused inputs so far, by function."""

CPU_SECONDS = 20
"""A call that takes longer hangs; the slowest takes tenths of a second. It is CPU time, to allow for a busy machine."""

LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "expanded", "offset")
CONTENTS = ("moderate",) * 6 + ("zeros", "denormal", "huge", "nan", "inf", "-inf")
FLOATS = (torch.float32, torch.float64)
EVERY_DTYPE = (*FLOATS, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64)
MODERATE = {"moderate", "zeros", "denormal"}


def laid_out(values, layout):
    """The same values with other strides; "expanded" repeats the first row instead."""
    if not values.dim() or not values.numel():
        return values
    if layout == "transposed":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        room = values.new_zeros([2 * size for size in values.shape])
        view = room[tuple(slice(None, None, 2) for _ in values.shape)]
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "offset":
        return torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)
    return values


def filled(shape, dtype, content, seed):
    """Values of one kind; wild ones are in the first sample only, index 0 of the second dimension."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if content == "zeros":
        values = torch.zeros_like(values)
    if dtype not in FLOATS:
        return (3 * values).to(dtype)
    values = values.to(dtype)
    if content == "denormal":
        return values * (torch.finfo(dtype).tiny / 16)
    if content not in MODERATE and values.numel() and (values.dim() < 2 or values.shape[1]):
        wild = {"huge": 1e30, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
        first = values[:, 0] if values.dim() > 1 else values
        first[...] = torch.where(torch.arange(first.numel()).view(first.shape) % 3 == seed % 3, wild, first)
    return values


@st.composite
def tensor(draw, shape, dtype, content="moderate"):
    """A tensor of the shape and type, in any layout."""
    values = filled(shape, dtype, content, draw(st.integers(0, 99)))
    return laid_out(values, draw(st.sampled_from(LAYOUTS)))


@st.composite
def wrong_tensor(draw):
    """A tensor of any shape, type and device."""
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    values = filled(shape, draw(st.sampled_from(EVERY_DTYPE)), draw(st.sampled_from(CONTENTS)), draw(st.integers(0, 9)))
    values = laid_out(values, draw(st.sampled_from(LAYOUTS)))
    return draw(st.sampled_from([values, values, values, values.to("meta"), values.to_sparse()]))


WRONG = st.one_of(
    st.sampled_from(
        [
            *(None, "", "x", b"x", True, False, 0, 1, -1, 7, 2**40, -(2**70), 0.0, -0.5, 0.5, 2.5, 1e-320, 1e-42, 1e39),
            *(1e308, math.nan, math.inf, -math.inf, 1j, [], (), {}, [1, 2], (1.5,), ["x"], {"x": 1}),
        ]
    ),
    st.sampled_from([torch.float32, torch.device("meta"), torch.nn.Linear, torch.nn.GRUCell(2, 2), len, object()]),
    st.sampled_from([np.float64(0.5), np.float32(0.5), np.int64(2), np.zeros(3), np.zeros((3, 2, 4), np.float32)]),
    wrong_tensor(),
)
"""Values that are wrong for most arguments."""


class Call(NamedTuple):
    """An input of a function."""

    arguments: dict[str, Any]
    spoiled: tuple[str, ...] = ()
    """Arguments that were replaced by something from `WRONG`."""
    content: str = "moderate"
    autocast: bool = False


@st.composite
def spoilt(draw, arguments, always=False):
    """The arguments, of which one call in three has one replaced, and the name of the replaced one."""
    if not (always or draw(st.sampled_from([False, False, True]))):
        return arguments, ()
    name = draw(st.sampled_from(sorted(arguments)))
    return arguments | {name: draw(WRONG)}, (name,)


def reference_of(value):
    """The value as a contiguous float64 tensor that is no view."""
    if isinstance(value, torch.Tensor):
        return (
            value.detach()
            .clone(memory_format=torch.contiguous_format)
            .to(torch.float64 if value.is_floating_point() else value.dtype)
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(reference_of, value))
    return value


def quotes(message, value):
    """Whether a message quotes the value, its type, shape, dtype or device."""
    told = [type(value).__name__, str(value), repr(value)[:30]]
    if isinstance(value, torch.Tensor):
        told += [str(tuple(value.shape)), str(list(value.shape)), str(value.dtype), str(value.device), value.layout]
        told += [f"{value.dim()}D", f"{value.dim()}-D", f"got {value.dim()}"]
        if value.is_floating_point() and value.layout is torch.strided and value.device.type == "cpu":
            # A single wrong element, in full.
            told += [f"got {element}" for element in value.detach().double().flatten().tolist()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return any(quotes(message, element) for element in value)
    if isinstance(value, (list, tuple)):
        told += [f"({len(value)},)", *map(repr, value)]
    if isinstance(value, (np.generic, np.ndarray)):
        told += [str(value.shape), str(value.dtype)]
    return any(str(text) in message for text in told)


@contextlib.contextmanager
def no_hang():
    """Raise TimeoutError where the block takes more than `CPU_SECONDS` of this process."""

    def stop(number, frame):
        raise TimeoutError(f"no result after {CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuzz(name, calls, check, inputs):
    """Check a function on `inputs` calls; return how many there were."""
    before = TRIED[name]

    @settings(max_examples=inputs, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(calls)
    def run(call):
        check(call)

    run()
    return TRIED[name] - before


def tried(name, function, call, *, errors=(ValueError, TypeError), quoting=True, excuses=()):
    """The function's result, or None where it refused a spoiled call with a message that tells why.

    With one of `excuses` in its message it may refuse any call.
    """
    TRIED[name] += 1
    where = torch.autocast("cpu", dtype=torch.bfloat16) if call.autocast else contextlib.nullcontext()
    try:
        with no_hang(), where:
            return function(**call.arguments)
    except errors as error:
        refusal = error
    REFUSED[name] += 1
    if not any(excuse in str(refusal) for excuse in excuses):
        assert call.spoiled, f"a good call was refused: {refusal!r}"
        told_why = any(quotes(str(refusal), value) for value in told(call))
        assert told_why or not quoting, f"the message quotes no value: {refusal!r}"
    return None


def told(call):
    """The values that a message may quote: the replaced one and, where it is a tensor, those it does not fit."""
    put_in = [call.arguments[name] for name in call.spoiled]
    return list(call.arguments.values()) if any(isinstance(value, torch.Tensor) for value in put_in) else put_in


def plain(call):
    """The arguments in plain float64 form."""
    return {name: reference_of(value) for name, value in call.arguments.items()}


def assert_right(values, expected, wide):
    """Equal to the float64 reference to `wide` roundings of the result's type, relative to the largest value."""
    assert values.shape == expected.shape
    if not values.numel():
        return
    limits = torch.finfo(values.dtype)
    scale = float(expected.abs().max())
    if scale < limits.max / 1e4:
        assert bool(values.isfinite().all())
        error = float((values.double() - expected.double()).abs().max())
        assert error <= wide * limits.eps * scale + 1e6 * limits.tiny, f"off by {error}, values up to {scale}"
