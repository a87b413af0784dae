"""Every kernel compiles for every architecture, within limits and within the checked-in table.

`python tests/compile_kernels.py --write` rewrites the table and prints what changed.
"""

import json
import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

import compile_kernels
import torch
import triton
from planting import changed, copy_package
from triton.runtime.jit import JITFunction

from anpgpu.kernels import adjoint_triton, cell_triton, rollout_triton, tiles_measured
from anpgpu.kernels.cell import RELU, TANH
from anpgpu.kernels.cell_gated import GRU, LSTM
from anpgpu.kernels.loss import CrossEntropyLoss, LinearLoss, OutputsOnly, SquaredLoss
from anpgpu.kernels.rollout import RolloutOptions
from anpgpu.kernels.tiles import SHARED_BYTES

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]

STORED = json.loads(compile_kernels.TABLE.read_text())


@pytest.fixture(scope="module")
def rows():
    return compile_kernels.compile_all(table=STORED["rows"])


def arch_of(name):
    return int(name.split(":")[0].removeprefix("sm_"))


def test_every_kernel_compiles(rows):
    assert rows
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}


def test_shared_memory_within_limits(rows):
    beyond = {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED_BYTES[arch_of(name)]}
    assert beyond == {}


def described_inside(values):
    """Return whether a tuple of types, or one in it, has a tensor descriptor."""
    return any(described_inside(value) if isinstance(value, tuple) else "tensordesc" in str(value) for value in values)


def test_no_descriptor_is_inside_a_tuple():
    """Triton's launcher encodes only those that are arguments themselves, though its compiler takes others, too."""
    cases = compile_kernels.found_cases()
    signatures = {name: signature for name, (_, signature, *_) in cases.items()}
    inside = [
        (name, argument)
        for name, signature in signatures.items()
        for argument, kind in signature.items()
        if isinstance(kind, tuple) and described_inside(kind)
    ]
    assert inside == []
    assert any("tensordesc" in str(kind) for signature in signatures.values() for kind in signature.values())


def test_no_operand_of_the_matrix_unit_is_overwritten_while_it_is_read(rows):
    assert {name: row["overwritten"] for name, row in rows.items() if row["overwritten"]} == {}


SASS = """
        /*0880*/                   WARPGROUP.ARRIVE ;
        /*0890*/                   HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR8], RZ, !UPT ;
        /*08d0*/                   HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR28], R24, gsb0 ;
        /*08e0*/                   {} ;
        /*12e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{} ;
        /*12f0*/                   {} ;
"""


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("FMUL R93, R1, R2", 1), ("FMUL R96, R1, R2", 0), ("@!P0 MOV R103, R1", 1), ("STS [R92], R93", 0),
        ("FSETP.GEU.AND P0, PT, R92, 1, PT", 0), ("LDG.E.128 R90, [R2.64]", 1), ("LDG.E R90, [R2.64]", 0),
        ("IADD3 R92, P0, R1, R2, RZ", 1), ("SHFL.BFLY PT, R100, R4, 0x1, 0x1f", 1),
        ("F2FP.BF16.F32.PACK_AB R95, R1, R2", 1),
    ],
)  # fmt: skip
def test_an_overwritten_operand_is_seen(instruction, found):
    """The kind of listing in which ptxas's fault shows; the instruction is harmless once the product is done."""
    assert compile_kernels.overwritten_operands(SASS.format(instruction, 0, "NOP")) == found
    assert compile_kernels.overwritten_operands(SASS.format("NOP", 0, instruction)) == 0
    assert compile_kernels.overwritten_operands(SASS.format("NOP", 1, instruction)) == found


def test_no_worse_than_the_table(rows):
    """Figures belong to one version of Triton; under another the bounds of the other tests still hold."""
    if triton.__version__ == STORED["triton"]:
        assert compile_kernels.regressions(STORED["rows"], rows) == []
    else:
        assert rows.keys() == STORED["rows"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_kernels.ARCHES)
def test_the_whole_table_anew(arch):
    rows = compile_kernels.compile_all(f"sm_{arch}:")
    assert len(rows) > 30
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    test_shared_memory_within_limits(rows)
    test_no_operand_of_the_matrix_unit_is_overwritten_while_it_is_read(rows)
    table = {name: row for name, row in STORED["rows"].items() if arch_of(name) == arch}
    assert compile_kernels.regressions(table, rows) == []


@pytest.fixture
def stored_measure(tmp_path, monkeypatch):
    """Row of a case whose figures only its table knows, and a copy of the package that workers import."""
    name = "sm_80:measure-cross_entropy-bf16"
    monkeypatch.syspath_prepend(tmp_path)
    package = copy_package(tmp_path)

    def row_of(file, right, wrong):
        path = package / "kernels" / file
        path.write_text(changed(path.read_text(encoding="utf-8"), right, wrong), encoding="utf-8")
        return compile_kernels.compile_all(name, table={name: STORED["rows"][name] | {"registers": -1}})[name]

    return row_of


