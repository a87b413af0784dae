"""Perturbed rollouts in deviation form: the difference to the clean run is carried, no two runs are subtracted.

    delta_a_t = W_hh delta_h_{t-1} + xi_t
    delta_h_t = phi(a_t + delta_a_t) - phi(a_t)         exact for any sigma, computed without cancellation
      tanh:  th (1 - h^2) / (1 + h th), th = tanh(delta_a);  the plain difference where |delta_a| > 0.5
      relu:  max(delta_a + min(a, 0), -max(a, 0))

`loss.py` holds the loss differences of each step. Source: the update rule these rollouts serve is activity-based node
perturbation (Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967); the deviation form is derived here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .loss import Loss, Measure
from .noise import Counters, NoiseSteps, padded

NOISE_BYTES = 1 << 17
"""Noise that waits for its step."""

CLEAN_BYTES = 1 << 19
"""Clean activity that is worked on at once."""

SPARE_BYTES = 256 << 20
"""Memory that may stay allocated between updates."""

SLOPE_FLOOR = 1e-30
"""Slope of tanh below which a unit counts as flat: its deviation is then below the smallest normal float32."""

PLAIN_DIFFERENCE_ABOVE = 0.5
"""|delta_a| from which tanh(a + delta_a) - tanh(a) loses less than two bits, and the quotient form nears 0 / 0."""


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
    nonlinearity: str = "tanh"
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
        options: number of rollouts P, standard deviation and kind of the noise, nonlinearity, operand precision, and
            whether delta_a is kept.
        counters: global indices of the block's first step, rollout and sample.
        delta_h0: deviation of the state before the first step, (B, P, H); None is zero.

    Returns:
        `Rollout`; loss differences carry the weight the step has in the reported loss.
    """
    time, batch, units = preact.shape
    rollouts, working = options.rollouts, preact.dtype
    product = RecurrentProduct(weight_hh, options, batch * rollouts)
    deviation = DEVIATIONS[options.nonlinearity](preact, hidden)
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
        delta_h = deviation.step(step, delta_a, scratch)
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


def quotient_rows(preact: Tensor, hidden: Tensor, floor: float = SLOPE_FLOOR) -> tuple[Tensor, Tensor]:
    """Return 1 / s and h / s, (T, B, H), s = 1 - h^2: th (1 - h^2) / (1 + h th) = th / (1 / s + th h / s).

    One pass over the rollouts less. The slope comes from a: from h, a saturated unit keeps only the rounding of h.
    `floor`: the least slope, which keeps its inverse finite.
    """
    inverse, ratio = torch.empty_like(preact), torch.empty_like(preact)
    # On a CPU a few steps at a time, so that the passes find them in the cache.
    step_bytes = max(1, preact[:1].numel() * preact.itemsize)
    length = max(1, len(preact) if preact.is_cuda else CLEAN_BYTES // step_bytes)
    for start in range(0, len(preact), length):
        steps = slice(start, start + length)
        tail = torch.abs(preact[steps], out=inverse[steps]).mul_(-2).exp_()
        # 1 / s = (1 + tail)^2 / (4 tail)
        torch.div((1 + tail).square_(), tail, out=tail).mul_(0.25).clamp_(max=1 / floor)
        torch.mul(hidden[steps], tail, out=ratio[steps])
    return inverse, ratio


class TanhDeviation:
    """tanh(a + delta_a) - tanh(a) around clean pre-activations, (T, B, H)."""

    def __init__(self, preact: Tensor, hidden: Tensor) -> None:
        self.preact = preact
        rows = (one.unsqueeze(2).unbind(0) for one in quotient_rows(preact, hidden))
        self.rows = list(zip(*rows, strict=True))

    def step(self, step: int, delta_a: Tensor, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return delta_h of a step, (B, P, H), in the first scratch tensor."""
        (result, denominator), (inverse, ratio) = scratch, self.rows[step]
        torch.tanh(delta_a, out=result)
        torch.addcmul(inverse, ratio, result, out=denominator)
        result.div_(denominator)
        if delta_a.is_cuda or not _all_below(delta_a, PLAIN_DIFFERENCE_ABOVE):
            preact = self.preact[step].unsqueeze(1)
            plain = torch.tanh(preact + delta_a).sub_(torch.tanh(preact))
            result.copy_(torch.where(delta_a.abs() > PLAIN_DIFFERENCE_ABOVE, plain, result))
        return result


def _all_below(values: Tensor, bound: float) -> bool:
    """Say whether every |value| is at most `bound`; no where one is NaN, which hides how large the others are."""
    # The norm of every row is one pass, and usually decides.
    if not values.numel() or bool(torch.linalg.vector_norm(values, dim=-1).amax() <= bound):
        return True
    return bool(values.amax() <= bound) and bool(values.amin() >= -bound)


class ReluDeviation:
    """relu(a + delta_a) - relu(a) around clean pre-activations, (T, B, H)."""

    def __init__(self, preact: Tensor, hidden: Tensor) -> None:
        self.below, self.above = preact.clamp(max=0), -hidden

    def step(self, step: int, delta_a: Tensor, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return delta_h of a step, (B, P, H), in the first scratch tensor."""
        result, _ = scratch
        torch.add(delta_a, self.below[step].unsqueeze(1), out=result)
        return torch.maximum(result, self.above[step].unsqueeze(1), out=result)


DEVIATIONS: dict[str, type[TanhDeviation] | type[ReluDeviation]] = {"tanh": TanhDeviation, "relu": ReluDeviation}
