"""Processes that share rollouts, one of which fails: all end, each with the right error, and the group goes on."""

from datetime import timedelta

import distributed_cases
import failing_cases as cases
import pytest
import torch
from distributed_cases import H, I
from tolerances import assert_close

COUNTS = [pytest.param(2, id="2 processes"), pytest.param(3, id="3 processes", marks=pytest.mark.slow)]
OWN = {
    "memory": "OutOfMemoryError: out of memory with rollouts shared between processes",
    "callable": "KeyError: 'no such word'",
    "nan sample": "NonFiniteRolloutsError: every rollout of sample",
    "targets": "ValueError: class indices must be",
    "last exchange": "ValueError: summed and lost",
}
"""What the failing process itself says."""
OTHERS = "OtherProcessError: shard_rollouts=True: process {} failed in this update"


@pytest.fixture(scope="module", params=COUNTS)
def results(request, tmp_path_factory):
    """What each process returned. One that waits in vain gives up after 20 s."""
    folder = tmp_path_factory.mktemp("processes")
    return distributed_cases.run(request.param, folder, cases.all_cases, timedelta(seconds=20))


def test_a_process_that_fails_says_why_and_the_others_say_who(results):
    last = len(results) - 1
    for name in results[0]["failures"]:
        failing = {"first": (0,), "two": (0, 1)}.get(name.partition(":")[0], (last,))
        words = next(words for start, words in OWN.items() if start in name)
        for rank, result in enumerate(results):
            ending = result["failures"][name][0]
            expected = words if rank in failing else OTHERS.format(failing[-1])
            assert ending.startswith(expected), f"{name}, process {rank}: {ending}"


def test_the_update_after_a_failure_is_as_ever(results):
    for result in results:
        assert [name for name, (_, usual) in result["failures"].items() if not usual] == []


def test_on_cuda_the_others_get_nan(results):
    *others, last = (result["unread"]["failed"] for result in results)
    weights = H * (I + H + 2)
    for name, (ending, _) in last.items():
        assert ending.startswith(OWN["memory"]), f"{name}: {ending}"
        for other in others:
            assert other[name][0] == "no error", name
            assert bool(other[name][1][:weights].isnan().all()), name


def test_hosts_of_unequal_memory_divide_as_the_smallest(results):
    for result in results:
        found = result["memories"]
        for name, expected in found["tight"].items():
            for room in ("unequal", "own"):
                assert torch.equal(found[room][name], expected), f"{room} {name}"
            assert torch.equal(result["unread"]["memories"][name], expected), name
            assert_close(found["equal"][name], expected, "float64")
            assert bool(expected.isfinite().all()), name
    # The limit does divide the work.
    tight, equal = (torch.cat(list(results[0]["memories"][room].values())) for room in ("tight", "equal"))
    assert not torch.equal(tight, equal)
