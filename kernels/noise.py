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
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NOISE_STREAM_VERSION = 1
"""Changes whenever the same seed and counter would give other noise; part of every checkpoint."""

UNITS_PER_GROUP = {"rademacher": 512, "gaussian": 16}
"""Units served by four consecutive Philox blocks."""

ROW_UNITS = 32
"""Rows of noise have room for a multiple of so many units."""

SIGNS_PER_BYTE = 8


def _index_swap(high: int, low: int) -> tuple[int, int]:
    """Return mask and shift that exchange two bits of the index of every bit of a 64-bit integer."""
    mask = sum(1 << place for place in range(64) if not place >> high & 1 and place >> low & 1)
    return (mask - (1 << 64) if mask >> 63 else mask), (1 << high) - (1 << low)


BIT_SWAPS = [_index_swap(high, low) for high, low in ((5, 3), (4, 2), (3, 1), (2, 1))]
"""Take bit 16 q + 2 a + b of an integer to bit 8 a + 2 q + b."""

COUNTERS_AT_A_TIME = 1 << 14
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
    on_cpu = seed.device.type == "cpu"
    key = int(seed) if on_cpu else seed
    given = tuple(_integers(word) for word in (c0, c1, c2, c3))
    words = tuple(word & WORD for word in _rounds(given, (key & WORD, (key >> 32) & WORD)))
    first, second, third, fourth = (torch.from_numpy(word) for word in words) if on_cpu else words
    return first, second, third, fourth


def _integers(values: Tensor) -> Any:
    """Return integers as what their arithmetic runs in: on the CPU numpy, which takes half of torch's time."""
    return values.numpy() if values.device.type == "cpu" else values


