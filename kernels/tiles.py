"""Launch configurations from shapes, operand type and architecture: pure Python, no device is asked.

Where a bound below has no reason beside it, it follows from the compile table (`tests/compiled.json`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from .noise import UNITS_PER_GROUP
from .tiles_measured import (
    ALIGNED_UNITS,
    JOINED_GATED_OUTPUTS,
    JOINED_OUTPUTS,
    OPERAND_BYTES,
    StepTile,
    ceil_div,
    gated_tile,
    next_power_of_two,
    pieces_of,
    plain_tile,
    resident_tile,
    samples_of_step,
    step_tile,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter; Triton reads the variable when it is imported."""

SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one program can have, by compute capability; an unknown one counts as the nearest below."""

RESIDENT_MAX_UNITS = 256
RESIDENT_MAX_GATED_UNITS = 128
RESIDENT_MAX_OUTPUTS = 64
RESIDENT_MAX_UNITS_IEEE = 64
"""Beyond, products without a matrix unit hold too much in registers."""

NARROW_SIGMA = 1e-2
"""Standard deviation up to which tanh needs no plain difference (see `cell_triton.tanh_deviation`)."""

PARTIAL_STEPS = 32
"""Stepwise: steps whose partial sums of the loss difference are kept until they are added."""

UNIT_SUM_BLOCK = 256
"""Stepwise: rows of a program that adds those partial sums."""

STORED_BYTES = 1 << 28
"""Partial sums that `adjoint_triton.rollout_adjoint` keeps at a time."""

MARK_COLUMNS, MARK_ROWS = 64, 32
"""Rollouts of a program that looks for values that are not finite, and steps or units that it reads at a time."""

CLEAN_LOSS_ELEMENTS, CLEAN_LOSS_COLUMNS, CLEAN_LOSS_ROWS = 2048, 512, 32
"""Outputs that a program of the clean loss reads at a time; at most of one step; and at most how many steps it has."""

QUOTIENT_BLOCK = 1024
"""Elements of a program that makes tanh's quotient rows."""

RETURNS_BLOCK = 128
"""(sample, rollout) pairs of a program that walks back through time."""

WARPS_WANTED = 2112
"""Warps that keep a large GPU busy: sixteen for each of 132 multiprocessors."""

WARP_ELEMENTS = 2048
"""Tile elements of a warp: 64 sums for each thread leave room for as many loaded values."""

WIDEST_TILE = 8192
"""Hidden units up to which a row fits a tile; wider rows are read twice, once for their norm."""

SPLIT_SUM_BLOCK = 1024
"""Elements of a program that adds the partial sums of the splits."""


@dataclass(frozen=True)
class NoiseLaunch:
    """How the noise kernel is divided."""

    block_rows: int
    block_units: int
    warps: int


NOISE_LAUNCH = NoiseLaunch(block_rows=32, block_units=128, warps=4)


@dataclass(frozen=True)
class RolloutLaunch:
    """How a rollout kernel is divided."""

    form: str
    """"resident": one launch for all steps; "stepwise": one launch per step."""
    block_rows: int
    """Rollouts of a program."""
    block_units: int
    """Hidden units of a program; resident: all of them, padded to a power of two."""
    block_inner: int
    """Stepwise: units of one step of the product's inner loop."""
    block_outputs: int
    """Outputs of a tile behind the readout; 0 where there is no such tile."""
    warps: int
    stages: int
    shared_bytes: int
    """Estimate of a program's shared memory."""
    samples: int
    """Samples of a program: 1, or as many as have room; stepwise: 0 where programs take rows as they come."""
    reason: str
    """Why this form."""
    product: bool = False
    """Fused: whether rollouts are added up by the matrix unit."""
    registers: int | None = None
    """Resident and fused: bound on a thread's registers."""
    pieces: int = 1
    """Resident: pieces in which a clean row is loaded."""
    described: bool = False
    """Stepwise: tensors by descriptors (TMA)."""
    early: bool = False
    """Stepwise: clean rows are loaded before the product."""
    parts: int = 1
    """Stepwise: parts of the epilogue."""
    dependent: bool = False
    """Stepwise: a step's programs start while those of the step before finish."""
    joined: bool = False
    """Stepwise: the programs of a step's last units read out the step before and measure its loss."""

    @property
    def measuring(self) -> tuple[int, int]:
        """Rows and warps of a program that measures a loss of the outputs behind a step."""
        return (128, 8) if self.described else (self.block_rows, self.warps)


