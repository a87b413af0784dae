"""Perturbed rollouts in deviation form: the difference to the clean run is carried, no two runs are subtracted.

    delta_a_t = W_hh delta_h_{t-1} + xi_t
    delta_h_t = phi(a_t + delta_a_t) - phi(a_t)         exact for any sigma, computed without cancellation

`cell.py` holds the second equation of each cell, `loss.py` the loss differences of each step. Source: the update rule
these rollouts serve is activity-based node perturbation (Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967); the
deviation form is derived here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .cell import TANH, CellForms
from .loss import Loss, Measure
from .noise import Counters, NoiseSteps, padded

NOISE_BYTES = 1 << 17
"""Noise that waits for its step."""

SPARE_BYTES = 256 << 20
"""Memory that may stay allocated between updates."""


class Rollout(NamedTuple):
    """What a block of rollouts leaves behind."""

    delta_loss: Tensor | None
    """(T, B, P), float32 or float64; None without a loss."""
    delta_a: Tensor | None
    """(T, B, P, H) where it was asked for; its rows may be padded."""
    delta_h: Tensor
    """(B, P, H), the deviation of the state after the last step."""
    delta_o: Tensor | None
    """(T, B, P, O) with `OutputsOnly`."""


class RolloutOptions(NamedTuple):
    """The scalars of a block of rollouts."""

    rollouts: int
    sigma: float
    noise: str = "rademacher"
    cell: CellForms = TANH
    precision: str = "fp32"
    """Operands of the recurrent product: "bf16", "fp16" (scaled by 1/sigma), "tf32", "fp32"; accumulation is float32.
    "fp64" with float64 tensors."""
    store_delta_a: bool = False


def rollout(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    *,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Run a block of perturbed rollouts through time.

    Args:
        preact: clean pre-activations a, (T, B, H).
        hidden: clean hidden states h = phi(a), (T, B, H).
        weight_hh: recurrent matrix, (H, H).
        loss: what `delta_loss` measures; None where only the state is wanted.
        seed: 0-dim int64 tensor, the noise's key.
        options: number of rollouts P, standard deviation and kind of the noise, cell, operand precision, and
            whether delta_a is kept.
        counters: global indices of the block's first step, rollout and sample.
        delta_h0: deviation of the state before the first step, (B, P, H); None is zero.

    Returns:
        `Rollout`; loss differences carry the weight the step has in the reported loss.
    """
    time, batch, units = preact.shape
    rollouts, working = options.rollouts, preact.dtype
    product = RecurrentProduct(weight_hh, options, batch * rollouts)
    deviation = options.cell.torch(preact, hidden)
    delta_h = None if delta_h0 is None else delta_h0.to(working)
    scratch = (preact.new_empty((batch, rollouts, units)), preact.new_empty((batch, rollouts, units)))
    # Places for the noise of some steps, which becomes their delta_a; or of every step where delta_a is kept.
    ahead = min(time, max(1, NOISE_BYTES // max(1, batch * rollouts * padded(units) * preact.itemsize)))
    room = spare_room(preact, (time if options.store_delta_a else ahead, batch, rollouts, padded(units)))
    places = room[..., :units].unbind(0)
    measure = Measure(loss, preact, rollouts)
    injected = NoiseSteps(
        seed,
        (time, batch, rollouts, units),
        sigma=options.sigma,
        kind=options.noise,
        counters=counters,
        dtype=working,
    )
    for step in range(time):
        place = step if options.store_delta_a else step % ahead
        if step % ahead == 0:
            injected.fill(step, room[place : place + min(ahead, time - step)])
        delta_a = places[place]
        if delta_h is not None:
            product.add_to(delta_a, delta_h)
        delta_h = deviation.step(step, delta_a, delta_h, scratch)
        measure.step(step, delta_h)
    kept = room[..., :units] if options.store_delta_a else None
    # The scratch tensor is the caller's now; nothing else refers to it.
    final = preact.new_zeros((batch, rollouts, units)) if delta_h is None else delta_h
    return Rollout(measure.delta_loss, kept, final, measure.delta_o)


_spare: dict[torch.dtype, Tensor] = {}


def spare_room(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return an uninitialised tensor, in memory given back by `give_back` where it fits."""
    size = math.prod(shape)
    spare = _spare.pop(like.dtype, None) if like.device.type == "cpu" else None
    if spare is None or not spare.numel() // 2 <= size <= spare.numel():
        return like.new_empty(shape)
    return spare[:size].view(shape)


def give_back(delta_a: Tensor | None) -> None:
    """Let the next rollout on the CPU write into the memory of a delta_a that nobody will look at again.

    Fresh memory costs the CPU a page fault per 4 KB, a seventh of an update; CUDA tensors come from torch's own cache.
    """
    if delta_a is None or delta_a.device.type != "cpu":
        return
    storage = delta_a.untyped_storage()
    if storage.nbytes() <= SPARE_BYTES:
        _spare[delta_a.dtype] = delta_a.new_empty(0).set_(
            storage, 0, (storage.nbytes() // delta_a.element_size(),), (1,)
        )


class RecurrentProduct:
    """delta_a += delta_h W_hh^T with the operands rounded as `precision` says."""

    def __init__(self, weight_hh: Tensor, options: RolloutOptions, rows: int) -> None:
        self.precision = options.precision
        self.scale = options.sigma if options.precision == "fp16" else 1.0
        self.weight = self._rounded(weight_hh).t()
        units = weight_hh.shape[0]
        # Torch gives smaller products to a library that does not round.
        large = units >= 64 and rows * units**2 >= 1 << 18
        self.on_tiles = options.precision == "bf16" and large and _has_bf16_tiles(weight_hh)

    def _rounded(self, operand: Tensor) -> Tensor:
        if self.precision == "bf16":
            return operand.bfloat16().to(operand.dtype)
        if self.precision == "fp16":
            return operand.half().to(operand.dtype)
        if self.precision == "tf32":
            # Round to nearest at the 10th mantissa bit.
            bits = operand.contiguous().view(torch.int32)
            return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
        return operand

    def add_to(self, delta_a: Tensor, delta_h: Tensor, *, keep: float = 1.0) -> None:
        """Add to `keep` times delta_a, (B, P, H), in place; 0 overwrites what is there, NaN too."""
        rows = delta_a.view(-1, delta_a.shape[-1])
        operand = delta_h.reshape(-1, delta_h.shape[-1])
        if self.on_tiles:
            with _bf16_products():
                rows.addmm_(operand, self.weight, beta=keep)
            return
        if self.scale != 1.0:
            operand = operand / self.scale
        rows.addmm_(self._rounded(operand), self.weight, beta=keep, alpha=self.scale)


def _has_bf16_tiles(operand: Tensor) -> bool:
    """Say whether the processor multiplies bfloat16 matrices itself (AMX)."""
    on_cpu = operand.device.type == "cpu" and operand.dtype == torch.float32
    return on_cpu and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """Let products of float32 matrices on the CPU round their operands to bfloat16; they accumulate in float32."""
    control = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = control.fp32_precision
    control.fp32_precision = "bf16"
    try:
        yield
    finally:
        control.fp32_precision = before
