"""Perturbed rollouts in plain CUDA C: one thread per element, the oracle of the fast kernels.

The contract is `rollout.rollout`; its module holds the equations. Everything is computed in the dtype of `preact`,
float32 or float64, and `RolloutOptions.precision` is ignored: float64 tensors give the exact answer that rounded
operands are measured against. Sums run in the order of their index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Counters
from .noise_cupy import THREAD_SOURCE, launch, noise as make_noise
from .rollout import CrossEntropyLoss, LinearLoss, Loss, OutputsOnly, Rollout, RolloutOptions, SquaredLoss

ROLLOUT_SOURCE = (
    THREAD_SOURCE
    + r"""
/* delta_a += W_hh delta_h, one thread per (b, p, unit). */
extern "C" __global__ void add_recurrent(
    REAL *delta_a,         /* (batch, rollouts, hidden), holds the noise */
    const REAL *delta_h,   /* (batch, rollouts, hidden), of the step before */
    const REAL *weight_hh, /* (hidden, hidden) */
    long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long unit = i % hidden, row = i / hidden;
    REAL sum = 0;
    for (long long k = 0; k < hidden; ++k)
        sum += weight_hh[unit * hidden + k] * delta_h[row * hidden + k];
    delta_a[i] += sum;
}

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

/* delta_o = W_o delta_h, one thread per (b, p, output). */
extern "C" __global__ void readout_deviation(
    REAL *delta_o,       /* (batch, rollouts, outputs) */
    const REAL *delta_h, /* (batch, rollouts, hidden) */
    const REAL *readout, /* (outputs, hidden) */
    long long outputs, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long output = i % outputs, row = i / outputs;
    REAL sum = 0;
    for (long long k = 0; k < hidden; ++k)
        sum += readout[output * hidden + k] * delta_h[row * hidden + k];
    delta_o[i] = sum;
}

/* g . delta_h, one thread per (b, p). */
extern "C" __global__ void linear_difference(
    REAL *delta_loss,    /* (batch, rollouts) */
    const REAL *delta_h, /* (batch, rollouts, hidden) */
    const REAL *grad,    /* (batch, hidden) */
    long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    REAL sum = 0;
    for (long long k = 0; k < hidden; ++k)
        sum += grad[i / rollouts * hidden + k] * delta_h[i * hidden + k];
    delta_loss[i] = sum;
}

/* weight * mean_o delta_o (2 e + delta_o), one thread per (b, p). */
extern "C" __global__ void squared_difference(
    REAL *delta_loss,    /* (batch, rollouts) */
    const REAL *delta_o, /* (batch, rollouts, outputs) */
    const REAL *error,   /* (batch, outputs) */
    const REAL *weight,  /* (batch) */
    long long rollouts, long long outputs, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long b = i / rollouts;
    REAL sum = 0;
    for (long long o = 0; o < outputs; ++o)
        sum += delta_o[i * outputs + o] * (2 * error[b * outputs + o] + delta_o[i * outputs + o]);
    delta_loss[i] = weight[b] == 0 ? (REAL)0 : sum / outputs * weight[b];
}

