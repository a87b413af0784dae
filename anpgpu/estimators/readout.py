"""Perturbing the readout: noise on the outputs, credited with the change of the loss.

    delta_o_t = zeta_t;  dL/do_t = mean_p c_t zeta_t / sigma^2

Node perturbation of a layer without recurrence: the credit is the loss difference of the same step, or of the whole
sequence where the loss is one value per sequence. An alternative to the closed form of readout="exact", and the only
way where the loss cannot be differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anpgpu.kernels.adjoint import returns
from anpgpu.kernels.loss import output_deviation
from anpgpu.kernels.noise import Counters, NoiseSteps, Purpose, padded
from anpgpu.runtime.memory import FIXED_BYTES
from anpgpu.runtime.ranges import within
from anpgpu.runtime.settings import Settings
from anpgpu.task.problem import Problem

from .found import raise_if_lost
from .job import BlackBoxChange


@within("perturbed_readout")
def perturb_readout(
    problem: Problem, outputs: Tensor, settings: Settings, seed: Tensor, samples: slice, max_memory: int
) -> Tensor:
    """Return the estimate of dL/do, (T, b, O), from clean outputs of some samples, (T, b, O)."""
    time, batch, width = outputs.shape
    total, sigma = settings.options.rollouts, settings.options.sigma
    rollout_bytes = outputs.element_size() * max(1, time * batch * (6 * width * problem.loss.rows_per_output + 4))
    step = min(total, max(1, (max_memory - FIXED_BYTES) // rollout_bytes))
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
        # Noise rows are padded, to many times the width of a few outputs: one step at a time keeps this small.
        buffer = outputs.new_empty((1, batch, count, padded(width)))
        for step_index in range(time):
            delta_o[step_index] = injected.fill(step_index, buffer)[0]
        if change is None:
            delta_loss = spec.differences(whole, output_deviation(spec.readout, delta_o))
        else:
            delta_loss = change.of(delta_o)
        usable = torch.isfinite(delta_loss).all(0)
        finite[:, first : first + count] = usable
        credit = returns(torch.where(usable, delta_loss, 0), 1.0 if loss.black_box and loss.per_sequence else 0.0)
        gradient += (credit.unsqueeze(2) @ (delta_o / sigma)).squeeze(2) / sigma
    counts = settings.share.counted(finite)
    raise_if_lost(counts, samples.start, sigma)
    settings.share.complete_(gradient)
    return gradient / counts.view(1, -1, 1)
