"""The tables of what can be asked for by name: estimators, cells, losses, backends.

They are empty here. The files that hold the entries fill them on import (`estimators/`, `network/cells.py`,
`task/losses.py`, `runtime/dispatch.py`), so that whoever only needs a name, or what stands behind it, asks one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class Table(dict[str, Entry]):
    """Entries by name; to look up a name that does not exist raises ValueError, naming those that do.

    Args:
        argument: what an error calls the name: the argument it was given as.
    """

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument

    def add(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that enters a class, or anything else, under a name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"there is a {self.argument} {name!r} already: {self[name]!r}")

        def enter(entry: Entry) -> Entry:
            self[name] = entry
            return entry

        return enter

    def __missing__(self, name: object) -> Entry:
        return self.find(name)

    def find(self, name: object, argument: str | None = None, *, also: Sequence[str] = ()) -> Entry:
        """Return the entry of what a caller gave as a name.

        Args:
            name: it need not be a str.
            argument: which argument it was given as; the table's own by default.
            also: names that are allowed and stand in no table; they are only named in the error.

        Raises:
            TypeError: the name is no str.
            ValueError: there is no such entry; the message names those that exist.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        kind = TypeError if not isinstance(name, str) else ValueError
        be = "be a str, one of" if kind is TypeError else "be one of"
        names = ", ".join(map(repr, (*also, *self)))
        raise kind(f"{argument or self.argument} must {be} {names}; got {name!r}")


class Estimator:
    """How a gradient is estimated, and what that needs of the rest; every entry of `ESTIMATORS` derives from it.

    The walks over a network, the division of memory, sharding and the faces read these attributes and never a name. An
    estimator that credits the rollouts of one layer at a time derives from `estimators.rules.Rule`, which has the rest.
    """

    stores_delta: bool = True
    """Whether the activity differences of all steps, (T, B, P, H), are kept until they are credited."""
    whole_samples: bool = False
    """Whether every rollout of a sample is needed at once: memory divides, and processes share, samples instead."""
    keeps_state: bool = False
    """Whether something is kept from one update to the next."""
    weights_only: bool = False
    """Whether inputs and first states get no gradient."""
    measures_losses: bool = False
    """Whether it works in `estimate_grad_` alone, which measures losses, and not in a backward pass."""
    exact: bool = False
    """Whether it is no estimate but autograd's own gradient, without rollouts."""
    discounted: bool = True
    """Whether the discount matters."""
    parts: int = 2
    """How many parts its sums come in: the even and the odd rollouts', and a third where only all together show
    more."""

    @classmethod
    def check(cls, perturbation: Any) -> None:
        """Raise ValueError where the knobs of a `Perturbation` do not go with this estimator."""
        if perturbation.baseline and perturbation.shard_rollouts and not cls.whole_samples:
            raise ValueError("baseline=True needs all rollouts of a sample in one process, got shard_rollouts=True")

    @classmethod
    def extra_floats(cls, rollouts: int, hidden: int) -> int:
        """Return the floats per step and sample that it adds to those of the rollouts; H is `hidden`."""
        del rollouts, hidden
        return 0

    @classmethod
    def rule(cls, settings: Any, weight_hh: Any, seed: Any, finite: Any) -> Any:
        """Return what credits the rollouts of some samples; see `estimators.rules.Rule`."""
        raise NotImplementedError

    @staticmethod
    def walk(directions: int) -> Callable[[Any], Any]:
        """Return what estimates all gradients of an `estimators.job.Job`, for networks of one or of two directions."""
        raise NotImplementedError

    @staticmethod
    def backward(backward: Any) -> Any:
        """Estimate all gradients from those of outputs and final states; takes an `estimators.by_layer.Backward`."""
        raise NotImplementedError

    @classmethod
    def cost(cls, rollouts: int, hidden: int) -> float:
        """Return the work of an estimate in rollouts, H^2 multiply-adds per step and sample each."""
        del hidden
        return float(rollouts)


ESTIMATORS: Table[type[Estimator]] = Table("method")
"""`method=` of a `Perturbation`: how a gradient is estimated. Filled by `estimators/`."""

CELLS: Table[Any] = Table("cell")
"""What a step of a network computes: `network.cells.Cell` classes. Filled by `network/cells.py`."""

LOSSES: Table[Any] = Table("loss")
"""`loss=` of `estimate_grad_` where it is a name: `task.losses.MeasuredLoss` classes. Filled by `task/losses.py`."""

BACKENDS: Table[Any] = Table("backend")
"""`backend=`: where an op's implementation lies and what it runs on. Filled by `runtime/dispatch.py`."""
