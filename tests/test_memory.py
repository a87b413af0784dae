"""`max_memory` bounds what an update needs beside its inputs, targets and outputs, however long the sequence."""

import os
from pathlib import Path

import pytest
from forking import Forks
from tolerances import TOLERANCES

import anpgpu

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
PROCESSES = Forks(Path(__file__).with_name("memory_cases.py"), ENVIRONMENT)


def peak_bytes(**case):
    for _ in range(3):
        status, said, warned = PROCESSES.ask(case)
        assert status == 0, warned
        compiled, peak = map(int, said.split())
        if not compiled:
            break
    return peak


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
