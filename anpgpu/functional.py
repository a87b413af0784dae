"""The ops on tensors: `noise`, `rollout`, `returns`, `adjoint`, `least_squares`; and `release_memory`.

Shapes: T time steps, B batch, P rollouts per sample, H hidden units, O outputs; time first. Equations:
`anpgpu.kernels.noise`, `.rollout`, `.adjoint` and `.least_squares`. Each op runs on its tensors' device; `backend=`
chooses an implementation ("triton", "cupy", "numba", "torch") and raises where it is missing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .checks import one_of, real, whole
from .kernels.cell import TANH
from .kernels.loss import CrossEntropyLoss, LinearLoss, Loss, OutputsOnly, SquaredLoss
from .kernels.noise import Counters, Purpose
from .kernels.rollout import Rollout, RolloutOptions
from .kernels.scratch import release
from .ops.tensors import loss_arguments, option_scalars, underived
from .perturbation import NOISES, check_backend
from .registry import CELLS, ESTIMATORS

__all__ = [
    "Counters",
    "CrossEntropyLoss",
    "LinearLoss",
    "OutputsOnly",
    "Purpose",
    "Rollout",
    "SquaredLoss",
    "adjoint",
    "least_squares",
    "noise",
    "release_memory",
    "returns",
    "rollout",
]

OPERANDS = ("auto", "bf16", "fp16", "tf32", "fp32", "fp64")


def noise(
    seed: int | Tensor,
    shape: tuple[int, int, int, int],
    *,
    sigma: float = 1.0,
    kind: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the noise xi that a rollout injects, (T, B, P, H).

    Args:
        seed: 64-bit key, an int or a 0-dim int64 tensor.
        shape: (T, B, P, H), each at least 1; B may be 0.
        sigma: standard deviation, positive.
        kind: "rademacher" or "gaussian".
        counters: global indices of element (0, 0, 0, 0).
        dtype: floating type of the result.
        device: of the result; the default is the seed's device, or the CPU for an int.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Raises:
        ValueError, TypeError: an argument is out of its range; the message quotes it.

    Source: Philox4x32-10, Salmon et al. 2011.
    """
    one_of("kind", kind, NOISES)
    check_backend(backend)
    sizes = _shape(shape)
    if dtype not in {torch.float16, torch.bfloat16, *checks.WORKING}:
        raise TypeError(f"dtype must be a floating type, got {dtype!r}")
    checks.sigma(sigma, dtype)
    place = checks.place(device) if device is not None else getattr(seed, "device", torch.device("cpu"))
    key = checks.seed(seed, place)
    where = checks.counters(counters, sizes, kind)
    result: Tensor = underived(torch.ops.anpgpu.noise, key, sizes, float(sigma), kind, list(where), dtype, backend)
    return result


