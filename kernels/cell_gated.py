"""Gated cells: the change of a state that a recurrent product makes, without cancellation and for any size of it.

    GRU     dr, dz = D sigma(a, du)    da_n = r du_n + dr (q + du_n)    dn = D tanh(a_n, da_n)
            delta_h = dn + z (delta_h' - dn) + dz ((h' - n) + (delta_h' - dn))
    LSTM    di, df, do = D sigma(a, du)    dg = D tanh(a_g, du_g)
            delta_c = f delta_c' + df (c' + delta_c') + i dg + di (g + dg)    dt = D tanh(c, delta_c)
            delta_h = o dt + do (tanh c + dt)

with du = W_hh delta_h', q = W_hn h' + b_hn, a dash for the step before, and D phi(a, d) = phi(a + d) - phi(a). The
gates are in PyTorch's order. sigma(a) = (1 + tanh(a / 2)) / 2, so that one quotient serves both. Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cell import PLAIN_DIFFERENCE_ABOVE, CellForms, Rows, _all_below, quotient_rows

GRU_CLEAN = 5
"""Clean values of a GRU's unit and step: a_r, a_z, a_n, q, h'."""

LSTM_CLEAN = 5
"""Clean values of an LSTM's unit and step: a_i, a_f, a_g, a_o, c'."""


def exact_difference(a: Tensor, d: Tensor) -> Tensor:
    """Return tanh(a + d) - tanh(a) for any a and d.

    It is 2 s (1 - exp(-2 |d|)) sigma(-2 s a) sigma(2 s (a + d)), s the sign of d: every factor is positive, so that
    nothing cancels, and where one underflows so does the result.
    """
    sign = torch.where(d > 0, 2, -2).to(d.dtype)
    return -sign * torch.expm1(-2 * d.abs()) * torch.sigmoid(-sign * a) * torch.sigmoid(sign * (a + d))


class Differences:
    """tanh(a + d) - tanh(a) around clean a, (T, B, N), times a factor of each column."""

    def __init__(self, preact: Tensor, factor: Tensor | None = None) -> None:
        self.preact = preact.unsqueeze(2)
        self.factor = factor
        inverse, ratio = quotient_rows(preact, preact.tanh())
        if factor is not None:
            inverse, ratio = inverse / factor, ratio / factor
        self.inverse, self.ratio = inverse.unsqueeze(2), ratio.unsqueeze(2)

    def of(self, step: int, d: Tensor) -> Tensor:
        """Return the differences of a step, (B, P, N)."""
        result = torch.tanh(d)
        result.div_(torch.addcmul(self.inverse[step], self.ratio[step], result))
        if d.is_cuda or not _all_below(d, PLAIN_DIFFERENCE_ABOVE):
            exact = exact_difference(self.preact[step], d)
            exact = exact if self.factor is None else exact * self.factor
            result = torch.where(d.abs() > PLAIN_DIFFERENCE_ABOVE, exact, result)
        return result


def _rows(*values: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the values of each step, (B, 1, H)."""
    return list(zip(*(value.unsqueeze(2).unbind(0) for value in values), strict=True))


