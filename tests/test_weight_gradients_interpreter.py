"""What Triton makes of weight gradients, in its interpreter, against sums in float64."""

import math

import pytest
import torch
from tolerances import assert_close

import anpgpu
from anpgpu.kernels import tiles, tiles_weight_gradients as tiles_of, weight_gradients as reference

triton_form = pytest.importorskip("anpgpu.kernels.weight_gradients_triton", reason="needs Triton")

pytestmark = pytest.mark.interpreter

SHAPES = [
    (1, 1, 1, 1, (1,)),
    (2, 1, 1, 7, (1, 7)),
    (3, 5, 3, 20, (3, 20)),
    (2, 40, 13, 33, (10, 33)),
    (1, 30, 20, 10, (70,)),
    (2, 21, 5, 130, (16, 130)),
]
"""parts, T, B, G, and the columns of each weight."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that memory nobody writes shows."""
    assert tiles.INTERPRETED, "needs TRITON_INTERPRET=1 from the start: `make test-interpreter`"
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(shape, seed=0):
    parts, time, batch, units, columns = shape
    generator = torch.Generator().manual_seed(seed + sum(columns))
    adjoint = torch.randn((parts, time, batch, units), generator=generator)
    return adjoint, tuple(torch.randn((time, batch, size), generator=generator).tanh() for size in columns)


def exact(adjoint, presynaptic):
    products = [torch.einsum("ptbg,tbn->pgn", adjoint.double(), values.double()) for values in presynaptic]
    return [*products, adjoint.double().sum((1, 2))]


def assert_all_close(found, expected):
    assert [total.shape for total in found] == [total.shape for total in expected]
    *weights, bias = zip(found, expected, strict=True)
    for mine, total in weights:
        assert_close(mine, total, "weight_gradients")
    # The bias is a sum of numbers that are not rounded.
    assert_close(*bias, "float32_long")


