"""The ops as PyTorch's transforms see them: opaque, with known result shapes, and without a derivative.

`anpgpu.functional` checks arguments and calls `torch.ops.anpgpu.{noise, rollout, returns, adjoint, least_squares}`.
Compilers do not trace into them. PyTorch takes the forward-mode derivative of such an op to be zero, silently:
`underived` wraps it in an autograd function that raises instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anpgpu.kernels.cell import CellForms
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, Loss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import Counters
from anpgpu.kernels.rollout import Rollout, RolloutOptions
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import choose_backend, implementation, least_squares_on, stored_dtype
from anpgpu.runtime.ranges import entered

Results = Tensor | tuple[Tensor, ...]


class _Underived(torch.autograd.Function):
    """An op that refuses every transform but vmap; without a `jvp` torch refuses forward derivatives."""

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
        *args: arguments of the op; no tensor inside a container.
    """
    if torch.compiler.is_compiling() and not forward_mode():
        # The compiler cannot trace an autograd function that needs no gradient; a second derivative raises anyway.
        return op(*args)
    return _Underived.apply(op, *args)  # type: ignore[no-untyped-call]


def forward_mode() -> bool:
    """Return whether forward-mode derivatives are being computed: a compiled op would drop them silently."""
    return torch.autograd.forward_ad._current_level >= 0


