"""The structure of the package, read from its source: which file may import which, and the rules for every file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS, TESTS = ROOT / "anpgpu", ROOT / "kernels", ROOT / "tests"
KERNEL_FILES = sorted(KERNELS.glob("*.py"))
PACKAGE_FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if PACKAGE / "kernels" not in path.parents and "__pycache__" not in path.parts
)
TEST_FILES = sorted(TESTS.glob("test_*.py"))
BACKENDS = ("_triton", "_cupy", "_numba")
LONGEST = 500
MOST_FACES = 13

FOLDERS = {"diagnosis", "ops", "estimators", "task", "network", "runtime"}
ORDER = (
    ("__init__", "__main__"),
    ("diagnosis",),
    ("modules", "swap", "estimate", "state", "functional", "decorrelation"),
    ("ops",),
    ("estimators",),
    ("task",),
    ("network",),
    ("runtime",),
    ("perturbation", "checks"),
    ("registry", "_version"),
    ("kernels",),
)
"""Folders and top-level files, from top to bottom. A file imports only from its own line and those below."""

OPS = ("noise", "rollout", "adjoint")
"""Ops that every backend has."""
STEMS = (
    *OPS,
    "cell",
    "cell_gated",
    "cross_entropy",
    "finite",
    "loss",
    "least_squares",
    "feedback",
    "weight_gradients",
)
"""Stems that have a file for torch and may have one for each other backend."""
ALONE = {
    *("__init__", "tiles", "product", "scratch", "launch_triton", "place_triton", "compile_numba", "feedback_matrix"),
    *("rollout_resident_triton", "rollout_stepwise_triton", "rollout_fused_triton", "rollout_gated_triton"),
    *("tiles_least_squares", "tiles_measured", "tiles_weight_gradients", "gram_triton", "inverse_triton"),
    *("rollout_gated_resident_triton", "repeated_triton", "measure_triton", "primal_triton"),
}
"""The other files of kernels/."""


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path):
    """Return every module imported anywhere in the file, absolute or with its leading dots."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.add(module)
            if node.level and not node.module:
                names |= {module + alias.name for alias in node.names}
    return names


def module_of(path):
    """Return a file's dotted name as it is imported: `anpgpu.runtime` for its __init__.py; kernels lie in anpgpu."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("anpgpu", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILE_OF = {module_of(path): path for path in (*PACKAGE_FILES, *KERNEL_FILES)}


def imported_modules(source, module, is_package, modules):
    """Return which of the package's `modules` the source of one of them imports, with dots resolved.

    `from . import name` is the module `name` where there is one, and the package that defines the name otherwise.
    """
    package = module if is_package else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            assert base or not node.level, f"line {node.lineno} of {module} imports from above the package"
            origin = ".".join((*base, *(node.module.split(".") if node.module else ())))
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                names.add(name if name in modules else origin)
    return {name for name in names if name == "anpgpu" or name.startswith("anpgpu.")}


def room_of(module):
    """Return a module's folder or top-level file."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.fixture(scope="module")
def graph():
    return {
        module: imported_modules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", FILE_OF)
        for module, path in FILE_OF.items()
    }


def test_there_is_source_to_read():
    assert len(PACKAGE_FILES) > 20
    stems = {path.stem for path in KERNEL_FILES}
    assert stems >= {f"{op}{suffix}" for op in OPS for suffix in ("", *BACKENDS)}
    assert stems >= {*STEMS, *ALONE}
    assert stems <= {*ALONE, *(f"{stem}{suffix}" for stem in STEMS for suffix in ("", *BACKENDS))}
    assert len(TEST_FILES) > 10


