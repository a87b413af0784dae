"""Every example runs as a script, with small settings, and writes its plot."""

import csv
import itertools
import math
import re
import runpy
import sys
from pathlib import Path

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
    assert final["anp-ls"] < final["bptt"] + 0.2