def looped(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], args: Sequence[Any]
) -> tuple[Results, int | tuple[int, ...]]:
    """Implement a `vmap` rule by a loop: return the results of all slices, stacked, and the dimension of stacking."""
    results = [
        call(*(arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(slices) for slices in zip(*results, strict=True))
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
    with entered("noise"):
        xi: Tensor = implementation("noise", choose_backend(backend, seed.device, dtype))(
            seed, tuple(shape), sigma=sigma, kind=kind, counters=Counters(*counters), dtype=dtype
        )
    return xi.contiguous()


@noise.register_fake
def _(
    seed: Tensor, shape: Sequence[int], sigma: float, kind: str, counters: Any, dtype: torch.dtype, backend: str
) -> Tensor:
    return seed.new_empty(tuple(shape), dtype=dtype)


LOSSES: tuple[type[Loss], ...] = (LinearLoss, SquaredLoss, CrossEntropyLoss, OutputsOnly)
NO_LOSS = ""
"""The loss's name for an op without a loss."""

LOSS_TENSORS = ("grad", "error", "probs", "readout", "weight", "target")
"""Fields of the kernels' losses; an op takes all of these tensors, None where its loss has no such field."""


def loss_arguments(loss: Loss | None) -> tuple[str, tuple[Tensor | None, ...]]:
    """Return a loss in the form of an op's arguments: its name and `LOSS_TENSORS`."""
    name = NO_LOSS if loss is None else type(loss).__name__
    return name, tuple(getattr(loss, tensor, None) for tensor in LOSS_TENSORS)


def _loss_of(name: str, tensors: Sequence[Tensor | None]) -> Loss | None:
    """Return the loss from its `loss_arguments`."""
    if name == NO_LOSS:
        return None
    fields = dict(zip(LOSS_TENSORS, tensors, strict=True))
    kind: Any = next(kind for kind in LOSSES if kind.__name__ == name)
    return kind(**{field: fields[field] for field in kind._fields})  # type: ignore[no-any-return]


def option_scalars(options: RolloutOptions) -> tuple[Any, ...]:
    """Return options in the form of an op's arguments, with the cell's name for its forms."""
    return tuple(field.name if isinstance(field, CellForms) else field for field in options)


def _options_of(scalars: Sequence[Any]) -> RolloutOptions:
    """Return the options from their `option_scalars`."""
    options: Any = RolloutOptions(*scalars)
    return options._replace(cell=CELLS[options.cell].forms)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "anpgpu::rollout",
    mutates_args=(),
    schema="(Tensor preact, Tensor hidden, Tensor weight_hh, Tensor seed, Tensor? delta_h0, "
    "Tensor? grad, Tensor? error, Tensor? probs, Tensor? readout, Tensor? weight, Tensor? target, str loss, "
    "SymInt rollouts, float sigma, str noise, str cell, str precision, bool store_delta_a, SymInt[] counters, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def rollout(
    preact: Tensor, hidden: Tensor, weight_hh: Tensor, seed: Tensor, delta_h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `Rollout`, contiguous, an empty tensor for None; see `anpgpu.kernels.rollout`."""
    tensors, (loss, *scalars, counters, backend) = rest[: len(LOSS_TENSORS)], rest[len(LOSS_TENSORS) :]
    options = _options_of(scalars)
    run = implementation("rollout", choose_backend(backend, preact.device, preact.dtype, options.cell))
    # `precision` sets the operands' type; loss differences and sums have the tensors' type.
    with torch.autocast(preact.device.type, enabled=False), entered("rollout"):
        moved: Rollout = run(
            preact,
            hidden,
            weight_hh,
            _loss_of(loss, tensors),
            seed,
            options=options,
            counters=Counters(*counters),
            delta_h0=delta_h0,
        )
    results = [preact.new_empty(0) if tensor is None else tensor.contiguous() for tensor in moved]
    return results[0], results[1], results[2], results[3]


@rollout.register_fake
def _(
    preact: Tensor, hidden: Tensor, weight_hh: Tensor, seed: Tensor, delta_h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, (name, *scalars, _, backend) = rest[: len(LOSS_TENSORS)], rest[len(LOSS_TENSORS) :]
    options, loss = _options_of(scalars), _loss_of(name, tensors)
    readout = None if loss is None else loss.readout
    time, batch, units = *preact.shape[:2], weight_hh.shape[1]
    rows, size = (batch, options.rollouts), units * options.cell.states
    outputs = units if readout is None else readout.shape[0]
    chosen = choose_backend(backend, preact.device, preact.dtype, options.cell)
    stored = stored_dtype(chosen, options.precision, preact.dtype)
    measured = loss is not None and loss.measured
    return (
        preact.new_empty((time, *rows) if measured else (0,)),
        preact.new_empty((time, *rows, size), dtype=stored) if options.store_delta_a else preact.new_empty(0),
        preact.new_empty((*rows, size)),
        preact.new_empty((0,) if loss is None or measured else (time, *rows, outputs)),
    )


@torch.library.custom_op(
    "anpgpu::returns",
    mutates_args=(),
    schema="(Tensor delta_loss, Tensor? carry, float discount, str backend) -> Tensor",
)
def returns(delta_loss: Tensor, carry: Tensor | None, discount: float, backend: str) -> Tensor:
    """Return the credit, (T, B, P), contiguous; see `anpgpu.kernels.adjoint`."""
    run = implementation("returns", choose_backend(backend, delta_loss.device, delta_loss.dtype))
    with entered("returns"):
        credit: Tensor = run(delta_loss, discount, carry=carry)
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
    with torch.autocast(credit.device.type, enabled=False), entered("adjoint"):
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


@torch.library.custom_op(
    "anpgpu::least_squares",
    mutates_args=(),
    schema="(Tensor delta_loss, Tensor delta_a, Tensor carry, Tensor seed, float discount, float ridge, bool baseline, "
    "float sigma, str noise, SymInt[] counters, str backend) -> (Tensor, Tensor)",
)
def least_squares(
    delta_loss: Tensor, delta_a: Tensor, carry: Tensor, seed: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return the estimate, (T, B, H), and the carry, (B, P), both contiguous; see `anpgpu.kernels.least_squares`."""
    discount, ridge, baseline, sigma, noise, counters, backend = rest
    chosen = choose_backend(backend, delta_loss.device, delta_loss.dtype)
    with torch.autocast(delta_loss.device.type, enabled=False), entered("least_squares"):
        result = least_squares_on(chosen)(
            delta_loss,
            delta_a,
            carry,
            seed,
            finite=torch.ones_like(carry, dtype=torch.bool),
            discount=discount,
            ridge=ridge,
            baseline=baseline,
            options=RolloutOptions(delta_loss.shape[2], sigma, noise),
            counters=Counters(*counters),
            halves=False,
        )
    return result.adjoint.sum(0), result.carry.contiguous()


@least_squares.register_fake
def _(delta_loss: Tensor, delta_a: Tensor, carry: Tensor, seed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return delta_loss.new_empty((*delta_loss.shape[:2], delta_a.shape[-1])), delta_loss.new_empty(carry.shape)
