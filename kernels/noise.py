"""Counter-based noise: Philox4x32-10 words turned into signs or Gaussians.

    words = Philox4x32-10(counter = (c0, c1, c2, c3), key = seed)

Source: Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3"; Box and Muller (1958).

The counter says what a number is for, never how the work was divided:

    c0 = purpose (4 bits) | layer (8 bits) | unit block (20 bits)
    c1 = time step, in processing order (0 where the noise is held; the sample for dense weight noise)
    c2 = rollout
    c3 = process rank (12 bits) | sample (20 bits; the matrix row for dense weight noise)

Four words serve 128 Rademacher units or 4 Gaussian units. Which bit of which block a unit reads is chosen so that the
lane of a matrix unit that accumulates a unit also makes its noise:

    Rademacher  u = 512 g + 128 w + 8 a + 2 q + b (w < 4, a < 16, q < 4, b < 2): bit 2 a + b of word w of block 4 g + q;
                a set bit is +sigma, a clear one -sigma
    Gaussian    u = 16 g + 8 e + 2 q + b (e < 2, q < 4, b < 2): element 2 e + b of block 4 g + q; words (0, 1) make
                elements (0, 1), words (2, 3) make elements (2, 3), each pair (x, y) by
                sqrt(-2 log(x 2^-32 + 2^-33)) * (cos, sin)(2 pi y 2^-32); x and y are first rounded to the working type,
                so the logarithm's argument lies in (0, 1]
"""

from __future__ import annotations

import functools
import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

NOISE_STREAM_VERSION = 1
"""Changes whenever the same seed and counter would give other noise; part of every checkpoint."""

UNITS_PER_GROUP = {"rademacher": 512, "gaussian": 16}
"""Units served by four consecutive Philox blocks."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a stream of noise perturbs: the top four bits of the first counter word."""

    HIDDEN = 0
    READOUT = 1
    WEIGHTS = 2
    LOW_RANK_U = 3
    LOW_RANK_V = 4


class Counters(NamedTuple):
    """Where a block of noise begins in the counter space; each field's range is in `COUNTER_LIMITS`."""

    purpose: int = Purpose.HIDDEN
    layer: int = 0
    """2 * layer + direction in a bidirectional network, the layer's number in any other."""
    time: int = 0
    rollout: int = 0
    sample: int = 0
    rank: int = 0


COUNTER_LIMITS = {
    "purpose": 1 << 4,
    "layer": 1 << 8,
    "time": 1 << 32,
    "rollout": 1 << 32,
    "sample": 1 << 20,
    "rank": 1 << 12,
}
"""Every field, and the last index a block of noise reaches in it, is below this."""

UNIT_BLOCKS_LIMIT = 1 << 20


