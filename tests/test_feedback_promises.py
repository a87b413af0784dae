"""What learned feedback promises, on a small copying task: BPTT's direction from few rollouts, and soon again."""

import dataclasses

import pytest
import torch
from torch import nn

import anpgpu
from anpgpu import Perturbation
from anpgpu.runtime.memory import Division

SYMBOLS, DELAY, LENGTH, BATCH, UNITS = 4, 4, 12, 8, 32
HOW = Perturbation("anp-feedback", rollouts=4, warmup=0)


def batch(generator):
    """Symbols, (T, B, 4), and each symbol's own index DELAY steps later, (T, B)."""
    symbols = torch.randint(SYMBOLS, (LENGTH, BATCH), generator=generator)
    targets = torch.full((LENGTH, BATCH), -100)
    targets[DELAY:] = symbols[:-DELAY]
    return nn.functional.one_hot(symbols, SYMBOLS).float(), targets


class Shadow:
    """A network that BPTT trains, and estimates beside it, on the same weights and batches."""

    def __init__(self, how=HOW, seed=0, *, kind="RNN", hold=0.0, loss=None, **options):
        torch.manual_seed(seed)
        self.loss = loss or nn.functional.cross_entropy
        self.truth = getattr(nn, kind)(SYMBOLS, UNITS, **options)
        self.rnn = getattr(anpgpu, kind)(SYMBOLS, UNITS, perturbation=how, **options)
        with torch.no_grad():
            # Gates that hold, of a GRU or an LSTM.
            self.truth.bias_ih_l0[UNITS : 2 * UNITS] += hold
        self.head = nn.Linear(UNITS * (1 + self.truth.bidirectional), SYMBOLS)
        self.optimiser = torch.optim.Adam([*self.truth.parameters(), *self.head.parameters()], 1e-3)
        self.generator = torch.Generator().manual_seed(seed)

    def estimate(self, inputs, targets, **others):
        """By the module's backward pass."""
        outputs, _ = self.rnn(inputs)
        nn.functional.cross_entropy(self.head(outputs).flatten(0, 1), targets.flatten()).backward()

    def train(self, updates, estimate=None):
        """Return the cosine of each W_hh's gradient to BPTT's in the last update."""
        for _ in range(updates):
            inputs, targets = batch(self.generator)
            # In place: the steps of the weights, which the feedback matrix makes, too.
            with torch.no_grad():
                for mine, weight in zip(self.rnn.parameters(), self.truth.parameters(), strict=True):
                    mine.copy_(weight)
            self.rnn.zero_grad()
            (estimate or self.estimate)(inputs, targets)
            self.optimiser.zero_grad()
            outputs = self.head(self.truth(inputs)[0])
            self.loss(outputs.flatten(0, 1), targets.flatten()).backward()
            cosines = self.cosines()
            nn.utils.clip_grad_norm_(self.truth.parameters(), 1.0)
            self.optimiser.step()
        return cosines

    def cosines(self):
        pairs = zip(self.rnn.named_parameters(), self.truth.parameters(), strict=True)
        return [
            float(nn.functional.cosine_similarity(mine.grad.flatten(), truth.grad.flatten(), dim=0))
            for (name, mine), truth in pairs
            if "weight_hh" in name
        ]

    @property
    def matrix(self):
        """The matrix itself; `estimator_state` returns copies."""
        return vars(self.rnn)["_estimator_state"].layers[0].feedback


CELLS = {"RNN": {}, "GRU": {"kind": "GRU"}, "LSTM, gates that hold": {"kind": "LSTM", "hold": 3.0}}


@pytest.mark.parametrize("cell", CELLS)
def test_few_rollouts_come_near_bptt_where_least_squares_does_not(cell):
    (learned,) = Shadow(**CELLS[cell]).train(60)
    (least_squares,) = Shadow(Perturbation("anp-ls", rollouts=4), **CELLS[cell]).train(60)
    (known,) = Shadow(dataclasses.replace(HOW, prior="known"), **CELLS[cell]).train(60)
    assert learned > 0.97
    assert least_squares < 0.7
    assert least_squares < known < learned


def test_a_warm_up_brings_the_first_update_near():
    (cold,), (warm,) = (Shadow(dataclasses.replace(HOW, warmup=number)).train(1) for number in (0, 30))
    assert warm > max(0.8, cold + 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"nonlinearity": "relu"},
        {"num_layers": 2},
        {"bidirectional": True},
        {"kind": "GRU", "num_layers": 2},
        {"kind": "LSTM", "bidirectional": True},
    ],
    ids=["relu", "two layers", "two directions", "GRU, two layers", "LSTM, two directions"],
)
def test_every_layer_direction_and_nonlinearity_comes_near(options):
    assert min(Shadow(**options).train(100)) > 0.93


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_a_matrix_that_was_poisoned_is_good_again_two_updates_later(kind):
    shadow = Shadow(kind=kind)
    shadow.train(60)
    shadow.matrix.mul_(1e6)
    (cosine,) = shadow.train(2)
    assert cosine > 0.95
    assert float(shadow.matrix.norm()) < 10 * float(shadow.truth.weight_hh_l0.detach().norm())


