"""Rollouts that answer the gradient of what a clean run returned: one layer at a time, or all weights at once.

The loss of a layer is linear in its states, L = sum_t g_t . h_t with g_t = dL/dh_t; every layer below the last answers
to the gradient of the inputs of the layer above. Source: derived here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .division import Shape, default_memory, divided, gram_floats, within_memory
from .kernels.loss import LinearLoss, Loss
from .layers import CleanRun, LayerRun, Network, in_processing_order, split_half
from .settings import Settings
from .sweep import LossOf, estimate_layer
from .weight_perturbation import CleanSegment, FinalGradients, divide_weights, estimate_weights, weights_bytes


class Plan(NamedTuple):
    """What a backward pass goes by, tensors of the network aside."""

    settings: Settings
    max_memory: int | None
    biases: bool
    lengths: Tensor | None
    lowest: int
    """The lowest layer of which a gradient is wanted; what lies below gets zeros."""


class Gradients(NamedTuple):
    """What rollouts told: gradients of inputs, hx and weights, and the rest of `Estimate`."""

    gradients: list[Tensor]
    skipped: Tensor
    split_half: Tensor
    ridge_grown: Tensor


def layer_shape(network: Network, run: LayerRun, settings: Settings) -> Shape:
    """Return what the memory of a layer's rollouts depends on, next to a clean run that is kept anyway."""
    time, batch, _ = run.inputs.shape
    return Shape(
        time=time,
        batch=batch,
        rollouts=settings.share.most,
        hidden=network.hidden_size,
        outputs=0,
        stores_delta_a=settings.method != "np",
        gram_floats=gram_floats(settings.method, settings.share.most, network.hidden_size),
        clean_floats=0,
        layers=1,
        itemsize=run.states.element_size(),
    )


def layers_backward(
    plan: Plan, network: Network, run: CleanRun, seed: Tensor, grad_outputs: Tensor, grad_h_n: Tensor
) -> Gradients:
    """Perturb one layer and direction at a time, last first; every lower one answers to the gradient of its outputs."""
    directions = network.directions
    gradients: list[list[Tensor]] = []
    every_sum = []
    hx_grads: list[Tensor] = []
    skipped = torch.zeros((), dtype=torch.int64, device=seed.device)
    ridge_grown = torch.zeros_like(skipped)
    above = grad_outputs
    units = network.hidden_size
    for number in range(len(network.layers) - 1, -1, -1):
        if number < plan.lowest:
            gradients.insert(
                0, [torch.zeros_like(one) for side in network.layers[number] for one in side if one is not None]
            )
            hx_grads = [grad_h_n.new_zeros(grad_h_n.shape[1:])] * directions + hx_grads
            continue
        d_inputs = torch.zeros_like(run.layers[number][0].inputs)
        here: list[Tensor] = []
        here_hx: list[Tensor] = []
        for side, weights in enumerate(network.layers[number]):
            one = run.layers[number][side]
            index = number * directions + side
            grad = in_processing_order(above[..., side * units : (side + 1) * units], bool(side), plan.lengths)
            grad = _with_final(grad, grad_h_n[index], plan.lengths)
            estimate = divided(
                layer_shape(network, one, plan.settings),
                plan.max_memory,
                seed.device,
                functools.partial(estimate_layer, weights, one, linear_loss(grad), seed, plan.settings, layer=index),
                alone=plan.settings.share.alone,
            )
            here += estimate.sums.totals(biases=plan.biases)
            here_hx.append(estimate.h_0)
            every_sum.append(estimate.sums)
            skipped += estimate.skipped
            ridge_grown += estimate.ridge_grown
            d_inputs += in_processing_order(estimate.inputs, bool(side), plan.lengths)
        gradients.insert(0, here)
        hx_grads = here_hx + hx_grads
        mask = run.masks[number]
        above = d_inputs if mask is None else d_inputs * mask
    flat = [above, torch.stack(hx_grads), *(one for layer in gradients for one in layer)]
    return Gradients(flat, skipped, split_half(every_sum), ridge_grown)


def linear_loss(grad: Tensor) -> LossOf:
    """Return the loss that is linear in the states, dL/dh (T, B, H), in the form `estimate_layer` asks for."""
    return lambda steps, samples: LinearLoss(grad[steps, samples])


def _with_final(grad: Tensor, grad_h_n: Tensor, lengths: Tensor | None) -> Tensor:
    """Add dL/dh_n at each sample's last valid step (in processing order)."""
    if lengths is None:
        return torch.cat((grad[:-1], (grad[-1] + grad_h_n).unsqueeze(0)))
    last = (lengths - 1).to(grad.device).view(1, -1, 1).expand(1, -1, grad.shape[-1])
    return grad.scatter_add(0, last, grad_h_n.unsqueeze(0))


def weights_backward(
    plan: Plan, network: Network, run: CleanRun, seed: Tensor, grad_outputs: Tensor, grad_h_n: Tensor
) -> Gradients:
    """Perturb all weights at once."""
    time, batch, _ = grad_outputs.shape
    device = grad_outputs.device
    limit = plan.max_memory

    def segments(samples: slice) -> list[CleanSegment]:
        layers = tuple(
            tuple(LayerRun(one.inputs[:, samples], one.states[:, samples]) for one in layer) for layer in run.layers
        )
        masks = tuple(None if mask is None else mask[:, samples] for mask in run.masks)
        loss: Loss = LinearLoss(grad_outputs[:, samples])
        return [CleanSegment(layers, masks, loss)]

    last = torch.full((batch,), time - 1) if plan.lengths is None else plan.lengths - 1
    trust = ~(torch.isfinite(grad_outputs).all(-1).all(0) & torch.isfinite(grad_h_n).all(-1).all(0))
    estimate = within_memory(
        default_memory(device) if limit is None else limit,
        device,
        lambda most: divide_weights(network, plan.settings, batch=batch, steps=time, outputs=0, max_memory=most),
        lambda block: weights_bytes(network, plan.settings, block, steps=time, outputs=0),
        lambda block: estimate_weights(
            network,
            segments,
            seed,
            plan.settings,
            batch=batch,
            block=block,
            lengths=plan.lengths,
            final=FinalGradients(grad_h_n, last.to(device)),
            trust=trust,
        ),
        alone=plan.settings.share.alone,
    )
    sums = [one for layer in estimate.sums for one in layer]
    inputs = run.layers[0][0].inputs
    flat = [
        torch.zeros_like(inputs),
        torch.zeros_like(grad_h_n),
        *(grad for one in sums for grad in one.totals(biases=plan.biases)),
    ]
    return Gradients(flat, estimate.skipped, split_half(sums), torch.zeros_like(estimate.skipped))