def test_faces_and_folders_are_those_of_the_design():
    entries = {path for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    faces = {path.stem for path in entries if path.suffix == ".py"}
    assert len(faces) <= MOST_FACES
    assert {path.name for path in entries if path.is_dir() and not path.is_symlink()} == FOLDERS
    assert {path.name for path in entries if path.is_symlink()} == {"kernels"}
    assert {path.name for path in entries if path.is_file() and path.suffix != ".py"} == {"py.typed"}
    assert faces | FOLDERS | {"kernels"} == {name for line in ORDER for name in line}
    for folder in FOLDERS:
        assert (PACKAGE / folder / "__init__.py").is_file()
        assert not [path for path in (PACKAGE / folder).iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_the_list_of_packages_is_that_of_the_folders():
    declared = re.search(r"^packages = (\[.*?\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert declared
    listed = ast.literal_eval(declared.group(1))
    folders = {module_of(path) for path in PACKAGE_FILES if path.name == "__init__.py"}
    assert len(set(listed)) == len(listed)
    assert set(listed) == folders | {"anpgpu.kernels"}


@pytest.mark.parametrize(
    ("source", "module", "is_package", "result"),
    [
        ("from ..kernels.noise import Counters", "anpgpu.runtime.ranges", False, {"anpgpu.kernels.noise"}),
        ("from . import checks, __version__", "anpgpu.estimate", False, {"anpgpu.checks", "anpgpu"}),
        ("from .. import checks", "anpgpu.runtime.ranges", False, {"anpgpu.checks"}),
        (
            "from ..runtime import ranges, within",
            "anpgpu.estimate.x",
            False,
            {"anpgpu.runtime.ranges", "anpgpu.runtime"},
        ),
        ("from .ranges import within", "anpgpu.runtime", True, {"anpgpu.runtime.ranges"}),
        ("from . import ranges", "anpgpu.runtime", True, {"anpgpu.runtime.ranges"}),
        ("from .. import checks", "anpgpu.runtime", True, {"anpgpu.checks"}),
        (
            "import anpgpu.checks as c\nfrom anpgpu import estimate",
            "anpgpu.x",
            False,
            {"anpgpu.checks", "anpgpu.estimate"},
        ),
        ("def f():\n    from .checks import flag", "anpgpu.estimate", False, {"anpgpu.checks"}),
        ("if TYPE_CHECKING:\n    from .checks import flag", "anpgpu.estimate", False, {"anpgpu.checks"}),
        ("import torch\nfrom torch import nn\nfrom anpgpus import x", "anpgpu.estimate", False, set()),
    ],
)
def test_imports_are_read_with_their_dots(source, module, is_package, result):
    modules = "anpgpu checks estimate runtime runtime.ranges kernels kernels.noise"
    known = {name if name == "anpgpu" else f"anpgpu.{name}" for name in modules.split()}
    assert imported_modules(source, module, is_package, known) == result


def test_what_is_imported_exists(graph):
    missing = {module: sorted(names - set(FILE_OF)) for module, names in graph.items() if names - set(FILE_OF)}
    assert missing == {}


def test_imports_run_one_way(graph):
    # A topological order exists only where no imports form a cycle.
    done = set()

    def visit(name, above):
        assert name not in above, f"import cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for below in sorted(graph[name] & set(graph)):
                visit(below, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert done == set(graph)


@pytest.mark.parametrize("module", sorted(FILE_OF))
def test_imports_stay_in_the_room_or_go_down(module, graph):
    rank = {room: number for number, line in enumerate(ORDER) for room in line}
    room = room_of(module)
    assert room in rank, f"{room} has no place in the order of rooms"
    upward = sorted(name for name in graph[module] if rank.get(room_of(name), -1) < rank[room])
    assert upward == [], f"{module} imports {upward}, which lie above it"


def test_foundations_stand_alone(graph):
    # These hold pure data and plain functions; they may import only the tables and the kernels.
    below = {
        "anpgpu.registry": set(),
        "anpgpu.checks": {"anpgpu.registry"},
        "anpgpu.perturbation": {"anpgpu.registry", "anpgpu.checks"},
        "anpgpu.runtime.ranges": set(),
        "anpgpu.runtime.memory": set(),
        "anpgpu.runtime.dispatch": {"anpgpu.registry", "anpgpu.checks", "anpgpu.perturbation", "anpgpu.runtime.ranges"},
    }
    for module, allowed in below.items():
        others = {name for name in graph[module] if room_of(name) != "kernels"}
        assert others <= allowed, f"{module} imports {sorted(others - allowed)}"


def siblings(path):
    """Return the stems of the files of kernels/ that one of them imports."""
    return {name[1:] for name in imports(path) if name.startswith(".") and name != "."}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_kernels_import_neither_the_package_nor_anything_above(path):
    names = imports(path)
    assert not any(name.split(".")[0] in {"anpgpu", "kernels"} for name in names)
    assert not any(name.startswith("..") for name in names)
    assert siblings(path) <= {kernel.stem for kernel in KERNEL_FILES}
    # Kernels import the reference and files of their own backend only.
    backend = path.stem.rpartition("_")[2] if path.stem.endswith(BACKENDS) else ""
    for name in siblings(path):
        other = name.rpartition("_")[2] if name.endswith(BACKENDS) else ""
        assert other in {"", backend}, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_only_a_backends_own_files_need_it(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert ("triton" not in tops) or path.stem.endswith("_triton")
    assert ("cupy" not in tops) or path.stem.endswith("_cupy")
    assert ("numba" not in tops) or path.stem.endswith("_numba")


@pytest.mark.parametrize("module", sorted(module for module in FILE_OF if room_of(module) != "kernels"))
def test_only_dispatch_knows_the_backends(module, graph):
    # Other files ask dispatch for an implementation; only the reference's types are imported everywhere.
    assert [name for name in graph[module] if name.endswith(BACKENDS)] == []
    if module != "anpgpu.runtime.dispatch":
        names = {name.split(".")[0] for name in imports(FILE_OF[module])}
        assert not names & {"triton", "cupy", "numba", "importlib"}
        called = {
            getattr(node.func, "id", "") for node in ast.walk(parsed(FILE_OF[module])) if isinstance(node, ast.Call)
        }
        assert "__import__" not in called


def functions(path):
    return {node.name: node for node in parsed(path).body if isinstance(node, ast.FunctionDef)}


def signature(node):
    """Return names, kinds, defaults and annotations as written."""
    return ast.unparse(node.args), ast.unparse(node.returns) if node.returns else ""


@pytest.mark.parametrize("suffix", BACKENDS)
@pytest.mark.parametrize(
    ("module", "op"), [("noise", "noise"), ("rollout", "rollout"), ("adjoint", "adjoint"), ("adjoint", "returns")]
)
def test_backends_have_the_references_signatures(module, op, suffix):
    reference = signature(functions(KERNELS / f"{module}.py")[op])
    assert signature(functions(KERNELS / f"{module}{suffix}.py")[op]) == reference


def test_fused_op_has_the_references_signature():
    reference = signature(functions(KERNELS / "adjoint.py")["rollout_adjoint"])
    assert signature(functions(KERNELS / "adjoint_triton.py")["rollout_adjoint"]) == reference


def test_kernels_is_a_flat_folder():
    folders = [path.name for path in KERNELS.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == []
    assert (KERNELS / "__init__.py").exists()


def test_package_reaches_the_kernels_through_a_relative_link():
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")


@pytest.mark.parametrize("folder", ["tests", "profiling", "examples"])
def test_folders_of_scripts_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


EVERY_FILE = [
    *PACKAGE_FILES,
    *KERNEL_FILES,
    *(path for folder in ("tests", "profiling", "examples") for path in sorted((ROOT / folder).rglob("*.py"))),
]


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long_or_imports_the_bare_kernels(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert not any(name == "kernels" or name.startswith("kernels.") for name in imports(path))
    assert path.name not in {"triton.py", "cupy.py", "torch.py"}


def asserting_helpers(tree):
    """Return the functions of the file that assert or raise, directly or through a call of any depth."""
    bodies = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    helpers = {name for name, node in bodies.items() if asserts(node, set())}
    while True:
        more = {name for name, node in bodies.items() if name not in helpers and asserts(node, helpers)}
        if not more:
            return helpers
        helpers |= more


def asserts(function, helpers):
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in helpers or name in {"raises", "warns", "fail", "opcheck"} or name.startswith("assert_"):
                return True
    return False


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_every_test_asserts(path):
    tree = parsed(path)
    helpers = asserting_helpers(tree)
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert tests, "a file of tests without a test"
    assert [test.name for test in tests if not asserts(test, helpers)] == []
    names = [test.name for test in tests]
    assert len(set(names)) == len(names), "a test that another of the same name hides"


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_no_test_swallows_an_assertion(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Try):
            swallowed = any(
                isinstance(inner, ast.Assert) for statement in node.body for inner in ast.walk(statement)
            ) and any(handler.type is None or "Assertion" in ast.unparse(handler.type) for handler in node.handlers)
            assert not swallowed, f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert not any(isinstance(inner, ast.Return) for inner in own_statements(node)), f"{node.name} returns"


def own_statements(function):
    """Return the statements of a function without those of nested functions."""
    stack = list(function.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
