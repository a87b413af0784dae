"""Perturbing the readout: noise on the outputs, credited with the loss it moves.

    delta_o_t = zeta_t;  dL/do_t = mean_p c_t zeta_t / sigma^2

Node perturbation of a layer without recurrence: the credit is the loss difference of the same step, or of the whole
sequence where the loss is one value per sequence. A second way to the gradient that "exact" computes in closed form,
and the only one where the loss cannot be differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .division import FIXED_BYTES
from .job import BlackBoxChange
from .kernels.adjoint import returns
from .kernels.loss import OutputsOnly, loss_differences
from .kernels.noise import Counters, NoiseSteps, Purpose, padded
from .problem import Problem
from .ranges import within
from .settings import Settings
from .sweep import raise_if_lost


@within("perturbed_readout")
def perturb_readout(
    problem: Problem, outputs: Tensor, settings: Settings, seed: Tensor, samples: slice, max_memory: int
) -> Tensor:
    """Return the estimate of dL/do, (T, b, O), from clean outputs of some samples, (T, b, O)."""
    time, batch, width = outputs.shape
    total, sigma = settings.options.rollouts, settings.options.sigma
    each = outputs.element_size() * max(1, time * batch * (6 * width + 4))
    step = min(total, max(1, (max_memory - FIXED_BYTES) // each))
    loss, whole = problem.loss, slice(0, time)
    change = BlackBoxChange(problem, outputs, samples) if loss.black_box else None
    spec = loss.spec(None, outputs, whole, samples, False, None)
    gradient = torch.zeros_like(outputs)
    finite = torch.ones((batch, total), dtype=torch.bool, device=outputs.device)
    for first in range(0, total, step):
        count = min(step, total - first)
        injected = NoiseSteps(
            seed,
            (time, batch, count, width),
            sigma=sigma,
            kind=settings.options.noise,
            counters=Counters(
                purpose=Purpose.READOUT,
                rollout=settings.share.own.start + first,
                sample=samples.start,
                rank=settings.process_rank,
            ),
            dtype=outputs.dtype,
        )
        delta_o = outputs.new_empty((time, batch, count, width))
        # Rows of noise are padded to many times what few outputs need.
        room = outputs.new_empty((1, batch, count, padded(width)))
        for now in range(time):
            delta_o[now] = injected.fill(now, room)[0]
        if change is not None:
            delta_loss = change.of(delta_o)
        elif not isinstance(spec, OutputsOnly):
            delta_loss = loss_differences(spec, whole, delta_o)
        usable = torch.isfinite(delta_loss).all(0)
        finite[:, first : first + count] = usable
        credit = returns(torch.where(usable, delta_loss, 0), 1.0 if loss.black_box and loss.per_sequence else 0.0)
        gradient += (credit.unsqueeze(2) @ (delta_o / sigma)).squeeze(2) / sigma
    counts = settings.share.counted(finite)
    raise_if_lost(counts.unsqueeze(1) > 0, samples.start, sigma)
    settings.share.complete_(gradient)
    return gradient / counts.view(1, -1, 1)
