"""`diagnose`: are method, rollouts, discount and sigma right for this network and this batch?

For each setting, estimates of several seeds are compared with the true gradient, from backpropagation through all of
time. `alignment` separates bias from variance. Source: derived here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

from anpgpu import checks
from anpgpu.checks import real, whole
from anpgpu.estimate import estimate_grad_
from anpgpu.estimators.found import Estimate
from anpgpu.network.cells import RECURRENT
from anpgpu.perturbation import Perturbation, check_perturbation
from anpgpu.registry import ESTIMATORS
from anpgpu.state import estimator_state, load_estimator_state_
from anpgpu.task.black_box import LossFunction
from anpgpu.task.problem import loss_class

from .advice import Diagnosis, Row, advise, cheapest, closest_sigma, cost_of, discounted
from .alignment import Alignment, alignment

LEARNT = (0, 20, 60)
"""Updates before the measurements of a method that learns from update to update."""

PARTS = ("weight_hh", "weight_ih", "bias")
"""Kinds of parameters, by their names in `torch.nn.RNN`."""

EstimateOf = Callable[[Perturbation, "torch.Generator | None"], tuple[Tensor, Estimate]]
"""Returns the gradient of the rnn's parameters, flat, (N,) on the CPU, and the `Estimate`."""


def diagnose(  # noqa: PLR0913  (a grid reads best as keywords)
    rnn: nn.RNNBase,
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
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    targets_per: str | None = None,
    step_weight: Tensor | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Compare perturbation estimates with the true gradient of this batch, and recommend a setting.

    First the current setting is measured with every sigma and every discount; then all combinations of methods,
    rollouts and discounts at the best of these sigmas; then the best combination with every sigma. Everything runs on
    copies, without dropout: parameters, `.grad`, buffers, modes and random generators stay unchanged.

    The recommendation is the cheapest setting (in multiply-adds) whose mean cosine is within `tolerance` of the best;
    at equal cost, the one with the largest discount. Early in training most of the gradient comes from short delays,
    so a small discount looks good; later the gradient reaches further back. Diagnose again after some hundred updates.

    Without a gradient of a callable loss there is no true gradient, and bias cannot be measured. Cosines are then NaN,
    settings are ranked by how well estimates of different seeds agree, and only the largest discount, which has the
    smallest bias, is recommended. A callable that is only partly differentiable (a detached term) is not detected.

    Args:
        rnn: an RNN, GRU or LSTM of anpgpu or of torch.nn.
        readout: as in `estimate_grad_`, like inputs, targets and loss. The readout's own gradient is not compared.
        inputs: a batch of the usual size, (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence.
        targets: per step or per sequence.
        loss: "mse", "cross_entropy", a loss module of torch's or a callable.
        perturbation: the current setting; the default is the rnn's own, or `Perturbation()`. Knobs that are not varied
            (noise, ridge, precision, ...) keep its values.
        methods: methods of `Perturbation`, except "bptt". "anp-feedback" learns from update to update: its cosines are
            those after 0, 20 and 60 updates of this batch, without a warm-up; the row is that after the last.
        rollouts: numbers of rollouts.
        discounts: discounts in [0, 1]. A method without a discount ("wp") is measured once.
        sigmas: standard deviations of the noise.
        repeats: seeds per setting, at least 2.
        tolerance: loss of cosine accepted for a lower cost, in [0, 1); `advice` ignores smaller differences.
        seed: from which the seeds of the estimates are drawn; the same seed gives the same result.
        hx: initial state, as the rnn's; of an LSTM (h_0, c_0).
        lengths: valid steps of each sample, (B,).
        targets_per: as in `estimate_grad_`.
        step_weight: weight of each step's loss, (T, B), as in `estimate_grad_`.
        progress: whether to show a progress bar.

    Returns:
        `Diagnosis`: rows, recommendation, advice, `table()`, `plot(path)`.

    Raises:
        ValueError, TypeError, RuntimeError: as `estimate_grad_`; or an argument of the grid is not of this form, which
            the message quotes. RuntimeError also where no setting gives an estimate.
    """
    current = check_perturbation(getattr(rnn, "perturbation", None) if perturbation is None else perturbation)
    if ESTIMATORS[current.method].exact:
        # The reference of the comparison is no candidate.
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
    if not isinstance(rnn, RECURRENT):
        raise TypeError(f"rnn must be an RNN, GRU or LSTM of anpgpu or torch.nn, got {type(rnn).__name__}")
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
    trained = [(name, weight) for name, weight in copied.named_parameters() if weight.requires_grad]
    if not trained:
        raise ValueError("no parameter of the rnn requires a gradient: there is nothing to diagnose")

    detached = _detached(hx)

    def estimate(setting: Perturbation, generator: torch.Generator | None) -> tuple[Tensor, Estimate]:
        copied.zero_grad()
        report = estimate_grad_(
            copied,
            head,
            inputs.detach() if isinstance(inputs, Tensor) else inputs,
            targets,
            loss,
            perturbation=setting,
            hx=detached,
            lengths=lengths,
            targets_per=targets_per,
            step_weight=step_weight,
            generator=generator,
        )
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for _, weight in trained]
        return torch.cat([grad.flatten() for grad in grads]).cpu(), report

    # The caller's readout and loss may draw random numbers.
    devices = sorted({weight.device.index for _, weight in trained if weight.is_cuda})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # The table says where a setting moves nothing.
        warnings.filterwarnings("ignore", message="no rollout changed the loss")
        truth, unseen = _true_gradient(estimate, trained[0][1].device.type, lenient=loss_class(loss).black_box)
        owner = torch.cat([torch.full((weight.numel(),), number) for number, (_, weight) in enumerate(trained)])
        members = {kind: [kind in name for name, _ in trained] for kind in PARTS}
        masks = {kind: torch.tensor(which)[owner] for kind, which in members.items() if any(which)}
        measure = _Measure(estimate, truth, masks, _seeds(repeats, seed), copied)
        most = len({*around, *grid}) + len(sigmas)
        with tqdm(total=most, desc="diagnose", unit="setting", disable=not progress) as bar:
            measure.add(around, bar)
            start = closest_sigma(measure.rows(), current, tolerance, unseen)
            sigma = current.sigma if start is None else start.perturbation.sigma
            measure.add([dataclasses.replace(setting, sigma=sigma) for setting in grid], bar)
            best = cheapest(measure.rows(), tolerance, unseen)
            measure.add(_with_sigmas(best.perturbation, sigmas), bar)
            bar.total = bar.n
    rows = measure.rows()
    at_current_sigma = dataclasses.replace(best.perturbation, sigma=current.sigma)
    best = closest_sigma(rows, at_current_sigma, tolerance, unseen) or best
    now = measure.row_of[current]
    return Diagnosis(rows, now, best, advise(rows, now, best, tolerance, unseen), unseen)


def _detached(hx: Any) -> Any:
    """Return first states without their graph."""
    if isinstance(hx, (tuple, list)):
        return tuple(map(_detached, hx))
    return hx.detach() if isinstance(hx, Tensor) else hx


def _with_sigmas(setting: Perturbation, sigmas: Sequence[float]) -> Iterator[Perturbation]:
    return (dataclasses.replace(setting, sigma=sigma) for sigma in sigmas)


def _seeds(repeats: int, seed: int) -> list[int]:
    drawn = torch.randint(2**62, (repeats,), generator=torch.Generator().manual_seed(seed))
    return [int(number) for number in drawn]


def _true_gradient(estimate: EstimateOf, device_type: str, *, lenient: bool) -> tuple[Tensor | None, str | None]:
    """Return BPTT's gradient, or the reason why there is none.

    With `lenient`, for a caller's own loss, an error of the loss or of its gradient is such a reason.
    """
    try:
        with torch.autocast(device_type, enabled=False):
            truth, _ = estimate(Perturbation("bptt"), None)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # A black box that goes through NumPy raises RuntimeError; a wrong argument raises again in every setting.
        if not lenient:
            raise
        return None, f"the loss cannot be differentiated ({str(error).splitlines()[0]})"
    norm = float(truth.double().norm())
    if not 0 < norm < math.inf:
        return None, f"the norm of BPTT's gradient is {norm:g}"
    return truth, None


class _Measure:
    """Measures settings, each once and all with the same seeds, so that they do not differ by chance."""

    def __init__(
        self, estimate: EstimateOf, truth: Tensor | None, masks: dict[str, Tensor], seeds: list[int], rnn: nn.RNNBase
    ) -> None:
        self.estimate, self.truth, self.masks, self.seeds, self.rnn = estimate, truth, masks, seeds, rnn
        self.row_of: dict[Perturbation, Row] = {}

    def rows(self) -> tuple[Row, ...]:
        """Return the measured rows, in order of measurement."""
        return tuple(self.row_of.values())

    def add(self, settings: Sequence[Perturbation] | Iterator[Perturbation], bar: tqdm) -> None:
        """Measure the settings that are not measured yet."""
        for setting in settings:
            if setting not in self.row_of:
                self.row_of[setting] = self._row(setting)
                bar.update()

    def _row(self, setting: Perturbation) -> Row:
        if not ESTIMATORS[setting.method].keeps_state:
            return self._measured(setting)
        load_estimator_state_(self.rnn, {})
        # What a warm-up would bring is what the columns of a learning method show.
        plain = dataclasses.replace(setting, warmup=0)
        learning, seen, row = [], 0, Row(setting, Alignment(), {}, math.nan, 0, math.nan, math.nan)
        for updates in LEARNT:
            try:
                for number in range(seen, updates):
                    self.estimate(plain, torch.Generator().manual_seed(self.seeds[0] + number + 1))
            except RuntimeError as error:
                return row._replace(error=str(error).splitlines()[0])
            seen = updates
            row = self._measured(plain)._replace(perturbation=setting)
            value = row.total.agreement if self.truth is None else row.total.cosine
            learning.append((updates, value))
        return row._replace(learning=tuple(learning))

    def _measured(self, setting: Perturbation) -> Row:
        gradients, halves, skipped, seconds = [], [], 0, []
        cost = cost_of(setting, self.rnn.hidden_size)
        state = estimator_state(self.rnn)
        asking = dataclasses.replace(setting, split_half=True)
        for seed in self.seeds:
            # Every seed starts from the same state.
            load_estimator_state_(self.rnn, state)
            started = time.perf_counter()
            try:
                gradient, report = self.estimate(asking, torch.Generator().manual_seed(seed))
            except RuntimeError as error:
                # No finite rollout, or out of memory: the row reports that this setting does not work.
                why = str(error).splitlines()[0]
                return Row(setting, Alignment(), {}, math.nan, skipped, math.nan, cost, why)
            seconds.append(time.perf_counter() - started)
            gradients.append(gradient)
            halves.append(float(report.split_half))
            skipped += int(report.skipped)
        load_estimator_state_(self.rnn, state)
        estimates = torch.stack(gradients)
        parts = {
            kind: alignment(estimates[:, mask], None if self.truth is None else self.truth[mask])
            for kind, mask in self.masks.items()
        }
        half = statistics.fmean(halves)
        return Row(setting, alignment(estimates, self.truth), parts, half, skipped, statistics.median(seconds), cost)
