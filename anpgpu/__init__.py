"""Train RNNs from forward passes alone: perturbed rollouts instead of backpropagation through time."""

from . import decorrelation, functional
from ._version import __version__
from .decorrelation import Decorrelation
from .diagnosis import diagnose
from .estimate import estimate_grad_
from .estimators.found import Estimate
from .kernels.noise import NOISE_STREAM_VERSION
from .modules import GRU, LSTM, RNN
from .perturbation import Perturbation
from .state import estimator_state, load_estimator_state_
from .swap import swap_, unswap_

__all__ = [
    "GRU",
    "LSTM",
    "NOISE_STREAM_VERSION",
    "RNN",
    "Decorrelation",
    "Estimate",
    "Perturbation",
    "__version__",
    "decorrelation",
    "diagnose",
    "estimate_grad_",
    "estimator_state",
    "functional",
    "load_estimator_state_",
    "swap_",
    "unswap_",
]