@pytest.mark.parametrize("split_rows", [None, 32, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_float64(shape, split_rows, monkeypatch):
    if split_rows is not None:
        monkeypatch.setattr(tiles_of, "LEAST_ROWS", split_rows)
    monkeypatch.setattr(triton_form, "CHUNK_ROWS", 64)
    adjoint, presynaptic = drawn(shape)
    before = [values.clone() for values in (adjoint, *presynaptic)]
    expected = exact(adjoint, presynaptic)
    found = triton_form.weight_gradients(adjoint, presynaptic, precision="tf32")
    assert_all_close(found, expected)
    again = triton_form.weight_gradients(adjoint, presynaptic, precision="bf16")
    assert all(map(torch.equal, found, again))
    assert all(map(torch.equal, before, (adjoint, *presynaptic)))
    # Added in place to what earlier steps gave.
    added = triton_form.weight_gradients(adjoint, presynaptic, found, precision="fp16")
    assert all(mine.data_ptr() == total.data_ptr() for mine, total in zip(added, found, strict=True))
    assert_all_close(added, [2 * total for total in expected])


def test_rows_are_split_by_shape_alone():
    small, large = (tiles_of.weight_gradients_launch(rows, 2, 64, (10, 64)) for rows in (100, 6400))
    assert (small.splits, small.split_rows) == (1, 128)
    assert large.splits == 25
    assert large.splits * large.split_rows >= 6400 > (large.splits - 1) * large.split_rows
    wide = tiles_of.weight_gradients_launch(3200, 2, 2048, (128, 2048))
    assert wide.splits == 1


def test_operands_of_any_strides_are_read_where_they_lie():
    adjoint, (first, second) = drawn((2, 6, 5, 9, (4, 9)))
    expected = exact(adjoint, (first, second))
    batch_first = first.transpose(0, 1).contiguous().transpose(0, 1)
    # h of an LSTM's state (h, c), every second gate, and a first step that is not the memory's.
    states = torch.cat((torch.full((1, 5, 18), math.nan), torch.cat((second, torch.full_like(second, math.nan)), -1)))
    spread = torch.full((2, 6, 5, 9, 2), math.nan)
    spread[..., 0] = adjoint
    found = triton_form.weight_gradients(spread[..., 0], (batch_first, states[1:, :, :9]), precision="tf32")
    assert_all_close(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.402e38, -1e-45])
def test_what_is_not_finite_comes_out_where_it_belongs(value):
    adjoint, presynaptic = drawn((1, 4, 3, 6, (2, 6)))
    adjoint[0, 2, 1, 4] = value
    found = triton_form.weight_gradients(adjoint, presynaptic, precision="tf32")
    expected = reference.weight_gradients(adjoint, presynaptic)
    for mine, total in zip(found, expected, strict=True):
        assert torch.equal(mine.isnan(), total.isnan())
        assert torch.equal(mine.isinf(), total.isinf())
        sound = total.isfinite()
        sound[0, 4] = False
        assert_close(mine[sound], total[sound], "weight_gradients")


def test_operands_are_rounded_to_the_nearest():
    """A tensor core cuts: a tf32 number stays, and the next float32 above halfway is the next tf32."""
    step = 2.0**-10
    values = torch.tensor([1.0, 1 + step, 1 + 0.49 * step, 1 + 0.51 * step, -1 - 0.51 * step]).view(5, 1, 1)
    found, _ = triton_form.weight_gradients(torch.eye(5).view(1, 5, 1, 5), (values,), precision="tf32")
    assert found.flatten().tolist() == [1, 1 + step, 1, 1 + step, -1 - step]


def test_fp32_and_empty_sums_are_the_references(monkeypatch):
    adjoint, presynaptic = drawn((2, 3, 2, 5, (2, 5)))
    exactly = reference.weight_gradients(adjoint, presynaptic)
    empty = triton_form.weight_gradients(adjoint[:, :, :0], [values[:, :0] for values in presynaptic], precision="tf32")
    assert [total.shape for total in empty] == [total.shape for total in exactly]
    assert not any(total.any() for total in empty)
    monkeypatch.setattr(triton_form, "_launch", None)
    assert all(map(torch.equal, triton_form.weight_gradients(adjoint, presynaptic, precision="fp32"), exactly))


NETWORKS = [
    (anpgpu.RNN, {"num_layers": 2}),
    (anpgpu.RNN, {"bidirectional": True}),
    (anpgpu.GRU, {}),
    (anpgpu.LSTM, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "options"), NETWORKS, ids=str)
@pytest.mark.parametrize("method", ["np", "anp", "anp-ls"])
@pytest.mark.parametrize("max_memory", [None, 17 << 20])
def test_every_gradient_of_an_update_is_that_of_exact_sums(kind, options, method, max_memory, monkeypatch):
    """Beside the same update whose sums are the reference's; its kernels are the same."""

    def gradients(precision):
        torch.manual_seed(0)
        how = anpgpu.Perturbation(method, 4, precision=precision, backend="triton", max_memory=max_memory)
        rnn = kind(3, 4, perturbation=how, **options)
        readout = torch.nn.Linear(4 * (1 + rnn.bidirectional), 2, bias=options.get("bias", True))
        inputs, targets = torch.randn(5, 2, 3), torch.randn(5, 2, 2)
        anpgpu.estimate_grad_(rnn, readout, inputs, targets, lengths=[5, 3])
        rnn(inputs)[0].sum().backward()
        return [parameter.grad for parameter in (*rnn.parameters(), *readout.parameters())]

    launched = []
    usual = triton_form._launch
    monkeypatch.setattr(triton_form, "_launch", lambda *a, **k: (launched.append(1), usual(*a, **k)))
    rounded = gradients("tf32")
    assert launched
    monkeypatch.setattr(triton_form, "weight_gradients", None)
    number = len(launched)
    for mine, total in zip(rounded, gradients_of_reference(gradients, monkeypatch), strict=True):
        assert_close(mine, total, "weight_gradients")
    assert len(launched) == number


def gradients_of_reference(gradients, monkeypatch):
    from anpgpu.runtime import dispatch

    monkeypatch.setattr(dispatch.Triton, "own_weight_gradients", False)
    dispatch.weight_gradients_on.cache_clear()
    try:
        return gradients("tf32")
    finally:
        dispatch.weight_gradients_on.cache_clear()
