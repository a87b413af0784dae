"""The caller's problem in canonical form, and its loss. Importing this package fills the table `registry.LOSSES`."""

from . import losses

__all__ = ["losses"]
