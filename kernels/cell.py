"""Cells: the change of a state that a change of its pre-activations makes, computed without cancellation.

    delta_h = phi(a + delta_a) - phi(a)                 exact for any size of delta_a
      tanh:  th (1 - h^2) / (1 + h th), th = tanh(delta_a);  the plain difference where |delta_a| > 0.5
      relu:  max(delta_a + min(a, 0), -max(a, 0))

`CellForms` says which form of a cell each backend runs. Derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CLEAN_BYTES = 1 << 19
"""Clean activity that is worked on at once."""

SLOPE_FLOOR = 1e-30
"""Slope of tanh below which a unit counts as flat: its deviation is then below the smallest normal float32."""

PLAIN_DIFFERENCE_ABOVE = 0.5
"""|delta_a| from which tanh(a + delta_a) - tanh(a) loses less than two bits, and the quotient form nears 0 / 0."""


Rows = tuple[Tensor, ...]
"""What a step needs of the clean run besides its pre-activations: tensors, (T, B, H) or some multiple of H each."""


class Deviation(Protocol):
    """A cell around a clean run, made from its pre-activations, (T, B, H), and the cell's `Rows`.

    Where noise enters the state (`CellForms.noise_in_state`), delta_a is the recurrent product alone, (B, P, G H),
    which a step may overwrite. The result, in scratch[0], is the deviation of the state before its noise, (B, P, S).
    """

    def step(self, step: int, delta_a: Tensor, before: Tensor | None, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return delta_h of a step, (B, P, H).

        Args:
            step: number of the step in the clean run.
            delta_a: deviation of its pre-activations, (B, P, H).
            before: deviation of the state before the step, (B, P, H); None is zero. It may lie in `scratch[0]`: a cell
                that needs it reads it before it writes the result.
            scratch: two tensors, (B, P, H), to be overwritten; the result is the first.
        """


class CellForms(NamedTuple):
    """A cell as each backend runs it; None where a backend has no form of it."""

    name: str
    rows: Callable[[Tensor, Tensor], Rows]
    """From clean pre-activations and states, (T, B, H), to what torch's and Numba's steps need of them."""
    torch: Callable[[Tensor, Rows], Deviation]
    """Class of the deviation."""
    numba: int | None
    """Branch of `rollout_numba`: a function as an argument would keep Numba from storing kernels on the disk."""
    triton: str | None
    """Name of the device function in `cell_triton`."""
    cupy: str | None
    """Name of the kernel in `cell_cupy`."""
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    """From clean pre-activations and states, (T, B, H), to phi'(a), or to 1 where noise enters the state; None where
    learned feedback has no form of the cell."""
    noise_in_state: bool = False
    """Whether noise is added to h_t, behind the cell, and not to the pre-activations; the rollouts' delta_a is then the
    deviation of the state, own noise included."""
    gates: int = 1
    """G: W_hh is (G H, H)."""
    states: int = 1
    """S / H: how many numbers a unit hands on to the next step. The first H of a state are h."""
    clean: int = 1
    """Clean values of a unit and step that the rollouts take instead of the pre-activation alone."""
    recurrent_apart: bool = False
    """Whether the recurrent product reaches a pre-activation other than by being added to the input's."""

    def backends(self) -> tuple[str, ...]:
        """Return the backends that have a form of the cell."""
        forms = {"torch": self.torch, "numba": self.numba, "triton": self.triton, "cupy": self.cupy}
        return tuple(backend for backend, form in forms.items() if form is not None)

    def around(self, preact: Tensor, hidden: Tensor) -> Deviation:
        """Return torch's form of the cell around a clean run, (T, B, H)."""
        return self.torch(preact, self.rows(preact, hidden))

    def slope_of(self, preact: Tensor, hidden: Tensor) -> Tensor:
        """Return phi'(a), (T, B, H).

        Raises:
            ValueError: the cell has no slope.
        """
        if self.slope is None:
            raise ValueError(f"cell {self.name!r} has no slope phi'(a), which a feedback matrix needs; use 'anp-ls'")
        return self.slope(preact, hidden)

    def on(self, backend: str) -> Any:
        """Return the form of the cell on a backend.

        Raises:
            ValueError: the backend has none.
        """
        if backend not in self.backends():
            raise ValueError(
                f"cell {self.name!r} has no form on backend {backend!r}, only on {', '.join(self.backends())}"
            )
        return getattr(self, backend)


