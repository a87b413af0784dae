"""Rivals that go forward in time: what the states owe to the parameters, the influence, is carried from step to step.

The influence J_t = d state_t / d parameters obeys J_t = A_t J_{t-1} + I_t, with A_t = d state_t / d state_{t-1} and the
immediate influence I_t of step t alone (Williams and Zipser 1989). The gradient is sum_t dL/dh_t J_t, with dL/dh_t
through step t's output alone. What differs is how much of J is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from rivals_backward import LossOf, Outcome, add_gradients, errors_of, finish
from rivals_cells import Linearised, State, linearised, structure
from torch import Tensor, nn

__all__ = ["LEAK", "EProp", "Influence", "Rflo", "SnAp1", "Uoro"]

Carried = tuple[Tensor, ...]
"""What a rival carries from step to step."""

LEAK = 0.9
"""What RFLO's trace keeps of itself in a step. Murray's units leak and their traces with them; the units of nn.RNN do
not, and without a leak RFLO is "bptt-1". This is the leak of the sketched-RTRL release (time constant 10)."""


class Forward(ABC):
    """A rival for one network that carries something from a window to the one that continues it."""

    cells: tuple[str, ...] = ("rnn", "gru", "lstm")

    def __init__(self, rnn: nn.RNNBase, readout: nn.Linear) -> None:
        cell = structure(rnn)
        if cell not in self.cells:
            raise ValueError(f"{type(self).__name__} is for {', '.join(self.cells)}, not for {cell}: {self.instead}")
        self.rnn, self.readout = rnn, readout

    instead = "use another rival"

    @abstractmethod
    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        """Add the gradients of a window to `.grad`; a state says that it continues the last window."""

    def _add(self, gradient: Tensor, inputs: int) -> None:
        """Add a gradient (K, H, F) over the features x, 1, h', 1."""
        rows = gradient.flatten(0, 1)
        w_ih, b_ih, w_hh, b_hh = rows.split((inputs, 1, rows.shape[1] - inputs - 2, 1), 1)
        gradients = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh, "bias_ih_l0": b_ih[:, 0], "bias_hh_l0": b_hh[:, 0]}
        add_gradients(self.rnn, gradients)


