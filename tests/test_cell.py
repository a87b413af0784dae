"""Cells: their forms on each backend, and the error or fallback on a backend without one."""

import importlib

import pytest
import torch

from anpgpu.kernels.cell import RELU, TANH, CellForms, TanhDeviation
from anpgpu.kernels.loss import LinearLoss
from anpgpu.kernels.rollout import RolloutOptions, rollout

T, B, P, H = 4, 2, 3, 5
SEED = torch.tensor(7)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class LeakyDeviation:
    """h_t = h_{t-1} / 2 + a_t, whose deviation depends on that of the state before."""

    def __init__(self, preact, rows):
        self.seen = []

    def step(self, step, delta_a, before, scratch):
        self.seen.append(before is not None)
        torch.add(delta_a, 0 if before is None else before, alpha=0.5, out=scratch[1])
        return scratch[0].copy_(scratch[1])


LEAKY = CellForms("leaky", lambda preact, hidden: (), LeakyDeviation, numba=None, triton=None, cupy=None)


def arguments(dtype=torch.float32):
    preact = draw(T, B, H).to(dtype)
    return preact, preact.tanh(), draw(H, H).to(dtype) / 3, LinearLoss(draw(T, B, H).to(dtype)), SEED


def test_a_cell_tells_its_backends():
    assert TANH.backends() == RELU.backends() == ("torch", "numba", "triton", "cupy")
    assert LEAKY.backends() == ("torch",)
    assert TANH.on("torch") is TanhDeviation
    # A form may be 0, which is false.
    assert TANH.on("numba") == 0
    with pytest.raises(ValueError, match="cell 'tanh' has no form on backend 'jax', only on torch, numba"):
        TANH.on("jax")


@pytest.mark.parametrize("start", [None, 0.3])
def test_a_cell_sees_the_deviation_before_the_step(start):
    before = None if start is None else start * draw(B, P, H)
    preact, _, weight, _, seed = arguments(torch.float64)
    options = RolloutOptions(P, 1e-2, cell=LEAKY, precision="fp64", store_delta_a=True)
    result = rollout(preact, preact, weight, None, seed, options=options, delta_h0=before)
    state = torch.zeros(B, P, H, dtype=torch.float64) if before is None else before
    for step in range(T):
        state = state / 2 + result.delta_a[step]
    torch.testing.assert_close(result.delta_h, state)


BACKENDS = {"numba": "_numba", "cupy": "_cupy", "triton": "_triton"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_without_a_form_of_the_cell_raises(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    form = importlib.import_module(f"anpgpu.kernels.rollout{BACKENDS[backend]}").rollout
    with pytest.raises(ValueError, match=f"cell 'leaky' has no form on backend '{backend}', only on torch"):
        form(*arguments(), options=RolloutOptions(P, 1e-2, cell=LEAKY))


def test_a_branch_that_numba_does_not_have_raises():
    form = importlib.import_module("anpgpu.kernels.rollout_numba").rollout
    with pytest.raises(ValueError, match=r"cell 'leaky' asks for branch 7 of backend 'numba', which has \[0, 1\]"):
        form(*arguments(), options=RolloutOptions(P, 1e-2, cell=LEAKY._replace(numba=7)))