/* weight * log sum_o p_o exp(delta_o - delta_o[target]), one thread per (b, p). */
extern "C" __global__ void cross_entropy_difference(
    REAL *delta_loss,        /* (batch, rollouts) */
    const REAL *delta_o,     /* (batch, rollouts, outputs) */
    const REAL *probs,       /* (batch, outputs) */
    const long long *target, /* (batch) */
    const REAL *weight,      /* (batch) */
    long long rollouts, long long outputs, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long b = i / rollouts;
    const REAL *d = delta_o + i * outputs;
    REAL origin = d[target[b]], top = 0, largest = 0, near = 0, far = 0;
    for (long long o = 0; o < outputs; ++o) {
        REAL difference = d[o] - origin;
        if (difference > top)
            top = difference;
        if (fabs(difference) > largest)
            largest = fabs(difference);
        near += probs[b * outputs + o] * expm1(difference);
    }
    for (long long o = 0; o < outputs; ++o)
        far += probs[b * outputs + o] * exp(d[o] - origin - top);
    /* For small differences log1p keeps what the plain form would round away; for large ones expm1 would overflow. */
    REAL difference = largest > (REAL)0.5 ? log(far) + top : log1p(near);
    delta_loss[i] = weight[b] == 0 ? (REAL)0 : weight[b] * difference;
}
"""
)


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
    """Run a block of perturbed rollouts through time; the contract is `rollout.rollout`.

    `hidden` is not read: tanh(a) is computed again.
    """
    time, batch, units = preact.shape
    working, state = preact.dtype, (batch, options.rollouts, units)
    preact, weight_hh = preact.contiguous(), weight_hh.to(working).contiguous()
    delta_h = None if delta_h0 is None else delta_h0.to(working).contiguous()
    kept = preact.new_empty((time, *state)) if options.store_delta_a else None
    measured = None if isinstance(loss, OutputsOnly) else loss
    delta_loss = None if measured is None else preact.new_empty((time, *state[:2]))
    delta_o = None
    if isinstance(loss, OutputsOnly):
        outputs = units if loss.readout is None else loss.readout.shape[0]
        delta_o = preact.new_empty((time, *state[:2], outputs))
    for step in range(time):
        here = counters._replace(time=counters.time + step)
        (delta_a,) = make_noise(
            seed, (1, *state), sigma=options.sigma, kind=options.noise, counters=here, dtype=working
        )
        if delta_h is not None:
            _launch("add_recurrent", delta_a, delta_h, weight_hh, units)
        delta_h = torch.empty_like(delta_a)
        _launch(f"{options.nonlinearity}_deviation", delta_h, delta_a, preact[step], options.rollouts, units)
        if kept is not None:
            kept[step] = delta_a
        if isinstance(loss, OutputsOnly) and delta_o is not None:
            delta_o[step] = _output_deviation(loss.readout, delta_h)
        if measured is not None and delta_loss is not None:
            delta_loss[step] = _loss_difference(measured, step, delta_h)
    return Rollout(delta_loss, kept, preact.new_zeros(state) if delta_h is None else delta_h, delta_o)


def _launch(name: str, result: Tensor, *arguments: Tensor | float) -> None:
    """Run one thread per element of `result`."""
    launch(ROLLOUT_SOURCE, name, result.dtype, result.numel(), (result, *arguments))


def _output_deviation(readout: Tensor | None, delta_h: Tensor) -> Tensor:
    """Return delta_o = W_o delta_h, (B, P, O)."""
    if readout is None:
        return delta_h
    outputs, units = readout.shape
    delta_o = delta_h.new_empty((*delta_h.shape[:2], outputs))
    _launch("readout_deviation", delta_o, delta_h, readout.to(delta_h.dtype).contiguous(), outputs, units)
    return delta_o


def _loss_difference(loss: LinearLoss | SquaredLoss | CrossEntropyLoss, step: int, delta_h: Tensor) -> Tensor:
    """Return delta_loss of one step, (B, P), from delta_h, (B, P, H)."""
    rollouts, units = delta_h.shape[1:]
    working = delta_h.dtype
    delta_loss = delta_h.new_empty(delta_h.shape[:2])
    if isinstance(loss, LinearLoss):
        _launch("linear_difference", delta_loss, delta_h, loss.grad[step].to(working).contiguous(), rollouts, units)
        return delta_loss
    delta_o = _output_deviation(loss.readout, delta_h)
    weight = loss.weight[step].to(working).contiguous()
    if isinstance(loss, SquaredLoss):
        error = loss.error[step].to(working).contiguous()
        _launch("squared_difference", delta_loss, delta_o, error, weight, rollouts, delta_o.shape[-1])
    else:
        probs, target = loss.probs[step].to(working).contiguous(), loss.target[step].contiguous()
        sizes = (rollouts, delta_o.shape[-1])
        _launch("cross_entropy_difference", delta_loss, delta_o, probs, target, weight, *sizes)
    return delta_loss
