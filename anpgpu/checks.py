"""Checks of arguments; each raises an error that quotes the value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from .kernels.noise import COUNTER_LIMITS, UNIT_BLOCKS_LIMIT, UNITS_PER_GROUP, Counters

WORKING = (torch.float32, torch.float64)

SIGMA_RANGES = {
    dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max / 8) for dtype in (torch.float16, torch.bfloat16, *WORKING)
}
"""Smallest and largest sigma by the noise's type: sigma is a normal number, and 6.7 sigma, the most extreme Gaussian
value, is finite."""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the allowed names."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, one of {', '.join(map(repr, allowed))}; got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value`, an int of at least `low` and below `high`; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value >= high):
        bound = f"at least {low}" if high is None else f"in [{low}, {high - 1}]"
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return value


def real(name: str, value: object) -> float:
    """Return `value` as a float; raise unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    return float(value)


def tensor(name: str, value: object) -> Tensor:
    """Return `value`, a tensor; raise TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def module_of(name: str, value: object) -> nn.Module:
    """Return `value`, a module; raise TypeError otherwise."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    return value


def flag(name: str, value: object) -> bool:
    """Return `value`, a bool; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def sigma(value: object, dtype: torch.dtype) -> float:
    """Return `value`, a standard deviation whose noise `dtype` can represent; raise otherwise."""
    least, most = SIGMA_RANGES[dtype]
    if not least <= real("sigma", value) <= most:
        raise ValueError(f"sigma must be positive and finite, in [{least}, {most}] for {dtype}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def shaped(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return `value`, a tensor of that shape with the type and device of `like`; raise otherwise."""
    result = tensor(name, value)
    if tuple(result.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(result.shape)}")
    if result.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, as the other tensors are, got {result.dtype}")
    if result.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, where the other tensors are, got {result.device}")
    return result


def working(name: str, value: object, dims: int) -> Tensor:
    """Return `value`, a float32 or float64 tensor with that many dimensions, none of size 0 but the batch; or raise."""
    result = tensor(name, value)
    if result.dtype not in WORKING:
        raise TypeError(f"{name} must be float32 or float64, got {result.dtype}")
    if result.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(result.shape)}")
    if any(size == 0 for axis, size in enumerate(result.shape) if axis != 1):
        raise ValueError(f"{name} must not be empty but for its batch, got shape {tuple(result.shape)}")
    return result


def place(value: object) -> torch.device:
    """Return `value` as a device that exists on this machine; raise otherwise."""
    try:
        device = torch.device(value)  # type: ignore[call-overload]
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, OverflowError, AssertionError) as error:
        raise ValueError(f"device must be a device of torch's that is here, got {value!r}") from error
    return device  # type: ignore[no-any-return]


def seed(value: object, device: torch.device) -> Tensor:
    """Return the noise's key as a 0-dim int64 tensor, from such a tensor or an int in [-2^63, 2^64)."""
    if isinstance(value, Tensor):
        if value.dim() or value.dtype != torch.int64:
            raise ValueError(f"seed must be a 0-dim int64 tensor, got {value.dtype} of shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"seed must be on {device}, where the other tensors are, got {value.device}")
        return value
    key = whole("seed", value, -(2**63), 2**64)
    return torch.tensor(key - 2**64 if key >= 2**63 else key, dtype=torch.int64, device=device)


def counters(value: object, shape: tuple[int, int, int, int], kind: str) -> Counters:
    """Return `value`, counters whose every field stays in range over a (T, B, P, H) block of noise; or raise."""
    if not isinstance(value, Counters):
        raise TypeError(f"counters must be anpgpu.functional.Counters, got {type(value).__name__}")
    time, batch, rollouts, hidden = shape
    extent = {"time": time, "sample": batch, "rollout": rollouts}
    for name, limit in COUNTER_LIMITS.items():
        first = whole(f"counters.{name}", getattr(value, name), 0, limit)
        last = first + extent.get(name, 1) - 1
        if last >= limit:
            raise ValueError(f"counters.{name} reaches {last} over {extent[name]} indices, allowed is [0, {limit - 1}]")
    blocks = 4 * -(-hidden // UNITS_PER_GROUP[kind])
    if blocks > UNIT_BLOCKS_LIMIT:
        raise ValueError(f"hidden={hidden} needs {blocks} unit blocks of {kind} noise, allowed are {UNIT_BLOCKS_LIMIT}")
    return value


def loss(value: object, preact: Tensor) -> None:
    """Raise unless `value` is None or a loss whose tensors fit preact, (T, B, H)."""
    time, batch, units = preact.shape
    if value is None:
        return
    if isinstance(value, LinearLoss):
        shaped("loss.grad", value.grad, (time, batch, units), preact)
        return
    if not isinstance(value, (SquaredLoss, CrossEntropyLoss, OutputsOnly)):
        raise TypeError(
            "loss must be a LinearLoss, SquaredLoss, CrossEntropyLoss, OutputsOnly of anpgpu.functional, or None, "
            f"got {type(value).__name__}"
        )
    outputs = units
    if value.readout is not None:
        if tensor("loss.readout", value.readout).dim() != 2:
            raise ValueError(f"loss.readout must have shape (O, {units}), got {tuple(value.readout.shape)}")
        outputs = value.readout.shape[0]
        shaped("loss.readout", value.readout, (outputs, units), preact)
    if isinstance(value, OutputsOnly):
        return
    shaped("loss.weight", value.weight, (time, batch), preact)
    if isinstance(value, SquaredLoss):
        shaped("loss.error", value.error, (time, batch, outputs), preact)
        return
    shaped("loss.probs", value.probs, (time, batch, outputs), preact)
    target = tensor("loss.target", value.target)
    if target.dtype != torch.int64 or tuple(target.shape) != (time, batch):
        raise ValueError(
            f"loss.target must be int64 of shape {(time, batch)}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.is_cuda or torch.compiler.is_compiling():
        # Reading values would make the host wait for the GPU, or break the compiled graph.
        return
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < outputs):
        raise ValueError(f"loss.target must be in [0, {outputs - 1}], got {int(target.min())} to {int(target.max())}")
