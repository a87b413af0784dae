"""The published update rules, for comparison: one perturbed run, every step credited with its own loss alone.

    anp  dW_ih = sum_t sqrt(N) dL_t (da_t / ||da_t||_F^2)^T x_t    dW_o = sum_t sqrt(N) dL_t (do_t / ||do_t||_F^2)^T h_t
    np   dW_ih = sum_t (1/sigma) dL_t xi_t^T x_t                   dW_o = sum_t (1/sigma) dL_t zeta_t^T h_t
    wp   dW    = sum_t (1/sigma) dL_t E_t                          for each of the three weights

dW_hh is as dW_ih with h_{t-1} for x_t, from the second step on. N = I + H + O; dL_t, da_t and do_t are perturbed minus
clean values of the loss of step t, the pre-activations (B, H) and the outputs (B, O). L_t is averaged over the samples,
and outputs, that count at step t. Updates are summed over t, so their loss is sum_t L_t, while `Estimate.loss` is the
mean over steps. Frobenius norms run over batch and units. The perturbed network is

    anp, np  a~_t = W_ih x_t + W_hh h~_{t-1} + xi_t                    o~_t = W_o h~_t + zeta_t
    wp       a~_t = (W_ih + E_t) x_t + (W_hh + E_t') h~_{t-1}          o~_t = (W_o + E_t'') h~_t

with Gaussian noise of standard deviation sigma, new at every step; in wp one matrix for the whole batch. Expected
updates of np and wp are sigma times the one-step truncated gradient of sum_t L_t, for small sigma.

Here differences are carried as deviations (kernels/rollout.py) instead of subtracting two runs. xi and zeta have the
same counters as in other methods; E_t has those of dense weight noise, with the time step in place of the sample:
layer 0 for [E_t | E_t'], layer 1 for E_t''.

Where a weight is computed from parameters (`torch.nn.utils.parametrize`), dW is the update of the computed weight, and
the parameters' gradients follow by the chain rule. With W D, where D decorrelates the presynaptic activity, anp and np
thus become the published rules with D x_t and D h_{t-1} for x_t and h_{t-1}. In wp, E perturbs the computed weight W D:
it estimates the same gradient as the published decorrelated rule, which perturbs W, from different noise.

Source: Fernandez, Keemink, van Gerven 2024, arXiv:2405.08967.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from anpgpu.kernels.loss import OutputsOnly, output_deviation
from anpgpu.kernels.noise import Counters, NoiseSteps, Purpose, padded
from anpgpu.kernels.rollout import Rollout
from anpgpu.network.cells import LayerRun
from anpgpu.network.stack import run_network
from anpgpu.registry import ESTIMATORS, Estimator
from anpgpu.runtime.dispatch import implementation
from anpgpu.runtime.memory import FIXED_BYTES
from anpgpu.runtime.ranges import entered
from anpgpu.task.problem import Problem

from .found import FoundOfProblem, raise_if_lost
from .job import EVERYONE, BlackBoxChange, Job

WEIGHT_NOISE_BYTES = 96
"""Per perturbed weight, for the noise of one step and the random words it is made from."""


class Published(Estimator):
    """A rule as published: one rollout of Gaussian noise, in `estimate_grad_` alone."""

    one_rollout = True
    weights_only = True
    measures_losses = True
    discounted = False
    stores_delta = False
    perturbs_weights = False

    @classmethod
    def check(cls, perturbation: Any) -> None:
        """Raise ValueError unless this is one rollout of Gaussian noise."""
        super().check(perturbation)
        if (perturbation.rollouts, perturbation.noise) != (1, "gaussian"):
            raise ValueError(
                f"method={perturbation.method!r} is one rollout of Gaussian noise: it needs rollouts=1 and "
                f"noise='gaussian', got rollouts={perturbation.rollouts!r}, noise={perturbation.noise!r}"
            )

    @staticmethod
    def walk(directions: int) -> Callable[[Job], FoundOfProblem]:
        """Return `published`, which raises for two directions."""
        del directions
        return published


@ESTIMATORS.add("published-anp")
class PublishedActivity(Published):
    """Activity-based node perturbation as published."""

    stores_delta = True


@ESTIMATORS.add("published-np")
class PublishedNode(Published):
    """Node perturbation as published."""


@ESTIMATORS.add("published-wp")
class PublishedWeight(Published):
    """Weight perturbation as published."""

    perturbs_weights = True


def published(job: Job) -> FoundOfProblem:
    """Return the update of a published rule.

    Raises:
        ValueError: the published rule is not defined for this problem.
        RuntimeError: the perturbed run is not finite.
        MemoryError: not even one step fits into `job.max_memory`; or, with a black-box loss, not all steps.
    """
    problem, settings, loss = job.problem, job.settings, job.problem.loss
    weight_o = _readout(problem, settings.method)
    result = FoundOfProblem(problem)
    perturbed = (_Weights if _rule(job).perturbs_weights else _Activity)(job, weight_o)
    state = problem.h_0
    for steps in _segments(job):
        clean = run_network(problem.network, problem.inputs[steps], state)
        state = clean.h_n
        outputs = result.outputs[steps] = problem.read(clean.outputs)
        run = clean.layers[0][0]
        delta_o = perturbed.advance(run, steps)
        if loss.black_box:
            change = BlackBoxChange(problem, outputs, EVERYONE)
            result.loss = change.clean.sum()
            delta_loss = change.of(delta_o)
        else:
            result.loss += loss.values(outputs, steps, EVERYONE).sum()
            spec = loss.spec(None, outputs, steps, EVERYONE, False, None)
            delta_loss = spec.differences(slice(0, len(outputs)), output_deviation(spec.readout, delta_o))
        finite = torch.isfinite(delta_loss).all(0) & torch.isfinite(perturbed.delta_h).all(-1)
        raise_if_lost(finite.sum(1), 0, settings.options.sigma)
        # Converts a step's share of the mean over the sequence into the mean over the samples that count at the step.
        share = _share_of_steps(problem, steps).to(delta_loss.dtype)
        credit = torch.where(share == 0, 0, delta_loss.sum((1, 2)) / share)
        perturbed.add_update(result, run, steps, credit)
    result.h_n = state
    return result


def _rule(job: Job) -> type[Published]:
    rule = job.settings.estimator
    assert issubclass(rule, Published)  # noqa: S101  (for the type checker; the table says so)
    return rule


def _readout(problem: Problem, method: str) -> Tensor:
    """Return W_o; raise unless there are one layer, one direction, a readout, no biases and equal lengths."""
    layers, directions = len(problem.network.layers), problem.network.directions
    cell = problem.network.cell.forms
    if cell.noise_in_state:
        raise ValueError(
            f"method={method!r} is defined for noise in the pre-activations of an nn.RNN, got a {cell.name}"
        )
    if (layers, directions) != (1, 1):
        raise ValueError(
            f"method={method!r} is defined for one layer and one direction, got num_layers={layers}, "
            f"bidirectional={directions == 2}"
        )
    if problem.weight_o is None:
        raise ValueError(f"method={method!r} perturbs a readout: readout must be a torch.nn.Linear")
    for name, bias in (("rnn", problem.network.layers[0][0].bias_ih), ("readout", problem.bias_o)):
        if bias is not None:
            raise ValueError(f"method={method!r} is defined without biases, got {name} with bias=True")
    time = len(problem.inputs)
    if problem.lengths is not None and not bool((problem.lengths == time).all()):
        raise ValueError(
            f"method={method!r} is defined for samples of one length, T={time}, got lengths={problem.lengths.tolist()}"
        )
    return problem.weight_o


def _segments(job: Job) -> list[slice]:
    """Return the time segments that fit; cutting time costs nothing, because each step is credited by itself."""
    problem = job.problem
    time, batch, fan_in = problem.inputs.shape
    units, outputs = problem.width, problem.outputs_size
    step_bytes = problem.inputs.itemsize * max(1, batch) * (12 * padded(units) + 8 * outputs)
    fixed = FIXED_BYTES
    if _rule(job).perturbs_weights:
        fixed += WEIGHT_NOISE_BYTES * (units * (fan_in + units) + outputs * units)
    length = min(time, (job.max_memory - fixed) // step_bytes)
    needed = time if problem.loss.black_box else 1
    if length < needed:
        raise MemoryError(
            f"max_memory={job.max_memory} bytes is too little for method={job.settings.method!r} with T={time}, "
            f"B={batch}, H={units}: {needed} steps at a time need {fixed + needed * step_bytes} bytes"
        )
    return [slice(start, min(start + length, time)) for start in range(0, time, length)]


def _share_of_steps(problem: Problem, steps: slice) -> Tensor:
    """Return the weight of each step's mean over samples in the reported loss, (L,); 0 for a step without a loss."""
    loss = problem.loss
    if loss.black_box and loss.per_sequence:
        # A caller's loss per sequence belongs to the last step alone.
        return torch.ones(len(problem.inputs), device=problem.inputs.device)
    return loss.weight[steps].sum(1)


