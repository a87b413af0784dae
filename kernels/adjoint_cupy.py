"""Discounted returns and sums over rollouts in plain CUDA C: one thread per element, the oracle of the fast kernels.

The contracts are `adjoint.returns`, `adjoint.adjoint` and `adjoint.rollout_adjoint`. Computed in the dtype of `credit`,
float32 or float64, rollout after rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .adjoint import by_activity, of_h, run_finite, weighted_activity
from .loss import Loss, loss_of_steps
from .noise import Counters
from .noise_cupy import KINDS, NOISE_SOURCE, counter_words, launch
from .rollout import RolloutOptions
from .rollout_cupy import rollout

ADJOINT_SOURCE = (
    NOISE_SOURCE
    + r"""
/* c_t = delta_loss_t + discount c_{t+1}, one thread per (b, p). */
extern "C" __global__ void returns(
    REAL *credit,           /* (time, batch, rollouts) */
    const REAL *delta_loss, /* (time, batch, rollouts) */
    const REAL *carry,      /* (batch, rollouts), the return after the last step */
    double discount, long long time, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    REAL following = carry[i];
    for (long long t = time - 1; t >= 0; --t) {
        REAL own = delta_loss[t * elements + i];
        /* At discount 0 a later step that is not finite must not come through as 0 * inf. */
        following = discount == 0 ? own : own + (REAL)discount * following;
        credit[t * elements + i] = following;
    }
}

/* c H / ||delta_a / sigma||^2, one thread per (t, b, p); 0 where the rollout does not count. */
extern "C" __global__ void activity_share(
    REAL *share,         /* (time, batch, rollouts) */
    const REAL *credit,  /* (time, batch, rollouts) */
    const REAL *delta_a, /* (time, batch, rollouts, hidden) */
    double sigma, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    REAL squared = 0;
    for (long long u = 0; u < hidden; ++u) {
        REAL scaled = delta_a[i * hidden + u] / (REAL)sigma;
        squared += scaled * scaled;
    }
    int usable = isfinite(squared) && squared > 0;
    share[i] = usable ? credit[i] * hidden / squared : (REAL)0;
}

/* sum_p share delta_a / sigma^2 over the rollouts of one parity, one thread per (parity, t, b, unit). */
extern "C" __global__ void sum_activity(
    REAL *sums,          /* (2, time, batch, hidden) */
    const REAL *share,   /* (time, batch, rollouts) */
    const REAL *delta_a, /* (time, batch, rollouts, hidden) */
    double sigma, long long first, long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long half = elements / 2, parity = i / half, step = i % half / hidden, u = i % hidden;
    REAL sum = 0;
    for (long long p = 0; p < rollouts; ++p) {
        REAL mine = share[step * rollouts + p];
        if ((first + p) % 2 == parity && mine != 0)
            sum += mine * (delta_a[(step * rollouts + p) * hidden + u] / (REAL)sigma) / (REAL)sigma;
    }
    sums[i] = sum;
}

/* sum_p credit xi / sigma over the rollouts of one parity, xi of variance 1, one thread per (parity, t, b, unit). */
extern "C" __global__ void sum_noise(
    REAL *sums,            /* (2, time, batch, hidden) */
    const REAL *credit,    /* (time, batch, rollouts) */
    const long long *seed, /* () */
    long long c0, long long c1, long long c2, long long c3, long long kind, double sigma,
    long long batch, long long rollouts, long long hidden, long long elements)
{
    long long i = this_thread();
    if (i >= elements)
        return;
    long long half = elements / 2, parity = i / half, step = i % half / hidden, u = i % hidden;
    long long t = step / batch, b = step % batch;
    REAL sum = 0;
    for (long long p = 0; p < rollouts; ++p)
        if ((c2 + p) % 2 == parity)
            sum += credit[step * rollouts + p] / (REAL)sigma *
                   unit_noise((int)kind, (wide_t)*seed, (word_t)c0, (word_t)(c1 + t), (word_t)(c2 + p),
                              (word_t)(c3 + b), u);
    sums[i] = sum;
}
"""
)


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None) -> Tensor:
    """Return the credit c_t = delta_loss_t + discount c_{t+1}, (T, B, P); the contract is `adjoint.returns`."""
    time, batch, rollouts = delta_loss.shape
    delta_loss = delta_loss.contiguous()
    carry = delta_loss.new_zeros((batch, rollouts)) if carry is None else carry.to(delta_loss.dtype).contiguous()
    credit = torch.empty_like(delta_loss)
    arguments = (credit, delta_loss, carry, float(discount), time)
    launch(ADJOINT_SOURCE, "returns", credit.dtype, batch * rollouts, arguments)
    return credit


def adjoint(
    credit: Tensor,
    delta_a: Tensor | None,
    seed: Tensor,
    *,
    weight_by: str,
    units: int,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
) -> Tensor:
    """Sum over a block of rollouts the estimates of dL/da that each makes; the contract is `adjoint.adjoint`."""
    time, batch, rollouts = credit.shape
    credit, sigma = credit.contiguous(), float(options.sigma)
    sums = credit.new_empty((2, time, batch, units))
    stored = weighted_activity(weight_by, delta_a)
    if stored is None:
        words, kind = counter_words(counters), KINDS[options.noise]
        sizes = (batch, rollouts, units)
        launch(
            ADJOINT_SOURCE, "sum_noise", credit.dtype, sums.numel(), (sums, credit, seed, *words, kind, sigma, *sizes)
        )
        return sums
    delta_a = stored.to(credit.dtype).contiguous()
    share = torch.empty_like(credit)
    launch(ADJOINT_SOURCE, "activity_share", credit.dtype, share.numel(), (share, credit, delta_a, sigma, units))
    arguments = (sums, share, delta_a, sigma, counters.rollout, rollouts, units)
    launch(ADJOINT_SOURCE, "sum_activity", credit.dtype, sums.numel(), arguments)
    return sums


def rollout_adjoint(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss,
    seed: Tensor,
    *,
    weight_by: str,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run rollouts and sum their adjoint at discount 0, step by step; the contract is `adjoint.rollout_adjoint`."""
    (time, batch, _), units = preact.shape, weight_hh.shape[1]
    sums = preact.new_empty((2, time, batch, units))
    delta_loss = preact.new_empty((time, batch, options.rollouts))
    storing = options._replace(store_delta_a=by_activity(weight_by))
    delta_h = delta_h0
    if finite is None:
        finite = run_finite(
            rollout, preact, hidden, weight_hh, loss, seed, options=options, counters=counters, delta_h0=delta_h0
        )
    for step in range(time):
        now, at_step = slice(step, step + 1), counters._replace(time=counters.time + step)
        result = rollout(
            preact[now],
            hidden[now],
            weight_hh,
            loss_of_steps(loss, now),
            seed,
            options=storing,
            counters=at_step,
            delta_h0=delta_h,
        )
        assert result.delta_loss is not None  # noqa: S101  (for the type checker; the loss is ours)
        delta_h, delta_loss[now] = result.delta_h, result.delta_loss
        credit = torch.where(finite, result.delta_loss, 0)
        activity = of_h(result.delta_a, units)
        sums[:, now] = adjoint(
            credit, activity, seed, weight_by=weight_by, units=units, options=options, counters=at_step
        )
    assert delta_h is not None  # noqa: S101  (for the type checker; time is at least 1)
    return sums, delta_loss, delta_h
