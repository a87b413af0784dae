"""Least-squares ANP on the backend in use; `kernels/least_squares.py` holds the equations."""

from __future__ import annotations

from torch import Tensor

from .dispatch import implementation, special_form
from .kernels import least_squares as kernel
from .kernels.noise import Counters
from .kernels.rollout import RolloutOptions
from .ranges import within


@within("least_squares")
def least_squares(
    delta_loss: Tensor,
    delta_a: Tensor,
    carry: Tensor,
    seed: Tensor,
    *,
    finite: Tensor,
    discount: float,
    ridge: float,
    baseline: bool,
    options: RolloutOptions,
    backend: str,
    counters: Counters,
) -> kernel.LeastSquares:
    """Estimate the adjoint of a block of steps from all rollouts of its samples; see `kernels/least_squares.py`."""
    return kernel.least_squares(
        delta_loss,
        delta_a,
        carry,
        seed,
        finite=finite,
        discount=discount,
        ridge=ridge,
        baseline=baseline,
        options=options,
        counters=counters,
        draw=implementation("noise", backend),
        recursion=special_form("deflate", backend),
    )
