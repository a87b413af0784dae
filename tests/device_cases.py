"""Small problems that run on any device, and their gradients by either face, for `test_gpu_faces.py`.

The oracle of an update is the same update in float64, by the torch reference on the CPU, from the same seed: noise has
the same bits everywhere.
"""

import functools
from typing import NamedTuple

import torch
from tolerances import relative_error
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation
from anpgpu.registry import ESTIMATORS

T, B, I, H, O, P = 6, 3, 4, 20, 3, 16  # noqa: E741  (the letters of the design)
LENGTHS = torch.tensor([2, 6, 5])
SEED = -(2**61) + 77


class Case(NamedTuple):
    """A network and how its sequences come."""

    layers: int = 1
    both: bool = False
    nonlinearity: str = "tanh"
    padded: bool = False


CASES = {"one layer": Case(), "two layers, both directions, padded": Case(2, True, "relu", True)}

SETTINGS = {
    **{
        name: {"method": name, "rollouts": 1, "noise": "gaussian"} if kind.one_rollout else {"method": name}
        for name, kind in ESTIMATORS.items()
    },
    # Each step is credited with its own loss, which has kernels of its own on a GPU.
    "anp at discount 0": {"method": "anp", "discount": 0.0},
    "np at discount 0": {"method": "np", "discount": 0.0, "noise": "gaussian"},
    "np with a baseline": {"method": "np", "baseline": True},
    "dense wp": {"method": "wp", "rank": None},
    "anp, cut in time": {"method": "anp", "max_memory": (16 << 20) + 40_000},
    "anp-ls with a perturbed readout": {"method": "anp-ls", "readout": "perturbed"},
}
"""Every method, and variants that take other code; what is not given is the default, with `P` rollouts."""


def perturbation_of(setting, **options):
    # Two estimates of learned feedback's warm-up: Triton's interpreter takes long for thirty.
    return Perturbation(**{"rollouts": P, "discount": 0.9, "warmup": 2, **SETTINGS[setting], **options})


class Problem(NamedTuple):
    """A network with a readout, and data, on one device."""

    rnn: nn.RNN
    readout: nn.Linear
    inputs: torch.Tensor
    targets: torch.Tensor
    hx: torch.Tensor
    lengths: torch.Tensor | None

    def leaves(self):
        """Every tensor that may get a gradient, by name."""
        weights = {f"rnn.{name}": weight for name, weight in self.rnn.named_parameters()}
        head = {f"readout.{name}": weight for name, weight in self.readout.named_parameters()}
        return {**weights, **head, "inputs": self.inputs, "hx": self.hx}

    def grads(self):
        """The gradients there are, on the CPU."""
        return {name: leaf.grad.cpu() for name, leaf in self.leaves().items() if leaf.grad is not None}

    def clear(self):
        for leaf in self.leaves().values():
            leaf.grad = None


def problem_of(perturbation, case=CASES["one layer"], device="cpu", dtype=torch.float32, kind=anpgpu.RNN):
    """The problem of a case: the same float32 numbers on every device and in every type."""
    estimator = ESTIMATORS[perturbation.method]
    torch.manual_seed(3)
    named = {} if kind is nn.RNN else {"perturbation": perturbation}
    bias = not estimator.measures_losses
    rnn = kind(I, H, case.layers, case.nonlinearity, bias=bias, bidirectional=case.both, **named)
    sides = 2 if case.both else 1
    readout = nn.Linear(sides * H, O, bias=bias)
    inputs, targets, hx = torch.randn(T, B, I), torch.randn(T, B, O), 0.3 * torch.randn(sides * case.layers, B, H)
    inputs, targets, hx = (values.to(device, dtype) for values in (inputs, targets, hx))
    for leaf in () if estimator.weights_only else (inputs, hx):
        leaf.requires_grad_()
    lengths = LENGTHS if case.padded else None
    return Problem(rnn.to(device, dtype), readout.to(device, dtype), inputs, targets, hx, lengths)


def fixed_seed(device, generator=None):
    """The seed of every update, made on the device, so that no host waits."""
    del generator
    return torch.full((), SEED, dtype=torch.int64, device=device)


def loss_through(problem, model=None):
    """The loss of a forward pass, packed where lengths differ, as a user writes it."""
    inputs = problem.inputs
    if problem.lengths is not None:
        inputs = pack_padded_sequence(inputs, problem.lengths, enforce_sorted=False)
    outputs, h_n = (problem.rnn if model is None else model)(inputs, problem.hx)
    values = outputs if problem.lengths is None else outputs.data
    errors = problem.readout(values)
    if problem.lengths is None:
        errors = errors - problem.targets
    working = torch.promote_types(values.dtype, torch.float32)
    return errors.to(working).square().mean() + h_n.to(working).square().mean()


def add_gradients(face, problem, loss="mse"):
    """Add the gradients of one update by a face."""
    if face == "backward":
        loss_through(problem).backward()
        return
    anpgpu.estimate_grad_(*problem[:4], loss, hx=problem.hx, lengths=problem.lengths)


def by_backward(problem):
    problem.clear()
    add_gradients("backward", problem)
    return problem.grads()


def by_estimate(problem, loss="mse"):
    problem.clear()
    add_gradients("estimate_grad_", problem, loss)
    return problem.grads()


FACES = {"backward": by_backward, "estimate_grad_": by_estimate}


@functools.cache
def oracle(face, setting, name):
    """The gradients of an update in float64 by the torch reference on the CPU; seeds must be fixed."""
    how = perturbation_of(setting, backend="torch")
    return FACES[face](problem_of(how, CASES[name], dtype=torch.float64))


def errors(found, expected):
    """Relative errors of gradients, by name."""
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in expected}
