"""Two checkouts are timed in turns: equal code passes, slower code fails, and the bound allows for the run's noise."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "profiling"
ORDER = {"case": [3, 1, 2, 4], "method": "anp", "least_s": 0.0, "clock": "wall"}

# A stand-in for another version of anpgpu: it uses autograd, which passes the check of the estimate.
STAND_IN = """
from torch import nn

__version__ = "0.0.0"


class Perturbation:
    def __init__(self, method, **_settings):
        if method not in {"np", "anp"}:
            raise ValueError(f"method must be np or anp, got {method!r}")


class RNN(nn.RNN):
    def __init__(self, inputs, hidden, perturbation=None):
        super().__init__(inputs, hidden)


def estimate_grad_(rnn, readout, inputs, targets, *, perturbation=None, generator=None):
    nn.functional.mse_loss(readout(rnn(inputs)[0]), targets).backward()
"""


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with its folder on the path, which does not change this process's threads."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("compare_commits")


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Run the script's main function and return what it printed."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare_commits.py", *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return main


@pytest.fixture
def checkout(tmp_path):
    """A checkout of another anpgpu."""
    package = tmp_path / "other" / "anpgpu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "functional.py").write_text("")
    return package.parent


def taking(old, new, times):
    """Stand in for the processes: each returns the next of its checkout's times."""
    waiting = {old: iter(times[0]), new: iter(times[1])}

    def ask(path, _threads, order):
        if "check" in order:
            check = {"name": "cosine", "figure": 1.0, "bound": 0.9, "at_least": True}
            return {"version": "1.2.3", "check": check}
        return {"seconds": next(waiting[path])}

    return ask


def test_the_same_code_twice_is_not_slower(script, run, monkeypatch, tmp_path):
    # Measured in this process, since a fresh one takes seconds.
    monkeypatch.setattr(script, "ask", lambda _path, _threads, order: script.answer(order))
    output = tmp_path / "commits.json"
    printed = run(ROOT, "--quick", "--pairs", 3, "--bound", 10, "--output", output)
    record = json.loads(output.read_text())
    assert [row["method"] for row in record["results"]] == ["anp", "anp-ls"]
    for row, turns in zip(record["results"], record["seconds of old, new, old"], strict=True):
        assert [len(turn) for turn in turns] == [3, 3, 3]
        assert 0 < row["least"] <= row["new / old"] <= row["most"]
        assert 0 < row["A/A least"] <= row["A/A"] <= row["A/A most"]
        assert row["verdict"] == ""
    assert {"cpu", "threads", "versions", "date", "commit"} <= record["machine"].keys()
    assert record["old"] == record["new"]
    assert record["new"]["version"] == anpgpu.__version__
    assert len(record["checks"]) == 2
    text = output.with_suffix(".txt").read_text()
    assert text.strip() == printed.strip()
    assert str(record["machine"]["cpu"]) in text
    assert str(ROOT) not in output.read_text() + text


def test_slower_code_fails(script, run, monkeypatch, checkout, tmp_path):
    ask = taking(checkout, ROOT, ([0.100, 0.101, 0.100, 0.101], [0.107, 0.108]))
    monkeypatch.setattr(script, "ask", ask)
    output = tmp_path / "commits.json"
    with pytest.raises(SystemExit, match="slower: quick anp") as stopped:
        run(checkout, "--quick", "--methods", "anp", "--bound", script.BOUND, "--output", output)
    # sys.exit with text has exit status 1.
    assert isinstance(stopped.value.code, str)
    (row,) = json.loads(output.read_text())["results"]
    assert row["verdict"] == "SLOWER"
    assert row["new / old"] == pytest.approx(1.07, abs=0.01)
    assert "SLOWER" in output.with_suffix(".txt").read_text()


def test_a_slow_down_within_the_noise_of_the_run_passes(script, run, monkeypatch, checkout):
    ask = taking(checkout, ROOT, ([0.10, 0.11, 0.11, 0.10], [0.112, 0.112]))
    monkeypatch.setattr(script, "ask", ask)
    assert "1.07" in run(checkout, "--quick", "--methods", "anp", "--bound", script.BOUND)


@pytest.mark.parametrize(
    ("ratios", "same", "slower"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ([1.02, 1.02, 1.02], [1.0, 1.0, 1.0], False),
        ([1.05, 1.05, 1.05], [1.0, 1.0, 1.0], True),
        ([1.05, 1.05, 1.05], [0.99, 1.0, 1.02], True),
        ([1.05, 1.05, 1.05], [0.97, 1.0, 1.02], False),
        ([1.0, 1.0, 9.0], [1.0, 1.0, 1.0], False),
        ([0.5, 0.5, 0.5], [0.9, 1.0, 1.1], False),
    ],
)
def test_the_rule(script, ratios, same, slower):
    assert script.is_slower(ratios, same, script.BOUND) is slower


def test_a_steady_drift_of_the_machine_cancels(script):
    turns = [(1.0, 1.1, 1.21), (2.0, 2.2, 2.42)]
    row = script.row_of("drift", script.Case(1, 1, 1, 1), "anp", turns, script.BOUND)
    assert row["new / old"] == pytest.approx(1.0)
    assert row["A/A"] == pytest.approx(1.21)
    assert row["verdict"] == ""


def test_a_process_imports_the_checkout_it_is_given(script, checkout):
    description, check = script.described(checkout, 1)
    assert description == {"commit": None, "version": "0.0.0"}
    assert check.passed
    assert script.ask(checkout, 1, ORDER)["seconds"] > 0
    with pytest.raises(RuntimeError, match="got 'wp'"):
        script.ask(checkout, 1, ORDER | {"method": "wp"})


def test_another_anpgpu_than_the_checkouts_is_not_timed(run, checkout):
    with pytest.raises(RuntimeError, match=r"not from '.*other'"):
        run(checkout, "--measure", json.dumps(ORDER))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", 1), "at least 2, or there is no spread, got 1"),
        (("--clock", "cpu", "--threads", 2), "got 2"),
        (("--shapes", "tall"), "got tall"),
    ],
)
def test_wrong_arguments_are_quoted(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(ROOT, *arguments)
    assert message in capsys.readouterr().err


def test_a_folder_without_anpgpu_is_quoted(run, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--quick")
    assert f"got {str(tmp_path)!r}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_script_on_one_checkout_twice(tmp_path):
    output = tmp_path / "commits.json"
    how = ["--quick", "--threads", "1", "--clock", "cpu", "--bound", "10", "--output", str(output)]
    command = [sys.executable, str(SCRIPTS / "compare_commits.py"), str(ROOT), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [row["verdict"] for row in json.loads(output.read_text())["results"]] == ["", ""]