def test_a_row_stands_while_its_source_does(stored_measure):
    """Where in its file a kernel stands is no part of it."""
    assert stored_measure("loss_triton.py", "import triton\n", "import triton\n\n\n")["registers"] == -1
    assert stored_measure("noise.py", "import torch\n", "import torch\n\n\n")["registers"] == -1


def test_a_row_is_made_anew_with_any_function_of_its_kernel(stored_measure):
    row = stored_measure("loss_triton.py", "change / (2 + change)", "change / (3 + change)")
    assert row["registers"] > 0
    assert row["source"] != STORED["rows"]["sm_80:measure-cross_entropy-bf16"]["source"]


@pytest.mark.parametrize("units", [64, 128, 256])
@pytest.mark.parametrize("variant", ["no_loss", "loss", "loss-stored"])
def test_warpgroup_products_on_hopper(rows, units, variant):
    assert "HGMMA" in rows[f"sm_90:resident-{units}-bf16-{variant}"]["matrix_in_loop"]


@pytest.mark.parametrize(("variant", "issued"), [("loss", 13.2), ("loss-stored", 14.3)])
def test_resident_step_of_128_units(rows, variant, issued):
    """Three programs on a multiprocessor, which an H200 prefers to fewer instructions and barriers of wide tiles."""
    row = rows[f"sm_90:resident-128-bf16-{variant}"]
    assert row["issued"] <= issued
    assert (row["stack"], row["registers"]) == (0, 168)


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


def test_rows_of_64_and_128_units_spill_little(rows):
    """Bounds on registers are what was measured to pay; what they cost elsewhere is one or two words a thread."""
    spilling = {
        name.removeprefix("sm_90:resident-"): row["local_in_loop"]
        for name, row in rows.items()
        if re.match(r"sm_90:resident-(1|16|64|100|128)-", name) and row["local_in_loop"]
    }
    assert spilling.keys() <= {"100-bf16-loss-stored", "128-bf16-gaussian", "128-bf16-wide"}
    assert max(spilling.values(), default=0) <= 2


STEP_TILES = ("step-512-bf16", "step-1024-bf16", "step-512-bf16-few_rollouts", "step-1024-bf16-few_rollouts")


@pytest.mark.parametrize("case", [*STEP_TILES, "step-512-bf16-few_rows", "step-512-bf16-few_rows-few_rollouts"])
def test_steps_stay_in_registers(rows, case):
    """Descriptors feed the matrix unit from shared memory, and two programs of 128 threads fit a multiprocessor."""
    row = rows[f"sm_90:{case}"]
    assert "HGMMA" in row["matrix_in_loop"]
    assert row["local_in_loop"] == 0
    assert row["stack"] <= 24
    if case in STEP_TILES:
        assert row["shared_in_loop"] == 0
        assert 2 * (row["shared"] + 1024) <= 228 * 1024


@pytest.mark.parametrize("case", ["gru-512-bf16", "lstm-512-bf16", "lstm-512-bf16-few_rollouts", "lstm-512-bf16-wide"])
def test_the_products_of_all_gates_stay_in_registers(rows, case):
    """What does not fit lies on the stack behind the products, once in a step and not in their loop."""
    row = rows[f"sm_90:{case}"]
    assert "HGMMA" in row["matrix_in_loop"]
    assert all(row["local_in_loop"] == 0 for name, row in rows.items() if ":gru-5" in name or ":lstm-5" in name)


@pytest.mark.parametrize("units", [64, 128])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_all_steps_of_all_gates_stay_in_registers(rows, cell, units):
    row = rows[f"sm_90:{cell}-resident-{units}-bf16"]
    assert "HGMMA" in row["matrix_in_loop"]
    assert (row["local_in_loop"], row["stack"]) == (0, 0)


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


def test_relu_keeps_a_nan_on_a_gpu(tmp_path, monkeypatch):
    """Its interpreter keeps it anyway; a GPU's `max` returns the operand that is a number, unless told otherwise."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @triton.jit
    def moved(ptr, preact_ptr, SIZE: tl.constexpr):
        lane = tl.arange(0, SIZE)
        delta_a, preact = tl.load(ptr + lane), tl.load(preact_ptr + lane)
        tl.store(ptr + lane, cell_triton.relu_deviation(delta_a, preact, None, 1.0, False, True, False, False))

    signature = {"ptr": "*fp32", "preact_ptr": "*fp32", "SIZE": "constexpr"}
    source = compile_kernels.ast_source(moved, signature, {"SIZE": 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert sorted(re.findall(r"\b(?:max|min)(?:\.NaN)?\.f32", ptx)) == ["max.NaN.f32", "max.NaN.f32", "min.NaN.f32"]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Names of the kernels that launchers compile, instead of launching them."""
    from idle_driver import Driver
    from triton.runtime import driver, jit

    names, run = [], jit.JITFunction.run

    def without_launch(self, *arguments, grid, warmup, **named):
        names.append(self.fn.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **named)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit.JITFunction, "run", without_launch)
    # The real driver looks for a GPU when it is first asked.
    monkeypatch.setattr(driver, "_active", Driver())
    return names


