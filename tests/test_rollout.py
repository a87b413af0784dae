"""The deviation form equals the difference of two runs in float64, and stays precise where that difference does not."""

import math
from typing import NamedTuple

import pytest
import torch
from oracles import PHI, clean_run, noise_block, perturbed_run
from tolerances import TOLERANCES, assert_close, relative_error

from anpgpu.functional import (
    Counters,
    CrossEntropyLoss,
    LinearLoss,
    OutputsOnly,
    SquaredLoss,
    adjoint,
    noise,
    returns,
    rollout,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

SEED = 20240509
SIGMAS = (1e-6, 1e-3, 0.1, 3.0)
LOSSES = ("linear", "squared", "squared, no readout", "cross-entropy", "cross-entropy, no readout")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


class Case(NamedTuple):
    """A small network and the noise of its rollouts, in float64."""

    drive: torch.Tensor
    weight_hh: torch.Tensor
    h_0: torch.Tensor
    xi: torch.Tensor
    delta_h0: torch.Tensor
    sigma: float
    kind: str
    nonlinearity: str

    @classmethod
    def of(cls, time, batch, rollouts, units, *, sigma, kind="gaussian", nonlinearity="tanh", drive=1.0, delta_h0=0.0):
        return cls(
            drive * draw(time, batch, units, seed=1),
            0.9 * draw(units, units, seed=2) / math.sqrt(units),
            0.5 * draw(batch, units, seed=3),
            sigma * noise_block(SEED, (time, batch, rollouts, units), kind),
            delta_h0 * draw(batch, rollouts, units, seed=4),
            sigma,
            kind,
            nonlinearity,
        )

    def to(self, dtype):
        return self._replace(
            **{name: value.to(dtype) for name, value in self._asdict().items() if torch.is_tensor(value)}
        )

    def clean(self):
        return clean_run(self.drive, self.weight_hh, self.h_0, self.nonlinearity)

    def perturbed(self):
        start = self.h_0.unsqueeze(1) + self.delta_h0
        return perturbed_run(self.drive, self.weight_hh, start, self.xi, self.nonlinearity)

    def deviations(self):
        """delta_a and delta_h, (T, B, P, H), by subtracting two runs."""
        return tuple(moved - clean.unsqueeze(2) for moved, clean in zip(self.perturbed(), self.clean(), strict=True))

    def rollout(self, loss, dtype=torch.float64, **options):
        """The op under test, on the clean run rounded to `dtype`."""
        preact, hidden = (tensor.to(dtype) for tensor in self.clean())
        if loss is not None:
            loss = type(loss)(
                *(field if field is None or field.dtype == torch.int64 else field.to(dtype) for field in loss)
            )
        defaults = {"rollouts": self.xi.shape[2], "sigma": self.sigma, "noise": self.kind}
        defaults |= {"nonlinearity": self.nonlinearity, "delta_h0": self.delta_h0.to(dtype)}
        return rollout(preact, hidden, self.weight_hh.to(dtype), loss, SEED, **(defaults | options))


class Task(NamedTuple):
    """Targets, weights and readout of a case's losses."""

    grad: torch.Tensor
    readout: torch.Tensor
    bias: torch.Tensor
    wanted: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, case, outputs=4, margin=None):
        """`margin`: a bias puts the logits of the targets this far above the others."""
        time, batch, units = case.drive.shape
        readout = draw(outputs, units, seed=5)
        target = draw(time, batch, seed=6).mul(100).long().abs() % outputs
        bias = torch.zeros(time, batch, outputs, dtype=torch.float64)
        if margin is not None:
            index = target.unsqueeze(-1)
            logits = case.clean()[1] @ readout.T
            others = logits.scatter(-1, index, -math.inf).amax(-1, keepdim=True)
            bias.scatter_(-1, index, others + margin - logits.gather(-1, index))
        weight = draw(time, batch, seed=7).abs()
        weight[0, 0] = 0
        return cls(draw(time, batch, units, seed=8), readout, bias, draw(time, batch, outputs, seed=9), target, weight)

    def to(self, dtype):
        return Task(*(field if field.dtype == torch.int64 else field.to(dtype) for field in self))

    def value(self, kind, states):
        """The loss of each step, (T, B, P), of states (T, B, P, H), by its textbook formula."""
        if kind == "linear":
            return (self.grad.unsqueeze(2) * states).sum(-1)
        outputs = states if "no readout" in kind else states @ self.readout.T + self.bias.unsqueeze(2)
        if "squared" in kind:
            wanted = self.grad if "no readout" in kind else self.wanted
            losses = (outputs - wanted.unsqueeze(2)).square().mean(-1)
        else:
            index = self.target[..., None, None].expand(*outputs.shape[:-1], 1)
            losses = torch.logsumexp(outputs, -1) - outputs.gather(-1, index).squeeze(-1)
        return losses * self.weight.unsqueeze(-1)

    def loss(self, kind, hidden):
        """The loss for the op under test, from clean states (T, B, H)."""
        if kind == "linear":
            return LinearLoss(self.grad)
        readout = None if "no readout" in kind else self.readout
        outputs = hidden if readout is None else hidden @ readout.T + self.bias
        if "squared" in kind:
            return SquaredLoss(readout, outputs - (self.grad if readout is None else self.wanted), self.weight)
        return CrossEntropyLoss(readout, torch.softmax(outputs, -1), self.target, self.weight)


