"""The ops as PyTorch's transforms see them: opaque, with known result shapes, and without a derivative.

`torch.ops.anpgpu.{noise, rollout, returns, adjoint}` are what `anpgpu.functional` calls once it has checked arguments.
No compiler looks into them. The forward-mode derivative of an op of this kind is zero without a word: `underived` puts
an autograd function around it that raises instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose_backend, implementation
from .kernels.loss import CrossEntropyLoss, LinearLoss, Loss, OutputsOnly, SquaredLoss
from .kernels.noise import Counters
from .kernels.rollout import Rollout, RolloutOptions
from .settings import CELL_FORMS

Results = Tensor | tuple[Tensor, ...]


class _Underived(torch.autograd.Function):
    """An op that every transform but vmap refuses; a forward derivative is refused by having no `jvp`."""

    @staticmethod
    def forward(op: Callable[..., Results], *args: Any) -> Results:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the ops of anpgpu have no derivative: their results are noise or estimates. This was reached by a double "
            "backward pass through anpgpu.RNN, which is once differentiable, or by backward() through anpgpu.functional"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Results, Any]:
        return looped(_Underived.apply, info, in_dims, args)


def underived(op: Callable[..., Results], *args: Any) -> Any:
    """Return `op(*args)`; differentiating the result in any way raises, and vmap runs the op once for each slice.

    Args:
        op: returns a tensor or a tuple of tensors.
        *args: tensors, and whatever else the op takes; no tensor inside a container.
    """
    if torch.compiler.is_compiling() and not forward_mode():
        # The compiler does not follow such a function where no gradient is wanted; a second derivative raises anyway.
        return op(*args)
    return _Underived.apply(op, *args)  # type: ignore[no-untyped-call]


def forward_mode() -> bool:
    """Return whether forward-mode derivatives are being taken: a compiled op would leave them out without a word."""
    return torch.autograd.forward_ad._current_level >= 0


def looped(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: Sequence[Any]
) -> tuple[Results, int | tuple[int, ...]]:
    """Return what a function's `vmap` rule has to: the results for every slice, stacked, and where they are stacked."""
    each = [
        call(*(one.select(dim, index) if isinstance(dim, int) else one for one, dim in zip(args, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    if isinstance(each[0], Tensor):
        return torch.stack(each), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    return stacked, (0,) * len(stacked)


@torch.library.custom_op(
    "anpgpu::noise",
    mutates_args=(),
    schema="(Tensor seed, SymInt[] shape, float sigma, str kind, SymInt[] counters, ScalarType dtype, str backend) "
    "-> Tensor",
)
def noise(
    seed: Tensor,
    shape: Sequence[int],
    sigma: float,
    kind: str,
    counters: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return noise, (T, B, P, H), contiguous; see `anpgpu.kernels.noise`."""
    made: Tensor = implementation("noise", choose_backend(backend, seed.device, dtype))(
        seed, tuple(shape), sigma=sigma, kind=kind, counters=Counters(*counters), dtype=dtype
    )
    return made.contiguous()


@noise.register_fake
def _(
    seed: Tensor, shape: Sequence[int], sigma: float, kind: str, counters: Any, dtype: torch.dtype, backend: str
) -> Tensor:
    return seed.new_empty(tuple(shape), dtype=dtype)


LOSSES: dict[str, type[Loss]] = {
    "linear": LinearLoss,
    "squared": SquaredLoss,
    "cross_entropy": CrossEntropyLoss,
    "outputs": OutputsOnly,
}
"""By their `kind`."""

LOSS_TENSORS = ("grad", "error", "probs", "readout", "weight", "target")
"""Every tensor a loss may have; an op takes them all, most of them None."""


def loss_arguments(loss: Loss | None) -> tuple[str, tuple[Tensor | None, ...]]:
    """Return a loss as an op takes it: its name and `LOSS_TENSORS`."""
    name = "none" if loss is None else loss.kind
    return name, tuple(getattr(loss, tensor, None) for tensor in LOSS_TENSORS)


def _loss_of(name: str, tensors: Sequence[Tensor | None]) -> Loss | None:
    """Return the loss that `loss_arguments` took apart."""
    if name == "none":
        return None
    given = dict(zip(LOSS_TENSORS, tensors, strict=True))
    kind: Any = LOSSES[name]
    return kind(**{field: given[field] for field in kind._fields})  # type: ignore[no-any-return]


def _options_of(
    rollouts: int, sigma: float, noise: str, nonlinearity: str, precision: str, store_delta_a: bool
) -> RolloutOptions:
    """Return the options of a rollout from its scalars."""
    return RolloutOptions(rollouts, sigma, noise, CELL_FORMS[nonlinearity], precision, store_delta_a)


@torch.library.custom_op(
    "anpgpu::rollout",
    mutates_args=(),
    schema="(Tensor preact, Tensor hidden, Tensor weight_hh, Tensor seed, Tensor? delta_h0, "
    "Tensor? grad, Tensor? error, Tensor? probs, Tensor? readout, Tensor? weight, Tensor? target, str loss, "
    "SymInt rollouts, float sigma, str noise, str nonlinearity, str precision, bool store_delta_a, SymInt[] counters, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def rollout(
    preact: Tensor, hidden: Tensor, weight_hh: Tensor, seed: Tensor, delta_h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `Rollout`, contiguous, an empty tensor wherever it has None; see `anpgpu.kernels.rollout`."""
    tensors, (loss, *options, counters, backend) = rest[: len(LOSS_TENSORS)], rest[len(LOSS_TENSORS) :]
    run = implementation("rollout", choose_backend(backend, preact.device, preact.dtype))
    # `precision` says what the operands are; loss differences and sums stay in the tensors' type.
    with torch.autocast(preact.device.type, enabled=False):
        found: Rollout = run(
            preact,
            hidden,
            weight_hh,
            _loss_of(loss, tensors),
            seed,
            options=_options_of(*options),
            counters=Counters(*counters),
            delta_h0=delta_h0,
        )
    parts = [preact.new_empty(0) if part is None else part.contiguous() for part in found]
    return parts[0], parts[1], parts[2], parts[3]


@rollout.register_fake
def _(
    preact: Tensor, hidden: Tensor, weight_hh: Tensor, seed: Tensor, delta_h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    readout, (loss, *scalars, _, backend) = rest[LOSS_TENSORS.index("readout")], rest[len(LOSS_TENSORS) :]
    options = _options_of(*scalars)
    time, batch, units = preact.shape
    rows = (batch, options.rollouts)
    outputs = units if readout is None else readout.shape[0]
    half = options.precision in {"bf16", "fp16"}
    kept = torch.bfloat16 if half and choose_backend(backend, preact.device, preact.dtype) == "triton" else preact.dtype
    return (
        preact.new_empty((0,) if loss in {"none", "outputs"} else (time, *rows)),
        preact.new_empty((time, *rows, units), dtype=kept) if options.store_delta_a else preact.new_empty(0),
        preact.new_empty((*rows, units)),
        preact.new_empty((time, *rows, outputs) if loss == "outputs" else (0,)),
    )


@torch.library.custom_op(
    "anpgpu::returns",
    mutates_args=(),
    schema="(Tensor delta_loss, Tensor? carry, float discount, str backend) -> Tensor",
)
def returns(delta_loss: Tensor, carry: Tensor | None, discount: float, backend: str) -> Tensor:
    """Return the credit, (T, B, P), contiguous; see `anpgpu.kernels.adjoint`."""
    credit: Tensor = implementation("returns", choose_backend(backend, delta_loss.device, delta_loss.dtype))(
        delta_loss, discount, carry=carry
    )
    return credit.contiguous()


@returns.register_fake
def _(delta_loss: Tensor, carry: Tensor | None, discount: float, backend: str) -> Tensor:
    return delta_loss.new_empty(delta_loss.shape)


@torch.library.custom_op(
    "anpgpu::adjoint",
    mutates_args=(),
    schema="(Tensor credit, Tensor? delta_a, Tensor seed, str weight_by, SymInt units, float sigma, str noise, "
    "str precision, SymInt[] counters, str backend) -> Tensor",
)
def adjoint(
    credit: Tensor,
    delta_a: Tensor | None,
    seed: Tensor,
    weight_by: str,
    units: int,
    sigma: float,
    noise: str,
    precision: str,
    counters: Sequence[int],
    backend: str,
) -> Tensor:
    """Return the sums over even and odd rollouts, (2, T, B, H), contiguous; see `anpgpu.kernels.adjoint`."""
    run = implementation("adjoint", choose_backend(backend, credit.device, credit.dtype))
    with torch.autocast(credit.device.type, enabled=False):
        sums: Tensor = run(
            credit,
            delta_a,
            seed,
            weight_by=weight_by,
            units=units,
            options=RolloutOptions(credit.shape[2], sigma, noise, precision=precision),
            counters=Counters(*counters),
        )
    return sums.contiguous()


@adjoint.register_fake
def _(credit: Tensor, delta_a: Tensor | None, seed: Tensor, weight_by: str, units: int, *rest: Any) -> Tensor:
    return credit.new_empty((2, *credit.shape[:2], units))
