"""GRU and LSTM behind the other faces: diagnose, Decorrelation, the published rules, backends, autocast."""

import pytest
import torch
from test_gated import MODULES, B, H, I, O, T, as_hx, as_states, build, draw, loss_of, measured, states_of, with_head
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu import Decorrelation, Perturbation
from anpgpu.estimators import sweep
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import choose_backend, implementation
from anpgpu.runtime.settings import resolve


@pytest.mark.parametrize("cell", MODULES)
def test_diagnose_measures_gated_cells(cell):
    module, _, head = with_head(cell, Perturbation("np", rollouts=8))
    hx = as_hx(tuple(state.detach() for state in states_of(module)))
    diagnosis = anpgpu.diagnose(
        module, head, draw(T, B, I), draw(T, B, O, seed=9), hx=hx, methods=("np", "anp-ls"), rollouts=(2 * H,),
        discounts=(1,), sigmas=(1e-4,), repeats=2, progress=False,
    )  # fmt: skip
    cosines = {row.perturbation.method: row.total.cosine for row in diagnosis.rows}
    assert cosines["anp-ls"] > 0.99
    assert cosines["np"] < cosines["anp-ls"]
    assert diagnosis.recommendation.method == "anp-ls"


@pytest.mark.parametrize("cell", MODULES)
def test_decorrelation_stands_in_front_of_every_gate(cell):
    how = Perturbation("anp-ls", rollouts=2 * H, sigma=1e-5, ridge=1e-6)
    module, _, head = with_head(cell, how, num_layers=2)
    inputs, states = draw(T, B, I), states_of(module)
    hx = as_hx(tuple(state.detach() for state in states))
    with torch.no_grad():
        before = module(inputs, hx)[0]
    decorrelation = Decorrelation(module, head, inputs=True, rate=0.05)
    assert {tuple(matrix.shape) for matrix in decorrelation.matrices.values()} == {(I, I), (H, H)}
    with torch.no_grad():
        assert_close(module(inputs, hx)[0], before, "float64")
    for _ in range(3):
        decorrelation.update_(inputs, hx)
    with torch.no_grad():
        clean = nn.functional.linear(before, decorrelation.matrices["readout"])
    assert not torch.allclose(clean, before)
    found, truth = (
        measured(module, head, inputs.requires_grad_(), draw(T, B, O, seed=9), "mse", states, setting)[0]
        for setting in (how, Perturbation("bptt"))
    )
    for name in truth:
        assert float(nn.functional.cosine_similarity(found[name].flatten(), truth[name].flatten(), 0)) > 0.9999, name
    with torch.no_grad():
        outputs = module(inputs, hx)[0]
    decorrelation.fold_()
    with torch.no_grad():
        assert_close(module(inputs, hx)[0], outputs, "float64")


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("method", ["published-anp", "published-np", "published-wp"])
def test_the_published_rules_are_for_an_elman_cell(method, cell):
    module, _ = build(cell, bias=False)
    head = nn.Linear(H, O, bias=False, dtype=torch.float64)
    how = Perturbation(method, rollouts=1, noise="gaussian")
    with pytest.raises(ValueError, match=f"{method}.* is defined for noise in the pre-activations.*{cell}"):
        anpgpu.estimate_grad_(module, head, draw(T, B, I), draw(T, B, O), perturbation=how)


