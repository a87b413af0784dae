"""Cases that users met: small inputs with the right answer, each for a kind of fault."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import anpgpu
from anpgpu import Perturbation
from anpgpu.runtime import memory

T, B, I, H, O = 6, 3, 2, 4, 2  # noqa: E741  (the design's names)
METHODS = ("np", "anp", "anp-ls", "anp-feedback", "wp")


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def network(method="np", *, dtype=torch.float64, rollouts=8, head=True, **options):
    torch.manual_seed(0)
    how = Perturbation(method, rollouts=rollouts, sigma=1e-3)
    rnn = anpgpu.RNN(I, H, dtype=dtype, perturbation=how, **options)
    width = H * (2 if rnn.bidirectional else 1)
    return rnn, nn.Linear(width, O, dtype=dtype) if head else None


def forget(rnn):
    """Make the next update a module's first."""
    anpgpu.load_estimator_state_(rnn, {})


def estimated(rnn, head, *arguments, seed=1, **named):
    """The estimate and all gradients of one update from a seed."""
    forget(rnn)
    for module in (rnn, head):
        if module is not None:
            module.zero_grad()
    seen = anpgpu.estimate_grad_(rnn, head, *arguments, generator=torch.Generator().manual_seed(seed), **named)
    modules = [module for module in (rnn, head) if module is not None]
    return seen, flat(leaf.grad for module in modules for leaf in module.parameters() if leaf.grad is not None)


# Padding and callables: what stands behind a sample's length decides nothing.


def squared_sum(outputs, targets):
    return outputs.sum(0).square().sum(-1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "bptt"])
def test_padding_does_not_reach_a_callable_of_whole_sequences(method, bidirectional):
    rnn, head = network(method, bidirectional=bidirectional)
    torch.manual_seed(1)
    longest = torch.randn(9, 2, I, dtype=torch.float64)
    results = []
    for time in (4, 5, 9):
        inputs = longest[:time].clone()
        inputs[2:, 0] = inputs[4:, 1] = 7.0
        results.append(estimated(rnn, head, inputs, None, squared_sum, lengths=[2, 4]))
    for seen, gradients in results[1:]:
        assert_close(seen.loss, results[0][0].loss, "float64")
        assert_close(gradients, results[0][1], "float64")


@pytest.mark.parametrize("method", ["np", "bptt"])
def test_a_callable_sees_zeros_where_a_sample_has_ended(method):
    rnn, head = network(method)
    ended = []

    def watched(outputs, targets):
        ended.append(outputs[3:, 0])
        return outputs.square().mean(-1)

    anpgpu.estimate_grad_(rnn, head, torch.randn(T, B, I, dtype=torch.float64), None, watched, lengths=[3, 6, 6])
    assert ended
    assert all(torch.equal(part, torch.zeros_like(part)) for part in ended)


# A loss that works in place.


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_works_in_place_changes_nothing(method):
    rnn, head = network(method)
    inputs, targets = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, O, dtype=torch.float64)
    before = targets.clone()
    seen, gradients = estimated(rnn, head, inputs, targets, lambda o, t: o.sub_(t).square_().mean(-1))
    plain, expected = estimated(rnn, head, inputs, targets, lambda o, t: (o - t).square().mean(-1))
    assert_close(gradients, expected, "float64")
    assert torch.equal(seen.outputs, plain.outputs)
    _, negated = estimated(rnn, head, inputs, targets, lambda o, t: t.neg_().add(o).square_().mean(-1))
    assert_close(negated, expected, "float64")
    assert torch.equal(targets, before)


# One value for a whole sequence.

SEQUENCE = (12, 2, 2, 6, 2)
"""T, B, I, H, O of the cases below."""


def mean_of_steps(outputs, targets):
    return (outputs - targets).square().mean(-1).mean(0)


