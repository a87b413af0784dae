"""Weight perturbation: noise on the weights, held for the whole sequence, its own for every sample and rollout.

    delta_a_t = W_hh delta_h_{t-1} + W_ih delta_x_t + sigma E z_t,  z_t = (x_t + delta_x_t, h_{t-1} + delta_h_{t-1}, 1)
    dW = sum_b mean_p (sum_t delta_loss_t) E / sigma                [W_ih | W_hh | b], unit-variance E

All layers are perturbed at once; delta_x is the deviation of the layer below. E is dense, (H, I + H + 1), or low-rank,
sum_r u_r v_r^T / sqrt(rank), so that its product with z is two small ones. A baseline: it runs on torch operations on
every device. Source: the classical weight perturbation estimator (Jabri and Flower 1992) in deviation form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .division import FIXED_BYTES
from .kernels.loss import Loss, loss_differences, output_deviation
from .kernels.noise import Counters, Purpose, noise
from .layers import GradientSums, LayerRun, LayerWeights, Network, in_processing_order, preactivations
from .ranges import within
from .settings import Settings
from .sweep import raise_if_lost


class CleanSegment(NamedTuple):
    """Clean activity of some steps of some samples, and the loss there."""

    layers: tuple[tuple[LayerRun, ...], ...]
    masks: tuple[Tensor | None, ...]
    """Per layer what multiplied its inputs (dropout), (L, b, D * H) or None."""
    loss: Loss
    """On the last layer's states in time order, (L, b, D * H)."""


class FinalGradients(NamedTuple):
    """What the loss is in the final states, linearly."""

    grad: Tensor
    """dL/dh_n, (layers * D, b, H)."""
    last_step: Tensor
    """Each sample's last valid step in processing order, (b,) int64."""


SegmentsOf = Callable[[slice], Iterable[CleanSegment]]
"""Gives the clean activity of some samples, first segment to last."""


