"""The two ops of `RNN`: the clean run, and its backward pass, from dL/d(outputs) and dL/dh_n to gradients.

    anpgpu::rnn            inputs, hx, weights -> outputs, h_n, states of every layer below the last
    anpgpu::rnn_backward   dL/d(outputs), dL/dh_n, activity of the clean run -> gradients

Neither op draws random numbers: dropout masks and the noise's seed are arguments. So the same arguments give the same
estimate, also under torch.compile, with a retained graph and in activation checkpointing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from anpgpu.estimators.by_layer import Backward
from anpgpu.estimators.found import Found
from anpgpu.estimators.kept import kept_by_handle
from anpgpu.network.cells import LayerRun
from anpgpu.network.stack import CleanRun, Network, outputs_of, run_network
from anpgpu.network.weights import in_processing_order, valid_steps
from anpgpu.perturbation import AUTO, PRECISIONS, Perturbation
from anpgpu.registry import CELLS
from anpgpu.runtime.memory import default_memory
from anpgpu.runtime.processes import shared_update
from anpgpu.runtime.ranges import within
from anpgpu.runtime.settings import Settings, check_extent, resolve, working_dtype

from .tensors import looped, underived

SCHEMA_TYPES = {"str": "str", "int": "SymInt", "float": "float", "bool": "bool", "int | None": "SymInt?"}
"""Type names of `Perturbation`'s fields in an op's schema."""

FIELDS = tuple(field.name for field in dataclasses.fields(Perturbation))


class Structure(NamedTuple):
    """A network without its weights: scalars that both ops take."""

    cell: str
    """Its name in `registry.CELLS`."""
    biases: bool
    directions: int
    autocast: torch.dtype | None
    """The autocast type of the forward pass; None without autocast."""

    def network(self, weights: Sequence[Tensor]) -> Network:
        """Return the network with these weights."""
        return Network.of(weights, biases=self.biases, directions=self.directions, cell=CELLS[self.cell])

    def layers(self, weights: Sequence[Tensor]) -> int:
        """Return the number of layers that these weights belong to."""
        return len(weights) // self.weights_per_layer

    @property
    def weights_per_layer(self) -> int:
        """Number of parameters of one layer, both directions."""
        return (4 if self.biases else 2) * self.directions

    def state_dtype(self, weight: Tensor, *, packed: bool) -> torch.dtype:
        """Return the type of the states: the parameters', or autocast's, which leaves float64 alone."""
        if self.autocast is None or weight.dtype == torch.float64:
            return weight.dtype
        taken = CELLS[self.cell].takes_autocast(weight.device.type, packed=packed)
        return self.autocast if taken else weight.dtype


STRUCTURE = "str cell, bool biases, SymInt directions, ScalarType? autocast"


class Keeper(Protocol):
    """Receives what a backward pass reports besides gradients."""

    def keep(self, skipped: Tensor, split_half: Tensor, ridge_grown: Tensor, prior: Tensor) -> None:
        """Store the fields of `Estimate` of these names."""


def new_seed(device: torch.device) -> Tensor:
    """Draw the same 64-bit seed as `settings.new_seed`, by a function that compiler and transforms support."""
    # The bits of `random_` over the full range: torch.randint excludes the largest value, and counts from the smallest.
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) ^ -(2**63)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the autocast type on a device; None without autocast, which the meta device does not have."""
    kind = device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if active else None


