"""Named ranges: their names and nesting as a tool sees them, and no calls where no tool is attached."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import anpgpu
from anpgpu import functional
from anpgpu.runtime import dispatch, ranges

ROOT = Path(__file__).resolve().parent.parent
FORWARD_ONLY = ["clean_run", "rollout", "returns", "adjoint", "weight_gradients"]


class Listener:
    """Stands in for NVTX with a tool attached: it records what opens and closes."""

    def __init__(self):
        self.log, self.categories, self.domains = [], {}, []

    def enabled(self):
        return True

    def get_domain(self, name):
        self.domains.append(name)
        return self

    def get_category_id(self, name):
        return self.categories.setdefault(name, len(self.categories) + 1)

    def get_event_attributes(self, *, message, category):
        return message, category

    def push_range(self, attributes):
        self.log.append(("push", *attributes))

    def pop_range(self):
        self.log.append(("pop",))

    def opened(self):
        """Return the names of all ranges, in the order in which they opened, each with its depth."""
        depth, names = 0, []
        for kind, *attributes in self.log:
            if kind == "push":
                names.append((attributes[0], depth))
            depth += 1 if kind == "push" else -1
            assert depth >= 0
        assert depth == 0
        return names


@pytest.fixture
def listener(monkeypatch):
    """Attach a tool for one test."""
    listening = Listener()
    monkeypatch.setattr(ranges, "nvtx", listening)
    ranges.listening.cache_clear()
    yield listening
    ranges.listening.cache_clear()
    ranges._attributes.cache_clear()


def estimate(method="anp", **options):
    rule = anpgpu.Perturbation(method=method, rollouts=4, **options)
    rnn, readout = anpgpu.RNN(2, 3, perturbation=rule), nn.Linear(3, 2)
    return anpgpu.estimate_grad_(rnn, readout, torch.randn(4, 2, 2), torch.randn(4, 2, 2))


def test_an_update_is_one_range_with_the_ops_inside(listener):
    estimate()
    opened = listener.opened()
    assert listener.domains == ["anpgpu"]
    assert opened[0] == ("estimate_grad_", 0)
    assert opened[1:] == [(name, 1) for name in FORWARD_ONLY]


def test_a_backward_pass_is_one_range(listener):
    rnn = anpgpu.RNN(2, 3, perturbation=anpgpu.Perturbation("anp", 4))
    outputs, _ = rnn(torch.randn(4, 2, 2))
    outputs.sum().backward()
    assert [name for name, depth in listener.opened() if depth == 0] == ["clean_run", "backward"]
    inside = {name for name, depth in listener.opened() if depth}
    assert inside >= {"rollout", "returns", "adjoint", "weight_gradients"}


@pytest.mark.parametrize(
    ("method", "options", "name"),
    [
        ("anp-ls", {}, "least_squares"),
        ("wp", {}, "weight_perturbation"),
        ("anp", {"readout": "perturbed"}, "perturbed_readout"),
    ],
)
def test_every_way_to_an_estimate_has_its_range(listener, method, options, name):
    estimate(method, **options)
    assert name in {opened for opened, _ in listener.opened()}


def test_ops_on_tensors_have_their_ranges(listener):
    functional.noise(1, (2, 1, 2, 3))
    assert [name for name, _ in listener.opened()] == ["noise"]


def test_names_and_categories_are_the_tables_own(listener):
    for method in ("anp", "np", "anp-ls", "wp"):
        estimate(method)
    pushed = {(name, category) for kind, *rest in listener.log if kind == "push" for name, category in [rest]}
    assert pushed <= set(ranges.RANGES.items())
    # Other characters have a meaning in Nsight Compute's filters.
    assert all(name.strip("_").replace("_", "").isalpha() for name in ranges.RANGES)
    assert set(dispatch.OP_MODULES) <= set(ranges.RANGES)


def test_a_range_closes_when_its_op_raises(listener):
    @ranges.within("rollout")
    def fail():
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert listener.log == [("push", "rollout", "rollout"), ("pop",)]


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match=r"one of .*got 'rolout'"):
        ranges.within("rolout")


def test_torch_profiler_shows_the_same_ranges():
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        estimate()
    names = {event.key for event in trace.key_averages()}
    assert names >= {f"anpgpu::{name}" for name in ("estimate_grad_", *FORWARD_ONLY)}


def test_nothing_is_opened_where_nothing_listens(monkeypatch):
    def refuse(*_):
        raise AssertionError("a range was opened")

    assert ranges.listening() is None
    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    assert ranges.within("noise")(lambda: 3)() == 3


def test_a_ranged_function_compiles_without_a_break(listener):
    ranged = ranges.within("clean_run")(lambda values: torch.tanh(values) * 2)
    compiled = torch.compile(ranged, fullgraph=True, backend="eager")
    values = torch.randn(3)
    assert torch.equal(compiled(values), torch.tanh(values) * 2)
    assert listener.log == []


def test_the_package_imports_and_works_without_nvtx():
    source = (
        "import sys; sys.modules['nvtx'] = None\n"
        "import anpgpu.functional; from anpgpu.runtime import ranges\n"
        "assert ranges.nvtx is None and ranges.listening() is None\n"
        "print(anpgpu.functional.noise(1, (1, 1, 1, 2)).shape)"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "[1, 1, 1, 2]" in run.stdout
