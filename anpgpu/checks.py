"""Checks of the ops' arguments, each raising an error that quotes the value."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from .kernels.noise import COUNTER_LIMITS, UNIT_BLOCKS_LIMIT, UNITS_PER_GROUP, Counters
from .perturbation import real, whole

WORKING = (torch.float32, torch.float64)


def tensor(name: str, value: object) -> Tensor:
    """Return `value`, a tensor; raise TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def flag(name: str, value: object) -> bool:
    """Return `value`, a bool; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def sigma_range(dtype: torch.dtype) -> tuple[float, float]:
    """Return the least and the largest sigma: a normal number, of which Gaussian noise reaches 6.7 times as much."""
    limits = torch.finfo(dtype)
    return limits.tiny, limits.max / 8


def sigma(value: object, dtype: torch.dtype) -> float:
    """Return `value`, a standard deviation whose noise `dtype` holds; raise otherwise."""
    least, most = sigma_range(dtype)
    if not least <= real("sigma", value) <= most:
        raise ValueError(f"sigma must be positive and finite, in [{least}, {most}] for {dtype}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def shaped(name: str, value: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return `value`, a tensor of that shape with the type and device of `like`; raise otherwise."""
    given = tensor(name, value)
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    if given.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, as the other tensors are, got {given.dtype}")
    if given.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, where the other tensors are, got {given.device}")
    return given


def working(name: str, value: object, dims: int) -> Tensor:
    """Return `value`, a float32 or float64 tensor with that many dimensions, none of size 0 but the batch; or raise."""
    given = tensor(name, value)
    if given.dtype not in WORKING:
        raise TypeError(f"{name} must be float32 or float64, got {given.dtype}")
    if given.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(given.shape)}")
    if any(size == 0 for axis, size in enumerate(given.shape) if axis != 1):
        raise ValueError(f"{name} must not be empty but for its batch, got shape {tuple(given.shape)}")
    return given


def place(value: object) -> torch.device:
    """Return `value` as a device on which tensors can be made; raise otherwise."""
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
        # Looking would make the host wait, or break the compiled graph.
        return
    if target.numel() and not (int(target.min()) >= 0 and int(target.max()) < outputs):
        raise ValueError(f"loss.target must be in [0, {outputs - 1}], got {int(target.min())} to {int(target.max())}")
