"""The reference's noise for the CPU: Philox and the unpacking of its signs as compiled loops.

Signs equal the reference's bit for bit; Gaussians come from the reference itself.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import noise as reference
from .compile_numba import inlined, kernel
from .noise import BIT_SWAPS, PHILOX_KEY_STEPS, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, WORD, Counters, first_word, padded

ROWS_AT_A_TIME = 32
"""Rollouts whose words are generated side by side."""

_WORD = np.uint64(WORD)
_HALF = np.uint64(0xFFFF)
_MULTIPLIERS = tuple(np.uint64(number) for number in PHILOX_MULTIPLIERS)
_KEY_STEPS = tuple(np.uint64(number) for number in PHILOX_KEY_STEPS)
_SWAPS = tuple((np.uint64(mask % (1 << 64)), np.uint64(shift)) for mask, shift in BIT_SWAPS)
_32 = np.uint64(32)


@inlined
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, key0: Any, key1: Any) -> Any:
    for step in range(PHILOX_ROUNDS):
        if step:
            key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ key0,
            product1 & _WORD,
            (product0 >> _32) ^ c3 ^ key1,
            product0 & _WORD,
        )
    return c0, c1, c2, c3


@inlined
def _swapped(bits: Any) -> Any:
    for mask, shift in _SWAPS:
        moved = ((bits >> shift) ^ bits) & mask
        bits ^= moved ^ (moved << shift)
    return bits


@kernel
def _packed(out: Any, key: Any, c0: Any, time: Any, rollout: Any, sample: Any) -> None:
    steps, batch, rollouts, words = out.shape
    blocks = (rollouts + ROWS_AT_A_TIME - 1) // ROWS_AT_A_TIME
    for task in numba.prange(steps * batch * blocks):
        step, place = task // (batch * blocks), task % (batch * blocks)
        b, first = place // blocks, place % blocks * ROWS_AT_A_TIME
        rows = min(ROWS_AT_A_TIME, rollouts - first)
        drawn = np.empty((4, 4, ROWS_AT_A_TIME), np.uint64)
        c1, c3 = np.uint64(time + step), np.uint64(sample + b)
        for group in range((words + 7) // 8):
            for q in range(4):
                block = c0 + np.uint64(4 * group + q)
                for row in range(rows):
                    w0, w1, w2, w3 = _philox(block, c1, np.uint64(rollout + first + row), c3, key[0], key[1])
                    drawn[0, q, row], drawn[1, q, row], drawn[2, q, row], drawn[3, q, row] = w0, w1, w2, w3
            # The 16-bit halves that the four q of each (g, w) have in common make a 64-bit integer.
            for word in range(8 * group, min(words, 8 * group + 8)):
                w, down = (word - 8 * group) // 2, np.uint64(16 * (word % 2))
                for row in range(rows):
                    bits = np.uint64(0)
                    for q in range(4):
                        bits |= ((drawn[w, q, row] >> down) & _HALF) << np.uint64(16 * q)
                    out[step, b, first + row, word] = _swapped(bits)


def packed_signs(seed: Tensor, shape: tuple[int, int, int, int], counters: Counters) -> Any:
    """Return signs as bits, (T, B, P, 2 ceil(H / 64)) uint32: unit 32 j + i is bit i of word j, set for +sigma."""
    time, batch, rollouts, hidden = shape
    out = np.empty((time, batch, rollouts, -(-hidden // 64)), np.uint64)
    key = int(seed)
    halves = np.array([key & WORD, (key >> 32) & WORD], np.uint64)
    sample = (counters.rank << 20) + counters.sample
    _packed(out, halves, np.uint64(first_word(counters)), counters.time, counters.rollout, sample)
    return out.view(np.uint32)


@kernel
def _unpack(words: Any, room: Any, plus: Any) -> None:
    rows, length = room.shape
    for row in numba.prange(rows):
        for number in range(length // 32):
            word, start = words[row, number], 32 * number
            # The end is no constant, so that the loop is vectorised; with a constant end it is unrolled into scalars.
            for i in range(min(32, length - start)):
                room[row, start + i] = plus if (word >> np.uint32(i)) & np.uint32(1) else -plus


def noise(
    seed: Tensor,
    shape: tuple[int, int, int, int],
    *,
    sigma: float = 1.0,
    kind: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return noise of standard deviation `sigma`, (T, B, P, H); see the reference."""
    if kind != "rademacher" or dtype not in {torch.float32, torch.float64} or 0 in shape:
        return reference.noise(seed, shape, sigma=sigma, kind=kind, counters=counters, dtype=dtype)
    words = packed_signs(seed, shape, counters)
    room = seed.new_empty((*shape[:3], padded(shape[3])), dtype=dtype)
    flat = room.view(-1, room.shape[-1]).numpy()
    _unpack(words.reshape(len(flat), -1), flat, flat.dtype.type(sigma))
    return room[..., : shape[3]]
