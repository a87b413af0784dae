"""`diagnose`: its figures against autograd, its recommendation and advice, and the state that it must not change."""

import builtins
import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (PyTorch's own convention)
from torch.nn.utils.rnn import pack_padded_sequence

import anpgpu
from anpgpu import Perturbation, diagnose
from anpgpu.diagnosis.advice import Row, advise, cheapest, closest_sigma, cost_of
from anpgpu.diagnosis.alignment import Alignment

TIME, BATCH, INPUTS, HIDDEN = 6, 4, 3, 8
SMALL = {"rollouts": (2, 8), "discounts": (0, 1), "sigmas": (1e-3,), "repeats": 3, "progress": False}


def case(seed=0, **options):
    """A float64 network, a readout, inputs and targets whose loss depends on inputs of many steps ago."""
    torch.manual_seed(seed)
    rnn = nn.RNN(INPUTS, HIDDEN, **options).double()
    readout = nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), 2).double()
    inputs = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64)
    return rnn, readout, inputs, torch.randn(BATCH, 2, dtype=torch.float64)


def by_autograd(rnn, readout, inputs, targets):
    """Gradients of the rnn, by torch's own RNN and backward: a mean squared error after the last step."""
    grads = torch.autograd.grad(F.mse_loss(readout(rnn(inputs)[0][-1]), targets), list(rnn.parameters()))
    return dict(zip((name for name, _ in rnn.named_parameters()), grads, strict=True))


def test_rows_are_cosines_to_torchs_own_gradient():
    rnn, readout, inputs, targets = case()
    exact = by_autograd(rnn, readout, inputs, targets)
    diagnosis = diagnose(rnn, readout, inputs, targets, seed=3, **SMALL)
    (row,) = [row for row in diagnosis.rows if row.perturbation == Perturbation("np", 8, discount=1)]
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(3)).tolist()
    cosines, ratios, halves, hidden = [], [], [], []
    for seed in seeds:
        rnn.zero_grad()
        estimate = anpgpu.estimate_grad_(
            rnn,
            readout,
            inputs,
            targets,
            perturbation=Perturbation("np", 8, discount=1.0),
            generator=torch.Generator().manual_seed(seed),
        )
        flat = torch.cat([parameter.grad.flatten() for parameter in rnn.parameters()])
        truth = torch.cat([grad.flatten() for grad in exact.values()])
        cosines.append(F.cosine_similarity(flat, truth, dim=0))
        ratios.append(flat.norm() / truth.norm())
        halves.append(estimate.split_half)
        hidden.append(F.cosine_similarity(rnn.weight_hh_l0.grad.flatten(), exact["weight_hh_l0"].flatten(), dim=0))
    assert row.total.cosine == pytest.approx(float(sum(cosines)) / 3)
    assert row.total.ratio == pytest.approx(float(sum(ratios)) / 3)
    assert row.split_half == pytest.approx(float(sum(halves)) / 3)
    assert row.parts["weight_hh"].cosine == pytest.approx(float(sum(hidden)) / 3)
    assert set(row.parts) == {"weight_hh", "weight_ih", "bias"}
    assert row.seconds > 0


def test_bias_of_a_small_discount_and_of_a_large_sigma_shows():
    rnn, readout, inputs, targets = case()
    how = Perturbation("np", 512)
    diagnosis = diagnose(
        rnn,
        readout,
        inputs,
        targets,
        perturbation=how,
        methods=("np",),
        rollouts=(512,),
        discounts=(0, 1),
        sigmas=(1e-3, 3.0),
        progress=False,
    )
    by = {(row.perturbation.discount, row.perturbation.sigma): row for row in diagnosis.rows}
    exact, truncated = by[1, 1e-3], by[0, 1e-3]
    assert exact.total.limit > 0.99
    assert exact.total.ratio == pytest.approx(1, abs=0.2)
    # Only the last step has a loss: without a discount the other steps are not credited at all.
    assert truncated.total.limit < 0.97
    assert truncated.total.agreement > exact.total.agreement
    assert truncated.parts["weight_hh"].limit < 0.97
    assert by[1, 3.0].total.limit < 0.9
    assert diagnosis.recommendation == Perturbation("np", 512, discount=1)
    large = diagnose(
        rnn,
        readout,
        inputs,
        targets,
        perturbation=dataclasses.replace(how, sigma=3.0, discount=1.0),
        methods=("np",),
        rollouts=(512,),
        discounts=(1,),
        sigmas=(1e-3,),
        progress=False,
    )
    assert "bias" in large.advice.partition(";")[0]
    assert "sigma is too large" in large.advice
    assert large.recommendation.sigma == 1e-3