def _under(autocast: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Return a context with the forward pass's autocast: compiled code and backward passes run outside it."""
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


@torch.library.custom_op(
    "anpgpu::rnn",
    mutates_args=(),
    schema="(Tensor inputs, Tensor hx, Tensor[] weights, Tensor[] masks, Tensor? lengths, "
    + STRUCTURE
    + ") -> (Tensor, Tensor, Tensor[])",
)
def clean_run(
    inputs: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    lengths: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run a network without perturbation.

    Args:
        inputs: (T, B, I).
        hx: (layers * D, B, S); of an LSTM h_0 and c_0 joined.
        weights: the flat list of parameters that `torch.nn.RNN` keeps.
        masks: dropout masks of the inputs of every layer but the first, (T, B, D * H) each; none without dropout.
        lengths: valid steps of each sample, (B,) int64 on the CPU; None is all.
        *scalars: `Structure`.

    Returns:
        outputs, (T, B, D * H); h_n, (layers * D, B, S); and per layer and direction the states in processing order,
        (T + 1, B, S), for the backward pass. All contiguous, and none shares memory with another.
    """
    structure = Structure(*scalars)
    drawn = iter(masks)
    with _under(structure.autocast, inputs.device):
        run = run_network(structure.network(weights), inputs, hx, lengths, (lambda _: next(drawn)) if masks else None)
    dtype = structure.state_dtype(weights[0], packed=lengths is not None)
    states = [side.states.to(dtype).contiguous() for layer in run.layers for side in layer]
    outputs, h_n = (
        _own(result.to(dtype).contiguous(), (inputs, hx, *states)) for result in (run.outputs, run.h_n)
    )  # fmt: skip
    return outputs, h_n, states


def _own(result: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return a result in memory of its own: the caller may change it in place, as that of nn.RNN."""
    shared = any(torch._C._is_alias_of(result, tensor) for tensor in others)  # type: ignore[attr-defined]
    return result.clone() if shared or result._is_view() else result


@clean_run.register_fake
def _(
    inputs: Tensor, hx: Tensor, weights: Sequence[Tensor], masks: Any, lengths: Any, *scalars: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    structure = Structure(*scalars)
    dtype = structure.state_dtype(weights[0], packed=lengths is not None)
    time, batch = inputs.shape[:2]
    return (
        inputs.new_empty((time, batch, structure.directions * weights[1].shape[1]), dtype=dtype),
        inputs.new_empty(hx.shape, dtype=dtype),
        [inputs.new_empty((time + 1, batch, hx.shape[2]), dtype=dtype) for _ in range(hx.shape[0])],
    )


class Left(NamedTuple):
    """Arguments of the backward op that the clean run leaves."""

    seed: Tensor
    inputs: Tensor
    lengths: Tensor | None
    weights: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


@torch.library.custom_op(
    "anpgpu::rnn_backward",
    mutates_args=(),
    schema="(Tensor grad_outputs, Tensor? grad_h_n, Tensor seed, Tensor inputs, Tensor? lengths, "
    "Tensor[] weights, Tensor[] states, Tensor[] masks, SymInt lowest, SymInt kept, "
    + STRUCTURE
    + "".join(f", {SCHEMA_TYPES[str(field.type)]} {field.name}" for field in dataclasses.fields(Perturbation))
    + ") -> Tensor[]",
)
@within("backward")
def backward(grad_outputs: Tensor, grad_h_n: Tensor | None, *rest: Any) -> list[Tensor]:
    """Estimate gradients from rollouts; linear in the incoming gradients, for a given seed.

    Args:
        grad_outputs: dL/doutputs, (T, B, D * H).
        grad_h_n: dL/d(final states), (layers * D, B, S); None is zero.
        *rest: `Left`; the number of the lowest layer that needs a gradient, -1 if inputs or hx do; the handle of the
            module's state, see `estimators.kept`; `Structure`; the fields of `Perturbation`.

    Returns:
        Gradients of inputs and hx (empty tensors unless the lowest layer is -1) and of every weight in the order of
        `weights`, each in its tensor's type; then `skipped`, `split_half` and `ridge_grown` of `Estimate`, and what the
        state's learners report, (layers * D, 2), empty without a state.
    """
    left, (lowest, kept), structure, scalars = _taken_apart(rest)
    perturbation = Perturbation(*scalars)
    device = left.inputs.device
    # Loss differences and sums stay in the working type, also where backward() is called under autocast.
    with (
        shared_update(device) if perturbation.shard_rollouts else nullcontext(),
        torch.autocast(device.type, enabled=False),
    ):
        # The forward pass has said which precision it is, but under torch.compile.
        with _under(structure.autocast, device) if perturbation.precision == AUTO else nullcontext():
            settings = resolve(perturbation, CELLS[structure.cell], left.weights[1])
        if settings.estimator.keeps_state:
            settings = settings._replace(kept=kept_by_handle(kept))
        check_extent(len(left.states), *left.inputs.shape[:2])
        dtype = working_dtype(left.weights[0].dtype)
        network = structure.network(left.weights).to(dtype)
        grad_outputs, grad_h_n = grad_outputs.to(dtype), None if grad_h_n is None else grad_h_n.to(dtype)
        limit = default_memory(device) if perturbation.max_memory is None else perturbation.max_memory
        final = () if grad_h_n is None else (grad_h_n,)
        seed, limit = settings.share.agree(left.seed, limit, grad_outputs, *final, left.inputs, *left.weights)
        run = _rebuild(left, structure, dtype)
        work = Backward(settings, limit, left.lengths, lowest, network, run, seed, grad_outputs, grad_h_n)
        estimate: Found = settings.estimator.backward(work) if left.inputs.shape[1] else work.found
    kind = left.inputs.dtype
    sums = [total for layer in estimate.layers for total in layer.totals(biases=structure.biases)]
    gradients = [left.inputs.new_empty(0), left.inputs.new_empty(0)]
    if lowest < 0:
        gradients = [estimate.inputs.to(kind).contiguous(), estimate.h_0.to(kind).contiguous()]
    gradients += [grad.to(weight.dtype).contiguous() for grad, weight in zip(sums, left.weights, strict=True)]
    return [*gradients, estimate.skipped, estimate.split_half, estimate.ridge_grown, estimate.prior]


def _taken_apart(rest: Sequence[Any]) -> tuple[Left, tuple[int, int], Structure, Sequence[Any]]:
    """Split the arguments of the backward op that follow the gradients."""
    first = len(Left._fields)
    second = first + 2 + len(Structure._fields)
    return Left(*rest[:first]), (rest[first], rest[first + 1]), Structure(*rest[first + 2 : second]), rest[second:]


@backward.register_fake
def _(grad_outputs: Tensor, grad_h_n: Tensor | None, *rest: Any) -> list[Tensor]:
    left, (lowest, kept), *_ = _taken_apart(rest)
    shapes: list[tuple[int, ...]] = [(0,), (0,)]
    if lowest < 0:
        shapes = [tuple(left.inputs.shape), (len(left.states), *left.states[0].shape[1:])]
    number = grad_outputs.new_empty((), dtype=torch.int64)
    return [
        *(left.inputs.new_empty(shape) for shape in shapes),
        *(weight.new_empty(weight.shape) for weight in left.weights),
        number,
        number.new_empty((), dtype=working_dtype(left.weights[0].dtype)),
        torch.empty_like(number),
        number.new_empty((len(left.states) if kept else 0, 2), dtype=working_dtype(left.weights[0].dtype)),
    ]


class Call(NamedTuple):
    """Arguments of `PerturbedRNN` that are no tensors."""

    keeper: Keeper | None
    structure: Structure
    perturbation: tuple[Any, ...]
    kept: int
    """Handle of the module's state; 0 for an estimator without one."""
    weights: int
    """How many of the trailing tensors are weights; the rest are masks."""


class PerturbedRNN(torch.autograd.Function):
    """Clean forward run; backward pass by rollouts. Differentiable once, in reverse mode only."""

    @staticmethod
    def forward(
        call: Call, seed: Tensor, lengths: Tensor | None, inputs: Tensor, hx: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return outputs, h_n, and the states of every layer."""
        weights, masks = tensors[: call.weights], tensors[call.weights :]
        outputs, h_n, states = torch.ops.anpgpu.rnn(inputs, hx, list(weights), list(masks), lengths, *call.structure)
        return outputs, h_n, *states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep inputs, weights, states, masks and the seed."""
        call, seed, lengths, values, _, *tensors = inputs
        _, _, *states = output
        ctx.call, ctx.states = call, len(states)
        ctx.mark_non_differentiable(*states)
        if not torch.compiler.is_compiling():
            # Saves zero gradients as large as the states; the compiler has no such switch and drops them by itself.
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, values, lengths, *tensors, *states)

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor | None, grad_h_n: Tensor | None, *_: None) -> tuple[Any, ...]:
        """Estimate the gradients of inputs, hx and weights."""
        call: Call = ctx.call
        seed, values, lengths, *tensors = ctx.saved_tensors
        _, _, _, *needed = ctx.needs_input_grad
        per_layer = call.structure.weights_per_layer
        wanted = [number for number in range(call.weights) if needed[2 + number]]
        lowest = -1 if needed[0] or needed[1] else min(wanted) // per_layer
        if grad_outputs is None:
            states, outputs = tensors[-1], call.structure.directions * tensors[1].shape[1]
            grad_outputs = states.new_zeros((values.shape[0], states.shape[1], outputs))
        split = _Split(call.weights, ctx.states, (lowest, call.kept, *call.structure, *call.perturbation))
        d_inputs, d_hx, *d_weights = underived(
            _backward_of, split, grad_outputs, grad_h_n, seed, values, lengths, *tensors
        )
        d_weights, counts = d_weights[: call.weights], d_weights[call.weights :]
        # What is traced, or inside a transform of torch.func, has no value to keep.
        watched = not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(counts[0])
        if call.keeper is not None and watched:
            call.keeper.keep(*counts)
        grads = [d_inputs, d_hx, *d_weights]
        return (
            None,
            None,
            None,
            *(grad if need else None for grad, need in zip(grads, needed, strict=False)),
            *(None for _ in needed[len(grads) :]),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *args: Any) -> tuple[Any, Any]:
        """Run the slices one by one."""
        return looped(PerturbedRNN.apply, info, (None, *in_dims[1:]), (call._replace(keeper=None), *args))


class _Split(NamedTuple):
    """How to group the tensors of a backward pass, which autograd functions take one by one, into op arguments."""

    weights: int
    states: int
    scalars: tuple[Any, ...]


def _backward_of(split: _Split, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the backward op's results."""
    fixed, rest = tensors[:5], list(tensors[5:])
    first = len(rest) - split.states
    lists = rest[: split.weights], rest[first:], rest[split.weights : first]
    return tuple(torch.ops.anpgpu.rnn_backward(*fixed, *lists, *split.scalars))


def differentiable_run(
    structure: Structure,
    inputs: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and h_n of a run that autograd can differentiate; arguments as in `clean_run`."""
    drawn = iter(masks)
    run = run_network(structure.network(weights), inputs, hx, lengths, (lambda _: next(drawn)) if masks else None)
    return run.outputs, run.h_n


def run_perturbed(
    keeper: Keeper,
    perturbation: Perturbation,
    structure: Structure,
    seed: Tensor | None,
    inputs: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    lengths: Tensor | None,
    kept: int = 0,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs and h_n, with a backward pass by rollouts if there is a seed; arguments as in `clean_run`.

    settings: the perturbation as it was resolved, whose backend and precision the backward pass takes; None where only
    that can resolve it.
    """
    if seed is None:
        outputs, h_n, _ = torch.ops.anpgpu.rnn(inputs, hx, list(weights), list(masks), lengths, *structure)
        return outputs, h_n
    known = {} if settings is None else {"backend": settings.backend, "precision": settings.options.precision}
    if known.get("precision") not in PRECISIONS:
        # That of float64 parameters has no name that a caller may give.
        known.pop("precision", None)
    scalars = tuple(known.get(name, getattr(perturbation, name)) for name in FIELDS)
    call = Call(keeper, structure, scalars, kept, len(weights))
    outputs, h_n, *_ = PerturbedRNN.apply(call, seed, lengths, inputs, hx, *weights, *masks)  # type: ignore[no-untyped-call]
    return outputs, h_n


def _rebuild(left: Left, structure: Structure, dtype: torch.dtype) -> CleanRun:
    """Rebuild a clean run from the activity that was stored, in the working type."""
    lengths, directions = left.lengths, structure.directions
    masks: list[Tensor | None] = [None, *(mask.to(dtype) for mask in left.masks)]
    masks += [None] * (structure.layers(left.weights) - len(masks))
    values = left.inputs.to(dtype)
    valid = None if lengths is None else valid_steps(len(values), lengths, values.device)
    layers = []
    for number, mask in enumerate(masks):
        if mask is not None:
            values = values * mask
        states = [state.to(dtype) for state in left.states[number * directions : (number + 1) * directions]]
        sides = [
            LayerRun(in_processing_order(values, bool(side), lengths), state, valid)
            for side, state in enumerate(states)
        ]
        layers.append(tuple(sides))
        values = outputs_of(states, left.weights[1].shape[1], lengths)
    return CleanRun(tuple(layers), tuple(masks), values, values.new_empty(0))