class _Perturbed:
    """The perturbed run, segment by segment, of one rollout per sample."""

    def __init__(self, job: Job, weight_o: Tensor) -> None:
        self.seed, self.settings, self.options = job.seed, job.settings, job.settings.options
        self.cell, self.weights, self.weight_o = job.problem.network.cell, job.problem.network.layers[0][0], weight_o
        self.keeps_activity = self.settings.estimator.stores_delta
        _, batch, units = job.problem.h_0.shape
        self.delta_h = weight_o.new_zeros((batch, 1, units))
        """Deviation of the state after the last step that has run, (B, 1, H)."""

    def _counters(self, purpose: Purpose, steps: slice, layer: int = 0) -> Counters:
        return Counters(purpose=purpose, layer=layer, time=steps.start, rank=self.settings.process_rank)


class _Activity(_Perturbed):
    """Noise on the pre-activations of hidden layer and readout: anp and np."""

    delta_a: Tensor
    """(L, B, 1, H), for anp."""
    zeta: Tensor
    """(L, B, 1, O), of unit variance."""
    delta_o: Tensor

    def advance(self, run: LayerRun, steps: slice) -> Tensor:
        """Run a segment beside its clean activity; return the deviations of its outputs, (L, B, 1, O)."""
        preact, hidden = self.cell.preactivations(self.weights, run), run.states[1:]
        with entered("rollout"):
            moved: Rollout = implementation("rollout", self.settings.backend)(
                preact,
                hidden,
                self.weights.weight_hh,
                OutputsOnly(self.weight_o),
                self.seed,
                options=self.options._replace(store_delta_a=self.keeps_activity),
                counters=self._counters(Purpose.HIDDEN, steps),
                delta_h0=self.delta_h,
            )
        assert moved.delta_o is not None  # noqa: S101  (for the type checker; OutputsOnly asked for it)
        self.delta_h = moved.delta_h
        if moved.delta_a is not None:
            self.delta_a = moved.delta_a
        self.zeta = self._noise(Purpose.READOUT, moved.delta_o, steps)
        self.delta_o = moved.delta_o.add_(self.zeta, alpha=self.options.sigma)
        return self.delta_o

    def add_update(self, result: FoundOfProblem, run: LayerRun, steps: slice, credit: Tensor) -> None:
        """Add the update of the segment that ran last, given dL_t, (L,)."""
        signals: tuple[Tensor, Tensor]
        if self.keeps_activity:
            sizes = run.inputs.shape[-1] + sum(self.weight_o.shape)
            credit = credit * math.sqrt(sizes)
            signals = _over_square(self.delta_a, self.options.sigma), _over_square(self.delta_o, self.options.sigma)
        else:
            # Unit variance: xi / sigma and zeta / sigma.
            signals = self._noise(Purpose.HIDDEN, run.states[1:].unsqueeze(2), steps), self.zeta
        hidden, outputs = ((credit.view(-1, 1, 1, 1) * signal).squeeze(2) for signal in signals)
        sums, late = result.layers[0], _after_first(steps)
        sums.weight_ih[0] += hidden.flatten(0, 1).t() @ run.inputs.flatten(0, 1)
        sums.weight_hh[0] += hidden[late].flatten(0, 1).t() @ run.states[:-1][late].flatten(0, 1)
        result.add_readout(outputs, run.states[1:])

    def _noise(self, purpose: Purpose, like: Tensor, steps: slice) -> Tensor:
        """Return noise of unit variance, (L, B, 1, units)."""
        with entered("noise"):
            drawn: Tensor = implementation("noise", self.settings.backend)(
                self.seed,
                tuple(like.shape),
                sigma=1.0,
                kind=self.options.noise,
                counters=self._counters(purpose, steps),
                dtype=like.dtype,
            )
        return drawn