def cosine_to_bptt(method, rollouts, *, lengths=None, loss=mean_of_steps, seeds=1, **options):
    """Cosine between BPTT's gradient of the rnn and the mean estimate of some seeds."""
    time, batch, features, units, width = SEQUENCE
    torch.manual_seed(0)
    rnn = anpgpu.RNN(features, units, dtype=torch.float64, **options)
    head = nn.Linear(units * (1 + rnn.bidirectional), width, dtype=torch.float64)
    inputs, targets = (torch.randn(time, batch, size, dtype=torch.float64) for size in (features, width))
    gradients = []
    for how in (Perturbation("bptt"), Perturbation(method, rollouts=rollouts, sigma=1e-5, ridge=1e-6)):
        for seed in range(1 if how.method == "bptt" else seeds):
            rnn.zero_grad()
            anpgpu.estimate_grad_(
                rnn, head, inputs, targets, loss, perturbation=how, lengths=lengths, targets_per="step",
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            gradients.append(flat(weight.grad for weight in rnn.parameters()))
    return float(torch.cosine_similarity(gradients[0], torch.stack(gradients[1:]).mean(0), dim=0))


@pytest.mark.parametrize(
    "network",
    [{}, {"num_layers": 2}, {"bidirectional": True}, {"lengths": [12, 5]}, {"lengths": [7, 12], "bidirectional": True}],
    ids=str,
)
def test_values_of_whole_sequences_are_regressed_without_bias(network):
    # P >= 2 T O.
    assert cosine_to_bptt("anp-ls", 2 * SEQUENCE[0] * SEQUENCE[4], **network) > 0.999


def test_with_fewer_rollouts_than_outputs_the_cosine_rises_with_them():
    few, some, enough = (cosine_to_bptt("anp-ls", rollouts, seeds=4) for rollouts in (8, 16, 32))
    assert 0.3 < few < some < enough


def test_anp_credits_a_whole_sequence_as_its_steps():
    def each_step(outputs, targets):
        return (outputs - targets).square().mean(-1)

    whole, steps = (cosine_to_bptt("anp", 64, loss=loss, seeds=4) for loss in (mean_of_steps, each_step))
    assert abs(whole - steps) < 0.02


def test_the_value_of_a_sequence_does_not_depend_on_division(monkeypatch):
    results = []
    for limit in (None, 17_500_000):
        rnn, head = network("anp-ls", rollouts=16)
        rnn.perturbation = Perturbation("anp-ls", rollouts=16, sigma=1e-4, max_memory=limit)
        torch.manual_seed(2)
        inputs, targets = torch.randn(200, B, I, dtype=torch.float64), torch.randn(200, B, O, dtype=torch.float64)
        results.append(estimated(rnn, head, inputs, targets, mean_of_steps)[1])
    assert_close(results[1], results[0], "unridged")


# Differentiation through cuDNN.


def test_what_autograd_differentiates_runs_in_training_mode(monkeypatch):
    # cuDNN refuses to differentiate anything else, whatever mode the module is in.
    modes, run = [], torch._VF.rnn_tanh

    def watched(*arguments):
        # Of a packed sequence the sizes of its steps come second, and no batch_first last.
        modes.append(arguments[7 if arguments[1].dtype == torch.int64 else 6])
        return run(*arguments)

    monkeypatch.setattr(torch._VF, "rnn_tanh", watched, raising=False)
    rnn, head = network("bptt")
    inputs, targets = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, O, dtype=torch.float64)
    for lengths in (None, [T, 3, 2]):
        anpgpu.estimate_grad_(rnn.eval(), head, inputs, targets, lengths=lengths)
    assert modes == [True, True]


# Reentrant checkpointing.


