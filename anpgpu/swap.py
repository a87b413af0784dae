"""`swap_` and `unswap_`: perturbation learning in and out of an existing model."""

from __future__ import annotations

import warnings

from torch import nn

from .checks import module_of
from .estimators.kept import Kept
from .modules import GRU, LSTM, RNN, Perturbed, Record, let_dynamo_trace
from .perturbation import Perturbation, check_perturbation

SWAPPED: dict[type[nn.Module], type[Perturbed]] = {nn.RNN: RNN, nn.GRU: GRU, nn.LSTM: LSTM}


def swap_(model: nn.Module, perturbation: Perturbation | None = None) -> int:
    """Replace every `torch.nn.RNN`, `GRU` and `LSTM` inside a model, in place, by anpgpu's with the same parameters.

    Parameters stay the same objects, so an existing optimiser goes on working; hooks and names stay too. A module of
    anpgpu that is already there takes the new perturbation. The model itself may be the recurrent module. Those that
    cannot be swapped (`RNNCell`, `GRUCell`, `LSTMCell`, an LSTM with projections) are left alone, and a warning names
    them.

    Args:
        model: any module.
        perturbation: how gradients are estimated; the default is `Perturbation()`.

    Returns:
        Number of modules that now learn by perturbation.

    Raises:
        ValueError: there is nothing to swap inside the model; the message names the recurrent modules that are.
        TypeError: `model` is no module, `perturbation` no `Perturbation`, or a recurrent network of the model is of a
            class derived from torch's; the model is then unchanged.
    """
    chosen = check_perturbation(perturbation)
    networks: list[nn.Module] = []
    others: list[str] = []
    modules: dict[str, nn.Module] = dict(module_of("model", model).named_modules())
    for name, module in modules.items():
        projects = bool(getattr(module, "proj_size", 0))
        if isinstance(module, tuple(SWAPPED)) and not projects:
            networks.append(module)
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            size = f", proj_size={module.proj_size}" if projects else ""
            others.append(f"{name or 'the model'} ({type(module).__name__}{size})")
    if not networks:
        left = f"; left alone: {', '.join(others)}" if others else ""
        raise ValueError(f"there is no nn.RNN, nn.GRU or nn.LSTM to swap inside {type(model).__name__}{left}")
    if others:
        warnings.warn(
            f"swap_ left alone: {', '.join(others)}; only nn.RNN, nn.GRU and nn.LSTM (without projections) can be",
            UserWarning,
            stacklevel=2,
        )
    classes = [
        type(module) if isinstance(module, Perturbed) else _replaced_class(type(module), *_pair(module))
        for module in networks
    ]
    for module, replaced in zip(networks, classes, strict=True):
        if not isinstance(module, Perturbed):
            # The class changes, the object stays: references to it and to its parameters remain valid.
            module.__class__ = replaced
            vars(module)["_record"] = Record()
            # What `estimate_grad_` has taught it stays.
            vars(module).setdefault("_estimator_state", Kept())
        vars(module)["perturbation"] = chosen
        let_dynamo_trace()
    return len(networks)


def unswap_(model: nn.Module) -> int:
    """Turn every `anpgpu.RNN`, `GRU` and `LSTM` inside a model back into torch's, in place, with the same parameters.

    Returns:
        Number of modules turned back.

    Raises:
        TypeError: `model` is no module, or such a module is of a class derived from anpgpu's; the model is then
            unchanged.
    """
    networks = [module for module in module_of("model", model).modules() if isinstance(module, Perturbed)]
    classes = [_replaced_class(type(module), *reversed(_pair(module))) for module in networks]
    for module, replaced in zip(networks, classes, strict=True):
        module.__class__ = replaced  # type: ignore[assignment]
        for name in ("perturbation", "_record", "_estimator_state"):
            vars(module).pop(name)
    return len(networks)


def _pair(module: nn.Module) -> tuple[type[nn.Module], type[nn.Module]]:
    """Return torch's class of a recurrent network and ours."""
    return next((torchs, ours) for torchs, ours in SWAPPED.items() if isinstance(module, torchs))


def _replaced_class(current: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return a module's class with `old` replaced by `new`, also where `parametrize` made a subclass of `old`.

    Raises:
        TypeError: `current` is another subclass of `old`, whose own forward would be lost or would bypass `new`'s.
    """
    if current is old:
        return new
    if current.__bases__ == (old,) and current.__name__.startswith("Parametrized"):
        return type(f"Parametrized{new.__name__}", (new,), dict(vars(current)))
    torchs = old if old in SWAPPED else new
    ours = new if old in SWAPPED else old
    raise TypeError(
        f"{current.__module__}.{current.__qualname__} is a subclass of torch.nn.{torchs.__name__} and cannot be "
        f"swapped; derive it from anpgpu.{ours.__name__} instead"
    )