@pytest.mark.parametrize("layers", [1, 2])
def test_least_squares_is_recommended_where_it_is_exact(layers):
    rnn, readout, inputs, targets = case(num_layers=layers)
    diagnosis = diagnose(
        rnn,
        readout,
        inputs,
        targets,
        perturbation=Perturbation(ridge=1e-6, sigma=1e-5),
        rollouts=(4, 16),
        discounts=(0, 1),
        sigmas=(1e-5,),
        progress=False,
    )
    assert diagnosis.recommendation == Perturbation("anp-ls", 16, 1e-5, discount=1, ridge=1e-6)
    assert diagnosis.best.total.cosine > 0.999
    assert diagnosis.learning_rate_scale == pytest.approx(1, abs=0.02)
    assert "little is missing" in diagnosis.advice


def test_a_sigma_that_is_as_good_as_any_is_kept():
    how = Perturbation("anp-ls", 16, 1e-5, discount=1, ridge=1e-6)
    grid = SMALL | {"sigmas": (1e-7, 1e-6, 1e-5, 1e-4), "rollouts": (16,), "methods": ("anp-ls",)}
    diagnosis = diagnose(*case(), perturbation=how, **grid)
    assert diagnosis.recommendation == how
    assert diagnosis.best is diagnosis.current


def test_the_callers_world_stays_as_it_was():
    torch.manual_seed(0)
    rnn = anpgpu.RNN(INPUTS, HIDDEN, num_layers=2, dropout=0.5)
    for parameter in rnn.parameters():
        parameter.grad = torch.randn_like(parameter)
    rnn.weight_hh_l0.requires_grad_(False)
    inputs = torch.randn(TIME, BATCH, INPUTS, requires_grad=True)
    hx = torch.randn(2, BATCH, HIDDEN, requires_grad=True)

    def loss(outputs, targets):
        torch.rand(3)
        return outputs.square().mean(-1)

    before = {name: (parameter.detach().clone(), parameter.grad.clone()) for name, parameter in rnn.named_parameters()}
    noise = torch.get_rng_state()
    diagnosis = diagnose(rnn, None, inputs, None, loss, hx=hx, **SMALL)
    assert diagnosis.unseen is None
    assert torch.equal(torch.get_rng_state(), noise)
    assert rnn.training
    assert rnn.dropout == 0.5
    assert inputs.grad is None
    assert hx.grad is None
    assert rnn.last_estimate is None
    for name, parameter in rnn.named_parameters():
        assert torch.equal(parameter.detach(), before[name][0]), name
        assert torch.equal(parameter.grad, before[name][1]), name


