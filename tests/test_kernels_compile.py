"""Every kernel compiles for every architecture, within limits and within the checked-in table.

`python tests/compile_kernels.py --write` rewrites the table and prints what changed.
"""

import json
import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

import compile_kernels
import triton

from anpgpu.kernels import cell_triton
from anpgpu.kernels.tiles import SHARED_BYTES

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]

STORED = json.loads(compile_kernels.TABLE.read_text())


@pytest.fixture(scope="module")
def rows():
    return compile_kernels.compile_all()


def arch_of(name):
    return int(name.split(":")[0].removeprefix("sm_"))


def test_every_kernel_compiles(rows):
    assert rows
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}


def test_shared_memory_within_limits(rows):
    beyond = {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED_BYTES[arch_of(name)]}
    assert beyond == {}


def test_no_worse_than_the_table(rows):
    """Figures belong to one version of Triton; under another the bounds of the other tests still hold."""
    if triton.__version__ == STORED["triton"]:
        assert compile_kernels.regressions(STORED["rows"], rows) == []
    else:
        assert rows.keys() == STORED["rows"].keys()


@pytest.mark.parametrize("units", [64, 128, 256])
@pytest.mark.parametrize("variant", ["no_loss", "loss", "loss-stored"])
def test_warpgroup_products_on_hopper(rows, units, variant):
    assert "HGMMA" in rows[f"sm_90:resident-{units}-bf16-{variant}"]["matrix_in_loop"]


@pytest.mark.parametrize(("variant", "issued"), [("loss", 13), ("loss-stored", 14.2)])
def test_resident_step_of_128_units(rows, variant, issued):
    row = rows[f"sm_90:resident-128-bf16-{variant}"]
    assert row["issued"] <= issued
    assert row["stack"] == 0


@pytest.mark.parametrize("case", ["64-bf16-loss-stored", "128-bf16-loss", "128-bf16-loss-stored", "256-bf16-loss"])
def test_two_units_share_a_reciprocal(rows, case):
    """Hopper makes 16 special functions a clock: at 2 a unit they, not the products, would bind up to 256 units."""
    assert rows[f"sm_90:resident-{case}"]["special"] == 1.5


def test_the_state_stays_in_registers(rows):
    """Two barriers, and of shared memory only the loss differences of a tile."""
    for units in (128, 256):
        row = rows[f"sm_90:resident-{units}-bf16-loss"]
        assert row["barriers"] == 2
        assert row["shared_in_loop"] <= 2


@pytest.mark.parametrize("units", [128, 256])
@pytest.mark.parametrize("variant", ["no_loss", "loss", "loss-stored"])
def test_no_spills_in_the_time_loop(rows, units, variant):
    assert rows[f"sm_90:resident-{units}-bf16-{variant}"]["local_in_loop"] == 0


def test_a_shared_reciprocal_overwrites_none_of_its_operands(tmp_path, monkeypatch):
    """Its first result is there before its second operand has been read for the last time."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @triton.jit
    def repeated(ptr, count, SIZE: tl.constexpr):
        values = tl.load(ptr + tl.arange(0, SIZE))
        for _ in range(count):
            values = cell_triton.shared_reciprocal(values)
        tl.store(ptr + tl.arange(0, SIZE), values)

    source = compile_kernels.ast_source(repeated, {"ptr": "*fp32", "count": "i32", "SIZE": "constexpr"}, {"SIZE": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    pairs = re.findall(r"mul\.f32 both, (%r\d+), (%r\d+);.*?mul\.f32 (%r\d+), both", ptx, re.DOTALL)
    assert len(pairs) >= 4
    assert all(first not in {left, right} for left, right, first in pairs)
