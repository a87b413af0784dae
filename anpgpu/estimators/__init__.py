"""The estimators of gradients. Importing this package fills the table `registry.ESTIMATORS`."""

from . import rules  # isort: skip
from . import weights  # isort: skip
from . import bptt, feedback, published  # isort: skip

__all__ = ["bptt", "feedback", "published", "rules", "weights"]
