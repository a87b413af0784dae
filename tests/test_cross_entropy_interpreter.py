"""Cross-entropy at clean outputs in Triton, in its interpreter: against torch and autograd in float64."""

import pytest
import torch
from cross_entropy_cases import FORMS, SHAPES, Case
from tolerances import assert_close
from torch import nn

import anpgpu
from anpgpu.kernels import cross_entropy as reference, tiles
from anpgpu.runtime import memory

cross_entropy_triton = pytest.importorskip("anpgpu.kernels.cross_entropy_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid|divide by zero):RuntimeWarning")
"""The interpreter computes with numpy, which warns of what a GPU does silently."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def seen(case, **changes):
    """Return what the kernel makes of a case, and what the reference does in float64."""
    arguments = case.arguments(torch.float32)
    smoothing = arguments["smoothing"]
    exact = arguments | {
        "outputs": arguments["outputs"].double(),
        "smoothing": None if smoothing is None else reference.Smoothing(*(share.double() for share in smoothing)),
    }
    return (
        cross_entropy_triton.clean_cross_entropy(**arguments, **changes),
        reference.clean_cross_entropy(**exact, **changes),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_references(form, shape):
    found, expected = seen(Case(form, shape))
    for name in ("losses", "probs", "gradient", "weight"):
        assert_close(getattr(found, name), getattr(expected, name), "float32")
    assert torch.equal(found.target, expected.target)


@pytest.mark.parametrize("form", ["plain", "everything", "one of a sequence"])
def test_it_is_torchs_loss_and_autograds_gradient(form):
    case = Case(form, (5, 7, 33))
    found, _ = seen(case)
    value, gradient = case.by_autograd()
    assert_close(found.losses.sum(), value, "float32")
    assert_close(found.gradient, gradient, "float32")


def test_without_a_gradient_the_rest_is_there():
    found, expected = seen(Case("everything", (3, 2, 5)), gradient=False)
    assert found.gradient is None
    assert_close(found.losses, expected.losses, "float32")
    assert_close(found.probs, expected.probs, "float32")


@NOT_FINITE
def test_steps_without_a_loss_may_hold_anything():
    case = Case("ignored", (6, 4, 5))
    lost = case.weight == 0
    assert lost.any()
    case.outputs[lost] = torch.nan
    found, _ = seen(case)
    assert not found.losses[lost].any()
    assert not found.gradient[lost].any()
    assert found.losses.isfinite().all()


@NOT_FINITE
@pytest.mark.parametrize("hole", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_as_in_torch(hole):
    case = Case("plain", (3, 2, 5))
    case.outputs[1, 0, 2] = hole
    found, expected = seen(case)
    for name in ("losses", "probs", "gradient"):
        seen_values, values = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(seen_values.double(), values, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_outputs_of_some_samples_are_read_where_they_are():
    case = Case("plain", (5, 6, 9))
    arguments = case.arguments(torch.float32)
    whole = cross_entropy_triton.clean_cross_entropy(**arguments)
    arguments |= {name: arguments[name][1:4, 2:5] for name in ("outputs", "targets", "weight")}
    part = cross_entropy_triton.clean_cross_entropy(**arguments)
    for name in ("losses", "probs", "target", "weight", "gradient"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[1:4, 2:5], rtol=1e-6, atol=1e-9)


def test_an_empty_batch_has_no_loss():
    outputs, targets = torch.empty(4, 0, 5), torch.empty(4, 0, dtype=torch.int64)
    weight = torch.empty(4, 0, dtype=torch.float64)
    found = cross_entropy_triton.clean_cross_entropy(outputs, targets, weight, ignore_index=-100)
    assert found.losses.shape == (4, 0)
    assert found.gradient.shape == (4, 0, 5)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("form", ["plain", "everything", "lengths", "bidirectional", "per sequence", "no readout"])
def test_an_update_is_that_of_the_torch_backend(form, segments, monkeypatch):
    divide = memory.Shape.divide
    monkeypatch.setattr(memory.Shape, "divide", lambda self, *rest: divide(self, *rest)._replace(segments=segments))
    time, batch, hidden, width = 4, 2, 5, 5
    options = {"weight": torch.linspace(0.5, 2, width), "ignore_index": 1, "label_smoothing": 0.2}
    loss = nn.CrossEntropyLoss(**(options if form == "everything" else {}))
    more = {}
    if form == "lengths":
        more = {"lengths": [4, 2], "step_weight": torch.linspace(0, 1, time * batch).view(time, batch)}
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        rnn = nn.RNN(3, hidden, bidirectional=form == "bidirectional")
        readout = None if form == "no readout" else nn.Linear(hidden * (1 + rnn.bidirectional), width)
        targets = torch.arange(time * batch).view(time, batch) % width
        estimate = anpgpu.estimate_grad_(
            rnn,
            readout,
            torch.randn(time, batch, 3),
            targets[-1] if form == "per sequence" else targets,
            loss,
            perturbation=anpgpu.Perturbation("anp", rollouts=4, backend=backend, precision="fp32"),
            generator=torch.Generator().manual_seed(1),
            **more,
        )
        leaves = [*rnn.parameters(), *(readout.parameters() if readout is not None else ())]
        found.append((estimate.loss, torch.cat([leaf.grad.flatten() for leaf in leaves])))
    (value, gradient), (expected_value, expected) = found
    assert_close(value, expected_value, "float32")
    assert_close(gradient, expected, "float32_long")