def first_word(counters: Counters) -> int:
    """Return c0 of unit block 0: purpose and layer in their bit fields."""
    return (int(counters.purpose) << 28) | (counters.layer << 20)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four Philox4x32-10 words of each counter as int64 in [0, 2^32).

    The counter words are int64 tensors in [0, 2^32) that broadcast against each other; they stay as small as they came
    until a round mixes them, which makes the first rounds nearly free. `seed` is a 0-dim int64 tensor: the key's low
    word, then its high word.
    """
    key0, key1 = seed & WORD, (seed >> 32) & WORD
    for step in range(PHILOX_ROUNDS):
        if step:
            key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & WORD, (key1 + PHILOX_KEY_STEPS[1]) & WORD
        product0, product1 = (c0 & WORD) * PHILOX_MULTIPLIERS[0], (c2 & WORD) * PHILOX_MULTIPLIERS[1]
        # Bits above 32 are left dirty and cut before the next product: half the masking.
        c0, c1, c2, c3 = (product1 >> 32) ^ (c1 ^ key0), product1, (product0 >> 32) ^ (c3 ^ key1), product0
    return c0 & WORD, c1 & WORD, c2 & WORD, c3 & WORD


def noise(
    seed: Tensor,
    shape: tuple[int, int, int, int],
    *,
    sigma: float = 1.0,
    kind: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return noise of standard deviation `sigma`, shape (T, B, P, H).

    Args:
        seed: 0-dim int64 tensor, the 64-bit key; its device is the result's.
        shape: (time, batch, rollouts, hidden).
        sigma: standard deviation.
        kind: "rademacher" (two values, +-sigma) or "gaussian".
        counters: global indices of element (0, 0, 0, 0); element (t, b, p, .) has time + t, sample + b, rollout + p.
        dtype: floating type of the result.

    Returns:
        A tensor of that shape. Its rows may be padded: only the last dimension is contiguous.
    """
    time, batch, rollouts, hidden = shape
    device = seed.device
    blocks = 4 * -(-hidden // UNITS_PER_GROUP[kind])

    def index(start: int, count: int, axis: int) -> Tensor:
        view = [1, 1, 1, 1]
        view[axis] = count
        return torch.arange(start, start + count, dtype=torch.int64, device=device).view(view)

    words = philox(
        index(first_word(counters), blocks, 3),
        index(counters.time, time, 0),
        index(counters.rollout, rollouts, 2),
        index((counters.rank << 20) + counters.sample, batch, 1),
        seed,
    )
    words = torch.broadcast_tensors(*words)  # type: ignore[no-untyped-call]
    if kind == "rademacher":
        return _signs(words, hidden, sigma, dtype)
    return _gaussians(words, hidden, sigma, dtype)


def _signs(words: tuple[Tensor, ...], hidden: int, sigma: float, dtype: torch.dtype) -> Tensor:
    """Return +-sigma for `hidden` units from words of shape (T, B, P, 4 * groups)."""
    time, batch, rollouts, blocks = words[0].shape
    octets = []
    for word in words[: -(-hidden // 128)]:
        quads = word.reshape(time, batch, rollouts, blocks // 4, 4)
        for half in (quads & 0xFFFF, quads >> 16)[: -(-hidden // 64)]:
            octets.append(_interleave(half))
    # (..., groups, octets) int64 is, byte by byte, the units in order: eight signs a byte, lowest bit first.
    packed = torch.stack(octets, dim=-1).view(torch.uint8).flatten(-2)
    # int32, the narrowest index the look-up takes.
    index = packed[..., : -(-hidden // 8)].to(torch.int32)
    table = _sign_table(dtype, words[0].device) * sigma
    signs = torch.nn.functional.embedding(index, table)
    return signs.flatten(-2)[..., :hidden]


def _interleave(half: Tensor) -> Tensor:
    """Spread 16 bits of each of 4 blocks, (..., 4) int64, to 64 bits: byte a holds bits 2 a, 2 a + 1 of blocks 0-3."""
    spread = (half | (half << 24)) & 0x000000FF000000FF
    spread = (spread | (spread << 12)) & 0x000F000F000F000F
    spread = (spread | (spread << 6)) & 0x0303030303030303
    first, second, third, fourth = spread.unbind(-1)
    return first | (second << 2) | (third << 4) | (fourth << 6)


@functools.cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the (256, 8) table of the signs that the bits of a byte stand for."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = torch.arange(8, device=device)
    return (((byte >> bit) & 1) * 2 - 1).to(dtype)


def _gaussians(words: tuple[Tensor, ...], hidden: int, sigma: float, dtype: torch.dtype) -> Tensor:
    """Return Gaussians for `hidden` units from words of shape (T, B, P, 4 * groups)."""
    time, batch, rollouts, blocks = words[0].shape
    working = torch.promote_types(dtype, torch.float32)
    pairs = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log(first.to(working) * 2.0**-32 + 2.0**-33)) * sigma
        angle = second.to(working) * (2 * math.pi * 2.0**-32)
        pairs.append(torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1))
    # (..., groups, q, e, b) -> (..., groups, e, q, b): unit order.
    elements = torch.stack(pairs, dim=-2).view(time, batch, rollouts, blocks // 4, 4, 2, 2).transpose(-3, -2)
    return elements.reshape(time, batch, rollouts, 4 * blocks)[..., :hidden].to(dtype)
