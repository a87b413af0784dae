"""Loss differences in plain CUDA C: one thread per rollout, the oracle of the fast kernels.

The contract is `loss.loss_differences`. The kernel of a loss is called after its kind, and takes the loss's fields that
have steps in their order.
"""

from __future__ import annotations

from torch import Tensor

from .loss import Loss, step_fields
from .noise_cupy import THREAD_SOURCE, launch

LOSS_SOURCE = (
    THREAD_SOURCE
    + r"""
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


def output_deviation(readout: Tensor | None, delta_h: Tensor) -> Tensor:
    """Return delta_o = W_o delta_h, (B, P, O), from delta_h, (B, P, H)."""
    if readout is None:
        return delta_h
    outputs, units = readout.shape
    delta_o = delta_h.new_empty((*delta_h.shape[:2], outputs))
    _launch("readout_deviation", delta_o, delta_h, readout.to(delta_h.dtype).contiguous(), outputs, units)
    return delta_o


def loss_difference(loss: Loss, step: int, delta_h: Tensor) -> Tensor:
    """Return delta_loss of one step, (B, P), from delta_h, (B, P, H).

    Raises:
        TypeError: there is no kernel for the loss.
    """
    name = f"{loss.kind}_difference"
    if f"void {name}(" not in LOSS_SOURCE:
        raise TypeError(f"backend 'cupy' cannot measure {type(loss).__name__}")
    deviation = output_deviation(loss.readout, delta_h)
    fields = [field[step] for field in step_fields(loss).values()]
    operands = [field.to(delta_h.dtype) if field.is_floating_point() else field for field in fields]
    delta_loss = delta_h.new_empty(delta_h.shape[:2])
    sizes = (delta_h.shape[1], deviation.shape[-1])
    _launch(name, delta_loss, deviation, *(operand.contiguous() for operand in operands), *sizes)
    return delta_loss


def _launch(name: str, result: Tensor, *arguments: Tensor | float) -> None:
    """Run one thread per element of `result`."""
    launch(LOSS_SOURCE, name, result.dtype, result.numel(), (result, *arguments))
