"""Every kernel compiles with the oldest Triton that an installation takes, within limits and its own table.

Two architectures in every run, the others in `make test-oldest`. `python
tests/compile_kernels.py --oldest --only sm_90: --write` rewrites the rows of one.
"""

import json

import pytest

pytest.importorskip("triton", reason="needs Triton")

import compile_kernels

from anpgpu.kernels.tiles import SHARED_BYTES

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]

STORED = json.loads(compile_kernels.OLDEST_TABLE.read_text())
ARCHES = (80, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (89, 100)))


def test_the_table_is_of_the_version_at_hand():
    assert compile_kernels.version_in(compile_kernels.OLDEST) == STORED["triton"]


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles_with_the_oldest_triton(arch):
    part = f"sm_{arch}:"
    rows = compile_kernels.compile_all(part, compile_kernels.OLDEST)
    assert len(rows) > 30
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED_BYTES[arch]} == {}
    assert {name: row["overwritten"] for name, row in rows.items() if row["overwritten"]} == {}
    table = {name: row for name, row in STORED["rows"].items() if name.startswith(part)}
    assert compile_kernels.regressions(table, rows) == []


def test_a_folder_without_triton_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no package triton in .*: make oldest-triton"):
        compile_kernels.version_in(tmp_path)