def test_a_readout_of_ones_own_keeps_its_mode_and_buffers():
    torch.manual_seed(0)
    readout = nn.Sequential(nn.Flatten(0, 2), nn.BatchNorm1d(HIDDEN, affine=False), nn.Dropout(0.5))
    before = copy.deepcopy(readout.state_dict())
    inputs = torch.randn(TIME, BATCH, INPUTS)

    def loss(outputs, targets):
        return outputs.square().mean(-1).view(TIME, BATCH, -1)

    rnn, noise = nn.RNN(INPUTS, HIDDEN), torch.get_rng_state()
    diagnosis = diagnose(rnn, readout, inputs, None, loss, **SMALL)
    assert diagnosis.unseen is None
    assert readout.training
    assert readout[2].training
    assert all(torch.equal(value, readout.state_dict()[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), noise)


def figures(diagnosis):
    return [(row.perturbation, row.total.cosine, row.total.limit, row.split_half) for row in diagnosis.rows]


def test_equal_seeds_give_equal_results_whatever_torchs_generator():
    rnn, readout, inputs, targets = case()
    first = diagnose(rnn, readout, inputs, targets, **SMALL)
    torch.manual_seed(99)
    again = diagnose(rnn, readout, inputs, targets, **SMALL)
    other = diagnose(rnn, readout, inputs, targets, seed=1, **SMALL)
    assert repr(figures(first)) == repr(figures(again))
    assert first.advice == again.advice
    assert repr(figures(first)) != repr(figures(other))


def test_layouts_and_directions_agree():
    rnn, readout, inputs, targets = case()
    reference = diagnose(rnn, readout, inputs, targets, **SMALL)
    rnn.batch_first = True
    turned = diagnose(rnn, readout, inputs.transpose(0, 1), targets, **SMALL)
    assert repr(figures(turned)) == repr(figures(reference))
    rnn.batch_first = False
    lengths = torch.tensor([6, 2, 5, 1])
    padded = diagnose(rnn, readout, inputs, targets, lengths=lengths, **SMALL)
    packed = pack_padded_sequence(inputs, lengths, enforce_sorted=False)
    assert repr(figures(diagnose(rnn, readout, packed, targets, **SMALL))) == repr(figures(padded))
    assert repr(figures(padded)) != repr(figures(reference))
    both = diagnose(*case(bidirectional=True), **SMALL)
    assert both.best.total.cosine > 0.5


def test_a_loss_without_gradient_shows_variance_only():
    torch.manual_seed(0)
    rnn, readout = nn.RNN(INPUTS, 32), nn.Linear(32, 3)
    inputs, labels = torch.randn(TIME, 16, INPUTS), torch.randint(3, (TIME, 16))

    def errors(outputs, targets):
        return outputs.argmax(-1) != targets

    diagnosis = diagnose(
        rnn, readout, inputs, labels, errors, rollouts=(8, 64), sigmas=(1e-6, 0.1), discounts=(0, 1), progress=False
    )
    assert "differentiable" in diagnosis.unseen
    assert all(math.isnan(row.total.cosine) and math.isnan(row.total.limit) for row in diagnosis.rows)
    # The smallest noise changes no class: it gives no estimate and must not be recommended.
    assert diagnosis.recommendation.sigma > 1e-6
    assert diagnosis.recommendation.discount == 1
    assert diagnosis.best.total.agreement > 0
    assert "bias cannot be seen" in diagnosis.advice
    assert "There is none here" in diagnosis.table()

    def through_numpy(outputs, targets):
        return torch.from_numpy(abs(outputs.numpy()).mean(-1))

    assert "numpy" in diagnose(rnn, readout, inputs, None, through_numpy, **SMALL).unseen


def test_a_smooth_callable_is_compared_with_its_gradient():
    rnn, readout, inputs, targets = case()
    steps = targets.expand(TIME, BATCH, 2)
    own = diagnose(rnn, readout, inputs, steps, lambda outputs, wanted: (outputs - wanted).square().mean(-1), **SMALL)
    named = diagnose(rnn, readout, inputs, steps, "mse", **SMALL)
    assert own.unseen is None
    assert own.best.total.cosine == pytest.approx(named.best.total.cosine, abs=1e-3)


def test_a_setting_that_fails_is_a_row_without_figures():
    torch.manual_seed(0)
    rnn, readout = nn.RNN(INPUTS, HIDDEN, nonlinearity="relu"), nn.Linear(HIDDEN, 2)
    inputs, targets = torch.randn(TIME, BATCH, INPUTS), torch.randn(BATCH, 2)
    grid = SMALL | {"sigmas": (1e-3, 1e30)}
    diagnosis = diagnose(rnn, readout, inputs, targets, **grid)
    failed = [row for row in diagnosis.rows if row.perturbation.sigma == 1e30]
    assert failed
    assert all(row.error and math.isnan(row.total.cosine) for row in failed)
    assert diagnosis.recommendation.sigma == 1e-3
    assert diagnosis.table()
    with pytest.raises(RuntimeError, match="no setting of the grid"):
        diagnose(rnn, readout, inputs, targets, perturbation=Perturbation(sigma=1e30), **SMALL | {"sigmas": (1e30,)})


def test_lost_rollouts_of_every_seed_are_counted():
    rnn, readout, inputs, targets = case()
    clean = readout(rnn(inputs)[0])[..., :1].detach()

    def fragile(outputs, targets):
        lost = outputs[..., 0] > clean + 1.2e-3
        return torch.where(lost, math.nan, (outputs - targets).square().mean(-1))

    grid = {"methods": ("np",), "rollouts": (32,), "discounts": (1.0,), "sigmas": (1e-3,)}
    found = diagnose(rnn, readout, inputs, targets, fragile, **grid, repeats=3, seed=5, progress=False)
    (measured,) = (row for row in found.rows if row.perturbation.method == "np")
    lost = []
    for seed in torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(5)).tolist():
        drawn = {"perturbation": measured.perturbation, "generator": torch.Generator().manual_seed(seed)}
        lost.append(int(anpgpu.estimate_grad_(rnn, readout, inputs, targets, fragile, **drawn).skipped))
    assert all(lost)
    assert measured.skipped == sum(lost)