def test_weights_that_are_redrawn_unseen_are_learnt_again_in_three_updates():
    shadow = Shadow(dataclasses.replace(HOW, follow_weights=False, rollouts=8))
    shadow.train(60)
    (before,) = shadow.train(1)
    with torch.no_grad():
        nn.init.orthogonal_(shadow.truth.weight_hh_l0)
    (after,) = shadow.train(4)
    assert before > 0.95
    assert after > 0.7


def per_step(outputs, targets):
    """Cross-entropy as a black box, (T, B, p)."""
    logits = torch.log_softmax(outputs, -1)
    index = targets.clamp(min=0).expand(outputs.shape[:-1]).unsqueeze(-1)
    return -torch.where(targets >= 0, logits.gather(-1, index).squeeze(-1), 0)


def per_sequence(outputs, targets):
    """The same, summed over time, (B, p)."""
    return per_step(outputs, targets).sum(0)


BLACK_BOXES = {
    "per step": (per_step, {}, 8),
    "per step, few rollouts": (per_step, {}, 3),
    "per step, two directions": (per_step, {"bidirectional": True}, 8),
    "per step, segments": (per_step, {}, 8),
    "per sequence": (per_sequence, {}, 64),
    "per step, GRU": (per_step, {"kind": "GRU"}, 8),
    "per step, LSTM in segments": (per_step, {"kind": "LSTM"}, 8),
}


@pytest.mark.parametrize("name", BLACK_BOXES)
def test_a_black_box_teaches_as_the_loss_itself_does(monkeypatch, name):
    loss, options, rollouts = BLACK_BOXES[name]
    if "segments" in name:
        monkeypatch.setattr("anpgpu.runtime.memory.divide", lambda *_: Division(BATCH, rollouts, 3))
    shadow = Shadow(dataclasses.replace(HOW, rollouts=rollouts, sigma=1e-2), **options)

    def estimate(inputs, targets):
        anpgpu.estimate_grad_(shadow.rnn, shadow.head, inputs, targets, loss, targets_per="step")

    assert min(shadow.train(60, estimate)) > (0.8 if "few" in name else 0.93)


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(4) + 1)])
@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_the_forward_only_face_learns_alike(loss, kind):
    shadow = Shadow(kind=kind, loss=None if isinstance(loss, str) else loss)

    def estimate(inputs, targets):
        anpgpu.estimate_grad_(shadow.rnn, shadow.head, inputs, targets, loss)

    (cosine,) = shadow.train(60, estimate)
    assert cosine > 0.97


def test_autocast_loses_nothing():
    shadow = Shadow()

    def estimate(inputs, targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shadow.estimate(inputs, targets)

    (cosine,) = shadow.train(60, estimate)
    assert cosine > 0.95


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_method_that_learns_is_measured_before_and_after_it_has_learnt(kind):
    torch.manual_seed(0)
    rnn, head = getattr(anpgpu, kind)(3, 16), nn.Linear(16, 3)
    inputs = torch.randn(12, 8, 3)
    grid = {"methods": ("anp-ls", "anp-feedback"), "rollouts": (4,), "discounts": (1,), "sigmas": (1e-3,), "repeats": 2}
    diagnosis = anpgpu.diagnose(rnn, head, inputs, inputs.roll(4, 0), progress=False, **grid)
    (row,) = [row for row in diagnosis.rows if row.perturbation.method == "anp-feedback"]
    numbers, cosines = zip(*row.learning, strict=True)
    assert numbers == (0, 20, 60)
    assert cosines[0] < cosines[1]
    assert row.total.cosine == cosines[2] > 0.97
    (plain,) = [row for row in diagnosis.rows if row.perturbation == dataclasses.replace(Perturbation(), rollouts=4)]
    assert plain.learning == ()
    assert row.total.cosine > plain.total.cosine
    told = ", ".join(f"{cosine:.2f}" for cosine in cosines)
    assert f"cosine {told} after 0, 20, 60 updates of this batch" in diagnosis.table()
    # On copies: the network has learnt nothing, and the same seed gives the same figures.
    assert anpgpu.estimator_state(rnn) == {}
    again = anpgpu.diagnose(rnn, head, inputs, inputs.roll(4, 0), progress=False, **grid)
    assert [row.total.cosine for row in again.rows] == [row.total.cosine for row in diagnosis.rows]
