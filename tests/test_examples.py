"""Every example runs as a script, with small settings, and writes its plot."""

import csv
import importlib.machinery
import importlib.util
import itertools
import math
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import anpgpu

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SHARED = ["--updates", "2", "--rollouts", "2", "--hidden", "4"]
TRAINING = [*SHARED, "--batch", "2", "--methods", "anp", "bptt-1", "bptt"]
CASES = {
    "copy_memory": ([*TRAINING, "--delay", "2"], "copying-2.png"),
    "adding": ([*TRAINING, "--steps", "5"], "adding.png"),
    "mackey_glass": ([*TRAINING, "--steps", "10"], "mackey-glass-15.png"),
    "weather": ([*TRAINING, "--csv", "station.csv", "--steps", "12"], "weather-1h.png"),
    "long_sequence": ([*SHARED, "--steps", "200"], "long_sequence.png"),
    "blackbox_loss": ([*SHARED, "--batch", "2"], "blackbox_loss.png"),
    "swap_into_pytorch": ([*SHARED, "--batch", "2"], "swap_into_pytorch.png"),
    "tagger": ([*SHARED, "--seeds", "1"], "tagger.png"),
    "char_lm": ([*SHARED, "--batch", "2", "--steps", "5", "--sample", "5"], "char_lm.png"),
    "constraints": ([*SHARED, "--batch", "2", "--delay", "1"], "constraints.png"),
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return a function that runs an example in an empty folder and returns what it printed."""

    def of(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--quiet", "--output", "results"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return of


def station(path):
    names = ["WetBulbCelsius", "DryBulbCelsius", "DewPointCelsius", "RelativeHumidity", "StationPressure"]
    names += ["WindSpeed", "Visibility"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *names])
        for hour in range(4000):
            course = math.sin(2 * math.pi * hour / 24)
            writer.writerow([f"hour {hour}", *(course * (1 + number) + hour % 7 for number in range(len(names)))])


@pytest.mark.parametrize("name", CASES)
def test_example_runs_and_plots(name, run, tmp_path):
    if name == "weather":
        station(tmp_path / "station.csv")
    arguments, plot = CASES[name]
    assert run(name, *arguments).strip()
    assert (tmp_path / "results" / plot).stat().st_size > 1000


def test_digits_by_pixel_take_the_method_and_its_rollouts(run, tmp_path):
    small = ["--epochs", "1", "--batch", "512", "--hidden", "4", "--rollouts", "2", "--seeds", "1"]
    printed = run("digits", "--pixels", "--permuted", "--method", "anp-ls", *small)
    assert "anp-ls" in printed
    assert "bptt" in printed
    assert (tmp_path / "results" / "digits_permuted.png").exists()


def test_constraints_hold_while_the_loss_falls(run):
    printed = run("constraints", "--quick")
    rows = [re.split(r"  +", line) for line in printed.splitlines() if " yes: " in line or " NO: " in line]
    assert [row[0] for row in rows] == ["none", "dale", "sparse", "low rank", "leaky"]
    for _, first, last, holds in rows:
        assert float(last) < 0.99 * float(first)
        assert holds.startswith("yes: ")
    seen = {row[0]: row[3] for row in rows}
    assert seen["dale"] == "yes: 0 of 1024 weights have the wrong sign"
    assert re.fullmatch(r"yes: 0 of \d{3} absent connections are not zero", seen["sparse"])
    assert seen["low rank"] == "yes: rank 8 of 32"


@pytest.mark.parametrize("name", ["dale", "sparse", "low rank", "leaky"])
def test_a_broken_constraint_is_seen(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    example = runpy.run_path(str(EXAMPLES / "constraints.py"))
    torch.manual_seed(0)
    rnn = nn.RNN(3, 16)
    constraint = example["CONSTRAINTS"][name]
    constraint.impose(rnn)
    anpgpu.swap_(rnn)
    with torch.no_grad():
        assert constraint.check(rnn)[0]

    class Broken(nn.Module):
        def forward(self, weight):
            return weight.roll(1, 1) + 0.1 * torch.eye(len(weight))

    parametrize.register_parametrization(rnn, "weight_hh_l0", Broken())
    with torch.no_grad():
        assert not constraint.check(rnn)[0]


ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def images(path):
    """Write 40 + 20 images of 28 x 28; each digit lights a row of its own."""
    labels = np.arange(60) % 10
    shown = np.zeros((60, 28, 28), np.uint8)
    shown[np.arange(60), 2 * labels + 4] = 255
    values = (shown[:40], labels[:40], shown[40:], labels[40:])
    np.savez(path, **dict(zip(ARRAYS, values, strict=True)))


MNIST = ["--mnist", "digits.npz", "--epochs", "1", "--batch", "20", "--hidden", "4", "--rollouts", "2", "--seeds", "2"]


@pytest.mark.parametrize(
    ("side", "name", "shape", "rate"),
    [
        (None, "mnist", "28 steps of 28", "0.001"),
        (7, "mnist_7x7", "49 steps of 1", "0.001"),
        (14, "mnist_14x14", "196 steps of 1", "0.0002"),
    ],
)
def test_mnist_runs_by_rows_and_by_pixels(side, name, shape, rate, run, tmp_path):
    images(tmp_path / "digits.npz")
    printed = run("mnist", *MNIST, *(["--side", str(side)] if side else []))
    assert f"{shape}, H = 4, 40 images, Adam {rate}, " in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith(("anp-feedback ", "bptt "))] == [
        *("anp-feedback", "bptt") * 2,
        *("anp-feedback", "bptt"),
    ]
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 1000


@pytest.fixture
def mnist(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return runpy.run_path(str(EXAMPLES / "mnist.py"))


def test_mnists_images_are_scaled_and_averaged(mnist, tmp_path):
    images(tmp_path / "digits.npz")
    rows, pixels = (mnist["load"](tmp_path / "digits.npz", side) for side in (None, 14))
    assert (rows.train_inputs.shape, rows.test_inputs.shape) == ((40, 28, 28), (20, 28, 28))
    assert float(rows.train_inputs.mean()) == pytest.approx(0, abs=1e-5)
    assert float(rows.train_inputs.std()) == pytest.approx(1, rel=1e-5)
    assert rows.test_labels.tolist() == [*range(10)] * 2
    assert pixels.train_inputs.shape == (40, 196, 1)
    # The first row of two pixels by two that is lit belongs to digit 0, half of it dark.
    dark, lit = float(rows.train_inputs.min()), float(rows.train_inputs.max())
    assert float(pixels.train_inputs[0, 2 * 14, 0]) == pytest.approx((dark + lit) / 2)
    assert float(pixels.train_inputs[0, 3 * 14, 0]) == pytest.approx(dark)


@pytest.mark.parametrize(
    ("lacking", "arguments", "message"),
    [
        (None, [], "there is no file 'digits.npz': --mnist wants an .npz of numpy arrays train_images"),
        ({"test_labels"}, [], "'digits.npz' has no array test_labels; it has train_images"),
        ((), ["--side", "9"], "--side must divide the 28 x 28 pixels of an image, got 9"),
    ],
)
def test_mnist_says_what_is_wrong_with_its_file(lacking, arguments, message, run, tmp_path):
    if lacking is not None:
        images(tmp_path / "digits.npz")
        with np.load(tmp_path / "digits.npz") as file:
            kept = {name: file[name] for name in ARRAYS if name not in lacking}
        np.savez(tmp_path / "digits.npz", **kept)
    with pytest.raises(SystemExit) as stopped:
        run("mnist", *MNIST, *arguments)
    assert message in str(stopped.value)


def test_mnist_has_no_default_file(run, capsys):
    with pytest.raises(SystemExit):
        run("mnist")
    assert "--mnist" in capsys.readouterr().err


class Choice:
    """Stands for an environment of neurogym: the second input says whether action 1 or 2 is right at the end."""

    def __init__(self):
        self.unwrapped = self

    def seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def new_trial(self):
        steps, right = self.generator.integers(4, 7), self.generator.integers(1, 3)
        self.ob = np.ones((steps, 2))
        self.ob[:, 1] = 2 * right - 3
        self.gt = np.zeros(steps, int)
        self.gt[-2:] = right


@pytest.fixture
def neurogym(monkeypatch):
    """Put a module in the place of neurogym; return the names of the environments that were made."""
    made = []
    module = types.ModuleType("neurogym")
    module.__spec__ = importlib.machinery.ModuleSpec("neurogym", None)
    module.make = lambda name, **options: made.append(name) or Choice()
    monkeypatch.setitem(sys.modules, "neurogym", module)
    return made


@pytest.mark.parametrize("reward", [False, True])
def test_a_decision_is_learned_under_dales_law(reward, run, neurogym, tmp_path):
    arguments = ["--reward", "--rollouts", "16"] if reward else ["--rollouts", "4"]
    printed = run("neurogym_task", "--updates", "60", "--hidden", "16", "--lr", "1e-2", *arguments)
    assert set(neurogym) == {"PerceptualDecisionMaking-v0"}
    rows = dict(line.split(": ") for line in printed.splitlines() if " right, " in line)
    assert list(rows) == (["np"] if reward else ["anp-feedback", "bptt"])
    for row in rows.values():
        # Half of the trials are right by chance; of 500, at most 60 % with probability 1 - 4e-6.
        assert float(row.split("%")[0]) > 90
        assert row.endswith("of 500 new trials right, 0 weights break Dale's law")
    name = "neurogym_reward.png" if reward else "neurogym.png"
    assert (tmp_path / "results" / name).stat().st_size > 1000


def test_weights_that_break_dales_law_are_counted(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    example = runpy.run_path(str(EXAMPLES / "neurogym_task.py"))
    rnn, _ = example["network"](2, 3, 8)
    assert example["wrong_signs"](rnn) == 0
    signs = rnn.parametrizations.weight_hh_l0[0].sign
    excited = rnn.weight_hh_l0.detach() - 0.5 * torch.eye(8)
    assert torch.equal((excited > 0).all(0), signs > 0)
    signs[0] = -1
    rnn.parametrizations.weight_hh_l0[0].forward = lambda weight: weight.abs()
    assert example["wrong_signs"](rnn) == 8 * int((signs < 0).sum())


def test_without_neurogym_the_example_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        run("neurogym_task")
    assert "pip install 'anpgpu[neurogym]'" in str(stopped.value)


def test_weather_has_no_default_file(run, capsys):
    with pytest.raises(SystemExit):
        run("weather")
    assert "--csv" in capsys.readouterr().err


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return runpy.run_path(str(EXAMPLES / "char_lm.py"))


def test_the_character_model_reads_its_text_lane_by_lane(char_lm, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 70, encoding="utf-8")
    text = char_lm["read"](path)
    assert text.symbols == "abc"
    assert (len(text.train), len(text.valid)) == (189, 21)
    batches = char_lm["windows"](text.train, 2, 10)
    lanes = [[], []]
    for number in range(9):
        characters, following, goes_on = next(batches)
        assert characters.shape == following.shape == (10, 2)
        assert torch.equal(following, (characters + 1) % 3)
        assert goes_on == (number > 0)
        for lane, read in zip(lanes, characters.t().tolist(), strict=True):
            lane.extend(read)
    # 94 characters a lane: nine windows, each character after the one before, the second lane from the middle on.
    assert lanes == [text.train[:90].tolist(), text.train[94:184].tolist()]
    assert not next(batches)[2]
    with pytest.raises(ValueError, match="a text of 189 characters is too short for 40 lanes of 10 steps"):
        next(char_lm["windows"](text.train, 40, 10))


def test_the_character_model_counts_bits_and_draws_by_its_scores(char_lm):
    torch.manual_seed(0)
    text = char_lm["Text"]("ab", torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.int64))
    model = char_lm["CharacterModel"](2, 4)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    assert char_lm["bits"](model, text.valid) == pytest.approx(1)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 3 * math.log(2)]))
    # "b" has probability 8/9.
    assert char_lm["bits"](model, text.valid) == pytest.approx(math.log2(9 / 8))
    with torch.no_grad():
        model.head.bias[1] = 100
    assert char_lm["sample"](model, text, 5) == "bbbbb"


def test_the_character_model_carries_its_state(char_lm):
    text = char_lm["read"](None)
    torch.manual_seed(0)
    model = char_lm["CharacterModel"](len(text.symbols), 4)
    seen = []
    forward = type(model).forward

    def recorded(self, characters, state=None):
        scores, after = forward(self, characters, state)
        if self.training and torch.is_grad_enabled():
            seen.append((state, after))
        return scores, after

    type(model).forward = recorded
    try:
        char_lm["train"](text, char_lm["Options"](3, 4, 5, 2), anpgpu.swap_, quiet=True)
    finally:
        type(model).forward = forward
    assert seen[0][0] is None
    for (_, after), (before, _) in itertools.pairwise(seen):
        assert all(not value.requires_grad for value in before)
        assert all(map(torch.equal, before, after))


@pytest.mark.slow
def test_a_loss_without_a_derivative_is_learned(run):
    printed = run("blackbox_loss")
    first, last = (float(clause.split("%")[0].split()[-1]) for clause in printed.split(",")[:2])
    assert first > 40
    assert last < 10


@pytest.mark.slow
def test_a_swapped_model_learns_its_text(run):
    printed = run("swap_into_pytorch")
    final = {line.split()[0]: float(line.split()[4]) for line in printed.splitlines() if "nats" in line}
    assert final["anp-ls"] < 0.8
    assert final["bptt"] < 0.5


@pytest.mark.slow
def test_a_swapped_character_model_learns_its_text(run):
    printed = run("char_lm")
    final = {
        line.split(":")[0]: float(line.split()[1]) for line in printed.splitlines() if "bits per character" in line
    }
    assert final["bptt"] < 2.9
    assert final["anp-feedback"] < final["bptt"] + 0.2


@pytest.fixture
def cuda_graph(monkeypatch):
    """The example of CUDA graphs, as a module and as a script."""
    path = str(EXAMPLES / "cuda_graph.py")

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", ["cuda_graph.py", *arguments])
        runpy.run_path(path, run_name="__main__")

    return runpy.run_path(path), script


@pytest.mark.parametrize("way", ["graph", "compiled", "callable"])
def test_graphs_without_a_cuda_device_are_a_clear_error(way, cuda_graph, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cuda_graph[1]("--way", way)
    assert stopped.value.code == 2
    assert f"--way {way} needs a CUDA device, and there is none here: use --way eager" in capsys.readouterr().err


def test_the_step_of_the_graph_example_learns(cuda_graph, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    losses, _ = cuda_graph[0]["train"]("eager", 60, "cpu")
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    cuda_graph[1]("--way", "eager", "--updates", "3")
    assert re.fullmatch(r"eager: loss \d\.\d{3} -> \d\.\d{3}, \d+\.\d\d ms an update\n", capsys.readouterr().out)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graph", "compiled", "callable"])
def test_a_step_in_a_graph_learns(way, cuda_graph):
    losses, _ = cuda_graph[0]["train"](way, 60, "cuda")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
