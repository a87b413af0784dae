"""The ops under torch.library, torch.compile and torch.export, compared with eager passes from the same seed."""

import copy
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from stepping import (
    FEATURES,
    HOW,
    WARNINGS,
    B,
    H,
    Model,
    P,
    T,
    assert_all_close,
    compiled,
    inputs_of,
    make_rnn,
    randn,
    same,
    step,
)
from tolerances import assert_close
from torch import nn
from torch.library import opcheck
from torch.nn.utils.parametrizations import orthogonal

import anpgpu
from anpgpu import Perturbation, functional
from anpgpu.functional import Counters, CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.ops import tensors
from anpgpu.ops.network import FIELDS, new_seed
from anpgpu.ops.tensors import loss_arguments
from anpgpu.registry import CELLS
from anpgpu.runtime.settings import new_seed as drawn_seed

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]

OPS = torch.ops.anpgpu


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(11)


def rollout_arguments(loss, *, delta_h0=None, store=True, noise="rademacher"):
    name, tensors = loss_arguments(loss)
    hidden = torch.tanh(randn(T, B, H))
    scalars = (name, P, 1e-3, noise, "tanh", "fp32", store, list(Counters()), "auto")
    return (torch.atanh(hidden), hidden, randn(H, H), torch.tensor(3), delta_h0, *tensors, *scalars)


def probabilities():
    return randn(T, B, 3).softmax(-1)


def rnn_arguments(
    layers=1, directions=1, *, cell="tanh", autocast=None, dropout=False, lengths=None, batch_first=False
):
    module = {"gru": anpgpu.GRU, "lstm": anpgpu.LSTM}.get(cell, anpgpu.RNN)
    rnn = module(FEATURES, H, layers, bidirectional=directions == 2)
    size = H * CELLS[cell].forms.states
    inputs = randn(B, T, FEATURES).transpose(0, 1) if batch_first else randn(T, B, FEATURES)
    kind = torch.float32 if autocast is None else autocast
    masks = [randn(T, B, directions * H).to(kind) for _ in range(layers - 1)] if dropout else []
    weights = [weight.detach() for weight in rnn.parameters()]
    return (inputs, randn(layers * directions, B, size), weights, masks, lengths, cell, True, directions, autocast)


def backward_arguments(method="anp", lowest=0, kept=0, **options):
    inputs, hx, weights, masks, lengths, *structure = rnn_arguments(**options)
    outputs, h_n, states = OPS.rnn(inputs, hx, weights, masks, lengths, *structure)
    # With the halves: opcheck compares outputs, and NaN equals nothing.
    perturbation = Perturbation(method, rollouts=P, split_half=True)
    scalars = [getattr(perturbation, name) for name in FIELDS]
    saved = (torch.tensor(3), inputs, lengths, weights, states, masks)
    return (randn(*outputs.shape), randn(*h_n.shape), *saved, lowest, kept, *structure, *scalars)