def _rounds(words: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Return the words after all rounds; bits above 32 are left dirty and cut before the next product."""
    (c0, c1, c2, c3), (key0, key1) = words, key
    shift, spare = torch.bitwise_right_shift if isinstance(c0, Tensor) else np.right_shift, None
    for step in range(PHILOX_ROUNDS):
        if step:
            key0, key1 = (key0 + PHILOX_KEY_STEPS[0]) & WORD, (key1 + PHILOX_KEY_STEPS[1]) & WORD
        if spare is not None:
            c0 &= WORD
            c2 &= WORD
            c0 *= PHILOX_MULTIPLIERS[0]
            c2 *= PHILOX_MULTIPLIERS[1]
            c1 ^= key0
            c3 ^= key1
            c1 ^= shift(c2, 32, out=spare)
            c3 ^= shift(c0, 32, out=spare)
            c0, c1, c2, c3 = c1, c2, c3, c0
            continue
        product0, product1 = (c0 & WORD) * PHILOX_MULTIPLIERS[0], (c2 & WORD) * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> 32) ^ (c1 ^ key0), product1, (product0 >> 32) ^ (c3 ^ key1), product0
        if c0.shape == c1.shape == c2.shape == c3.shape:
            # Mixed, they are whole arrays of our own, and so is this one, whose values were needed last.
            spare = product0 >> 32
    return c0, c1, c2, c3


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
    return steps.fill(0, seed.new_empty((*shape[:3], padded(shape[3])), dtype=dtype))


def padded(hidden: int) -> int:
    """Return the length of a row of noise, whose last units nobody looks at."""
    return ROW_UNITS * -(-hidden // ROW_UNITS)


class NoiseSteps:
    """The noise of consecutive steps, made where it is needed: what is kept ahead is 8 signs to a byte."""

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
        self.table = sign_table(sigma, dtype, seed.device) if kind == "rademacher" else None

    def fill(self, first: int, room: Tensor) -> Tensor:
        """Write the noise of steps from `first` on into `room`, (L, B, P, padded(H)); return its (L, B, P, H) part."""
        hidden, written = self.shape[3], 0
        if not 0 <= first <= self.shape[0] - len(room):
            raise IndexError(f"steps {first} to {first + len(room)} are not among the {self.shape[0]} there are")
        while written < len(room):
            step = first + written
            if not self.start <= step < self.stop:
                self._make(step)
            ahead = self.ahead[step - self.start : step - self.start + len(room) - written]
            here = room[written : written + len(ahead)]
            if self.table is None:
                here[..., :hidden] = ahead
            else:
                unpack_signs(ahead, here, self.table)
            written += len(ahead)
        return room[..., :hidden]

    def _make(self, step: int) -> None:
        """Keep the noise of the block that a step is in."""
        # Blocks begin at multiples of their length, so that steps may also be asked for last to first.
        self.start = step - step % self.length
        self.stop = min(self.start + self.length, self.shape[0])
        here = (self.stop - self.start, *self.shape[1:])
        counters = self.counters._replace(time=self.counters.time + self.start)
        if self.kind == "rademacher":
            self.ahead = packed_signs(self.seed, here, counters)
        else:
            words = _words(self.seed, here, self.kind, counters)
            self.ahead = _gaussians(words, self.shape[3], self.sigma, self.dtype)


def _words(
    seed: Tensor, shape: tuple[int, int, int, int], kind: str, counters: Counters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four Philox words of every block 4 g + q, (q, T, B, P, g) each."""
    time, batch, rollouts, hidden = shape

    def index(start: int, count: int, axis: int) -> Tensor:
        view = [1, 1, 1, 1, 1]
        view[axis] = count
        return torch.arange(start, start + count, dtype=torch.int64, device=seed.device).view(view)

    groups = -(-hidden // UNITS_PER_GROUP[kind])
    blocks = index(first_word(counters), 4 * groups, 0).view(groups, 4).t().reshape(4, 1, 1, 1, groups)
    first, second, third, fourth = philox(
        blocks,
        index(counters.time, time, 1),
        index(counters.rollout, rollouts, 3),
        index((counters.rank << 20) + counters.sample, batch, 2),
        seed,
    )
    return first, second, third, fourth


def packed_signs(seed: Tensor, shape: tuple[int, int, int, int], counters: Counters) -> Tensor:
    """Return signs as bits, (T, B, P, padded(H) / 8) uint8: unit 8 j + i is bit i of byte j, set for +sigma."""
    time, batch, rollouts, hidden = shape
    length = padded(hidden) // SIGNS_PER_BYTE
    if 0 in shape:
        return seed.new_empty((time, batch, rollouts, length), dtype=torch.uint8)
    words = [_integers(word) for word in _words(seed, shape, "rademacher", counters)[: -(-hidden // 128)]]
    # The 16-bit halves that the four q of each (g, w) have in common make a 64-bit integer.
    packed = seed.new_empty((time, batch, rollouts, words[0].shape[-1], len(words), 2), dtype=torch.int64)
    bits = _integers(packed)
    for number, word in enumerate(words):
        for half in (0, 1):
            joined = (word[0] >> 16 * half) & 0xFFFF
            for q in (1, 2, 3):
                part = word[q] >> 16 if half else word[q] & 0xFFFF
                part <<= 16 * q
                joined |= part
            bits[..., number, half] = joined
    # From (q, a, b) order of bits within each to (a, q, b), which is the order of units.
    for mask, shift in BIT_SWAPS:
        moved = bits >> shift
        moved ^= bits
        moved &= mask
        bits ^= moved
        moved <<= shift
        bits ^= moved
    return packed.view(torch.uint8).flatten(3)[..., :length]


def sign_table(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the noise of every byte of packed signs, (256, 8)."""
    byte, bit = torch.arange(256, device=device).unsqueeze(1), torch.arange(SIGNS_PER_BYTE, device=device)
    return (2 * (byte >> bit & 1) - 1).to(dtype) * sigma


def unpack_signs(packed: Tensor, room: Tensor, table: Tensor) -> Tensor:
    """Fill `room`, (..., 8 bytes) contiguous, from packed signs, (..., bytes), and their `sign_table`; return it."""
    target = room.view(*packed.shape, SIGNS_PER_BYTE)
    if room.device.type == "cpu" and room.dtype in {torch.float32, torch.float64}:
        # By default numpy would buffer `out`, for indices beyond the table; a byte is never beyond it.
        np.take(table.numpy(), packed.numpy(), axis=0, out=target.numpy(), mode="clip")
    else:
        target.copy_(table[packed.int()])
    return room


def _gaussians(words: tuple[Tensor, ...], hidden: int, sigma: float, dtype: torch.dtype) -> Tensor:
    """Return Gaussians for `hidden` units from words of shape (q, T, B, P, groups)."""
    _, time, batch, rollouts, groups = words[0].shape
    working = torch.promote_types(dtype, torch.float32)
    pairs = []
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log(first.to(working) * 2.0**-32 + 2.0**-33)) * sigma
        angle = second.to(working) * (2 * math.pi * 2.0**-32)
        pairs.append(torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1))
    # (q, T, B, P, g, e, b) -> (T, B, P, g, e, q, b): unit order.
    elements = torch.stack(pairs, dim=-2).movedim(0, -2)
    return elements.reshape(time, batch, rollouts, 16 * groups)[..., :hidden].to(dtype)
