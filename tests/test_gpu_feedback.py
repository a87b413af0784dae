"""Learned feedback on a GPU: its kernel against the equations in float64, and what only a GPU can show."""

import pytest
import torch
from test_feedback import Case
from tolerances import assert_close, relative_error

import anpgpu
from anpgpu.kernels.feedback import Carry, Known
from anpgpu.kernels.feedback_matrix import curvature, direction, new_sums, step
from anpgpu.kernels.noise import Counters
from anpgpu.runtime.dispatch import feedback_on

pytestmark = pytest.mark.gpu

SHAPES = ((1, 1, 1, 1), (4, 3, 5, 17), (20, 4, 8, 128), (6, 2, 16, 256), (3, 2, 32, 500), (3, 2, 64, 1024))
"""T, B, P, H; no more pairs of a step and its successor than the line search keeps."""


def case_of(shape, **how):
    time, batch, rollouts, units = shape
    return Case(rollouts, dtype=torch.float32, units=units, time=time, batch=batch, **{"kind": "rademacher", **how})


def on_gpu(case, baseline=False):
    """Return a function that makes an update on the GPU: the adjoint, and B and A after it."""
    time, batch, rollouts, _ = case.delta_a.shape
    values = [value.cuda() for value in (case.delta_loss, case.delta_a)]
    known = Known(case.slope.cuda(), case.gradient.cuda())
    matrix, seed, finite, lengths = (value.cuda() for value in (case.matrix, case.seed, case.finite, case.lengths))

    def update():
        sums = new_sums(matrix, time, batch, rollouts, lengths)
        carry = Carry.zero(matrix, batch, rollouts)
        adjoint, _, _ = feedback_on("triton")(
            *values,
            known,
            matrix,
            carry,
            seed,
            sums,
            finite=finite,
            discount=case.discount,
            ridge=0.01,
            baseline=baseline,
            options=case.options,
            counters=Counters(),
            first=(0, 0),
        )
        before = torch.zeros_like(sums.gram)
        towards, mean = direction(sums, before)
        return adjoint, *step(matrix, sums, before, mean, towards, curvature(sums, towards))

    return update


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_update_is_that_of_the_equations(shape, kind):
    case = case_of(shape, kind=kind)
    for value, other in zip(on_gpu(case)(), case.oracle(), strict=True):
        if other is not None:
            assert_close(value.cpu(), other, "least_squares")


@pytest.mark.parametrize("baseline", [False, True])
def test_padding_and_lost_rollouts_have_no_part(baseline):
    case = case_of((5, 4, 5, 40)).cut(5, 1, 4, 2).lose(0, 1).lose(2, 0)
    for value, other in zip(on_gpu(case, baseline)(), case.oracle(baseline=baseline), strict=True):
        assert_close(value.cpu(), other, "least_squares")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitwise_repeatable_without_making_the_host_wait(shape):
    update = on_gpu(case_of(shape))
    expected = update()
    for _ in range(3):
        disturbance = torch.full((1 << 24,), float("nan"), device="cuda")
        del disturbance
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # B's step is by torch's library.
        assert torch.equal(again[0], expected[0])


def test_a_captured_graph_repeats():
    update = on_gpu(case_of((20, 4, 8, 128)))
    expected = update()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = update()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    for value, other in zip(found, expected, strict=True):
        assert_close(value, other, "float32_long")


@pytest.mark.parametrize("layer", [anpgpu.RNN, anpgpu.GRU], ids=["RNN", "GRU"])
def test_updates_agree_with_those_on_torchs_operations(layer):
    gradients = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        knobs = {"backend": backend, "precision": "fp32", "sigma": 1e-4, "warmup": 1}
        rnn = layer(3, 64, perturbation=anpgpu.Perturbation("anp-feedback", 8, **knobs)).cuda()
        readout = torch.nn.Linear(64, 2).cuda()
        inputs, targets = torch.randn(20, 4, 3).cuda(), torch.randn(20, 4, 2).cuda()
        anpgpu.estimate_grad_(rnn, readout, inputs, targets)
        gradients.append(torch.cat([weight.grad.flatten() for weight in (*rnn.parameters(), *readout.parameters())]))
    assert relative_error(*gradients) <= 1e-3
