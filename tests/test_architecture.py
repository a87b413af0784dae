"""The layers of the package, read from its source: who may import whom, and what every file keeps to."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS, TESTS = ROOT / "anpgpu", ROOT / "kernels", ROOT / "tests"
PACKAGE_FILES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)
KERNEL_FILES = sorted(KERNELS.glob("*.py"))
TEST_FILES = sorted(TESTS.glob("test_*.py"))
OPS = ("noise", "rollout", "adjoint")
BACKENDS = ("_triton", "_cupy", "_numba")
LONGEST = 500


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path):
    """Every imported module, absolute or with its leading dots, wherever in the file it is imported."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.add(module)
            if node.level and not node.module:
                found |= {f".{alias.name}" for alias in node.names}
    return found


def siblings(path):
    """The modules of the same folder that a file imports, by stem; `.kernels.noise` counts as kernels.noise."""
    return {name[1:] for name in imports(path) if name.startswith(".") and name != "."}


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def package_imports(path):
    """The modules of the package that a file imports, kernels aside, by their dotted names inside it."""
    folder = ".".join(path.relative_to(PACKAGE).parts[:-1])
    names = set()
    for name in imports(path):
        inside = name.removeprefix("anpgpu.") if name.startswith("anpgpu.") else None
        if name.startswith(".") and name != ".":
            inside = f"{folder}.{name[1:]}" if folder else name[1:]
        if inside is not None and "kernels" not in inside:
            names.add(inside)
    return names


@pytest.fixture(scope="module")
def graph():
    return {module_of(path): package_imports(path) for path in PACKAGE_FILES}


def test_there_is_source_to_read():
    assert len(PACKAGE_FILES) > 5
    assert {path.stem for path in KERNEL_FILES} >= {f"{op}{suffix}" for op in OPS for suffix in ("", *BACKENDS)}
    assert len(TEST_FILES) > 10


def test_imports_run_one_way(graph):
    # A topological order exists: no module reaches itself.
    done = set()

    def visit(name, above):
        assert name not in above, f"import cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for below in sorted(graph.get(name, ())):
                visit(below, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    assert done >= set(graph)


def test_nothing_below_imports_what_users_call(graph):
    tops = {"estimate", "swap", "diagnosis.measure"}
    wrong = {
        name: graph[name] & tops for name in graph if "." in name and "diagnosis" not in name and graph[name] & tops
    }
    assert wrong == {}
    assert all("modules" not in graph[name] for name in graph if name.startswith(("runtime", "network", "estimators")))
    assert graph["perturbation"] == graph["runtime.ranges"] == graph["runtime.memory"] == set()
    assert graph["runtime.dispatch"] == {"runtime.ranges"}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_kernels_import_neither_the_package_nor_anything_above(path):
    names = imports(path)
    assert not any(name.split(".")[0] in {"anpgpu", "kernels"} for name in names)
    assert not any(name.startswith("..") for name in names)
    known = {one.stem for one in KERNEL_FILES}
    assert siblings(path) <= known
    # The reference is below every kernel, and one backend does not lean on another.
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


def test_only_dispatch_knows_the_backends():
    # Everything else asks it for an implementation; the reference's types are for all.
    for path in PACKAGE_FILES:
        wrong = [name for name in imports(path) if name.endswith(BACKENDS)]
        assert wrong == [], f"{path.name} imports {wrong}"
        if path.stem != "dispatch":
            names = {name.split(".")[0] for name in imports(path)}
            assert not names & {"triton", "cupy", "numba", "importlib"}, path.name


def functions(path):
    return {node.name: node for node in parsed(path).body if isinstance(node, ast.FunctionDef)}


def signature(node):
    """Names, kinds, defaults and annotations, as written."""
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


EVERY_FILE = sorted(
    path for folder in ("anpgpu", "kernels", "tests", "profiling", "examples") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_is_long_or_imports_the_bare_kernels(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert not any(name == "kernels" or name.startswith("kernels.") for name in imports(path))
    assert path.name not in {"triton.py", "cupy.py", "torch.py"}


def asserting_helpers(tree):
    """Functions of the file that assert, raise or call what does, to any depth."""
    bodies = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = {name for name, node in bodies.items() if asserts(node, set())}
    while True:
        more = {name for name, node in bodies.items() if name not in found and asserts(node, found)}
        if not more:
            return found
        found |= more


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
    """The statements of a function without those of functions inside it."""
    stack = list(function.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
