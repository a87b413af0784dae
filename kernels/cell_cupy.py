"""Cells in plain CUDA C: one thread per unit of a rollout, the oracle of the fast kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise_cupy import THREAD_SOURCE, launch

CELL_SOURCE = (
    THREAD_SOURCE
    + r"""
/* delta_h = tanh(a + delta_a) - tanh(a), one thread per (b, p, unit). */
extern "C" __global__ void tanh_deviation(
    REAL *delta_h,       /* (batch, rollouts, hidden) */
    const REAL *delta_a, /* (batch, rollouts, hidden) */
    const REAL *preact,  /* (batch, hidden) */
    long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    REAL a = preact[i / (rollouts * hidden) * hidden + i % hidden];
    REAL d = delta_a[i];
    if (fabs(d) > (REAL)0.5) {
        delta_h[i] = tanh(a + d) - tanh(a);
    } else {
        /* tanh(a + d) - tanh(a) = th (1 - h^2) / (1 + h th), and 1 - h^2 = 1 / cosh(a)^2 has no cancellation. */
        REAL sech = 1 / cosh(a), th = tanh(d);
        delta_h[i] = th * sech * sech / (1 + tanh(a) * th);
    }
}

/* delta_h = relu(a + delta_a) - relu(a), one thread per (b, p, unit). A comparison with NaN is false, and NaN stays. */
extern "C" __global__ void relu_deviation(
    REAL *delta_h,       /* (batch, rollouts, hidden) */
    const REAL *delta_a, /* (batch, rollouts, hidden) */
    const REAL *preact,  /* (batch, hidden) */
    long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    REAL a = preact[i / (rollouts * hidden) * hidden + i % hidden];
    REAL d = delta_a[i];
    if (a > 0)
        delta_h[i] = d < -a ? -a : d;
    else
        delta_h[i] = a + d < 0 ? (REAL)0 : a + d;
}
"""
)


def deviation(name: str, preact: Tensor, delta_a: Tensor) -> Tensor:
    """Return delta_h of one step, (B, P, H), from its clean pre-activations, (B, H), and delta_a, (B, P, H).

    `name`: the cell's kernel.
    """
    delta_h = torch.empty_like(delta_a)
    arguments = (delta_h, delta_a, preact, *delta_a.shape[1:])
    launch(CELL_SOURCE, name, delta_a.dtype, delta_h.numel(), arguments)
    return delta_h
