"""The caller's problem in canonical form, and its loss. Importing this package fills the table `registry.LOSSES`."""

from . import cross_entropy, losses

__all__ = ["cross_entropy", "losses"]
