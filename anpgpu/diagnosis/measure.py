"""`diagnose`: are method, rollouts, discount and sigma right for this network and this batch?

Every setting's estimates, of several seeds, are compared with the true gradient, which backpropagation through all of
time gives. `alignment` tells bias from variance. Source: derived here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

from anpgpu import checks
from anpgpu.checks import real, whole
from anpgpu.estimate import estimate_grad_
from anpgpu.estimators.found import Estimate
from anpgpu.perturbation import Perturbation, check_perturbation
from anpgpu.registry import ESTIMATORS
from anpgpu.task.losses import LossFunction

from .advice import Diagnosis, Row, advise, cheapest, closest_sigma, cost_of, discounted
from .alignment import Alignment, alignment

PARTS = ("weight_hh", "weight_ih", "bias")
"""Kinds of parameters, by their names in `torch.nn.RNN`."""

EstimateOf = Callable[[Perturbation, "torch.Generator | None"], tuple[Tensor, Estimate]]
"""Gradients of the rnn's parameters, flat, (N,) on the CPU, and what the estimate tells besides."""


def diagnose(  # noqa: PLR0913  (a grid reads best as keywords)
    rnn: nn.RNN,
    readout: nn.Module | None,
    inputs: Tensor | PackedSequence,
    targets: Tensor | None,
    loss: str | LossFunction = "mse",
    *,
    perturbation: Perturbation | None = None,
    methods: Sequence[str] = ("anp", "anp-ls", "np"),
    rollouts: Sequence[int] = (4, 16, 64),
    discounts: Sequence[float] = (0, 0.5, 0.8, 0.9, 0.95, 1),
    sigmas: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    repeats: int = 4,
    tolerance: float = 0.05,
    seed: int = 0,
    hx: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    targets_per: str | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Compare perturbation estimates with the true gradient of this batch, and recommend a setting.

    Measured are the current setting with every sigma and every discount; then all combinations of methods, rollouts and
    discounts at the best of these sigmas; then the best of these with every sigma. All happens on copies, without
    dropout: parameters, `.grad`, buffers, modes and random generators stay as they are.

    The recommendation is the cheapest setting (in multiply-adds) whose mean cosine is within `tolerance` of the best;
    at the same cost the one with the largest discount. At the start of training most of the gradient comes from short
    delays and a small discount looks good; what the network learns then reaches further back. So diagnose again after
    some hundred updates.

    A callable loss without a gradient leaves no true gradient to compare with, and bias cannot be seen. Cosines are
    then NaN; settings are judged by how well estimates of different seeds agree, and only those with the largest
    discount, whose bias is known to be smallest, are recommended. A callable that is differentiable in part only (a
    detached term) cannot be told from one that is.

    Args:
        rnn: an `anpgpu.RNN` or any `torch.nn.RNN`.
        readout: as in `estimate_grad_`, and so are inputs, targets and loss. Its own gradient is not compared.
        inputs: a batch of the usual size, (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence.
        targets: per step or per sequence.
        loss: "mse", "cross_entropy" or a callable.
        perturbation: the current setting; the default is the rnn's own, or `Perturbation()`. What is not varied (noise,
            ridge, precision, ...) is taken from it.
        methods: methods of `Perturbation` but "bptt".
        rollouts: numbers of rollouts.
        discounts: discounts in [0, 1]. A method without one ("wp") is measured once.
        sigmas: standard deviations of the noise.
        repeats: seeds per setting, at least 2.
        tolerance: how much cosine may be given away for a lower cost, and how large a difference `advice` speaks of.
        seed: which seeds; equal ones give equal results.
        hx: initial state, as the rnn's.
        lengths: valid steps of each sample, (B,).
        targets_per: as in `estimate_grad_`.
        progress: whether to show a progress bar.

    Returns:
        `Diagnosis`: rows, recommendation, advice, `table()`, `plot(path)`.

    Raises:
        ValueError, TypeError, RuntimeError: as `estimate_grad_`; or a part of the grid is not of this form; the message
            quotes it. RuntimeError also where no setting gives an estimate.
    """
    current = check_perturbation(getattr(rnn, "perturbation", None) if perturbation is None else perturbation)
    if ESTIMATORS[current.method].exact:
        # What the others are compared with is no candidate.
        current = dataclasses.replace(current, method=Perturbation.method)
    for name, values in (("methods", methods), ("rollouts", rollouts), ("discounts", discounts), ("sigmas", sigmas)):
        if not isinstance(values, (list, tuple)) or not values:
            raise ValueError(f"{name} must be a list or tuple of at least one value, got {values!r}")
    for method in methods:
        if ESTIMATORS.find(method, "methods").exact:
            raise ValueError(f"methods must not hold {method!r}, which the others are compared with, got {methods!r}")
    checks.flag("progress", progress)
    whole("repeats", repeats, 2)
    whole("seed", seed, 0, 2**63)
    if not 0 <= real("tolerance", tolerance) < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance!r}")
    if not isinstance(rnn, nn.RNN):
        raise TypeError(f"rnn must be an anpgpu.RNN or a torch.nn.RNN, got {type(rnn).__name__}")
    grid = [
        dataclasses.replace(current, method=method, rollouts=count, discount=discount)
        for method in methods
        for discount in (discounts if discounted(method) else (current.discount,))
        for count in rollouts
    ]
    around = [current, *_with_sigmas(current, sigmas)]
    if discounted(current.method):
        around += [dataclasses.replace(current, discount=discount) for discount in discounts]

    copied = copy.deepcopy(rnn).eval()
    head = copy.deepcopy(readout).eval() if isinstance(readout, nn.Module) else readout
    trained = [(name, one) for name, one in copied.named_parameters() if one.requires_grad]
    if not trained:
        raise ValueError("no parameter of the rnn requires a gradient: there is nothing to diagnose")

    def estimate(how: Perturbation, generator: torch.Generator | None) -> tuple[Tensor, Estimate]:
        copied.zero_grad()
        found = estimate_grad_(
            copied,
            head,
            inputs.detach() if isinstance(inputs, Tensor) else inputs,
            targets,
            loss,
            perturbation=how,
            hx=hx.detach() if isinstance(hx, Tensor) else hx,
            lengths=lengths,
            targets_per=targets_per,
            generator=generator,
        )
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for _, one in trained]
        return torch.cat([grad.flatten() for grad in grads]).cpu(), found

    # The caller's readout and loss may draw random numbers.
    devices = sorted({one.device.index for _, one in trained if one.is_cuda})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # The table says where a setting moves nothing.
        warnings.filterwarnings("ignore", message="no rollout changed the loss")
        truth, unseen = _true_gradient(estimate, trained[0][1].device.type, lenient=callable(loss))
        owner = torch.cat([torch.full((one.numel(),), number) for number, (_, one) in enumerate(trained)])
        members = {part: [part in name for name, _ in trained] for part in PARTS}
        masks = {part: torch.tensor(which)[owner] for part, which in members.items() if any(which)}
        measure = _Measure(estimate, truth, masks, _seeds(repeats, seed), rnn.hidden_size)
        most = len({*around, *grid}) + len(sigmas)
        with tqdm(total=most, desc="diagnose", unit="setting", disable=not progress) as bar:
            measure.add(around, bar)
            start = closest_sigma(measure.rows(), current, tolerance, unseen)
            sigma = current.sigma if start is None else start.perturbation.sigma
            measure.add([dataclasses.replace(one, sigma=sigma) for one in grid], bar)
            best = cheapest(measure.rows(), tolerance, unseen)
            measure.add(_with_sigmas(best.perturbation, sigmas), bar)
            bar.total = bar.n
    rows = measure.rows()
    kept = dataclasses.replace(best.perturbation, sigma=current.sigma)
    best = closest_sigma(rows, kept, tolerance, unseen) or best
    now = measure.found[current]
    return Diagnosis(rows, now, best, advise(rows, now, best, tolerance, unseen), unseen)


def _with_sigmas(how: Perturbation, sigmas: Sequence[float]) -> Iterator[Perturbation]:
    return (dataclasses.replace(how, sigma=sigma) for sigma in sigmas)


def _seeds(repeats: int, seed: int) -> list[int]:
    drawn = torch.randint(2**62, (repeats,), generator=torch.Generator().manual_seed(seed))
    return [int(one) for one in drawn]


def _true_gradient(estimate: EstimateOf, device_type: str, *, lenient: bool) -> tuple[Tensor | None, str | None]:
    """Return BPTT's gradient, or why there is none; only a caller's own loss may be without one."""
    try:
        with torch.autocast(device_type, enabled=False):
            truth, _ = estimate(Perturbation("bptt"), None)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # A black box that goes through NumPy raises RuntimeError. A wrong argument raises again with every setting.
        if not lenient:
            raise
        return None, f"the loss cannot be differentiated ({str(error).splitlines()[0]})"
    norm = float(truth.double().norm())
    if not 0 < norm < math.inf:
        return None, f"the norm of BPTT's gradient is {norm:g}"
    return truth, None


class _Measure:
    """Measures settings, each once and all with the same seeds, so that luck does not tell them apart."""

    def __init__(
        self, estimate: EstimateOf, truth: Tensor | None, masks: dict[str, Tensor], seeds: list[int], hidden: int
    ) -> None:
        self.estimate, self.truth, self.masks, self.seeds, self.hidden = estimate, truth, masks, seeds, hidden
        self.found: dict[Perturbation, Row] = {}

    def rows(self) -> tuple[Row, ...]:
        """Return what has been measured, in order."""
        return tuple(self.found.values())

    def add(self, settings: Sequence[Perturbation] | Iterator[Perturbation], bar: tqdm) -> None:
        """Measure the settings that have not been measured."""
        for how in settings:
            if how not in self.found:
                self.found[how] = self._row(how)
                bar.update()

    def _row(self, how: Perturbation) -> Row:
        gradients, halves, skipped, seconds = [], [], 0, []
        cost = cost_of(how, self.hidden)
        for seed in self.seeds:
            started = time.perf_counter()
            try:
                gradient, found = self.estimate(how, torch.Generator().manual_seed(seed))
            except RuntimeError as error:
                # No finite rollout, or out of memory: this setting does not work, which is worth telling.
                why = str(error).splitlines()[0]
                return Row(how, Alignment(), {}, math.nan, skipped, math.nan, cost, why)
            seconds.append(time.perf_counter() - started)
            gradients.append(gradient)
            halves.append(float(found.split_half))
            skipped += int(found.skipped)
        every = torch.stack(gradients)
        parts = {
            part: alignment(every[:, mask], None if self.truth is None else self.truth[mask])
            for part, mask in self.masks.items()
        }
        half = statistics.fmean(halves)
        return Row(how, alignment(every, self.truth), parts, half, skipped, statistics.median(seconds), cost)