@dataclass(frozen=True)
class ActivityLaunch:
    """How the sum over stored activity is divided."""

    block_rollouts: int
    block_units: int
    unit_blocks: int
    warps: int
    splits: int
    blocks: int
    """Rollout blocks of one split."""
    norm_units: int
    """Units of a tile of the kernel that takes the norms of rows wider than `block_units`."""
    norm_rollouts: int = 4


@dataclass(frozen=True)
class NoiseSumLaunch:
    """How the sum over regenerated noise is divided."""

    column_units: int
    """Units of one thread: those that one Philox call serves, less what lies beyond the last unit for certain."""
    lanes: int
    programs: int
    splits: int
    pairs: int
    """Pairs of rollouts, one even and one odd, of one split."""


def approximates(precision: str) -> bool:
    """Return whether the GPU's approximate functions serve."""
    return precision != "fp32" and not INTERPRETED


def takes_plain_difference(precision: str, sigma: float) -> bool:
    """Return whether tanh takes the plain difference where delta_a is large."""
    return precision == "fp32" or sigma > NARROW_SIGMA


def delta_a_stride(units: int) -> int:
    """Return the stride of the rows of a stored delta_a."""
    return units if units < ALIGNED_UNITS else 16 * ceil_div(units, 16)


def shared_limit(arch: int) -> int:
    """Return the shared memory one program can have on compute capability `arch` (10 major + minor)."""
    known = [capability for capability in SHARED_BYTES if capability <= arch]
    return SHARED_BYTES[max(known)] if known else SHARED_BYTES[86]


def rollout_launch(
    *,
    units: int,
    outputs: int,
    has_readout: bool,
    returns_outputs: bool,
    batch: int,
    rollouts: int,
    precision: str,
    arch: int,
    gates: int = 1,
    wide: bool = False,
    form: str = "auto",
) -> RolloutLaunch:
    """Choose the form and tile sizes of a block of rollouts.

    Args:
        units: H.
        outputs: O, or H where there is no readout; 0 where the loss is none of the outputs.
        has_readout: whether a readout lies between the hidden state and the loss.
        returns_outputs: whether rollouts return the deviation of the outputs.
        batch: B; as P, it decides no more than the rows of a tile.
        rollouts: P.
        precision: operand type, "bf16", "fp16", "tf32" or "fp32".
        arch: compute capability, 10 major + minor.
        gates: of the cell; with more than one losses of the outputs are stepwise.
        wide: whether a cell with gates takes the exact difference where deviations are large.
        form: "auto", or "resident" or "stepwise" to force one.

    Raises:
        ValueError: the forced form cannot hold these shapes; the message says why.
    """
    if gates > 1:
        resident = _gated_resident_launch(units, rollouts, precision, gates, wide)
        obstacle = _gated_obstacle(resident, units, outputs, gates, arch)
        drawback = obstacle or _gated_drawback(resident, precision, arch, gates, wide)
    else:
        resident = _resident_launch(
            units=units,
            outputs=outputs if has_readout else 0,
            batch=batch,
            rollouts=rollouts,
            precision=precision,
            arch=arch,
        )
        if returns_outputs or (outputs and not has_readout):
            # A bound on registers would spill in the time loop.
            resident = replace(resident, registers=None)
        obstacle = _resident_obstacle(
            resident, units=units, outputs=outputs, has_readout=has_readout, returns_outputs=returns_outputs, arch=arch
        )
        drawback = obstacle or _resident_drawback(units, precision, arch)
    if form == "resident":
        if obstacle:
            raise ValueError(f"the resident form cannot run these rollouts: {obstacle}")
        return replace(resident, reason="asked for")
    if form not in {"auto", "stepwise"}:
        raise ValueError(f"form {form!r} is none of 'auto', 'resident', 'stepwise'")
    if form == "auto" and not drawback:
        return resident
    stepwise = _stepwise_launch(units, outputs, batch, rollouts, precision, arch, gates, wide)
    if has_readout:
        stepwise = _with_readout(stepwise, outputs, precision, arch, gates)
    reason = drawback if form == "auto" else "asked for"
    return replace(stepwise, reason=f"{reason}; {stepwise.reason}" if stepwise.reason else reason)


