"""The package imports quickly and without side effects, and its files are where an installed copy expects them."""

import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("triton", "cupy", "numba", "matplotlib", "sklearn")


def run_python(source: str) -> str:
    """The standard output of `source` in a fresh interpreter that imports the same anpgpu as this one."""
    env = {**os.environ, "PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent)}
    run = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def sources_of_package() -> list[Path]:
    """The files of anpgpu/ and its folders; the link to kernels/ is none of them."""
    return [path for path in (ROOT / "anpgpu").rglob("*.py") if ROOT / "anpgpu" / "kernels" not in path.parents]


def test_import_is_quick_and_loads_nothing_optional() -> None:
    source = f"""
import json, sys, time
start = time.perf_counter()
import torch
torch_s = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
import anpgpu
anpgpu_s = time.perf_counter() - start
top_level = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([torch_s, anpgpu_s, sorted(top_level & set({OPTIONAL!r}))]))
"""
    # The quickest of three, since a busy machine delays any single start. torch's own import sets the scale: on a slow
    # disk both are slow.
    runs = [json.loads(run_python(source)) for _ in range(3)]
    assert all(loaded == [] for _, _, loaded in runs)
    torch_s = min(run[0] for run in runs)
    anpgpu_s = min(run[1] for run in runs)
    assert anpgpu_s < max(0.5, torch_s)


def test_import_and_training_work_without_the_optional_packages() -> None:
    source = f"""
import sys

# What an absent package looks like: an import fails, and a search for it finds nothing.
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import torch
import anpgpu

rnn = anpgpu.RNN(2, 3)
output, _ = rnn(torch.ones(4, 1, 2))
output.square().mean().backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in rnn.parameters())
print(sum(float(p.grad.abs().sum()) for p in rnn.parameters()) > 0)
"""
    assert run_python(source).strip() == "True"


def test_import_changes_nothing_and_says_nothing() -> None:
    source = """
import json, random, sys, threading, warnings
import numpy, torch

def state():
    return [
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.get_num_threads(),
        torch.cuda.is_initialized(), torch.backends.cuda.matmul.allow_tf32, threading.active_count(),
        warnings.filters[:], sys.path[:], sys.getrecursionlimit(),
    ]

warnings.simplefilter("error")
before = state()
import anpgpu
import anpgpu.functional
print(json.dumps([state() == before, torch.cuda.is_initialized()]))
"""
    # There is no other output and no warning, which would be an error.
    assert json.loads(run_python(source)) == [True, False]


def test_kernels_are_a_relative_symlink() -> None:
    link = ROOT / "anpgpu" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert (link / "__init__.py").is_file()


def test_kernels_folder_is_flat_and_never_imports_itself_by_its_bare_name() -> None:
    entries = [path for path in (ROOT / "kernels").iterdir() if path.name != "__pycache__"]
    assert {path.suffix for path in entries} == {".py"}
    for path in entries:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            assert "kernels" not in {module.split(".")[0] for module in modules}, path


@pytest.mark.parametrize("folder", ["profiling", "tests", "examples"])
def test_script_folders_are_not_packages(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_shadows_a_dependency() -> None:
    folders = ["anpgpu", "kernels", "tests", "profiling", "examples"]
    names = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert names
    assert not names & {"triton", "cupy", "numba", "torch"}


def test_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", anpgpu.__version__)
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *sources_of_package(), *ROOT.glob("kernels/*.py")]
    literal = re.compile(rf"[\"' ]{re.escape(anpgpu.__version__)}\b")
    holders = [path.name for path in files if literal.search(path.read_text(encoding="utf-8"))]
    assert holders == ["_version.py"]


def test_requirements_are_the_plain_list() -> None:
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert listed == ["cupy-cuda12x", "triton", "torch", "numpy", "pytest", "nvtx"]


def test_every_direct_dependency_is_pinned() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = declared[declared.index("dependencies = [") : declared.index("[tool.setuptools]")]
    names = {re.match(r"[A-Za-z0-9-]+", text).group() for text in re.findall(r'"([^"]+)"', project)}  # type: ignore[union-attr]
    pins = set(re.findall(r"^([A-Za-z0-9-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"torch", "numpy", "triton", "pytest", "ruff"} <= names
    assert names <= pins


def test_pages_name_the_oldest_versions() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = dict(re.findall(r'"(torch|triton)>=([\d.]+)', declared))
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    assert f"torch {floors['torch']} and Triton {floors['triton']} or newer" in text
    for name in ("README.md", "docs/compatibility.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"torch {floors['torch']}" in text
        assert f"Triton {floors['triton']}" in text


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_pins_are_not_older_than_the_oldest_versions_and_pages_name_them() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = dict(re.findall(r'"(torch|triton)>=([\d.]+)', declared))
    pin = re.compile(r"^(torch|triton)==([\d.]+)", re.MULTILINE)
    pins = dict(pin.findall((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    oldest = dict(pin.findall((ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")))
    assert floors.keys() == pins.keys() == {"torch", "triton"}
    assert all(release(pins[name]) >= release(floors[name]) for name in floors)
    assert oldest.keys() == {"triton"}
    assert release(oldest["triton"])[:2] == release(floors["triton"])
    page = " ".join((ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split())
    assert f"(torch {pins['torch']}, Triton {pins['triton']})" in page
    assert f"Triton {oldest['triton']} compiles" in page
    tables = {"compiled.json": pins, "compiled_oldest.json": oldest}
    for name, versions in tables.items():
        assert json.loads((ROOT / "tests" / name).read_text(encoding="utf-8"))["triton"] == versions["triton"]


def test_an_installation_asks_for_the_python_that_the_pages_name() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"$', declared, re.MULTILINE)
    assert f'target-version = "py{python.replace(".", "")}"' in declared
    for name in ("README.md", "docs/compatibility.md"):
        assert f"Python {python}" in (ROOT / name).read_text(encoding="utf-8")


def test_wheel_built_from_the_sdist_holds_the_kernels_inside_the_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    keep_out = shutil.ignore_patterns(".*", "output", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=keep_out)
    # Without isolation nothing is downloaded. `build` makes the wheel from the unpacked sdist, as an installer would.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tree)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"anpgpu-{anpgpu.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in sources_of_package()}
    kernels = {f"anpgpu/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert {"anpgpu/_version.py", "anpgpu/kernels/noise.py"} <= sources | kernels
    info = f"anpgpu-{anpgpu.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == sources | kernels | {"anpgpu/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_triton_and_numba_are_here_where_they_run() -> None:
    # The tests of the kernels are skipped without these packages, so that a missing one must fail here.
    needed = sys.platform == "linux" and platform.machine() == "x86_64"
    assert not needed or importlib.util.find_spec("triton") is not None
    assert importlib.util.find_spec("numba") is not None
