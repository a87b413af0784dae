"""Loss differences inside a compiled step: those of a linear loss, which need nothing but the state."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile_numba import summing

_F = np.float32


@summing
def linear_difference(delta_h: Any, row: Any, grad: Any, step: Any, sample: Any, units: Any) -> Any:
    """Return g . delta_h of one rollout: a row of (B P, H), with the gradient of its step and sample, (T, B, H)."""
    total = _F(0)
    for unit in range(units):
        total += delta_h[row, unit] * grad[step, sample, unit]
    return total
