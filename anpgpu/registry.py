"""The tables of everything that is chosen by name: estimators, cells, losses, backends.

They are empty here. The files that define the entries fill them on import (`estimators/`, `network/cells.py`,
`task/`, `runtime/dispatch.py`). All other files look names up here, without importing those files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class Table(dict[str, Entry]):
    """Entries by name; looking up an unknown name raises ValueError, which lists the known ones.

    Args:
        argument: the user's argument that holds the name, for error messages.
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
        """Return the entry of a name that a caller gave.

        Args:
            name: the name, unchecked; any object.
            argument: the user's argument that held it, for error messages; by default the table's.
            also: further names that the caller accepts; the error lists them, too.

        Raises:
            TypeError: the name is no str.
            ValueError: there is no such entry; the message lists the known names.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        kind = TypeError if not isinstance(name, str) else ValueError
        be = "be a str, one of" if kind is TypeError else "be one of"
        names = ", ".join(map(repr, (*also, *self)))
        raise kind(f"{argument or self.argument} must {be} {names}; got {name!r}")


class Estimator:
    """How a gradient is estimated, and what that requires; base of every entry of `ESTIMATORS`.

    The rest of the package reads these attributes and never compares a method's name. An estimator that credits the
    rollouts of one layer at a time derives from `estimators.rules.Rule`, which has `rule`, `walk` and `backward`.
    """

    stores_delta: bool = True
    """Whether the activity differences of all steps, (T, B, P, H), are kept until they are credited."""
    whole_samples: bool = False
    """Whether all rollouts of a sample are needed at once; then samples are divided and shared, not rollouts."""
    one_rollout: bool = False
    """Whether it has one rollout, which processes cannot share."""
    weights_only: bool = False
    """Whether inputs and first states get no gradient."""
    measures_losses: bool = False
    """Whether it needs measured losses, and so runs only in `estimate_grad_`, not in a backward pass."""
    exact: bool = False
    """Whether it is autograd's exact gradient, without rollouts."""
    keeps_state: bool = False
    """Whether it keeps something between updates; its rule then gets a learner and what is known without rollouts."""
    discounted: bool = True
    """Whether the discount matters."""
    halves_on_demand: bool = False
    """Whether the halves of the rollouts are told apart only where `split_half=True` asks for it."""
    parts: int = 2
    """Number of parts that add up to a gradient: from the even and the odd rollouts, and, with 3, a part that needs all
    rollouts; 1 if the halves are not told apart."""

    @classmethod
    def check(cls, perturbation: Any) -> None:
        """Raise ValueError where the knobs of a `Perturbation` do not go with this estimator."""
        if perturbation.baseline and perturbation.shard_rollouts and not cls.whole_samples:
            raise ValueError("baseline=True needs all rollouts of a sample in one process, got shard_rollouts=True")
        if cls.one_rollout and perturbation.shard_rollouts:
            raise ValueError(f"method={perturbation.method!r} has one rollout, which shard_rollouts=True cannot share")

    @classmethod
    def extra_floats(cls, rollouts: int, hidden: int, gates: int = 1) -> int:
        """Return the floats per step and sample it needs besides the rollouts' own; `hidden` is H, `gates` G."""
        del rollouts, hidden, gates
        return 0

    @classmethod
    def state_floats(cls, rollouts: int, hidden: int, gates: int = 1) -> int:
        """Return the floats that what a layer learns takes in an update, however that is divided; `hidden` is H."""
        del rollouts, hidden, gates
        return 0

    @classmethod
    def rule(cls, settings: Any, weight_hh: Any, seed: Any, finite: Any) -> Any:
        """Return a rule, which credits the rollouts of some samples; see `estimators.rules.Rule`."""
        raise NotImplementedError

    @classmethod
    def new_learner(cls, settings: Any, number: int, weight_hh: Any, extent: Any) -> Any:
        """Return what a layer and direction learns in one update; an estimator that keeps a state has such an object.

        Args:
            settings: the resolved perturbation, whose `kept` holds the module's state.
            number: of the layer and direction.
            weight_hh: of the layer, (G H, H).
            extent: `estimators.job.Extent`, the size of the update.
        """
        raise NotImplementedError

    @staticmethod
    def walk(directions: int) -> Callable[[Any], Any]:
        """Return the function that estimates all gradients of a `Job`, for one direction or two.

        An exact estimator's function takes a `task.problem.Problem` instead of an `estimators.job.Job`.
        """
        raise NotImplementedError

    @staticmethod
    def backward(backward: Any) -> Any:
        """Estimate all gradients from dL/d(outputs) and dL/dh_n, in an `estimators.by_layer.Backward`."""
        raise NotImplementedError

    @classmethod
    def cost(cls, rollouts: int, hidden: int) -> float:
        """Return the work of an estimate in rollouts; one rollout is H^2 multiply-adds per step and sample."""
        del hidden
        return float(rollouts)


ESTIMATORS: Table[type[Estimator]] = Table("method")
"""`method=` of a `Perturbation`: how a gradient is estimated. Filled by `estimators/`."""

CELLS: Table[Any] = Table("cell")
"""What a step of a network computes: `network.cells.Cell` classes. Filled by `network/cells.py`."""

LOSSES: Table[Any] = Table("loss")
"""`loss=` of `estimate_grad_` where it is a name: `task.losses.MeasuredLoss` classes. Filled by `task/`."""

BACKENDS: Table[Any] = Table("backend")
"""`backend=`: the implementations of the ops and what they run on. Filled by `runtime/dispatch.py`."""
