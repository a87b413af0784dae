"""Small networks with and without decorrelation, and their gradients by every method."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)

import anpgpu
from anpgpu import Perturbation
from anpgpu.decorrelation import Decorrelation

T, B, I, H, O = 6, 3, 4, 5, 2  # noqa: E741  (the design's names)
RATE = 0.1
METHODS = ("bptt", "np", "wp", "anp", "anp-ls")
KINDS = {
    "one layer": {},
    "without bias": {"bias": False, "nonlinearity": "relu"},
    "two layers": {"num_layers": 2},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def network(kind="one layer", *, cls=anpgpu.RNN, dtype=torch.float64, **options):
    torch.manual_seed(0)
    rnn = cls(I, H, dtype=dtype, **KINDS[kind], **options)
    return rnn, nn.Linear(H * (2 if rnn.bidirectional else 1), O, dtype=dtype)


def decorrelated(kind="one layer", *, rate=RATE, **options):
    """Return a network whose D, the readout's too, learned for three updates, after which none is symmetric."""
    rnn, readout = network(kind, **options)
    attached = Decorrelation(rnn, readout, inputs=True, rate=rate)
    for update in range(3):
        inputs, hx = draw(T, B + update, I), draw(len(rnn.all_weights), B + update, H)
        attached.update_(inputs.to(rnn.weight_hh_l0.dtype), hx.to(rnn.weight_hh_l0.dtype))
    for matrix in attached.matrices.values():
        assert not torch.allclose(matrix, matrix.t(), rtol=1e-3, atol=1e-6)
    return rnn, readout, attached


def originals(module):
    """Return parameters by their names without parametrizations."""
    return {
        name.removeprefix("parametrizations.").removesuffix(".original"): parameter
        for name, parameter in module.named_parameters()
    }


def gradients_of(rnn, readout, method, through, **options):
    """Return gradients by parameter; the noise is the same in every call."""
    how = Perturbation(method, rollouts=8, sigma=1e-4, **options)
    # Not len(rnn.all_weights), which would compute a parametrized weight.
    directions = rnn.num_layers * (2 if rnn.bidirectional else 1)
    inputs, hx, targets = draw(T, B, I), draw(directions, B, H), draw(T, B, O)
    if through == "backward":
        rnn.perturbation = how
        torch.manual_seed(1)
        F.mse_loss(readout(rnn(inputs, hx)[0]), targets).backward()
    else:
        generator = torch.Generator().manual_seed(1)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=how, hx=hx, generator=generator)
    gradients = {name: parameter.grad for name, parameter in originals(rnn).items()}
    return gradients | {f"readout.{name}": parameter.grad for name, parameter in originals(readout).items()}
