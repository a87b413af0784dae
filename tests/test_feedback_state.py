"""The state of learned feedback: where it lives, what moves and restarts it, and how a training resumes with it."""

import copy
import io
import pickle

import pytest
import torch
from stepping import WARNINGS
from tolerances import assert_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

T, B, I, H, O = 8, 4, 3, 6, 2  # noqa: E741  (the design's names)
HOW = Perturbation("anp-feedback", rollouts=4, warmup=3)


every_cell = pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])


def network(how=HOW, *, seed=0, cell="RNN", **options):
    torch.manual_seed(seed)
    return getattr(anpgpu, cell)(I, H, perturbation=how, **options)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def update(rnn, *, seed=1, loss=None):
    """One backward pass with given noise; returns the gradient of W_hh."""
    rnn.zero_grad()
    torch.manual_seed(seed)
    outputs, final = rnn(draw(T, B, I, seed=seed, dtype=rnn.weight_hh_l0.dtype))
    h_n = final[0] if isinstance(final, tuple) else final
    (outputs.square().sum() + h_n.sum() if loss is None else loss(outputs)).backward()
    return rnn.weight_hh_l0.grad.clone()


def matrix(model, name="", label="weight_hh_l0"):
    return anpgpu.estimator_state(model)[name][f"{label}.feedback"]


# Where it lives.


@every_cell
def test_the_module_is_still_torchs_own(cell):
    rnn, plain = network(cell=cell), getattr(nn, cell)(I, H)
    update(rnn)
    assert list(rnn.state_dict()) == list(plain.state_dict())
    assert not list(rnn.named_buffers())
    assert len(list(rnn.parameters())) == 4
    plain.load_state_dict(rnn.state_dict(), strict=True)
    rnn.load_state_dict(plain.state_dict(), strict=True)


def test_nothing_is_kept_before_the_first_update_and_by_other_methods():
    rnn = network()
    assert anpgpu.estimator_state(rnn) == {}
    other = network(Perturbation("anp-ls", rollouts=4))
    update(other)
    assert anpgpu.estimator_state(other) == {}
    with torch.no_grad():
        rnn(draw(T, B, I))
    assert anpgpu.estimator_state(rnn) == {}


def test_every_layer_and_direction_has_a_matrix_of_its_own():
    rnn = network(num_layers=2, bidirectional=True)
    update(rnn)
    state = anpgpu.estimator_state(rnn)[""]
    labels = [f"weight_hh_l{layer}{side}" for layer in (0, 1) for side in ("", "_reverse")]
    assert set(state) == {
        "updates",
        *(f"{label}.{field}" for label in labels for field in ("feedback", "gram", "weight")),
    }
    assert state["updates"] == 1
    norms = [float(state[f"{label}.feedback"].norm()) for label in labels]
    assert len(set(norms)) == 4
    assert min(norms) > 0
    for label in labels:
        assert torch.equal(state[f"{label}.weight"], getattr(rnn, label))


def copies(rnn):
    yield copy.deepcopy(rnn)
    yield pickle.loads(pickle.dumps(rnn))
    stream = io.BytesIO()
    torch.save(rnn, stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)


@every_cell
def test_copies_of_a_module_carry_it_and_go_on_by_themselves(cell):
    rnn = network(cell=cell)
    update(rnn)
    before = matrix(rnn)
    for other in copies(rnn):
        assert torch.equal(matrix(other), before)
        expected = update(copy.deepcopy(rnn), seed=2)
        assert torch.equal(update(other, seed=2), expected)
        assert not torch.equal(matrix(other), before)
        assert torch.equal(matrix(rnn), before)


@every_cell
def test_it_has_the_working_type(cell):
    rnn = network(cell=cell).double()
    update(rnn)
    assert matrix(rnn).dtype == torch.float64
    rnn.float()
    assert matrix(rnn).dtype == torch.float32
    rnn.half()
    assert matrix(rnn).dtype == torch.float32


@every_cell
def test_a_state_that_moves_with_its_module_teaches_what_it_would_have_taught(cell):
    rnn = network(cell=cell)
    update(rnn)
    expected = update(copy.deepcopy(rnn), seed=2)
    moved = copy.deepcopy(rnn).double().float()
    assert_close(update(moved, seed=2), expected, "float32_long")


# What moves it.


def test_a_module_that_runs_without_gradients_learns_nothing():
    rnn = network()
    update(rnn)
    before = matrix(rnn)
    with torch.no_grad():
        rnn(draw(T, B, I))
    rnn(draw(T, B, I))
    assert torch.equal(matrix(rnn), before)