SAMPLES = {
    "noise": [
        lambda: (torch.tensor(3), [T, B, P, H], 1e-3, "rademacher", list(Counters()), torch.float32, "auto"),
        lambda: (torch.tensor(3), [T, B, P, 33], 1e-3, "gaussian", list(Counters()), torch.float64, "auto"),
    ],
    "rollout": [
        lambda: rollout_arguments(LinearLoss(randn(T, B, H))),
        lambda: rollout_arguments(None, delta_h0=randn(B, P, H), store=False),
        lambda: rollout_arguments(SquaredLoss(randn(3, H), randn(T, B, 3), torch.ones(T, B)), noise="gaussian"),
        lambda: rollout_arguments(
            CrossEntropyLoss(randn(3, H), probabilities(), torch.zeros(T, B).long(), torch.ones(T, B))
        ),
        lambda: rollout_arguments(OutputsOnly(randn(3, H)), store=False),
        lambda: rollout_arguments(OutputsOnly(None)),
    ],
    "returns": [
        lambda: (randn(T, B, P), None, 0.5, "auto"),
        lambda: (randn(T, B, P), randn(B, P), 0.0, "auto"),
    ],
    "adjoint": [
        lambda: (randn(T, B, P), randn(T, B, P, H), torch.tensor(3), "activity", H, 1e-3, "rademacher", "fp32",
                 list(Counters()), "auto"),
        lambda: (randn(T, B, P), None, torch.tensor(3), "noise", H, 1e-3, "gaussian", "fp32", list(Counters()), "auto"),
    ],
    "least_squares": [
        lambda: (randn(T, B, P), randn(T, B, P, H), randn(B, P), torch.tensor(3), 0.9, 0.1, False, 1e-3, "rademacher",
                 list(Counters()), "auto"),
        lambda: (randn(T, B, P), randn(T, B, P, H), randn(B, P), torch.tensor(3), 1.0, 0.0, True, 0.5, "gaussian",
                 list(Counters()), "torch"),
    ],
    "rnn": [
        rnn_arguments,
        lambda: rnn_arguments(3, 2, dropout=True),
        lambda: rnn_arguments(2, autocast=torch.bfloat16, batch_first=True),
        lambda: rnn_arguments(2, 2, lengths=torch.tensor([5, 2, 3])),
        lambda: rnn_arguments(2, 2, cell="gru", dropout=True),
        lambda: rnn_arguments(2, cell="gru", autocast=torch.bfloat16),
        lambda: rnn_arguments(2, 2, cell="lstm", lengths=torch.tensor([5, 2, 3])),
        lambda: rnn_arguments(2, cell="lstm", autocast=torch.bfloat16),
        lambda: rnn_arguments(2, cell="lstm", autocast=torch.bfloat16, lengths=torch.tensor([5, 2, 3])),
    ],
    "rnn_backward": [
        backward_arguments,
        lambda: backward_arguments("np", lowest=1, layers=3, directions=2, dropout=True),
        lambda: backward_arguments("anp-ls", layers=2, autocast=torch.bfloat16, batch_first=True),
        lambda: backward_arguments("wp", layers=2, directions=2, lengths=torch.tensor([5, 2, 3])),
        lambda: backward_arguments("anp-ls", layers=2, directions=2, cell="gru", lengths=torch.tensor([5, 2, 3])),
        lambda: backward_arguments("np", lowest=1, layers=2, cell="gru", autocast=torch.bfloat16),
        lambda: backward_arguments("anp-ls", layers=2, cell="lstm"),
        lambda: backward_arguments("wp", layers=2, directions=2, cell="lstm", lengths=torch.tensor([5, 2, 3])),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "number"), [(op, number) for op, samples in SAMPLES.items() for number in range(len(samples))]
)
def test_opcheck(op, number):
    opcheck(getattr(OPS, op).default, SAMPLES[op][number]())


def test_every_op_is_checked():
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "anpgpu" in name
    }
    assert registered == set(SAMPLES)


def test_the_seed_is_the_one_that_estimate_grad_would_draw():
    for start in range(20):
        torch.manual_seed(start)
        seed, state = new_seed(torch.device("cpu")), torch.get_rng_state()
        torch.manual_seed(start)
        assert torch.equal(seed, drawn_seed(torch.device("cpu")))
        assert torch.equal(state, torch.get_rng_state())


VARIANTS = {
    "anp": {},
    "np, dropout, two layers, bidirectional": {
        "perturbation": Perturbation("np", rollouts=4),
        "num_layers": 2,
        "bidirectional": True,
        "dropout": 0.3,
    },
    "anp-ls, relu": {"perturbation": Perturbation("anp-ls", rollouts=4), "nonlinearity": "relu"},
    "wp": {"perturbation": Perturbation("wp", rollouts=4)},
    "bptt": {"perturbation": Perturbation("bptt")},
}


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        ("anp", "eager"),
        ("np, dropout, two layers, bidirectional", "aot_eager"),
        ("bptt", "aot_eager"),
        *(pytest.param(variant, "aot_eager", marks=pytest.mark.slow) for variant in ("anp", "anp-ls, relu", "wp")),
    ],
)
def test_compiled_is_eager(variant, backend):
    model, inputs = Model(**VARIANTS[variant]), inputs_of()
    if variant == "wp":
        model = model.rnn
    expected = step(model, inputs)
    results = step(model, inputs, compiled(model, backend))
    # AOTAutograd writes the linear layers' products in another form.
    assert_all_close(results, expected, "exact" if backend == "eager" else "float32")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["anp", "np, dropout, two layers, bidirectional"])
