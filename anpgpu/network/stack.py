"""The clean run of a stack of layers: the last layer's outputs and every layer's activity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anpgpu.runtime.ranges import within

from .cells import Cell, LayerRun
from .weights import LayerWeights, in_processing_order, valid_steps


class Network(NamedTuple):
    """A stack of layers, without its module."""

    layers: tuple[tuple[LayerWeights, ...], ...]
    """One tuple per layer: the forward direction, and the reverse one in a bidirectional network."""
    cell: type[Cell]

    @property
    def directions(self) -> int:
        """1 or 2."""
        return len(self.layers[0])

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.layers[0][0].hidden_size

    @property
    def state_size(self) -> int:
        """S."""
        return self.hidden_size * self.cell.forms.states

    def to(self, dtype: torch.dtype) -> Network:
        """Return the network with its weights detached and in `dtype`."""
        return self._replace(layers=tuple(tuple(weights.to(dtype) for weights in layer) for layer in self.layers))

    @classmethod
    def of(cls, weights: Sequence[Tensor], *, biases: bool, directions: int, cell: type[Cell]) -> Network:
        """Build from the flat list of parameters that torch's recurrent modules keep."""
        size = 4 if biases else 2
        sides = [
            LayerWeights(*weights[start : start + size], *[None] * (4 - size)) for start in range(0, len(weights), size)
        ]
        layers = tuple(tuple(sides[start : start + directions]) for start in range(0, len(sides), directions))
        return cls(layers, cell)


class CleanRun(NamedTuple):
    """The clean activity of a whole network."""

    layers: tuple[tuple[LayerRun, ...], ...]
    masks: tuple[Tensor | None, ...]
    """Dropout masks of the inputs of each layer, (T, B, D * H) or None."""
    outputs: Tensor
    """(T, B, D * H), in time order."""
    h_n: Tensor
    """(layers * D, B, S)."""


@within("clean_run")
def run_network(
    network: Network,
    inputs: Tensor,
    h_0: Tensor,
    lengths: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> CleanRun:
    """Run a network on inputs (T, B, I) from h_0 (layers * D, B, S); outputs past a sample's length are zero.

    `dropout` returns a mask for the inputs of every layer but the first.
    """
    runs: list[tuple[LayerRun, ...]] = []
    masks: list[Tensor | None] = []
    final: list[Tensor] = []
    cell, values = network.cell, inputs
    valid = None if lengths is None else valid_steps(len(inputs), lengths, inputs.device)
    for number, layer in enumerate(network.layers):
        mask = dropout(values) if dropout is not None and number else None
        if mask is not None:
            values = values * mask
        masks.append(mask)
        first = number * network.directions
        ordered = [in_processing_order(values, bool(side), lengths) for side in range(network.directions)]
        if lengths is None:
            # As in nn.RNN, the layer above reads this very tensor: the rounding of a product depends on its address.
            values, states = cell.run_layer(layer, values, h_0[first : first + network.directions])
        else:
            states = [
                cell.run_padded(weights, ordered[side], h_0[first + side], lengths)
                for side, weights in enumerate(layer)
            ]
            values = outputs_of(states, network.hidden_size, lengths)
        runs.append(tuple(LayerRun(*activity, valid) for activity in zip(ordered, states, strict=True)))
        final += [_last_states(state, lengths) for state in states]
    return CleanRun(tuple(runs), tuple(masks), values, torch.stack(final))


def joined(sides: list[Tensor]) -> Tensor:
    """Concatenate the values of both directions, (..., D * H); return those of a single direction unchanged."""
    return sides[0] if len(sides) == 1 else torch.cat(sides, dim=-1)


def outputs_of(states: list[Tensor], units: int, lengths: Tensor | None) -> Tensor:
    """Return a layer's outputs, (T, B, D * H) in time order, from each direction's states, (T + 1, B, S)."""
    return joined([in_processing_order(state[1:, :, :units], bool(side), lengths) for side, state in enumerate(states)])


def _last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Return each sample's state after its last valid step, (B, S)."""
    if lengths is None:
        return states[-1]
    index = lengths.to(states.device).view(1, -1, 1).expand(1, -1, states.shape[-1])
    return states.gather(0, index).squeeze(0)
