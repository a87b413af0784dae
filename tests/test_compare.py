"""The peers make the same update as ours, a wrong peer is never timed, and the scripts write their result files."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anpgpu import functional
from anpgpu.runtime import ranges
from anpgpu.runtime.settings import new_seed

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "profiling"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    """Import a script of profiling/ by name, with its neighbours on the path."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def load(name):
        if name != "trace":
            return importlib.import_module(name)
        # The standard library has a module of that name.
        spec = importlib.util.spec_from_file_location("profiling_trace", SCRIPTS / "trace.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Run a script's main function on the CPU and return what it printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def main(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script(name).main()
        return capsys.readouterr().out

    return main


def run_shell(name, *arguments, path):
    """Run a shell script with a folder in front of PATH."""
    env = {**os.environ, "PATH": os.pathsep.join([str(path), os.environ["PATH"]]), "PYTHON": sys.executable}
    command = ["bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def relative_error(grads, exact):
    assert [grad.shape for grad in grads] == [grad.shape for grad in exact]
    return max(float((left - right).norm() / right.norm()) for left, right in zip(grads, exact, strict=True))


def exact_update(peers, task, seed=3):
    """Our gradients, and the noise they come from, in the task's type."""
    case = task.case
    grads = [grad.clone() for grad in peers.ours(task, torch.Generator().manual_seed(seed))]
    key = new_seed(CPU, torch.Generator().manual_seed(seed))
    shape = (case.time, case.batch, case.rollouts, case.hidden)
    return grads, functional.noise(key, shape, sigma=peers.SIGMA, dtype=task.inputs.dtype)


@pytest.mark.parametrize("name", ["eager torch", "torch.func.vmap"])
def test_a_peer_gives_our_gradients_from_the_same_noise(script, name):
    # In float64 the two agree to rounding: they compute the same terms.
    peers, cases = script("compare_peers"), script("cases")
    task = peers.task_of(cases.Case(7, 3, 6, 9, inputs=4, outputs=2), CPU, torch.float64)
    exact, noise = exact_update(peers, task)
    grads = peers.anp_update(task, peers.anp_peers(cuda=False)[name](), noise)
    assert relative_error(grads, exact) < 1e-12


def test_a_peer_draws_its_own_noise_of_the_same_size(script):
    peers, cases = script("compare_peers"), script("cases")
    task = peers.task_of(cases.Case(5, 2, 4096, 6, inputs=3, outputs=2), CPU)
    for name in ("eager torch", "torch.func.vmap"):
        rollouts = peers.anp_peers(cuda=False)[name]()
        torch.manual_seed(0)
        first = peers.anp_update(task, rollouts)
        second = peers.anp_update(task, rollouts)
        ours = [grad.clone() for grad in peers.ours(task)]
        assert not torch.equal(first[1], second[1])
        # 4,096 rollouts of 6 units: two independent estimates agree to about 1 / sqrt(4096 / 6).
        assert relative_error(first[:3], ours[:3]) < 0.25
        assert relative_error(first[3:], ours[3:]) < 1e-5


def test_the_baseline_is_true_backpropagation(script):
    peers, cases = script("compare_peers"), script("cases")
    task = peers.task_of(cases.Case(6, 2, 4, 5, inputs=3, outputs=2), CPU, torch.float64)
    grads = peers.bptt(task, "fp64")()
    rnn, readout = task.rnn, task.readout
    hidden, outputs = torch.zeros(2, 5, dtype=torch.float64), []
    for x in task.inputs:
        preact = x @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + hidden @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
        hidden = torch.tanh(preact)
        outputs.append(hidden @ readout.weight.T + readout.bias)
    loss = (torch.stack(outputs) - task.targets).square().mean()
    weights = [rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, readout.weight, readout.bias]
    assert relative_error(grads, torch.autograd.grad(loss, weights)) < 1e-12


def test_the_gate_refuses_a_wrong_peer(script, run, monkeypatch, tmp_path, capsys):
    compare, peers = script("compare"), script("compare_peers")
    right = peers.whole_step

    def wrong(*arguments):
        delta_a, delta_h, change = right(*arguments)
        return delta_a, delta_h, change * 1.01

    monkeypatch.setattr(peers, "whole_step", wrong)
    monkeypatch.setattr(compare, "time_case", lambda *_: pytest.fail("something was timed"))
    output = tmp_path / "compare.json"
    with pytest.raises(SystemExit, match="nothing is timed"):
        run("compare", "--quick", "--peers", "eager", "--no-memory", "--output", output)
    assert "eager torch against ours in float64 is 0.01" in capsys.readouterr().err
    assert not output.exists()


def test_compare_writes_equal_work_and_its_ratios(run, tmp_path):
    output = tmp_path / "compare.json"
    names = "ours,eager torch,torch.func.vmap,bptt,eggroll"
    run("compare", "--quick", "--repeats", 3, "--no-memory", "--peers", names, "--output", output)
    record = json.loads(output.read_text())
    rows = {row["peer"]: row for row in record["results"]}
    assert rows.keys() >= {"ours", "ours, loss.backward()", "eager torch", "torch.func.vmap", "BPTT, nn.RNN fp32"}
    assert len({(row["T"], row["B"], row["P"], row["H"]) for row in rows.values()}) == 1
    assert rows["ours"]["time / ours"] == rows["ours"]["our steps/s over its"] == 1
    for name, row in rows.items():
        assert 0 < row["lower"] <= row["ms"] <= row["upper"]
        assert row["time / ours"] > 0
        if name.startswith("BPTT"):
            assert row["rollout-steps/s"] is row["GFLOP/s"] is None
            continue
        steps = row["T"] * row["B"] * row["P"]
        assert row["rollout-steps/s"] == pytest.approx(steps / row["ms"] * 1e3)
        assert row["GFLOP/s"] == pytest.approx(2 * row["H"] ** 2 * row["rollout-steps/s"] / 1e9)
    # A peer that could not run is listed with the reason.
    missing = {failure["peer"]: failure["reason"] for failure in record["not_run"]}
    installed = importlib.util.find_spec("jax") is not None
    assert missing == ({} if installed else {"EGGROLL, JAX": "jax is not installed"})
    assert ("EGGROLL, JAX" in rows) == installed
    assert all(check["figure"] <= check["bound"] or check["at_least"] for check in record["checks"])
    text = output.with_suffix(".txt").read_text()
    assert str(record["machine"]["cpu"]) in text.splitlines()[0]
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", output.read_text() + text)
    assert str(ROOT) not in output.read_text() + text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_of_time_and_of_steps(script):
    compare, cases = script("compare"), script("cases")
    case = cases.Case(time=10, batch=2, rollouts=8, hidden=4)

    def peer(steps):
        return compare.Peer(lambda _: None, steps, lambda _: ())

    chosen = {"ours": peer(compare.rollout_steps), "other": peer(compare.one_rollout), "exact": peer(lambda _: None)}
    times = {"ours": [1.0, 2.0, 1.0], "other": [3.0, 6.0, 3.0], "exact": [0.5, 1.0, 0.5]}
    mine, other, exact = compare.rows_of("shape", case, chosen, times, {"ours": 2 << 20})
    assert (mine["rollout-steps/s"], other["rollout-steps/s"]) == (160, 20 / 3)
    # Three times as long for an eighth of the steps.
    assert (other["time / ours"], other["our steps/s over its"]) == (3, 24)
    assert (exact["time / ours"], exact["our steps/s over its"]) == (0.5, None)
    assert (mine["peak MiB"], other["peak MiB"]) == (2, None)


def test_compare_measures_peak_memory(script):
    compare, cases = script("compare"), script("cases")
    # delta_a alone is 64 MiB in float32; the eager peer writes it once and holds a step or two beside it. A process of
    # its own is needed: memory that other tests freed, but malloc kept, would be resident already and not count.
    case = cases.Case(time=64, batch=2, rollouts=512, hidden=256)
    peak = compare.peak("eager torch", case, compare.parser().parse_args(["--device", "cpu", "--threads", "1"]))
    assert 64 << 20 <= peak <= 96 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "tensorflow"), "no peer begins with 'tensorflow'"),
        (("--shapes", "huge"), "shapes must be of .*got huge"),
        (("--clock", "cpu", "--threads", "2"), "--clock cpu adds up the time of all threads"),
    ],
)
def test_compare_rejects_what_it_does_not_know(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run("compare", *arguments)
    assert re.search(message, capsys.readouterr().err)


def test_low_rank_evolution_matches_dense_members_or_says_what_is_missing(script):
    eggroll, peers, cases = script("compare_eggroll"), script("compare_peers"), script("cases")
    task = peers.task_of(cases.Case(4, 2, 6, 5, inputs=3, outputs=2), CPU)
    if eggroll.obstacle("cpu") is None:
        assert all(eggroll.error_against_dense(task, antithetic=choice) < 1e-3 for choice in (False, True))
    else:
        assert eggroll.obstacle("cpu") == "jax is not installed"


def test_dense_members_estimate_the_gradient(script):
    # The dense form, the reference of the low-rank form, is itself compared with backpropagation. 2,000 members for
    # 57 parameters leave an error of about sqrt(57 / 2000) = .17 of the norm.
    eggroll, peers, cases = script("compare_eggroll"), script("compare_peers"), script("cases")
    task = peers.task_of(cases.Case(3, 2, 4, 5, inputs=3, outputs=2), CPU, torch.float64)
    weights = eggroll.weights_of(task)
    random = np.random.default_rng(0)

    def factors(matrix):
        return random.normal(size=(2000, matrix.shape[0], 2)), random.normal(size=(2000, matrix.shape[1], 2))

    noise = eggroll.Noise(
        factors(weights.w_ih),
        factors(weights.w_hh),
        random.normal(size=(2000, 5)),
        factors(weights.w_o),
        random.normal(size=(2000, 2)),
    )
    gradients, _ = eggroll.dense_estimate(weights, noise, task.inputs.numpy(), task.targets.numpy(), 1e-3)
    exact = np.concatenate([gradient.numpy().ravel() for gradient in peers.bptt(task, "fp64")()])
    estimate = np.concatenate([np.ravel(gradient) for gradient in gradients])
    assert np.linalg.norm(estimate - exact) < 0.35 * np.linalg.norm(exact)


def test_roofline_names_the_unit_that_binds(script):
    roofline, cases, report = script("roofline"), script("cases"), script("report")
    case = cases.Case(time=10, batch=2, rollouts=8, hidden=16)
    flat = [report.Quartiles(rate, rate, rate) for rate in (1e9, 1e8, 1e6)]
    top = roofline.Ceilings({"fp32": flat[0]}, copy=flat[1], special=flat[2])
    row = roofline.row_of("rollout", case, report.Quartiles(4e-3, 4e-3, 4e-3), top, cuda=False)
    # 160 rollout-steps: 2 x 16^2 operations each; 16 units, a tanh and four bytes each; the clean rows besides.
    assert row["tensor ms"] == pytest.approx(1e3 * 160 * 512 / 1e9)
    assert row["special ms"] == pytest.approx(1e3 * 160 * 16 / 1e6)
    assert row["bandwidth ms"] == pytest.approx(1e3 * (160 * 16 * 4 + 3 * 20 * 16 * 4) / 1e8)
    assert row["binds"] == "special"
    assert row["of its bound"] == pytest.approx(2.56 / 4)


def test_roofline_measures_and_draws(run, tmp_path):
    output = tmp_path / "roofline.json"
    run("roofline", "--quick", "--repeats", 2, "--output", output)
    record = json.loads(output.read_text())
    assert all(rate[1] > 0 for rate in record["ceilings"]["products"].values())
    assert {row["kernel"] for row in record["results"]} >= {"noise", "rollout", "adjoint", "update"}
    assert all(row["binds"] in {"tensor", "special", "bandwidth"} for row in record["results"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_holds_our_ranges(run, tmp_path):
    output = tmp_path / "trace.json"
    printed = run("trace", "--case", "3,1,4,8", "--updates", 1, "--output", output)
    names = [event.get("name") for event in json.loads(output.read_text())["traceEvents"]]
    expected = ("estimate_grad_", "clean_run", "rollout", "returns", "adjoint", "weight_gradients")
    assert [names.count(f"anpgpu::{name}") for name in expected] == [1] * len(expected)
    assert all(name in printed for name in expected)


STAND_IN = '#!/bin/sh\nprintf "%s\\n" "$@" >> "{log}"\n'


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_nsight_is_asked_for_our_ranges_alone(tmp_path, tool):
    log = tmp_path / "log"
    stand_in = tmp_path / tool
    stand_in.write_text(STAND_IN.format(log=log))
    stand_in.chmod(0o755)
    first = "rollout" if tool == "ncu" else "name"
    done = run_shell(f"{tool}.sh", first, "--case", "4,1,4,8", path=tmp_path)
    assert done.returncode == 0, done.stderr
    words = log.read_text().splitlines()
    assert words[words.index("--case") + 1] == "4,1,4,8"
    assert "--capture" in words
    assert str(SCRIPTS / "trace.py") in words
    if tool == "nsys":
        assert {"--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--output=name"} <= set(words)
    else:
        domain, _, name = words[words.index("--nvtx-include") + 1].rstrip("/").partition("@")
        assert (domain, name) == (ranges.DOMAIN, "rollout")
        assert words[words.index("--clock-control") + 1] == "none"


def test_a_missing_tool_is_named(tmp_path):
    run = subprocess.run(
        ["/bin/bash", str(SCRIPTS / "ncu.sh"), "rollout"],
        env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "ncu.sh: Nsight Compute (ncu) is not on PATH" in run.stderr