@every_cell
def test_the_matrix_makes_the_weights_own_steps(cell):
    rnn = network(cell=cell)
    update(rnn)
    before, step = matrix(rnn), 0.1 * draw(*rnn.weight_hh_l0.shape)
    weight = rnn.weight_hh_l0.detach().clone()
    with torch.no_grad():
        rnn.weight_hh_l0 += step
    moved = rnn.weight_hh_l0.detach() - weight
    assert_close(matrix(rnn) - before, moved, "float32_long")
    # The update after the step starts from there: with nothing to learn from it stays there.
    update(rnn, loss=lambda outputs: 0 * outputs.sum())
    assert_close(matrix(rnn) - before, moved, "float32_long")
    still = network(Perturbation("anp-feedback", rollouts=4, warmup=3, follow_weights=False), cell=cell)
    update(still)
    before = matrix(still)
    with torch.no_grad():
        still.weight_hh_l0 += step
    assert torch.equal(matrix(still), before)
    update(still, loss=lambda outputs: 0 * outputs.sum())
    assert torch.equal(matrix(still), before)


@every_cell
def test_weights_that_are_swapped_out_and_back_leave_it_exact(cell):
    rnn = network(cell=cell)
    update(rnn)
    with torch.no_grad():
        rnn.weight_hh_l0 += 0.1 * draw(*rnn.weight_hh_l0.shape)
    expected = update(copy.deepcopy(rnn), seed=2)
    trained = copy.deepcopy(rnn.state_dict())
    # Averaged weights are looked at, through load_state_dict and in place.
    rnn.load_state_dict({name: 0.5 * value for name, value in trained.items()})
    with torch.no_grad():
        rnn(draw(T, B, I))
    rnn.load_state_dict(trained)
    assert_close(update(rnn, seed=2), expected, "float32_long")


@every_cell
def test_weights_that_are_loaded_are_no_step(cell):
    rnn, other = network(cell=cell), network(seed=5, cell=cell)
    update(rnn)
    rnn.load_state_dict(other.state_dict())
    expected = update(other, seed=2)
    # It starts again, warm-up included.
    assert torch.equal(update(rnn, seed=2), expected)
    assert torch.equal(matrix(rnn), matrix(other))
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 1


def test_loading_the_weights_that_are_there_changes_nothing():
    rnn = network()
    update(rnn)
    expected = update(copy.deepcopy(rnn), seed=2)
    rnn.load_state_dict(rnn.state_dict())
    assert torch.equal(update(rnn, seed=2), expected)


def test_loading_weights_into_a_plain_rnn_is_no_step_either():
    rnn, readout = nn.RNN(I, H), nn.Linear(H, O)
    inputs, targets = draw(T, B, I), draw(T, B, O)
    anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=HOW)
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 1
    rnn.load_state_dict(nn.RNN(I, H).state_dict())
    anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=HOW)
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 1
    anpgpu.estimate_grad_(rnn, readout, inputs, targets, perturbation=HOW)
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 2


def test_a_retained_graph_and_a_module_called_twice_move_it_twice():
    rnn = network()
    update(rnn)
    inputs = draw(T, B, I)
    outputs, _ = rnn(inputs)
    first = matrix(rnn)
    outputs.square().sum().backward(retain_graph=True)
    second = matrix(rnn)
    outputs.square().sum().backward()
    third = matrix(rnn)
    (rnn(inputs)[0].square().sum() + rnn(2 * inputs)[0].square().sum()).backward()
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 5
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@every_cell
def test_gradients_that_accumulate_are_updates_each(cell):
    rnn = network(cell=cell)
    update(rnn)
    rnn.zero_grad()
    torch.manual_seed(3)
    both, other = 0, copy.deepcopy(rnn)
    for number in (1, 2):
        other.zero_grad()
        state = torch.get_rng_state()
        other(draw(T, B, I, seed=number))[0].square().sum().backward()
        both = both + other.weight_hh_l0.grad
        torch.set_rng_state(state)
        rnn(draw(T, B, I, seed=number))[0].square().sum().backward()
    assert_close(rnn.weight_hh_l0.grad, both, "float32_long")


