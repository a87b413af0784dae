"""The estimators of gradients. Importing this package fills the table `registry.ESTIMATORS`."""

from . import rules  # isort: skip
from . import weights  # isort: skip
from . import bptt, published  # isort: skip

__all__ = ["bptt", "published", "rules", "weights"]
