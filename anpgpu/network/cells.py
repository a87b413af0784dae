"""The step of a network: a class per cell, in the table `registry.CELLS`.

A cell defines how a layer runs, which clean values its rollouts need, and how the gradients of weights, inputs and
first state follow from the adjoint, the estimate lam_t of dL/da_t; in gated cells, whose noise enters the state, of the
total dL/dh_t, from which every gate's adjoint follows within its step. How a step changes a deviation is defined in
`kernels/cell*`, in one form per backend, which `Cell.forms` names.

A state has S numbers, the first H of which are h: S = H but in an LSTM, whose state is (h, c). Source of the factorised
gradient of gated cells: Bellec et al. 2020 (e-prop), here with a measured total derivative; derived here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.kernels.cell import RELU, TANH, CellForms
from anpgpu.kernels.cell_gated import GRU, GRU_CLEAN, LSTM, LSTM_CLEAN, Recurrence
from anpgpu.kernels.least_squares import Path
from anpgpu.registry import CELLS

from .weights import LayerWeights, in_processing_order, valid_steps

RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
"""Modules of torch's whose cells are below."""


class LayerRun(NamedTuple):
    """Clean activity of one layer and direction over some steps, in processing order."""

    inputs: Tensor
    """(T, B, I)."""
    states: Tensor
    """(T + 1, B, S): the state before the first step, then after each; zero past a sample's length."""
    valid: Tensor | None = None
    """Steps within each sample's length, (T, B) bool; None where all are."""

    def segment(self, steps: slice, samples: slice) -> LayerRun:
        """Return the activity of some steps of some samples."""
        valid = None if self.valid is None else self.valid[steps, samples]
        return LayerRun(self.inputs[steps, samples], self.states[steps.start : steps.stop + 1, samples], valid)


class GateAdjoints(NamedTuple):
    """dL/d(W_ih x + b_ih) and dL/d(W_hh h + b_hh), (parts, T, B, G H); the same tensor where they are equal."""

    inputs: Tensor
    recurrent: Tensor