@every_cell
def test_an_overflow_that_the_scaler_provokes_leaves_it_as_it_was(cell):
    rnn = network(cell=cell)
    update(rnn)
    before = matrix(rnn)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimiser = torch.optim.SGD(rnn.parameters(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rnn(draw(T, B, I))[0].float().square().sum() * 4
    scaler.scale(loss).backward()
    assert not torch.isfinite(rnn.weight_hh_l0.grad).all()
    weight = rnn.weight_hh_l0.detach().clone()
    scaler.step(optimiser)
    scaler.update()
    assert torch.equal(rnn.weight_hh_l0, weight)
    assert torch.equal(matrix(rnn), before)
    assert torch.isfinite(update(rnn)).all()
    assert not torch.equal(matrix(rnn), before)


@every_cell
def test_one_step_of_time_and_an_empty_batch_leave_it_as_it_was(cell):
    rnn = network(cell=cell)
    update(rnn)
    before = matrix(rnn)
    rnn(draw(1, B, I))[0].sum().backward()
    rnn(draw(T, 0, I))[0].sum().backward()
    packed = pack_padded_sequence(draw(2, 2, I), [1, 1])
    rnn(packed)[0].data.sum().backward()
    assert torch.equal(matrix(rnn), before)


def test_a_batch_whose_rollouts_are_all_lost_leaves_it_as_it_was():
    rnn, readout = network(), nn.Linear(H, O)
    inputs, targets = draw(T, B, I), draw(T, B, O)
    anpgpu.estimate_grad_(rnn, readout, inputs, targets)
    before = anpgpu.estimator_state(rnn)
    with pytest.raises(RuntimeError, match="every rollout of sample"):
        anpgpu.estimate_grad_(rnn, readout, inputs.fill_(torch.nan), targets)
    after = anpgpu.estimator_state(rnn)
    assert after[""].pop("updates") == before[""].pop("updates") == 1
    assert all(torch.equal(value, before[""][name]) for name, value in after[""].items())


# The compiler.


@every_cell
def test_a_compiled_module_learns_its_matrix(cell):
    rnn, compiled = network(cell=cell), network(cell=cell)
    run = torch.compile(lambda inputs: compiled(inputs)[0], fullgraph=True, backend="aot_eager")
    for number in range(3):
        expected = update(rnn, seed=number)
        compiled.zero_grad()
        torch.manual_seed(number)
        outputs = run(draw(T, B, I, seed=number))
        (outputs.square().sum() + outputs[-1].sum()).backward()
        assert_close(compiled.weight_hh_l0.grad, expected, "float32_long")
        assert_close(matrix(compiled), matrix(rnn), "float32_long")
    assert anpgpu.estimator_state(compiled)[""]["updates"] == 3


@every_cell
def test_activation_checkpointing_moves_it_once(cell):
    rnn, plain = network(cell=cell), network(cell=cell)
    for number in range(2):
        expected = update(plain, seed=number)
        rnn.zero_grad()
        torch.manual_seed(number)
        inputs = draw(T, B, I, seed=number)
        outputs = torch.utils.checkpoint.checkpoint(lambda values: rnn(values)[0], inputs, use_reentrant=False)
        (outputs.square().sum() + outputs[-1].sum()).backward()
        assert_close(rnn.weight_hh_l0.grad, expected, "float32_long")
    assert anpgpu.estimator_state(rnn)[""]["updates"] == 2
    assert_close(matrix(rnn), matrix(plain), "float32_long")


# Resume.


class Model(nn.Module):
    def __init__(self, how=HOW, units=H, kind=anpgpu.RNN):
        super().__init__()
        self.rnn, self.top = kind(I, units, 2, perturbation=how), kind(units, units, perturbation=how)
        self.head = nn.Linear(units, O)

    def forward(self, inputs):
        return self.head(self.top(self.rnn(inputs)[0])[0])


def train(model, optimiser, numbers):
    for number in numbers:
        torch.manual_seed(number)
        optimiser.zero_grad()
        (model(draw(T, B, I, seed=number)) - 1).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("state_first", [False, True])
@every_cell
def test_a_training_resumes_bitwise(state_first, cell):
    torch.manual_seed(0)
    model = Model(kind=getattr(anpgpu, cell))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimiser, range(3))
    stream = io.BytesIO()
    saved = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "state": anpgpu.estimator_state(model)}
    torch.save(saved, stream)
    train(model, optimiser, range(3, 6))
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    other = Model(kind=getattr(anpgpu, cell))
    if state_first:
        anpgpu.load_estimator_state_(other, loaded["state"])
    other.load_state_dict(loaded["model"])
    if not state_first:
        anpgpu.load_estimator_state_(other, loaded["state"])
    again = torch.optim.Adam(other.parameters(), 1e-2)
    again.load_state_dict(loaded["optimiser"])
    train(other, again, range(3, 6))
    for (name, value), expected in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    first, second = anpgpu.estimator_state(other), anpgpu.estimator_state(model)
    assert set(first) == {"rnn", "top"}
    for name, tensors in first.items():
        assert tensors["updates"] == second[name]["updates"] == 6
        assert all(torch.equal(tensors[key], second[name][key]) for key in tensors if key != "updates")


