"""Decorrelation: a weight sees D x in place of its presynaptic activity x, and D learns to make D x uncorrelated.

    x^ = D x,    D <- D - rate (mean x^ x^T with a zero diagonal) D,    D = I at the start

Seen by gradient descent, D is a constant that reparametrises the weight: the network computes with W D, so the chain
rule alone gives dW = sum lam (D x)^T, dx = (W D)^T lam, for whatever method estimates lam, the adjoint of W D. Nothing
below the weights knows of D. (`method="wp"` perturbs W D, not W; both are estimates of the same gradient.)

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
        every: D changes on every so many calls of `update_`.
        device: where D is.
        dtype: D's type, by default torch's.

    Attributes:
        matrix: D, (size, size), a buffer.
        calls: how often `update_` was called, 0-dim int64, a buffer: `every` resumes where it stopped.

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
            RuntimeError: the type of `activity` is not D's, outside autocast.
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
            valid: which of x count, (...) bool; all by default.

        Raises:
            ValueError, TypeError: `activity` is no floating tensor of this shape.
            RuntimeError: the step would not be stable, see `Decorrelation`; D is then as it was.
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
        """Return W D in the type of W, also under autocast: the network decides about the types of its products."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.to(self.matrix.dtype) @ self.matrix).to(weight.dtype)


class Site(NamedTuple):
    """A weight whose presynaptic activity is decorrelated."""

    module: nn.Module
    name: str
    layer: int
    """Of the RNN; -1 for the readout."""
    side: int
    """Direction, 0 or 1."""

    def activity(self, run: CleanRun) -> Tensor:
        """Return what the weight would see without D: (T, B, N), in the order of `valid_steps`."""
        if self.layer < 0:
            return run.outputs
        here = run.layers[self.layer][self.side]
        return here.states[:-1] if self.name.startswith("weight_hh") else here.inputs