def rollout(  # noqa: PLR0913  (an op on tensors: every argument is a keyword with a default)
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: int | Tensor,
    *,
    rollouts: int,
    sigma: float = 1e-3,
    noise: str = "rademacher",
    nonlinearity: str = "tanh",
    cell: str | None = None,
    precision: str = "auto",
    store_delta_a: bool = True,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
    backend: str = "auto",
) -> Rollout:
    """Run perturbed rollouts of a layer in deviation form.

    Args:
        preact: clean pre-activations a, (T, B, H), float32 or float64. Of a gated cell its clean values, (T, B, 5 H):
            a_r, a_z, a_n, q = W_hn h' + b_hn and h' of a GRU; a_i, a_f, a_g, a_o and c' of an LSTM; h' and c' are the
            state before the step.
        hidden: clean states h = phi(a), (T, B, H); of an LSTM h and c, (T, B, 2 H).
        weight_hh: recurrent matrix, (H, H); (3 H, H) of a GRU, (4 H, H) of an LSTM.
        loss: `LinearLoss`, `SquaredLoss`, `CrossEntropyLoss`, `OutputsOnly`, or None.
        seed: the noise's key, an int or a 0-dim int64 tensor.
        rollouts: P.
        sigma: standard deviation of the noise, positive, in units of the pre-activations; in a gated cell of h.
        noise: "rademacher" or "gaussian".
        nonlinearity: "tanh" or "relu"; not read where `cell` is given.
        cell: "tanh", "relu", "gru" or "lstm"; None is `nonlinearity`.
        precision: operands of the recurrent product; "auto" is bf16 on CUDA, the tensors' type elsewhere.
        store_delta_a: whether to return delta_a.
        counters: global indices of the first step, sample and rollout.
        delta_h0: deviation of the state before the first step, (B, P, H), of an LSTM (B, P, 2 H); None is zero.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Returns:
        `Rollout`: delta_loss (T, B, P), delta_a (T, B, P, H) or None, the last delta_h (B, P, H), and with
        `OutputsOnly` delta_o (T, B, P, O). Of a gated cell delta_a is the deviation of the states, own noise included,
        and in an LSTM it and delta_h have 2 H columns, delta_h and delta_c.

    Raises:
        ValueError, TypeError: an argument does not fit; the message quotes it.

    Source: arXiv:2405.08967; deviation form derived in `anpgpu.kernels.rollout`.
    """
    clean = checks.working("preact", preact, 3)
    name_of_cell = ("nonlinearity", nonlinearity) if cell is None else ("cell", cell)
    forms = CELLS.find(name_of_cell[1], name_of_cell[0]).forms
    time, batch, columns = clean.shape
    if columns % forms.clean:
        raise ValueError(
            f"preact must have {forms.clean} values of each unit of cell {forms.name!r}, (T, B, {forms.clean} H), got "
            f"{tuple(clean.shape)}"
        )
    units = columns // forms.clean
    size = units * forms.states
    checks.shaped("hidden", hidden, (time, batch, size), clean)
    checks.shaped("weight_hh", weight_hh, (units * forms.gates, units), clean)
    # The gradient of a linear loss may reach the whole state.
    reaches = isinstance(loss, LinearLoss) and getattr(loss.grad, "shape", (0,))[-1:] == (size,)
    checks.loss(loss, hidden if reaches else hidden[..., :units])
    whole("rollouts", rollouts, 1, 2**32)
    if delta_h0 is not None:
        checks.shaped("delta_h0", delta_h0, (batch, rollouts, size), clean)
    checks.flag("store_delta_a", store_delta_a)
    options = _options(clean, rollouts, sigma, noise, forms.name, precision)._replace(store_delta_a=store_delta_a)
    where = checks.counters(counters, (time, batch, rollouts, units), noise)
    check_backend(backend)
    name, tensors = loss_arguments(loss)
    delta_loss, delta_a, delta_h, delta_o = underived(
        torch.ops.anpgpu.rollout,
        clean,
        hidden,
        weight_hh,
        checks.seed(seed, clean.device),
        delta_h0,
        *tensors,
        name,
        *option_scalars(options),
        list(where),
        backend,
    )
    measured = loss is not None and loss.measured
    return Rollout(
        delta_loss if measured else None,
        delta_a if store_delta_a else None,
        delta_h,
        None if loss is None or measured else delta_o,
    )


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Return the discounted return c_t = delta_loss_t + discount c_{t+1}, (T, B, P): each rollout's credit.

    Args:
        delta_loss: (T, B, P), float32 or float64.
        discount: gamma in [0, 1].
        carry: the return of the step after the last, (B, P); None is zero.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Raises:
        ValueError, TypeError: an argument does not fit; the message quotes it.
    """
    change = checks.working("delta_loss", delta_loss, 3)
    if not 0 <= real("discount", discount) <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount!r}")
    if carry is not None:
        checks.shaped("carry", carry, tuple(change.shape[1:]), change)
    check_backend(backend)
    credit: Tensor = underived(torch.ops.anpgpu.returns, change, carry, float(discount), backend)
    return credit


def adjoint(
    credit: Tensor,
    delta_a: Tensor | None,
    seed: int | Tensor,
    *,
    method: str = "anp",
    units: int | None = None,
    sigma: float = 1e-3,
    noise: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    backend: str = "auto",
) -> Tensor:
    """Return the estimate of the adjoint dL/da, (T, B, H): the mean over rollouts of credit times noise or activity.

    Args:
        credit: returns c, (T, B, P), float32 or float64.
        delta_a: activity differences, (T, B, P, H), for "anp"; None for "np", which regenerates its noise.
        seed: the noise's key, as in `rollout`.
        method: "anp" (c H delta_a / ||delta_a||^2) or "np" (c xi / sigma^2).
        units: H, needed where delta_a is None.
        sigma: standard deviation of the noise, as in `rollout`.
        noise: kind of noise, as in `rollout`.
        counters: as in `rollout`.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Raises:
        ValueError, TypeError: an argument does not fit; the message quotes it.

    Source: arXiv:2405.08967 ("anp"), arXiv:2310.00965 ("np").
    """
    change = checks.working("credit", credit, 3)
    weight_by = _weight_by(method)
    if ESTIMATORS[method].stores_delta:
        units = _activity(delta_a, change, "credit").shape[-1]
    elif delta_a is not None:
        kind = type(delta_a).__name__
        raise ValueError(f"method={method!r} regenerates its noise and takes delta_a=None, got {kind}")
    if units is None:
        raise ValueError("units, the number of hidden units, must be given where delta_a is None")
    whole("units", units, 1)
    time, batch, rollouts = change.shape
    options = _options(change, rollouts, sigma, noise)
    check_backend(backend)
    sums: Tensor = underived(
        torch.ops.anpgpu.adjoint,
        change,
        delta_a,
        checks.seed(seed, change.device),
        weight_by,
        units,
        options.sigma,
        noise,
        options.precision,
        list(checks.counters(counters, (time, batch, rollouts, units), noise)),
        backend,
    )
    return sums.sum(0) / rollouts


def least_squares(
    delta_loss: Tensor,
    delta_a: Tensor,
    seed: int | Tensor,
    *,
    discount: float = 1.0,
    ridge: float = 0.01,
    baseline: bool = False,
    sigma: float = 1e-3,
    noise: str = "rademacher",
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    carry: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the estimate of the adjoint dL/da by "anp-ls", (T, B, H), and the carry for the steps before, (B, P).

    The returns of a sample's rollouts are regressed on their activity differences, last step first, and lose what later
    noise did. A rollout that is not finite makes the estimates of its sample so: set its `delta_loss` and `delta_a`
    to zero to leave it out.

    Args:
        delta_loss: loss differences, (T, B, P), float32 or float64.
        delta_a: activity differences, (T, B, P, H), floating.
        seed: the noise's key, as in `rollout`.
        discount: gamma in [0, 1].
        ridge: regularisation relative to the mean squared activity difference of a rollout, at least 0.
        baseline: whether the mean return of a sample's rollouts is taken off first.
        sigma: standard deviation of the noise, as in `rollout`.
        noise: kind of noise, as in `rollout`.
        counters: as in `rollout`.
        carry: what this function returned for the steps after these, (B, P); None is zero.
        backend: "auto", "triton", "cupy", "numba" or "torch"; it generates the noise, and numba runs the recursion.

    Raises:
        ValueError, TypeError: an argument does not fit; the message quotes it.

    Source: derived in `anpgpu.kernels.least_squares`.
    """
    change = checks.working("delta_loss", delta_loss, 3)
    units = _activity(delta_a, change, "delta_loss").shape[-1]
    whole("delta_a's H", units, 1)
    time, batch, rollouts = change.shape
    if not 0 <= real("discount", discount) <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount!r}")
    if not 0 <= real("ridge", ridge) < math.inf:
        raise ValueError(f"ridge must be finite and not negative, got {ridge!r}")
    checks.flag("baseline", baseline)
    if carry is not None:
        checks.shaped("carry", carry, (batch, rollouts), change)
    options = _options(change, rollouts, sigma, noise)
    check_backend(backend)
    adjoint, before = underived(
        torch.ops.anpgpu.least_squares,
        change,
        delta_a,
        change.new_zeros((batch, rollouts)) if carry is None else carry,
        checks.seed(seed, change.device),
        float(discount),
        float(ridge),
        baseline,
        options.sigma,
        noise,
        list(checks.counters(counters, (time, batch, rollouts, units), noise)),
        backend,
    )
    return adjoint, before