class Cell:
    """An Elman cell, h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), and the base of all others.

    A new cell overrides what differs; `docs/extending.md` shows how.
    """

    forms: CellForms
    """What a step does to a deviation, on each backend that has it."""
    resting: float | None = None
    """A pre-activation around which no deviation survives, for cells whose deviations could grow without bound in the
    padding; None where they cannot."""
    native: bool = True
    """Whether the torch module's own forward pass computes this cell; it then runs where no estimate is needed."""

    @classmethod
    def takes_autocast(cls, device_type: str, *, packed: bool) -> bool:
        """Say whether torch's module returns states of autocast's type, or else of the parameters'."""
        del device_type, packed
        return True

    @classmethod
    def run_layer(cls, layer: Sequence[LayerWeights], inputs: Tensor, h_0: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run one layer without perturbation.

        Args:
            layer: the weights of its directions, one or two.
            inputs: (T, B, I), in time order.
            h_0: (directions, B, S).

        Returns:
            The outputs, (T, B, D * H), and each direction's states, (T + 1, B, S) in processing order.
        """
        raise NotImplementedError

    @classmethod
    def run_padded(cls, weights: LayerWeights, inputs: Tensor, h_0: Tensor, lengths: Tensor) -> Tensor:
        """Run one direction on samples of unequal length; return its states, (T + 1, B, S), zero past the length.

        Args:
            weights: of the direction.
            inputs: (T, B, I), in processing order.
            h_0: (B, S).
            lengths: (B,) int64 on the CPU, in [0, T].
        """
        _, (states,) = cls.run_layer((weights,), inputs, h_0.unsqueeze(0))
        valid = valid_steps(len(inputs), lengths, inputs.device).unsqueeze(-1)
        return torch.cat((states[:1], torch.where(valid, states[1:], 0)))

    @classmethod
    def preactivations(cls, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return a = W_ih x + b_ih + W_hh h_{t-1} + b_hh, (T, B, H), for all steps of a run at once.

        In a gated cell these are all the clean values that a step of the rollouts needs beside its state.
        """
        preact = F.linear(run.inputs, weights.weight_ih, weights.bias_ih)
        preact += F.linear(run.states[:-1], weights.weight_hh, weights.bias_hh)
        if cls.resting is None or run.valid is None:
            return preact
        return torch.where(run.valid.unsqueeze(-1), preact, cls.resting)

    @classmethod
    def gate_adjoints(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> GateAdjoints:
        """Return the adjoints of a step's two matrix products from the adjoint, (parts, T, B, S).

        The adjoint is dL/da; in a gated cell dL/dh, followed in an LSTM by dL/dc.
        """
        del weights, run
        return GateAdjoints(adjoint, adjoint)

    @classmethod
    def first_state_gradient(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return dL/d(first state), (B, S), from the adjoint of the first step, (B, S), and a run that begins there."""
        del run
        return adjoint @ weights.weight_hh

    @classmethod
    def path(cls, preact: Tensor, states: Tensor, discount: float) -> Path | None:
        """Return how an LSTM's c hands its gradient on, from clean values and states after their steps; else None.

        The rollouts measure dL/dh alone. What reaches the loss through c is known from it, and is not h's doing.
        """
        del preact, states, discount
        return None

    @classmethod
    def recurrence(cls, preact: Tensor, states: Tensor, discount: float) -> Recurrence | None:
        """Return what a gated cell makes of dL/dh within a step, from clean values and states after their steps.

        None where the adjoint is that of the recurrent product itself.
        """
        del preact, states, discount
        return None


class _Fused(Cell):
    """A cell that torch's own fused function runs."""

    torch_run: Callable[..., tuple[Tensor, Tensor]]
    """Called with (inputs,) or a packed sequence's (data, sizes), the first states (D, B, S), and what follows in
    torch's function; returns the outputs and the final states, (D, B, S)."""

    @classmethod
    def whole_states(
        cls,
        weights: LayerWeights,
        inputs: Callable[[], Tensor],
        hidden: Tensor,
        ends: tuple[Tensor, Tensor],
        lengths: Tensor | None,
    ) -> Tensor:
        """Return the states, (T + 1, B, S), of a direction from all its h, (T + 1, B, H).

        Args:
            weights: of the direction.
            inputs: returns (T, B, I), in processing order.
            hidden: first h, then h after each step.
            ends: first and final states, (B, S).
            lengths: steps of each sample, (B,); None where all have T.
        """
        del weights, inputs, ends, lengths
        return hidden

    @classmethod
    def run_layer(cls, layer: Sequence[LayerWeights], inputs: Tensor, h_0: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run one layer by the function that `torch.nn.RNN` calls, with both directions in one call, as it does.

        Two calls would round differently: torch projects the inputs before it reverses them, and the rounding of a
        matrix product may depend on the order of rows.
        """
        flat = [weight for weights in layer for weight in weights if weight is not None]
        biases, both = layer[0].bias_ih is not None, len(layer) == 2
        # cuDNN differentiates what it ran in training mode alone; without dropout the mode changes nothing else.
        outputs, final = cls.torch_run((inputs,), h_0, flat, biases, 1, 0.0, torch.is_grad_enabled(), both, False)
        states = []
        for number, (weights, side) in enumerate(zip(layer, outputs.chunk(len(layer), -1), strict=True)):
            start = h_0[number].to(side.dtype)
            hidden = start[..., : weights.hidden_size].unsqueeze(0)
            hidden = torch.cat((hidden, in_processing_order(side, bool(number), None)))
            ordered = functools.partial(in_processing_order, inputs, bool(number), None)
            states.append(cls.whole_states(weights, ordered, hidden, (start, final[number]), None))
        return outputs, states

    @classmethod
    def run_padded(cls, weights: LayerWeights, inputs: Tensor, h_0: Tensor, lengths: Tensor) -> Tensor:
        """Run one direction as torch runs a packed sequence: nothing is computed past a sample's length."""
        longest_first = lengths.argsort(descending=True, stable=True)
        longest_first = longest_first[: int((lengths > 0).sum())]
        states = torch.cat((h_0.unsqueeze(0).to(inputs.dtype), inputs.new_zeros((len(inputs), *h_0.shape))))
        if not len(longest_first):
            return states
        order = longest_first.to(inputs.device)
        data, sizes = torch._VF._pack_padded_sequence(inputs[:, order], lengths[longest_first], False)
        flat = [weight for weight in weights if weight is not None]
        biases = weights.bias_ih is not None
        data, final = cls.torch_run(
            (data, sizes), h_0[order].unsqueeze(0), flat, biases, 1, 0.0, torch.is_grad_enabled(), False
        )
        padded, _ = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(inputs))
        start, units = states[0].to(padded.dtype), weights.hidden_size
        hidden = torch.zeros_like(states[1:, :, :units]).to(padded.dtype).index_copy(1, order, padded)
        ends = start, start.index_copy(0, order, final[0])
        hidden = torch.cat((states[:1, :, :units], hidden))
        return cls.whole_states(weights, lambda: inputs, hidden, ends, lengths)


@CELLS.add("tanh")
class Tanh(_Fused):
    """`torch.nn.RNN` with tanh."""

    forms = TANH

    @staticmethod
    def torch_run(values: tuple[Tensor, ...], state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function."""
        run: Callable[..., tuple[Tensor, Tensor]] = torch._VF.rnn_tanh
        return run(*values, state, *rest)


@CELLS.add("relu")
class Relu(_Fused):
    """`torch.nn.RNN` with relu."""

    forms = RELU
    resting = -1e30

    @staticmethod
    def torch_run(values: tuple[Tensor, ...], state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function."""
        run: Callable[..., tuple[Tensor, Tensor]] = torch._VF.rnn_relu
        return run(*values, state, *rest)


@CELLS.add("gru")
class Gru(_Fused):
    """`torch.nn.GRU`: gates r, z, n, and h = n + z (h' - n), n = tanh(W_in x + b_in + r q), q = W_hn h' + b_hn."""

    forms = GRU

    @classmethod
    def takes_autocast(cls, device_type: str, *, packed: bool) -> bool:
        """Say no on a CPU, where h' of the parameters' type enters the new state past every product."""
        del packed
        return device_type != "cpu"

    @staticmethod
    def torch_run(values: tuple[Tensor, ...], state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function."""
        run: Callable[..., tuple[Tensor, Tensor]] = torch._VF.gru
        return run(*values, state, *rest)

    @classmethod
    def preactivations(cls, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return the clean values a_r, a_z, a_n, q, h' of all steps of a run, (T, B, 5 H)."""
        before, units = run.states[:-1], weights.hidden_size
        clean = run.inputs.new_empty((*run.inputs.shape[:2], GRU_CLEAN * units))
        gates, candidate, last = clean[..., : 2 * units], clean[..., 2 * units : 3 * units], clean[..., 3 * units :]
        driven = F.linear(run.inputs, weights.weight_ih, weights.bias_ih)
        recurrent = F.linear(before, weights.weight_hh, weights.bias_hh)
        torch.add(driven[..., : 2 * units], recurrent[..., : 2 * units], out=gates)
        last[..., :units], last[..., units:] = recurrent[..., 2 * units :], before
        reset = torch.sigmoid(gates[..., :units])
        torch.addcmul(driven[..., 2 * units :], reset, last[..., :units], out=candidate)
        return clean

    @classmethod
    def recurrence(cls, preact: Tensor, states: Tensor, discount: float) -> Recurrence:
        """Return the coefficients of R = [A_r, A_z, r A_n] and discount z."""
        del states
        a_r, a_z, a_n, q, before = preact.chunk(GRU_CLEAN, -1)
        of_n = torch.sigmoid(-a_z) * _slope(a_n)
        of_z = (before - torch.tanh(a_n)) * _gate_slope(a_z)
        coefficients = torch.stack((of_n * (q * _gate_slope(a_r)), of_z, of_n * torch.sigmoid(a_r)), -2)
        return Recurrence(coefficients, discount * torch.sigmoid(a_z))

    @classmethod
    def gate_adjoints(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> GateAdjoints:
        """Return A = [A_r, A_z, A_n] and R = [A_r, A_z, r A_n], (parts, T, B, 3 H), from dL/dh, (parts, T, B, H)."""
        a_r, a_z, a_n, q, before = cls.preactivations(weights, run).chunk(GRU_CLEAN, -1)
        reset, update, n = torch.sigmoid(a_r), torch.sigmoid(a_z), torch.tanh(a_n)
        of_n = adjoint * (torch.sigmoid(-a_z) * _slope(a_n))
        of_z = adjoint * ((before - n) * update * torch.sigmoid(-a_z))
        of_r = of_n * (q * reset * torch.sigmoid(-a_r))
        return GateAdjoints(torch.cat((of_r, of_z, of_n), -1), torch.cat((of_r, of_z, of_n * reset), -1))

    @classmethod
    def first_state_gradient(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return dL/dh_0 = z lam + W_hh^T R of the first step, (B, H)."""
        first = run.segment(slice(0, 1), slice(None))
        update = torch.sigmoid(cls.preactivations(weights, first)[0].chunk(GRU_CLEAN, -1)[1])
        recurrent = cls.gate_adjoints(adjoint[None, None], weights, first).recurrent[0, 0]
        return update * adjoint + recurrent @ weights.weight_hh


@CELLS.add("lstm")
class Lstm(_Fused):
    """`torch.nn.LSTM`: gates i, f, g, o, c = f c' + i g, and h = o tanh(c); a state is (h, c)."""

    forms = LSTM

    @classmethod
    def takes_autocast(cls, device_type: str, *, packed: bool) -> bool:
        """Say no for packed sequences on a CPU, which torch runs step by step."""
        return device_type != "cpu" or not packed

    @staticmethod
    def torch_run(values: tuple[Tensor, ...], state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Call torch's function, which takes h and c apart and does not return the c of each step."""
        run: Callable[..., tuple[Tensor, ...]] = torch._VF.lstm
        outputs, *final = run(*values, [half.contiguous() for half in state.chunk(2, -1)], *rest)
        return outputs, torch.cat(final, -1)

    @classmethod
    def whole_states(
        cls,
        weights: LayerWeights,
        inputs: Callable[[], Tensor],
        hidden: Tensor,
        ends: tuple[Tensor, Tensor],
        lengths: Tensor | None,
    ) -> Tensor:
        """Return (h, c) of all steps, (T + 1, B, 2 H): c follows elementwise from the gates, which see h alone."""
        units = weights.hidden_size
        enter, keep, value, _ = cls._gates(weights, inputs(), hidden).chunk(4, -1)
        keep, gain = torch.sigmoid(keep).to(hidden.dtype), (torch.sigmoid(enter) * torch.tanh(value)).to(hidden.dtype)
        first, final = (end[..., units:] for end in ends)
        memory = [first.to(keep.dtype)]
        for step in range(len(keep)):
            memory.append(torch.addcmul(gain[step], keep[step], memory[-1]))
        if lengths is None:
            # Torch's own, to the bit.
            return torch.cat((hidden, torch.stack([*memory[:-1], final.to(keep.dtype)])), -1)
        steps = torch.arange(len(memory), device=hidden.device).unsqueeze(1)
        last = lengths.to(hidden.device)
        whole = torch.where((steps < last).unsqueeze(-1), torch.stack(memory), 0)
        whole = torch.where((steps == last).unsqueeze(-1), final.to(keep.dtype), whole)
        return torch.cat((hidden, whole), -1)

    @staticmethod
    def _gates(weights: LayerWeights, inputs: Tensor, hidden: Tensor) -> Tensor:
        """Return the gates' pre-activations, (T, B, 4 H), from the inputs and all h, (T + 1, B, H)."""
        driven = F.linear(inputs, weights.weight_ih, weights.bias_ih)
        return driven + F.linear(hidden[:-1], weights.weight_hh, weights.bias_hh)

    @classmethod
    def preactivations(cls, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return the clean values a_i, a_f, a_g, a_o, c' of all steps of a run, (T, B, 5 H)."""
        units = weights.hidden_size
        gates = cls._gates(weights, run.inputs, run.states[..., :units])
        return torch.cat((gates, run.states[:-1, :, units:]), -1)

    @classmethod
    def path(cls, preact: Tensor, states: Tensor, discount: float) -> Path:
        """Return o (1 - tanh^2 c) and discount f, (T, B, H): dL/dc = o (1 - tanh^2 c) dL/dh + f dL/dc of the next."""
        _, keep, _, leave, _ = preact.chunk(LSTM_CLEAN, -1)
        memory = states[..., states.shape[-1] // 2 :]
        return Path(gain=torch.sigmoid(leave) * _slope(memory), keep=discount * torch.sigmoid(keep))

    @classmethod
    def recurrence(cls, preact: Tensor, states: Tensor, discount: float) -> Recurrence:
        """Return the coefficients of the gates' adjoints; the path along c is `path`."""
        del discount
        a_i, a_f, a_g, a_o, before = preact.chunk(LSTM_CLEAN, -1)
        memory = states[..., states.shape[-1] // 2 :]
        coefficients = (
            torch.tanh(a_g) * _gate_slope(a_i),
            before * _gate_slope(a_f),
            torch.sigmoid(a_i) * _slope(a_g),
            torch.tanh(memory) * _gate_slope(a_o),
        )
        return Recurrence(torch.stack(coefficients, -2))

    @classmethod
    def gate_adjoints(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> GateAdjoints:
        """Return the gates' adjoints, (parts, T, B, 4 H), from dL/dh and dL/dc, (parts, T, B, 2 H)."""
        rows = cls.recurrence(cls.preactivations(weights, run), run.states[1:], 1.0).coefficients
        of_h, of_c = (side.unsqueeze(-2) for side in adjoint.chunk(2, -1))
        gates = torch.cat((of_c * rows[..., :3, :], of_h * rows[..., 3:, :]), -2).flatten(-2)
        return GateAdjoints(gates, gates)

    @classmethod
    def first_state_gradient(cls, adjoint: Tensor, weights: LayerWeights, run: LayerRun) -> Tensor:
        """Return dL/dh_0 = W_hh^T A and dL/dc_0 = f dL/dc of the first step, (B, 2 H)."""
        first = run.segment(slice(0, 1), slice(None))
        keep = torch.sigmoid(cls.preactivations(weights, first)[0].chunk(LSTM_CLEAN, -1)[1])
        recurrent = cls.gate_adjoints(adjoint[None, None], weights, first).recurrent[0, 0]
        return torch.cat((recurrent @ weights.weight_hh, keep * adjoint.chunk(2, -1)[1]), -1)


def _gate_slope(preact: Tensor) -> Tensor:
    """Return sigma'(a), which 1 - sigma(a) would round away where sigma(a) is near 1."""
    return torch.sigmoid(preact) * torch.sigmoid(-preact)


def _slope(preact: Tensor) -> Tensor:
    """Return tanh'(a), likewise."""
    return 4 * _gate_slope(2 * preact)


def cell_name(module: nn.Module) -> str:
    """Return the name in `CELLS` of a recurrent module's cell: its attribute `cell`, its nonlinearity, or its kind."""
    name: str | None = getattr(module, "cell", None) or getattr(module, "nonlinearity", None)
    return name or str(module.mode).lower()
