"""Discounted returns and sums over rollouts in Triton: one read of delta_a, or none at all.

Contract and equations: `adjoint.py`. Everything accumulates in float32 and in a fixed order. Where time steps and
samples are too few to fill a GPU, the rollouts are split over programs as well; each split leaves partial sums and a
second pass adds them in order. The number of splits follows from the shapes alone: no result depends on the device.

The cost depends on what a thread owns. Of stored activity, a tile of rows is loaded, its norms are computed and the
rows are added to a tile of sums, all in registers; rollouts are added to each other only once, at the end. Of
regenerated noise, a thread owns the 128 signs (or 4 Gaussians) of one Philox call and goes through the rollouts one by
one: threads exchange nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjoint import by_activity, finite_rollouts, of_h, weighted_activity
from .launch_triton import check_cell, stored_dtype
from .loss import Loss, loss_of_steps
from .noise import UNITS_PER_GROUP, Counters
from .noise_triton import counter_words, noise_tile, unpack_counters
from .rollout import RolloutOptions
from .rollout_fused_triton import Counted, FusedResults, added, as_bytes, fused_rollouts, preferred_launch, tiles_of
from .rollout_triton import rollout
from .tiles import (
    INTERPRETED,
    RETURNS_BLOCK,
    RolloutLaunch,
    activity_launch,
    fused_steps,
    noise_sum_launch,
)

STRIDES = ("stride_step", "stride_sample", "stride_rollout")


@triton.jit(do_not_specialize=["time", "columns", "discount"])
def _returns_kernel(
    credit_ptr,  # (time, columns), contiguous, float32
    delta_loss_ptr,  # (time, columns), contiguous, float32
    carry_ptr,  # (columns), contiguous, float32
    discount,
    time,
    columns: tl.int64,
    HAS_CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the credit: a program owns BLOCK columns, each a (sample, rollout), and walks back through time."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    following = tl.zeros((BLOCK,), tl.float32)
    if HAS_CARRY:
        following = tl.load(carry_ptr + column, inside)
    # Four steps at a time: their loads are in flight together.
    for back in range(0, time, 4):
        step = time - 1 - back
        place = tl.cast(step, tl.int64) * columns + column
        difference = tl.load(delta_loss_ptr + place, inside)
        difference1 = tl.load(delta_loss_ptr + place - columns, inside & (step >= 1))
        difference2 = tl.load(delta_loss_ptr + place - 2 * columns, inside & (step >= 2))
        difference3 = tl.load(delta_loss_ptr + place - 3 * columns, inside & (step >= 3))
        following = difference + discount * following
        tl.store(credit_ptr + place, following, inside)
        following = difference1 + discount * following
        tl.store(credit_ptr + place - columns, following, inside & (step >= 1))
        following = difference2 + discount * following
        tl.store(credit_ptr + place - 2 * columns, following, inside & (step >= 2))
        following = difference3 + discount * following
        tl.store(credit_ptr + place - 3 * columns, following, inside & (step >= 3))


def returns(delta_loss: Tensor, discount: float, *, carry: Tensor | None = None) -> Tensor:
    """Return the credit c_t = delta_loss_t + discount c_{t+1}, (T, B, P); see `adjoint.returns`."""
    delta_loss = delta_loss.contiguous()
    if not discount or delta_loss.numel() == 0:
        return delta_loss.clone()
    time, columns = delta_loss.shape[0], delta_loss[0].numel()
    credit = torch.empty_like(delta_loss)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(delta_loss):
        _returns_kernel[(triton.cdiv(columns, RETURNS_BLOCK),)](
            credit,
            delta_loss,
            delta_loss if carry is None else carry.contiguous(),
            float(discount),
            time,
            columns,
            HAS_CARRY=carry is not None,
            BLOCK=RETURNS_BLOCK,
            num_warps=RETURNS_BLOCK // 32,
        )
    return credit


@triton.jit(do_not_specialize=["rows", "batch", "rollouts", "hidden", *STRIDES])
def _share_kernel(
    share_ptr,  # (time * batch, rollouts), contiguous, float32
    credit_ptr,  # (time * batch, rollouts), contiguous, float32
    delta_a_ptr,  # (time, batch, rollouts, hidden), any strides but a contiguous last dimension
    rows: tl.int64,
    batch,
    rollouts,
    hidden,
    stride_step: tl.int64,
    stride_sample: tl.int64,
    stride_rollout: tl.int64,
    inverse_sigma,
    BLOCK_ROLLOUTS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Write c H / (sigma ||delta_a / sigma||^2): a program owns BLOCK_ROLLOUTS rows and all their units."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROLLOUTS + tl.arange(0, BLOCK_ROLLOUTS)
    inside = row < rows
    group = row // rollouts
    origin = group // batch * stride_step + group % batch * stride_sample + row % rollouts * stride_rollout
    squared = tl.zeros((BLOCK_ROLLOUTS,), tl.float32)
    for start in range(0, hidden, BLOCK_UNITS):
        unit = start + tl.arange(0, BLOCK_UNITS)
        pointer = delta_a_ptr + origin[:, None] + unit[None, :]
        scaled = tl.load(pointer, inside[:, None] & (unit < hidden)[None, :], other=0.0).to(tl.float32) * inverse_sigma
        squared += tl.sum(scaled * scaled, 1)
    credit = tl.load(credit_ptr + row, inside, other=0.0)
    tl.store(share_ptr + row, _share(credit, squared, hidden, inverse_sigma), inside)


@triton.jit
def _share(credit, squared, hidden, inverse_sigma):
    """Return c H / (sigma ||delta_a / sigma||^2), or 0 where the rollout does not count."""
    usable = (squared > 0.0) & (squared < float("inf"))
    return tl.where(usable, credit * hidden * inverse_sigma / tl.where(usable, squared, 1.0), 0.0)


@triton.jit(do_not_specialize=["batch", "rollouts", "hidden", *STRIDES, "blocks", "first"])
def _activity_sum_kernel(
    sums_ptr,  # (splits, 2, time * batch, hidden), contiguous, float32
    credit_ptr,  # (time * batch, rollouts), contiguous, float32; the shares where FUSED is False
    delta_a_ptr,  # (time, batch, rollouts, hidden), any strides but a contiguous last dimension
    batch,
    rollouts,
    hidden,
    stride_step: tl.int64,
    stride_sample: tl.int64,
    stride_rollout: tl.int64,
    inverse_sigma,
    blocks,
    first,
    FUSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROLLOUTS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """Sum activity over rollouts: a program owns one (time, sample), `blocks` blocks of rollouts and BLOCK_UNITS units.

    FUSED: the units are the whole row, and its norm is taken on the way.
    ALIGNED: power of two that divides hidden and all strides.
    """
    group = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(2) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    # The same number with a factor that the compiler sees, which wide loads and stores need.
    width = hidden // ALIGNED * ALIGNED
    in_row = unit < width
    origin = tl.multiple_of(group // batch * stride_step + group % batch * stride_sample, ALIGNED)
    row_pointer = delta_a_ptr + origin + unit
    sums = tl.zeros((BLOCK_ROLLOUTS, BLOCK_UNITS), tl.float32)
    start = tl.program_id(1) * blocks * BLOCK_ROLLOUTS
    for block in range(blocks):
        rollout = start + block * BLOCK_ROLLOUTS + tl.arange(0, BLOCK_ROLLOUTS)
        offset = tl.multiple_of(rollout.to(tl.int64) * stride_rollout, ALIGNED)
        mask = (rollout < rollouts)[:, None] & in_row[None, :]
        scaled = tl.load(row_pointer[None, :] + offset[:, None], mask, other=0.0).to(tl.float32) * inverse_sigma
        share = tl.load(credit_ptr + group * rollouts + rollout, rollout < rollouts, other=0.0)
        if FUSED:
            share = _share(share, tl.sum(scaled * scaled, 1), hidden, inverse_sigma)
        # Dropped rows are set to zero, because 0 * inf is NaN.
        sums += tl.where((share != 0.0)[:, None], scaled, 0.0) * share[:, None]
    halves = tl.sum(tl.reshape(sums, (BLOCK_ROLLOUTS // 2, 2, BLOCK_UNITS)), 0)
    parity = (tl.arange(0, 2) + first) % 2
    target = (tl.program_id(1) * 2 + parity).to(tl.int64) * tl.num_programs(0) + group
    tl.store(sums_ptr + target[:, None] * width + unit[None, :], halves, in_row[None, :])


@triton.jit(do_not_specialize=["rows", "batch", "rollouts", "hidden", "pairs", "counters_low", "counters_high"])
def _noise_sum_kernel(
    sums_ptr,  # (splits, 2, time * batch, hidden), contiguous, float32
    credit_ptr,  # (time * batch, rollouts), contiguous, float32
    seed_ptr,  # ()
    rows: tl.int64,
    batch,
    rollouts,
    hidden,
    pairs,
    inverse_sigma,
    counters_low: tl.int64,
    counters_high: tl.int64,
    KIND: tl.constexpr,
    UNITS: tl.constexpr,  # of a group: `noise.UNITS_PER_GROUP`
    FAST: tl.constexpr,
    COLUMN_UNITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sum noise over rollouts: a program owns LANES columns, one parity and one split of `pairs` pairs of rollouts.

    A column is the COLUMN_UNITS units that one Philox block serves at one (time, sample). Columns are the last
    dimension, so that a thread holds a whole column and the compiler makes one Philox call of it.
    """
    column = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[None, :]
    quarter = (column % 4).to(tl.uint32)
    groups = (hidden + UNITS - 1) // UNITS
    group = (column // 4 % groups).to(tl.uint32)
    row = column // 4 // groups
    index = tl.arange(0, COLUMN_UNITS)[:, None].to(tl.uint32)
    unit = UNITS * group + 2 * quarter + (128 * (index // 32) + 8 * (index // 2 % 16) + index % 2)
    c0, c1, c2, c3 = unpack_counters(counters_low, counters_high)
    parity = tl.program_id(1)
    first = (parity + (c2 % 2).to(tl.int32)) % 2
    c1, c3 = c1 + (row // batch).to(tl.uint32), c3 + (row % batch).to(tl.uint32)
    seed = tl.load(seed_ptr)
    scale = tl.full((), 1.0, tl.float32)
    sums = tl.zeros((COLUMN_UNITS, LANES), tl.float32)
    for pair in range(tl.program_id(2) * pairs, (tl.program_id(2) + 1) * pairs):
        rollout = 2 * pair + first
        credit = tl.load(credit_ptr + row * rollouts + rollout, (row < rows) & (rollout < rollouts), other=0.0)
        sums += credit * noise_tile(seed, c0, c1, c2 + rollout.to(tl.uint32), c3, unit, scale, KIND, FAST)
    target = (tl.program_id(2) * 2 + parity).to(tl.int64) * rows + row
    inside = (row < rows) & (unit < hidden)
    tl.store(sums_ptr + target * hidden + unit, sums * inverse_sigma, inside)


def adjoint(
    credit: Tensor,
    delta_a: Tensor | None,
    seed: Tensor,
    *,
    weight_by: str,
    units: int,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
) -> Tensor:
    """Sum over a block of rollouts the estimates of dL/da that each makes, (2, T, B, H); see `adjoint.adjoint`."""
    stored = weighted_activity(weight_by, delta_a)
    time, batch = credit.shape[:2]
    credit = credit.contiguous()
    if credit.numel() == 0 or units == 0:
        return credit.new_zeros((2, time, batch, units))
    with torch.cuda.device_of(credit):
        if stored is None:
            partials = _noise_sums(credit, seed, units, options, counters)
        else:
            partials = _activity_sums(credit, stored, options.sigma, counters.rollout % 2)
    return added(partials).view(2, time, batch, units)


def _noise_sums(credit: Tensor, seed: Tensor, units: int, options: RolloutOptions, counters: Counters) -> Tensor:
    """Return the partial sums of c_t xi_t / sigma^2, (splits, 2, T B, H)."""
    time, batch, rollouts = credit.shape
    rows = time * batch
    launch = noise_sum_launch(rows, rollouts, units, options.noise)
    partials = credit.new_empty((launch.splits, 2, rows, units))
    low, high = counter_words(counters)
    _noise_sum_kernel[(launch.programs, 2, launch.splits)](
        partials,
        credit,
        seed,
        rows,
        batch,
        rollouts,
        units,
        launch.pairs,
        1.0 / options.sigma,
        low,
        high,
        KIND=options.noise,
        UNITS=UNITS_PER_GROUP[options.noise],
        FAST=not INTERPRETED,
        COLUMN_UNITS=launch.column_units,
        LANES=launch.lanes,
        num_warps=1,
    )
    return partials


def _activity_sums(credit: Tensor, delta_a: Tensor, sigma: float, first: int) -> Tensor:
    """Return the partial sums of c_t H delta_a_t / ||delta_a_t||^2, (splits, 2, T B, H).

    first: parity of the first rollout.
    """
    time, batch, rollouts = credit.shape
    rows, units = time * batch, delta_a.shape[-1]
    if delta_a.stride(-1) != 1:
        delta_a = delta_a.contiguous()
    strides = delta_a.stride()[:3]
    launch = activity_launch(rows, rollouts, units)
    fused = launch.unit_blocks == 1
    if not fused:
        share = torch.empty_like(credit)
        _share_kernel[(triton.cdiv(credit.numel(), launch.norm_rollouts),)](
            share,
            credit,
            delta_a,
            credit.numel(),
            batch,
            rollouts,
            units,
            *strides,
            1.0 / sigma,
            BLOCK_ROLLOUTS=launch.norm_rollouts,
            BLOCK_UNITS=launch.norm_units,
            num_warps=launch.norm_rollouts,
        )
        credit = share
    partials = credit.new_empty((launch.splits, 2, rows, units))
    _activity_sum_kernel[(rows, launch.splits, launch.unit_blocks)](
        partials,
        credit,
        delta_a,
        batch,
        rollouts,
        units,
        *strides,
        1.0 / sigma,
        launch.blocks,
        first,
        FUSED=fused,
        ALIGNED=math.gcd(16, units, *strides),
        BLOCK_ROLLOUTS=launch.block_rollouts,
        BLOCK_UNITS=launch.block_units,
        num_warps=launch.warps,
    )
    return partials


def rollout_adjoint(
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss,
    seed: Tensor,
    *,
    weight_by: str,
    options: RolloutOptions,
    counters: Counters = Counters(),  # noqa: B008  (an immutable tuple)
    delta_h0: Tensor | None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run rollouts and sum their adjoint at discount 0; see `adjoint.rollout_adjoint`.

    In one kernel where a program can hold whole rollouts. Elsewhere as at any discount: all steps run once, and are
    summed once it is known which rollouts stay finite; rollouts weighted by their noise store no activity.
    """
    check_cell(options)
    launch = preferred_launch(preact, weight_hh, loss, weight_by, options)
    if launch is not None:
        return _fused_adjoint(
            launch,
            preact,
            hidden,
            weight_hh,
            loss,
            seed,
            weight_by=weight_by,
            options=options,
            counters=counters,
            delta_h0=delta_h0,
            finite=finite,
        )
    keep = options._replace(store_delta_a=by_activity(weight_by))
    block = rollout(preact, hidden, weight_hh, loss, seed, options=keep, counters=counters, delta_h0=delta_h0)
    assert block.delta_loss is not None  # noqa: S101  (for the type checker; the loss is ours)
    if finite is None:
        finite = finite_rollouts(block.delta_loss, block.delta_h)
    credit = torch.where(finite, block.delta_loss, 0)
    units = weight_hh.shape[1]
    sums = adjoint(
        credit, of_h(block.delta_a, units), seed, weight_by=weight_by, units=units, options=options, counters=counters
    )
    return sums, block.delta_loss, block.delta_h


def _fused_adjoint(
    launch: RolloutLaunch,
    preact: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    loss: Loss,
    seed: Tensor,
    *,
    weight_by: str,
    options: RolloutOptions,
    counters: Counters,
    delta_h0: Tensor | None,
    finite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `rollout_adjoint` does, with the fused kernel.

    Where `finite` is None, a second launch mends the tiles of rollouts that turned out not to be finite. It is always
    made, as asking whether there are any would make the host wait.
    """
    time, batch, units = preact.shape
    delta_loss = preact.new_empty((time, batch, options.rollouts), dtype=torch.float32)
    tiles = triton.cdiv(options.rollouts, launch.block_rows)
    length = time if tiles == 1 else min(time, fused_steps(tiles, batch, units))

    def run(start: int, counted: Counted, first: Tensor | None, partials: Tensor) -> Tensor:
        """Run the steps of `partials`, and return their last delta_h."""
        steps = slice(start, start + partials.shape[2])
        last = preact.new_empty((batch, options.rollouts, units), dtype=stored_dtype(options))
        fused_rollouts(
            launch,
            preact[steps],
            hidden[steps],
            weight_hh,
            loss_of_steps(loss, steps),
            seed,
            weight_by=weight_by,
            options=options,
            counters=counters._replace(time=counters.time + start),
            delta_h0=first,
            counted=counted,
            results=FusedResults(delta_loss[steps], last, partials),
        )
        return last

    def summed(counted: Counted) -> tuple[Tensor, Tensor]:
        """Return the sums of all steps, as many at a time as there is room for, and the last delta_h."""
        sums, delta_h = preact.new_empty((2, time, batch, units), dtype=torch.float32), delta_h0
        for start in range(0, time, length):
            partials = preact.new_empty((tiles, 2, min(length, time - start), batch, units), dtype=torch.float32)
            delta_h = run(start, counted, delta_h, partials)
            sums[:, start : start + length] = added(partials)
        assert delta_h is not None  # noqa: S101  (for the type checker; time is at least 1)
        return sums, delta_h

    everything = Counted(None, None)
    if finite is not None:
        sums, delta_h = summed(Counted(as_bytes(finite), None))
    elif length == time:
        partials = preact.new_empty((tiles, 2, time, batch, units), dtype=torch.float32)
        delta_h = run(0, everything, delta_h0, partials)
        finite = finite_rollouts(delta_loss, delta_h)
        run(0, Counted(as_bytes(finite), as_bytes(tiles_of(~finite, launch.block_rows))), delta_h0, partials)
        sums = added(partials)
    else:
        sums, delta_h = summed(everything)
        finite = finite_rollouts(delta_loss, delta_h)
        lost = ~finite.all(1)
        again, _ = summed(Counted(as_bytes(finite), as_bytes(lost.unsqueeze(1).expand(-1, tiles))))
        sums = torch.where(lost.unsqueeze(-1), again, sums)
    return sums, delta_loss, delta_h.to(preact.dtype)
