"""Rollouts with perturbed weights: their noise, their recursion, and their gradients.

Equations: `weights.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.kernels.loss import Loss, output_deviation
from anpgpu.kernels.noise import Counters, Purpose, noise
from anpgpu.network.cells import LayerRun
from anpgpu.network.stack import Network, joined
from anpgpu.network.weights import LayerWeights, in_processing_order
from anpgpu.runtime.ranges import within
from anpgpu.runtime.settings import Settings

from .found import GradientSums, raise_if_lost


class CleanSegment(NamedTuple):
    """Clean activity of some steps of some samples, and their loss."""

    layers: tuple[tuple[LayerRun, ...], ...]
    masks: tuple[Tensor | None, ...]
    """Dropout masks of each layer's inputs, (L, b, D * H) or None."""
    loss: Loss
    """As a function of the last layer's states in time order, (L, b, D * H)."""


class FinalGradients(NamedTuple):
    """The term of the loss that is linear in the final states."""

    grad: Tensor
    """dL/d(final states), (layers * D, b, S)."""
    last_step: Tensor
    """Each sample's last valid step in processing order, (b,) int64."""


SegmentsOf = Callable[[slice], Iterable[CleanSegment]]
"""Returns the clean activity of some samples, first segment to last."""


class WeightNoise:
    """Unit-variance noise of one layer's weights, for a block of samples and rollouts."""

    def __init__(
        self, weights: LayerWeights, seed: Tensor, settings: Settings, layer: int, samples: slice, rollouts: slice
    ) -> None:
        units = weights.weight_hh.shape[0]
        self.apart = settings.options.cell.recurrent_apart
        self.inputs, self.recurrent = weights.weight_ih.shape[1], weights.hidden_size
        # Where both sides of the pre-activations are apart, so are their biases.
        fan_in = self.inputs + self.recurrent + 1 + self.apart
        batch, count = samples.stop - samples.start, rollouts.stop - rollouts.start
        kind, dtype = settings.options.noise, weights.weight_hh.dtype
        counters = Counters(layer=layer, rollout=settings.share.own.start + rollouts.start, rank=settings.process_rank)
        self.rank = settings.rank
        if self.rank is None:
            # In the counters the time field holds the sample, the sample field the matrix row: (b, row, p, column).
            dense = noise(
                seed,
                (batch, units, count, fan_in),
                kind=kind,
                counters=counters._replace(purpose=Purpose.WEIGHTS, time=samples.start),
                dtype=dtype,
            )
            self.dense = dense.transpose(1, 2)
            return
        self.left, self.right = (
            noise(
                seed,
                (self.rank, batch, count, size),
                kind=kind,
                counters=counters._replace(purpose=purpose, sample=samples.start),
                dtype=dtype,
            ).permute(1, 2, 0, 3)
            for purpose, size in ((Purpose.LOW_RANK_U, units), (Purpose.LOW_RANK_V, fan_in))
        )

    def sides(self, inputs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return E z of presynaptic activity z = (x, h, 1), (b, p, G H), from x, (b, p, I), and h, (b, p, H).

        Where the recurrent side of the pre-activations is apart, the two are E (0, h, 0, 1) and E (x, 0, 1, 0).
        """
        one = hidden.new_ones((*hidden.shape[:-1], 1))
        if not self.apart:
            return self.times(torch.cat((inputs, hidden, one), dim=-1)), None
        nothing = torch.zeros_like(one)
        recurrent = torch.cat((torch.zeros_like(inputs), hidden, nothing, one), dim=-1)
        return self.times(recurrent), self.times(torch.cat((inputs, torch.zeros_like(hidden), one, nothing), dim=-1))

    def times(self, presynaptic: Tensor) -> Tensor:
        """Return E z, (b, p, G H), for presynaptic activity z, (b, p, fan_in)."""
        if self.rank is None:
            return (self.dense @ presynaptic.unsqueeze(-1)).squeeze(-1)
        along = self.right @ presynaptic.unsqueeze(-1)
        return (self.left * along).sum(2) / math.sqrt(self.rank)

    def weighted_sum(self, share: Tensor) -> Tensor:
        """Return sum_bp share E, (H, fan_in), for shares (b, p)."""
        if self.rank is None:
            return torch.einsum("bp,bpij->ij", share, self.dense)
        left = (self.left * share[..., None, None]).flatten(0, 2)
        return left.t() @ self.right.flatten(0, 2) / math.sqrt(self.rank)


class WeightEstimate(NamedTuple):
    """Gradients of all weights."""

    sums: list[list[GradientSums]]
    """Per layer and direction."""
    skipped: Tensor
    """Number of rollouts left out, 0-dim int64."""


@within("weight_perturbation")
def estimate_weights(
    network: Network,
    segments_of: SegmentsOf,
    seed: Tensor,
    settings: Settings,
    *,
    batch: int,
    block: tuple[int, int],
    lengths: Tensor | None = None,
    final: FinalGradients | None = None,
    measure: Callable[[Tensor, slice], Tensor] | None = None,
    trust: Tensor | None = None,
) -> WeightEstimate:
    """Estimate the gradients of all layers' weights from rollouts with perturbed weights.

    Args:
        network: the layers, in the working type.
        segments_of: returns the clean activity; a network with two directions has one segment.
        seed: 0-dim int64 tensor.
        settings: the resolved perturbation.
        batch: number of samples B.
        block: number of samples and of rollouts at a time.
        lengths: valid steps of each sample, (B,), if they differ.
        final: the loss's gradient with respect to the final states; needs one segment.
        measure: for a black-box loss: from delta_o of all steps, (T, b, p, O), and its samples to loss differences,
            (T, b, p).
        trust: samples, (B,) bool, whose rollouts count even if not finite, because the incoming gradient is not.

    Raises:
        NonFiniteRolloutsError: no rollout of some sample is finite.
    """
    sums = [[GradientSums(weights) for weights in layer] for layer in network.layers]
    if network.cell.forms.recurrent_apart:
        for gradient in (side for layer in sums for side in layer):
            gradient.bias_hh = gradient.bias_hh.clone()
    skipped = torch.zeros((), dtype=torch.int64, device=seed.device)
    total = settings.options.rollouts
    for first in range(0, batch, max(block[0], 1)):
        samples = slice(first, min(first + block[0], batch))
        blocks = [slice(start, min(start + block[1], total)) for start in range(0, total, block[1])]
        run = _Run(network, seed, settings, samples, None if lengths is None else lengths[samples], final)
        parts = []
        for rollouts in blocks:
            noises = run.noises(rollouts)
            steps = [run.delta_loss(segment, noises, rollouts) for segment in segments_of(samples)]
            run.forget()
            parts.append(torch.cat(steps) if measure is None else measure(torch.cat(steps), samples))
            parts[-1] = parts[-1].sum(0)
        change = torch.cat(parts, dim=1)
        finite = torch.isfinite(change)
        if trust is not None:
            finite |= trust[samples].unsqueeze(1)
        counts = settings.share.counted(finite)
        raise_if_lost(counts, samples.start, settings.options.sigma)
        skipped += (~finite).sum()
        share = torch.where(finite, change, 0) / (counts.unsqueeze(1) * settings.options.sigma)
        for rollouts in blocks:
            _add_weighted(sums, run.noises(rollouts), share[:, rollouts], settings.share.own.start + rollouts.start)
    settings.share.sum_(*(total for layer in sums for side in layer for total in side.tensors))
    settings.share.sum_(skipped)
    return WeightEstimate(sums, skipped)


def _add_weighted(
    sums: list[list[GradientSums]], noises: list[list[WeightNoise]], share: Tensor, first_rollout: int
) -> None:
    """Add noise, weighted by shares (b, p), to the sums of the even and of the odd rollouts."""
    parity = (torch.arange(share.shape[1], device=share.device) + first_rollout) % 2
    for layer_sums, layer_noises in zip(sums, noises, strict=True):
        for gradient, weight_noise in zip(layer_sums, layer_noises, strict=True):
            fan_in, units = gradient.weight_ih.shape[2], gradient.weight_hh.shape[2]
            for half in (0, 1):
                weighted = weight_noise.weighted_sum(torch.where(parity == half, share, 0))
                gradient.weight_ih[half] += weighted[:, :fan_in]
                gradient.weight_hh[half] += weighted[:, fan_in : fan_in + units]
                gradient.bias_ih[half] += weighted[:, fan_in + units]
                if weight_noise.apart:
                    gradient.bias_hh[half] += weighted[:, -1]


class _Run:
    """Rollouts of one chunk of samples, whose deviations persist from segment to segment."""

    def __init__(
        self,
        network: Network,
        seed: Tensor,
        settings: Settings,
        samples: slice,
        lengths: Tensor | None,
        final: FinalGradients | None,
    ) -> None:
        self.network, self.seed, self.settings, self.samples = network, seed, settings, samples
        self.lengths, self.final = lengths, final
        self.deviations: dict[tuple[int, int], Tensor] = {}

    def noises(self, rollouts: slice) -> list[list[WeightNoise]]:
        """Return the weight noise of every layer and direction."""
        directions = self.network.directions
        return [
            [
                WeightNoise(weights, self.seed, self.settings, number * directions + side, self.samples, rollouts)
                for side, weights in enumerate(layer)
            ]
            for number, layer in enumerate(self.network.layers)
        ]

    def forget(self) -> None:
        """Reset deviations to zero, for the next block of rollouts."""
        self.deviations.clear()

    def delta_loss(self, segment: CleanSegment, noises: list[list[WeightNoise]], rollouts: slice) -> Tensor:
        """Return a segment's loss differences, (L, b, p), or delta_o, (L, b, p, O), for a black-box loss."""
        below: Tensor | None = None
        change: Tensor | None = None
        for number, layer in enumerate(self.network.layers):
            mask = segment.masks[number]
            if below is not None and mask is not None:
                below = below * mask.unsqueeze(2)
            sides = []
            for side, weights in enumerate(layer):
                run = segment.layers[number][side]
                delta_x = None if below is None else in_processing_order(below, bool(side), self.lengths)
                delta_h = self._layer(number, side, weights, run, noises[number][side], delta_x, rollouts)
                if self.final is not None:
                    extra = self._final_change(delta_h, number * self.network.directions + side)
                    change = extra if change is None else change + extra
                sides.append(in_processing_order(delta_h[..., : weights.hidden_size], bool(side), self.lengths))
            below = joined(sides)
        assert below is not None  # noqa: S101  (for the type checker; a network has a layer)
        deviation = output_deviation(segment.loss.readout, below)
        if not segment.loss.measured:
            return deviation
        differences = segment.loss.differences(slice(0, len(below)), deviation)
        if change is not None:
            differences[-1] += change
        return differences

    def _final_change(self, delta_h: Tensor, index: int) -> Tensor:
        """Return dL/d(final state) . its deviation, (b, p), from (T, b, p, S)."""
        assert self.final is not None  # noqa: S101  (for the type checker; the caller looked)
        last = self.final.last_step[self.samples]
        grad = self.final.grad[index, self.samples]
        at_end = delta_h[last, torch.arange(len(last), device=last.device)]
        return (at_end @ grad.unsqueeze(-1)).squeeze(-1)

    def _layer(
        self,
        number: int,
        side: int,
        weights: LayerWeights,
        run: LayerRun,
        weight_noise: WeightNoise,
        delta_x: Tensor | None,
        rollouts: slice,
    ) -> Tensor:
        """Return the deviations of one layer's states, (L, b, p, S), in processing order."""
        length, batch, _ = run.inputs.shape
        count = rollouts.stop - rollouts.start
        preact = self.network.cell.preactivations(weights, run)
        deviation = self.network.cell.forms.around(preact, run.states[1:])
        units = weights.hidden_size
        result = preact.new_empty((length, batch, count, run.states.shape[-1]))
        delta_h = self.deviations.get((number, side))
        if delta_h is None:
            delta_h = preact.new_zeros(result.shape[1:])
        scratch = (torch.empty_like(delta_h), torch.empty_like(delta_h))
        for step in range(length):
            inputs = run.inputs[step].unsqueeze(1).expand(-1, count, -1)
            if delta_x is not None:
                inputs = inputs + delta_x[step]
            hidden = (run.states[step].unsqueeze(1) + delta_h)[..., :units]
            noisy, apart = weight_noise.sides(inputs, hidden)
            delta_a = delta_h[..., :units] @ weights.weight_hh.t() + self.settings.options.sigma * noisy
            driven = None if apart is None else self.settings.options.sigma * apart
            if delta_x is not None:
                added_to = delta_a if driven is None else driven
                added_to += delta_x[step] @ weights.weight_ih.t()
            extra = {} if driven is None else {"inputs": driven}
            result[step] = deviation.step(step, delta_a, delta_h, scratch, **extra)
            delta_h = result[step]
        self.deviations[number, side] = delta_h
        return result
