"""Rivals: other ways to a recurrent network's gradient, each from its equations, for `study_rivals.py`.

    bptt      the whole sequence, by autograd                            Werbos 1990
    bptt-8    each loss through its last 8 steps, BPTT(h)                Williams and Peng 1990
    bptt-1    each loss through its own step                             Elman 1990
    rtrl      d state / d parameters, carried forward                    Williams and Zipser 1989
    snap-1    that, within each unit alone                               Menick et al., ICLR 2021, arXiv:2006.07232
    rflo      that, with a fixed leak for the unit's own path            Murray, eLife 2019
    e-prop    that, with the path through the gates left out             Bellec et al., Nature Communications 2020
    uoro      that, as one random product of vectors                     Tallec and Ollivier 2018, arXiv:1702.05043

All give the gradient of the mean loss of a window of T steps, and that of the readout exactly. Where a window continues
the last one, those that run forward in time carry what they know, while BPTT ends at the window's start; windows of one
step are the usual online form of the former. The errors of hidden states are W_o^T e everywhere, never random feedback.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from rivals_backward import LossOf, Outcome, Rival, Truncated, Whole
from rivals_cells import CELLS, State
from rivals_forward import EProp, Influence, Rflo, SnAp1, Uoro
from torch import nn

__all__ = ["CELLS", "RIVALS", "LossOf", "Outcome", "Rival", "State"]

RIVALS: dict[str, Callable[[nn.RNNBase, nn.Linear], Rival]] = {
    "bptt": Whole,
    "bptt-8": functools.partial(Truncated, depth=8),
    "bptt-1": functools.partial(Truncated, depth=1),
    "rtrl": Influence,
    "snap-1": SnAp1,
    "rflo": Rflo,
    "e-prop": EProp,
    "uoro": Uoro,
}
"""Rivals by the name in tables, each made from a network and its readout."""