@pytest.mark.parametrize("cell", MODULES)
def test_auto_takes_a_backend_that_has_the_cell_and_others_are_refused(cell):
    forms = CELLS[cell].forms
    automatic = resolve(Perturbation(), CELLS[cell], torch.zeros(1)).backend
    assert automatic in forms.backends()
    on_gpu = torch.device("cuda"), torch.float32
    assert choose_backend("auto", *on_gpu, forms) == "triton"
    assert choose_backend("auto", *on_gpu, forms._replace(triton=None)) == "torch"
    assert choose_backend("auto", torch.device("cuda"), torch.float64, forms) == "torch"
    module = MODULES[cell][0](I, H)
    for backend in ("triton", "cupy"):
        module.perturbation = Perturbation(backend=backend)
        with pytest.raises((ValueError, ImportError), match=r"needs CUDA tensors"):
            module(torch.randn(T, B, I))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_gives_torchs_types_and_learns(cell, autocast, packed):
    torch.manual_seed(0)
    ours, torchs = MODULES[cell]
    module = ours(I, H, 2, bidirectional=True, perturbation=Perturbation("anp-ls", rollouts=8 * H, ridge=1e-3))
    twin = torchs(I, H, 2, bidirectional=True)
    twin.load_state_dict(module.state_dict())
    inputs = torch.randn(T, B, I)
    if packed:
        inputs = nn.utils.rnn.pack_padded_sequence(inputs, [T, 3, 7], enforce_sorted=False)
    grads, kinds = [], []
    for network in (module, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs, final = network(inputs)
        outputs = outputs.data if packed else outputs
        kinds.append([tensor.dtype for tensor in (outputs, *as_states(final))])
        loss_of(outputs.double(), [state.double() for state in as_states(final)]).backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert kinds[0] == kinds[1]
    assert float(nn.functional.cosine_similarity(*grads, dim=0)) > (0.99 if autocast else 0.999)


@pytest.mark.parametrize("cell", MODULES)
def test_dropout_between_layers_is_in_the_gradient(cell):
    how = Perturbation("anp-ls", rollouts=2 * H, sigma=1e-5, ridge=1e-6)
    module, twin = build(cell, how, num_layers=3, dropout=0.4)
    inputs, grads = draw(T, B, I), []
    for network in (module, twin):
        torch.manual_seed(7)
        outputs, final = network(inputs)
        grads.append(torch.autograd.grad(loss_of(outputs, as_states(final)), list(network.parameters())))
    for ours, torchs in zip(*grads, strict=True):
        assert float(nn.functional.cosine_similarity(ours.flatten(), torchs.flatten(), 0)) > 0.9999


@pytest.mark.parametrize("method", ["np", "anp-ls", "anp-feedback"])
@pytest.mark.parametrize("cell", MODULES)
def test_a_rollout_that_is_lost_is_left_out_and_a_gradient_that_is_not_finite_comes_back(cell, method):
    module, _ = build(cell, Perturbation(method, rollouts=2 * H), num_layers=2)
    outputs, _ = module(draw(T, B, I))
    loss = (outputs * torch.full_like(outputs, torch.inf)).sum()
    loss.backward()
    assert not any(bool(parameter.grad.isfinite().all()) for parameter in module.parameters())
    assert int(module.last_estimate.skipped) == 0


@pytest.mark.parametrize("cell", MODULES)
def test_training_by_rollouts_learns_a_delay(cell):
    torch.manual_seed(1)
    module = MODULES[cell][0](2, 16, perturbation=Perturbation("anp-ls", rollouts=16))
    head = nn.Linear(16, 1)
    optimiser = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=2e-2)
    losses = []
    for _ in range(150):
        inputs = torch.randn(10, 16, 2)
        targets = inputs[..., :1].roll(2, 0)
        targets[:2] = 0
        optimiser.zero_grad()
        losses.append(float(anpgpu.estimate_grad_(module, head, inputs, targets).loss))
        optimiser.step()
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5]), (losses[0], losses[-1])


@pytest.mark.parametrize("method", ["anp", "anp-ls", "anp-feedback"])
@pytest.mark.parametrize("cell", MODULES)
def test_deviations_that_are_stored_as_bfloat16(cell, method, monkeypatch):
    """As a GPU stores those of h and c with 16-bit operands; everything that reads them takes that type."""

    def build_with(backend):
        def chosen(op, name):
            run = implementation(op, name)
            if op != "rollout" or not narrow:
                return run

            def narrowed(*arguments, **named):
                moved = run(*arguments, **named)
                return moved._replace(delta_a=moved.delta_a.bfloat16())

            return narrowed

        monkeypatch.setattr(sweep, "implementation", chosen)
        torch.manual_seed(3)
        narrow = backend == "narrow"
        module = MODULES[cell][0](I, H, perturbation=Perturbation(method, rollouts=4 * H, backend="torch"))
        inputs, states = torch.randn(T, B, I), tuple(torch.randn(1, B, H) for _ in range(CELLS[cell].forms.states))
        torch.manual_seed(5)
        outputs, final = module(inputs, as_hx(states))
        loss_of(outputs, as_states(final), last_only=True).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    found, expected = build_with("narrow"), build_with("plain")
    for name, reference in expected.items():
        assert not torch.equal(found[name], reference)
        assert_close(found[name], reference, "bfloat16")
