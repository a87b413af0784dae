"""What learned feedback must reach while weights move, in small: `profiling/study_feedback.py` has the full size."""

import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close
from torch import nn

from anpgpu.network.cells import LayerRun
from anpgpu.network.weights import LayerWeights
from anpgpu.registry import CELLS

sys.path.append(str(Path(__file__).resolve().parent.parent / "profiling"))

import study_feedback_plan
from study_feedback_runs import EVERY, EXACT, KNOWN, Run, past_the_product, shadow

learned, without_feedback = study_feedback_plan.learned, study_feedback_plan.without_feedback


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_errors_of_many_updates_do_not_add_up_where_the_matrix_moves_with_the_weights(seed):
    # The cosine of single updates does not show it: a B that lags behind W makes the same error in many updates.
    both, lagging, cold = (
        learned(2),
        learned(2, follow=False),
        learned(2, warmup=0),
    )
    run = Run("path", "copying 10, orthogonal", (EXACT, both, lagging, cold), seed, 150, hidden=32, lr=3e-3)
    result = shadow(run, None)
    error = {name: sums["weight_hh_l0"]["error"] for name, sums in result["sum"].items()}
    assert error[both] < 0.06
    assert error[lagging] > 3 * error[both]
    assert error[cold] > 2 * error[both]
    cosine = {name: by_weight["weight_hh_l0"]["140-150"] for name, by_weight in result["cosine"].items()}
    assert cosine[both] > cosine[lagging] > 0.97


@pytest.mark.parametrize("module", ["GRU", "LSTM"])
def test_where_gates_hold_feedback_is_ahead_of_what_is_known_and_that_of_least_squares(module):
    ours, alone, neither = learned(4, warmup=0), without_feedback(4), "anp-ls rollouts=4"
    run = Run(
        "cosine", "copying 10 of 8", (EXACT, ours, alone, KNOWN, neither), 0, 30, hidden=24, lr=2e-3,
        module=module, hold=3.0,
    )  # fmt: skip
    cosine = {name: found[EVERY]["20-30"] for name, found in shadow(run, None)["cosine"].items()}
    assert cosine[ours] > 0.99
    assert cosine[ours] > cosine[alone] > cosine[KNOWN] > cosine[neither], cosine


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_the_known_part_is_the_gradient_without_the_recurrent_product(name):
    torch.manual_seed(0)
    rnn, inputs, weight = getattr(nn, name)(3, 5).double(), torch.randn(9, 2, 3).double(), torch.randn(9, 2, 5).double()
    outputs = past_the_product(rnn, inputs)
    hidden, final = rnn(inputs)
    assert_close(outputs.detach(), hidden.detach(), "float64")
    found = torch.autograd.grad((outputs * weight).sum(), list(rnn.parameters()))
    # By the cell: dL/dh_t = g_t, of a GRU with z dL/dh of the step after.
    cell, layer = CELLS[name.lower()], LayerWeights(*(value.detach() for value in rnn.all_weights[0]))
    states = torch.cat((torch.zeros(1, 2, 5).double(), hidden.detach()))
    if name == "LSTM":
        ends = torch.zeros(2, 10).double(), torch.cat([state[0].detach() for state in final], -1)
        states = cell.whole_states(layer, lambda: inputs, states, ends, None)
    run = LayerRun(inputs, states)
    preact = cell.preactivations(layer, run)
    adjoint, path = weight.clone(), cell.path(preact, states[1:], 1.0)
    handed = torch.zeros(2, 5).double()
    for step in reversed(range(9)):
        if path is None:
            adjoint[step] += handed
            handed = cell.recurrence(preact, states[1:], 1.0).direct[step] * adjoint[step]
        else:
            kappa = path.hand_back_(step, weight[step], handed)
            adjoint = torch.cat((adjoint, torch.zeros_like(weight)), -1) if adjoint.shape[-1] == 5 else adjoint
            adjoint[step, :, 5:] = kappa
    gates = cell.gate_adjoints(adjoint, layer, run)
    before = states[:-1, :, :5].flatten(0, 1)
    expected = (
        gates.inputs.flatten(0, 1).t() @ inputs.flatten(0, 1),
        gates.recurrent.flatten(0, 1).t() @ before,
        gates.inputs.sum((0, 1)),
        gates.recurrent.sum((0, 1)),
    )
    for value, other in zip(found, expected, strict=True):
        assert_close(value, other, "float64")
