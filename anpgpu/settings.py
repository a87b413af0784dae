"""From a `Perturbation` and some parameters to what actually runs: types, backend, seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import sigma_range
from .dispatch import choose_backend
from .kernels.cell import RELU, TANH
from .kernels.rollout import RolloutOptions
from .perturbation import Perturbation
from .sharding import Share, share_of

PRECISION_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

CELL_FORMS = {"tanh": TANH, "relu": RELU}
"""Cells by the name of their nonlinearity in PyTorch."""

WEIGHT_BY = {"np": "noise", "anp": "activity"}
"""What the return of a rollout weights, by the method."""


class Settings(NamedTuple):
    """A `Perturbation` resolved for given parameters."""

    method: str
    discount: float
    ridge: float
    baseline: bool
    rank: int | None
    options: RolloutOptions
    """`rollouts` is the number this process runs."""
    backend: str
    process_rank: int
    share: Share

    @property
    def parts(self) -> int:
        """How many parts the estimates come in; see `layers.GradientSums`."""
        return 3 if self.method == "anp-ls" else 2


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of deviations, losses and sums: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve(perturbation: Perturbation, nonlinearity: str, weight: Tensor) -> Settings:
    """Resolve a perturbation for a layer's parameters, under the ambient autocast.

    Raises:
        ImportError: the requested backend is missing.
        ValueError: it cannot run on the parameters' device or type, or has fewer rollouts than processes to share them.
        RuntimeError: rollouts are to be shared, but there is no process group.
    """
    if not weight.is_floating_point():
        raise TypeError(f"perturbation learning needs floating parameters, got {weight.dtype}; use method='bptt'")
    dtype = working_dtype(weight.dtype)
    least, most = sigma_range(dtype)
    if not least <= perturbation.sigma <= most:
        raise ValueError(f"sigma must be in [{least}, {most}] for {dtype}, got {perturbation.sigma!r}")
    precision = perturbation.precision
    if dtype == torch.float64:
        if precision != "auto":
            raise ValueError(f"precision={precision!r} does not go with float64 parameters, which use float64 operands")
        precision = "fp64"
    elif precision == "auto":
        kind = weight.device.type
        # The meta device has no autocast, and torch raises when asked.
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            precision = PRECISION_OF[torch.get_autocast_dtype(kind)]
        elif kind == "cuda":
            precision = "bf16"
        else:
            precision = PRECISION_OF.get(weight.dtype, "fp32")
    share = share_of(
        perturbation.rollouts, shared=perturbation.shard_rollouts, by_samples=perturbation.method == "anp-ls"
    )
    options = RolloutOptions(
        rollouts=share.own.stop - share.own.start,
        sigma=float(perturbation.sigma),
        noise=perturbation.noise,
        cell=CELL_FORMS[nonlinearity],
        precision=precision,
    )
    return Settings(
        method=perturbation.method,
        discount=float(perturbation.discount),
        ridge=float(perturbation.ridge),
        baseline=perturbation.baseline,
        rank=perturbation.rank,
        options=options,
        backend=choose_backend(perturbation.backend, weight.device, dtype),
        process_rank=0 if perturbation.shard_rollouts else process_rank(),
        share=share,
    )


def process_rank() -> int:
    """Return this process's rank in torch.distributed, 0 outside it: part of every noise counter."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def new_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw the 64-bit seed of one update, a 0-dim int64 tensor: the only draw perturbation learning makes."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    where = device if generator is None else generator.device
    seed = torch.empty((), dtype=torch.int64, device=where).random_(-(2**63), None, generator=generator)
    return seed.to(device)
