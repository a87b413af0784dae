"""What a forked process did arrives as it was: its output, its status, its end by force or after too long."""

import signal

import pytest
from forking import scripts

import anpgpu

RUNS = scripts(anpgpu)


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("print('said'); import sys; print('warned', file=sys.stderr)", (0, "said\n", "warned\n")),
        ("import sys; sys.exit('no such thing')", (1, "", "no such thing\n")),
        ("import sys; sys.exit(3)", (3, "", "")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", (-signal.SIGKILL, "", "")),
    ],
)
def test_a_process_is_reported_as_it_ended(tmp_path, source, outcome):
    script = tmp_path / "script.py"
    script.write_text(source)
    assert RUNS.ask(str(tmp_path), str(script), [], False) == outcome


def test_an_error_is_shown_and_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import warnings; warnings.warn('an old name')")
    assert RUNS.ask(str(tmp_path), str(script), [], False)[0] == 0
    status, _, warned = RUNS.ask(str(tmp_path), str(script), [], True)
    assert status == 1
    assert "UserWarning: an old name" in warned


def test_too_long_is_an_error_and_the_next_one_runs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time; time.sleep(float(sys.argv[1]))")
    with pytest.raises(TimeoutError, match="no end after 1 s"):
        RUNS.ask(str(tmp_path), str(script), ["600"], False, timeout=1)
    assert RUNS.ask(str(tmp_path), str(script), ["0"], False, timeout=600)[0] == 0
