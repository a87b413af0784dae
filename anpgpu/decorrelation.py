"""Decorrelation: a weight sees D x in place of its presynaptic activity x, and D learns to make D x uncorrelated.

    x^ = D x,    D <- D - rate (mean x^ x^T with a zero diagonal) D,    D = I at the start

For gradient descent D is a constant: the network computes with W D, and the chain rule gives dW = sum lam (D x)^T and
dx = (W D)^T lam, whichever method estimates lam, the adjoint of the pre-activation. Rollouts and kernels know nothing
of D. (`method="wp"` perturbs W D instead of W; both estimate the same gradient.)

Source: the rule of Ahmad, Schrader, van Gerven 2022 ("Constrained parameter inference as a principle for learning"),
with node perturbation in Dalm, van Gerven, Ahmad 2023, arXiv:2310.00965; on RNNs in Fernandez, Keemink, van Gerven
2024, arXiv:2405.08967. The reparametrisation is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import checks
from .checks import real, whole
from .network.cells import RECURRENT
from .network.stack import CleanRun, run_network
from .network.weights import valid_steps
from .runtime.settings import working_dtype
from .task.problem import sequences


class Decorrelate(nn.Module):
    """Return D x for activity x, in front of a head; D learns by `update_`, not by gradients.

    Args:
        size: length of x.
        rate: step size of the rule, positive. It multiplies the mean of x^ x^T, so the more active the units, the
            smaller it must be.
        every: how many calls of `update_` make one change of D.
        device: D's device.
        dtype: D's type; the default is torch's default.

    Attributes:
        matrix: D, (size, size), a buffer.
        calls: number of calls of `update_`, 0-dim int64, a buffer, so that a reloaded module goes on counting.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message quotes it.
    """

    matrix: Tensor
    calls: Tensor

    def __init__(
        self,
        size: int,
        *,
        rate: float = 1e-3,
        every: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rate, self.every = _rate(rate), whole("every", every, 1)
        self.register_buffer("matrix", torch.eye(whole("size", size, 1), device=device, dtype=dtype))
        self.register_buffer("calls", torch.zeros((), device=device, dtype=torch.int64))

    def forward(self, activity: Tensor) -> Tensor:
        """Return D x, of the shape of x, (..., size).

        Raises:
            RuntimeError: `activity` has another type than D, outside autocast.
        """
        kind = activity.device.type
        # The meta device has no autocast, and torch raises when asked.
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if activity.dtype != self.matrix.dtype and not casts:
            raise RuntimeError(f"activity must be {self.matrix.dtype}, as D is, got {activity.dtype}")
        return F.linear(activity, self.matrix)

    @torch.no_grad()
    def update_(self, activity: Tensor, valid: Tensor | None = None) -> None:
        """Change D by one step of the rule.

        Args:
            activity: x, (..., size): the mean is over everything but its last dimension.
            valid: which rows of x count, (...) bool; all by default.

        Raises:
            ValueError, TypeError: `activity` is no floating tensor of this shape.
            RuntimeError: the step would not be stable, see `Decorrelation`; D is then unchanged.
        """
        if not checks.tensor("activity", activity).is_floating_point():
            raise TypeError(f"activity must be floating, got {activity.dtype}")
        if activity.dim() < 2 or activity.shape[-1] != len(self.matrix):
            raise ValueError(f"activity must have shape (..., {len(self.matrix)}), got {tuple(activity.shape)}")
        if _is_due(self.calls, self.every):
            rows = activity.flatten(0, -2) if valid is None else activity[valid]
            _change([_step("matrix", self.matrix, [rows], self.rate)])
        self.calls += 1

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"{len(self.matrix)}, rate={self.rate}, every={self.every}"


class DecorrelatedWeight(nn.Module):
    """The parametrization W -> W D that `Decorrelation` registers; buffers as in `Decorrelate`."""

    matrix: Tensor
    calls: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = torch.eye(weight.shape[1], device=weight.device, dtype=working_dtype(weight.dtype))
        self.register_buffer("matrix", matrix)
        self.register_buffer("calls", torch.zeros((), device=weight.device, dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        """Return W D in the type of W. Autocast is off here: it applies where the network uses the weight."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.to(self.matrix.dtype) @ self.matrix).to(weight.dtype)


