"""Processes over gloo: shared rollouts give the update of one process; divided samples have independent noise."""

import os
import subprocess
import sys

import distributed_cases as cases
import pytest
import torch
from distributed_cases import CELLS, EXAMPLES, METHODS, STATELESS
from tolerances import TOLERANCES, assert_close, relative_error
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.runtime.processes import Share

each_cell = pytest.mark.parametrize("cell", CELLS)
COUNTS = [pytest.param(2, id="2 processes"), pytest.param(3, id="3 processes", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=COUNTS)
def reports(request, tmp_path_factory):
    """The report of each process. Neither number of processes divides P = 7 rollouts or B = 5 samples."""
    return cases.run(request.param, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """The updates of one process without a process group."""
    return cases.updates(False)


def test_shared_rollouts_make_the_update_of_one_process(reports, alone):
    for name, expected in alone.items():
        assert bool(expected.isfinite().all()), name
        error = relative_error(reports[0]["updates"][name], expected)
        assert error <= TOLERANCES["float32_long" if "float32" in name else "float64"].bound, f"{name}: {error:.2g}"
    assert alone.keys() == reports[0]["updates"].keys()
    # The last number counts the lost rollouts of all processes; some were lost.
    assert all(float(alone[f"{cell} lost rollouts {method}"][-1]) > 0 for cell in CELLS for method in METHODS)


def test_all_processes_have_the_same_gradients_bitwise(reports):
    for other in reports[1:]:
        assert all(torch.equal(other["updates"][name], expected) for name, expected in reports[0]["updates"].items())


@each_cell
def test_processes_seeded_differently_train_as_the_first_would_alone(reports, cell):
    # All processes use the first one's seed of an update.
    expected = cases.train(False, 0, cell)
    for report in reports:
        assert_close(report["train"][cell], expected, "float32_long")
        assert torch.equal(report["train"][cell], reports[0]["train"][cell])
    assert relative_error(cases.train(False, 1, cell), expected) > TOLERANCES["float32_long"].bound


def test_sharing_draws_one_number_too(reports):
    assert all(report["generators"] for report in reports)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("own_batch", "RuntimeError: shard_rollouts=True: the N processes do not hold the same batch"),
        ("own_order", "do not hold the same batch"),
        ("own_targets", "do not hold the same batch"),
        ("own_batch_size", "do not hold the same batch"),
        ("own_weights", "do not hold the same batch, weights"),
        ("own_dropout", "weights and dropout masks"),
        ("wrapped", "no DistributedDataParallel"),
        ("too_few", "ValueError: rollouts=1 cannot be shared between N processes"),
        ("nothing_finite", "every rollout of sample 0, 1, 2, 3, 4 is not finite"),
    ],
)
def test_mistakes_are_errors_in_every_process(reports, case, words):
    for report in reports:
        assert words.replace("N", str(len(reports))) in report["errors"][case]


def unwrapped(monkeypatch, rank, count, cell):
    """The gradients of one process before they are averaged."""
    with monkeypatch.context() as patch:
        patch.setattr("anpgpu.runtime.settings.process_rank", lambda: rank)
        return cases.samples_sharded(rank, count, cell, wrap=lambda model: model)


@each_cell
def test_data_parallel_averages_the_estimates_of_all_processes(monkeypatch, reports, cell):
    count = len(reports)
    of_ranks = [unwrapped(monkeypatch, rank, count, cell) for rank in range(count)]
    for method in (*STATELESS, "bptt"):
        mean = torch.stack([gradients[method] for gradients in of_ranks]).mean(0)
        for report in reports:
            assert_close(report["ddp"][cell][method], mean, "float64")


@each_cell
def test_processes_with_the_same_seed_draw_other_noise(monkeypatch, cell):
    # Two ranks with the same seed, samples, targets and weights differ only by the rank in the noise's counter.
    first, second = (unwrapped(monkeypatch, rank, 1, cell) for rank in (0, 1))
    for method in STATELESS:
        assert relative_error(first[method], second[method]) > 0.01
    assert torch.equal(first["bptt"], second["bptt"])


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_replicas_hold_bitwise_the_same_feedback_matrix(reports, name):
    first, *others = [report["feedback"][name] for report in reports]
    assert first["updates"] == 3
    # Learnt, from samples that differ from process to process: towards the weights.
    assert float(torch.linalg.vector_norm(first["feedback"])) > 0
    assert float(nn.functional.cosine_similarity(first["feedback"].flatten(), first["weight"].flatten(), dim=0)) > 0.5
    for other in others:
        assert torch.equal(other["feedback"], first["feedback"])
        assert torch.equal(other["weight"], first["weight"])


@pytest.mark.parametrize("share", ["samples", "rollouts"])
def test_the_example_trains_alike_in_every_process(reports, share):
    losses = reports[0]["example"][share]
    assert len(losses) == 3
    assert all(report["example"][share] == losses for report in reports)
    # The first loss, of the untrained model, is on the same batch; later losses depend on the noise.
    assert losses[0] == pytest.approx(reports[0]["example"]["samples"][0])
    assert losses[2] != reports[0]["example"]["rollouts" if share == "samples" else "samples"][2]


@pytest.mark.slow
@pytest.mark.parametrize("share", ["samples", "rollouts"])
def test_the_example_by_its_command(share):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(EXAMPLES / "ddp.py"), "--share", share],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    first, last = (float(word) for word in run.stdout.split("loss ")[1].split(" -> "))
    assert last < 0.5 * first


@pytest.mark.parametrize(("rollouts", "count"), [(1, 1), (2, 2), (7, 1), (7, 2), (7, 3), (7, 7), (64, 3)])
def test_shares_cover_every_rollout_or_sample_once(rollouts, count):
    shares = [Share(rollouts, index, count) for index in range(count)]
    run = [number for share in shares for number in range(share.own.start, share.own.stop)]
    assert run == list(range(rollouts))
    assert all(1 <= share.own.stop - share.own.start <= share.most for share in shares)
    assert all(share.samples(5) == slice(0, 5) for share in shares)
    whole = [Share(rollouts, index, count, by_samples=True) for index in range(count)]
    assert [number for share in whole for number in range(*share.samples(5).indices(5))] == list(range(5))
    assert all(share.own == slice(0, rollouts) and share.most == rollouts for share in whole)


def test_without_a_process_group_sharing_is_an_error():
    rnn = anpgpu.RNN(2, 3, perturbation=Perturbation(shard_rollouts=True))
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed\.init_process_group"):
        rnn(torch.ones(4, 1, 2))
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed\.init_process_group"):
        anpgpu.estimate_grad_(rnn, None, torch.ones(4, 1, 2), torch.ones(4, 1, 3))
    rnn.eval()
    with torch.no_grad():
        assert rnn(torch.ones(4, 1, 2))[0].shape == (4, 1, 3)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="'published-anp' has one rollout"):
        Perturbation("published-anp", rollouts=1, noise="gaussian", shard_rollouts=True)
    with pytest.raises(TypeError, match="shard_rollouts must be a bool, got 2"):
        Perturbation(shard_rollouts=2)
    # An empty batch has nothing to exchange.
    rnn = anpgpu.RNN(2, 3, perturbation=Perturbation("bptt", shard_rollouts=True))
    rnn(torch.ones(4, 1, 2))[0].sum().backward()
    assert rnn.weight_hh_l0.grad is not None
