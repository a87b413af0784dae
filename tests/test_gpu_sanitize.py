"""What compute-sanitizer is given on a GPU: every combination of what kernels are made with, and scripts that run."""

import itertools

import gpu_sanitize
import pytest
import torch

from anpgpu.estimators import feedback as estimator

CELLS = gpu_sanitize.CELL_NAMES
OPS = {"noise", "rollout", "returns", "adjoint", "rollout_adjoint"}
BESIDE = {
    "least squares": {"least_squares_on"},
    "feedback": {"feedback_on"},
    "clean": {"weight_gradients_on", "cross_entropy_on"},
}
"""What runs of a part that is no cell's, by the functions that return it."""


def test_the_shapes_together_have_every_cell_and_loss_with_every_noise_and_precision():
    found = {
        (cell, made.loss, made.noise, made.precision)
        for shape, cell in itertools.product(gpu_sanitize.SHAPES, CELLS)
        for made in gpu_sanitize.combinations(shape, cell)
    }
    wanted = itertools.product(CELLS, gpu_sanitize.LOSSES, gpu_sanitize.NOISES, gpu_sanitize.PRECISIONS)
    assert found == set(wanted)


def test_both_weights_of_the_adjoint_come_with_every_noise_and_precision():
    found = {
        (made.weight_by, made.noise, made.precision)
        for shape, cell in itertools.product(gpu_sanitize.SHAPES, CELLS)
        for made in gpu_sanitize.combinations(shape, cell)
        if made.loss not in {"outputs alone", "hidden states"}
    }
    assert found == set(itertools.product(gpu_sanitize.WEIGHTS, gpu_sanitize.NOISES, gpu_sanitize.PRECISIONS))


@pytest.mark.parametrize("part", gpu_sanitize.PARTS)
def test_a_part_runs_every_kernel_of_it(part, monkeypatch):
    ran = set()

    def noted(name, work):
        def run(*arguments, **named):
            ran.add(name)
            return work(*arguments, **named)

        return run

    one = gpu_sanitize.implementation
    monkeypatch.setattr(gpu_sanitize, "implementation", lambda name, backend: noted(name, one(name, backend)))
    for name in set().union(*BESIDE.values()):
        asked_by = estimator if name == "feedback_on" else gpu_sanitize
        found = getattr(asked_by, name)
        monkeypatch.setattr(asked_by, name, lambda *of, name=name, found=found: noted(name, found(*of)))
    gpu_sanitize.run("torch", "odd", part, torch.device("cpu"))
    assert ran == BESIDE.get(part, OPS)
