"""The profiling scripts check before they time and write complete results; only the order of speeds is tested."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forking import scripts

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "profiling"
RUNS = scripts(anpgpu)

# A stand-in with the published code's interface and work: one clean and one perturbed run, then T weight updates.
STAND_IN_MODELS = """
import torch


class RNN(torch.nn.Module):
    def __init__(self, net_structure, batch_size, act_func, act_func_out, decor_input=True, seed=42, device=None):
        super().__init__()
        inputs, hidden, outputs = net_structure
        self.sizes, self.act_func, self.act_func_out = (batch_size, hidden), act_func, act_func_out
        self.fwd = torch.nn.Linear(inputs, hidden, bias=False)
        self.rec = torch.nn.Linear(hidden, hidden, bias=False)
        self.out = torch.nn.Linear(hidden, outputs, bias=False)

    def run(self, input_sequence, targets, loss, noise_std):
        state = torch.zeros(self.sizes)
        states, before, losses = [state], [], []
        for t in range(len(input_sequence)):
            preact = self.fwd(input_sequence[t]) + self.rec(state)
            preact = preact + torch.randn_like(preact) * noise_std
            state = self.act_func(preact)
            before.append(preact)
            states.append(state)
            losses.append(loss(targets[t], self.act_func_out(self.out(state))))
        return states, before, losses

    @torch.no_grad()
    def node_perturbation_activity(self, input_sequence, targets, loss, lr, noise_std=1e-5, decorrelation_prof=False):
        states, clean, losses = self.run(input_sequence, targets, loss, 0.0)
        _, noisy, noisy_losses = self.run(input_sequence, targets, loss, noise_std)
        for t in range(len(clean)):
            delta_a = noisy[t] - clean[t]
            credit = lr * (noisy_losses[t] - losses[t]) / delta_a.square().sum()
            self.rec.weight.data = self.rec.weight.data - (credit * delta_a).t() @ states[t]
            self.fwd.weight.data = self.fwd.weight.data - (credit * delta_a).t() @ input_sequence[t]
"""
STAND_IN_UTILS = """
import torch
import yaml


def tanh():
    return torch.tanh


def linear():
    return lambda values: values
