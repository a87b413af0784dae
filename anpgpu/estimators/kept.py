"""What an estimator keeps between updates: a feedback matrix for each layer and direction.

It belongs to the recurrent module, as a plain attribute: no parameter and no buffer, so that `state_dict`,
`named_buffers` and DistributedDataParallel see torch's own module. Copies and pickles of the module carry it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anpgpu.kernels.feedback_matrix import gram_shape
from anpgpu.runtime.settings import working_dtype

ATTRIBUTE = "_estimator_state"
"""Of the module."""

_handles = itertools.count(1)
_by_handle: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()
"""Ops take numbers and tensors alone; the compiler would copy tensors that an op changes."""


class LayerState(NamedTuple):
    """What is kept for one layer and direction; changed in place."""

    feedback: Tensor
    """B, (G H, H), which tends to W_hh: the prior mean of dL/dh_t is g_t + R_{t+1} B."""
    gram: Tensor
    """Mean Gram matrix of R, (G H, G H); zeros before the first update, and (0, 0) where none is kept."""
    weight: Tensor
    """W_hh at the last update, (G H, H)."""

    @classmethod
    def new(cls, weight_hh: Tensor) -> LayerState:
        """Return the state before the first update."""
        return cls(torch.zeros_like(weight_hh), weight_hh.new_zeros(gram_shape(weight_hh)), weight_hh.detach().clone())


class Kept:
    """The state of all layers of a module; empty before its first update."""

    def __init__(self) -> None:
        self.layers: list[LayerState] = []
        self.updates = 0
        """Updates since B was zero; the first one warms B up."""
        self.follows = True
        """Whether B makes the steps of the weights."""
        self.loaded = False
        """Whether weights were loaded since the last update."""
        self.restored = False
        """Whether this state was loaded since the last update."""
        self.replicas: Any = None
        """Group of the processes of DistributedDataParallel, whose B is one and the same; None without it."""
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _by_handle[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles carry; handle and process group are this object's own."""
        return {name: value for name, value in vars(self).items() if name not in {"handle", "replicas"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, replicas=None)
        self._register()

    def begin(self, weights: Sequence[Tensor], *, follows: bool) -> None:
        """Prepare an update with these recurrent weights, (G H, H) each, in the working type.

        Weights that were loaded are not a step of an optimiser: unless they are those that the state was left with, it
        starts again.

        Raises:
            ValueError: the state belongs to weights of other shapes.
        """
        if not self.layers:
            self.layers = [LayerState.new(weight) for weight in weights]
        shapes = [tuple(layer.weight.shape) for layer in self.layers]
        if shapes != [tuple(weight.shape) for weight in weights]:
            raise ValueError(
                f"the estimator's state is of recurrent weights of shapes {shapes}, but those of this update are of "
                f"shapes {[tuple(weight.shape) for weight in weights]}"
            )
        self.move(weights[0])
        self.follows = follows
        if self.loaded:
            same = all(torch.equal(layer.weight, weight) for layer, weight in zip(self.layers, weights, strict=True))
            if not same:
                self.layers, self.updates = [LayerState.new(weight) for weight in weights], 0
        self.loaded = self.restored = False

    def move(self, like: Tensor) -> None:
        """Move to a parameter's device, and to float64 where the parameter is; else to float32."""
        dtype = working_dtype(like.dtype)
        if like.is_meta:
            self.layers, self.updates = [], 0
        if self.layers and (self.layers[0].weight.device, self.layers[0].weight.dtype) != (like.device, dtype):
            self.layers = [LayerState(*(value.to(like.device, dtype) for value in layer)) for layer in self.layers]

    def restore(self, layers: list[LayerState], updates: int) -> None:
        """Take a state that was saved."""
        self.layers, self.updates, self.loaded, self.restored = layers, updates, False, True

    def settled(self, weights: Sequence[Tensor]) -> list[LayerState]:
        """Return a copy that has followed the weights to where they are now."""
        states = []
        for layer, weight in zip(self.layers, weights, strict=True):
            now = weight.detach().to(layer.weight)
            matrix = layer.feedback + (now - layer.weight) if self.follows else layer.feedback.clone()
            states.append(LayerState(matrix, layer.gram.clone(), now.clone()))
        return states

    def before_loading(self, weights: Sequence[Tensor]) -> None:
        """Follow the weights up to here, before others are loaded."""
        if self.layers and not (self.loaded or self.restored):
            self.layers = self.settled(weights)
        self.loaded = bool(self.layers)


def kept_by_handle(handle: int) -> Kept:
    """Return a module's state.

    Raises:
        RuntimeError: the module is gone.
    """
    kept = _by_handle.get(handle)
    if kept is None:
        raise RuntimeError("the module whose estimator keeps a state is gone; keep it alive until backward() is done")
    return kept


def kept_by(rnn: nn.RNNBase) -> Kept | None:
    """Return a module's state, None where it has none."""
    kept: Kept | None = vars(rnn).get(ATTRIBUTE)
    return kept


def kept_of(rnn: nn.RNNBase) -> Kept:
    """Return a module's state, a new one where it has none."""
    kept = kept_by(rnn)
    if kept is None:
        kept = Kept()
        vars(rnn)[ATTRIBUTE] = kept
        # A module of this library does so itself, and its forward pass may be compiled.
        rnn.register_load_state_dict_pre_hook(before_loading)  # type: ignore[no-untyped-call]
    return kept


def recurrent_weights(rnn: nn.RNNBase) -> list[Tensor]:
    """Return W_hh of every layer and direction."""
    return [weights[1] for weights in rnn.all_weights]


def before_loading(rnn: Any, *_: Any) -> None:
    """Tell a module's state that weights are about to be loaded."""
    kept = kept_by(rnn)
    if kept is not None:
        kept.before_loading(recurrent_weights(rnn))