def test_compiled_by_inductor_is_eager(variant):
    model, inputs = Model(**VARIANTS[variant]), inputs_of()
    expected = step(model, inputs)
    with torch._inductor.config.patch(fallback_random=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = compiled(model, "inductor")
        assert_all_close(step(model, inputs, run), expected, "float32_long")
        with torch.no_grad():
            model.eval()
            assert_close(run(inputs), model(inputs), "float32")
    # Inductor's generator draws other numbers, but repeats them from the same seed.
    torch._dynamo.reset()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = compiled(model, "inductor")
        first, again, other = step(model, inputs, run), step(model, inputs, run), step(model, inputs, run, seed=8)
    assert same(first, again)
    assert not same(first, other)


def test_compiled_takes_other_shapes():
    model = Model(num_layers=2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(model, counter)
    for time, batch in ((5, 3), (9, 2), (3, 7), (4, 6), (17, 5)):
        inputs = inputs_of(time, batch)
        assert_all_close(step(model, inputs, run), step(model, inputs), "float32")
    assert counter.frame_count <= 2, "one graph for the first shape, one for all others"


def test_compiled_follows_a_replaced_perturbation():
    rnn = make_rnn()
    run = compiled(rnn, "aot_eager")
    for how in (
        HOW,
        Perturbation("anp", rollouts=6, sigma=1e-2),
        Perturbation("np", rollouts=7, sigma=1e-1, rank=None),
    ):
        rnn.perturbation = how
        assert_all_close(step(rnn, inputs_of(), run), step(rnn, inputs_of()), "exact")


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_does_not_grow_with_the_sequence(training):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "anpgpu" in str(node.target)])
        return graph.forward

    model = Model()
    with torch.set_grad_enabled(training):
        torch.compile(model, fullgraph=True, backend=backend, dynamic=False)(inputs_of(200))
    targets = [target for target in graphs[0] if target.startswith("anpgpu.")]
    assert training or targets == ["anpgpu.rnn"]
    assert len(graphs) == 1


def test_two_compiled_rnns_have_two_seeds():
    # If the compiler merged the two draws, the two networks would have equal gradients.
    first = make_rnn()
    pair = nn.ModuleList([first, copy.deepcopy(first)])

    def run(inputs):
        return pair[0](inputs)[0] + pair[1](inputs)[0]

    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        results = step(pair, inputs_of(), call)
        half = len(results) // 2
        assert not any(torch.equal(results[1 + index], results[1 + half + index]) for index in range(half))


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_compiled_draws_one_number_and_none_without_gradients(backend):
    rnn, inputs = make_rnn(), inputs_of()
    run = compiled(rnn, backend)
    run(inputs)
    state = torch.get_rng_state()
    new_seed(torch.device("cpu"))
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    outputs, _ = run(inputs)
    outputs.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)
    with torch.no_grad():
        assert_close(run(inputs)[0], outputs, "float32")
    assert torch.equal(torch.get_rng_state(), expected)


def test_compiled_leaves_last_estimate_alone():
    rnn = make_rnn()
    step(rnn, inputs_of(), compiled(rnn, "aot_eager"))
    assert rnn.last_estimate is None
    step(rnn, inputs_of())
    assert rnn.last_estimate is not None


@pytest.mark.parametrize("where", ["outside", pytest.param("inside", marks=pytest.mark.slow)])
def test_compiled_under_autocast(where):
    rnn, inputs = make_rnn(num_layers=2), inputs_of()

    def under(run):
        def call(values):
            with torch.autocast("cpu", torch.bfloat16):
                return run(values)[0]

        return call

    expected = step(rnn, inputs, under(rnn))
    run = under(compiled(rnn, "aot_eager")) if where == "outside" else compiled(under(rnn), "aot_eager")
    assert run(inputs).dtype == torch.bfloat16
    assert_all_close(step(rnn, inputs, run), expected, "exact")