class Site(NamedTuple):
    """A weight whose presynaptic activity is decorrelated."""

    module: nn.Module
    name: str
    layer: int
    """Layer of the RNN; -1 for the readout."""
    side: int
    """Direction, 0 or 1."""

    def activity(self, run: CleanRun) -> Tensor:
        """Return the weight's presynaptic activity without D, (T, B, N); each sample's valid steps come first."""
        if self.layer < 0:
            return run.outputs
        layer_run = run.layers[self.layer][self.side]
        if self.name.startswith("weight_ih"):
            return layer_run.inputs
        units: int = self.module.hidden_size  # type: ignore[assignment]
        return layer_run.states[:-1, :, :units]


class Decorrelation:
    """Puts a matrix D in front of weights of an RNN and updates it next to the optimiser.

        decorrelation = Decorrelation(rnn)
        ...
        optimiser.step()
        decorrelation.update_(inputs, hx)            # one clean run, no gradients

    Each weight has a D of its own, a parametrization (`torch.nn.utils.parametrize`): D is in the state_dict, and moves
    and copies with the module. Parameters stay the same objects, so the optimiser may be made before or after. A weight
    that already has a D keeps it. Register other parametrizations (orthogonal, weight_norm) first; W is then their
    result.

    The rule only shrinks: the power of D x falls until its units are uncorrelated, and W must grow to compensate. Each
    process updates D from its own samples: broadcast or average `matrices` to keep processes equal.

    Args:
        rnn: an RNN, GRU or LSTM of anpgpu, with any method, or of torch.nn.
        readout: also decorrelate the inputs of this `torch.nn.Linear`, the RNN's outputs.
        hidden: decorrelate hidden states: h_{t-1} for every W_hh, and the lower layer's outputs for W_ih of every layer
            but the first (both directions at once in a bidirectional network).
        inputs: decorrelate the network's inputs, for W_ih of the first layer.
        rate: step size of the rule, positive. A step counts as stable while rate times the Frobenius norm of mean
            x^ x^T, with a zero diagonal, is below 2; rate < 2 / mean ||x^||^2 ensures it.
        every: how many calls of `update_` make one change of D.
        average_over_time: one step per call, from the mean over samples and time steps; False: one step per time step,
            from the mean over samples.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message quotes it.
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        readout: nn.Linear | None = None,
        *,
        hidden: bool = True,
        inputs: bool = False,
        rate: float = 1e-3,
        every: int = 1,
        average_over_time: bool = True,
    ) -> None:
        if not isinstance(rnn, RECURRENT):
            raise TypeError(f"rnn must be an RNN, GRU or LSTM of anpgpu or torch.nn, got {type(rnn).__name__}")
        if readout is not None and not isinstance(readout, nn.Linear):
            raise TypeError(f"readout must be a torch.nn.Linear or None, got {type(readout).__name__}")
        for name, value in (("hidden", hidden), ("inputs", inputs), ("average_over_time", average_over_time)):
            checks.flag(name, value)
        self.rnn, self.readout = rnn, readout
        self.rate, self.every = _rate(rate), whole("every", every, 1)
        self.average_over_time = average_over_time
        self.sites = _sites(rnn, readout, hidden=hidden, inputs=inputs)
        if not self.sites:
            raise ValueError(f"nothing to decorrelate: hidden={hidden!r}, inputs={inputs!r}, readout={readout!r}")
        for site in self.sites:
            if not isinstance(_last_parametrization(site.module, site.name), DecorrelatedWeight):
                weight = getattr(site.module, site.name)
                parametrize.register_parametrization(site.module, site.name, DecorrelatedWeight(weight))

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Each D, (N, N), by its weight's name; the readout's is "readout"."""
        names = ["readout" if site.layer < 0 else site.name for site in self.sites]
        return {name: weight.matrix for name, weight in zip(names, self._parametrizations(), strict=True)}

    @torch.no_grad()
    def update_(
        self,
        inputs: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Run the clean network once, without dropout, and change every D by the rule.

        Args:
            inputs: as the rnn's, or a PackedSequence; part of the data will do, such as a stretch of a long sequence.
            hx: initial state, as the rnn's; of an LSTM (h_0, c_0).
            lengths: valid steps of each sample, (B,), in [0, T]; padding is ignored.

        Raises:
            ValueError, TypeError: an argument is not of this form; the message quotes it.
            RuntimeError: a step would not be stable, or not finite; the message quotes its norm, and every D is
                unchanged. Or a D is gone, as after `fold_()`.
        """
        weights = self._parametrizations()
        due = [_is_due(weight.calls, self.every) for weight in weights]
        if any(due):
            batch = sequences(self.rnn, inputs, hx, lengths)
            with torch.autocast(batch.inputs.device.type, enabled=False):
                run = run_network(batch.network, batch.inputs, batch.h_0, batch.lengths)
                valid = None
                if batch.lengths is not None:
                    valid = valid_steps(len(batch.inputs), batch.lengths, batch.inputs.device)
                _change(
                    [
                        _step(site.name, weight.matrix, self._rows(site.activity(run), valid), self.rate)
                        for site, weight, changes in zip(self.sites, weights, due, strict=True)
                        if changes
                    ]
                )
        for weight in weights:
            weight.calls += 1
        # nn.RNN caches the weights it computed last; with their graph the module could not be deep-copied.
        self.rnn._update_flat_weights()

    def _parametrizations(self) -> list[DecorrelatedWeight]:
        """Return the parametrization that holds D, for each site."""
        weights = []
        for site in self.sites:
            parametrization = _last_parametrization(site.module, site.name)
            if not isinstance(parametrization, DecorrelatedWeight):
                last = "none" if parametrization is None else type(parametrization).__name__
                raise RuntimeError(
                    f"the last parametrization of {site.name} must be its decorrelation, got {last}: "
                    "make a new Decorrelation, after every other parametrization"
                )
            weights.append(parametrization)
        return weights

    def _rows(self, activity: Tensor, valid: Tensor | None) -> list[Tensor]:
        """Return the activity, (N, units), of each step of the rule."""
        if self.average_over_time:
            return [activity.flatten(0, 1) if valid is None else activity[valid]]
        return [step if valid is None else step[valid[time]] for time, step in enumerate(activity)]

    def fold_(self) -> None:
        """Multiply every D into its weight and remove it: the network computes the same, without decorrelation.

        Other parametrizations of these weights become permanent, too. Parameters stay the same objects, except that a
        weight with several originals, such as weight_norm's, becomes a new parameter. `update_` raises afterwards.
        """
        self._parametrizations()
        for module in {id(site.module): site.module for site in self.sites}.values():
            # A copied module shares its class with the original, which must keep the properties removed below.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for site in self.sites:
            parametrize.remove_parametrizations(site.module, site.name, leave_parametrized=True)
        # Restore the order of a plain module's parameters: optimisers number parameters by it.
        for name in [name for name in self.rnn._flat_weights_names if name in self.rnn._parameters]:
            self.rnn._parameters[name] = self.rnn._parameters.pop(name)
        if self.readout is not None:
            self.readout._parameters["bias"] = self.readout._parameters.pop("bias")


def squared_correlation(activity: Tensor, *, centred: bool = True) -> Tensor:
    """Return the mean over pairs of different units of their squared correlation, 0-dim float64.

    Args:
        activity: (..., N), samples along everything but the last dimension.
        centred: Pearson's coefficient, covariance over standard deviations; False: means are not subtracted, as in the
            rule. Units that do not vary (False: are zero) are left out; NaN where fewer than two remain.

    Raises:
        ValueError, TypeError: `activity` is not of this form; the message quotes it.
    """
    checks.flag("centred", centred)
    if not checks.tensor("activity", activity).is_floating_point():
        raise TypeError(f"activity must be floating, got {activity.dtype}")
    if activity.dim() < 2 or activity.is_meta or activity.layout != torch.strided:
        raise ValueError(
            "activity must be a dense tensor of shape (..., N) that holds values, got "
            f"{activity.layout} of shape {tuple(activity.shape)} on {activity.device}"
        )
    rows: Tensor = activity.flatten(0, -2).double()
    power = torch.linalg.vector_norm(rows, dim=0)
    if centred:
        rows = rows - rows.mean(0)
    size = torch.linalg.vector_norm(rows, dim=0)
    # A constant unit minus its mean is rounding error, not exactly zero.
    varies = size > 1e-12 * power
    rows = rows[:, varies] / size[varies]
    units = rows.shape[1]
    if units < 2:
        return rows.new_full((), math.nan)
    squared: Tensor = (rows.t() @ rows).square().sum() - units
    return squared / (units * (units - 1))


def _sites(rnn: nn.RNNBase, readout: nn.Linear | None, *, hidden: bool, inputs: bool) -> list[Site]:
    sites = []
    for index in range(len(rnn.all_weights)):
        layer, side = divmod(index, 2 if rnn.bidirectional else 1)
        suffix = f"l{layer}" + ("_reverse" if side else "")
        if hidden if layer else inputs:
            sites.append(Site(rnn, f"weight_ih_{suffix}", layer, side))
        if hidden:
            sites.append(Site(rnn, f"weight_hh_{suffix}", layer, side))
    return sites if readout is None else [*sites, Site(readout, "weight", -1, 0)]


def _last_parametrization(module: nn.Module, name: str) -> nn.Module | None:
    parametrizations = getattr(module, "parametrizations", None)
    if not isinstance(parametrizations, nn.ModuleDict) or name not in parametrizations:
        return None
    return list(parametrizations[name].children())[-1]


def _rate(rate: float) -> float:
    if not 0 < real("rate", rate) < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate!r}")
    return float(rate)


def _is_due(calls: Tensor, every: int) -> bool:
    return every == 1 or (int(calls) + 1) % every == 0


class Step(NamedTuple):
    """One D and its update."""

    name: str
    rate: float
    matrix: Tensor
    becomes: Tensor
    overshoot: Tensor
    """Largest norm of rate (mean x^ x^T with a zero diagonal), 0-dim; a step is stable below 2."""


def _step(name: str, matrix: Tensor, activity: list[Tensor], rate: float) -> Step:
    """Return D after one step of the rule per activity, (N, units)."""
    becomes = matrix.to(working_dtype(matrix.dtype))
    overshoot = becomes.new_zeros(())
    for rows in activity:
        if not len(rows):
            continue
        seen = rows.to(becomes.dtype) @ becomes.t()
        change = rate * (seen.t() @ seen) / len(seen)
        change.fill_diagonal_(0)
        # torch.maximum keeps a NaN.
        overshoot = torch.maximum(overshoot, torch.linalg.matrix_norm(change))
        becomes = becomes - change @ becomes
    return Step(name, rate, matrix, becomes, overshoot)


def _change(steps: list[Step]) -> None:
    """Write the new matrices, all or none."""
    worst = torch.stack([step.overshoot.double() for step in steps]).tolist()
    for step, overshoot in zip(steps, worst, strict=True):
        if not overshoot < 2:
            raise RuntimeError(
                f"rate={step.rate} times the mean of x^ x^T off its diagonal has norm {overshoot:.3g} for {step.name}, "
                "and a step is stable below 2: lower the rate or scale the activity down (D is as it was)"
            )
    for step in steps:
        step.matrix.copy_(step.becomes)