def row(method="anp", rollouts=16, discount=1.0, sigma=1e-3, cosine=0.5, limit=1.0, agreement=0.25):
    how = Perturbation(method, rollouts, sigma, discount=discount)
    total = Alignment(cosine, 1.0, limit, 0.01, agreement)
    return Row(how, total, {}, 0.1, 0, 1.0, cost_of(how, 64))


def test_the_cheapest_within_tolerance_is_recommended_and_the_larger_discount():
    dear, cheap, truncated = row(rollouts=64, cosine=0.9), row(cosine=0.86), row(cosine=0.87, discount=0.5)
    assert cheapest((dear, truncated, cheap), 0.05, None) is cheap
    assert cheapest((dear, truncated, cheap), 0.035, None) is truncated
    assert cheapest((dear, truncated, cheap), 0.0, None) is dear
    least = row("anp-ls", rollouts=16, cosine=0.87)
    assert cheapest((least, cheap), 0.05, None) is cheap
    # Without a true gradient bias is not seen, so that the setting without credit for the future looks best.
    assert (
        cheapest((row(discount=0, agreement=0.9), row(agreement=0.4)), 0.05, "no gradient").perturbation.discount == 1
    )


def test_sigmas_are_as_close_as_their_ratio():
    rows = [row(sigma=sigma) for sigma in (1e-3, 3e-2)]
    assert closest_sigma(rows, row(sigma=1e-2).perturbation, 0.05, None) is rows[1]


def test_the_closest_sigma_is_kept():
    rows = [row(sigma=sigma, cosine=cosine) for sigma, cosine in ((1e-4, 0.82), (1e-3, 0.80), (1e-1, 0.3))]
    assert closest_sigma(rows, rows[1].perturbation, 0.05, None) is rows[1]
    assert closest_sigma(rows, rows[2].perturbation, 0.05, None) is rows[1]
    assert closest_sigma(rows, rows[1].perturbation, 0.01, None) is rows[0]


