"""Weight gradients: sums over steps and samples of the adjoint times the presynaptic activity, and of the adjoint.

dW = sum_{t,b} lam_t x_t^T,   db = sum_{t,b} lam_t
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def weight_gradients(
    adjoint: Tensor, presynaptic: Sequence[Tensor], sums: Sequence[Tensor] | None = None, *, precision: str = "fp32"
) -> list[Tensor]:
    """Return the gradients of weights that share an adjoint, and of their bias.

    Args:
        adjoint: in parts, each of which has gradients of its own, (parts, T, B, G).
        presynaptic: what each weight is multiplied by, (T, B, n) each; one or two.
        sums: gradients of earlier steps, as they are returned, to which these are added in place; None is zero.
        precision: of the rollouts; a backend's own form may round its operands to TF32 unless it is "fp32".

    Returns:
        (parts, G, n) for each weight, then (parts, G).
    """
    del precision
    rows = adjoint.flatten(1, 2).transpose(1, 2)
    columns = [activity.flatten(0, 1).expand(len(rows), -1, -1) for activity in presynaptic]
    bias = adjoint.sum((1, 2))
    if sums is None:
        return [*(rows @ values for values in columns), bias]
    for total, values in zip(sums, columns, strict=False):
        total.baddbmm_(rows, values)
    sums[-1].add_(bias)
    return list(sums)
