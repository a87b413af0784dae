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

import math
import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

NOISE_STREAM_VERSION = 1
"""Changes whenever the same seed and counter would give other noise; part of every checkpoint."""

UNITS_PER_GROUP = {"rademacher": 512, "gaussian": 16}
"""Units served by four consecutive Philox blocks."""

SIGNS_PER_WORD = 32
SIGN_BITS = {
    torch.float32: (torch.int32, 32, ("i", "f")),
    torch.float64: (torch.int64, 64, ("q", "d")),
}
"""The integer type that shares a float's bits, its width, and both formats for `struct`."""


def _index_swap(high: int, low: int) -> tuple[int, int]:
    """Return mask and shift that exchange two bits of the index of every bit of a 64-bit integer."""
    mask = sum(1 << place for place in range(64) if not place >> high & 1 and place >> low & 1)
    return (mask - (1 << 64) if mask >> 63 else mask), (1 << high) - (1 << low)


BIT_SWAPS = [_index_swap(high, low) for high, low in ((5, 3), (4, 2), (3, 1), (2, 1))]
"""Take bit 16 q + 2 a + b of an integer to bit 8 a + 2 q + b."""

COUNTERS_AT_A_TIME = 1 << 16
"""Philox runs over blocks of about so many counters: its temporaries stay in the cache."""

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
    steps = NoiseSteps(seed, shape, sigma=sigma, kind=kind, counters=counters, dtype=dtype)
    room = seed.new_empty((*shape[:3], padded(shape[3])), dtype=dtype)
    for step in range(shape[0]):
        steps.fill(step, room[step])
    return room[..., : shape[3]]


def padded(hidden: int) -> int:
    """Return the row length that has room for whole words of packed signs."""
    return SIGNS_PER_WORD * -(-hidden // SIGNS_PER_WORD)


class NoiseSteps:
    """The noise of consecutive steps, made where it is needed: what is kept ahead is 32 signs to a word."""

    def __init__(
        self,
        seed: Tensor,
        shape: tuple[int, int, int, int],
        *,
        sigma: float,
        kind: str,
        counters: Counters,
        dtype: torch.dtype,
    ) -> None:
        self.seed, self.shape, self.sigma, self.kind, self.dtype = seed, shape, sigma, kind, dtype
        self.counters = counters
        words = 4 * -(-shape[3] // UNITS_PER_GROUP[kind])
        self.length = max(1, COUNTERS_AT_A_TIME // max(1, shape[1] * shape[2] * words))
        self.start = self.stop = 0
        self.ahead = torch.empty(0)

    def fill(self, step: int, room: Tensor) -> Tensor:
        """Write the noise of a step into `room`, (B, P, padded(H)); return its (B, P, H) part."""
        hidden = self.shape[3]
        if not self.start <= step < self.stop:
            # Blocks begin at multiples of their length, so that steps may also be asked for last to first.
            self.start = step - step % self.length
            self.stop = min(self.start + self.length, self.shape[0])
            here = (self.stop - self.start, *self.shape[1:])
            counters = self.counters._replace(time=self.counters.time + self.start)
            if self.kind == "rademacher":
                self.ahead = packed_signs(self.seed, here, counters)
            else:
                self.ahead = _gaussians(_words(self.seed, here, self.kind, counters), hidden, self.sigma, self.dtype)
        ahead = self.ahead[step - self.start]
        if self.kind == "rademacher":
            return unpack_signs(ahead, room, self.sigma)[..., :hidden]
        return room[..., :hidden].copy_(ahead)


def _words(
    seed: Tensor, shape: tuple[int, int, int, int], kind: str, counters: Counters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four Philox words of every block, (T, B, P, 4 * groups) each."""
    time, batch, rollouts, hidden = shape

    def index(start: int, count: int, axis: int) -> Tensor:
        view = [1, 1, 1, 1]
        view[axis] = count
        return torch.arange(start, start + count, dtype=torch.int64, device=seed.device).view(view)

    blocks = 4 * -(-hidden // UNITS_PER_GROUP[kind])
    first, second, third, fourth = philox(
        index(first_word(counters), blocks, 3),
        index(counters.time, time, 0),
        index(counters.rollout, rollouts, 2),
        index((counters.rank << 20) + counters.sample, batch, 1),
        seed,
    )
    whole = (time, batch, rollouts, blocks)
    return first.expand(whole), second.expand(whole), third.expand(whole), fourth.expand(whole)


def packed_signs(seed: Tensor, shape: tuple[int, int, int, int], counters: Counters) -> Tensor:
    """Return a block's signs as bits, (T, B, P, words) int32: bit i of word j is unit 32 j + i, set for -sigma."""
    time, batch, rollouts, hidden = shape
    if 0 in shape:
        return seed.new_empty((time, batch, rollouts, -(-hidden // SIGNS_PER_WORD)), dtype=torch.int32)
    words = torch.stack(_words(seed, shape, "rademacher", counters)[: -(-hidden // 128)], dim=-2)
    # (..., w, g, q, half) 16-bit halves of words, to one 64-bit integer of the four q for each (g, w, half).
    groups = words.shape[-1] // 4
    halves = words.to(torch.int32).view(torch.int16).view(time, batch, rollouts, words.shape[-2], groups, 4, 2)
    bits = halves.permute(0, 1, 2, 4, 3, 6, 5).contiguous().view(torch.int64).squeeze(-1)
    # From (q, a, b) order of bits within each to (a, q, b), which is the order of units.
    for mask, shift in BIT_SWAPS:
        moved = (bits >> shift).bitwise_xor_(bits).bitwise_and_(mask)
        bits = bits.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(shift))
    packed = bits.bitwise_not_().view(torch.int32).flatten(3)
    return packed[..., : -(-hidden // SIGNS_PER_WORD)]


def unpack_signs(packed: Tensor, room: Tensor, sigma: float) -> Tensor:
    """Fill `room`, (..., 32 words) contiguous, with +-sigma from packed signs, (..., words); return it."""
    if room.dtype not in SIGN_BITS:
        return room.copy_(unpack_signs(packed, room.new_empty(room.shape, dtype=torch.float32), sigma))
    integer, bits, pattern = SIGN_BITS[room.dtype]
    shifts = torch.arange(bits - 1, bits - 1 - SIGNS_PER_WORD, -1, dtype=integer, device=room.device)
    target = room.view(integer).view(*packed.shape, SIGNS_PER_WORD)
    # Each sign goes to the sign bit; the other bits are sigma's.
    torch.bitwise_left_shift(packed.to(integer).unsqueeze(-1), shifts, out=target)
    target.bitwise_and_(-(1 << (bits - 1)))
    target.bitwise_xor_(struct.unpack(pattern[0], struct.pack(pattern[1], sigma))[0])
    return room


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