@pytest.mark.parametrize(
    ("setting", "others", "said", "unsaid"),
    [
        (row(cosine=0.5, limit=1.0, agreement=0.25), (), r"variance: 32 rollouts would give about 0\.63", "bias"),
        (
            row(cosine=0.45, limit=0.5, agreement=0.9, discount=0.0),
            (row(cosine=0.4, limit=0.9),),
            r"bias, .*the discount is too small, at 1 the limit is 0\.90",
            "variance",
        ),
        (
            row(cosine=0.45, limit=0.5, agreement=0.9, sigma=1.0),
            (row(cosine=0.4, limit=0.9),),
            r"bias, .*sigma is too large, at 0\.001 the limit is 0\.90",
            "variance",
        ),
        (row(cosine=0.45, limit=0.5, agreement=0.9), (), "bias, .*it is anp's own", "variance"),
        (row(cosine=0.97, limit=0.99, agreement=0.96), (), r"cosine 0\.97, little is missing", "variance"),
        (row(cosine=0.1, limit=math.nan, agreement=-0.1), (), "variance; use more", "nan"),
    ],
)
def test_advice_is_one_sentence_that_tells_what_is_missing(setting, others, said, unsaid):
    text = advise((setting, *others), setting, setting, 0.05, None)
    assert re.search(said, text), text
    assert unsaid not in text
    assert text.endswith(".")
    assert ". " not in text
    assert "use anp-ls" in advise((setting, *others), setting, row("anp-ls"), 0.05, None)


def test_advice_predicts_nothing_for_a_setting_that_it_advises_against():
    current, best = row(cosine=0.5, limit=1.0, agreement=0.25), row("anp-ls", cosine=0.9, limit=1.0, agreement=0.81)
    text = advise((current, best), current, best, 0.05, None)
    assert "cosine 0.50, what is missing is variance; use anp-ls" in text
    assert "rollouts would give about 0.95" in text
    assert text.count("would give") == 1


def test_advice_warns_of_a_small_discount():
    short, full = row(discount=0.5, cosine=0.66), row(cosine=0.33)
    assert "diagnose again" in advise((short, full), full, short, 0.05, None)
    assert "diagnose again" not in advise((short, full), short, full, 0.05, None)
    assert "diagnose again" not in advise((row("wp", discount=0.5), full), full, row("wp", discount=0.5), 0.05, None)


def test_cost_counts_what_least_squares_adds():
    assert cost_of(Perturbation("anp", 32), 64) == cost_of(Perturbation("np", 32), 64) == 32
    # P = H: the Gram products cost as much as the rollouts, the factorisation a sixth of that.
    assert cost_of(Perturbation("anp-ls", 64), 64) == pytest.approx(64 * (2 + 1 / 6))
    assert cost_of(Perturbation("anp-ls", 16), 64) < 2 * cost_of(Perturbation("anp", 16), 64)


def test_the_table_has_every_row_and_marks_two():
    diagnosis = diagnose(*case(), **SMALL)
    lines = diagnosis.table().splitlines()
    body = lines[1 : 1 + len(diagnosis.rows)]
    assert lines[0].split()[:4] == ["method", "rollouts", "discount", "sigma"]
    assert all(line.split()[0] == entry.perturbation.method for line, entry in zip(body, diagnosis.rows, strict=True))
    assert [line for line in body if "<" in line] == [body[diagnosis.rows.index(diagnosis.best)]]
    assert [line for line in body if "*" in line] == [body[diagnosis.rows.index(diagnosis.current)]]
    assert lines[-1] == diagnosis.advice
    assert diagnosis.current.perturbation == Perturbation()
    settings = [entry.perturbation for entry in diagnosis.rows]
    # The default has a row of its own beside the grid's, which have a discount of 1 and another.
    assert len(set(settings)) == len(settings) == 1 + 1 + 12


def test_wp_has_no_discount_and_bptt_is_no_candidate():
    rnn, readout, inputs, targets = case()
    diagnosis = diagnose(rnn, readout, inputs, targets, **SMALL | {"methods": ("wp",)})
    assert sum(entry.perturbation.method == "wp" for entry in diagnosis.rows) == 2
    swapped = anpgpu.RNN(INPUTS, HIDDEN, perturbation=Perturbation("bptt", 3)).double()
    assert diagnose(swapped, readout, inputs, targets, **SMALL).current.perturbation == Perturbation(rollouts=3)


