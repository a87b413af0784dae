"""One step of nn.RNN (tanh), nn.GRU and nn.LSTM, linearised: what algorithms that run forward in time are made of.

The states of a unit are h, and for an LSTM (h, c). Its gates k have pre-activations

    a_k = (W_ih x + b_ih)_k + (W_hh h' + b_hh)_k,       h', c' the states before the step,

but for the GRU's gate n, whose recurrent side is multiplied by r before it is added. Every gate acts on its own unit
alone, so that a step is the sum of elementwise parts and one product for each gate:

    d state_m = sum_n direct_mn d state'_n + sum_k (by_input_mk d(W_ih x + b_ih)_k + by_state_mk d(W_hh h' + b_hh)_k)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CELLS", "Linearised", "State", "linearised", "structure"]

State = Tensor | tuple[Tensor, Tensor] | None
"""First state of a network: none, h_0, or of an LSTM (h_0, c_0)."""

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class Linearised(NamedTuple):
    """The steps of a clean run.

    Sizes: T time steps, B sequences, M states and K gates of a unit, H units, I inputs.
    """

    hidden: Tensor
    """(T, B, H)."""
    last: Tensor | tuple[Tensor, Tensor]
    """Final state, as torch returns it."""
    inputs: Tensor
    """(T, B, I)."""
    before: Tensor
    """h', (T, B, H)."""
    direct: Tensor
    """(T, B, M, M, H): what a state passes on to the next step without a gate."""
    by_input: Tensor
    """(T, B, M, K, H)."""
    by_state: Tensor
    """(T, B, M, K, H)."""
    recurrent: Tensor
    """W_hh of each gate, (K, H, H)."""

    def jacobian(self, step: int) -> Tensor:
        """Return d state / d h', (B, M, H, H), without the direct part."""
        return torch.einsum("bmkh,khj->bmhj", self.by_state[step], self.recurrent)


def structure(rnn: nn.RNNBase) -> str:
    """Return the name of a network's cell.

    Raises:
        ValueError: the network is none of those that rivals are written for.
    """
    name = {nn.RNN: "rnn", nn.GRU: "gru", nn.LSTM: "lstm"}.get(type(rnn))
    whole = rnn.num_layers == 1 and not rnn.bidirectional and rnn.proj_size == 0 and rnn.bias and not rnn.batch_first
    nonlinearity = getattr(rnn, "nonlinearity", "tanh")
    if name is None or not whole or nonlinearity != "tanh":
        raise ValueError(
            "rivals train an nn.RNN (tanh), nn.GRU or nn.LSTM of one layer and direction, with biases, "
            f"got {rnn} of nonlinearity {nonlinearity!r}"
        )
    return name


@torch.no_grad()
def linearised(rnn: nn.RNNBase, inputs: Tensor, hx: State) -> Linearised:
    """Run a network on inputs (T, B, I) and linearise every step."""
    cell = structure(rnn)
    hidden, last = rnn(inputs, hx)
    first = hx[0] if isinstance(hx, tuple) else hx
    before = torch.cat((torch.zeros_like(hidden[:1]) if first is None else first, hidden[:-1]))
    by_input = inputs @ rnn.weight_ih_l0.t() + rnn.bias_ih_l0
    by_state = before @ rnn.weight_hh_l0.t() + rnn.bias_hh_l0
    cells_before = hx[1][0] if isinstance(hx, tuple) else torch.zeros_like(before[0])
    parts = _PARTS[cell](by_input, by_state, before, hidden, cells_before)
    recurrent = rnn.weight_hh_l0.detach().unflatten(0, (-1, rnn.hidden_size))
    return Linearised(hidden, last, inputs, before, *parts, recurrent)


def _tanh(by_input: Tensor, by_state: Tensor, before: Tensor, hidden: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    slope = (1 - hidden * hidden)[:, :, None, None]
    return torch.zeros_like(slope), slope, slope


def _gru(by_input: Tensor, by_state: Tensor, before: Tensor, hidden: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    (input_r, input_z, input_n), (state_r, state_z, state_n) = by_input.chunk(3, -1), by_state.chunk(3, -1)
    r, z = torch.sigmoid(input_r + state_r), torch.sigmoid(input_z + state_z)
    n = torch.tanh(input_n + r * state_n)
    to_n = (1 - z) * (1 - n * n)
    to_r, to_z = to_n * state_n * r * (1 - r), (before - n) * z * (1 - z)
    sides = (torch.stack((to_r, to_z, last), 2).unsqueeze(2) for last in (to_n, to_n * r))
    return z[:, :, None, None], *sides


def _lstm(by_input: Tensor, by_state: Tensor, before: Tensor, hidden: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    a_i, a_f, a_g, a_o = (by_input + by_state).chunk(4, -1)
    i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
    memory = [cells]
    for step in range(len(i)):
        memory.append(f[step] * memory[-1] + i[step] * g[step])
    c_before, c = torch.stack(memory[:-1]), torch.stack(memory[1:])
    squashed = torch.tanh(c)
    through = o * (1 - squashed * squashed)
    to_c = torch.stack((g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), torch.zeros_like(o)), 2)
    to_h = through.unsqueeze(2) * to_c
    to_h[:, :, 3] = squashed * o * (1 - o)
    gates = torch.stack((to_h, to_c), 2)
    nothing = torch.zeros_like(f)
    direct = torch.stack((torch.stack((nothing, through * f), 2), torch.stack((nothing, f), 2)), 2)
    return direct, gates, gates


_PARTS = {"rnn": _tanh, "gru": _gru, "lstm": _lstm}
