"""How well estimates of a gradient point along it, bias told from variance.

g is the true gradient, g_1 .. g_R are independent estimates with expectation m and scatter V = E |g_r - m|^2:

    cosine     mean_r  <g_r, g> / (|g_r| |g|)           what one update gets: bias and variance together
    U          mean_{r != s}  <g_r, g_s>                expectation |m|^2
    limit      <mean_r g_r, g> / (sqrt(U) |g|)          cos(m, g): what no number of rollouts improves, the bias
    agreement  U / mean_r |g_r|^2                       |m|^2 / (|m|^2 + V): what rollouts improve, the variance

The norm of the mean of the estimates would not do for |m|: E |mean_r g_r|^2 = |m|^2 + V / R, since every estimate meets
itself there. Estimates of different seeds are independent, so E <g_r, g_s> = <m, m>: products of different seeds alone
extrapolate to infinitely many repeats. To first order cosine = limit sqrt(agreement), and k times the rollouts divide V
by k. Source: the U-statistic of |m|^2 and its jackknife; derived here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """How estimates of one gradient lie to it; NaN where it cannot be told."""

    cosine: float = math.nan
    """Mean cosine of an estimate to the true gradient."""
    ratio: float = math.nan
    """Mean norm of an estimate over that of the true gradient."""
    limit: float = math.nan
    """Cosine of the expected estimate to the true gradient, in [-1, 1]: 1 is no bias. NaN with one estimate, and where
    the scatter hides the expectation (U <= 0)."""
    limit_error: float = math.nan
    """Standard error of `limit`, by the jackknife over estimates."""
    agreement: float = math.nan
    """Cosine between estimates of different seeds: 1 is no variance. The only one that needs no true gradient."""

    def predicted(self, times: float) -> float:
        """Return the cosine expected of `times` the rollouts, at the same limit."""
        share = min(max(self.agreement, 0.0), 1.0)
        return self.limit * math.sqrt(times * share / (1 + (times - 1) * share))


def alignment(estimates: Tensor, truth: Tensor | None) -> Alignment:
    """Return how estimates, (R, N), lie to the true gradient, (N,), or only to each other where that is None."""
    estimates = estimates.double()
    products = estimates @ estimates.t()
    # Tensors divide by zero without raising: estimates that vanish have no direction, NaN.
    agreement = float(_between(products) / products.diagonal().mean())
    if truth is None:
        return Alignment(agreement=agreement)
    truth = truth.double()
    along, length = estimates @ truth, truth.norm()
    norms, count = products.diagonal().sqrt(), len(estimates)
    limit = float(_limit(products, along, length))
    without = torch.stack(
        [
            _limit(products[kept][:, kept], along[kept], length)
            for kept in (torch.arange(count) != left for left in range(count))
        ]
    )
    return Alignment(
        cosine=float((along / (norms * length)).mean()),
        ratio=float(norms.mean() / length),
        limit=min(max(limit, -1.0), 1.0) if math.isfinite(limit) else math.nan,
        limit_error=math.sqrt((count - 1) / count * float((without - without.mean()).square().sum())),
        agreement=agreement,
    )


def _between(products: Tensor) -> Tensor:
    """Return the mean product of different estimates from all products, (R, R); NaN with fewer than two."""
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1) or math.nan)


def _limit(products: Tensor, along: Tensor, length: Tensor) -> Tensor:
    # The root of a negative U is NaN: the scatter hides the expectation.
    return along.mean() / (_between(products).sqrt() * length)
