"""The list of mutations does not rot: each still changes one place of the package, and names tests that exist.

`profiling/mutations.py` runs the tests on them, outside CI.
"""

import mutations_kernels
import mutations_package
import mutations_regression
import pytest
from planting import LEGS, PACKAGE, TESTS, changed, copy_package, run_tests
from test_planted_bugs import BUGS

LISTS = (mutations_kernels.MUTATIONS, mutations_package.MUTATIONS, mutations_regression.MUTATIONS)
MUTATIONS = {name: one for mutations in LISTS for name, one in mutations.items()}


def test_no_two_have_a_name_or_a_place_in_common():
    assert len(MUTATIONS) == sum(map(len, LISTS))
    places = [(bug.file, bug.right) for bug in (*MUTATIONS.values(), *BUGS.values())]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_changes_one_place(name):
    mutation = MUTATIONS[name]
    source = (PACKAGE / mutation.file).read_text(encoding="utf-8")
    mutated = changed(source, mutation.right, mutation.wrong)
    assert mutated != source
    compile(mutated, mutation.file, "exec")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutations_tests_exist(name):
    mutation = MUTATIONS[name]
    assert mutation.tests
    assert mutation.leg in LEGS
    for test in (*mutation.tests, *mutation.wider):
        file, _, function = test.partition("::")
        source = (TESTS / file).read_text(encoding="utf-8")
        assert f"\ndef {function.partition('[')[0]}(" in source if function else "\ndef test_" in source


@pytest.mark.parametrize("source", ["", "two, two"])
def test_a_text_that_does_not_occur_once_is_an_error(source):
    with pytest.raises(ValueError, match=f"found {source.count('two')} times, not once: two"):
        changed(source, "two", "three")


@pytest.mark.parametrize(
    ("leg", "test"),
    [
        ("reference", "test_finite.py"),
        ("interpreter", "test_finite_interpreter.py::test_marks_are_the_references[loss-True-(1, 1, 1, 1)]"),
    ],
)
def test_tests_of_a_leg_pass_where_nothing_is_planted(leg, test, tmp_path):
    if leg == "interpreter":
        pytest.importorskip("triton", reason="needs Triton")
    copy_package(tmp_path)
    outcome = run_tests(tmp_path, [test], leg=leg)
    assert (outcome.status, outcome.ids) == (0, []), outcome.said
