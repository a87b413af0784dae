"""The ops on tensors: `noise`, `rollout`, `returns`, `adjoint`.

Shapes: T time steps, B batch, P rollouts per sample, H hidden units, O outputs; time first. The equations stand in
`anpgpu.kernels.noise`, `.rollout` and `.adjoint`. Each op runs where its tensors are; `backend=` chooses another
implementation ("triton", "cupy", "numba", "torch") and raises where that is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .kernels.loss import CrossEntropyLoss, LinearLoss, Loss, OutputsOnly, SquaredLoss
from .kernels.noise import Counters, Purpose
from .kernels.rollout import Rollout, RolloutOptions
from .operators import loss_arguments, underived
from .perturbation import BACKENDS, NOISES, one_of, real, whole
from .settings import CELL_FORMS, WEIGHT_BY

__all__ = [
    "Counters",
    "CrossEntropyLoss",
    "LinearLoss",
    "OutputsOnly",
    "Purpose",
    "Rollout",
    "SquaredLoss",
    "adjoint",
    "noise",
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
        device: where to make it; the default is the seed's device, or the CPU.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Raises:
        ValueError, TypeError: an argument is out of its range; the message quotes it.

    Source: Philox4x32-10, Salmon et al. 2011.
    """
    one_of("kind", kind, NOISES)
    one_of("backend", backend, BACKENDS)
    sizes = _shape(shape)
    if dtype not in {torch.float16, torch.bfloat16, *checks.WORKING}:
        raise TypeError(f"dtype must be a floating type, got {dtype!r}")
    checks.sigma(sigma, dtype)
    place = checks.place(device) if device is not None else getattr(seed, "device", torch.device("cpu"))
    key = checks.seed(seed, place)
    where = checks.counters(counters, sizes, kind)
    made: Tensor = underived(torch.ops.anpgpu.noise, key, sizes, float(sigma), kind, list(where), dtype, backend)
    return made


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
    precision: str = "auto",
    store_delta_a: bool = True,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
    backend: str = "auto",
) -> Rollout:
    """Run perturbed rollouts of a layer in deviation form.

    Args:
        preact: clean pre-activations a, (T, B, H), float32 or float64.
        hidden: clean states h = phi(a), (T, B, H).
        weight_hh: recurrent matrix, (H, H).
        loss: `LinearLoss`, `SquaredLoss`, `CrossEntropyLoss`, `OutputsOnly`, or None.
        seed: the noise's key, an int or a 0-dim int64 tensor.
        rollouts: P.
        sigma: standard deviation of the noise, positive, in units of the pre-activations.
        noise: "rademacher" or "gaussian".
        nonlinearity: "tanh" or "relu".
        precision: operands of the recurrent product; "auto" is bf16 on CUDA, the tensors' type elsewhere.
        store_delta_a: whether to return delta_a.
        counters: global indices of the first step, sample and rollout.
        delta_h0: deviation of the state before the first step, (B, P, H); None is zero.
        backend: "auto", "triton", "cupy", "numba" or "torch".

    Returns:
        `Rollout`: delta_loss (T, B, P), delta_a (T, B, P, H) or None, the last delta_h (B, P, H), and with
        `OutputsOnly` delta_o (T, B, P, O).

    Raises:
        ValueError, TypeError: an argument does not fit; the message quotes it.

    Source: arXiv:2405.08967; deviation form derived in `anpgpu.kernels.rollout`.
    """
    clean = checks.working("preact", preact, 3)
    time, batch, units = clean.shape
    checks.shaped("hidden", hidden, (time, batch, units), clean)
    checks.shaped("weight_hh", weight_hh, (units, units), clean)
    checks.loss(loss, clean)
    whole("rollouts", rollouts, 1, 2**32)
    if delta_h0 is not None:
        checks.shaped("delta_h0", delta_h0, (batch, rollouts, units), clean)
    checks.flag("store_delta_a", store_delta_a)
    options = _options(clean, rollouts, sigma, noise, nonlinearity, precision)
    where = checks.counters(counters, (time, batch, rollouts, units), noise)
    one_of("backend", backend, BACKENDS)
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
        rollouts,
        options.sigma,
        noise,
        nonlinearity,
        options.precision,
        store_delta_a,
        list(where),
        backend,
    )
    return Rollout(
        None if name in {"none", "outputs"} else delta_loss,
        delta_a if store_delta_a else None,
        delta_h,
        delta_o if name == "outputs" else None,
    )


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Return the credit c_t = delta_loss_t + discount c_{t+1}, (T, B, P).

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
    one_of("backend", backend, BACKENDS)
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
    """Return the estimate of the adjoint dL/da, (T, B, H): the mean over rollouts of what each says.

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
    one_of("method", method, tuple(WEIGHT_BY))
    if method == "anp":
        activity = checks.tensor("delta_a", delta_a)
        if activity.dim() != 4 or activity.shape[:3] != change.shape:
            raise ValueError(f"delta_a must have shape {(*change.shape, 'H')}, got {tuple(activity.shape)}")
        if not activity.is_floating_point():
            raise TypeError(f"delta_a must be floating, got {activity.dtype}")
        if activity.device != change.device:
            raise ValueError(f"delta_a must be on {change.device}, where credit is, got {activity.device}")
        units = activity.shape[-1]
    elif delta_a is not None:
        raise ValueError(f"method='np' regenerates its noise and takes delta_a=None, got {type(delta_a).__name__}")
    if units is None:
        raise ValueError("units, the number of hidden units, must be given where delta_a is None")
    whole("units", units, 1)
    time, batch, rollouts = change.shape
    options = _options(change, rollouts, sigma, noise, "tanh", "auto")
    one_of("backend", backend, BACKENDS)
    sums: Tensor = underived(
        torch.ops.anpgpu.adjoint,
        change,
        delta_a,
        checks.seed(seed, change.device),
        WEIGHT_BY[method],
        units,
        options.sigma,
        noise,
        options.precision,
        list(checks.counters(counters, (time, batch, rollouts, units), noise)),
        backend,
    )
    return sums.sum(0) / rollouts


def _options(
    like: Tensor, rollouts: int, sigma: float, noise: str, nonlinearity: str, precision: str
) -> RolloutOptions:
    """Return the checked scalars of a block of rollouts."""
    one_of("noise", noise, NOISES)
    one_of("nonlinearity", nonlinearity, tuple(CELL_FORMS))
    one_of("precision", precision, OPERANDS)
    checks.sigma(sigma, like.dtype)
    if like.dtype == torch.float64 and precision not in {"auto", "fp64"}:
        raise ValueError(f"precision={precision!r} does not go with float64 tensors")
    if like.dtype != torch.float64 and precision == "fp64":
        raise ValueError(f"precision='fp64' needs float64 tensors, got {like.dtype}")
    if precision == "auto":
        precision = "fp64" if like.dtype == torch.float64 else "bf16" if like.is_cuda else "fp32"
    return RolloutOptions(rollouts, float(sigma), noise, CELL_FORMS[nonlinearity], precision)


def _shape(shape: object) -> tuple[int, int, int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 4:
        raise ValueError(f"shape must be (T, B, P, H), got {shape!r}")
    for name, size, low in zip("TBPH", shape, (1, 0, 1, 1), strict=True):
        whole(f"shape's {name}", size, low)
    return tuple(shape)
