"""How well estimates of a gradient point along it, with bias separated from variance.

g is the true gradient, g_1 .. g_R are independent estimates with expectation m and scatter V = E |g_r - m|^2:

    cosine     mean_r  <g_r, g> / (|g_r| |g|)           of a single update: bias and variance together
    U          mean_{r != s}  <g_r, g_s>                expectation |m|^2
    limit      <mean_r g_r, g> / (sqrt(U) |g|)          cos(m, g): bias, which more rollouts do not lower
    agreement  U / mean_r |g_r|^2                       |m|^2 / (|m|^2 + V): variance, which more rollouts lower

The norm of the mean estimate overestimates |m|: E |mean_r g_r|^2 = |m|^2 + V / R, because of the products of each
estimate with itself. U leaves these out: different seeds are independent, so E <g_r, g_s> = <m, m>, and U extrapolates
to infinitely many repeats. To first order cosine = limit sqrt(agreement), and k times the rollouts divide V by k.
Source: the U-statistic of |m|^2 and its jackknife; derived here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """How well estimates of one gradient point along it; NaN where that is unknown."""

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
    """Cosine between estimates of different seeds: 1 is no variance. The only field that needs no true gradient."""

    def predicted(self, times: float) -> float:
        """Return the cosine expected with `times` as many rollouts, at the same limit."""
        share = min(max(self.agreement, 0.0), 1.0)
        return self.limit * math.sqrt(times * share / (1 + (times - 1) * share))


def alignment(estimates: Tensor, truth: Tensor | None) -> Alignment:
    """Compare estimates, (R, N), with the true gradient, (N,), or only with each other where that is None."""
    estimates = estimates.double()
    products = estimates @ estimates.t()
    # Estimates that are zero have no direction: tensors give NaN for 0 / 0.
    agreement = float(_between(products) / products.diagonal().mean())
    if truth is None:
        return Alignment(agreement=agreement)
    truth = truth.double()
    along, length = estimates @ truth, truth.norm()
    norms, count = products.diagonal().sqrt(), len(estimates)
    limit = float(_limit(products, along, length))
    without = torch.stack(
        [
            _limit(products[others][:, others], along[others], length)
            for others in (torch.arange(count) != index for index in range(count))
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
    # Where the scatter hides the expectation, U is negative and its root NaN.
    return along.mean() / (_between(products).sqrt() * length)
