"""Gated cells in deviation form: against two runs and many digits, saturated gates included.

The oracles are the textbook equations, a step at a time in float64.
"""

import mpmath
import pytest
import torch
from tolerances import assert_close, relative_error
from torch import nn

from anpgpu import functional
from anpgpu.kernels.cell_gated import exact_difference
from anpgpu.kernels.loss import LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.noise import noise
from anpgpu.kernels.rollout import RolloutOptions, rollout
from anpgpu.network.cells import LayerRun
from anpgpu.network.weights import LayerWeights
from anpgpu.registry import CELLS
from anpgpu.runtime.dispatch import implementation

T, B, P, I, H = 6, 2, 5, 3, 4  # noqa: E741  (the design's names)
SEED = torch.tensor(-77)


def gru(weights, x, state):
    """One step of `torch.nn.GRU`'s equations; states may have a rollout axis."""
    (ir, iz, in_), (hr, hz, hn) = (
        (x @ weights.weight_ih.T + weights.bias_ih).chunk(3, -1),
        (state @ weights.weight_hh.T + weights.bias_hh).chunk(3, -1),
    )
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    return (1 - z) * torch.tanh(in_ + r * hn) + z * state


def lstm(weights, x, state):
    """One step of `torch.nn.LSTM`'s equations, state (h, c)."""
    h, c = state.chunk(2, -1)
    i, f, g, o = (x @ weights.weight_ih.T + weights.bias_ih + h @ weights.weight_hh.T + weights.bias_hh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat((torch.sigmoid(o) * torch.tanh(c), c), -1)


STEPS = {"gru": gru, "lstm": lstm}
MODULES = {"gru": nn.GRU, "lstm": nn.LSTM}
BIASES = {"default": 0.0, "open": 15.0, "shut": -15.0}


class Clean:
    """A cell's clean run, from torch's start, its gates' biases moved by up to `bias`."""

    def __init__(self, cell, bias=0.0):
        self.cell, self.step = CELLS[cell], STEPS[cell]
        torch.manual_seed(5)
        module = MODULES[cell](I, H, dtype=torch.float64)
        with torch.no_grad():
            # Half of the units, of every gate.
            module.bias_ih_l0[::2] += bias
        self.weights = LayerWeights(*(weight.detach() for weight in module.all_weights[0]))
        self.inputs = torch.randn(T, B, I, dtype=torch.float64)
        start = 0.5 * torch.randn(B, H * self.cell.forms.states, dtype=torch.float64)
        _, (states,) = self.cell.run_layer((self.weights,), self.inputs, start.unsqueeze(0))
        self.run = LayerRun(self.inputs, states)

    def rollout(self, sigma, dtype=torch.float64, loss=None, *, run=rollout, noise="rademacher", **options):
        precision = "fp64" if dtype == torch.float64 else "fp32"
        settings = RolloutOptions(P, sigma, noise, self.cell.forms, precision, store_delta_a=True)
        preact = self.cell.preactivations(self.weights, self.run)
        return run(
            preact.to(dtype), self.run.states[1:].to(dtype), self.weights.weight_hh.to(dtype), loss, SEED,
            options=settings, **options,
        )  # fmt: skip

    def perturbed(self, sigma, start=0.0):
        """States of a perturbed network minus the clean ones, (T, B, P, S)."""
        state, change = self.run.states[0].unsqueeze(1) + start, []
        xi = sigma * noise(SEED, (T, B, P, H), dtype=torch.float64)
        for step in range(T):
            state = self.step(self.weights, self.inputs[step].unsqueeze(1), state.expand(B, P, -1)).clone()
            state[..., :H] += xi[step]
            change.append(state - self.run.states[step + 1].unsqueeze(1))
        return torch.stack(change)


def test_the_exact_difference_has_float64s_precision_everywhere():
    a = torch.tensor([-350.0, -40.0, -18.0, -2.0, -1e-3, 0.0, 0.3, 5.0, 19.0, 60.0, 340.0], dtype=torch.float64)
    d = torch.tensor([s * x for s in (1, -1) for x in (1e-12, 1e-6, 0.02, 0.4, 1.0, 7.0, 37.0, 90.0)]).double()
    difference = exact_difference(a.unsqueeze(1), d)
    mpmath.mp.dps = 700
    for row, x in zip(difference.tolist(), a.tolist(), strict=True):
        for value, y in zip(row, d.tolist(), strict=True):
            exact = mpmath.tanh(mpmath.mpf(x) + y) - mpmath.tanh(mpmath.mpf(x))
            # The rounding of a + d moves a saturated result by as many units as a + d is large.
            assert abs(value - exact) <= 1e-15 * (1 + abs(x) + abs(y)) * abs(exact) + 1e-307, (x, y)
    far = exact_difference(torch.tensor([1e4, -1e4, 200.0]), torch.tensor([-3e4, 3e4, -150.0]))
    assert_close(far, torch.tensor([-2.0, 2.0, 0.0]), "exact")


@pytest.mark.parametrize("cell", STEPS)
def test_the_clean_run_is_the_textbooks(cell):
    clean = Clean(cell)
    state = clean.run.states[0]
    for step in range(T):
        state = clean.step(clean.weights, clean.inputs[step], state)
        assert_close(clean.run.states[step + 1], state, "float64")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 4.0])