def no_rows(preact: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clean values and the states as they are."""
    return preact, hidden


class Recurrence(NamedTuple):
    """What a gated cell makes of lam = dL/dh_t within a step: the adjoint R_t of its product W_hh h_{t-1}.

    In a GRU R = (k_r, k_z, k_n) lam, and discount z lam reaches h_{t-1} past the product. In an LSTM
    R = (k_i kappa, k_f kappa, k_g kappa, k_o lam), kappa = dL/dc_t of `least_squares.Path`.
    """

    coefficients: Tensor
    """k of each gate, (T, B, G, H)."""
    direct: Tensor | None = None
    """discount z, (T, B, H); None where nothing of h_t reaches h_{t-1} past the product."""

    def adjoint(self, step: int, of_h: Tensor, of_c: Tensor | None = None) -> Tensor:
        """Return R of a step, (..., B, G H), from dL/dh, (..., B, H), and, in an LSTM, dL/dc."""
        rows = self.coefficients[step]
        if of_c is None:
            return (rows * of_h.unsqueeze(-2)).flatten(-2)
        of_gates = of_c.unsqueeze(-2).expand(*of_c.shape[:-1], rows.shape[-2] - 1, -1)
        return (rows * torch.cat((of_gates, of_h.unsqueeze(-2)), -2)).flatten(-2)

    def steps(self, steps: slice) -> Recurrence:
        """Return the recurrence of some steps."""
        return Recurrence(self.coefficients[steps], None if self.direct is None else self.direct[steps])


def unit_slope(preact: Tensor, hidden: Tensor) -> Tensor:
    """Return 1, (T, B, H): noise enters the state itself."""
    return hidden.new_ones(()).expand(*hidden.shape[:2], preact.shape[-1] // GRU_CLEAN)


class GruDeviation:
    """A GRU around clean values, (T, B, 5 H), see `GRU_CLEAN`."""

    def __init__(self, preact: Tensor, rows: Rows) -> None:
        del rows
        a_r, a_z, a_n, q, before = preact.chunk(GRU_CLEAN, -1)
        self.units = a_n.shape[-1]
        self.gates = Differences(preact[..., : 2 * self.units] / 2, preact.new_full((), 0.5))
        self.candidate = Differences(a_n)
        self.rows = _rows(torch.sigmoid(a_r), torch.sigmoid(a_z), q, before - torch.tanh(a_n))

    def step(
        self,
        step: int,
        delta_a: Tensor,
        before: Tensor | None,
        scratch: tuple[Tensor, Tensor],
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Return delta_h, (B, P, H), in the first scratch tensor; see `Deviation`.

        `inputs`: what is added to the inputs' side of the pre-activations, (B, P, 3 H).
        """
        reset, update, q, away = self.rows[step]
        delta_gates, delta_q = delta_a[..., : 2 * self.units], delta_a[..., 2 * self.units :]
        if inputs is not None:
            delta_gates = delta_gates + inputs[..., : 2 * self.units]
        delta_reset, delta_update = self.gates.of(step, delta_gates.mul_(0.5)).chunk(2, -1)
        delta_n = (q + delta_q).mul_(delta_reset).addcmul_(reset, delta_q)
        if inputs is not None:
            delta_n += inputs[..., 2 * self.units :]
        delta_n = self.candidate.of(step, delta_n)
        apart = -delta_n if before is None else before - delta_n
        result = torch.addcmul(delta_n, update, apart, out=scratch[0])
        return result.addcmul_(delta_update, apart.add_(away))


class LstmDeviation:
    """An LSTM around clean values, (T, B, 5 H), see `LSTM_CLEAN`, and states (h, c), (T, B, 2 H)."""

    def __init__(self, preact: Tensor, rows: Rows) -> None:
        _, hidden = rows
        self.units = hidden.shape[-1] // 2
        a_i, a_f, a_g, a_o, before = preact.chunk(LSTM_CLEAN, -1)
        memory = hidden[..., self.units :]
        half = preact.new_full((4, self.units), 0.5)
        half[2] = 1
        self.half = half.flatten()
        self.gates = Differences(preact[..., : 4 * self.units] * self.half, self.half)
        self.read = Differences(memory)
        squashed = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
        self.rows = _rows(*squashed, before, torch.tanh(memory))

    def step(self, step: int, delta_a: Tensor, before: Tensor | None, scratch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the deviations of h and c, (B, P, 2 H), in the first scratch tensor; see `Deviation`."""
        enter, keep, value, leave, memory, read = self.rows[step]
        delta_enter, delta_keep, delta_value, delta_leave = self.gates.of(step, delta_a.mul_(self.half)).chunk(4, -1)
        result = scratch[0]
        if before is None:
            delta_c = memory * delta_keep
        else:
            held = before[..., self.units :]
            delta_c = (memory + held).mul_(delta_keep).addcmul_(keep, held)
        delta_c.addcmul_(enter, delta_value).addcmul_(delta_enter, value + delta_value)
        delta_read = self.read.of(step, delta_c)
        result[..., self.units :] = delta_c
        torch.mul(leave, delta_read, out=result[..., : self.units])
        result[..., : self.units].addcmul_(delta_leave, delta_read.add_(read))
        return result


GRU = CellForms(
    "gru",
    no_rows,
    GruDeviation,
    numba=2,
    triton="gru_deviation",
    cupy="gru_deviation",
    slope=unit_slope,
    noise_in_state=True,
    gates=3,
    clean=GRU_CLEAN,
    recurrent_apart=True,
)
LSTM = CellForms(
    "lstm",
    no_rows,
    LstmDeviation,
    numba=3,
    triton="lstm_deviation",
    cupy="lstm_deviation",
    slope=unit_slope,
    noise_in_state=True,
    gates=4,
    states=2,
    clean=LSTM_CLEAN,
)