def difference_of_runs(case, task, kind):
    """Loss differences, (T, B, P), by subtracting two runs in the case's type."""
    return task.value(kind, case.perturbed()[1]) - task.value(kind, case.clean()[1].unsqueeze(2))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_deviation_form_is_the_difference_of_two_float64_runs(kind, nonlinearity, sigma):
    case = Case.of(7, 3, 5, 6, sigma=sigma, nonlinearity=nonlinearity, delta_h0=sigma)
    task = Task.of(case)
    run = case.rollout(task.loss(kind, case.clean()[1]))
    delta_a, delta_h = case.deviations()
    assert_close(run.delta_a, delta_a, "two_runs")
    assert_close(run.delta_h, delta_h[-1], "two_runs")
    assert_close(run.delta_loss, difference_of_runs(case, task, kind), "two_runs")
    assert run.delta_o is None


@pytest.mark.parametrize("sigma", SIGMAS)
def test_outputs_only(sigma):
    case = Case.of(7, 3, 5, 6, sigma=sigma)
    readout = draw(4, 6, seed=5)
    run = case.rollout(OutputsOnly(readout), store_delta_a=False)
    assert run.delta_loss is None
    assert run.delta_a is None
    _, delta_h = case.deviations()
    assert_close(run.delta_o, delta_h @ readout.T, "two_runs")
    assert_close(case.rollout(OutputsOnly(None)).delta_o, delta_h, "two_runs")


def test_without_a_loss_only_the_state_comes_back():
    case = Case.of(4, 2, 3, 5, sigma=0.01)
    run = case.rollout(None, store_delta_a=False)
    assert (run.delta_loss, run.delta_a, run.delta_o) == (None, None, None)
    assert_close(run.delta_h, case.deviations()[1][-1], "two_runs")


def test_a_step_without_weight_has_no_loss_however_large_its_deviation():
    case = Case.of(5, 2, 4, 6, sigma=1e30, nonlinearity="relu")
    task = Task.of(case)
    task = task._replace(weight=torch.zeros_like(task.weight))
    run = case.rollout(task.loss("cross-entropy", case.clean()[1]))
    assert torch.equal(run.delta_loss, torch.zeros(5, 2, 4, dtype=torch.float64))


def test_two_units_by_hand():
    # h_t = tanh(W h_{t-1}) with W = [[0, 1], [-1, 0]] and h_0 = 0, so a = h = 0: the rollout is the perturbed network
    # itself, delta_a_1 = xi_1, delta_a_2 = W tanh(xi_1) + xi_2.
    weight_hh = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    zero = torch.zeros(2, 1, 2, dtype=torch.float64)
    run = rollout(zero, zero, weight_hh, LinearLoss(torch.ones_like(zero)), SEED, rollouts=3, sigma=0.5)
    first, second = 0.5 * noise_block(SEED, (2, 1, 3, 2), "rademacher")[:, 0]
    tanh_half = 0.46211715726000975
    for p in range(3):
        (u, v), (x, y) = first[p].tolist(), second[p].tolist()
        assert run.delta_a[0, 0, p].tolist() == [u, v]
        moved = (math.copysign(tanh_half, v) + x, -math.copysign(tanh_half, u) + y)
        assert run.delta_a[1, 0, p].tolist() == pytest.approx(moved, rel=1e-14)
        state = [math.tanh(delta_a) for delta_a in moved]
        assert run.delta_h[0, p].tolist() == pytest.approx(state, rel=1e-13)
        expected = (math.copysign(tanh_half, u) + math.copysign(tanh_half, v), sum(state))
        assert run.delta_loss[:, 0, p].tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_relu_by_hand():
    # One step, a = (2, -1), xi = +-3: h = (2, 0); +3 gives (5, 2), -3 gives (0, 0).
    preact = torch.tensor([[[2.0, -1.0]]])
    run = rollout(
        preact, preact.relu(), torch.eye(2), LinearLoss(torch.ones(1, 1, 2)), SEED, rollouts=8, sigma=3.0,
        nonlinearity="relu",
    )  # fmt: skip
    signs = noise_block(SEED, (1, 1, 8, 2), "rademacher")[0, 0]
    expected = [[3.0 if first > 0 else -2.0, 2.0 if second > 0 else 0.0] for first, second in signs.tolist()]
    assert run.delta_h[0].tolist() == expected
    assert run.delta_loss[0, 0].tolist() == [sum(row) for row in expected]