class WeightNoise:
    """The noise of one layer's weights for a block of samples and rollouts, of unit variance."""

    def __init__(
        self, weights: LayerWeights, seed: Tensor, settings: Settings, layer: int, samples: slice, rollouts: slice
    ) -> None:
        units, fan_in = weights.weight_hh.shape[0], weights.weight_ih.shape[1] + weights.weight_hh.shape[0] + 1
        batch, count = samples.stop - samples.start, rollouts.stop - rollouts.start
        kind, dtype = settings.options.noise, weights.weight_hh.dtype
        counters = Counters(layer=layer, rollout=settings.share.own.start + rollouts.start, rank=settings.process_rank)
        self.rank = settings.rank
        if self.rank is None:
            # The sample stands in the time word, the matrix row in the sample's field: (b, row, p, column).
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

    def times(self, presynaptic: Tensor) -> Tensor:
        """Return E z, (b, p, H), for presynaptic activity z, (b, p, fan_in)."""
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
    """What perturbing all weights tells."""

    sums: list[list[GradientSums]]
    """Per layer and direction."""
    skipped: Tensor


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
        segments_of: the clean activity; a network with two directions gets one segment.
        seed: 0-dim int64 tensor.
        settings: the resolved perturbation.
        batch: number of samples B.
        block: samples and rollouts at a time, from `divide_weights`.
        lengths: valid steps of each sample, (B,), where they differ.
        final: the loss's share in the final states; goes with one segment.
        measure: for an `OutputsOnly` loss: delta_o of all steps, (T, b, p, O), and its samples, to loss differences.
        trust: samples, (B,) bool, whose rollouts count even if not finite, since the incoming gradient is not.
    """
    sums = [[GradientSums(weights) for weights in layer] for layer in network.layers]
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
        counts = settings.share.counted(finite).unsqueeze(1)
        raise_if_lost(counts > 0, samples.start, settings.options.sigma)
        skipped += (~finite).sum()
        share = torch.where(finite, change, 0) / (counts * settings.options.sigma)
        for rollouts in blocks:
            _add_weighted(sums, run.noises(rollouts), share[:, rollouts], settings.share.own.start + rollouts.start)
    settings.share.sum_(*(part for layer in sums for one in layer for part in (one.weight_ih, one.weight_hh, one.bias)))
    settings.share.sum_(skipped)
    return WeightEstimate(sums, skipped)


def divide_weights(
    network: Network, settings: Settings, *, batch: int, steps: int, outputs: int, max_memory: int
) -> tuple[int, int]:
    """Return how many samples and rollouts fit at a time, for segments of some steps.

    Raises:
        MemoryError: one rollout of one sample needs more.
    """
    samples, rollouts = max(batch, 1), settings.share.most
    while True:
        needed = weights_bytes(network, settings, (samples, rollouts), steps=steps, outputs=outputs)
        if needed <= max_memory:
            return samples, rollouts
        if rollouts > 1:
            rollouts = -(-rollouts // 2)
        elif samples > 1:
            samples = -(-samples // 2)
        else:
            raise MemoryError(
                f"max_memory={max_memory} bytes is too little for weight perturbation with T={steps}, "
                f"H={network.hidden_size}, rank={settings.rank}: one rollout of one sample needs {needed}"
            )


def weights_bytes(network: Network, settings: Settings, block: tuple[int, int], *, steps: int, outputs: int) -> int:
    """Return what a block of samples and rollouts needs, in bytes."""
    width = network.hidden_size * network.directions
    noise_floats = 0
    for weights in (weights for layer in network.layers for weights in layer):
        units, fan_in = weights.weight_hh.shape[0], weights.weight_ih.shape[1] + weights.weight_hh.shape[0] + 1
        noise_floats += 2 * (units * fan_in if settings.rank is None else settings.rank * (units + fan_in))
    itemsize = network.layers[0][0].weight_hh.element_size()
    return FIXED_BYTES + block[0] * block[1] * itemsize * (steps * (3 * width + outputs) + noise_floats)


def _add_weighted(
    sums: list[list[GradientSums]], noises: list[list[WeightNoise]], share: Tensor, first_rollout: int
) -> None:
    """Add share-weighted noise to the sums of the even and the odd rollouts."""
    parity = (torch.arange(share.shape[1], device=share.device) + first_rollout) % 2
    for layer_sums, layer_noises in zip(sums, noises, strict=True):
        for gradient, weight_noise in zip(layer_sums, layer_noises, strict=True):
            fan_in, units = gradient.weight_ih.shape[2], gradient.weight_hh.shape[2]
            for half in (0, 1):
                weighted = weight_noise.weighted_sum(torch.where(parity == half, share, 0))
                gradient.weight_ih[half] += weighted[:, :fan_in]
                gradient.weight_hh[half] += weighted[:, fan_in : fan_in + units]
                gradient.bias[half] += weighted[:, -1]


class _Run:
    """Rollouts of one chunk of samples; deviations live from segment to segment."""

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
        """Start the next block of rollouts from no deviation."""
        self.deviations.clear()

    def delta_loss(self, segment: CleanSegment, noises: list[list[WeightNoise]], rollouts: slice) -> Tensor:
        """Return a segment's loss differences, (L, b, p), or its delta_o, (L, b, p, O), with an `OutputsOnly` loss."""
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
                sides.append(in_processing_order(delta_h, bool(side), self.lengths))
            below = sides[0] if len(sides) == 1 else torch.cat(sides, dim=-1)
        assert below is not None  # noqa: S101  (for the type checker; a network has a layer)
        loss = segment.loss
        deviation = output_deviation(loss.readout, below)
        if not loss.measured:
            return deviation
        each = loss_differences(loss, slice(0, len(below)), deviation)
        if change is not None:
            each[-1] += change
        return each

    def _final_change(self, delta_h: Tensor, index: int) -> Tensor:
        """Return dL/dh_n . delta_h_n, (b, p), from (T, b, p, H)."""
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
        """Return one layer's delta_h, (L, b, p, H), in processing order."""
        length, batch, _ = run.inputs.shape
        count = rollouts.stop - rollouts.start
        preact = preactivations(weights, run.inputs, run.states)
        deviation = self.settings.options.cell.torch(preact, run.states[1:])
        result = preact.new_empty((length, batch, count, preact.shape[-1]))
        delta_h = self.deviations.get((number, side))
        if delta_h is None:
            delta_h = preact.new_zeros(result.shape[1:])
        ones = preact.new_ones((batch, count, 1))
        scratch = (torch.empty_like(delta_h), torch.empty_like(delta_h))
        for step in range(length):
            inputs = run.inputs[step].unsqueeze(1).expand(-1, count, -1)
            if delta_x is not None:
                inputs = inputs + delta_x[step]
            presynaptic = torch.cat((inputs, run.states[step].unsqueeze(1) + delta_h, ones), dim=-1)
            delta_a = delta_h @ weights.weight_hh.t() + self.settings.options.sigma * weight_noise.times(presynaptic)
            if delta_x is not None:
                delta_a += delta_x[step] @ weights.weight_ih.t()
            result[step] = deviation.step(step, delta_a, delta_h, scratch)
            delta_h = result[step]
        self.deviations[number, side] = delta_h
        return result
