"""Interrupted training resumes bitwise in a new process: stopped, killed, and killed while it saves."""

import os
import subprocess
import sys
import time

import pytest
import torch
from distributed_cases import CELLS, EXAMPLES, METHODS, example

import anpgpu

UPDATES, EVERY = 4, 1
CASES = [(method, cell) for cell in CELLS for method in METHODS]
resume = example("resume")


class StoppedError(Exception):
    """Stops the training of a test."""


def same(first, second):
    """Whether two checkpoints are equal bit by bit, down to the last tensor."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def train_in_new_process(source, *arguments):
    """Run Python source in which `resume` and `arguments` are defined."""
    source = (
        "import sys; sys.path[:0] = sys.argv[1:3]\nimport resume, torch, os, signal\nfrom pathlib import Path\n"
        f"torch.set_num_threads(1)\narguments = sys.argv[3:]\n{source}"
    )
    root = str(EXAMPLES.parent)
    command = [sys.executable, "-c", source, str(EXAMPLES), root, *map(str, arguments)]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=200)


CONTINUE = f"""
for path, method, cell in zip(arguments[::3], arguments[1::3], arguments[2::3]):
    resume.train(Path(path), {UPDATES}, {EVERY}, method, cell)
"""

KILLED_WHILE_SAVING = f"""
plain, saves = torch.save, 0

def save(state, file):
    # The third time only a part reaches the disk.
    global saves
    saves += 1
    if saves == 3:
        file.write(b"PK not a whole checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    plain(state, file)

torch.save = save
resume.train(Path(arguments[0]), {UPDATES}, {EVERY}, arguments[1])
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By method and cell: the checkpoints of training at one go, and of training that was stopped and then resumed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save = resume.save

    def stopping(path, state):
        save(path, state)
        if state["update"] == UPDATES // 2:
            raise StoppedError

    whole, stopped = ({case: folder / f"{kind}-{'-'.join(case)}.pt" for case in CASES} for kind in ("whole", "stopped"))
    for case in CASES:
        resume.train(whole[case], UPDATES, EVERY, *case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save", stopping)
        for case in CASES:
            with pytest.raises(StoppedError):
                resume.train(stopped[case], UPDATES, EVERY, *case)
    half = torch.load(stopped["anp", "RNN"])
    killed = folder / "killed.pt"
    run = train_in_new_process(KILLED_WHILE_SAVING, killed, "anp")
    assert run.returncode == -9, run.stderr
    assert killed.with_name("killed.pt.part").exists()
    assert torch.load(killed)["update"] == 2 * EVERY
    again = [argument for case in CASES for argument in (stopped[case], *case)]
    run = train_in_new_process(CONTINUE, *again, killed, "anp", "RNN")
    assert run.returncode == 0, run.stderr
    pairs = {case: (torch.load(whole[case]), torch.load(stopped[case])) for case in CASES}
    return {**pairs, "killed": (pairs["anp", "RNN"][0], torch.load(killed)), "half": half}


@pytest.mark.parametrize(("method", "cell"), CASES)
def test_resumed_in_a_new_process_it_is_bitwise_the_same(checkpoints, method, cell):
    whole, resumed = checkpoints[method, cell]
    assert same(resumed, whole)
    # The second half of the training changes the checkpoint.
    assert not same(checkpoints["half"]["model"], checkpoints["anp", "RNN"][0]["model"])
    assert not torch.equal(checkpoints["half"]["rng"], checkpoints["anp", "RNN"][0]["rng"])


def test_killed_while_saving_it_goes_on_from_the_checkpoint_before(checkpoints):
    whole, resumed = checkpoints["killed"]
    assert same(resumed, whole)


def test_a_checkpoint_holds_all_that_an_update_depends_on(checkpoints):
    whole = checkpoints["anp", "RNN"][0]
    assert whole.keys() >= {"noise_stream", "rng", "update", "model", "optimiser", "schedule"}
    matrices = [value for name, value in whole["model"].items() if name.endswith("matrix")]
    assert matrices
    assert not any(torch.equal(matrix, torch.eye(len(matrix))) for matrix in matrices)


def test_a_checkpoint_of_another_noise_stream_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "old.pt"
    with monkeypatch.context() as patch:
        patch.setattr(anpgpu, "NOISE_STREAM_VERSION", anpgpu.NOISE_STREAM_VERSION + 1)
        resume.save(path, {})
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=rf"noise stream {anpgpu.NOISE_STREAM_VERSION + 1}, this anpgpu makes"):
        resume.train(path, 2, 1)
    assert path.exists()
    torch.set_rng_state(state)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(tmp_path):
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    command = [sys.executable, str(EXAMPLES / "resume.py"), "--updates", "300", "--every", "1", "--checkpoint"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    subprocess.run([*command, str(whole)], env=env, check=True, capture_output=True, timeout=300)
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen([*command, str(killed)], env=env, stdout=subprocess.DEVNULL)
        before = torch.load(killed)["update"] if killed.exists() else 0
        while process.poll() is None and (not killed.exists() or torch.load(killed)["update"] < before + 25 + attempt):
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 3
    subprocess.run([*command, str(killed)], env=env, check=True, capture_output=True, timeout=300)
    assert same(torch.load(killed), torch.load(whole))