def test_squared_and_cross_entropy_by_hand():
    # One unit at a = 0 moved by +-0.5 gives delta_h = d = +-tanh(0.5).
    zero, weight = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    readout = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    change = math.tanh(0.5) * noise_block(SEED, (1, 1, 6, 1), "rademacher")[0, 0, :, 0]
    error = torch.tensor([[[0.25, 3.0]]], dtype=torch.float64)
    squared = rollout(
        zero, zero, torch.eye(1).double(), SquaredLoss(readout, error, 2 * weight), SEED, rollouts=6, sigma=0.5
    )
    expected = [2 * (d * (0.5 + d) - 2 * d * (6 - 2 * d)) / 2 for d in change.tolist()]
    assert squared.delta_loss.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    probs = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)
    loss = CrossEntropyLoss(readout, probs, torch.tensor([[1]]), 2 * weight)
    entropy = rollout(zero, zero, torch.eye(1).double(), loss, SEED, rollouts=6, sigma=0.5)
    expected = [2 * math.log(0.25 * math.exp(3 * d) + 0.75) for d in change.tolist()]
    assert entropy.delta_loss.flatten().tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1e-6, 0.1, 3.0, 30.0])
def test_saturated_units(dtype, sigma):
    # With pre-activations near 30, h is exactly +-1, and the quotient form approaches 0 / 0 where th approaches -+1.
    case = Case.of(30, 3, 5, 9, sigma=sigma, drive=30.0)
    _, hidden = case.clean()
    assert int((hidden.float().abs() == 1).sum()) > hidden.numel() // 2
    run = case.rollout(LinearLoss(draw(30, 3, 9)), dtype)
    assert bool(torch.isfinite(run.delta_loss).all())
    assert float((hidden[-1].unsqueeze(1) + run.delta_h).abs().max()) <= 1 + torch.finfo(dtype).eps
    assert_close(run.delta_a, case.deviations()[0], "two_runs" if dtype == torch.float64 else "float32_long")


