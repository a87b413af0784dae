"""What `diagnose` returns: rows, a table, a plot, a recommendation and a sentence of advice. Source: derived here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from anpgpu.perturbation import Perturbation
from anpgpu.registry import ESTIMATORS

from .alignment import Alignment


class Row(NamedTuple):
    """One setting, measured over several seeds."""

    perturbation: Perturbation
    total: Alignment
    """Of the gradient of all the rnn's parameters, concatenated."""
    parts: dict[str, Alignment]
    """Of "weight_hh", "weight_ih" and "bias" separately, each over all layers and directions. Too small a discount
    shows in weight_hh."""
    split_half: float
    """Mean of `Estimate.split_half` over seeds: shows variance, not bias. NaN where a method has none."""
    skipped: int
    """Number of rollouts that were not finite, over all seeds."""
    seconds: float
    """Median wall time of an estimate on this machine. The recommendation uses `cost`, which is reproducible."""
    cost: float
    """Work of an estimate, in rollouts of "anp"; see `cost_of`."""
    error: str | None = None
    """Why there is no estimate; None where there is."""
    learning: tuple[tuple[int, float], ...] = ()
    """Of a method that learns from update to update: numbers of updates of this batch before, each with the cosine (or
    the agreement of seeds) there. The rest of the row is measured after the last."""

    def score(self, unseen: str | None) -> float:
        """Return the cosine to the true gradient, or the agreement of seeds where that is unseen; -inf for neither."""
        value = self.total.cosine if unseen is None else self.total.agreement
        return value if math.isfinite(value) else -math.inf


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Result of `diagnose`."""

    rows: tuple[Row, ...]
    current: Row
    """The setting in use: `diagnose`'s argument, the rnn's own, or the library's default."""
    best: Row
    """The recommended setting, as measured."""
    advice: str
    """One sentence: what the current setting lacks, and what to use."""
    unseen: str | None
    """Why there is no true gradient to compare with; None where there is one."""

    @property
    def recommendation(self) -> Perturbation:
        """The recommended setting, ready for use."""
        return self.best.perturbation

    @property
    def learning_rate_scale(self) -> float:
        """Factor on SGD's learning rate that gives steps of BPTT's size; Adam does not depend on the norm."""
        return 1 / self.best.total.ratio

    def __repr__(self) -> str:
        return f"<Diagnosis of {len(self.rows)} settings: {self.advice}>"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return all rows as aligned text."""
        names = "method,rollouts,discount,sigma,cosine,W_hh,limit,+-,seeds,halves,ratio,cost,ms,"
        lines = [names.split(","), *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        first, *rest = widths
        text = ["  ".join((line[0].ljust(first), *map(str.rjust, line[1:], rest))).rstrip() for line in lines]
        size = f"Adam does not feel it, SGD's learning rate wants {self.learning_rate_scale:.3g} times BPTT's."
        return "\n".join(
            (
                *text,
                "",
                "< recommended, * current. cosine, W_hh: of one estimate to BPTT's gradient, over all parameters of",
                "the rnn and W_hh alone. limit +-: of infinitely many rollouts, with its error; what it lacks is bias.",
                "seeds, halves: agreement of different seeds, and of the two halves of the rollouts; they show",
                "variance only, a discount of 0 looks good to them. cost: work in rollouts of anp. ratio: norm over",
                f"that of BPTT's gradient; {size}"
                if self.unseen is None
                else f"that of BPTT's gradient. There is none here: {self.unseen}.",
                "",
                *self._learning(),
                self.advice,
            )
        )

    def _learning(self) -> list[str]:
        """Return a line for each setting that learns from update to update, and an empty line."""
        lines = []
        for row in self.rows:
            if row.learning:
                numbers, values = zip(*row.learning, strict=True)
                told = ", ".join(_figure(value, ".2f") for value in values)
                after = ", ".join(map(str, numbers))
                what = "cosine" if self.unseen is None else "agreement of seeds"
                lines.append(f"{_name(row.perturbation)}: {what} {told} after {after} updates of this batch")
        return [*lines, ""] if lines else []

    def _cells(self, row: Row) -> list[str]:
        setting, total = row.perturbation, row.total
        hidden = row.parts.get("weight_hh", Alignment())
        cosines = (total.cosine, hidden.cosine, total.limit, total.limit_error, total.agreement, row.split_half)
        return [
            setting.method,
            str(setting.rollouts),
            f"{setting.discount:g}" if discounted(setting.method) else "-",
            f"{setting.sigma:g}",
            *(_figure(value, ".2f") for value in cosines),
            _figure(total.ratio, ".3g"),
            f"{row.cost:.0f}",
            _figure(1e3 * row.seconds, ".0f"),
            ("<" if row is self.best else "") + ("*" if row is self.current else ""),
        ]

    def plot(self, path: str | Path) -> None:
        """Write a heat map of the cosine over discount and rollouts, one panel per method.

        The suffix of `path` chooses the format. Without a true gradient the map shows the agreement of different seeds.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'anpgpu[plot]'") from error
        sigma = statistics.mode(row.perturbation.sigma for row in self.rows)
        shown = [row for row in self.rows if row.perturbation.sigma == sigma]
        methods = list(dict.fromkeys(row.perturbation.method for row in shown))
        figure = Figure(figsize=(1.5 + 3 * len(methods), 3.6), layout="constrained")
        axes = figure.subplots(1, len(methods), squeeze=False)[0]
        for axis, method in zip(axes, methods, strict=True):
            mine = [row for row in shown if row.perturbation.method == method]
            across = sorted({row.perturbation.rollouts for row in mine})
            upward = sorted({row.perturbation.discount for row in mine})
            values = torch.full((len(upward), len(across)), math.nan)
            for row in mine:
                place = upward.index(row.perturbation.discount), across.index(row.perturbation.rollouts)
                value = row.score(self.unseen)
                if math.isfinite(value):
                    values[place] = value
                    weight = "bold" if row is self.best else "normal"
                    colour = "white" if value < 0.6 else "black"
                    axis.text(*place[::-1], f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
            image = axis.imshow(values.numpy(), vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
            axis.set_xticks(range(len(across)), [str(rollouts) for rollouts in across])
            axis.set_yticks(range(len(upward)), [f"{discount:g}" for discount in upward])
            axis.set(title=method, xlabel="rollouts", ylabel="discount")
        label = "cosine to BPTT's gradient" if self.unseen is None else "agreement of seeds (variance only)"
        figure.colorbar(image, ax=list(axes), label=label)
        figure.suptitle(f"sigma {sigma:g}")
        figure.savefig(path, dpi=120)


def discounted(method: str) -> bool:
    """Return whether a method's estimate depends on the discount."""
    return ESTIMATORS[method].discounted


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def cost_of(perturbation: Perturbation, hidden: int) -> float:
    """Return the work of an estimate in rollouts; one rollout is H^2 multiply-adds per step and sample."""
    return ESTIMATORS[perturbation.method].cost(perturbation.rollouts, hidden)


def cheapest(rows: Sequence[Row], tolerance: float, unseen: str | None) -> Row:
    """Return the cheapest row whose score is within `tolerance` of the best; at equal cost, the largest discount.

    Raises:
        RuntimeError: no row has an estimate with a direction.
    """
    if unseen is not None:
        # Bias cannot be measured, so only the least biased rows qualify: those with the largest discount.
        largest = max(row.perturbation.discount for row in rows)
        rows = [row for row in rows if row.perturbation.discount == largest or not discounted(row.perturbation.method)]
    top = max(row.score(unseen) for row in rows)
    if top == -math.inf:
        why = next((row.error for row in rows if row.error), "every estimate is zero, or not finite")
        raise RuntimeError(f"no setting of the grid gives an estimate: {why}")
    near = [row for row in rows if row.score(unseen) >= top - tolerance]
    return min(near, key=lambda row: (row.cost, -row.perturbation.discount, -row.score(unseen)))


def closest_sigma(rows: Sequence[Row], near: Perturbation, tolerance: float, unseen: str | None) -> Row | None:
    """Return the row with the sigma closest to `near`'s, among those that differ from it in sigma alone.

    Only rows whose score is within `tolerance` of the best of them count; None where there is no estimate.
    """
    same = [row for row in rows if dataclasses.replace(row.perturbation, sigma=near.sigma) == near]
    top = max((row.score(unseen) for row in same), default=-math.inf)
    good = [row for row in same if row.score(unseen) >= top - tolerance and top > -math.inf]
    return min(good, key=lambda row: abs(math.log(row.perturbation.sigma / near.sigma)), default=None)


def advise(rows: Sequence[Row], current: Row, best: Row, tolerance: float, unseen: str | None) -> str:
    """Return one sentence: what the current setting lacks, and what to use instead."""
    # What more rollouts would bring the current setting is worth a word only where it is kept.
    lack = _lack(rows, current, tolerance, unseen, predict=best is current)
    text = f"{_name(current.perturbation)}: {lack}"
    if best is not current:
        text += f"; use {_name(best.perturbation)}: {_lack(rows, best, tolerance, unseen)}"
    if unseen is not None:
        text += "; this shows variance only: bias cannot be seen without a gradient of the loss"
    largest = max(row.perturbation.discount for row in rows)
    if discounted(best.perturbation.method) and best.perturbation.discount < largest:
        # Measured on copying with a delay of 5: the best discount of "anp" is 0.5 at first, and 1 after 100 updates.
        text += "; diagnose again after some hundred updates, when longer delays may want a larger discount"
    return text + "."


def _name(setting: Perturbation) -> str:
    discount = f", discount {setting.discount:g}" if discounted(setting.method) else ""
    return f"{setting.method} with {setting.rollouts} rollouts{discount}, sigma {setting.sigma:g}"


def _lack(rows: Sequence[Row], row: Row, tolerance: float, unseen: str | None, *, predict: bool = True) -> str:
    total = row.total
    if row.score(unseen) == -math.inf:
        return row.error or "no estimate, it is zero or not finite"
    if unseen is not None:
        return f"seeds agree to {total.agreement:.2f}"
    text = f"cosine {total.cosine:.2f}, "
    if total.cosine >= 1 - tolerance:
        return text + "little is missing"
    # cosine = limit sqrt(agreement): the smaller factor is the one to improve.
    if not total.limit < math.sqrt(max(total.agreement, 0.0)):
        text += "what is missing is variance"
        if not predict:
            return text
        more = f": {2 * row.perturbation.rollouts} rollouts would give about {total.predicted(2):.2f}"
        return text + (more if math.isfinite(total.limit) else "; use more rollouts")
    return text + f"what is missing is bias, which more rollouts do not lower: {_cause(rows, row, tolerance)}"


def _cause(rows: Sequence[Row], row: Row, tolerance: float) -> str:
    """Name the knob whose change raises the limit most, from rows that differ in that knob alone."""
    setting, limit = row.perturbation, row.total.limit
    limits = {f"it is {setting.method}'s own": limit + tolerance}
    for other in rows:
        that = other.perturbation
        if that.sigma < setting.sigma and dataclasses.replace(that, sigma=setting.sigma) == setting:
            limits[f"sigma is too large, at {that.sigma:g} the limit is {other.total.limit:.2f}"] = other.total.limit
        if that.discount != setting.discount and dataclasses.replace(that, discount=setting.discount) == setting:
            size = "small" if that.discount > setting.discount else "large"
            key = f"the discount is too {size}, at {that.discount:g} the limit is {other.total.limit:.2f}"
            limits[key] = other.total.limit
    return max(limits, key=lambda key: limits[key] if math.isfinite(limits[key]) else -math.inf)