def _resident_launch(
    *,
    units: int,
    outputs: int,
    batch: int,
    rollouts: int,
    precision: str,
    arch: int,
) -> RolloutLaunch:
    """Return the resident form's tile, whether or not it fits."""
    size = OPERAND_BYTES[precision]
    block_units = max(16, next_power_of_two(units))
    block_outputs = max(16, next_power_of_two(outputs)) if outputs else 0
    tile = resident_tile(block_units, batch, rollouts, precision, arch)
    block_rows = tile.rows
    # A tile has room for a power of two of rollouts of each sample.
    samples = max(1, block_rows // next_power_of_two(rollouts))
    weights = (block_units * block_units + block_outputs * block_units) * size
    # At some point a tile of states passes through shared memory: the start, a stored delta_a, or (not on Hopper) the
    # operand of every step.
    shared = weights + block_rows * max(block_units, 2 * block_outputs) * size + 1024
    return RolloutLaunch(
        form="resident",
        block_rows=block_rows,
        block_units=block_units,
        block_inner=0,
        block_outputs=block_outputs,
        warps=tile.warps,
        stages=1,
        shared_bytes=shared,
        samples=samples,
        reason=f"W_hh fits in shared memory ({weights} bytes)",
        registers=tile.registers,
        pieces=pieces_of(tile, block_units, precision, arch),
    )


def _gated_resident_launch(units: int, rollouts: int, precision: str, gates: int, wide: bool) -> RolloutLaunch:
    """Return the tile of a gated cell's resident form, whether or not it fits."""
    size = OPERAND_BYTES[precision]
    block_rows, block_units = 64, max(16, next_power_of_two(units))
    weights = gates * block_units * block_units * size
    return RolloutLaunch(
        form="resident",
        block_rows=block_rows,
        block_units=block_units,
        block_inner=0,
        block_outputs=0,
        # More elements of a thread than eight warps leave it would spill.
        warps=8 if gates * block_units > 192 or wide else 4,
        stages=1,
        shared_bytes=weights + block_rows * block_units * size + 1024,
        samples=max(1, block_rows // next_power_of_two(rollouts)),
        reason=f"the {gates} gates of W_hh fit in shared memory ({weights} bytes)",
    )


def _gated_obstacle(launch: RolloutLaunch, units: int, outputs: int, gates: int, arch: int) -> str:
    """Return why the resident form of a gated cell cannot run, or an empty string."""
    if outputs:
        return f"losses of the outputs of a cell of {gates} gates run stepwise"
    if units > RESIDENT_MAX_GATED_UNITS:
        return f"{units} units of {gates} gates are more than {RESIDENT_MAX_GATED_UNITS}"
    if arch // 10 in {10, 11}:
        # Triton 3.6 makes an empty kernel of four gates of 128 units.
        return f"the compiler does not serve {gates} resident gates on compute capability {arch}"
    limit = shared_limit(arch)
    if launch.shared_bytes > limit:
        return f"it needs {launch.shared_bytes} bytes of shared memory, compute capability {arch} has {limit}"
    return ""


def _gated_drawback(launch: RolloutLaunch, precision: str, arch: int, gates: int, wide: bool) -> str:
    """Return why the stepwise form of a gated cell is expected to be faster, or an empty string."""
    if arch // 10 != 9:
        return f"tiles of {gates} resident gates are made for compute capability 90, not {arch}"
    if OPERAND_BYTES[precision] != 2:
        return f"operands of {OPERAND_BYTES[precision]} bytes leave no registers for {gates} gates"
    if wide and launch.block_units > 64:
        return f"exact differences of {gates} gates of {launch.block_units} units spill registers"
    return ""


def fused_launch(launch: RolloutLaunch, *, rollouts: int, precision: str, arch: int) -> RolloutLaunch:
    """Return the tile of rollouts that sum their own adjoint, from that of resident rollouts: of one sample."""
    warpgroups = arch // 10 in {9, 10} and precision != "fp32"
    block_rows, warps, registers = launch.block_rows, launch.warps, None
    product = precision in {"bf16", "fp16"}
    if arch // 10 == 9 and launch.block_units == 128 and product:
        # Three programs on a multiprocessor; a wide tile would be alone there.
        block_rows, warps, registers = 64, 4, 168
    block_rows = min(block_rows, max(64 if warpgroups else 16, next_power_of_two(rollouts)))
    if block_rows == 64 and warpgroups:
        warps = 4
    size = OPERAND_BYTES[precision]
    summed = block_rows * launch.block_units * size
    return replace(
        launch,
        block_rows=block_rows,
        warps=warps,
        samples=1,
        shared_bytes=launch.shared_bytes + summed - (launch.block_rows - block_rows) * launch.block_units * size,
        product=product,
        registers=registers,
    )


def fused_drawback(launch: RolloutLaunch, fused: RolloutLaunch, arch: int) -> str:
    """Return why rollouts in tiles of `launch`, summed afterwards, are preferable to `fused`, or an empty string."""
    if launch.form != "resident":
        return launch.reason
    if fused.block_rows * launch.samples > launch.block_rows:
        return f"tiles of {launch.block_rows} rows that hold {launch.samples} samples are better filled"
    if fused.shared_bytes > shared_limit(arch):
        return f"it needs {fused.shared_bytes} bytes of shared memory, compute capability {arch} has less"
    return ""


def takes_quotient_rows(
    launch: RolloutLaunch, *, units: int, precision: str, arch: int, noise: str, keeps: bool
) -> bool:
    """Return whether tanh's quotient is made of two clean rows, h / s and 1 / s, rather than of h alone.

    It then issues less and shares reciprocals, of which Hopper has too few; elsewhere, and where registers are short,
    the second row costs barriers or spills. Not with fp16, whose rows would be over 1 / sigma: their products could
    leave the range of float32. `keeps`: whether delta_a is stored, or rollouts begin from a state.
    """
    hopper = arch // 10 == 9 and launch.form == "resident" and precision in {"bf16", "tf32"}
    fits = launch.block_units <= 128 or (noise == "rademacher" and not keeps)
    return hopper and fits and launch.samples == 1 and units == launch.block_units and units >= 64


def _resident_obstacle(
    launch: RolloutLaunch, *, units: int, outputs: int, has_readout: bool, returns_outputs: bool, arch: int
) -> str:
    """Return why the resident form cannot run, or an empty string."""
    if units > RESIDENT_MAX_UNITS:
        return f"{units} hidden units are more than {RESIDENT_MAX_UNITS}"
    if has_readout and outputs > RESIDENT_MAX_OUTPUTS:
        return f"{outputs} outputs are more than {RESIDENT_MAX_OUTPUTS}"
    if returns_outputs and not has_readout and units > RESIDENT_MAX_OUTPUTS:
        return f"{units} outputs (the hidden state) are more than {RESIDENT_MAX_OUTPUTS}"
    limit = shared_limit(arch)
    if launch.shared_bytes > limit:
        return f"it needs {launch.shared_bytes} bytes of shared memory, compute capability {arch} has {limit}"
    return ""


def _resident_drawback(units: int, precision: str, arch: int) -> str:
    """Return why the stepwise form is expected to be faster, or an empty string."""
    if precision == "fp32" and units > RESIDENT_MAX_UNITS_IEEE:
        return f"fp32 products of {units} units hold too much in registers"
    if arch // 10 not in {9, 10} and units > 128:
        return f"compute capability {arch} moves the state of {units} units through shared memory"
    return ""


def _stepwise_launch(
    units: int, outputs: int, batch: int, rollouts: int, precision: str, arch: int, gates: int, wide: bool
) -> RolloutLaunch:
    """Return the stepwise form's tiles, with a reason where there was a choice."""
    size, reason = OPERAND_BYTES[precision], ""
    if INTERPRETED:
        tile = StepTile(32, 32, 4, 3, inner=16)
    elif gates > 1:
        # One accumulator for each gate.
        tile = gated_tile(gates, wide, rollouts, precision, arch)
    elif arch // 10 == 9 and size == 2:
        tile, reason = step_tile(units, batch, rollouts)
    else:
        tile = plain_tile(rollouts, precision, arch)
    return RolloutLaunch(
        form="stepwise",
        block_rows=tile.rows,
        block_units=tile.units,
        block_inner=tile.inner,
        block_outputs=min(64, max(16, next_power_of_two(outputs))) if outputs else 0,
        warps=tile.warps,
        stages=tile.stages,
        shared_bytes=tile.stages * (tile.rows + gates * tile.units) * tile.inner * size,
        samples=samples_of_step(tile, rollouts) if reason else int(rollouts >= tile.rows),
        reason=reason,
        described=tile.described,
        early=tile.early,
        parts=tile.parts,
        dependent=tile.dependent,
    )


def _with_readout(launch: RolloutLaunch, outputs: int, precision: str, arch: int, gates: int) -> RolloutLaunch:
    """Return a stepwise launch whose steps measure the outputs of the step before, where those and memory allow it."""
    columns = launch.stages * launch.block_outputs * launch.block_inner * OPERAND_BYTES[precision]
    shared = launch.shared_bytes + columns
    most = JOINED_GATED_OUTPUTS if gates > 1 else JOINED_OUTPUTS
    if not 0 < outputs <= most or shared > shared_limit(arch):
        return launch
    return replace(launch, joined=True, shared_bytes=shared)


def activity_launch(rows: int, rollouts: int, units: int) -> ActivityLaunch:
    """Return the division of the sum over stored activity for `rows` pairs of time step and sample."""
    block_units = min(next_power_of_two(units), WIDEST_TILE)
    # Even, so that a tile's row has the same parity in every block.
    block_rollouts = min(max(WARP_ELEMENTS // block_units, 2), 32)
    unit_blocks = ceil_div(units, block_units)
    warps = max(block_rollouts * block_units // WARP_ELEMENTS, 1)
    all_blocks = ceil_div(rollouts, block_rollouts)
    splits, blocks = _split(all_blocks, rows * unit_blocks * warps, at_least=4)
    return ActivityLaunch(block_rollouts, block_units, unit_blocks, warps, splits, blocks, norm_units=WARP_ELEMENTS)


def noise_sum_launch(rows: int, rollouts: int, units: int, kind: str) -> NoiseSumLaunch:
    """Return the division of the sum over regenerated noise for `rows` pairs of time step and sample.

    A program is one warp.
    """
    group = UNITS_PER_GROUP[kind]
    # Of the units of a group, one thread has those of one Philox block: a quarter.
    column_units = min(group // 4, 32 * next_power_of_two(ceil_div(units, 128)))
    programs = ceil_div(rows * 4 * ceil_div(units, group), 32)
    splits, pairs = _split(ceil_div(rollouts, 2), 2 * programs, at_least=8)
    return NoiseSumLaunch(column_units, 32, programs, splits, pairs)


def _split(items: int, warps: int, *, at_least: int) -> tuple[int, int]:
    """Return (splits, items of each) so that there are warps enough and every split has its share of work."""
    splits = max(1, min(WARPS_WANTED // warps, items // at_least))
    each = ceil_div(items, splits)
    return ceil_div(items, each), each


def fused_steps(tiles: int, batch: int, units: int) -> int:
    """Return how many steps' sums of `tiles` tiles are kept at a time, at least 1."""
    return max(1, STORED_BYTES // (8 * tiles * batch * units))
