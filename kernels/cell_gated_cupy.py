"""Gated cells in plain CUDA C: one thread per unit of a rollout, the oracle of the fast kernels.

    sigma(a + d) - sigma(a) = p q m / (p + q e) where d > 0, else -p q m / (q + p e)
    tanh(a + d) - tanh(a) = 2 (sigma(2 a + 2 d) - sigma(2 a))

with p = sigma(a), q = sigma(-a), e = exp(-|d|), m = 1 - e: every term is positive, so that nothing cancels. The
cells' equations: `cell_gated.py`. Derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise_cupy import THREAD_SOURCE, launch

CELL_GATED_SOURCE = (
    THREAD_SOURCE
    + r"""
__device__ REAL squashed(REAL a)
{
    return 1 / (1 + exp(-a));
}

/* sigma(a + d) - sigma(a). */
__device__ REAL gate_difference(REAL a, REAL d)
{
    REAL p = squashed(d > 0 ? a : -a), q = squashed(d > 0 ? -a : a);
    REAL e = exp(-fabs(d)), m = -expm1(-fabs(d));
    REAL below = p + q * e;
    /* Both terms underflow only where the gate was shut and nothing is left of that. */
    REAL size = below == 0 ? squashed(d > 0 ? a + d : -a - d) : p * q * m / below;
    return d > 0 ? size : -size;
}

/* tanh(a + d) - tanh(a). */
__device__ REAL tanh_difference(REAL a, REAL d)
{
    return 2 * gate_difference(2 * a, 2 * d);
}

/* delta_h of a GRU without its noise, one thread per (b, p, unit). */
extern "C" __global__ void gru_deviation(
    REAL *after,        /* (batch, rollouts, hidden) */
    const REAL *before, /* (batch, rollouts, hidden), of the step before */
    const REAL *moved,  /* (batch, rollouts, 3 hidden): W_hh delta_h of the step before */
    const REAL *clean,  /* (batch, 5 hidden): a_r, a_z, a_n, q, h' */
    const REAL *states, /* (batch, hidden), not read */
    long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    (void)states;
    long long unit = i % hidden, row = i / hidden;
    const REAL *a = clean + row / rollouts * 5 * hidden + unit, *d = moved + row * 3 * hidden + unit;
    REAL a_n = a[2 * hidden], q = a[3 * hidden], held = a[4 * hidden], delta_held = before[i], n = tanh(a_n);
    REAL r = squashed(a[0]), z = squashed(a[hidden]);
    REAL delta_r = gate_difference(a[0], d[0]), delta_z = gate_difference(a[hidden], d[hidden]);
    REAL delta_n = tanh_difference(a_n, r * d[2 * hidden] + delta_r * (q + d[2 * hidden]));
    REAL apart = delta_held - delta_n;
    after[i] = delta_n + z * apart + delta_z * (held - n + apart);
}

/* The deviations of h, without its noise, and c of an LSTM, one thread per (b, p, unit). */
extern "C" __global__ void lstm_deviation(
    REAL *after,        /* (batch, rollouts, 2 hidden) */
    const REAL *before, /* (batch, rollouts, 2 hidden), of the step before */
    const REAL *moved,  /* (batch, rollouts, 4 hidden): W_hh delta_h of the step before */
    const REAL *clean,  /* (batch, 5 hidden): a_i, a_f, a_g, a_o, c' */
    const REAL *states, /* (batch, 2 hidden): h, c */
    long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long unit = i % hidden, row = i / hidden, sample = row / rollouts;
    const REAL *a = clean + sample * 5 * hidden + unit, *d = moved + row * 4 * hidden + unit;
    long long in_state = row * 2 * hidden + unit;
    REAL c = states[(sample * 2 + 1) * hidden + unit], held = a[4 * hidden], delta_held = before[in_state + hidden];
    REAL delta_i = gate_difference(a[0], d[0]), delta_f = gate_difference(a[hidden], d[hidden]);
    REAL delta_g = tanh_difference(a[2 * hidden], d[2 * hidden]);
    REAL delta_o = gate_difference(a[3 * hidden], d[3 * hidden]);
    REAL delta_c = squashed(a[hidden]) * delta_held + delta_f * (held + delta_held);
    delta_c += squashed(a[0]) * delta_g + delta_i * (tanh(a[2 * hidden]) + delta_g);
    REAL delta_read = tanh_difference(c, delta_c);
    after[in_state] = squashed(a[3 * hidden]) * delta_read + delta_o * (tanh(c) + delta_read);
    after[in_state + hidden] = delta_c;
}
"""
)


def deviation(name: str, clean: Tensor, states: Tensor, moved: Tensor, before: Tensor) -> Tensor:
    """Return the deviation of a state without its noise, (B, P, S).

    Args:
        name: the cell's kernel.
        clean: clean values of the step, (B, 5 H).
        states: clean states after it, (B, S).
        moved: recurrent product of the state before it, (B, P, G H).
        before: deviation of the state before it, (B, P, S).
    """
    after = torch.empty_like(before)
    batch, rollouts, _ = before.shape
    units = clean.shape[-1] // 5
    arguments = (after, before, moved, clean, states, rollouts, units)
    launch(CELL_GATED_SOURCE, name, after.dtype, batch * rollouts * units, arguments)
    return after
