"""`swap_` and `unswap_`: perturbation learning in and out of an existing model."""

from __future__ import annotations

import warnings

from torch import nn

from .checks import module_of
from .estimators.kept import Kept
from .modules import RNN, Record, let_dynamo_trace
from .perturbation import Perturbation, check_perturbation


def swap_(model: nn.Module, perturbation: Perturbation | None = None) -> int:
    """Replace every `torch.nn.RNN` inside a model, in place, by an `anpgpu.RNN` with the same parameters.

    Parameters stay the same objects, so an existing optimiser goes on working; hooks and names stay too. An
    `anpgpu.RNN` that is already there takes the new perturbation. The model itself may be the RNN. Recurrent modules
    that cannot be swapped (LSTM, GRU, cells) are left alone, and a warning names them.

    Args:
        model: any module.
        perturbation: how gradients are estimated; the default is `Perturbation()`.

    Returns:
        Number of RNNs that now learn by perturbation.

    Raises:
        ValueError: there is no `torch.nn.RNN` inside the model; the message names the recurrent modules that are.
        TypeError: `model` is no module, `perturbation` no `Perturbation`, or an RNN of the model is of a class derived
            from `torch.nn.RNN`; the model is then unchanged.
    """
    chosen = check_perturbation(perturbation)
    networks = [module for module in module_of("model", model).modules() if isinstance(module, nn.RNN)]
    others = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(module, nn.RNN)
    ]
    if not networks:
        left = f"; left alone: {', '.join(others)}" if others else ""
        raise ValueError(f"there is no nn.RNN to swap inside {type(model).__name__}{left}")
    if others:
        warnings.warn(f"swap_ left alone: {', '.join(others)}; only nn.RNN can be swapped", UserWarning, stacklevel=2)
    for module in networks:
        if not isinstance(module, RNN):
            _replaced_class(type(module), nn.RNN, RNN)
    for module in networks:
        if not isinstance(module, RNN):
            # The class changes, the object stays: references to it and to its parameters remain valid.
            module.__class__ = _replaced_class(type(module), nn.RNN, RNN)  # type: ignore[assignment]
            vars(module).update(_record=Record(), _estimator_state=Kept())
        vars(module)["perturbation"] = chosen
        let_dynamo_trace()
    return len(networks)


def unswap_(model: nn.Module) -> int:
    """Turn every `anpgpu.RNN` inside a model back into a `torch.nn.RNN`, in place, with the same parameters.

    Returns:
        Number of RNNs turned back.

    Raises:
        TypeError: `model` is no module.
    """
    networks = [module for module in module_of("model", model).modules() if isinstance(module, RNN)]
    for module in networks:
        module.__class__ = _replaced_class(type(module), RNN, nn.RNN)  # type: ignore[assignment]
        for name in ("perturbation", "_record", "_estimator_state"):
            vars(module).pop(name)
    return len(networks)


def _replaced_class(current: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """Return a module's class with `old` replaced by `new`, also where `parametrize` made a subclass of `old`.

    Raises:
        TypeError: `current` is another subclass of `old`, whose own forward would be lost or would bypass `new`'s.
    """
    if current is old:
        return new
    if current.__bases__ == (old,) and current.__name__.startswith("Parametrized"):
        return type(f"Parametrized{new.__name__}", (new,), dict(vars(current)))
    raise TypeError(
        f"{current.__module__}.{current.__qualname__} is a subclass of torch.nn.RNN and cannot be swapped; "
        "derive it from anpgpu.RNN instead"
    )