def release_memory() -> int:
    """Give back what updates on the CPU left allocated for the next one, up to 256 MiB; return how many bytes."""
    return release()


def _activity(delta_a: object, change: Tensor, name: str) -> Tensor:
    """Return activity differences, (T, B, P, H), that fit credit or loss differences of that name; raise otherwise."""
    activity = checks.tensor("delta_a", delta_a)
    if activity.dim() != 4 or activity.shape[:3] != change.shape:
        raise ValueError(f"delta_a must have shape {(*change.shape, 'H')}, got {tuple(activity.shape)}")
    if not activity.is_floating_point():
        raise TypeError(f"delta_a must be floating, got {activity.dtype}")
    if activity.device != change.device:
        raise ValueError(f"delta_a must be on {change.device}, where {name} is, got {activity.device}")
    return activity


def _weight_by(method: str) -> str:
    """Return what multiplies a rollout's credit, "noise" or "activity", in a method that is a mean of products."""
    weighted = {name: getattr(rule, "weight_by", None) for name, rule in ESTIMATORS.items()}
    products: dict[str, str] = {name: weight_by for name, weight_by in weighted.items() if weight_by is not None}
    one_of("method", method, tuple(products))
    return products[method]


def _options(
    like: Tensor,
    rollouts: int,
    sigma: float,
    noise: str,
    nonlinearity: str = TANH.name,
    precision: str = "auto",
) -> RolloutOptions:
    """Check the scalars of a block of rollouts and return them."""
    one_of("noise", noise, NOISES)
    cell = CELLS.find(nonlinearity, "nonlinearity")
    one_of("precision", precision, OPERANDS)
    checks.sigma(sigma, like.dtype)
    if like.dtype == torch.float64 and precision not in {"auto", "fp64"}:
        raise ValueError(f"precision={precision!r} does not go with float64 tensors")
    if like.dtype != torch.float64 and precision == "fp64":
        raise ValueError(f"precision='fp64' needs float64 tensors, got {like.dtype}")
    if precision == "auto":
        precision = "fp64" if like.dtype == torch.float64 else "bf16" if like.is_cuda else "fp32"
    return RolloutOptions(rollouts, float(sigma), noise, cell.forms, precision)


def _shape(shape: object) -> tuple[int, int, int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        raise ValueError(f"shape must be (T, B, P, H), got {shape!r}")
    for name, size, low in zip("TBPH", shape, (1, 0, 1, 1), strict=True):
        whole(f"shape's {name}", size, low)
    return tuple(shape)