def test_the_plot_is_a_png_with_a_panel_per_method(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    diagnosis = diagnose(*case(), **SMALL)
    panels = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (panels.append(self.axes), original(self, *a, **k))[1])
    diagnosis.plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    titles = [axis.get_title() for axis in panels[0]]
    assert set(titles) >= {"anp", "anp-ls", "np"}
    texts = {text.get_text() for text in panels[0][titles.index("anp-ls")].texts}
    expected = {f"{entry.total.cosine:.2f}" for entry in diagnosis.rows if entry.perturbation.method == "anp-ls"}
    assert texts == expected


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    diagnosis = diagnose(*case(), **SMALL)
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"anpgpu\[plot\]"):
        diagnosis.plot(tmp_path / "one.png")


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"methods.*\(\)", {"methods": ()}),
        (ValueError, "methods.*'anp'", {"methods": "anp"}),
        (ValueError, "methods.*'bptt'", {"methods": ("anp", "bptt")}),
        (ValueError, "'nonsense'", {"methods": ("nonsense",)}),
        (TypeError, "methods.*got 7", {"methods": ("anp", 7)}),
        (ValueError, "rollouts.*16", {"rollouts": 16}),
        (ValueError, "rollouts.*0", {"rollouts": (4, 0)}),
        (ValueError, r"discount.*1\.5", {"discounts": (1.5,)}),
        (ValueError, r"sigma.*-1\.0", {"sigmas": (-1.0,)}),
        (ValueError, "repeats.*1", {"repeats": 1}),
        (TypeError, r"repeats.*2\.5", {"repeats": 2.5}),
        (ValueError, "tolerance.*1", {"tolerance": 1}),
        (ValueError, "seed.*-1", {"seed": -1}),
        (TypeError, "rnn.*LSTMCell", {"rnn": nn.LSTMCell(INPUTS, HIDDEN)}),
        (TypeError, "perturbation.*7", {"perturbation": 7}),
        (TypeError, "readout.*Sequential", {"readout": nn.Sequential()}),
        (ValueError, "targets.*shape", {"targets": torch.zeros(5)}),
        (ValueError, "nothing to diagnose", {"rnn": nn.RNN(INPUTS, HIDDEN).double().requires_grad_(False)}),
    ],
)
def test_bad_arguments_are_quoted(error, match, change):
    names = ("rnn", "readout", "inputs", "targets")
    with pytest.raises(error, match=match):
        diagnose(**dict(zip(names, case(), strict=True)) | SMALL | change)


def exclusive_or(generator):
    """Return bits, (12, 16, 1), and as classes the exclusive or of the bits one and two steps ago."""
    bits = torch.randint(2, (12, 16), generator=generator)
    targets = torch.full(bits.shape, -100)
    targets[2:] = bits[1:-1] ^ bits[:-2]
    return (2.0 * bits - 1).unsqueeze(-1), targets


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recommendation_at_the_first_weights_trains(seed):
    # The reduced form of profiling/study_diagnose.py. Guessing costs log 2 = .69 nats.
    torch.manual_seed(seed)
    rnn, readout = nn.RNN(1, 32), nn.Linear(32, 2)
    data = torch.Generator().manual_seed(100 + seed)
    noise = torch.Generator().manual_seed(200 + seed)
    how = diagnose(rnn, readout, *exclusive_or(data), "cross_entropy", progress=False).recommendation
    optimiser = torch.optim.Adam([*rnn.parameters(), *readout.parameters()], lr=3e-3)
    losses = []
    for _ in range(400):
        optimiser.zero_grad()
        inputs, targets = exclusive_or(data)
        estimate = anpgpu.estimate_grad_(
            rnn, readout, inputs, targets, "cross_entropy", perturbation=how, generator=noise
        )
        optimiser.step()
        losses.append(float(estimate.loss))
    assert losses[0] > 0.6
    assert sum(losses[-20:]) / 20 < 0.1, f"{how}: {losses[::40]}"
