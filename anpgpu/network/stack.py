"""The clean run of a stack of RNN layers, and what turns a layer's adjoint into gradients.

A layer here is one layer in one direction. Its tensors are in *processing order*: as they come for the forward
direction, backwards in time within each sample's length for the reverse one, so that both run from step 0 to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

from anpgpu.runtime.ranges import within


class LayerWeights(NamedTuple):
    """Parameters of one layer and direction, as in `torch.nn.RNN`."""

    weight_ih: Tensor
    """(H, I)."""
    weight_hh: Tensor
    """(H, H)."""
    bias_ih: Tensor | None
    """(H,)."""
    bias_hh: Tensor | None
    """(H,)."""

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerWeights:
        """Return the weights, each changed; a missing bias stays missing."""
        biases = (None if bias is None else change(bias) for bias in (self.bias_ih, self.bias_hh))
        return LayerWeights(change(self.weight_ih), change(self.weight_hh), *biases)

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """Return detached copies in `dtype`; no copy where it is that already."""
        return self.map(lambda weight: weight.detach().to(dtype))


class Network(NamedTuple):
    """A stack of RNN layers without the module around it."""

    layers: tuple[tuple[LayerWeights, ...], ...]
    """One tuple per layer: the forward direction, and the reverse one in a bidirectional network."""
    nonlinearity: str

    @property
    def directions(self) -> int:
        """1 or 2."""
        return len(self.layers[0])

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.layers[0][0].weight_hh.shape[0]

    def to(self, dtype: torch.dtype) -> Network:
        """Return the network with its weights detached and in `dtype`."""
        return self._replace(layers=tuple(tuple(weights.to(dtype) for weights in layer) for layer in self.layers))

    @classmethod
    def of(cls, weights: Sequence[Tensor], *, biases: bool, directions: int, nonlinearity: str) -> Network:
        """Build from the flat list of parameters that `torch.nn.RNN` keeps."""
        size = 4 if biases else 2
        each = [
            LayerWeights(*weights[start : start + size], *[None] * (4 - size)) for start in range(0, len(weights), size)
        ]
        layers = tuple(tuple(each[start : start + directions]) for start in range(0, len(each), directions))
        return cls(layers, nonlinearity)


class LayerRun(NamedTuple):
    """The clean activity of one layer and direction, in processing order."""

    inputs: Tensor
    """(T, B, I)."""
    states: Tensor
    """(T + 1, B, H): the state before the first step, then after each."""


class CleanRun(NamedTuple):
    """The clean activity of a whole network."""

    layers: tuple[tuple[LayerRun, ...], ...]
    masks: tuple[Tensor | None, ...]
    """What multiplied the inputs of each layer (dropout), (T, B, D * H) or None."""
    outputs: Tensor
    """(T, B, D * H), in time order."""
    h_n: Tensor
    """(layers * D, B, H)."""


def in_processing_order(values: Tensor, reverse: bool, lengths: Tensor | None) -> Tensor:
    """Return (T, B, ...) values in a direction's processing order; the same call brings them back."""
    if not reverse:
        return values
    if lengths is None:
        return values.flip(0)
    step = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    lengths = lengths.to(values.device)
    source = torch.where(step < lengths, lengths - 1 - step, step)
    return values.gather(0, source.view(*source.shape, *[1] * (values.dim() - 2)).expand_as(values))


def run_layer(
    layer: Sequence[LayerWeights], inputs: Tensor, h_0: Tensor, nonlinearity: str
) -> tuple[Tensor, list[Tensor]]:
    """Return a layer's outputs, (T, B, D * H), and each direction's states, (T + 1, B, H) in processing order.

    By the function `torch.nn.RNN` itself calls, and as there both directions at once: it projects the inputs before it
    reverses them, and a row's place in a matrix product may change its rounding.
    """
    run = torch._VF.rnn_tanh if nonlinearity == "tanh" else torch._VF.rnn_relu
    flat = [weight for weights in layer for weight in weights if weight is not None]
    biases, both = layer[0].bias_ih is not None, len(layer) == 2
    outputs, _ = run(inputs, h_0, flat, biases, 1, 0.0, False, both, False)
    sides = outputs.chunk(len(layer), -1)
    states = [
        torch.cat((start.unsqueeze(0).to(side.dtype), in_processing_order(side, bool(number), None)))
        for number, (start, side) in enumerate(zip(h_0, sides, strict=True))
    ]
    return outputs, states


