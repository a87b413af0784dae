"""The knobs of perturbation learning, validated once, on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import flag, one_of, real, whole
from .registry import BACKENDS, ESTIMATORS

NOISES = ("rademacher", "gaussian")
READOUTS = ("exact", "perturbed")
PRIORS = ("learned", "known", "none")
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
AUTO = "auto"
"""Chooses the backend by the tensors' device; see `runtime.dispatch`."""


@dataclass(frozen=True)
class Perturbation:
    """How gradients are estimated from perturbed rollouts; `profiling/study_defaults.py` chose the defaults.

    Attributes:
        method: "anp-ls" (least-squares activity-based node perturbation), "anp-feedback" (the same against a learned
            feedback matrix, which the module keeps from update to update: few rollouts are enough), "anp"
            (activity-based node perturbation), "np" (node perturbation), "wp" (weight perturbation) or "bptt" (exact,
            by autograd: the baseline). For comparison, only in `estimate_grad_`: "published-anp", "published-np",
            "published-wp", the rules as published. They need rollouts=1 and noise="gaussian", credit each step with
            its own loss and perturb the readout; they ignore `discount` and `readout`.
        rollouts: perturbed rollouts per sample, at least 1. More rollouts, less variance.
        sigma: standard deviation of the injected noise. Rollouts carry deviations, so small values lose no precision.
        noise: "rademacher" (+-sigma) or "gaussian".
        discount: weight of later losses in a perturbation's return, in [0, 1]: with 0 only the loss of its own step
            counts, as published; with 1 the whole rest of the sequence. For "anp" and "np" a value below 1 trades bias
            for variance; "anp-ls" does not need it. "wp" and "bptt" do not use it.
        ridge: regularisation of "anp-ls" and "anp-feedback", relative to the mean squared activity difference of a
            rollout.
        rank: rank of the weight noise of "wp"; None is dense.
        readout: "exact" computes the readout's gradient in closed form, "perturbed" estimates it from perturbed
            outputs. Only `estimate_grad_` uses it.
        precision: operand type of the rollouts' matrix products: "bf16", "fp16", "tf32", "fp32", or "auto" (float64 for
            float64 parameters, the autocast dtype under autocast, bf16 on CUDA, float32 on the CPU). Triton's weight
            gradients are float32 with "fp32", and otherwise round their operands to TF32.
        backend: "triton", "cupy", "numba", "torch", or "auto": triton for CUDA tensors; numba for float32 on the
            CPU, where it is installed; torch otherwise.
        max_memory: bytes the rollouts may use; None is an eighth of the device's total memory. Processes that share
            rollouts all use the smallest limit among them.
        shard_rollouts: split the rollouts between the processes of torch.distributed's default group, which all hold
            the same model and the same batch; the update equals that of a single process, up to rounding. "anp-ls"
            splits samples instead. Use False with DistributedDataParallel, where each process has its own samples.
        baseline: subtract the mean return of the other rollouts from each rollout's return. It helps where sigma is
            large (0.1 and more) and all rollouts raise the loss alike, and changes little where sigma is small (least
            squares loses one of its equations); see `profiling/study_variance.py`. It needs two rollouts. "wp" and
            "bptt" do not use it.
        split_half: whether "anp-ls" also estimates from each half of the rollouts alone, for `Estimate.split_half`;
            it takes time. "anp", "np" and "wp" always report it, "anp-feedback" never.
        prior: the prior mean of "anp-feedback", for ablations: "learned"; "known", what is known without feedback:
            dL/dh_t of the step's own loss, in an RNN times phi'(a_t), in a GRU with what passes the update gate; or
            "none", which is "anp-ls".
        warmup: estimates by which "anp-feedback" learns its feedback matrix before a module's first update, which takes
            that many times as long, and as many more calls of a callable loss.
        follow_weights: whether the feedback matrix of "anp-feedback" makes the recurrent weights' own steps.

    Raises:
        ValueError: a value is outside its range; the message quotes it.
        TypeError: a value is of the wrong type.
    """

    method: str = "anp-ls"
    rollouts: int = 32
    sigma: float = 1e-3
    noise: str = "rademacher"
    discount: float = 1.0
    ridge: float = 0.01
    rank: int | None = 1
    readout: str = "exact"
    precision: str = "auto"
    backend: str = "auto"
    max_memory: int | None = None
    shard_rollouts: bool = False
    baseline: bool = False
    split_half: bool = False
    prior: str = "learned"
    warmup: int = 30
    follow_weights: bool = True

    def __post_init__(self) -> None:
        estimator = ESTIMATORS.find(self.method)
        one_of("noise", self.noise, NOISES)
        one_of("readout", self.readout, READOUTS)
        one_of("precision", self.precision, PRECISIONS)
        check_backend(self.backend)
        whole("rollouts", self.rollouts, 1, 2**32)
        if self.rank is not None:
            whole("rank", self.rank, 1, 2**32)
        if self.max_memory is not None:
            whole("max_memory", self.max_memory, 1)
        one_of("prior", self.prior, PRIORS)
        whole("warmup", self.warmup, 0)
        for name in ("baseline", "split_half", "shard_rollouts", "follow_weights"):
            flag(name, getattr(self, name))
        if self.baseline and self.rollouts < 2:
            raise ValueError(f"baseline=True needs at least 2 rollouts, got rollouts={self.rollouts!r}")
        if not (0 < real("sigma", self.sigma) < math.inf):
            raise ValueError(f"sigma must be positive and finite, got {self.sigma!r}")
        if not 0 <= real("discount", self.discount) <= 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount!r}")
        if not 0 <= real("ridge", self.ridge) < math.inf:
            raise ValueError(f"ridge must be finite and not negative, got {self.ridge!r}")
        estimator.check(self)


def check_perturbation(perturbation: Perturbation | None) -> Perturbation:
    """Return the perturbation, by default `Perturbation()`; raise TypeError for anything else."""
    if perturbation is None:
        return Perturbation()
    if not isinstance(perturbation, Perturbation):
        raise TypeError(f"perturbation must be an anpgpu.Perturbation, got {perturbation!r}")
    return perturbation


def check_backend(backend: object) -> None:
    """Raise unless `backend` is the name of a backend, or "auto"."""
    # An array would compare element by element.
    if not isinstance(backend, str) or backend != AUTO:
        BACKENDS.find(backend, also=(AUTO,))
