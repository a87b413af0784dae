"""Losses of the kernels: the same properties for every loss, and no loss mistaken for another."""

import importlib

import pytest
import torch

from anpgpu.kernels.loss import (
    CrossEntropyLoss,
    LinearLoss,
    Measure,
    OutputsOnly,
    SquaredLoss,
    loss_differences,
    loss_of_steps,
    step_fields,
)
from anpgpu.kernels.rollout import RolloutOptions

T, B, P, H, O = 3, 2, 4, 5, 6  # noqa: E741  (outputs)
SEED = torch.tensor(7)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


W_O, WEIGHT = draw(O, H), draw(T, B).abs()
LOSSES = {
    "linear": LinearLoss(draw(T, B, H)),
    "squared": SquaredLoss(W_O, draw(T, B, O), WEIGHT),
    "cross_entropy": CrossEntropyLoss(W_O, draw(T, B, O).softmax(-1), torch.arange(T * B).view(T, B) % O, WEIGHT),
    "outputs": OutputsOnly(W_O),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_has_the_same_properties(kind):
    loss = LOSSES[kind]
    assert loss.kind == kind
    assert loss.measured == (kind != "outputs")
    assert (loss.grad is None) == (kind != "linear")
    assert (loss.readout is None) == (kind == "linear")
    assert all(field.shape[:2] == (T, B) for field in step_fields(loss).values())
    cut = loss_of_steps(loss, slice(1, 3), slice(0, 1))
    assert type(cut) is type(loss)
    assert cut.readout is loss.readout
    assert all(field.shape[:2] == (2, 1) for field in step_fields(cut).values())


@pytest.mark.parametrize("kind", ["linear", "squared", "cross_entropy"])
def test_differences_of_blocks_are_those_of_steps(kind):
    loss, deviation = LOSSES[kind], draw(T, B, P, H if kind == "linear" else O)
    whole = loss_differences(loss, slice(0, T), deviation)
    assert whole.shape == (T, B, P)
    for step in range(T):
        alone = loss.differences(slice(step, step + 1), deviation[step : step + 1])
        torch.testing.assert_close(alone[0], whole[step])


def test_only_the_caller_measures_outputs():
    with pytest.raises(TypeError, match="only the caller can measure OutputsOnly"):
        loss_differences(LOSSES["outputs"], slice(0, T), draw(T, B, P, O))
    measure = Measure(LOSSES["outputs"], draw(T, B, H), P)
    assert measure.delta_loss is None
    assert measure.delta_o.shape == (T, B, P, O)


@pytest.mark.parametrize("backend", ["", "_numba", "_cupy"])
@pytest.mark.parametrize("loss", ["squared", (W_O, draw(T, B, O), WEIGHT), OutputsOnly])
def test_a_loss_that_is_none_raises(backend, loss):
    rollout = importlib.import_module(f"anpgpu.kernels.rollout{backend}").rollout
    preact = draw(T, B, H)
    with pytest.raises(TypeError, match=f"loss must be a LinearLoss, .* or None, got {type(loss).__name__}"):
        rollout(preact, preact.tanh(), draw(H, H), loss, SEED, options=RolloutOptions(P, 1e-2))


def test_cupy_measures_what_it_has_a_kernel_for():
    loss_difference = importlib.import_module("anpgpu.kernels.loss_cupy").loss_difference
    with pytest.raises(TypeError, match="backend 'cupy' cannot measure OutputsOnly"):
        loss_difference(LOSSES["outputs"], 0, draw(B, P, H))