def preactivations(weights: LayerWeights, inputs: Tensor, states: Tensor) -> Tensor:
    """Return a = W_ih x + b_ih + W_hh h_{t-1} + b_hh, (T, B, H), for all steps at once."""
    preact = F.linear(inputs, weights.weight_ih, weights.bias_ih)
    preact += F.linear(states[:-1], weights.weight_hh, weights.bias_hh)
    return preact


def last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Return each sample's state after its last valid step, (B, H)."""
    if lengths is None:
        return states[-1]
    index = lengths.to(states.device).view(1, -1, 1).expand(1, -1, states.shape[-1])
    return states.gather(0, index).squeeze(0)


@within("clean_run")
def run_network(
    network: Network,
    inputs: Tensor,
    h_0: Tensor,
    lengths: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> CleanRun:
    """Run a network on inputs (T, B, I) from h_0 (layers * D, B, H); outputs past a sample's length are zero.

    `dropout` returns a mask for the inputs of every layer but the first.
    """
    runs: list[tuple[LayerRun, ...]] = []
    masks: list[Tensor | None] = []
    last: list[Tensor] = []
    values = inputs
    for number, layer in enumerate(network.layers):
        mask = dropout(values) if dropout is not None and number else None
        if mask is not None:
            values = values * mask
        masks.append(mask)
        first = number * network.directions
        ordered = [in_processing_order(values, bool(side), lengths) for side in range(network.directions)]
        if lengths is None:
            # The layer above reads the tensor this layer wrote, as in nn.RNN: products depend on an operand's address.
            values, states = run_layer(layer, values, h_0[first : first + network.directions], network.nonlinearity)
        else:
            sides, states = [], []
            for side, weights in enumerate(layer):
                start = h_0[first + side : first + side + 1]
                outputs, (state,) = run_layer((weights,), ordered[side], start, network.nonlinearity)
                sides.append(in_processing_order(outputs, bool(side), lengths))
                states.append(state)
            values = sides[0] if len(sides) == 1 else torch.cat(sides, dim=-1)
            values = values * valid_steps(len(values), lengths, values.device).unsqueeze(-1)
        runs.append(tuple(LayerRun(*each) for each in zip(ordered, states, strict=True)))
        last += [last_states(state, lengths) for state in states]
    return CleanRun(tuple(runs), tuple(masks), values, torch.stack(last))


def valid_steps(time: int, lengths: Tensor, device: torch.device) -> Tensor:
    """Return which steps are within each sample's length, (T, B) bool."""
    return torch.arange(time, device=device).unsqueeze(1) < lengths.to(device)


class GradientSums:
    """Gradients of one layer's weights in parts that add up to the estimate, (parts, ...) each.

    The first two are what the even and the odd rollouts say; a third is what only all of them together can.
    """

    def __init__(self, weights: LayerWeights, parts: int = 2) -> None:
        self.weight_ih = weights.weight_ih.new_zeros((parts, *weights.weight_ih.shape))
        self.weight_hh = weights.weight_hh.new_zeros((parts, *weights.weight_hh.shape))
        self.bias = weights.weight_hh.new_zeros((parts, weights.weight_hh.shape[0]))

    @within("weight_gradients")
    def add(self, adjoint: Tensor, inputs: Tensor, previous: Tensor) -> None:
        """Add sum_t lam_t (x_t, h_{t-1}, 1)^T.

        Args:
            adjoint: parts of the adjoint estimate, (parts, T, B, H).
            inputs: presynaptic inputs, (T, B, I).
            previous: presynaptic states h_{t-1}, (T, B, H).
        """
        rows = adjoint.flatten(1, 2).transpose(1, 2)
        for total, presynaptic in ((self.weight_ih, inputs), (self.weight_hh, previous)):
            total.baddbmm_(rows, presynaptic.flatten(0, 1).expand(len(rows), -1, -1))
        self.bias += adjoint.sum((1, 2))

    def totals(self, *, biases: bool) -> tuple[Tensor, ...]:
        """Return the gradients in the order of the layer's parameters; both biases have the same."""
        bias = self.bias.sum(0)
        return (self.weight_ih.sum(0), self.weight_hh.sum(0), *((bias, bias.clone()) if biases else ()))


def split_half(sums: Sequence[GradientSums]) -> Tensor:
    """Return the cosine between the two halves' gradients over all weights and biases, a 0-dim tensor.

    It shows the estimate's variance, not its bias; NaN where a half is zero, as with one rollout.
    """
    every = [part.flatten(1) for one in sums for part in (one.weight_ih, one.weight_hh, one.bias)]
    dot, first, second = (
        torch.stack([part[left] @ part[right] for part in every]).sum() for left, right in ((0, 1), (0, 0), (1, 1))
    )
    return dot / (first.sqrt() * second.sqrt())
