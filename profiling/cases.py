"""The shapes that are timed. Counted are 2 H^2 floating-point operations per rollout and step; noise is not counted."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """One shape, named as in `torch.nn.RNN`."""

    time: int
    batch: int
    rollouts: int
    hidden: int
    inputs: int = 10
    outputs: int = 10

    @property
    def rows(self) -> int:
        """Rollouts of all samples, B P."""
        return self.batch * self.rollouts

    @property
    def rollout_steps(self) -> int:
        """Steps of all rollouts, T B P."""
        return self.time * self.rows

    @property
    def flops(self) -> int:
        """Operations of the recurrent products."""
        return 2 * self.hidden**2 * self.rollout_steps


OPS = ("noise", "rollout", "adjoint", "update")
"""What `time_ops.py` times: one row of its table per op and case."""

PUBLISHED = (Case(time=210, batch=1, rollouts=256, hidden=500), Case(time=210, batch=32, rollouts=32, hidden=500))
"""The published copy task: 2 x 100 steps and a delay of 10, 10 bits, 500 hidden units."""

PUBLISHED_QUICK = (Case(time=40, batch=1, rollouts=64, hidden=64),)

MIB = 1 << 20

SHAPES = {
    "published": [Case(210, batch, 128, 500) for batch in (1, 8, 32, 100)],
    "goal": [Case(200, 32, 128, 512)],
    "small": [Case(1_000, 32, 128, 64)],
    "large": [Case(100, 32, 128, 2048)],
    "wide": [Case(100, 512, 128, 256)],
    "long": [Case(100_000, 4, 32, 256)],
}
"""What `compare.py` times on a GPU; T, B, P, H."""

CPU_SHAPES = {
    "published": [Case(210, 1, 256, 500), Case(210, 32, 32, 500)],
    "small": [Case(1_000, 4, 64, 64)],
    "large": [Case(20, 2, 32, 2048)],
    "wide": [Case(10, 128, 32, 256)],
    "long": [Case(5_000, 1, 32, 64)],
}
"""What `compare.py` and `compare_commits.py` time on a CPU: the same kinds of shape, smaller, so that an update takes
about a second."""

METHOD_SHAPES = [
    Case(time, batch, hidden // fraction, hidden)
    for time, batch, hidden in ((100, 16, 64), (100, 16, 128), (50, 8, 256), (25, 4, 512))
    for fraction in (4, 1)
]
"""What `time_methods.py` times: P = H / 4 and P = H."""

QUICK_SHAPES = {"quick": [Case(12, 2, 8, 16)]}

MEMORY = {
    256 * MIB: tuple(
        Case(time, batch, rollouts, hidden)
        for batch, rollouts, hidden in ((4, 64, 256), (1, 256, 500))
        for time in (2_000, 20_000)
    )
}
"""max_memory in bytes, and the cases measured under it."""

MEMORY_QUICK = {32 * MIB: (Case(400, 2, 32, 96), Case(1_600, 2, 32, 96))}

HIDDEN = (64, 128, 256, 500, 512, 1024, 2048)
ROWS = (4_096, 16_384, 65_536)
BATCH = 16
BASELINE_ROWS = 16_384
"""The only number of rows at which baselines are timed: compiling them takes longer than timing everything else."""

DELTA_A_BYTES = 24 << 30
"""The number of steps is chosen so that delta_a in float32 stays below this."""

CPU = tuple(Case(time=50, batch=4, rollouts=64, hidden=hidden) for hidden in (64, 128, 256, 500))
CPU_QUICK = tuple(Case(time=10, batch=2, rollouts=32, hidden=hidden) for hidden in (64, 100))
CUDA_QUICK = tuple(Case(time=32, batch=BATCH, rollouts=256, hidden=hidden) for hidden in (128, 500))


def gpu_cases(hidden: tuple[int, ...] = HIDDEN, rows: tuple[int, ...] = ROWS) -> list[Case]:
    """Return the cases of the GPU table: where memory allows, long enough that a call takes a millisecond or more."""
    cases = []
    for units in hidden:
        for count in rows:
            time = max(16, min(128, DELTA_A_BYTES // (4 * count * units)))
            cases.append(Case(time=time, batch=BATCH, rollouts=count // BATCH, hidden=units))
    return cases


def named_shapes(shapes: dict[str, list[Case]], names: str | None) -> dict[str, list[Case]]:
    """Return the shapes of a comma-separated list of names, or all of them.

    Raises:
        ValueError: a name does not exist.
    """
    wanted = list(shapes) if names is None else names.split(",")
    unknown = [name for name in wanted if name not in shapes]
    if unknown:
        raise ValueError(f"shapes must be of {', '.join(shapes)}, got {', '.join(unknown)}")
    return {name: shapes[name] for name in wanted}
