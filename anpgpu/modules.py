"""`RNN`: an nn.RNN whose backward pass is perturbed rollouts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .division import Division, Shape, default_memory, divide, gram_floats
from .kernels.rollout import LinearLoss, Loss
from .layers import (
    CleanRun,
    LayerRun,
    Network,
    in_processing_order,
    run_network,
    split_half,
)
from .perturbation import Perturbation
from .settings import Settings, new_seed, resolve, working_dtype
from .sweep import LossOf, estimate_layer
from .weight_perturbation import CleanSegment, FinalGradients, divide_weights, estimate_weights


class Estimate(NamedTuple):
    """What an estimate tells besides the gradients.

    `RNN.last_estimate` holds only what a backward pass knows: skipped and split_half.
    """

    loss: Tensor | None
    """Clean loss, 0-dim."""
    outputs: Tensor | None
    """Clean outputs, laid out as the inputs are: (T, B, O), (B, T, O) with batch_first, (T, O) unbatched."""
    h_n: Tensor | None
    """Clean final states, as `torch.nn.RNN` returns them."""
    skipped: Tensor
    """Rollouts left out because they were not finite, counted over samples, layers and directions; 0-dim int64."""
    split_half: Tensor
    """Cosine between the estimates from the even and the odd rollouts, 0-dim. Near 1: more rollouts would change
    little. It shows variance, not bias: a discount of 0 looks perfect to it. NaN with one rollout."""


class RNN(nn.RNN):
    """An Elman RNN trained by perturbed rollouts instead of backpropagation through time.

    Constructor arguments, parameters, state_dict, inputs, outputs and errors are those of `torch.nn.RNN`, and so are
    the values it returns. The forward pass keeps clean activity but no graph through time. The backward pass takes the
    gradient of the loss in the outputs, runs perturbed rollouts against it and returns estimates of the gradients of
    weights, biases, inputs and initial state, so that any head, loss and optimiser works.

    Each forward pass that needs gradients draws one 64-bit seed from torch's default generator of the module's device.

    Args:
        *args: as `torch.nn.RNN`.
        perturbation: how gradients are estimated; may be replaced at any time.
        **kwargs: as `torch.nn.RNN`.

    Source: Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967.
    """

    perturbation: Perturbation

    def __init__(self, *args: Any, perturbation: Perturbation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perturbation = check_perturbation(perturbation)
        self._record = Record()

    @property
    def last_estimate(self) -> Estimate | None:
        """What the last backward pass found; None before the first."""
        return self._record.estimate

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,  # noqa: A002  (nn.RNN's own name)
        hx: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the network; see `torch.nn.RNN`."""
        perturbation = check_perturbation(self.perturbation)
        weights: list[Tensor] = [weight for layer in self.all_weights for weight in layer]
        values = input.data if isinstance(input, PackedSequence) else input
        wanted = [*weights, values] if hx is None else [*weights, values, hx]
        needed = torch.is_grad_enabled() and any(getattr(one, "requires_grad", False) for one in wanted)
        if perturbation.method == "bptt" or not needed:
            return super().forward(input, hx)
        self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, weights)
        if input.dim() not in (2, 3):
            raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched" if batched else "unbatched"
            raise RuntimeError(
                f"For {kind} {input.dim()}-D input, hx should also be {input.dim()}-D but got {hx.dim()}-D"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)  # noqa: A001
            hx = None if hx is None else hx.unsqueeze(1)
        if hx is None:
            hx = input.new_zeros((len(self.all_weights), input.shape[batch_dim], self.hidden_size))
        self.check_forward_args(input, hx, None)
        time_first = input.transpose(0, 1) if self.batch_first else input
        if not time_first.shape[0]:
            # The message is nn.RNN's own.
            return super().forward(input, hx)
        outputs, h_n = self._perturbed(time_first, hx, weights, None)
        outputs = outputs.transpose(0, 1) if self.batch_first else outputs
        return (outputs, h_n) if batched else (outputs.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, weights: list[Tensor]
    ) -> tuple[PackedSequence, Tensor]:
        batch = int(packed.batch_sizes[0])
        given = packed.data.new_zeros((len(self.all_weights), batch, self.hidden_size)) if hx is None else hx
        self.check_forward_args(packed.data, given, packed.batch_sizes)
        # Padding is undone in the caller's order of samples, which is also hx's.
        padded, lengths = pad_packed_sequence(packed)
        outputs, h_n = self._perturbed(padded, given, weights, lengths)
        order = packed.sorted_indices
        if order is not None:
            outputs, lengths = outputs.index_select(1, order), lengths[order.cpu()]
        data, _ = torch._VF._pack_padded_sequence(outputs, lengths, False)
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices), h_n

    def _perturbed(
        self, inputs: Tensor, hx: Tensor, weights: list[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        perturbation = self.perturbation
        if perturbation.method == "wp" and (inputs.requires_grad or hx.requires_grad):
            what = "the input" if inputs.requires_grad else "hx"
            raise RuntimeError(
                f"method='wp' estimates gradients of weights alone, but {what} requires grad; "
                "detach it, or use method='anp' or 'np'"
            )
        plan = Plan(
            perturbation=perturbation,
            settings=resolve(perturbation, self.nonlinearity, weights[1]),
            biases=self.bias,
            directions=2 if self.bidirectional else 1,
            dropout=self.dropout if self.training else 0.0,
            lengths=lengths,
            record=self._record,
        )
        return PerturbedRNN.apply(plan, inputs, hx, *weights)  # type: ignore[no-any-return,no-untyped-call]


class Record:
    """Where a backward pass leaves what it found, for `RNN.last_estimate`."""

    def __init__(self) -> None:
        self.estimate: Estimate | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """A copied module has had no backward pass."""
        return Record()


class Plan(NamedTuple):
    """What a forward pass fixes for its backward pass, tensors aside."""

    perturbation: Perturbation
    settings: Settings
    biases: bool
    directions: int
    dropout: float
    lengths: Tensor | None
    record: Record


def check_perturbation(perturbation: Perturbation | None) -> Perturbation:
    """Return the perturbation, by default `Perturbation()`; raise TypeError for anything else."""
    if perturbation is None:
        return Perturbation()
    if not isinstance(perturbation, Perturbation):
        raise TypeError(f"perturbation must be an anpgpu.Perturbation, got {perturbation!r}")
    return perturbation


class PerturbedRNN(torch.autograd.Function):
    """Clean forward run; backward by rollouts. Linear in the incoming gradient, for a given seed."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, inputs: Tensor, hx: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network and keep its activity."""
        network = Network.of(
            weights, biases=plan.biases, directions=plan.directions, nonlinearity=plan.settings.options.nonlinearity
        )
        dropout = None
        if plan.dropout:

            def dropout(values: Tensor) -> Tensor:
                return nn.functional.dropout(torch.ones_like(values), plan.dropout, training=True)

        run = run_network(network, inputs, hx, plan.lengths, dropout)
        # After the clean run, so that dropout draws what it draws in nn.RNN.
        seed = new_seed(inputs.device)
        states = [one.states for layer in run.layers for one in layer]
        ctx.plan = plan
        ctx.masked = [mask is not None for mask in run.masks]
        ctx.save_for_backward(seed, inputs, *weights, *states, *[mask for mask in run.masks if mask is not None])
        return run.outputs, run.h_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor, grad_h_n: Tensor) -> tuple[Tensor | None, ...]:
        """Estimate the gradients of inputs, hx and weights."""
        plan: Plan = ctx.plan
        saved = list(ctx.saved_tensors)
        seed, inputs = saved[0], saved[1]
        count = len(ctx.needs_input_grad) - 3
        weights, rest = saved[2 : 2 + count], saved[2 + count :]
        dtype = working_dtype(weights[0].dtype)
        network = Network.of(
            weights, biases=plan.biases, directions=plan.directions, nonlinearity=plan.settings.options.nonlinearity
        ).to(dtype)
        directions = plan.directions * len(network.layers)
        states = [one.to(dtype) for one in rest[:directions]]
        masks = iter(rest[directions:])
        run = _rebuild(
            network,
            inputs.to(dtype),
            states,
            [next(masks).to(dtype) if one else None for one in ctx.masked],
            plan.lengths,
        )
        grad_outputs, grad_h_n = grad_outputs.to(dtype), grad_h_n.to(dtype)
        if not inputs.shape[1]:
            grads = [torch.zeros_like(one) for one in (inputs, grad_h_n, *weights)]
        else:
            estimate = _weights_backward if plan.settings.method == "wp" else _layers_backward
            grads = estimate(ctx, network, run, seed, grad_outputs, grad_h_n)
        kinds = [inputs.dtype, inputs.dtype, *(weight.dtype for weight in weights)]
        return (
            None,
            *(
                grad.to(kind) if needed else None
                for grad, kind, needed in zip(grads, kinds, ctx.needs_input_grad[1:], strict=True)
            ),
        )


def _rebuild(
    network: Network, inputs: Tensor, states: list[Tensor], masks: list[Tensor | None], lengths: Tensor | None
) -> CleanRun:
    """Put a clean run together again from what was saved of it."""
    layers = []
    values = inputs
    for number, mask in enumerate(masks):
        if mask is not None:
            values = values * mask
        here = states[number * network.directions : (number + 1) * network.directions]
        layers.append(
            tuple(LayerRun(in_processing_order(values, bool(side), lengths), one) for side, one in enumerate(here))
        )
        sides = [in_processing_order(one[1:], bool(side), lengths) for side, one in enumerate(here)]
        values = sides[0] if len(sides) == 1 else torch.cat(sides, dim=-1)
    return CleanRun(tuple(layers), tuple(masks), values, inputs.new_empty(0))


def layer_shape(network: Network, run: LayerRun, settings: Settings) -> Shape:
    """Return what the memory of a layer's rollouts depends on, next to a clean run that is kept anyway."""
    time, batch, _ = run.inputs.shape
    return Shape(
        time=time,
        batch=batch,
        rollouts=settings.options.rollouts,
        hidden=network.hidden_size,
        outputs=0,
        stores_delta_a=settings.method != "np",
        gram_floats=gram_floats(settings.method, settings.options.rollouts, network.hidden_size),
        clean_floats=0,
        layers=1,
        itemsize=run.states.element_size(),
    )


def layer_division(network: Network, run: LayerRun, settings: Settings, max_memory: int | None) -> Division:
    """Return the division of one layer's rollouts."""
    device = run.states.device
    limit = default_memory(device) if max_memory is None else max_memory
    return divide(layer_shape(network, run, settings), limit, device.type)


def _layers_backward(
    ctx: FunctionCtx, network: Network, run: CleanRun, seed: Tensor, grad_outputs: Tensor, grad_h_n: Tensor
) -> list[Tensor]:
    """Perturb one layer and direction at a time, last first; every lower one answers to the gradient of its outputs."""
    plan: Plan = ctx.plan  # type: ignore[attr-defined]
    needed: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
    per_layer = (4 if plan.biases else 2) * plan.directions
    lowest = _lowest_needed(needed, per_layer, len(network.layers), plan.directions)
    gradients: list[list[Tensor]] = []
    every_sum = []
    hx_grads: list[Tensor] = []
    skipped = torch.zeros((), dtype=torch.int64, device=seed.device)
    above = grad_outputs
    units = network.hidden_size
    for number in range(len(network.layers) - 1, -1, -1):
        if number < lowest:
            gradients.insert(
                0, [torch.zeros_like(one) for side in network.layers[number] for one in side if one is not None]
            )
            hx_grads = [grad_h_n.new_zeros(grad_h_n.shape[1:])] * plan.directions + hx_grads
            continue
        d_inputs = torch.zeros_like(run.layers[number][0].inputs)
        here: list[Tensor] = []
        here_hx: list[Tensor] = []
        for side, weights in enumerate(network.layers[number]):
            one = run.layers[number][side]
            index = number * plan.directions + side
            grad = in_processing_order(above[..., side * units : (side + 1) * units], bool(side), plan.lengths)
            grad = _with_final(grad, grad_h_n[index], plan.lengths)
            division = layer_division(network, one, plan.settings, plan.perturbation.max_memory)
            estimate = estimate_layer(weights, one, linear_loss(grad), seed, plan.settings, division, layer=index)
            here += estimate.sums.totals(biases=plan.biases)
            here_hx.append(estimate.h_0)
            every_sum.append(estimate.sums)
            skipped += estimate.skipped
            d_inputs += in_processing_order(estimate.inputs, bool(side), plan.lengths)
        gradients.insert(0, here)
        hx_grads = here_hx + hx_grads
        mask = run.masks[number]
        above = d_inputs if mask is None else d_inputs * mask
    plan.record.estimate = Estimate(None, None, None, skipped, split_half(every_sum))
    return [above, torch.stack(hx_grads), *(one for layer in gradients for one in layer)]


def _lowest_needed(needed: tuple[bool, ...], per_layer: int, layers: int, directions: int) -> int:
    """Return the lowest layer that something needs a gradient of; autograd's flags are (plan, inputs, hx, *weights)."""
    if needed[1] or needed[2]:
        return 0
    return min(number for number in range(layers) if any(needed[3 + number * per_layer : 3 + (number + 1) * per_layer]))


def linear_loss(grad: Tensor) -> LossOf:
    """Return the loss that is linear in the states, dL/dh (T, B, H), in the form `estimate_layer` asks for."""
    return lambda steps, samples: LinearLoss(grad[steps, samples])


def _with_final(grad: Tensor, grad_h_n: Tensor, lengths: Tensor | None) -> Tensor:
    """Add dL/dh_n at each sample's last valid step (in processing order)."""
    if lengths is None:
        return torch.cat((grad[:-1], (grad[-1] + grad_h_n).unsqueeze(0)))
    last = (lengths - 1).to(grad.device).view(1, -1, 1).expand(1, -1, grad.shape[-1])
    return grad.scatter_add(0, last, grad_h_n.unsqueeze(0))


def _weights_backward(
    ctx: FunctionCtx, network: Network, run: CleanRun, seed: Tensor, grad_outputs: Tensor, grad_h_n: Tensor
) -> list[Tensor]:
    """Perturb all weights at once."""
    plan: Plan = ctx.plan  # type: ignore[attr-defined]
    time, batch, _ = grad_outputs.shape
    device = grad_outputs.device
    limit = plan.perturbation.max_memory
    block = divide_weights(
        network,
        plan.settings,
        batch=batch,
        steps=time,
        outputs=0,
        max_memory=default_memory(device) if limit is None else limit,
    )

    def segments(samples: slice) -> list[CleanSegment]:
        layers = tuple(
            tuple(LayerRun(one.inputs[:, samples], one.states[:, samples]) for one in layer) for layer in run.layers
        )
        masks = tuple(None if mask is None else mask[:, samples] for mask in run.masks)
        loss: Loss = LinearLoss(grad_outputs[:, samples])
        return [CleanSegment(layers, masks, loss)]

    last = torch.full((batch,), time - 1) if plan.lengths is None else plan.lengths - 1
    trust = ~(torch.isfinite(grad_outputs).all(-1).all(0) & torch.isfinite(grad_h_n).all(-1).all(0))
    estimate = estimate_weights(
        network,
        segments,
        seed,
        plan.settings,
        batch=batch,
        block=block,
        lengths=plan.lengths,
        final=FinalGradients(grad_h_n, last.to(device)),
        trust=trust,
    )
    sums = [one for layer in estimate.sums for one in layer]
    plan.record.estimate = Estimate(None, None, None, estimate.skipped, split_half(sums))
    inputs = run.layers[0][0].inputs
    return [
        torch.zeros_like(inputs),
        torch.zeros_like(grad_h_n),
        *(grad for one in sums for grad in one.totals(biases=plan.biases)),
    ]
