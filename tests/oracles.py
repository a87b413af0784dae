"""Brute-force forms of the design's equations, written from the design and not from the package: one loop per sum.

They use Python integers and float64 only.
"""

import functools
import math

import numpy as np
import torch

WORD = 0xFFFFFFFF


def philox4x32_10(counter, key):
    """Salmon et al. 2011, on Python integers: four words from four counter and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def unit_noise(seed, unit, kind, *, purpose=0, layer=0, time=0, rollout=0, sample=0, rank=0):
    """The unit-variance noise of one unit, by the bit mapping of the design's section on noise."""
    key = (seed & WORD, (seed >> 32) & WORD)

    def words(block):
        return philox4x32_10((purpose << 28 | layer << 20 | block, time, rollout, rank << 20 | sample), key)

    if kind == "rademacher":
        g, rest = divmod(unit, 512)
        w, rest = divmod(rest, 128)
        a, rest = divmod(rest, 8)
        q, b = divmod(rest, 2)
        return 1.0 if words(4 * g + q)[w] >> (2 * a + b) & 1 else -1.0
    element = 2 * ((unit // 8) % 2) + unit % 2
    drawn = words(4 * (unit // 16) + (unit % 8) // 2)
    first, second = drawn[:2] if element < 2 else drawn[2:]
    radius = math.sqrt(-2 * math.log(first * 2.0**-32 + 2.0**-33))
    angle = 2 * math.pi * second * 2.0**-32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@functools.lru_cache(maxsize=64)
def noise_block(seed, shape, kind, *, time=0, rollout=0, sample=0, **fields):
    """Unit-variance noise, (T, B, P, H) float64, element by element. Cached per block: do not write to it."""
    block = np.empty(shape)
    for t, b, p, u in np.ndindex(*shape):
        block[t, b, p, u] = unit_noise(seed, u, kind, time=time + t, rollout=rollout + p, sample=sample + b, **fields)
    return torch.from_numpy(block)


PHI = {"tanh": torch.tanh, "relu": torch.relu}


def clean_run(drive, weight_hh, h_0, nonlinearity="tanh"):
    """Pre-activations and states, (T, B, H), of a network driven by W_ih x + b, (T, B, H), step by step."""
    preacts, states = [], []
    state = h_0
    for step in drive:
        preacts.append(step + state @ weight_hh.T)
        state = PHI[nonlinearity](preacts[-1])
        states.append(state)
    return torch.stack(preacts), torch.stack(states)


def perturbed_run(drive, weight_hh, h_0, noise, nonlinearity="tanh"):
    """As `clean_run`, with noise (T, B, P, H) in the pre-activations: pre-activations and states, (T, B, P, H).

    `h_0` is (B, P, H): a rollout may begin from a perturbed state.
    """
    preacts, states = [], []
    state = h_0
    for step, xi in zip(drive, noise, strict=True):
        preacts.append(step.unsqueeze(1) + state @ weight_hh.T + xi)
        state = PHI[nonlinearity](preacts[-1])
        states.append(state)
    return torch.stack(preacts), torch.stack(states)


def discounted(delta_loss, discount):
    """c[t] = sum_{s >= t} discount^(s - t) delta_loss[s], by the double sum."""
    credit = torch.zeros_like(delta_loss)
    for t in range(len(delta_loss)):
        for s in range(t, len(delta_loss)):
            credit[t] += discount ** (s - t) * delta_loss[s]
    return credit


def one_step_adjoint(grad, preact, nonlinearity="tanh"):
    """dL/da_t with the gradient through time truncated: g_t phi'(a_t), (T, B, H)."""
    slope = 1 - torch.tanh(preact) ** 2 if nonlinearity == "tanh" else (preact > 0).to(preact.dtype)
    return grad * slope


def true_adjoint(grad, preact, weight_hh, nonlinearity="tanh"):
    """dL/da_t through time, (T, B, H), by the adjoint recursion."""
    slope = one_step_adjoint(torch.ones_like(preact), preact, nonlinearity)
    adjoint = torch.zeros_like(preact)
    following = torch.zeros_like(preact[0])
    for t in range(len(preact) - 1, -1, -1):
        adjoint[t] = following = slope[t] * (grad[t] + following @ weight_hh)
    return adjoint
