"""`estimator_state` and `load_estimator_state_`: what a method keeps between updates, for exact resume."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import module_of
from .estimators.kept import LayerState, kept_by, kept_of, recurrent_weights
from .kernels.feedback_matrix import gram_shape
from .runtime.settings import working_dtype

State = dict[str, dict[str, Any]]
"""By the name of a module: "updates", and the tensors of each layer and direction, as "weight_hh_l0.feedback"."""


def estimator_state(model: nn.Module) -> State:
    """Return what the estimators of a model's recurrent modules keep between updates: feedback matrices.

    It is no part of `state_dict`, which stays torch's own: save both for a training that resumes exactly. Feedback
    matrices have made the weights' own steps up to here.

    Args:
        model: any module; it may itself be recurrent.

    Returns:
        Copies, by the name of the module; a module without a state is left out. `torch.save` stores it, and
        `torch.load` reads it with weights_only=True.

    Raises:
        TypeError: `model` is no module.
    """
    result: State = {}
    for name, module in _recurrent(model).items():
        kept = kept_by(module)
        if kept is None or not kept.layers:
            continue
        tensors: dict[str, Any] = {"updates": kept.updates}
        for label, layer in zip(_labels(module), kept.settled(recurrent_weights(module)), strict=True):
            tensors |= {f"{label}.{field}": value for field, value in layer._asdict().items()}
        result[name] = tensors
    return result


def load_estimator_state_(model: nn.Module, state: State) -> None:
    """Give a model's recurrent modules a state that `estimator_state` returned, in place of theirs.

    Load it before or after the weights. A module that the state does not name starts again.

    Args:
        model: any module, of the same structure and types as that which was saved.
        state: as returned; tensors may be on another device.

    Raises:
        TypeError: `model` is no module, or `state` no dict of this form.
        ValueError: the state is of another model, of other shapes or of another dtype; the message names both. The
            model's state is then unchanged.
    """
    modules = _recurrent(model)
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict from anpgpu.estimator_state, got {type(state).__name__}")
    for name in state:
        if name not in modules:
            known = ", ".join(map(repr, modules)) or "none"
            raise ValueError(f"the state has a module {name!r}, but the model's recurrent modules are: {known}")
    loaded = {name: _checked(name, modules[name], tensors) for name, tensors in state.items()}
    for name, module in modules.items():
        kept = kept_of(module) if name in loaded else kept_by(module)
        if kept is not None:
            layers, updates = loaded.get(name, ([], 0))
            kept.restore(layers, updates)


def _recurrent(model: nn.Module) -> dict[str, nn.RNNBase]:
    return {
        name: module for name, module in module_of("model", model).named_modules() if isinstance(module, nn.RNNBase)
    }


def _labels(module: nn.RNNBase) -> list[str]:
    """Return the name of each layer's and direction's recurrent weight."""
    return [names[1] for names in module._all_weights]


def _checked(name: str, module: nn.RNNBase, tensors: object) -> tuple[list[LayerState], int]:
    """Return copies of a module's state on the module's device."""
    if not isinstance(tensors, dict):
        raise TypeError(f"the state of module {name!r} must be a dict, got {type(tensors).__name__}")
    layers = []
    expected = {"updates"}
    for label, weight in zip(_labels(module), recurrent_weights(module), strict=True):
        shapes = {"feedback": tuple(weight.shape), "gram": gram_shape(weight), "weight": tuple(weight.shape)}
        dtype, values = working_dtype(weight.dtype), []
        for field, shape in shapes.items():
            key = f"{label}.{field}"
            expected.add(key)
            value = tensors.get(key)
            if not isinstance(value, Tensor):
                raise ValueError(f"the state of module {name!r} has no tensor {key!r}; it has {sorted(tensors)}")
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"{key} of module {name!r} is {_told(tuple(value.shape), value.dtype)} in the state, but the model "
                    f"needs {_told(shape, dtype)}"
                )
            values.append(value.detach().to(weight.device, copy=True))
        layers.append(LayerState(*values))
    more = sorted(set(tensors) - expected)
    if more:
        raise ValueError(f"the state of module {name!r} has {more}, which the model's module has not")
    updates = tensors.get("updates")
    if not isinstance(updates, int) or updates < 0:
        raise ValueError(f"'updates' of module {name!r} must be a whole number, got {updates!r}")
    return layers, updates


def _told(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{shape} {dtype}".replace("torch.", "")
