"""Makes an uninstalled checkout importable, sets hypothesis's profile and threads, and reports what was fuzzed."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Appended, not put first: the checkout's `kernels` and `profiling` must not shadow installed packages of those names.
sys.path.append(str(Path(__file__).resolve().parent.parent))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("slow", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The tests' tensors are small. On shared cores the threads of a pool spin while they wait for each other, and a run
# takes ten times as long; `make` says so to its processes with OMP_NUM_THREADS, this to a pytest called by hand.
torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["torch", "numba"])
def cpu_backend(request):
    """What "auto" takes for float32 tensors on the CPU: every test that uses this runs with both."""
    from anpgpu.runtime import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_has_numba", lambda: request.param == "numba")
        yield request.param


@pytest.fixture
def torch_backend(monkeypatch):
    """Let "auto" take torch on the CPU."""
    from anpgpu.runtime import dispatch

    monkeypatch.setattr(dispatch, "_has_numba", lambda: False)


def pytest_sessionfinish(session):
    """Hand what this process fuzzed to the one that reports, where tests run side by side."""
    fuzzing = sys.modules.get("fuzzing")
    if fuzzing is not None and hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzzed"] = [dict(fuzzing.TRIED), dict(fuzzing.REFUSED)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add what a worker of pytest-xdist fuzzed."""
    tried, refused = getattr(node, "workeroutput", {}).get("fuzzed", ({}, {}))
    if tried:
        import fuzzing

        fuzzing.TRIED.update(tried)
        fuzzing.REFUSED.update(refused)


def pytest_terminal_summary(terminalreporter):
    """Show how many inputs each public function was fuzzed with, and how many of them it refused."""
    fuzzing = sys.modules.get("fuzzing")
    if fuzzing is not None and fuzzing.TRIED:
        terminalreporter.section("fuzzed inputs")
        for name, count in sorted(fuzzing.TRIED.items()):
            terminalreporter.write_line(f"{name:<20} {count:>6} tried {fuzzing.REFUSED[name]:>6} refused")