def swapped():
    model = nn.Sequential(nn.RNN(FEATURES, H))
    anpgpu.swap_(model, HOW)
    return model


@pytest.mark.parametrize("make", [make_rnn, swapped, lambda: pickle.loads(pickle.dumps(make_rnn()))])
def test_whoever_has_an_rnn_can_compile_it(make):
    with torch._dynamo.config.patch(allow_rnn=False):
        model = nn.Sequential(make())
        assert_all_close(step(model, inputs_of(), compiled(model)), step(model, inputs_of()), "exact")


@pytest.mark.slow
def test_compiled_with_a_parametrized_weight():
    rnn = orthogonal(make_rnn(), "weight_hh_l0")
    expected = step(rnn, inputs_of())
    assert_all_close(step(rnn, inputs_of(), compiled(rnn, "aot_eager")), expected, "float32_long")


@pytest.mark.slow
def test_a_packed_sequence_breaks_the_graph_and_is_right():
    rnn = make_rnn()
    packed = nn.utils.rnn.pack_padded_sequence(inputs_of(), [5, 3, 2])
    expected = step(rnn, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_all_close(step(rnn, packed, torch.compile(rnn, backend="aot_eager")), expected, "exact")


def test_kernels_run_outside_the_callers_autocast(monkeypatch):
    # Some backends' products would follow it.
    seen, implementation = [], tensors.implementation

    def watched(op, backend):
        def run(*arguments, **named):
            seen.append((op, torch.is_autocast_enabled("cpu")))
            return implementation(op, backend)(*arguments, **named)

        return run

    monkeypatch.setattr(tensors, "implementation", watched)
    preact, weight_hh = randn(T, B, H), randn(H, H)
    with torch.autocast("cpu", torch.bfloat16):
        moved = functional.rollout(preact, preact.tanh(), weight_hh, LinearLoss(preact), 7, rollouts=P, sigma=1e-3)
        functional.adjoint(moved.delta_loss, moved.delta_a, 7, sigma=1e-3)
    assert seen == [("rollout", False), ("adjoint", False)]


def test_compiled_functional():
    targets = torch.zeros(T, B, dtype=torch.int64)
    loss = CrossEntropyLoss(None, randn(T, B, H).softmax(-1), targets, torch.ones(T, B))
    hidden, weight = torch.tanh(randn(T, B, H)), randn(H, H) / H

    def credit(hidden, seed):
        perturbed = functional.rollout(torch.atanh(hidden), hidden, weight, loss, seed, rollouts=P)
        returns = functional.returns(perturbed.delta_loss, 0.9)
        return functional.adjoint(returns, perturbed.delta_a, seed) + functional.noise(seed, (T, B, 1, H)).squeeze(2)

    run = torch.compile(credit, fullgraph=True, backend="aot_eager")
    assert_close(run(hidden, torch.tensor(3)), credit(hidden, torch.tensor(3)), "exact")
    assert not torch.equal(run(hidden, torch.tensor(4)), credit(hidden, torch.tensor(3)))


@pytest.mark.parametrize(
    ("strict", "gradients"),
    [(False, True), *(pytest.param(strict, strict, marks=pytest.mark.slow) for strict in (False, True))],
)
def test_export_is_the_clean_run_in_torchs_own_ops(strict, gradients):
    model, inputs = Model(num_layers=2).eval(), inputs_of()
    dynamic = ({1: torch.export.Dim("batch", min=1, max=64)},)
    state = torch.get_rng_state()
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (inputs,), strict=strict, dynamic_shapes=dynamic)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("anpgpu" in str(node.target) or "rand" in str(node.target) for node in exported.graph.nodes)
    for batch in (B, 7):
        with torch.no_grad():
            assert_close(exported.module()(inputs_of(batch=batch)), model(inputs_of(batch=batch)), "float32")


def test_export_is_for_one_length():
    # torch's own RNN op is traced step by step.
    dynamic = ({0: torch.export.Dim("time", min=2, max=64)},)
    with pytest.raises(Exception, match="specialized it to be a constant"):
        torch.export.export(Model().eval(), (inputs_of(),), dynamic_shapes=dynamic)
