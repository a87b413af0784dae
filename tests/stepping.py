"""A small model, its training step, and torch's warnings while the model is compiled, exported or differentiated."""

import torch
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation

# Warnings of the compiler about autograd functions, of torch.func about TorchScript, and about nn.RNN's weight list.
WARNINGS = (
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:.*_flat_weights.* assigned during export:UserWarning",
    "ignore::torch.jit.TracerWarning",
)

HOW = Perturbation("anp", rollouts=4, sigma=1e-3)
T, B, P, H, FEATURES = 5, 3, 4, 6, 4


class Model(nn.Module):
    """An RNN between two linear layers."""

    def __init__(self, perturbation=HOW, **options):
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(FEATURES, FEATURES)
        self.rnn = anpgpu.RNN(FEATURES, H, perturbation=perturbation, **options)
        self.head = nn.Linear(H * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, inputs):
        return self.head(self.rnn(self.below(inputs))[0])


def make_rnn(perturbation=HOW, **options):
    torch.manual_seed(0)
    return anpgpu.RNN(FEATURES, H, perturbation=perturbation, **options)


def inputs_of(time=T, batch=B):
    return torch.randn(time, batch, FEATURES, generator=torch.Generator().manual_seed(5))


def outputs_of(call):
    outputs = call[0] if isinstance(call, tuple) else call
    return outputs.data if isinstance(outputs, nn.utils.rnn.PackedSequence) else outputs


def step(module, inputs, run=None, seed=7):
    """Loss and gradients of one backward pass from a seed, through `run`, by default the module."""
    module.zero_grad()
    torch.manual_seed(seed)
    loss = outputs_of((module if run is None else run)(inputs)).float().square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(left, right) for left, right in zip(first, second, strict=True)
    )


def assert_all_close(first, second, name):
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        assert_close(left, right, name)


def compiled(module, backend="eager"):
    return torch.compile(module, fullgraph=True, backend=backend)


def randn(*shape):
    return torch.randn(shape)