@pytest.mark.parametrize(
    ("units", "expected"), [(16, {"resident_kernel", "fused_kernel"}), (300, {"step_kernel", "measure_kernel"})]
)
def test_launchers_hand_kernels_arguments_that_compile(compiled, units, expected):
    """As the table's cases say them by hand: absent tensors, strides of 1, functions as arguments."""
    time, batch, rollouts, outputs = 2, 2, 64, 3
    preact, weight, readout = torch.randn(time, batch, units), torch.randn(units, units), torch.randn(outputs, units)
    error, share = torch.randn(time, batch, outputs), torch.rand(time, batch)
    target = torch.zeros(time, batch, dtype=torch.int64)
    losses = (
        LinearLoss(preact),
        SquaredLoss(readout, error, share),
        CrossEntropyLoss(readout, error.softmax(-1), target, share),
        OutputsOnly(readout),
        None,
    )
    seed, start = torch.tensor(1), torch.zeros(batch, rollouts, units)
    for loss, cell, store in zip(losses, (TANH, RELU, TANH, RELU, TANH), (True, False, True, False, True), strict=True):
        options = RolloutOptions(rollouts, 1e-3, cell=cell, precision="bf16", store_delta_a=store)
        named = {"options": options, "delta_h0": start if store else None}
        rollout_triton.rollout(preact, preact, weight, loss, seed, **named)
        if loss is not None and loss.measured:
            adjoint_triton.rollout_adjoint(preact, preact, weight, loss, seed, weight_by="activity", **named)
    assert expected <= set(compiled)


@pytest.mark.parametrize("units", [300, 800])
def test_only_later_steps_start_before_the_one_before_is_done(compiled, monkeypatch, units):
    """What comes before the first may be what made the clean run, which programs read while they wait."""
    launched, run = [], JITFunction.run

    def noted(self, *arguments, grid, warmup, **named):
        launched.append((self.fn.__name__, named))
        return run(self, *arguments, grid=grid, warmup=warmup, **named)

    monkeypatch.setattr(JITFunction, "run", noted)
    monkeypatch.setattr(tiles_measured, "ONE_WAVE", 0)
    preact, weight = torch.randn(3, 2, units), torch.randn(units, units)
    options = RolloutOptions(64 if units < 768 else 32, 1e-3, precision="bf16", store_delta_a=True)
    rollout_triton.rollout(preact, preact, weight, LinearLoss(preact), torch.tensor(1), options=options)
    steps = [named for name, named in launched if name == "step_kernel"]
    assert all(named["DESCRIBED"] and named["DEPENDENT"] for named in steps)
    assert [named.get("launch_pdl", False) for named in steps] == [False, True, True]
    assert not any("launch_pdl" in named for name, named in launched if name != "step_kernel")


@pytest.mark.parametrize(
    ("cell", "kind", "units", "expected"),
    [
        (GRU, "squared", 40, {"gated_step_kernel", "measure_kernel"}),
        (LSTM, "linear", 200, {"gated_step_kernel", "sum_partials_kernel"}),
        (LSTM, "linear", 40, {"gated_resident_kernel"}),
        (GRU, "linear", 128, {"gated_resident_kernel"}),
    ],
    ids=["gru-outputs", "lstm-wide", "lstm", "gru"],
)
def test_launchers_of_gated_cells_hand_kernels_arguments_that_compile(compiled, cell, kind, units, expected):
    """The LSTM's linear loss has a part for c."""
    time, batch, rollouts = 2, 2, 64
    preact, weight = torch.randn(time, batch, 5 * units), torch.randn(cell.gates * units, units)
    states, share = torch.randn(time, batch, cell.states * units), torch.rand(time, batch)
    loss = LinearLoss(states) if kind == "linear" else SquaredLoss(None, states, share)
    start = torch.zeros(batch, rollouts, cell.states * units)
    options = RolloutOptions(rollouts, 1e-3, cell=cell, precision="bf16")
    named = {"weight_by": "activity", "options": options, "delta_h0": start}
    adjoint_triton.rollout_adjoint(preact, states, weight, loss, torch.tensor(1), **named)
    rollouts_of = {"gated_step_kernel", "gated_resident_kernel", "sum_partials_kernel", "measure_kernel"}
    assert expected == rollouts_of & set(compiled)