class _Weights(_Perturbed):
    """Noise on all three weights, new at every step and shared by the batch: wp."""

    def advance(self, run: LayerRun, steps: slice) -> Tensor:
        """Run a segment beside its clean activity; return the deviations of its outputs, (L, B, 1, O)."""
        sigma = self.options.sigma
        preact, hidden = self.cell.preactivations(self.weights, run), run.states[1:]
        deviation = self.cell.forms.around(preact, hidden)
        scratch = (torch.empty_like(self.delta_h), torch.empty_like(self.delta_h))
        delta_o = preact.new_empty((*preact.shape[:2], 1, len(self.weight_o)))
        for step, (noise, noise_o) in enumerate(self._noises(run, steps)):
            state = run.states[step].unsqueeze(1) + self.delta_h
            presynaptic = torch.cat((run.inputs[step].unsqueeze(1), state), dim=-1)
            delta_a = self.delta_h @ self.weights.weight_hh.t() + sigma * (presynaptic @ noise.t())
            self.delta_h = deviation.step(step, delta_a, self.delta_h, scratch)
            state = hidden[step].unsqueeze(1) + self.delta_h
            delta_o[step] = self.delta_h @ self.weight_o.t() + sigma * (state @ noise_o.t())
        return delta_o

    def add_update(self, result: FoundOfProblem, run: LayerRun, steps: slice, credit: Tensor) -> None:
        """Add the update of the segment that ran last, given dL_t, (L,)."""
        sums, fan_in = result.layers[0], run.inputs.shape[-1]
        assert result.weight_o is not None  # noqa: S101  (for the type checker; there is a readout)
        for step, (noise, noise_o) in enumerate(self._noises(run, steps)):
            sums.weight_ih[0] += credit[step] * noise[:, :fan_in]
            if steps.start + step:
                sums.weight_hh[0] += credit[step] * noise[:, fan_in:]
            result.weight_o += credit[step] * noise_o

    def _noises(self, run: LayerRun, steps: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the unit-variance noise of each step: of [W_ih | W_hh], (H, I + H), and of W_o, (O, H)."""
        units, fan_in = self.weights.weight_hh.shape[0], run.inputs.shape[-1]
        length, kind = len(run.inputs), self.options.noise
        sources = []
        for layer, (rows, columns) in enumerate(((units, fan_in + units), (len(self.weight_o), units))):
            counters = self._counters(Purpose.WEIGHTS, steps, layer)
            shape = (length, rows, 1, columns)
            source = NoiseSteps(self.seed, shape, sigma=1.0, kind=kind, counters=counters, dtype=run.states.dtype)
            sources.append((source, run.states.new_empty((1, rows, 1, padded(columns)))))
        for step in range(length):
            hidden, outputs = (source.fill(step, buffer)[0].squeeze(1) for source, buffer in sources)
            yield hidden, outputs


def _over_square(change: Tensor, sigma: float) -> Tensor:
    """Return change / ||change||_F^2, the norm over batch and units of each step of (L, B, 1, units)."""
    # In units of sigma, because the square of a small sigma underflows in float32.
    unit = change / sigma
    return unit / (unit.square().sum((1, 2, 3), keepdim=True) * sigma)


def _after_first(steps: slice) -> slice:
    """Return the steps of a segment, without the first of the sequence, at which W_hh gets no update."""
    return slice(1 if steps.start == 0 else 0, None)
