"""`max_memory` bounds what an update needs beside its inputs, targets and outputs, however long the sequence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tolerances import TOLERANCES

import anpgpu

SCRIPT = """
import json, sys
import torch, anpgpu
from torch import nn

case = json.loads(sys.argv[1])
T, B, I, H, O = case["time"], case["batch"], 8, case["hidden"], 4
torch.manual_seed(0)
module = case.get("module", "RNN")
rnn, head = getattr(nn, module)(I, H), nn.Linear(H, O)


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(-1)


def estimate(inputs, targets, **options):
    how = anpgpu.Perturbation(case["method"], discount=0.9, warmup=1, **options)
    loss = absolute if case["loss"] == "callable" else case["loss"]
    return anpgpu.estimate_grad_(rnn, head, inputs, targets, loss, perturbation=how)


def peak():
    # Of this process alone; what getrusage says includes what its parent had.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def backward(inputs, **options):
    how = anpgpu.Perturbation(case["method"], discount=0.9, warmup=1, **options)
    network = getattr(anpgpu, module)(I, H, perturbation=how)
    network(inputs)[0].sum().backward()


inputs, targets = torch.randn(T, B, I), torch.randn(T, B, O)
if case["loss"] == "cross_entropy":
    targets = targets.argmax(-1)
by_autograd = case["loss"] == "autograd"
work = (lambda x, y, **options: backward(x, **options)) if by_autograd else estimate
work(inputs[:2], targets[:2], rollouts=2)
if case["run"]:
    work(inputs, targets, rollouts=case["rollouts"], max_memory=case["mebibytes"] << 20)
elif by_autograd:
    # What a backward pass may have beside: states, outputs, their gradient, pre-activations, adjoint and its halves; in
    # a gated cell those of each gate.
    clean = torch.ones({"RNN": 10, "GRU": 24, "LSTM": 34}[module], T, B, H)
else:
    outputs = torch.ones(T, B, O)
print(json.dumps(peak()))
"""


def peak_bytes(**case):
    env = {**os.environ, "PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(case)]
    # The checkout's root as the working folder would come before PYTHONPATH.
    folder = Path(__file__).parent
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_bounded(**case):
    used = peak_bytes(**case, run=True) - peak_bytes(**case, run=False)
    ratio = used / (case["mebibytes"] << 20)
    assert ratio <= TOLERANCES["memory"].bound, f"{used / 2**20:.0f} MiB, {ratio:.2f} of max_memory"
    return ratio


SMALL = {"batch": 4, "hidden": 128, "rollouts": 64, "mebibytes": 64}


@pytest.mark.parametrize("time", [500, 2000])
def test_memory_does_not_grow_with_the_sequence(time):
    # Stored whole, delta_a would be 64 and 256 MiB.
    assert_bounded(method="anp", loss="mse", time=time, **SMALL)


@pytest.mark.parametrize(
    ("method", "loss", "time"),
    [
        ("np", "mse", 2000),
        ("anp-ls", "mse", 500),
        ("anp-feedback", "mse", 500),
        ("wp", "mse", 500),
        ("anp", "callable", 1000),
    ],
)
def test_memory_of_every_method(method, loss, time):
    assert_bounded(method=method, loss=loss, time=time, **SMALL)


def test_memory_of_a_backward_pass():
    assert_bounded(method="anp", loss="autograd", time=1000, **SMALL)


@pytest.mark.parametrize("module", ["GRU", "LSTM"])
@pytest.mark.parametrize(
    ("method", "loss", "time"),
    [
        ("np", "mse", 1000),
        ("anp", "mse", 1000),
        ("anp-ls", "mse", 500),
        ("anp-feedback", "mse", 500),
        ("wp", "mse", 300),
        ("anp", "autograd", 500),
    ],
)
def test_memory_of_gated_cells(module, method, loss, time):
    assert_bounded(method=method, loss=loss, time=time, module=module, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "loss"),
    [
        *((method, "mse") for method in ("anp", "np", "anp-ls", "wp")),
        *((method, "autograd") for method in ("anp", "np", "anp-ls")),
        ("anp", "cross_entropy"),
        ("anp", "callable"),
    ],
)
def test_memory_of_every_method_at_a_hundred_times_the_length(method, loss):
    assert_bounded(method=method, loss=loss, time=20_000, **(SMALL | {"rollouts": 16}))


@pytest.mark.slow
@pytest.mark.parametrize("time", [2000, 20_000])
def test_memory_at_full_size(time):
    assert_bounded(method="anp", loss="mse", time=time, batch=8, hidden=256, rollouts=128, mebibytes=256)


def test_the_bound_is_one_that_undivided_work_breaks():
    # With room for everything: the peak that the tests above would see if max_memory were ignored.
    case = {**SMALL, "method": "anp", "loss": "mse", "time": 1000}
    used = peak_bytes(**{**case, "mebibytes": 4096}, run=True) - peak_bytes(**case, run=False)
    assert used > 1.5 * (case["mebibytes"] << 20)