class Stepwise(Forward):
    """A rival whose sums must be made step by step."""

    carried: Carried | None = None

    @abstractmethod
    def start(self, immediate: Tensor) -> Carried:
        """Return what is carried before the first step."""

    @abstractmethod
    def step(
        self, carried: tuple[Tensor, ...], steps: Linearised, number: int, immediate: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what is carried after a step.

        Args:
            carried: what was carried before it.
            steps: all steps of the window.
            number: which of them.
            immediate: the immediate influence on each unit, (B, M, K, H, F), over the features x, 1, h', 1.
        """

    @abstractmethod
    def credit(self, carried: Carried, error: Tensor) -> Tensor:
        """Return a step's share of the gradient, (K, H, F), from dL/dh (B, H)."""

    @torch.no_grad()
    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        """Add the gradients of a window to `.grad`; a state says that it continues the last window."""
        steps = linearised(self.rnn, inputs, hx)
        with torch.enable_grad():
            loss, errors = errors_of(self.readout, steps.hidden, targets, loss_of)
        carried = self.carried if hx is not None else None
        ones = torch.ones_like(steps.inputs[..., :1])
        by_input, by_state = torch.cat((steps.inputs, ones), -1), torch.cat((steps.before, ones), -1)
        gradient: Tensor | None = None
        for number in range(len(errors)):
            sides = ((steps.by_input[number], by_input[number]), (steps.by_state[number], by_state[number]))
            immediate = torch.cat([torch.einsum("bmkh,bf->bmkhf", *side) for side in sides], -1)
            carried = self.start(immediate) if carried is None else carried
            carried = self.step(carried, steps, number, immediate)
            share = self.credit(carried, errors[number])
            gradient = share if gradient is None else gradient + share
        self.carried = carried
        assert gradient is not None
        self._add(gradient, steps.inputs.shape[2])
        return Outcome(loss, steps.last)


class Influence(Stepwise):
    """Real-time recurrent learning: the whole influence, (B, M, H, K, H, F). Exact; H^4 work a step, so for small H."""

    def start(self, immediate: Tensor) -> Carried:
        units = immediate.shape[3]
        return (immediate.new_zeros(*immediate.shape[:2], units, *immediate.shape[2:]),)

    def step(
        self, carried: tuple[Tensor, ...], steps: Linearised, number: int, immediate: Tensor
    ) -> tuple[Tensor, ...]:
        (influence,) = carried
        after = torch.einsum("bmhj,bjq->bmhq", steps.jacobian(number), influence[:, 0].flatten(2))
        after = after.view_as(influence) + torch.einsum("bmnh,bnhkif->bmhkif", steps.direct[number], influence)
        # A gate acts on its own unit alone.
        after.diagonal(dim1=2, dim2=4).add_(immediate.transpose(-1, -2))
        return (after,)

    def credit(self, carried: Carried, error: Tensor) -> Tensor:
        return torch.einsum("bj,bjkhf->khf", error, carried[0][:, 0])


class Local(Forward):
    """What each unit owes to its own parameters, J (B, M, K, H, F), carried along some path within the unit.

    Within a window weights stand still, so that sum_t dL/dh_t J_t is summed last step first, as what the unit's states
    of step t still have to earn: credit_t = dL/dh_t + path_{t+1}^T credit_{t+1}. J itself is made only where another
    window continues this one.
    """

    window: tuple[Linearised, Tensor, Tensor | None] | None = None
    """Of the last window: its steps, their paths, and J before them."""

    @abstractmethod
    def paths(self, steps: Linearised) -> Tensor:
        """Return the path from a unit's states to their next values of all steps, (T, B, M, M, H)."""

    @torch.no_grad()
    def grad_(self, inputs: Tensor, targets: Tensor, loss_of: LossOf, hx: State = None) -> Outcome:
        traces = None if hx is None or self.window is None else self._traces(*self.window)
        steps = linearised(self.rnn, inputs, hx)
        with torch.enable_grad():
            loss, errors = errors_of(self.readout, steps.hidden, targets, loss_of)
        paths = self.paths(steps)
        credit, owed = torch.zeros_like(paths[:, :, 0]), torch.zeros_like(paths[0, :, 0])
        for number in reversed(range(len(errors))):
            owed[:, 0] += errors[number]
            credit[number] = owed
            owed = (owed.unsqueeze(2) * paths[number]).sum(1)
        sides = ((credit.unsqueeze(3) * side).sum(2) for side in (steps.by_input, steps.by_state))
        finish(self.rnn, steps, *sides)
        if traces is not None:
            self._add(torch.einsum("bmh,bmkhf->khf", owed, traces), inputs.shape[2])
        self.window = steps, paths, traces
        return Outcome(loss, steps.last)

    @staticmethod
    def _traces(steps: Linearised, paths: Tensor, traces: Tensor | None) -> Tensor:
        """Return J after a window from J before it."""
        states, reach = paths.shape[2], torch.empty_like(paths)
        # From a step's states to the last one's: the product of the paths between.
        onward = torch.eye(states, dtype=paths.dtype, device=paths.device)[:, :, None].expand_as(paths[0])
        for number in reversed(range(len(paths))):
            reach[number] = onward
            onward = torch.einsum("bmnh,bnlh->bmlh", onward, paths[number])
        ones = torch.ones_like(steps.inputs[..., :1])
        parts = []
        for gates, seen in ((steps.by_input, steps.inputs), (steps.by_state, steps.before)):
            reached = torch.einsum("tbmnh,tbnkh->tbmkh", reach, gates)
            parts.append(torch.einsum("tbmkh,tbf->bmkhf", reached, torch.cat((seen, ones), -1)))
        after = torch.cat(parts, -1)
        return after if traces is None else after + torch.einsum("bmnh,bnkhf->bmkhf", onward, traces)


class SnAp1(Local):
    """Sparse n-step approximation with n = 1: entries of the influence that one step reaches (Menick et al. 2021).

    A parameter reaches its own unit in one step, so that the whole path within the unit is kept: W_hh's diagonal and,
    of an LSTM, both of the unit's states. Exact where every gate's W_hh is diagonal.
    """

    def paths(self, steps: Linearised) -> Tensor:
        within = steps.direct.clone()
        within[:, :, :, 0] += (steps.by_state * steps.recurrent.diagonal(dim1=1, dim2=2)).sum(3)
        return within


class EProp(Local):
    """e-prop's eligibility traces (Bellec et al. 2020): the path through no gate, z of a GRU and f of an LSTM.

    The errors are W_o^T e (Bellec's symmetric form). It is what is known of an adjoint without rollouts.
    """

    cells = ("gru", "lstm")
    instead = "its path is empty there, and e-prop is 'bptt-1'"

    def paths(self, steps: Linearised) -> Tensor:
        return steps.direct


class Rflo(Local):
    """RFLO's traces (Murray 2019), with errors W_o^T e: p_t = `LEAK` p_{t-1} + phi'(a_t) [x_t, 1, h_{t-1}, 1]."""

    cells = ("rnn",)
    instead = "use 'e-prop', whose path is the cell's own"

    def paths(self, steps: Linearised) -> Tensor:
        return torch.full_like(steps.direct, LEAK)


class Uoro(Stepwise):
    """Unbiased online recurrent optimisation (Tallec and Ollivier 2018): the influence as one random product s q^T.

        s <- r0 A s + r1 v,   q <- q / r0 + (v^T I) / r1,   v of random signs,   E[s q^T] = J

    with r0 = sqrt(|q| / |A s|) and r1 = sqrt(|v^T I| / |v|), which keep the variance low; every sample has its own.
    """

    def start(self, immediate: Tensor) -> Carried:
        return torch.zeros_like(immediate[:, :, 0, :, 0]), torch.zeros_like(immediate[:, 0])

    def step(
        self, carried: tuple[Tensor, ...], steps: Linearised, number: int, immediate: Tensor
    ) -> tuple[Tensor, ...]:
        states, parameters = carried
        pushed = torch.einsum("bmnh,bnh->bmh", steps.direct[number], states)
        onward = torch.einsum("khj,bj->bkh", steps.recurrent, states[:, 0])
        pushed = pushed + torch.einsum("bmkh,bkh->bmh", steps.by_state[number], onward)
        signs = torch.randint(0, 2, states.shape, device=states.device).to(states.dtype) * 2 - 1
        immediate = torch.einsum("bmh,bmkhf->bkhf", signs, immediate)
        first, second = _balance(parameters, pushed), _balance(immediate, signs)
        states = _times(pushed, first) + _times(signs, second)
        return states, _times(parameters, 1 / first) + _times(immediate, 1 / second)

    def credit(self, carried: Carried, error: Tensor) -> Tensor:
        states, parameters = carried
        return torch.einsum("b,bkhf->khf", (error * states[:, 0]).sum(1), parameters)


def _balance(left: Tensor, right: Tensor) -> Tensor:
    """Return sqrt(|left| / |right|) of each sample; 1 where either is zero, which any positive number would serve."""
    above, below = left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1)
    ratio = torch.sqrt(above / below)
    return torch.where((above > 0) & (below > 0), ratio, torch.ones_like(ratio))


def _times(values: Tensor, factors: Tensor) -> Tensor:
    return values * factors.view(-1, *(1,) * (values.dim() - 1))
