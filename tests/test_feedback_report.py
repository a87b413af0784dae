"""Learned feedback: its knobs, what it reports, and that an update which fails, or is none of it, teaches nothing."""

import copy

import pytest
import torch
from test_feedback_state import HOW, B, H, I, O, T, draw, matrix, network, update
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.estimators import by_layer
from anpgpu.estimators.feedback import LearnedFeedback
from anpgpu.estimators.found import NonFiniteRolloutsError


def test_one_rollout_warns_and_refuses_a_baseline():
    with pytest.warns(UserWarning, match="rollouts=1 learns its feedback matrix slowly"):
        Perturbation("anp-feedback", rollouts=1)
    with pytest.raises(ValueError, match="baseline=True needs at least 2 rollouts"):
        Perturbation("anp-feedback", rollouts=1, baseline=True)


@pytest.mark.parametrize(
    ("knob", "value", "error"),
    [
        ("prior", "guess", ValueError),
        ("prior", 1, TypeError),
        ("warmup", -1, ValueError),
        ("warmup", 1.5, TypeError),
        ("follow_weights", 1, TypeError),
    ],
)
def test_a_knob_that_is_wrong_is_quoted(knob, value, error):
    with pytest.raises(error, match=f"{knob} must.*got {value!r}"):
        Perturbation("anp-feedback", **{knob: value})


def test_without_a_prior_it_is_least_squares():
    expected = update(network(Perturbation("anp-ls", rollouts=4)))
    assert_close(update(network(Perturbation("anp-feedback", rollouts=4, prior="none"))), expected, "float32_long")


def test_only_a_learned_prior_learns():
    for prior in ("known", "none"):
        rnn = network(Perturbation("anp-feedback", rollouts=4, prior=prior))
        update(rnn)
        assert anpgpu.estimator_state(rnn) == {}
        assert bool(rnn.last_estimate.prior.isnan().all())
        # Then it is as if nothing had been: with the warm-up, and from B = 0 wherever the weights have gone.
        with torch.no_grad():
            rnn.weight_hh_l0 += 0.1 * draw(H, H)
        rnn.perturbation = HOW
        fresh = copy.deepcopy(rnn)
        anpgpu.load_estimator_state_(fresh, {})
        assert torch.equal(update(rnn, seed=2), update(fresh, seed=2))
        assert torch.equal(matrix(rnn), matrix(fresh))


def test_the_rows_of_the_report_are_the_layers_and_directions_in_torchs_order(monkeypatch):
    rnn = network(Perturbation("anp-feedback", rollouts=4, warmup=0), num_layers=2, bidirectional=True)
    update(rnn)
    made, new_learner = {}, LearnedFeedback.new_learner

    def watched(settings, number, weight_hh, extent):
        made[number] = new_learner(settings, number, weight_hh, extent)
        return made[number]

    monkeypatch.setattr(LearnedFeedback, "new_learner", watched)
    update(rnn, seed=2)
    expected = torch.stack([made[number].report for number in range(4)])
    assert len({row.tolist()[0] for row in expected}) == 4
    assert torch.equal(rnn.last_estimate.prior, expected)
    # A frozen layer at the bottom does not run.
    for name, weight in rnn.named_parameters():
        weight.requires_grad_("l1" in name)
    update_of_upper = rnn(draw(T, B, I))[0].square().sum()
    update_of_upper.backward()
    assert rnn.last_estimate.prior.isnan().all(1).tolist() == [True, True, False, False]


def test_where_a_layer_fails_none_has_learnt(monkeypatch):
    rnn = network(num_layers=2)
    update(rnn)
    before = anpgpu.estimator_state(rnn)[""]
    walked, estimate_layer = [], by_layer._estimate_layer

    def failing(layer, *others):
        walked.append(layer.number)
        if layer.number == 0:
            raise NonFiniteRolloutsError("lost")
        return estimate_layer(layer, *others)

    monkeypatch.setattr(by_layer, "_estimate_layer", failing)
    with pytest.raises(NonFiniteRolloutsError):
        update(rnn, seed=2)
    assert walked == [1, 0]
    after = anpgpu.estimator_state(rnn)[""]
    assert after.pop("updates") == before.pop("updates") == 1
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_update_outside_of_data_parallel_waits_for_no_replica():
    rnn, readout = network(), nn.Linear(H, O)
    # Left by a forward pass inside; no process group, so that an exchange would fail.
    vars(rnn)["_estimator_state"].replicas = object()
    anpgpu.estimate_grad_(rnn, readout, draw(T, B, I), draw(T, B, O))
    assert float(matrix(rnn).norm()) > 0


def test_what_a_plain_rnn_has_learnt_stays_after_a_swap():
    rnn, readout = nn.RNN(I, H), nn.Linear(H, O)
    anpgpu.estimate_grad_(rnn, readout, draw(T, B, I), draw(T, B, O), perturbation=HOW)
    before = matrix(rnn)
    anpgpu.swap_(rnn, HOW)
    assert torch.equal(matrix(rnn), before)


def test_the_estimate_says_how_good_the_prior_is():
    rnn = network(Perturbation("anp-feedback", rollouts=8, warmup=0), num_layers=2)
    update(rnn, seed=1)
    first = rnn.last_estimate.prior
    assert first.shape == (2, 2)
    assert bool(first[:, 1].isnan().all())
    for number in range(2, 60):
        update(rnn, seed=number)
    late = rnn.last_estimate.prior
    assert bool((late[:, 0] > first[:, 0]).all())
    assert bool(((late[:, 1] - 1).abs() < 0.1).all())
    plain = network(Perturbation("np", rollouts=4))
    update(plain)
    assert plain.last_estimate.prior.shape == (0, 2)