def reentrant(rnn, inputs):
    return checkpoint(lambda values: rnn(values)[0], inputs, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.*:FutureWarning")
@pytest.mark.parametrize("method", ["np", "anp-ls"])
def test_two_updates_under_reentrant_checkpointing_have_different_noise(method):
    rnn, _ = network(method, head=False)
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    gradients = []
    for _ in range(3):
        rnn.zero_grad()
        reentrant(rnn, inputs).square().sum().backward()
        gradients.append(rnn.weight_hh_l0.grad.clone())
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


def test_reentrant_checkpointing_repeats_an_update_of_the_same_seed():
    rnn, _ = network("np", head=False)
    inputs = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    gradients = []
    for run in (reentrant, lambda module, values: module(values)[0]):
        rnn.zero_grad()
        torch.manual_seed(3)
        run(rnn, inputs).square().sum().backward()
        gradients.append(rnn.weight_hh_l0.grad.clone())
    assert torch.equal(*gradients)


# Padding that explodes.


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("method", [*METHODS, "bptt"])
def test_a_network_that_grows_in_the_padding_is_that_of_the_short_sequence(method, bidirectional):
    torch.manual_seed(0)
    how = Perturbation(method, rollouts=8, sigma=1e-3, warmup=1)
    rnn = anpgpu.RNN(I, H, nonlinearity="relu", perturbation=how, bidirectional=bidirectional)
    for name, weight in rnn.named_parameters():
        if "weight_hh" in name:
            weight.data = 1.5 * torch.eye(H)
    inputs = torch.rand(12, 2, I)
    gradients = []
    for time in (12, 1000):
        padded = torch.cat((inputs, torch.zeros(time - 12, 2, I)))
        forget(rnn)
        rnn.zero_grad()
        torch.manual_seed(4)
        outputs, _ = rnn(pack_padded_sequence(padded, [12, 9]))
        outputs.data.sum().backward()
        gradients.append(flat(weight.grad for weight in rnn.parameters()))
        rnn.zero_grad()
        estimated(rnn, None, padded, torch.zeros(time, 2, H * (1 + bidirectional)), lengths=[12, 9])
        gradients.append(flat(weight.grad for weight in rnn.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert_close(gradients[2], gradients[0], "float32_long")
    assert_close(gradients[3], gradients[1], "float32_long")


# In-place use of what a forward pass returns.


def states_of(rnn, inputs):
    outputs, h_n = rnn(inputs)
    return outputs.data if isinstance(outputs, PackedSequence) else outputs, h_n


@pytest.mark.parametrize("form", ["plain", "batch first", "packed", "unbatched"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("method", ["np", "wp"])
def test_outputs_and_states_may_be_changed_in_place_as_those_of_torch(method, layers, form):
    rnn, _ = network(method, num_layers=layers, head=False, batch_first=form == "batch first")
    inputs = torch.randn(T, B, I, dtype=torch.float64)
    inputs = {"packed": pack_padded_sequence(inputs, [T, 4, 2]), "unbatched": inputs[:, 0]}.get(form, inputs)
    torch.manual_seed(5)
    outputs, h_n = states_of(rnn, inputs)
    (torch.relu(outputs).sum() + (2 * h_n).sum()).backward()
    expected = flat(weight.grad for weight in rnn.parameters())
    rnn.zero_grad()
    torch.manual_seed(5)
    outputs, h_n = states_of(rnn, inputs)
    (outputs.relu_().sum() + h_n.mul_(2).sum()).backward()
    assert_close(flat(weight.grad for weight in rnn.parameters()), expected, "float64")


def test_truncated_bptts_idiom_works_after_a_swap():
    rnn, _ = network("np", head=False)
    state = None
    for _ in range(3):
        outputs, state = rnn(torch.randn(T, B, I, dtype=torch.float64), state)
        outputs.sum().backward()
        state.detach_()
        state.zero_()
    assert not state.requires_grad


# Where estimates go.


def test_estimates_are_added_to_grad_in_place():
    rnn, head = network("np")
    inputs, targets = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, O, dtype=torch.float64)
    _, expected = estimated(rnn, head, inputs, targets)
    leaves = [*rnn.parameters(), *head.parameters()]
    buffer = torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=torch.float64)
    start = 0
    for leaf in leaves:
        leaf.grad = buffer[start : start + leaf.numel()].view_as(leaf)
        start += leaf.numel()
    fired = []
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(fired.append)
    anpgpu.estimate_grad_(rnn, head, inputs, targets, generator=torch.Generator().manual_seed(1))
    assert_close(buffer, expected, "float64")
    assert len(fired) == len(leaves)
    assert all(leaf.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for leaf in leaves)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_in_inference_mode_leaves_the_next_one_whole(method):
    rnn, head = network(method)
    inputs, targets = torch.randn(T, B, I, dtype=torch.float64), torch.randn(T, B, O, dtype=torch.float64)
    _, expected = estimated(rnn, head, inputs, targets)
    with torch.inference_mode():
        _, inside = estimated(rnn, head, inputs, targets)
    assert_close(inside.clone(), expected, "float64")
    assert all(not leaf.grad.is_inference() for leaf in (*rnn.parameters(), *head.parameters()))
    _, after = estimated(rnn, head, inputs, targets)
    assert_close(after, expected, "float64")


def test_a_packed_sequence_from_a_graph_is_refused_and_a_leafs_data_gets_its_gradient():
    rnn, head = network("np")
    embedded = nn.Embedding(5, I, dtype=torch.float64)(torch.randint(5, (T, B)))
    targets = torch.randn(T, B, O, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs come from a graph"):
        anpgpu.estimate_grad_(rnn, head, pack_padded_sequence(embedded, [T, 4, 2]), targets)
    packed = pack_padded_sequence(embedded.detach(), [T, 4, 2])
    packed.data.requires_grad_()
    padded = embedded.detach().requires_grad_()
    generator = torch.Generator()
    anpgpu.estimate_grad_(rnn, head, packed, targets, generator=generator.manual_seed(1))
    anpgpu.estimate_grad_(rnn, head, padded, targets, lengths=[T, 4, 2], generator=generator.manual_seed(1))
    assert_close(packed.data.grad, pack_padded_sequence(padded.grad, [T, 4, 2]).data, "float64")


def test_no_perturbation_means_the_default():
    rnn, head = network("np")
    rnn.perturbation = None
    rnn(torch.randn(T, B, I, dtype=torch.float64))[0].sum().backward()
    assert rnn.weight_hh_l0.grad is not None
    anpgpu.estimate_grad_(rnn, head, torch.randn(T, B, I).double(), torch.randn(T, B, O).double())


# Sizes that could mean two things.


def test_targets_per_decides_where_sizes_do_not():
    rnn, head = network("np", batch_first=True)
    inputs, targets = torch.randn(2, O, I, dtype=torch.float64), torch.randn(2, O, dtype=torch.float64)

    def of_sequences(outputs, targets):
        return (outputs[-1] - targets).square().mean(-1)

    with pytest.raises(ValueError, match=r"targets_per"):
        anpgpu.estimate_grad_(rnn, head, inputs, targets, of_sequences)
    seen = anpgpu.estimate_grad_(rnn, head, inputs, targets, of_sequences, targets_per="sequence")
    assert_close(seen.loss, (head(rnn(inputs)[0][:, -1]) - targets).square().mean().detach(), "float64")
    with pytest.raises(ValueError, match="targets_per must be one of 'step', 'sequence'; got 'batch'"):
        anpgpu.estimate_grad_(rnn, head, inputs, targets, of_sequences, targets_per="batch")


# What swap_ leaves alone.


def test_swap_names_what_it_leaves_alone():
    cells = {"rnn": nn.RNNCell(3, 3), "gru": nn.GRUCell(3, 3), "lstm": nn.LSTMCell(3, 3)}
    model = nn.ModuleDict({"whole": nn.RNN(2, 3), "narrow": nn.LSTM(3, 3, proj_size=2), **cells})
    alone = r"narrow \(LSTM, proj_size=2\), rnn \(RNNCell\), gru \(GRUCell\), lstm \(LSTMCell\)"
    with pytest.warns(UserWarning, match=alone):
        assert anpgpu.swap_(model) == 1
    assert type(model["narrow"]) is nn.LSTM
    with pytest.raises(ValueError, match=r"no nn\.RNN.*left alone: 1 \(LSTMCell\)"):
        anpgpu.swap_(nn.Sequential(nn.Linear(2, 3), nn.LSTMCell(3, 3)))
    with pytest.raises(ValueError, match=r"no nn\.RNN"):
        anpgpu.swap_(nn.Linear(2, 3))


# Errors that name what is wrong.


@pytest.mark.parametrize("method", METHODS)
def test_targets_that_are_not_finite_are_named(method):
    rnn, head = network(method)
    targets = torch.randn(T, B, O, dtype=torch.float64)
    targets[2, 1, 0] = math.nan
    with pytest.raises(RuntimeError, match="targets"):
        anpgpu.estimate_grad_(rnn, head, torch.randn(T, B, I, dtype=torch.float64), targets)


@pytest.mark.parametrize("kind", [nn.Dropout, lambda _: nn.BatchNorm1d(H)])
def test_a_readout_that_is_another_function_at_each_call_is_refused(kind):
    rnn, _ = network("np", dtype=torch.float32)
    readout = nn.Sequential(kind(0.5)).requires_grad_(False)
    inputs, targets = torch.randn(T, B, I), torch.randn(T, B, H)

    def loss(outputs, targets):
        return (outputs - targets).square().mean(-1)

    with pytest.raises(ValueError, match=r"readout.*eval\(\)"):
        anpgpu.estimate_grad_(rnn, readout.train(), inputs, targets, loss)


def test_noise_has_no_more_layers_and_samples_than_it_can_tell_apart():
    rnn = nn.RNN(1, 1, num_layers=257)
    with pytest.raises(ValueError, match=r"256 layers.*257"):
        anpgpu.estimate_grad_(rnn, None, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    rnn = nn.RNN(1, 1)
    samples = (1 << 20) + 1
    inputs, targets = torch.zeros(1, samples, 1), torch.zeros(1, samples, 1)
    with pytest.raises(ValueError, match=rf"1048576.*{samples}"):
        anpgpu.estimate_grad_(rnn, None, inputs, targets, perturbation=Perturbation("np", rollouts=1))
    learns = anpgpu.RNN(1, 1, perturbation=Perturbation("np", rollouts=1))
    with pytest.raises(ValueError, match=rf"1048576.*{samples}"):
        learns(inputs)[0].sum().backward()


def test_a_diagnosis_prints_its_table():
    rnn, head = network("np", dtype=torch.float32)
    diagnosis = anpgpu.diagnose(
        rnn, head, torch.randn(T, B, I), torch.randn(T, B, O), rollouts=(4,), discounts=(1,), repeats=2, progress=False
    )
    assert diagnosis.table() in str(diagnosis)
    assert len(repr(diagnosis)) < 5000


def test_memory_that_an_update_left_can_be_released():
    rnn, head = network("anp", dtype=torch.float32)
    rnn.perturbation = Perturbation("anp", rollouts=64, backend="torch")
    anpgpu.estimate_grad_(rnn, head, torch.randn(50, B, I), torch.randn(50, B, O))
    assert anpgpu.functional.release_memory() > 0
    assert anpgpu.functional.release_memory() == 0


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/job/step\n", {"job/memory.max": "4096\n", "job/step/memory.max": "max\n"}, [4096]),
        ("0::/inside\n", {"memory.max": "8192\n"}, [8192]),
        (
            "5:cpu:/cpus\n4:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": "1024\n", "memory/memory.limit_in_bytes": "2048\n"},
            [1024, 2048],
        ),
        ("5:cpu:/cpus\n", {"cpus/memory.max": "1\n"}, []),
        (None, {"memory.max": "1\n"}, []),
    ],
)
def test_a_containers_limit_is_read(tmp_path, groups, files, limits):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    if groups is not None:
        own.write_text(groups)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert memory._cgroup_limits(root, own) == limits


def test_the_default_of_memory_is_a_share_of_the_smallest_limit(monkeypatch):
    whole = memory._host_memory.__wrapped__
    machine = whole()
    monkeypatch.setattr(memory, "_cgroup_limits", lambda *_: [1 << 30, 2 << 30])
    assert whole() == min(1 << 30, machine)
    monkeypatch.setattr(memory, "_host_memory", whole)
    assert memory.default_memory(torch.device("cpu")) == min(1 << 30, machine) // memory.DEFAULT_SHARE


def test_where_there_is_no_sysconf_memory_has_a_default(monkeypatch):
    # As on Windows.
    monkeypatch.delattr("os.sysconf")
    monkeypatch.delattr("os.sysconf_names")
    monkeypatch.setattr(memory, "_cgroup_limits", lambda *_: [])
    assert memory._host_memory.__wrapped__() == memory.UNKNOWN_MEMORY
