"""The tests detect bugs: each planted bug, in a copy of the package, makes a named test fail.

A bug replaces one line of source. The line must occur exactly once, so that a bug that is not planted is an error.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from planting import PACKAGE, Outcome, changed, copy_package, run_tests


class Bug(NamedTuple):
    file: str
    """Path in the package."""
    right: str
    wrong: str
    detector: str
    """The test that must fail."""


NP_BACKWARD = "test_estimators.py::test_np_through_backward_is_unbiased[one layer-rademacher]"
NP_MEASURED = "test_estimators.py::test_np_of_measured_losses_is_unbiased[one layer-mse]"

BUGS = {
    "feedback of the step itself, not of the next": Bug(
        "kernels/feedback.py",
        "known.slope[step], written.recurrent[step + 1]",
        "known.slope[step], written.recurrent[min(step + 2, len(activity))]",
        "test_feedback.py::test_an_update_is_that_of_the_equations[elman-B 1.0-plain-P 3]",
    ),
    "baseline centres the return alone": Bug(
        "kernels/feedback.py",
        "activity = _centred(activity, finite.unsqueeze(-1), -2)",
        "pass",
        "test_feedback.py::test_an_update_is_that_of_the_equations[elman-B 1.0-baseline-P 3]",
    ),
    "what a GRU hands on past its product is not in the prior mean": Bug(
        "kernels/feedback.py",
        "is None or self.recurrence.direct is None else own + handed",
        "is None or self.recurrence.direct is None else own",
        "test_feedback.py::test_an_update_is_that_of_the_equations[gru-B 1.0-plain-P 3]",
    ),
    "an LSTM's path through c stays in the returns of learned feedback": Bug(
        "kernels/feedback.py",
        "(target if around is None else target - around) / unit",
        "target / unit",
        "test_feedback.py::test_an_update_is_that_of_the_equations[lstm-B 1.0-plain-P 3]",
    ),
    "a poisoned feedback matrix moves on": Bug(
        "kernels/feedback_matrix.py",
        "(ratio < POISONED_BELOW)",
        "(ratio < -1e30)",
        "test_feedback_promises.py::test_a_matrix_that_was_poisoned_is_good_again_two_updates_later[RNN]",
    ),
    "the feedback matrix makes the weights' steps backwards": Bug(
        "estimators/feedback.py",
        "self.matrix = state.feedback + (weight_hh - state.weight) if",
        "self.matrix = state.feedback - (weight_hh - state.weight) if",
        "test_feedback_state.py::test_the_matrix_makes_the_weights_own_steps[RNN]",
    ),
    "weights that are loaded are a step": Bug(
        "estimators/kept.py",
        "if not same:",
        "if same is None:",
        "test_feedback_state.py::test_weights_that_are_loaded_are_no_step[RNN]",
    ),
    "noise shared across rollouts": Bug(
        "kernels/noise.py",
        "index(counters.rollout, rollouts, 3),",
        "index(counters.rollout, rollouts, 3) * 0,",
        "test_noise.py::test_no_pair_is_correlated[torch-rollouts-rademacher]",
    ),
    "noise shared across steps": Bug(
        "kernels/noise.py",
        "index(counters.time, time, 1),",
        "index(counters.time, time, 1) // 2,",
        "test_noise.py::test_no_pair_is_correlated[torch-steps-rademacher]",
    ),
    "noise of layers shared": Bug(
        "kernels/noise.py",
        "(int(counters.purpose) << 28) | (counters.layer << 20)",
        "(int(counters.purpose) << 28)",
        "test_noise.py::test_every_field_changes_the_noise[torch-layer]",
    ),
    "wrong sign": Bug(
        "kernels/adjoint.py",
        "share = credit[steps] / options.sigma",
        "share = -credit[steps] / options.sigma",
        "test_adjoint.py::test_two_units_by_hand[torch]",
    ),
    "presynaptic activity a step late": Bug(
        "estimators/found.py", "states = run.states[:-1,", "states = run.states[1:,", NP_MEASURED
    ),
    "credit a step late": Bug(
        "kernels/adjoint.py",
        "following = credit[step]",
        "following = delta_loss[step]",
        "test_adjoint.py::test_returns_by_hand[torch]",
    ),
    "discount forgotten": Bug(
        "kernels/adjoint.py",
        "add_(following, alpha=discount)",
        "add_(following, alpha=1)",
        "test_adjoint.py::test_returns_by_hand[torch]",
    ),
    "mean over rollouts forgotten": Bug(
        "estimators/rules.py", "return sums.div_(counts.view(1, 1, -1, 1))", "return sums", NP_BACKWARD
    ),
    "bias gradient dropped": Bug(
        "kernels/weight_gradients.py", "bias = adjoint.sum((1, 2))", "bias = 0 * adjoint.sum((1, 2))", NP_BACKWARD
    ),
    "recurrent matrix transposed": Bug(
        "kernels/product.py",
        "self._rounded(weight_hh).t()",
        "self._rounded(weight_hh)",
        "test_rollout.py::test_two_units_by_hand[torch]",
    ),
    "h_0's gradient transposed": Bug(
        "network/cells.py",
        "return adjoint @ weights.weight_hh",
        "return adjoint @ weights.weight_hh.t()",
        NP_BACKWARD,
    ),
    "compiled: noise shared across rollouts": Bug(
        "kernels/noise_numba.py",
        "np.uint64(rollout + first + row)",
        "np.uint64(rollout + first)",
        "test_kernels_numba.py::test_signs_by_brute_force",
    ),
    "compiled: outputs a step late": Bug(
        "kernels/rollout_numba.py",
        "(step - 1) % outputs.shape[0]",
        "step % outputs.shape[0]",
        "test_kernels_numba.py::test_outputs_that_wait_reach_their_steps[own products-5000]",
    ),
    "compiled: the last units left out of the product": Bug(
        "kernels/rollout_numba.py",
        "for k in range(units // 4 * 4, units):",
        "for k in range(units // 4 * 4 + 1, units):",
        "test_kernels_numba.py::test_rollout_is_as_good_as_the_reference[own products-tanh-none-(7, 3, 5, 6)]",
    ),
    "compiled: a NaN passes for a small deviation": Bug(
        "kernels/cell_numba.py",
        "large += _F(0) if abs(x) <= _BOUND else _F(1)",
        "large += _F(1) if abs(x) > _BOUND else _F(0)",
        "test_kernels_numba.py::test_the_fraction_is_tanh_to_float32s_rounding",
    ),
    "compiled: halves by place instead of number": Bug(
        "kernels/adjoint_numba.py",
        "_add_row(sums, (first + rollout) % 2,",
        "_add_row(sums, rollout % 2,",
        "test_kernels_numba.py::test_adjoint_is_the_references[0.001-rademacher-activity-(3, 2, 5, 7)]",
    ),
    "compiled: the last step's return without what follows": Bug(
        "kernels/adjoint_numba.py",
        "credit[-1].add_(carry, alpha=discount)",
        "credit[-1].add_(carry, alpha=0)",
        "test_kernels_numba.py::test_returns_are_the_references[(20, 3, 100)-0.5]",
    ),
    "compiled: later noise added instead of taken out": Bug(
        "kernels/least_squares_numba.py",
        "(credit[step, sample, rollout] - later)",
        "(credit[step, sample, rollout] + later)",
        "test_kernels_numba.py::test_deflation_is_the_references[0.9-True-(4, 3, 7, 20)]",
    ),
    "compiled: a pivot that is not positive passes": Bug(
        "kernels/least_squares_numba.py",
        "fine = fine and pivot > 0",
        "fine = fine and pivot != 0",
        "test_least_squares_numba.py::test_factors_are_those_of_float64[0.01-33]",
    ),
    "bands of a Gram matrix leave out its last rows": Bug(
        "kernels/least_squares.py",
        "for start in range(0, size, band):",
        "for start in range(0, size - band, band):",
        "test_least_squares.py::test_the_lower_triangle_of_a_gram_matrix_is_that_of_the_whole_product[300-67]",
    ),
    "carry lost between segments": Bug(
        "estimators/rules.py",
        "carry=self.carries.get(block.rollouts.start)",
        "carry=None",
        "test_division.py::test_backward_does_not_depend_on_division[one layer-np]",
    ),
    "a rollout that is not finite counts": Bug(
        "kernels/finite.py",
        "return None if delta_loss is None else torch.where(finite, delta_loss, 0)",
        "return delta_loss",
        "test_robustness.py::test_rollouts_whose_loss_is_not_finite_are_left_out_and_counted[nan-np-False]",
    ),
    "both directions share noise": Bug(
        "estimators/by_layer.py",
        "layer = _Layer(weights, activity, loss, index, ",
        "layer = _Layer(weights, activity, loss, number, ",
        "test_details.py::test_every_layer_and_direction_has_noise_of_its_own[backward]",
    ),
    "processes share the readout's noise": Bug(
        "estimators/readout.py",
        "rank=settings.process_rank,",
        "rank=0,",
        "test_details.py::test_processes_perturb_the_readout_with_different_noise",
    ),
    "dense weight noise repeats in every chunk of samples": Bug(
        "estimators/weight_rollouts.py",
        "time=samples.start),",
        "time=0),",
        "test_details.py::test_weight_noise_of_chunks_of_samples_is_that_of_the_whole[None]",
    ),
    "a sequence's value is credited at the last step there is": Bug(
        "task/black_box.py",
        "shares[self.last_step[samples], torch.arange",
        "shares[self.last_step[samples] * 0 - 1, torch.arange",
        "test_details.py::test_a_sequences_value_is_credited_at_its_last_valid_step[np]",
    ),
    "dropout missing below, one direction": Bug(
        "estimators/by_segment.py",
        "above = above if mask is None or above is None else above * mask",
        "above = above",
        "test_details.py::test_dropout_is_in_the_gradient_that_the_layer_below_answers_to[False]",
    ),
    "dropout missing below, two directions": Bug(
        "estimators/by_layer.py",
        "above = d_inputs if mask is None else d_inputs * mask",
        "above = d_inputs",
        "test_details.py::test_dropout_is_in_the_gradient_that_the_layer_below_answers_to[True]",
    ),
    "an infinite gradient loses rollouts where time is cut": Bug(
        "estimators/by_layer.py",
        "sweep.finite |= trust.unsqueeze(1)",
        "pass",
        "test_details.py::test_a_gradient_that_is_not_finite_comes_back_however_time_is_cut[Division(samples=2, "
        "rollouts=4, segments=3)]",
    ),
    "no floor under the ridge": Bug(
        "kernels/least_squares.py",
        "RIDGE_FLOOR = 8",
        "RIDGE_FLOOR = 0",
        "test_details.py::test_two_equal_rollouts_are_no_singular_system",
    ),
    "lost rollouts count in the mean return": Bug(
        "kernels/least_squares.py",
        "counted = how.finite.sum(-1, keepdim=True)",
        "counted = how.finite.shape[-1]",
        "test_details.py::test_a_lost_rollout_is_not_in_the_mean_that_is_taken_off",
    ),
    "halves agree in the first layer alone": Bug(
        "estimators/found.py",
        "return split_half(self.layers)",
        "return split_half(self.layers[:1])",
        "test_details.py::test_the_agreement_of_halves_is_over_all_layers",
    ),
    "the agreement of halves squares in float32": Bug(
        "estimators/found.py",
        "halves = halves.double()",
        "halves = halves + 0",
        "test_details.py::test_the_agreement_of_halves_does_not_depend_on_the_size_of_the_gradients[1e+25]",
    ),
    "rollouts do not follow the forward pass's autocast": Bug(
        "ops/network.py",
        "with _under(structure.autocast, device) if",
        "with _under(None, device) if",
        "test_details.py::test_the_forward_passs_autocast_decides_the_precision_of_the_rollouts[backward-torch]",
    ),
    "the backward pass forgets the precision that the forward pass resolved": Bug(
        "ops/network.py",
        '"precision": settings.options.precision}',
        '"precision": "tf32"}',
        "test_details.py::test_the_forward_passs_autocast_decides_the_precision_of_the_rollouts[forward-torch]",
    ),
    "an LSTM's path through c stays in the returns": Bug(
        "kernels/least_squares.py",
        "target -= around",
        "around = around * 0",
        "test_gated.py::test_gates_that_hold_and_a_loss_at_the_end[lstm-1.0]",
    ),
    "an LSTM's path through c is not discounted": Bug(
        "network/cells.py",
        "keep=discount * torch.sigmoid(keep)",
        "keep=torch.sigmoid(keep)",
        "test_gated.py::test_gates_that_hold_and_a_loss_at_the_end[lstm-0.9]",
    ),
    "a GRU's recurrent bias gets the gradient of the other": Bug(
        "network/cells.py",
        "of_n * reset), -1))",
        "of_n), -1))",
        "test_gated.py::test_anp_ls_with_enough_rollouts_is_bptt[gru-one layer-full]",
    ),
    "the gradient of c_n counts twice where processes share rollouts": Bug(
        "estimators/sweep.py",
        "share.by_samples or share.index == 0",
        "True",
        "test_gated.py::test_processes_that_share_rollouts_count_the_gradient_of_c_n_once",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """pytest's results for every bug, and for a copy without a bug."""

    def planted(name):
        bug = BUGS[name]
        folder = tmp_path_factory.mktemp("planted", numbered=True)
        path = copy_package(folder) / bug.file
        try:
            path.write_text(changed(path.read_text(encoding="utf-8"), bug.right, bug.wrong), encoding="utf-8")
        except ValueError as error:
            return Outcome(pytest.ExitCode.USAGE_ERROR, {}, [], f"{bug.file}: {error}")
        return run_tests(folder, [bug.detector])

    def unharmed():
        folder = tmp_path_factory.mktemp("unharmed")
        copy_package(folder)
        return run_tests(folder, sorted({bug.detector for bug in BUGS.values()}))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        control = pool.submit(unharmed)
        futures = {name: pool.submit(planted, name) for name in BUGS}
        return {name: future.result() for name, future in futures.items()} | {"none": control.result()}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(outcomes, name):
    bug = BUGS[name]
    assert (PACKAGE / bug.file).read_text(encoding="utf-8").count(bug.right) == 1
    status, failures, _, said = outcomes[name]
    assert status == pytest.ExitCode.TESTS_FAILED, said
    ((failed, message),) = failures.items()
    assert failed == bug.detector.split("::")[1]
    # It must fail by an assertion, not by a missing name.
    assert "assert" in message.lower(), message


def test_without_a_bug_they_pass(outcomes):
    status, failures, _, said = outcomes["none"]
    assert status == pytest.ExitCode.OK, said
    assert failures == {}
