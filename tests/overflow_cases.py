"""Rollouts at discount 0 of which some overflow after a few steps, and what is right: to leave them out whole."""

import torch
from tolerances import assert_close

from anpgpu.kernels import adjoint as reference
from anpgpu.kernels.loss import LinearLoss
from anpgpu.kernels.rollout import RolloutOptions, rollout
from anpgpu.registry import CELLS, ESTIMATORS

TIME, BATCH, UNITS = 4, 3, 5


def case(rollouts, seed, counters):
    """Arguments, options by name, and which rollouts stay finite, (B, P).

    Deviations grow by 1e9 at each of 4 steps. Those that begin at 1e6 leave float32's range at the last.
    """
    generator = torch.Generator().manual_seed(rollouts)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    preact, weight = draw(TIME, BATCH, UNITS), 1e9 / UNITS * torch.ones(UNITS, UNITS)
    lost = torch.zeros(BATCH, rollouts, dtype=torch.bool)
    lost[1, 0] = lost[1, -1] = lost[2, rollouts // 2] = True
    start = torch.where(lost, 1e6, 1e-2).unsqueeze(-1).expand(-1, -1, UNITS).contiguous()
    arguments = (preact, preact.relu(), weight, LinearLoss(draw(TIME, BATCH, UNITS)), seed)
    options = RolloutOptions(rollouts, sigma=1e-2, cell=CELLS["relu"].forms)
    return arguments, {"options": options, "counters": counters, "delta_h0": start}, ~lost


def expected(arguments, named, finite, method):
    """Sums of the rollouts that stay finite, from one run of all steps."""
    weight_by = ESTIMATORS[method].weight_by
    moved = rollout(*arguments, **named | {"options": named["options"]._replace(store_delta_a=True)})
    credit = torch.where(finite, moved.delta_loss, 0)
    units, options, counters = UNITS, named["options"], named["counters"]
    activity = moved.delta_a if weight_by == "activity" else None
    return reference.adjoint(
        credit, activity, arguments[-1], weight_by=weight_by, units=units, options=options, counters=counters
    ), moved


def assert_left_out(found, arguments, named, finite, method, tolerance):
    """What `rollout_adjoint` returned is the sums of the others, step by step, and says which are not finite."""
    sums, moved = expected(arguments, named, finite, method)
    assert torch.equal(reference.finite_rollouts(found[1], found[2]), finite)
    assert torch.equal(reference.finite_rollouts(moved.delta_loss, moved.delta_h), finite)
    assert bool(sums[:, 0].any())
    for step in range(TIME):
        assert_close(found[0][:, step], sums[:, step], tolerance)