@pytest.mark.parametrize("cell", STEPS)
def test_deviations_are_the_difference_of_two_runs(cell, sigma, bias):
    clean = Clean(cell, BIASES[bias])
    moved = clean.rollout(sigma)
    # The oracle subtracts states of order 1, whose rounding is 1e-16.
    assert relative_error(moved.delta_a, clean.perturbed(sigma)) < 1e-12 / min(sigma, 1)
    assert torch.equal(moved.delta_h, moved.delta_a[-1])


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_float32_is_precise_at_any_sigma(backend, cell, bias, noise):
    clean, run = Clean(cell, BIASES[bias]), implementation("rollout", backend)
    for sigma in (1e-6, 1e-2, 3.0):
        exact, moved = clean.rollout(sigma, noise=noise), clean.rollout(sigma, torch.float32, run=run, noise=noise)
        assert moved.delta_a.dtype == torch.float32
        for units in (slice(0, H), slice(H, None)) if clean.cell.forms.states > 1 else (slice(None),):
            error = relative_error(moved.delta_a[..., units], exact.delta_a[..., units])
            assert error < 1e-5, (sigma, units)


@pytest.mark.parametrize("cell", STEPS)
def test_compiled_rollouts_measure_losses_and_begin_where_they_are_told(cell):
    clean, run = Clean(cell), implementation("rollout", "numba")
    start = 0.1 * torch.randn(B, P, clean.run.states.shape[-1], dtype=torch.float64)
    readout, error = torch.randn(2, H, dtype=torch.float64), torch.randn(T, B, 2, dtype=torch.float64)
    losses = {
        "linear": LinearLoss(torch.randn(T, B, H, dtype=torch.float64)),
        "whole state": LinearLoss(torch.randn_like(clean.run.states[1:])),
        "squared": SquaredLoss(readout, error, torch.ones(T, B, dtype=torch.float64)),
        "outputs": OutputsOnly(readout),
        "none": None,
    }
    for name, loss in losses.items():
        exact = clean.rollout(0.1, loss=loss, delta_h0=start)
        narrow = None if loss is None else type(loss)(*(tensor.float() for tensor in loss))
        moved = clean.rollout(0.1, torch.float32, narrow, run=run, delta_h0=start.float())
        for field in ("delta_loss", "delta_a", "delta_h", "delta_o"):
            ours, reference = getattr(moved, field), getattr(exact, field)
            assert (ours is None) == (reference is None), (name, field)
            if ours is not None:
                assert_close(ours, reference, "float32_long")


@pytest.mark.parametrize("cell", STEPS)
def test_a_compiled_rollout_that_is_lost_stays_lost(cell):
    clean, run = Clean(cell), implementation("rollout", "numba")
    start = torch.zeros(B, P, clean.run.states.shape[-1])
    start[0, 1, 0] = torch.nan
    moved = clean.rollout(0.1, torch.float32, run=run, delta_h0=start)
    lost = ~moved.delta_h.isfinite().all(-1)
    assert lost.nonzero().tolist() == [[0, 1]]
    # Changes that no float32 exponential can hold, all the same, saturate.
    moved = clean.rollout(1e4, torch.float32, run=run)
    assert_close(moved.delta_a, clean.rollout(1e4).delta_a, "float32_long")


@pytest.mark.parametrize("cell", STEPS)
def test_segments_join_and_losses_see_h_and_c(cell):
    clean = Clean(cell)
    whole, size = clean.rollout(0.1), clean.run.states.shape[-1]
    start = 0.1 * torch.randn(B, P, size, dtype=torch.float64)
    moved = clean.rollout(0.1, delta_h0=start)
    assert_close(moved.delta_a, clean.perturbed(0.1, start), "two_runs")
    grad = torch.randn(T, B, size, dtype=torch.float64)
    linear = clean.rollout(0.1, loss=LinearLoss(grad)).delta_loss
    assert_close(linear, torch.einsum("tbps,tbs->tbp", whole.delta_a, grad), "float64")
    readout = torch.randn(2, H, dtype=torch.float64)
    outputs = clean.rollout(0.1, loss=OutputsOnly(readout)).delta_o
    assert_close(outputs, whole.delta_a[..., :H] @ readout.T, "float64")


@pytest.mark.parametrize("cell", STEPS)
def test_the_public_op_takes_a_cell(cell):
    clean = Clean(cell)
    preact, size = clean.cell.preactivations(clean.weights, clean.run), clean.run.states.shape[-1]
    grad = torch.randn(T, B, size, dtype=torch.float64)
    arguments = preact, clean.run.states[1:], clean.weights.weight_hh, LinearLoss(grad), SEED
    moved = functional.rollout(*arguments, rollouts=P, sigma=0.1, cell=cell)
    assert_close(moved.delta_a, clean.rollout(0.1).delta_a, "exact")
    assert_close(moved.delta_loss, torch.einsum("tbps,tbs->tbp", moved.delta_a, grad), "float64")
    compiled = torch.compile(
        lambda: functional.rollout(*arguments, rollouts=P, sigma=0.1, cell=cell), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled().delta_a, moved.delta_a, "exact")
    with pytest.raises(ValueError, match=r"preact must have 5 values .*5 H\), got \(6, 2, 19\)"):
        functional.rollout(preact[..., 1:], *arguments[1:], rollouts=P, cell=cell)
    with pytest.raises(ValueError, match=r"weight_hh must"):
        functional.rollout(*arguments[:2], arguments[2][:H], *arguments[3:], rollouts=P, cell=cell)
    with pytest.raises(ValueError, match=r"cell must be one of .*'gru', 'lstm'; got 'peephole'"):
        functional.rollout(*arguments, rollouts=P, cell="peephole")


def test_a_backend_without_the_cell_names_those_that_have_it():
    for cell in STEPS:
        forms = CELLS[cell].forms._replace(numba=None, triton=None)
        with pytest.raises(ValueError, match=f"cell '{cell}' has no form on backend 'numba', only on torch, cupy"):
            forms.on("numba")
