"""`python -m anpgpu diagnose` with a network from a user's own file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anpgpu
from anpgpu.__main__ import load, main

SCRIPT = """
from typing import NamedTuple

import torch
from beside import HIDDEN


class Batch(NamedTuple):
    inputs: torch.Tensor


def case():
    torch.manual_seed(0)
    batch = Batch(torch.randn(5, 3, 2))
    return torch.nn.RNN(2, HIDDEN), torch.nn.Linear(HIDDEN, 4), batch.inputs, torch.tensor([0, 1, 3]), "cross_entropy"


def named():
    return dict(zip(("rnn", "readout", "inputs", "targets", "loss"), case()))


def short():
    return case()[:3]


def unknown():
    return named() | {"target": 1}


def number():
    return 7
"""
QUICK = ["--rollouts", "2", "--discounts", "1", "--sigmas", "1e-3", "--repeats", "2", "--quiet"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("HIDDEN = 6\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "model.py"
    sys.modules.pop("beside", None)


@pytest.mark.parametrize("function", ["case", "named"])
def test_command_prints_the_table_and_writes_the_plot(script, function, capsys):
    picture = script.with_suffix(".png")
    main(["diagnose", f"{script}:{function}", *QUICK, "--methods", "np", "--output", str(picture)])
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:2] == ["method", "rollouts"]
    assert "recommendation: Perturbation(method=" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert set(load(f"{script}:{function}")) == {"rnn", "readout", "inputs", "targets", "loss"}


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("model.py", "PATH:FUNCTION, got"),
        ("absent.py:case", r"no file '.*absent\.py'"),
        ("model.py:absent", "no function 'absent'"),
        ("model.py:Batch", "error:"),
        ("model.py:number", "got 7"),
        ("model.py:short", "must return a tuple of 4 or 5"),
        ("model.py:unknown", r"\['target'\]"),
    ],
)
def test_command_says_what_is_wrong(script, what, match, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", str(script.parent / what), *QUICK])
    assert stopped.value.code == 2
    assert re.search(match, capsys.readouterr().err)


def test_command_looks_at_the_folder_before_it_works(script, capsys):
    with pytest.raises(SystemExit):
        main(["diagnose", f"{script}:case", "--output", str(script.parent / "absent" / "one.png")])
    assert "absent" in capsys.readouterr().err


def test_command_runs_as_a_module_and_imports_no_matplotlib(tmp_path):
    root = Path(anpgpu.__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-X", "importtime", "-m", "anpgpu", "diagnose", "--help"]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "PATH:FUNCTION" in run.stdout
    assert "anpgpu.diagnosis.measure" in run.stderr
    assert "matplotlib" not in run.stderr