def quotient_rows(preact: Tensor, hidden: Tensor, floor: float = SLOPE_FLOOR) -> tuple[Tensor, Tensor]:
    """Return 1 / s and h / s, (T, B, H), s = 1 - h^2: th (1 - h^2) / (1 + h th) = th / (1 / s + th h / s).

    This form takes one pass less over the rollouts. The slope is computed from a: in float32 the h of a saturated unit
    holds nothing of it but rounding. `floor`: the least slope, which keeps its inverse finite.
    """
    inverse, ratio = torch.empty_like(preact), torch.empty_like(preact)
    # On a CPU a few steps at a time, so that the passes find them in the cache.
    step_bytes = max(1, preact[:1].numel() * preact.itemsize)
    length = max(1, len(preact) if preact.is_cuda else CLEAN_BYTES // step_bytes)
    for start in range(0, len(preact), length):
        steps = slice(start, start + length)
        tail = torch.abs(preact[steps], out=inverse[steps]).mul_(-2).exp_()
        # 1 / s = (1 + tail)^2 / (4 tail)
        torch.div((1 + tail).square_(), tail, out=tail).mul_(0.25).clamp_(max=1 / floor)
        torch.mul(hidden[steps], tail, out=ratio[steps])
    return inverse, ratio


class TanhDeviation:
    """tanh(a + delta_a) - tanh(a) around clean pre-activations, (T, B, H)."""

    def __init__(self, preact: Tensor, rows: Rows) -> None:
        self.preact = preact
        self.rows = list(zip(*(tensor.unsqueeze(2).unbind(0) for tensor in rows), strict=True))

    def step(self, step: int, delta_a: Tensor, before: Tensor | None, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return delta_h of a step, (B, P, H), in the first scratch tensor; see `Deviation`."""
        (result, denominator), (inverse, ratio) = scratch, self.rows[step]
        torch.tanh(delta_a, out=result)
        torch.addcmul(inverse, ratio, result, out=denominator)
        result.div_(denominator)
        if delta_a.is_cuda or not _all_below(delta_a, PLAIN_DIFFERENCE_ABOVE):
            preact = self.preact[step].unsqueeze(1)
            plain = torch.tanh(preact + delta_a).sub_(torch.tanh(preact))
            result.copy_(torch.where(delta_a.abs() > PLAIN_DIFFERENCE_ABOVE, plain, result))
        return result


def _all_below(values: Tensor, bound: float) -> bool:
    """Say whether every |value| is at most `bound`; no where one is NaN, which hides how large the others are."""
    # The norm of every row takes one pass, and usually decides.
    if not values.numel() or bool(torch.linalg.vector_norm(values, dim=-1).amax() <= bound):
        return True
    return bool(values.amax() <= bound) and bool(values.amin() >= -bound)


def limit_rows(preact: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return min(a, 0) and -max(a, 0), (T, B, H), between which relu's deviation lies."""
    return preact.clamp(max=0), -hidden


class ReluDeviation:
    """relu(a + delta_a) - relu(a) around clean pre-activations, (T, B, H)."""

    def __init__(self, preact: Tensor, rows: Rows) -> None:
        del preact
        self.below, self.above = rows

    def step(self, step: int, delta_a: Tensor, before: Tensor | None, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return delta_h of a step, (B, P, H), in the first scratch tensor; see `Deviation`."""
        result, _ = scratch
        torch.add(delta_a, self.below[step].unsqueeze(1), out=result)
        return torch.maximum(result, self.above[step].unsqueeze(1), out=result)


def tanh_slope(preact: Tensor, hidden: Tensor) -> Tensor:
    """Return 1 - h^2, (T, B, H)."""
    del preact
    return 1 - hidden.square()


def relu_slope(preact: Tensor, hidden: Tensor) -> Tensor:
    """Return 1 where a > 0, else 0, (T, B, H)."""
    del hidden
    return (preact > 0).to(preact.dtype)


TANH = CellForms("tanh", quotient_rows, TanhDeviation, 0, "tanh_deviation", "tanh_deviation", tanh_slope)
RELU = CellForms("relu", limit_rows, ReluDeviation, 1, "relu_deviation", "relu_deviation", relu_slope)