class Decorrelation:
    """Attaches a matrix D to weights of an RNN and changes it beside the optimiser.

        decorrelation = Decorrelation(rnn)
        ...
        optimiser.step()
        decorrelation.update_(inputs, hx)            # one clean run, no gradients

    Every weight has a D of its own, a parametrization (`torch.nn.utils.parametrize`) in the RNN: D is in the
    state_dict, and moves and is copied with the module. Parameters stay the same objects, so that the optimiser may be
    made before or after. A weight that has a D already keeps it. Other parametrizations
    (orthogonal, weight_norm) must be registered before; W is then what they make of it.

    The rule only ever shrinks: the power of D x falls until nothing is correlated, and W has to grow to make up for it.
    With several processes each updates by its own samples: broadcast or average `matrices` to keep them equal.

    Args:
        rnn: an `anpgpu.RNN`, by any method, or a `torch.nn.RNN`.
        readout: also decorrelate what this `torch.nn.Linear` sees of the RNN's outputs.
        hidden: decorrelate hidden states, the presynaptic activity h_{t-1} of every W_hh and the lower layer's outputs
            as W_ih of every layer but the first sees them (both directions at once in a bidirectional network).
        inputs: decorrelate the network's inputs, as W_ih of the first layer sees them.
        rate: step size of the rule, positive. A step is taken to be stable while rate times the Frobenius norm of mean
            x^ x^T, with a zero diagonal, is below 2; rate < 2 / mean ||x^||^2 ensures it.
        every: D changes on every so many calls of `update_`.
        average_over_time: one step a call, by the mean over samples and time steps; False: one step per time step, by
            the mean over samples.

    Raises:
        ValueError, TypeError: an argument is outside its range; the message quotes it.
    """

    def __init__(
        self,
        rnn: nn.RNN,
        readout: nn.Linear | None = None,
        *,
        hidden: bool = True,
        inputs: bool = False,
        rate: float = 1e-3,
        every: int = 1,
        average_over_time: bool = True,
    ) -> None:
        if not isinstance(rnn, nn.RNN):
            raise TypeError(f"rnn must be an anpgpu.RNN or a torch.nn.RNN, got {type(rnn).__name__}")
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
        """Every D, (N, N), by its weight's name; the readout's is "readout"."""
        names = ["readout" if site.layer < 0 else site.name for site in self.sites]
        return {name: one.matrix for name, one in zip(names, self._parametrizations(), strict=True)}

    @torch.no_grad()
    def update_(
        self,
        inputs: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Run the clean network once, without dropout, and change every D by the rule.

        Args:
            inputs: as the rnn's, or a PackedSequence; any that stand for the rest will do, a part of a long sequence.
            hx: initial state, as the rnn's.
            lengths: valid steps of each sample, (B,), in [1, T]; padding counts for nothing.

        Raises:
            ValueError, TypeError: an argument is not of this form; the message quotes it.
            RuntimeError: a step would not be stable, or not finite, with the value; every D is then as it was.
                Or a D is no longer there, as after `fold_()`.
        """
        found = self._parametrizations()
        due = [_is_due(one.calls, self.every) for one in found]
        if any(due):
            given = sequences(self.rnn, inputs, hx, lengths)
            with torch.autocast(given.inputs.device.type, enabled=False):
                run = run_network(given.network, given.inputs, given.h_0, given.lengths)
                valid = None
                if given.lengths is not None:
                    valid = valid_steps(len(given.inputs), given.lengths, given.inputs.device)
                _change(
                    [
                        _step(site.name, one.matrix, self._rows(site.activity(run), valid), self.rate)
                        for site, one, now in zip(self.sites, found, due, strict=True)
                        if now
                    ]
                )
        for one in found:
            one.calls += 1
        # nn.RNN keeps the weights it last computed; with their graph it could not be deep-copied.
        self.rnn._update_flat_weights()

    def _parametrizations(self) -> list[DecorrelatedWeight]:
        """Return what holds each D."""
        every = []
        for site in self.sites:
            found = _last_parametrization(site.module, site.name)
            if not isinstance(found, DecorrelatedWeight):
                last = "none" if found is None else type(found).__name__
                raise RuntimeError(
                    f"the last parametrization of {site.name} must be its decorrelation, got {last}: "
                    "make a new Decorrelation, after every other parametrization"
                )
            every.append(found)
        return every

    def _rows(self, activity: Tensor, valid: Tensor | None) -> list[Tensor]:
        """Return the activity, (N, units), of each step of the rule."""
        if self.average_over_time:
            return [activity.flatten(0, 1) if valid is None else activity[valid]]
        return [step if valid is None else step[valid[time]] for time, step in enumerate(activity)]

    def fold_(self) -> None:
        """Multiply every D into its weight and take it off: the same network, without decorrelation.

        Parameters stay the same objects. All other parametrizations of these weights become permanent, too; a weight of
        several originals, such as weight_norm's, becomes a new parameter. Nothing is left to update then.
        """
        self._parametrizations()
        for module in {id(site.module): site.module for site in self.sites}.values():
            # A copied module shares its class with the original, whose properties must stay.
            made = type(module)
            module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        for site in self.sites:
            parametrize.remove_parametrizations(site.module, site.name, leave_parametrized=True)
        # In the order of a plain module, by which optimisers know them.
        for name in [name for name in self.rnn._flat_weights_names if name in self.rnn._parameters]:
            self.rnn._parameters[name] = self.rnn._parameters.pop(name)
        if self.readout is not None:
            self.readout._parameters["bias"] = self.readout._parameters.pop("bias")


def squared_correlation(activity: Tensor, *, centred: bool = True) -> Tensor:
    """Return the mean over pairs of different units of their squared correlation, 0-dim float64.

    Args:
        activity: (..., N), samples along everything but the last dimension.
        centred: Pearson's coefficient, covariance over standard deviations; False: without taking off the means, the
            moments that decorrelation works on. Units that do not vary (are zero) are left out; NaN where
            fewer than two are left.

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
    # A unit that does not vary keeps the rounding of its mean.
    varies = size > 1e-12 * power
    rows = rows[:, varies] / size[varies]
    units = rows.shape[1]
    if units < 2:
        return rows.new_full((), math.nan)
    squared: Tensor = (rows.t() @ rows).square().sum() - units
    return squared / (units * (units - 1))


def _sites(rnn: nn.RNN, readout: nn.Linear | None, *, hidden: bool, inputs: bool) -> list[Site]:
    found = []
    for index in range(len(rnn.all_weights)):
        layer, side = divmod(index, 2 if rnn.bidirectional else 1)
        suffix = f"l{layer}" + ("_reverse" if side else "")
        if hidden if layer else inputs:
            found.append(Site(rnn, f"weight_ih_{suffix}", layer, side))
        if hidden:
            found.append(Site(rnn, f"weight_hh_{suffix}", layer, side))
    return found if readout is None else [*found, Site(readout, "weight", -1, 0)]


def _last_parametrization(module: nn.Module, name: str) -> nn.Module | None:
    every = getattr(module, "parametrizations", None)
    if not isinstance(every, nn.ModuleDict) or name not in every:
        return None
    return list(every[name].children())[-1]


def _rate(rate: float) -> float:
    if not 0 < real("rate", rate) < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate!r}")
    return float(rate)


def _is_due(calls: Tensor, every: int) -> bool:
    return every == 1 or (int(calls) + 1) % every == 0


class Step(NamedTuple):
    """A D and what it is to become."""

    name: str
    rate: float
    matrix: Tensor
    becomes: Tensor
    overshoot: Tensor
    """The largest norm of rate (mean x^ x^T with a zero diagonal), 0-dim: stable below 2."""


def _step(name: str, matrix: Tensor, activity: list[Tensor], rate: float) -> Step:
    """Apply the rule once for each activity, (N, units)."""
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
    """Put the new matrices in place, all or none."""
    worst = torch.stack([step.overshoot.double() for step in steps]).tolist()
    for step, overshoot in zip(steps, worst, strict=True):
        if not overshoot < 2:
            raise RuntimeError(
                f"rate={step.rate} times the mean of x^ x^T off its diagonal has norm {overshoot:.3g} for {step.name}, "
                "and a step is stable below 2: lower the rate or scale the activity down (D is as it was)"
            )
    for step in steps:
        step.matrix.copy_(step.becomes)