"""


def run_script(name, *arguments):
    """Run a script of profiling/ on one thread, without a GPU, and return what it printed."""
    status, said, warned = RUNS.ask(str(ROOT), str(SCRIPTS / name), [*map(str, arguments)], False, timeout=300)
    assert status == 0, warned
    return said


def read(path, printed):
    """Check the machine line, the checks and the text of a result file; return its contents."""
    record = json.loads(path.read_text())
    assert {"cpu", "cores", "threads", "gpu", "versions", "date", "commit"} <= record["machine"].keys()
    assert {"python", "torch", "numpy"} <= record["machine"]["versions"].keys()
    assert record["checks"]
    text = path.with_suffix(".txt").read_text()
    assert str(record["machine"]["cpu"]) in text.splitlines()[0]
    assert text.splitlines()[0] in printed
    assert os.uname().nodename not in path.read_text() + text
    assert str(ROOT) not in path.read_text() + text
    return record


def test_published_compares_with_a_stand_in(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "models.py").write_text(STAND_IN_MODELS)
    (checkout / "utils.py").write_text(STAND_IN_UTILS)
    output = tmp_path / "published.json"
    # Processor time of one thread, so that other programs do not change the order.
    how = ("--quick", "--threads", 1, "--clock", "cpu", "--repeats", 3)
    printed = run_script("compare_published.py", checkout, *how, "--output", output)
    (result,) = read(output, printed)["results"]
    works = {"published", "estimate_grad_", "loss.backward()", "matmuls"}
    assert result["milliseconds"].keys() == works
    assert result["rollout_steps_per_second"].keys() == works
    for low, median, high in (*result["milliseconds"].values(), result["ratio"], result["matmul_share"]):
        assert 0 < low <= median <= high
    speeds = {name: median for name, (_, median, _) in result["rollout_steps_per_second"].items()}
    assert speeds["published"] < speeds["estimate_grad_"] < speeds["matmuls"]
    assert result["ratio_met"] == (result["ratio"][1] >= result["ratio_goal"])


def test_published_says_what_is_missing(tmp_path):
    with pytest.raises(AssertionError, match=r"models\.py does not exist"):
        run_script("compare_published.py", tmp_path, "--quick")


def test_memory_keeps_its_bound_at_any_length(tmp_path):
    output = tmp_path / "memory.json"
    rows = read(output, run_script("memory.py", "--quick", "--threads", 1, "--output", output))["results"]
    assert len({row["T"] for row in rows}) == len(rows) > 1
    for row in rows:
        assert 0 < row["used MiB"] <= row["bound"] * row["max_memory MiB"]
        assert row["kept"]
    # The longest sequence would not fit undivided.
    assert rows[-1]["delta_a whole MiB"] > rows[-1]["max_memory MiB"]


def test_goals_writes_every_row(tmp_path):
    output = tmp_path / "goals.json"
    printed = run_script("goals.py", "--output", output)
    assert "no GPU was found" in printed
    record = read(output, printed)
    assert record["left_out"] == []
    assert [row["update"] for row in record["results"]] == ["anp", "anp-ls", "BPTT, nn.RNN fp32"]
    for row in record["results"]:
        assert row["ms"] > 0
        assert row["goal"] is None


def test_goals_says_what_it_left_out(tmp_path):
    output = tmp_path / "goals.json"
    with pytest.raises(AssertionError, match="left out: 1 of 1 shapes: 0 minutes were over"):
        run_script("goals.py", "--minutes", 0, "--output", output)


def test_check_gpu_says_what_failed(tmp_path):
    tests, output = tmp_path / "test_three.py", tmp_path / "tests.json"
    tests.write_text(
        "def test_right(): assert True\n"
        "def test_wrong(): assert 1 + 1 == 3\n"
        "def test_compute_sanitizer(): assert True\n"
    )
    with pytest.raises(AssertionError):
        run_script("check_gpu.py", "--jobs", 1, "--output", output, tests)
    record = json.loads(output.read_text())
    assert record["status"] == 1
    assert sorted(test["outcome"] for test in record["tests"]) == ["failed", "passed", "passed"]
    text = output.with_suffix(".txt").read_text()
    assert str(record["machine"]["cpu"]) in text.splitlines()[0]
    assert "2 passed, 1 failed" in text
    assert "test_wrong: assert (1 + 1) == 3" in text
    assert "1 of them under compute-sanitizer" in text


def test_time_ops_writes_every_row(tmp_path):
    output = tmp_path / "time_ops.json"
    printed = run_script("time_ops.py", "--quick", "--output", output)
    assert "no GPU was found" in printed
    record = read(output, printed)
    assert record["form"] == "cpu"
    assert record["not_run"] == []
    for hidden in {row["H"] for row in record["results"]}:
        rows = {row["op"]: row for row in record["results"] if row["H"] == hidden}
        assert {"noise", "rollout", "adjoint", "update", "eager torch", "BPTT of the same B"} <= rows.keys()
        for row in rows.values():
            assert 0 < row["lower"] <= row["ms"] <= row["upper"]
        for name in ("rollout", "update", "eager torch"):
            row = rows[name]
            steps = row["T"] * row["B"] * row["P"]
            assert row["rollout-steps/s"] == pytest.approx(steps / row["ms"] * 1e3)
            assert row["TFLOP/s"] == pytest.approx(2 * hidden**2 * steps / row["ms"] / 1e9)
            assert row["of ceiling"] == pytest.approx(row["TFLOP/s"] / record["ceiling"]["tflops"][1])


def test_diagnose_trains_what_was_recommended(tmp_path):
    output = tmp_path / "diagnose.json"
    rows = read(output, run_script("study_diagnose.py", "--quick", "--quiet", "--output", output))["results"]
    assert {row["task"] for row in rows} == {"adding", "xor"}
    for row in rows:
        assert row["setting"].startswith(row["perturbation"]["method"])
        assert all(row[method] > 0 for method in ("bptt", "recommended", "default"))
        assert all(-1 <= row[f"cosine {when}"] <= 1 for when in ("start", "half", "end"))


@pytest.mark.parametrize("figure", ["0.5", "float('nan')"])
def test_a_failed_check_stops_before_anything_is_timed(figure):
    source = f"import gate; gate.require([gate.Check('cosine', {figure}, 0.9, True)]); print('timed')"
    paths = os.pathsep.join([str(Path(anpgpu.__file__).resolve().parent.parent), str(SCRIPTS)])
    run = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "timed" not in run.stdout
    assert "cosine is" in run.stderr


def test_decorrelation_answers_both_questions(tmp_path):
    output = tmp_path / "decorrelation.json"
    how = ("--methods", "anp", "--seeds", 1, "--updates", 3, "--rates", 0.2, "--checkpoints", 5, 20)
    record = read(output, run_script("study_decorrelation.py", *how, "--output", output))
    assert [row["updates"] for row in record["fixed weights"]] == [5, 20]
    for row in record["fixed weights"]:
        assert row["lowered"] == pytest.approx(row["corr^2 of h"] / row["corr^2 of D h"])
    plain, with_matrix = record["trained"]
    assert plain["corr^2 of h"] == plain["corr^2 of D h"]
    assert with_matrix["power of D h / h"] < 1
    assert record["says"][0].startswith("anp: decorrelation ")
    assert output.with_suffix(".png").stat().st_size > 0


def test_defaults_orders_the_methods_and_goes_on_where_it_was_stopped(tmp_path):
    arguments = ("--quick", "--repeats", 2, "--output", tmp_path)
    printed = run_script("study_defaults.py", *arguments)
    record = read(tmp_path / "defaults.json", printed)
    # Two tasks, two stages, two numbers of rollouts, every setting.
    settings = {row["setting"] for row in record["rows"]}
    assert len(record["rows"]) == 2 * 2 * 2 * len(settings)
    mean = {
        name: sum(row["cosine"] for row in record["rows"] if row["setting"] == name) / 8 for name in sorted(settings)
    }
    ordered = ["bptt", "anp-feedback 1 ridge 0.01", "anp-ls 1 ridge 0.01", "anp-ls 1 ridge 0.1", "anp 0.9", "anp 0"]
    assert sorted(ordered, key=mean.get, reverse=True) == ordered
    assert mean["anp-feedback 1 ridge 0.01, first update"] > max(mean["known part"], mean["anp-ls 1 ridge 0.01"])
    default = anpgpu.Perturbation()
    assert f"{default.method} {default.discount:g} ridge {default.ridge:g}" in settings
    for row in record["rows"]:
        assert row["setting"] != "bptt" or (row["cosine"] == pytest.approx(1) and row["cost"] == 1)
    assert (tmp_path / "defaults.png").stat().st_size > 0

    finished = tmp_path / "runs.jsonl"
    lines = finished.read_text().splitlines()
    assert len(lines) == 8
    finished.write_text("\n".join(lines[:-1]) + "\n")
    run_script("study_defaults.py", *arguments, "--report")
    assert len(finished.read_text().splitlines()) == 7
    run_script("study_defaults.py", *arguments)
    again = finished.read_text().splitlines()
    assert again[:-1] == lines[:-1]

    def cosines(line):
        run = json.loads(line)
        return run["case"], [(row["setting"], row["cosine"]) for row in run["rows"]]

    assert cosines(again[-1]) == cosines(lines[-1])


def test_the_character_model_is_trained_by_three_methods_once(tmp_path):
    arguments = ("study_char_lm.py", "--quick", "--method", "anp-ls", "--output", tmp_path)
    record = read(tmp_path / "char_lm.json", run_script(*arguments))
    rows = {row["method"]: row for row in record["results"]}
    assert list(rows) == ["bptt", "anp-ls", "known part"]
    assert [row["P"] for row in rows.values()] == [None, 2, None]
    for row in rows.values():
        assert 3 < row["bits"] < 7
        assert row["bits over BPTT's"] == pytest.approx(row["bits"] / rows["bptt"]["bits"])
    finished = (tmp_path / "runs.jsonl").read_text()
    assert len(finished.splitlines()) == 3
    run_script(*arguments)
    assert (tmp_path / "runs.jsonl").read_text() == finished
    assert (tmp_path / "char_lm.png").stat().st_size > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_the_known_part_is_the_gradient_through_c_alone(layers, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    known_part = importlib.import_module("study_char_lm").KnownPart
    torch.manual_seed(0)
    exact = torch.nn.LSTM(3, 4, layers).double()
    known = known_part(3, 4, layers).double()
    known.load_state_dict(exact.state_dict())
    inputs, state = torch.randn(5, 2, 3).double(), tuple(torch.randn(layers, 2, 4).double() for _ in range(2))
    torch.testing.assert_close(known(inputs, state), exact(inputs, state))
    torch.testing.assert_close(known(inputs), exact(inputs))

    def gradients(rnn):
        rnn.zero_grad()
        rnn(inputs, state)[0].square().sum().backward()
        return [parameter.grad for parameter in rnn.parameters()]

    assert any(not torch.allclose(*pair) for pair in zip(gradients(known), gradients(exact), strict=True))
    # Without recurrent weights no gradient passes h_{t-1}.
    with torch.no_grad():
        for rnn in (known, exact):
            for name, value in rnn.named_parameters():
                value.mul_("weight_hh" not in name)
    torch.testing.assert_close(gradients(known), gradients(exact))


def test_the_hosts_part_is_counted_and_timed(tmp_path):
    """Beside the same checkout, which takes about as long."""
    pytest.importorskip("triton", reason="needs Triton")
    output = tmp_path / "host.json"
    printed = run_script(
        "host.py", "--repeats", 2, "--checkout", ROOT, "--checkout", f"again={ROOT}", "--output", output
    )
    versions = read(output, printed)["results"]
    assert list(versions) == ["before", "again", "now"]
    for version in versions.values():
        assert [row["update"] for row in version["updates"]] == ["estimate, mse", "estimate, cross_entropy", "backward"]
        assert all(row["both"] == row["operations"] + row["launches"] > 20 for row in version["updates"])
        assert [row["loss"] for row in version["steps"]] == ["linear", "outputs", "linear, descriptors"]
        assert all(0 < row["host us a step"] < 100 for row in version["steps"])
    assert versions["before"]["updates"][0]["both"] == versions["now"]["updates"][0]["both"]


def test_gated_cells_are_timed_beside_the_plain_one(tmp_path):
    output = tmp_path / "cells.json"
    small = ("--time", 5, "--batch", 4, "--rollouts", 8, "--hidden", 64, "--repeats", 3)
    printed = run_script("time_cells.py", *small, "--threads", 1, "--clock", "cpu", "--output", output)
    rows = {row["cell"]: row for row in read(output, printed)["results"]}
    assert list(rows) == ["RNN", "GRU", "LSTM"]
    assert rows["RNN"]["over the RNN's"] == 1
    for name, goal in (("GRU", 4.5), ("LSTM", 6)):
        assert 1 < rows[name]["lower"] <= rows[name]["over the RNN's"] <= rows[name]["upper"]
        assert rows[name]["goal"] == goal


def test_methods_are_timed_beside_anp(tmp_path):
    output = tmp_path / "methods.json"
    small = ("--hidden", 64, "--fractions", 4, "--repeats", 3, "--methods", "anp-ls,np")
    printed = run_script("time_methods.py", *small, "--threads", 1, "--clock", "cpu", "--output", output)
    rows = {row["method"]: row for row in read(output, printed)["results"]}
    assert list(rows) == ["anp-ls", "np"]
    assert all(0 < row["lower"] <= row["over anp's"] <= row["upper"] for row in rows.values())
    assert (rows["anp-ls"]["goal"], rows["np"]["goal"]) == (1.4, None)
    assert rows["anp-ls"]["P"] * 4 == rows["anp-ls"]["H"] == 64


def test_curves_are_of_runs_that_are_made_once(tmp_path):
    record = read(tmp_path / "curves.json", run_script("study_curves.py", "--quick", "--output", tmp_path))
    finished = (tmp_path / "runs.jsonl").read_text()
    # Three learning rates and one seed for each method.
    assert len(finished.splitlines()) == 5 * 4
    rows = {row["method"]: row for row in record["results"]}
    assert list(rows) == ["BPTT", "anp-feedback, P = H/16", "anp-ls, P = H/16", "anp-ls, P = H", "np, P = H"]
    for row in rows.values():
        assert row["curve"]["losses"][0][-1] == row["test loss"]
        assert sorted(row["curve"]["seconds"]) == row["curve"]["seconds"]
    assert rows["BPTT"]["test loss"] < 0.97 * rows["BPTT"]["curve"]["losses"][0][0]
    # The first update's warm-up is part of the time.
    warmed, plain = (rows[f"{method}, P = H/16"]["curve"]["seconds"] for method in ("anp-feedback", "anp-ls"))
    assert warmed[0] > 5 * plain[0]
    picture = tmp_path / "curves.png"
    assert picture.stat().st_size > 0
    run_script("study_curves.py", "--quick", "--output", tmp_path)
    assert (tmp_path / "runs.jsonl").read_text() == finished


def test_learned_feedback_is_shadowed_and_a_stopped_study_goes_on(tmp_path):
    tasks = ("copying 10, orthogonal", "digits by row")
    arguments = ("--quick", "--only", "cosine", "--tasks", *tasks, "--output", tmp_path)
    record = read(tmp_path / "feedback.json", run_script("study_feedback.py", *arguments))
    rows = record["results"]["cosine"]
    assert [row["task"] for row in rows] == list(tasks)
    for row in rows:
        assert row["P = 8"] > row["P = 1"] > max(row["known part"], row["anp-ls, P = 8"])
        assert row["P = 8"] > row["P = 4"]
        assert row["0-10, warmed up"] > row["updates 0-10"]
        assert row["warmed up"] > 0.99
    # The last run is lost, as where the study is killed while it writes; the others are not made again.
    path = tmp_path / "cosine.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('"seconds": ', '"seconds": 1000') + second[:100])
    again = read(tmp_path / "feedback.json", run_script("study_feedback.py", *arguments))
    assert again["processor_seconds"] > 1000 > record["processor_seconds"]
    assert again["results"]["cosine"] == rows


def test_variance_finds_where_the_baseline_pays(tmp_path):
    output = tmp_path / "variance.json"
    record = read(output, run_script("study_variance.py", "--quick", "--seeds", 3, "--output", output))
    by_cell = {(row["method"], row["sigma"]): row for row in record["rows"]}
    assert len(by_cell) == 6
    for method in ("anp", "anp-ls"):
        small, large = by_cell[method, 1e-3], by_cell[method, 0.3]
        assert large["baseline"] > large["plain"]
        assert abs(small["baseline"] - small["plain"]) < 0.1
        assert small["antithetic"] < small["plain"]
        assert small["readout"] < small["plain"]