@pytest.mark.parametrize("sigma", [1e-30, 1e-12, 1e-6, 1e-3, 0.1, 0.49, 0.51, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_step_of_every_unit(nonlinearity, dtype, sigma):
    # tanh(a + d) - tanh(a) = sinh(d) / (cosh(a) cosh(a + d)), without cancellation.
    preact = torch.linspace(-25, 25, 201, dtype=torch.float64).to(dtype).view(1, 1, -1)
    weight_hh = torch.zeros(201, 201, dtype=dtype)
    hidden = PHI[nonlinearity](preact)
    run = rollout(preact, hidden, weight_hh, None, SEED, rollouts=3, sigma=sigma, nonlinearity=nonlinearity)
    change = noise_block(SEED, (1, 1, 3, 201), "rademacher")[0] * float(torch.tensor(sigma, dtype=dtype))
    a = preact.double()
    if nonlinearity == "tanh":
        expected = torch.sinh(change) / torch.cosh(a) / torch.cosh(a + change)
    else:
        expected = torch.where(a > 0, torch.maximum(change, -a), torch.clamp(a + change, min=0))
    error = (run.delta_h.double() - expected).abs()
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    largest = max(1.0, sigma) if nonlinearity == "relu" else 1.0
    assert float(error.max()) <= 4 * eps * largest
    if nonlinearity == "tanh" and sigma < 0.5:
        # Every unit keeps its relative precision, even where it is saturated.
        assert float((error / expected.abs().clamp(min=tiny)).max()) <= 40 * eps


@pytest.mark.parametrize("margin", [None, 12.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_float32_at_sigma_1e_6_agrees_with_a_float64_run(kind, margin):
    case = Case.of(20, 4, 16, 32, sigma=1e-6, kind="rademacher")
    loss = Task.of(case, outputs=10, margin=margin).loss(kind, case.clean()[1])
    exact = case.rollout(loss).delta_loss
    assert_close(case.rollout(loss, torch.float32).delta_loss, exact, "deviation_float32")


@pytest.mark.parametrize("margin", [None, 12.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_subtracting_two_float32_runs_does_not_agree(kind, margin):
    case = Case.of(20, 4, 16, 32, sigma=1e-6, kind="rademacher")
    task = Task.of(case, outputs=10, margin=margin)
    exact = case.rollout(task.loss(kind, case.clean()[1])).delta_loss
    naive = difference_of_runs(case.to(torch.float32), task.to(torch.float32), kind)
    assert relative_error(naive, exact) > TOLERANCES["subtraction_float32"].bound


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 7), (5, 1, 3, 1), (3, 1, 1, 513), (2, 7, 65, 17)])
@pytest.mark.parametrize("kind", LOSSES)
def test_sizes(shape, kind):
    case = Case.of(*shape, sigma=0.01, kind="rademacher")
    task = Task.of(case, outputs=1 if shape[3] == 1 else 3)
    run = case.rollout(task.loss(kind, case.clean()[1]), rollouts=shape[2])
    assert_close(run.delta_a, case.deviations()[0], "two_runs")
    assert_close(run.delta_loss, difference_of_runs(case, task, kind), "two_runs")


def test_empty_batch():
    empty = torch.zeros(3, 0, 4)
    run = rollout(empty, empty, torch.eye(4), LinearLoss(empty), SEED, rollouts=2)
    assert run.delta_loss.shape == (3, 0, 2)
    assert run.delta_a.shape == (3, 0, 2, 4)
    assert run.delta_h.shape == (0, 2, 4)


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_segments_are_one_run(cut, dtype):
    case = Case.of(9, 2, 5, 6, sigma=0.1, kind="rademacher", delta_h0=0.1)
    preact, hidden = (states.to(dtype) for states in case.clean())
    grad = draw(9, 2, 6).to(dtype)
    weight_hh = case.weight_hh.to(dtype)

    def run(steps, start):
        return rollout(
            preact[steps], hidden[steps], weight_hh, LinearLoss(grad[steps]), SEED, rollouts=5, sigma=0.1,
            counters=Counters(time=steps.start), delta_h0=start,
        )  # fmt: skip

    whole = run(slice(0, 9), case.delta_h0.to(dtype))
    first = run(slice(0, cut), case.delta_h0.to(dtype))
    second = run(slice(cut, 9), first.delta_h)
    assert torch.equal(torch.cat((first.delta_loss, second.delta_loss)), whole.delta_loss)
    assert torch.equal(torch.cat((first.delta_a, second.delta_a)), whole.delta_a)
    assert torch.equal(second.delta_h, whole.delta_h)


@pytest.mark.parametrize("field", ["sample", "rollout"])
def test_parts_of_a_block_are_its_parts(field):
    case = Case.of(4, 6, 6, 5, sigma=0.1, kind="rademacher")
    preact, hidden = case.clean()
    whole = rollout(preact, hidden, case.weight_hh, LinearLoss(draw(4, 6, 5)), SEED, rollouts=6, sigma=0.1)
    samples, rollouts = (slice(2, 5), slice(0, 6)) if field == "sample" else (slice(0, 6), slice(2, 5))
    loss = LinearLoss(draw(4, 6, 5)[:, samples])
    where = Counters(sample=samples.start, rollout=rollouts.start)
    block = rollout(
        preact[:, samples], hidden[:, samples], case.weight_hh, loss, SEED, rollouts=rollouts.stop - rollouts.start,
        sigma=0.1, counters=where,
    )  # fmt: skip
    assert_close(block.delta_a, whole.delta_a[:, samples, rollouts], "float64")
    assert_close(block.delta_loss, whole.delta_loss[:, samples, rollouts], "float64")


def scattered(tensor):
    """The same values in memory with another order and gaps."""
    wide = torch.full((2 * tensor.shape[-1], *tensor.shape[:-1]), math.nan, dtype=tensor.dtype)
    wide[::2] = tensor.movedim(-1, 0)
    return wide[::2].movedim(0, -1)


@pytest.mark.parametrize("kind", LOSSES)
def test_strides_do_not_matter(kind):
    case = Case.of(5, 3, 4, 6, sigma=0.1, kind="rademacher", delta_h0=0.1)
    task = Task.of(case)
    preact, hidden = case.clean()
    loss = task.loss(kind, hidden)
    usual = case.rollout(loss)
    strewn = type(loss)(*(field if field is None or field.dtype == torch.int64 else scattered(field) for field in loss))
    run = rollout(
        scattered(preact), scattered(hidden), scattered(case.weight_hh), strewn, SEED, rollouts=4, sigma=0.1,
        delta_h0=scattered(case.delta_h0),
    )  # fmt: skip
    assert not scattered(preact).is_contiguous()
    assert_close(run.delta_loss, usual.delta_loss, "float64")
    assert_close(run.delta_a, usual.delta_a, "float64")
    assert_close(run.delta_h, usual.delta_h, "float64")


def test_inputs_are_left_as_they_were():
    case = Case.of(3, 2, 4, 5, sigma=0.1, kind="rademacher", delta_h0=0.1)
    task = Task.of(case)
    tensors = [*case.clean(), case.weight_hh, case.delta_h0, task.grad]
    before = [tensor.clone() for tensor in tensors]
    rollout(*tensors[:3], LinearLoss(tensors[4]), SEED, rollouts=4, delta_h0=tensors[3])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", ["np", "anp"])
@pytest.mark.parametrize("sigma", [1e-3, 1e-6])
@pytest.mark.parametrize(("precision", "bound"), [("bf16", "bf16_adjoint"), ("fp32", "fp32_adjoint")])
def test_adjoint_with_rounded_operands(method, sigma, precision, bound):
    time, batch, rollouts, units = 50, 1, 64, 256
    weight_hh = 0.95 * torch.linalg.qr(draw(units, units))[0]
    preact, hidden = clean_run(0.5 * draw(time, batch, units, seed=1), weight_hh, torch.zeros(batch, units).double())
    grad = draw(time, batch, units, seed=2) / units**0.5

    def estimate(dtype, precision):
        run = rollout(
            preact.to(dtype), hidden.to(dtype), weight_hh.to(dtype), LinearLoss(grad.to(dtype)), SEED,
            rollouts=rollouts, sigma=sigma, precision=precision,
        )  # fmt: skip
        credit = returns(run.delta_loss, 1.0)
        activity = run.delta_a if method == "anp" else None
        return adjoint(credit, activity, SEED, method=method, units=units, sigma=sigma)

    assert_close(estimate(torch.float32, precision), estimate(torch.float64, "fp64"), bound)


# Of the larger sizes, the processor's bfloat16 tiles compute the product, where it has them.
@pytest.mark.parametrize(("rollouts", "units"), [(3, 64), (64, 64), (27, 100), (4, 257)])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_operands_are_rounded_to_nearest(precision, rollouts, units):
    # One recurrent step from a known deviation, with small noise.
    weight_hh, start = draw(units, units).float(), draw(1, rollouts, units, seed=1).float()
    before = torch.backends.mkldnn.matmul.fp32_precision
    zero = torch.zeros(1, 1, units)
    delta_a = rollout(
        zero, zero, weight_hh, None, SEED, rollouts=rollouts, sigma=1e-3, precision=precision, delta_h0=start
    ).delta_a[0, 0]  # fmt: skip
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    bits = {"bf16": 7, "fp16": 10, "tf32": 10}[precision]

    def rounded(values):
        mantissa, exponent = torch.frexp(values.double())
        scaled = mantissa * 2 ** (bits + 1)
        # Halfway cases round away from zero for tf32, as `cvt.rna` does, and to even for the others.
        whole = scaled.sign() * (scaled.abs() + 0.5).floor() if precision == "tf32" else torch.round(scaled)
        return torch.ldexp(whole / 2 ** (bits + 1), exponent)

    scale = 1e-3 if precision == "fp16" else 1.0
    xi = noise(SEED, (1, 1, rollouts, units), sigma=1e-3)[0, 0].double()
    expected = rounded(start[0].double() / scale) * scale @ rounded(weight_hh).T + xi
    assert_close(delta_a, expected, "float32")


def test_fp16_operands_do_not_underflow():
    case = Case.of(10, 2, 8, 32, sigma=1e-7, kind="rademacher")
    loss = LinearLoss(draw(10, 2, 32))
    exact = case.rollout(loss).delta_loss
    assert relative_error(case.rollout(loss, torch.float32, precision="fp16").delta_loss, exact) < 1e-2
