"""Resolves a `Perturbation` for given parameters: types, backend, share of the rollouts, seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anpgpu.checks import SIGMA_RANGES
from anpgpu.kernels.noise import COUNTER_LIMITS
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.perturbation import Perturbation
from anpgpu.registry import ESTIMATORS, Estimator

from .dispatch import choose_backend, weight_gradients_on
from .memory import Shape
from .processes import Share, share_of

PRECISION_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class Settings(NamedTuple):
    """A `Perturbation` resolved for given parameters."""

    method: str
    """The estimator's name, for messages."""
    estimator: type[Estimator]
    discount: float
    ridge: float
    baseline: bool
    parts: int
    """Of gradients, see `registry.Estimator.parts`."""
    rank: int | None
    options: RolloutOptions
    """Here `rollouts` is the number that this process runs."""
    backend: str
    weight_gradients: Callable[..., list[Tensor]]
    """The backend's form of it."""
    process_rank: int
    share: Share
    prior: str
    warmup: int
    follow_weights: bool
    kept: Any = None
    """What the module keeps between updates, of an estimator that keeps a state."""

    def shape(
        self,
        *,
        time: int,
        batch: int,
        hidden: int,
        itemsize: int,
        outputs: int = 0,
        clean_floats: int = 0,
        layers: int = 1,
        at_once: bool = False,
    ) -> Shape:
        """Return what the memory of a layer's rollouts depends on; see `memory.Shape` for the arguments.

        at_once: whether activity can be credited only once all rollouts of a sample have run.
        """
        return Shape(
            time=time,
            batch=batch,
            rollouts=self.share.most,
            hidden=hidden,
            outputs=outputs,
            stores_delta=self.estimator.stores_delta,
            whole_samples=self.estimator.whole_samples or (at_once and self.estimator.stores_delta),
            clean_floats=clean_floats,
            extra_floats=self.estimator.extra_floats(self.share.most, hidden, self.options.cell.gates),
            fixed_floats=0
            if self.kept is None
            else layers * self.estimator.state_floats(self.share.most, hidden, self.options.cell.gates),
            layers=layers,
            itemsize=itemsize,
            gates=self.options.cell.gates,
            states=self.options.cell.states,
        )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of deviations, losses and sums: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve(perturbation: Perturbation, cell: Any, weight: Tensor) -> Settings:
    """Resolve a perturbation for a layer's parameters, under the ambient autocast.

    Args:
        perturbation: the knobs.
        cell: of the layer, an entry of `registry.CELLS`.
        weight: a parameter, for its type and device.

    Raises:
        ImportError: the requested backend is missing.
        TypeError: the parameters are not floating.
        ValueError: the backend cannot run on the parameters' device or type; sigma is out of range, or precision does
            not go with their type; or there are fewer rollouts than processes that share them.
        RuntimeError: rollouts are to be shared, but there is no process group.
    """
    if not weight.is_floating_point():
        raise TypeError(f"perturbation learning needs floating parameters, got {weight.dtype}; use method='bptt'")
    dtype = working_dtype(weight.dtype)
    least, most = SIGMA_RANGES[dtype]
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
    estimator = ESTIMATORS[perturbation.method]
    if estimator.keeps_state and cell.forms.slope is None:
        raise ValueError(
            f"method={perturbation.method!r} needs a cell h = phi(a), or one that says what a step makes of dL/dh, and "
            f"{cell.forms.name!r} is neither: use method='anp-ls'"
        )
    share = share_of(perturbation.rollouts, shared=perturbation.shard_rollouts, by_samples=estimator.whole_samples)
    options = RolloutOptions(
        rollouts=share.own.stop - share.own.start,
        sigma=float(perturbation.sigma),
        noise=perturbation.noise,
        cell=cell.forms,
        precision=precision,
    )
    backend = choose_backend(perturbation.backend, weight.device, dtype, cell.forms)
    return Settings(
        method=perturbation.method,
        estimator=estimator,
        discount=float(perturbation.discount),
        ridge=float(perturbation.ridge),
        baseline=perturbation.baseline,
        parts=estimator.parts if perturbation.split_half or not estimator.halves_on_demand else 1,
        rank=perturbation.rank,
        options=options,
        backend=backend,
        weight_gradients=weight_gradients_on(backend, options.precision),
        process_rank=0 if perturbation.shard_rollouts else process_rank(),
        share=share,
        prior=perturbation.prior,
        warmup=perturbation.warmup,
        follow_weights=perturbation.follow_weights,
    )


def check_extent(layers: int, time: int, batch: int) -> None:
    """Raise ValueError where an update has more than the noise's counters can tell apart.

    Args:
        layers: layers times directions.
        time: T.
        batch: B.
    """
    for what, count, field in (
        ("layers and directions", layers, "layer"),
        ("steps", time, "time"),
        ("samples", batch, "sample"),
    ):
        if count > COUNTER_LIMITS[field]:
            raise ValueError(f"noise tells at most {COUNTER_LIMITS[field]} {what} apart, got {count}")


def process_rank() -> int:
    """Return this process's rank in torch.distributed, 0 without it; noise counters contain it."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def new_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw the 64-bit seed of one update, a 0-dim int64 tensor: its only draw from a torch generator but dropout."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    where = device if generator is None else generator.device
    seed = torch.empty((), dtype=torch.int64, device=where).random_(-(2**63), None, generator=generator)
    return seed.to(device)