def test_without_its_state_a_training_goes_on_otherwise():
    torch.manual_seed(0)
    model, other = Model(), Model()
    train(model, torch.optim.SGD(model.parameters(), 1e-2), range(3))
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        train(one, torch.optim.SGD(one.parameters(), 1e-2), range(3, 4))
    assert not torch.equal(model.rnn.weight_hh_l0, other.rnn.weight_hh_l0)


def test_saving_changes_nothing_and_what_is_saved_is_a_copy():
    rnn = network()
    update(rnn)
    with torch.no_grad():
        rnn.weight_hh_l0 += 0.1
    expected = update(copy.deepcopy(rnn), seed=2)
    state = anpgpu.estimator_state(rnn)
    for value in state[""].values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(update(rnn, seed=2), expected)


@every_cell
def test_what_is_loaded_is_a_copy_too(cell):
    rnn = network(cell=cell)
    update(rnn)
    saved, other = anpgpu.estimator_state(rnn), network(cell=cell)
    before = copy.deepcopy(saved)
    anpgpu.load_estimator_state_(other, saved)
    update(other, seed=2)
    assert all(torch.equal(saved[""][key], before[""][key]) for key in saved[""] if key != "updates")


def broken_states():
    good = network()
    update(good)
    state = anpgpu.estimator_state(good)
    wide, double = network(), network().double()
    wide = anpgpu.RNN(I, H + 1, perturbation=HOW)
    update(wide)
    update(double)
    missing = {"": {key: value for key, value in state[""].items() if not key.endswith("gram")}}
    two = anpgpu.RNN(I, H, 2, perturbation=HOW)
    update(two)
    return {
        "another module": ({"encoder": state[""]}, ValueError, "'encoder'.*''"),
        "other shapes": (anpgpu.estimator_state(wide), ValueError, r"\(7, 7\) float32.*\(6, 6\) float32"),
        "other dtype": (anpgpu.estimator_state(double), ValueError, r"\(6, 6\) float64.*\(6, 6\) float32"),
        "more layers": (anpgpu.estimator_state(two), ValueError, "weight_hh_l1"),
        "a tensor is missing": (missing, ValueError, r"'weight_hh_l0.gram'"),
        "no dict": ([1], TypeError, "list"),
        "no dict of tensors": ({"": 3}, TypeError, "int"),
        "updates": ({"": state[""] | {"updates": -1}}, ValueError, "-1"),
    }


@pytest.mark.parametrize("name", broken_states())
def test_a_state_of_something_else_is_refused_and_nothing_is_lost(name):
    state, error, told = broken_states()[name]
    rnn = network()
    update(rnn)
    before = matrix(rnn)
    with pytest.raises(error, match=told):
        anpgpu.load_estimator_state_(rnn, state)
    assert torch.equal(matrix(rnn), before)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        anpgpu.estimator_state(3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        anpgpu.load_estimator_state_(3, {})


def test_a_network_that_changed_its_size_is_told():
    rnn = network()
    update(rnn)
    other = network(num_layers=2)
    vars(other)["_estimator_state"] = vars(rnn)["_estimator_state"]
    with pytest.raises(ValueError, match=r"\[\(6, 6\)\].*\[\(6, 6\), \(6, 6\)\]"):
        update(other)


def test_of_many_gates_the_state_has_no_gram_matrix_and_resumes():
    how = Perturbation("anp-feedback", rollouts=2, warmup=1)
    rnn, other = (anpgpu.GRU(I, 171, perturbation=how) for _ in range(2))
    update(rnn)
    state = anpgpu.estimator_state(rnn)
    assert state[""]["weight_hh_l0.gram"].shape == (0, 0)
    other.load_state_dict(rnn.state_dict())
    anpgpu.load_estimator_state_(other, state)
    assert torch.equal(update(other, seed=2), update(rnn, seed=2))
    assert torch.equal(matrix(other), matrix(rnn))
