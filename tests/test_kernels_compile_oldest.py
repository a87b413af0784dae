"""Every kernel compiles with the oldest Triton that an installation takes, within limits and its own table.

What is not as it was when the table was written, and one of each kernel, in every run; all of it in `make test-oldest`.
`python tests/compile_kernels.py --oldest --write` rewrites the rows of what changed.
"""

import json

import pytest

pytest.importorskip("triton", reason="needs Triton")

import compile_kernels

from anpgpu.kernels.tiles import SHARED_BYTES

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]

STORED = json.loads(compile_kernels.OLDEST_TABLE.read_text())


def within_limits(rows, table):
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    beyond = {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED_BYTES[arch_of(name)]}
    assert beyond == {}
    assert {name: row["overwritten"] for name, row in rows.items() if row["overwritten"]} == {}
    assert compile_kernels.regressions(table, rows) == []


def arch_of(name):
    return int(name.split(":")[0].removeprefix("sm_"))


def test_the_table_is_of_the_version_at_hand():
    assert compile_kernels.version_in(compile_kernels.OLDEST) == STORED["triton"]


def test_every_kernel_compiles_with_the_oldest_triton():
    within_limits(compile_kernels.compile_all("", compile_kernels.OLDEST, STORED["rows"]), STORED["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_kernels.ARCHES)
def test_the_whole_table_anew(arch):
    part = f"sm_{arch}:"
    rows = compile_kernels.compile_all(part, compile_kernels.OLDEST)
    assert len(rows) > 30
    within_limits(rows, {name: row for name, row in STORED["rows"].items() if name.startswith(part)})


def test_a_folder_without_triton_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no package triton in .*: make oldest-triton"):
        compile_kernels.version_in(tmp_path)
