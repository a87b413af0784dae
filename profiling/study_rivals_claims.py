"""What learned feedback promises beside BPTT, and whether the runs of `study_rivals.py` keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from study_rivals_rows import AT, EXACT, Group, Row, exact_of

__all__ = ["Claim", "claims_of"]

OURS = "anp-feedback"

NEUROGYM = ("perceptual-decision", "context-decision", "delayed-match")

POINTS = {"mnist-rows": 1, "mnist-7x7": 2, "mnist-14x14": 2, **dict.fromkeys(NEUROGYM, 2)}
"""Points of accuracy by which learned feedback may be behind BPTT, after as many updates."""


class Claim(NamedTuple):
    """A bound on learned feedback beside BPTT, mean over the seeds that both have."""

    task: str
    cell: str
    amount: int
    """Updates, or time steps."""
    figure: str
    rates: tuple[float, float]
    """Learning rates of BPTT and of learned feedback."""
    own: bool | None
    """Whether learned feedback's is the one that its own tuning chose; None where there was one rate."""
    seeds: int
    bptt: float
    feedback: float
    apart: tuple[float, float]
    """The lowest and the highest difference of a seed, learned feedback's less BPTT's."""
    bound: float
    """The largest, of an accuracy the smallest, that `feedback` may be."""
    holds: bool
    counts: bool
    """Whether BPTT solves the task."""


def claims_of(group: Group, rows: Sequence[Row], solved: float) -> list[Claim]:
    """Return what learned feedback promises of a group; [] where nothing is promised.

    Once at the learning rate of its own tuning, and once at that of BPTT's. Of several rows of BPTT the best stands for
    it.
    """
    exact = exact_of(rows)
    if exact is None or group.task not in ("copying-40", "characters", *POINTS):
        return []
    claims = []
    given = {row.rate for row in rows if row.name.split(AT)[0] == EXACT and row.own is not False}
    mine = [row for row in rows if row.name.split(AT)[0] == OURS and (row.own is not False or row.rate in given)]
    for ours in sorted(mine, key=lambda row: row.own is False):
        seeds = sorted(set(exact.seeds) & set(ours.seeds))
        # A run that broke off has no accuracy, so that seeds and accuracies differ in number: the claim then fails.
        figures = [row.accuracies if group.task in POINTS else row.losses for row in (exact, ours)]
        by_seed = [dict(zip(row.seeds, found, strict=False)) for row, found in zip((exact, ours), figures, strict=True)]
        whole = all(len(found) == len(row.seeds) for row, found in zip((exact, ours), figures, strict=True))
        bptt, feedback = (float(np.mean([found[seed] for seed in seeds])) if whole else math.nan for found in by_seed)
        found, reference = by_seed[1], by_seed[0]
        apart = [found[seed] - reference[seed] for seed in seeds] if whole else [math.nan]
        figure, bound = "right", bptt - POINTS.get(group.task, 0) / 100
        if group.task == "copying-40":
            figure, bound = "loss, nats", 1.25 * bptt + 0.01
        elif group.task == "characters":
            bptt, feedback = bptt / math.log(2), feedback / math.log(2)
            apart = [difference / math.log(2) for difference in apart]
            figure, bound = "bits per character", 1.03 * bptt
        holds = feedback >= bound if figure == "right" else feedback <= bound
        how = (group.task, group.cell, group.amount, figure, (exact.rate, ours.rate), ours.own, len(seeds))
        ends = (min(apart), max(apart))
        claims.append(Claim(*how, bptt, feedback, ends, bound, holds, float(np.mean(exact.losses)) <= solved))
    return claims
