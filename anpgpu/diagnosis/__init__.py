"""`diagnose`: are method, rollouts, discount and sigma right for a network and a batch?"""

from .measure import diagnose

__all__ = ["diagnose"]
