"""The study's benchmarks show what they say they show, keep their parts apart, and ask for files that are missing."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "profiling"))

import study_tasks  # noqa: E402  (found through the line above)
import study_tasks_neurogym  # noqa: E402
from study_grid import tasks  # noqa: E402

needs_neurogym = pytest.mark.skipif(
    importlib.util.find_spec("neurogym") is None, reason="neurogym, which wants versions of its own, is not installed"
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images, labels = data.images.astype(np.uint8), data.target.astype(np.uint8)
    return dict(zip(study_tasks.ARRAYS, (images[:1500], labels[:1500], images[1500:], labels[1500:]), strict=True))


def images_of(batch, side):
    return batch.inputs.transpose(0, 1).reshape(-1, side, side)


def test_images_are_shown_by_row_by_pixel_and_averaged(digits):
    scaled = torch.from_numpy(digits["test_images"]).float()
    scaled = (scaled - digits["train_images"].mean()) / digits["train_images"].std()
    rows = study_tasks.images("rows", digits, side=8, rows=True)
    assert rows.test.inputs.shape == (8, 297, 8)
    torch.testing.assert_close(images_of(rows.test, 8), scaled)
    # The second step of the first image is its second row.
    torch.testing.assert_close(rows.test.inputs[1, 0], scaled[0, 1])
    pixels = study_tasks.images("pixels", digits, side=4)
    assert pixels.test.inputs.shape == (16, 297, 1)
    assert pixels.test.inputs[1, 0, 0].item() == pytest.approx(float(scaled[0, :2, 2:4].mean()), rel=1e-5)
    assert rows.test.targets.tolist() == digits["test_labels"].tolist()
    assert (rows.chance, rows.solved) == (math.log(10), math.log(10) / 2)
    with pytest.raises(ValueError, match="3 must divide 8"):
        study_tasks.images("pixels", digits, side=3)


def test_permuted_images_are_the_same_pixels_in_one_order(digits):
    plain, permuted = (study_tasks.images(f"x{suffix}", digits, side=8) for suffix in ("", "-permuted"))
    assert not torch.equal(plain.test.inputs, permuted.test.inputs)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.test.inputs[order], permuted.test.inputs)


def test_test_images_of_many_steps_are_fewer(digits, monkeypatch):
    monkeypatch.setattr(study_tasks, "MOST_STEPS_SEEN", 640)
    by_pixel, by_row = (study_tasks.images("x", digits, side=8, rows=rows) for rows in (False, True))
    assert by_pixel.test.inputs.shape == (64, 10, 1)
    assert by_row.test.inputs.shape == (8, 80, 8)
    assert by_pixel.test.targets.tolist() == digits["test_labels"][:10].tolist()


def test_an_epoch_shows_every_training_image_once_and_no_other(digits):
    task = study_tasks.images("rows", digits, side=8, rows=True)
    batches = list(itertools.islice(task.batches(0, 50), 27))
    assert [len(batch.targets) for batch in batches] == [50] * 27
    seen = [tuple(image.flatten().tolist()) for batch in batches for image in images_of(batch, 8)]
    held = {tuple(image.flatten().tolist()) for image in images_of(task.valid, 8)}
    assert len(seen) == 1350
    assert len(held) == 150
    assert not set(seen) & held
    again, other = (next(task.batches(seed, 50)) for seed in (0, 1))
    assert torch.equal(again.inputs, batches[0].inputs)
    assert not torch.equal(other.inputs, batches[0].inputs)


def test_mackey_glass_follows_its_equation():
    values = study_tasks.mackey_glass(3, 400, 0)
    now, then, delayed = values[:, 16:-1], values[:, 17:], values[:, :-17]
    np.testing.assert_allclose(then, now + 0.2 * delayed / (1 + delayed**10) - 0.1 * now, rtol=1e-12)
    assert not np.allclose(values[0], values[1])
    assert 0.2 < values.min() < values.max() < 1.5


def test_lorenz_follows_its_equation(monkeypatch):
    # From a known state: two Euler steps of .01 by hand, of which every second is seen.
    monkeypatch.setattr(np.random, "default_rng", lambda _: type("Zero", (), {"standard_normal": np.zeros})())
    x = y = z = 1.0
    path = []
    for _ in range(106):
        x, y, z = x + 0.1 * (y - x), y + 0.01 * (x * (28 - z) - y), z + 0.01 * (x * y - 8 / 3 * z)
        path.append(x)
    np.testing.assert_allclose(study_tasks.lorenz(1, 3, 0)[0], path[100::2], rtol=1e-12)


def test_a_series_is_shown_once_and_its_state_set_back():
    task = study_tasks.series("lorenz", study_tasks.lorenz, 25)
    batches = list(itertools.islice(task.batches(5, 3), 20))
    assert [batch.continued for batch in batches[:9]] == [False, *[True] * 7, False]
    shown = torch.cat([batch.inputs for batch in batches])
    asked = torch.cat([batch.targets for batch in batches])
    assert shown.shape == (500, 3, 1)
    assert torch.equal(shown[1:], asked[:-1])
    one_by_one = study_tasks.series("lorenz", study_tasks.lorenz, 1)
    singles = list(itertools.islice(one_by_one.batches(5, 3), 202))
    assert torch.equal(torch.cat([batch.inputs for batch in singles]), shown[:202])
    assert [step for step, batch in enumerate(singles) if not batch.continued] == [0, 200]
    # The whole lane, its first 64 steps included, has mean 0 and variance 1.
    values = study_tasks.lorenz(3, 64 + 20_001, 5)
    scaled = (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(shown[..., 0].t(), scaled[:, 64:564], rtol=1e-4, atol=1e-6)
    assert task.test.inputs.shape == (200, 80, 1)
    assert torch.equal(task.test.inputs[1:], task.test.targets[:-1])
    with pytest.raises(ValueError, match="window of 7 steps"):
        study_tasks.series("lorenz", study_tasks.lorenz, 7)


def test_a_series_has_guesses_that_need_no_network():
    def waves(lanes, steps, seed):
        # An oscillation of any phase obeys x_t = 2 cos(.1) x_{t-1} - x_{t-2}.
        phases = np.random.default_rng(seed).random((lanes, 1))
        return np.sin(0.1 * np.arange(steps) + 6 * phases)

    task = study_tasks.series("waves", waves, 25)
    scores = task.baselines()
    # Of variance 1: E (x_t - x_{t-1})^2 = 2 - 2 cos(.1).
    assert scores["persistence"].loss == pytest.approx(2 - 2 * math.cos(0.1), rel=0.01)
    assert scores["linear"].loss < 1e-6
    assert (task.chance, task.solved) == (scores["persistence"].loss, scores["persistence"].loss / 2)


def test_characters_are_asked_for_one_step_ahead(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcd" * 1500)
    task = study_tasks.characters(path, steps=10, lanes=4)
    batches = list(itertools.islice(task.batches(0, 6), 200))
    for before, after in itertools.pairwise(batches):
        assert torch.equal(before.inputs.argmax(-1)[1:], before.targets[:-1])
        if after.continued:
            assert torch.equal(after.inputs.argmax(-1)[0], before.targets[-1])
    # A lane of 899 characters holds 89 windows of 10, wherever within ten the first one begins.
    assert [number for number, batch in enumerate(batches) if not batch.continued][:2] == [0, 89]
    assert (batches[0].targets == (batches[0].inputs.argmax(-1) + 1) % 4).all()
    scores = task.baselines()
    assert scores["guessing"].loss == pytest.approx(math.log(4), rel=1e-3)
    # 1,350 pairs each, and one more of all 16: (1351 / 1354) of the next letter's share.
    assert scores["memoryless"].loss == pytest.approx(-math.log(1351 / 1354), rel=0.01)
    assert (task.chance, task.solved) == (scores["guessing"].loss, scores["memoryless"].loss)
    path.write_text("abcd" * 20)
    with pytest.raises(ValueError, match="80 characters are too few"):
        study_tasks.characters(path)


def test_a_missing_file_says_what_to_pass_and_where_it_comes_from(tmp_path):
    makers = study_tasks.by_name(None, tmp_path / "book.txt")
    with pytest.raises(FileNotFoundError, match=r"nothing was passed: pass --mnist PATH, an .npz .*torchvision"):
        makers["mnist-rows"](0)
    with pytest.raises(FileNotFoundError, match=r"no file '.*book.txt': pass --text PATH, .*gutenberg"):
        makers["characters"](0)
    np.savez(tmp_path / "other.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"no array train_images, .*; it has x_train"):
        study_tasks.arrays_of(tmp_path / "other.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, said in (("one.npy", "holds one array"), ("text.npz", "is no .npz of numpy")):
        with pytest.raises(ValueError, match=rf"{name}' {said}: pass --mnist PATH, an .npz .*torchvision"):
            study_tasks.arrays_of(tmp_path / name)


def test_names_are_those_of_the_tasks(digits, tmp_path):
    np.savez(tmp_path / "digits.npz", **digits)
    makers = study_tasks.by_name(tmp_path / "digits.npz", None)
    for name in ("copying-10", "copying-40", "copying-100", "adding-50", "adding-100", "mackey-glass", "lorenz"):
        task = makers[name](25)
        assert task.name == name
        assert task.solved == task.chance / 2
    assert makers["adding-100"](0).test.inputs.shape[0] == 100
    assert makers["copying-40"](0).chance == makers["copying-40"](0).baselines()["memoryless"].loss
    with pytest.raises(ValueError, match="8 x 8 images cannot be averaged to 7 x 7"):
        makers["mnist-7x7-permuted"](0)


def test_trials_are_padded_and_scored_at_their_last_decision():
    observations = [np.ones((3, 2), np.float32), 2 * np.ones((5, 2), np.float32)]
    batch = study_tasks_neurogym.padded(list(zip(observations, ([0, 0, 2], [0, 0, 0, 1, 1]), strict=True)))
    assert batch.inputs[..., 0].t().tolist() == [[1, 1, 1, 0, 0], [2, 2, 2, 2, 2]]
    none = tasks.IGNORED
    assert batch.targets.t().tolist() == [[none, none, 2, none, none], [none, none, none, 1, 1]]
    outputs = torch.zeros(5, 2, 3)
    outputs[2, 0, 2] = outputs[4, 1, 1] = 1.0
    assert study_tasks_neurogym.decided(outputs, batch.targets) == 1.0
    outputs[3, 1, 2] = 1.0
    assert study_tasks_neurogym.decided(outputs, batch.targets) == 1.0
    outputs[4, 1, 2] = 2.0
    assert study_tasks_neurogym.decided(outputs, batch.targets) == 0.5


def test_reward_is_the_probability_of_the_right_choice():
    none = tasks.IGNORED
    targets = torch.tensor([[none, none], [none, 1], [2, 1]]).unsqueeze(-1)
    outputs = torch.zeros(3, 2, 1, 3)
    outputs[2, 1, 0, 1] = math.log(2)
    # One third; and the mean of one third and 2 / (2 + 1 + 1).
    expected = [[-1 / 3], [-(1 / 3 + 1 / 2) / 2]]
    torch.testing.assert_close(study_tasks_neurogym.expected_reward(outputs, targets), torch.tensor(expected))


@needs_neurogym
@pytest.mark.parametrize("name", study_tasks_neurogym.ENVIRONMENTS)
def test_neurogyms_trials_repeat_with_the_seed(name):
    task = study_tasks_neurogym.by_name()[name](0)
    first, again, other = (next(task.batches(seed, 4)) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert first.inputs.shape != other.inputs.shape or not torch.equal(first.inputs, other.inputs)
    assert set(task.test.targets.unique().tolist()) == {tasks.IGNORED, 1, 2}
    assert (task.reward is not None) == (name == "perceptual-reward")
    outputs = torch.nn.functional.one_hot(task.test.targets.clamp_min(0), task.outputs).float()
    assert task.score(outputs, task.test.targets).accuracy == 1.0


@needs_neurogym
def test_a_cue_says_which_feature_decides():
    task = study_tasks_neurogym.by_name()["context-decision"](0)
    inputs, targets, _ = next(task.batches(0, 512))
    valid = inputs[..., 0].cumsum(0) > 0
    cues = inputs[..., 5:]
    assert cues.shape[-1] == 2
    # Fixation is shown before the decision, the cue throughout.
    assert (cues[valid & (inputs[..., 0] > 0)].sum(-1) == 1).all()
    cued, right = cues[0].argmax(-1), targets.max(0).values
    evidence = torch.stack((inputs[..., 1] - inputs[..., 2], inputs[..., 3] - inputs[..., 4]), -1).sum(0)
    for cue in (0, 1):
        chosen = 1 + (evidence[cued == cue] < 0).long()
        shares = [float((chosen[:, feature] == right[cued == cue]).float().mean()) for feature in (0, 1)]
        # Among 256 trials or so; the other feature is right by chance, in more than 62 % with probability 1e-4.
        assert shares[cue] > 0.8
        assert 0.38 < shares[1 - cue] < 0.62


def test_without_neurogym_there_are_none_of_its_tasks(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert study_tasks_neurogym.by_name() == {}
    assert "pip install 'anpgpu[neurogym]'" in study_tasks_neurogym.ABSENT
