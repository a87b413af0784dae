"""Perturbed rollouts in Triton, in two forms behind one function; `tiles.py` chooses.

Contract and equations: `rollout.py`. Resident: `rollout_resident_triton.py`. Stepwise: `rollout_stepwise_triton.py`,
one launch per time step. Of gated cells: `rollout_gated_resident_triton.py`, `rollout_gated_triton.py`. All only
launch: no host synchronisation, and every result depends on device memory alone, so a call can be captured in a CUDA
graph (which makes the stepwise form's launches cheap where steps are short).

Operands are rounded to `options.precision`; everything else is float32. The state after the last step and a stored
delta_a are bfloat16 with 16-bit operands; the last state of a gated cell is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch_triton import OPERAND_DTYPES, capability, check_cell, stored_dtype
from .loss import Loss
from .loss_triton import LossArguments, loss_arguments
from .noise import Counters
from .rollout import Rollout, RolloutOptions
from .rollout_gated_resident_triton import run_gated_resident
from .rollout_gated_triton import run_gated
from .rollout_resident_triton import run_resident
from .rollout_stepwise_triton import run_stepwise
from .tiles import delta_a_stride, rollout_launch, takes_plain_difference

FORMS = {"resident": run_resident, "stepwise": run_stepwise}
GATED_FORMS = {"resident": run_gated_resident, "stepwise": run_gated}


def rollout(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    *,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Run a block of perturbed rollouts through time; see `rollout.rollout`."""
    return rollout_in_form("auto", preact, hidden, weight_hh, loss, seed, options, counters, delta_h0)


def rollout_in_form(
    form: str,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss | None,
    seed: Tensor,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None = None,
) -> Rollout:
    """Do what `rollout` does in the form "resident" or "stepwise"; "auto" chooses.

    Raises:
        ValueError: a dtype, precision, cell or loss that Triton does not serve, or a form that cannot hold the shapes.
    """
    for name, tensor in (("preact", preact), ("hidden", hidden), ("weight_hh", weight_hh)):
        if tensor.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            raise ValueError(f"backend triton runs in float32; {name} is {tensor.dtype}")
    if options.precision not in OPERAND_DTYPES:
        raise ValueError(f"backend triton has no precision {options.precision!r}, only {sorted(OPERAND_DTYPES)}")
    check_cell(options)
    arguments = loss_arguments(loss)
    (time, batch, _), units = preact.shape, weight_hh.shape[1]
    launch = rollout_launch(
        units=units,
        outputs=arguments.outputs(units) if arguments.form.of_outputs else 0,
        has_readout=arguments.readout is not None,
        returns_outputs=arguments.form.returned,
        batch=batch,
        rollouts=options.rollouts,
        precision=options.precision,
        arch=capability(preact.device),
        gates=options.cell.gates,
        wide=takes_plain_difference(options.precision, options.sigma),
        form=form,
    )
    results = _empty_results(preact, units, arguments, options)
    if 0 in {time, batch, units, options.rollouts}:
        start = torch.zeros_like(results.delta_h) if delta_h0 is None else delta_h0
        return results._replace(delta_h=results.delta_h.copy_(start).to(preact.dtype))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(preact):
        forms = GATED_FORMS if options.cell.noise_in_state else FORMS
        forms[launch.form](launch, preact, hidden, weight_hh, arguments, seed, options, counters, delta_h0, results)
    delta_a = None if results.delta_a is None else results.delta_a[..., : units * options.cell.states]
    return results._replace(delta_a=delta_a, delta_h=results.delta_h.to(preact.dtype))


def _empty_results(preact: Tensor, units: int, loss: LossArguments, options: RolloutOptions) -> Rollout:
    """Return the tensors that the kernels fill; delta_a still has its padding."""
    time, batch, _ = preact.shape
    size = units * options.cell.states
    rows = (batch, options.rollouts)
    stored = stored_dtype(options)
    return Rollout(
        preact.new_empty((time, *rows), dtype=torch.float32) if loss.form.measured else None,
        preact.new_empty((time, *rows, delta_a_stride(size)), dtype=stored) if options.store_delta_a else None,
        preact.new_empty((*rows, size), dtype=torch.float32 if options.cell.noise_in_state else stored),
        preact.new_empty((time, *rows, loss.outputs(units)), dtype=torch.float32) if loss.form.returned else None,
    )
