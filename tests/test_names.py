"""Methods, cells, losses and backends each have one table, and no other file compares their names."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from name_reading import Held, constants_of, findings
from torch import nn

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("anpgpu", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ROOT / "anpgpu" / "kernels" not in path.parents
}
KERNEL_LOSSES = ("linear", "squared", "cross_entropy", "outputs")
"""Names of losses inside kernels. "none" is not in the losses' table."""
OWN_FILES = {
    "methods": ("anpgpu/estimators/*.py",),
    "cells": ("anpgpu/network/cells.py", "kernels/cell*.py"),
    "losses": ("anpgpu/task/losses.py", "anpgpu/task/cross_entropy.py", "kernels/loss*.py"),
    "backends": ("anpgpu/runtime/dispatch.py",),
}
"""Where the names of each kind may be compared."""
KNOWN = {
    "methods": {"np", "anp", "anp-ls", "anp-feedback", "wp", "bptt", "published-anp", "published-np", "published-wp"},
    "cells": {"tanh", "relu"},
    "losses": {"mse", "cross_entropy", *KERNEL_LOSSES},
    "backends": {"torch", "numba", "cupy", "triton"},
}
"""Names that the tables hold at least."""


def names_of(kind):
    """Return the names in the table of a kind."""
    registry = importlib.import_module("anpgpu.registry")
    table = {"methods": "ESTIMATORS", "cells": "CELLS", "losses": "LOSSES", "backends": "BACKENDS"}[kind]
    names = set(getattr(registry, table))
    return (names | set(KERNEL_LOSSES) if kind == "losses" else names) - {"auto", "none"}


def is_own(kind, name):
    return any(Path(name).match(pattern) for pattern in OWN_FILES[kind])


def comparisons(kind, names, sources):
    """Return "file:line: text" of every comparison outside the kind's own files, from {file: source}."""
    constants: dict[tuple[str, str], Held] = {}
    # Repeated, since imports pass constants from file to file.
    for _ in range(3):
        for file, source in sources.items():
            path = Path(file)
            module = path.parent.name if path.stem == "__init__" else path.stem
            for name, held in constants_of(source, names, constants).items():
                # Other files may look names up in the table itself, and in other mappings of its files.
                if not (held.mapping and is_own(kind, file)):
                    constants[module, name] = held
    return [
        f"{file}:{finding.line}: {finding.text}"
        for file, source in sources.items()
        if not is_own(kind, file)
        for finding in findings(source, names, constants)
    ]


@pytest.mark.parametrize("kind", sorted(OWN_FILES))
def test_no_name_is_compared_outside_its_table(kind):
    names = names_of(kind)
    assert names >= KNOWN[kind]
    sources = {file: path.read_text(encoding="utf-8") for file, path in FILES.items()}
    wrong = comparisons(kind, names, sources)
    assert wrong == [], "\n".join((f"names of {kind} compared outside {', '.join(OWN_FILES[kind])}:", *wrong))


@pytest.mark.parametrize("kind", sorted(OWN_FILES))
def test_every_kind_has_files_of_its_own(kind):
    for pattern in OWN_FILES[kind]:
        assert any(Path(file).match(pattern) for file in FILES), pattern


NAMES = {name for names in KNOWN.values() for name in names}

COMPARED = [
    'if method == "np": pass',
    'if "np" != method: pass',
    'x = a if settings.method != "anp-ls" else b',
    'if a < 1 and self.loss == "mse": pass',
    'while NONLINEARITY == "tanh": pass',
    'if method is "np": pass',
    'if method in ("np", "anp"): pass',
    'if method not in ["np", *OTHERS]: pass',
    'if method in {"np"}: pass',
    'if method in frozenset({"wp", "other"}): pass',
    'if method in {"np": 1}: pass',
    'if method in "np anp".split(): pass',
    'if "bptt" in methods: pass',
    'if "published" in method: pass',
    'if kind in {"none", "outputs"}: pass',
    'if (rollouts, method) == (1, "wp"): pass',
    'if method == ("np" if flag else "anp"): pass',
    'if method == f"published-{rule}": pass',
    'if method.split("-")[0] == "published": pass',
    'if method[:4] == "anp-": pass',
    'if (name := "np") == method: pass',
    'if cell.__name__ == "tanh": pass',
    'assert backend == "triton"',
    'chosen = next(rule for rule in rules if rule.name == "np")',
    'f = lambda method: method == "np"',
    'RULES = ("np", "anp")\nif method in RULES: pass',
    'RULES: tuple[str, ...] = ("np", "anp")\ndef f(x):\n    return x in RULES',
    'FIRST = "np"\ndef f(method):\n    return method == FIRST',
    'RULES = ("np", "anp")\nALL = (*RULES, "other")\nif method in ALL: pass',
    'ALL = ("np",) + OTHERS\nif method == ALL[0]: pass',
    'def f(method):\n    rules = {"np", "anp"}\n    return method in rules',
    'class A:\n    RULES = ("np", "anp")\n    def f(self, method):\n        return method in self.RULES',
    'for rule in ("np", "anp"):\n    if rule == method: pass',
    'any(method == rule for rule in ("np", "anp"))',
    'for rule, value in {"np": 1, "anp": 2}.items():\n    if rule == method: pass',
    'for rule, value in (("np", 1), ("anp", 2)):\n    if rule == method: pass',
    'match method:\n    case "np":\n        pass',
    'match method, backend:\n    case ("x", _) | (_, "triton"):\n        pass',
    'match options:\n    case {"mse": _}:\n        pass',
    'size = {"mse": 1, "cross_entropy": 2}[loss]',
    'size = {"mse": 1, "cross_entropy": 2}.get(loss)',
    "size = dict(mse=1, cross_entropy=2)[loss]",
    'SUFFIXES = {"torch": "", "numba": "_numba"}\ndef f(backend):\n    return SUFFIXES[backend]',
    'FORMS = {("deflate", "numba"): "least_squares_numba"}\nform = FORMS.get((op, backend))',
    'FORMS = {name: 1 for name in ("np", "anp")}\nform = FORMS[method]',
    'rule = ESTIMATORS["np"]',
    'rule = ESTIMATORS.get("np", None)',
    'code = ("tanh", "relu").index(nonlinearity)',
    'code = METHODS.index("np")',
    'if method.startswith("published"): pass',
    'if method.startswith(("published-", "other")): pass',
    'if method.endswith("-ls"): pass',
    'if stem.endswith("_triton"): pass',
    'rule = method.removeprefix("published-")',
    'if set(methods) & {"np", "anp"}: pass',
    'if {"np", "anp"}.isdisjoint(methods): pass',
]

NOT_COMPARED = [
    'def f(method: str = "anp-ls", *, backend="torch") -> None: ...',
    'class A:\n    method: str = "anp-ls"\n    def f(self, other):\n        return self.method == other',
    '"""method == "np": an equation."""',
    'one_of("method", method, ("np", "anp"))',
    'estimate = Perturbation("bptt")',
    "raise ValueError(f\"detach it, or use method='anp' or {method!r}\")",
    'ESTIMATORS["np"] = NodePerturbation',
    "if method not in ESTIMATORS: raise ValueError(method)",
    "rule = ESTIMATORS[method]",
    "rule = ESTIMATORS.get(method)",
    "if loss is None or method == other.method: pass",
    'METHODS = ("np", "anp")\nMOST = len(METHODS)',
    'METHODS = ("np", "anp")\nfor method in METHODS:\n    run(method)',
    'METHODS = ("np", "anp")\ndef f(METHODS, x):\n    return x in METHODS',
    'def f():\n    rules = ("np", "anp")\n    return rules\ndef g(x, rules):\n    return x in rules',
    'def f(kind: Literal["np", "anp"]) -> Literal["np"]: ...',
    'Rule = Literal["np", "anp"]',
    'if device.type == "cpu" or tensor.device.type == "cuda": pass',
    'if noise == "rademacher": pass',
    'if weight_by == "noise": pass',
    'if weight_by in {"noise", "activity"}: pass',
    'if backend == "auto" or loss == "none": pass',
    'if requested == "auto": pass',
    "y = torch.tanh(x) + torch.relu(x)",
    'if hasattr(torch, "tanh"): pass',
    'run = getattr(torch, "relu")',
    'if "torch" in sys.modules: pass',
    'if module.split(".")[0] == "numba": pass',
    'if find_spec("triton") is None: pass',
    'torch_module = sys.modules["torch"]',
    'if type(x).__module__ == "cupy": pass',
    'if name.startswith("weight_"): pass',
    'if precision == "fp32": pass',
    'if name.startswith("n"): pass',
    'options = {"method": "np", "loss": "mse"}["method"]',
    'name = ("tanh", "relu")[int(flag)]',
    'if x == {"method": "np"}: pass',
    'words = text.split("-")',
    "if total - part > 0: pass",
]


@pytest.mark.parametrize("source", COMPARED)
def test_a_comparison_is_seen(source):
    assert findings(source, NAMES)


@pytest.mark.parametrize("source", NOT_COMPARED)
def test_what_compares_nothing_is_left_alone(source):
    assert findings(source, NAMES) == []


def test_a_finding_tells_line_names_and_text():
    (finding,) = findings('x = 1\nif method in ("np", "anp"):\n    pass\n', NAMES)
    assert (finding.line, finding.names, finding.text) == (2, ("anp", "np"), "method in ('np', 'anp')")


def test_constants_are_followed_through_imports():
    sources = {
        "anpgpu/estimators/rules.py": 'RULES = ("np", "anp")\nTABLE = {"np": 1}\nif x in RULES: pass',
        "anpgpu/estimators/__init__.py": "from .rules import RULES, TABLE",
        "anpgpu/estimate.py": "from .estimators import RULES as KEPT, TABLE\ny = TABLE[m]\nif m in KEPT: pass",
        "anpgpu/modules.py": "from .estimators import rules\nif m in rules.RULES: pass",
        "anpgpu/perturbation.py": "RULES = tuple(ESTIMATORS)\nif m in RULES: pass",
        "anpgpu/swap.py": "from .perturbation import RULES\nif m in RULES: pass",
    }
    # Any file may look names up in the mappings of a kind's own files, but not in lists of some of its names.
    assert comparisons("methods", NAMES, sources) == [
        "anpgpu/estimate.py:3: m in KEPT",
        "anpgpu/modules.py:2: m in rules.RULES",
    ]


def test_each_kind_may_be_compared_in_its_own_files_alone():
    sources = dict.fromkeys(FILES, 'if x == "np" or x == "tanh" or x == "mse" or x == "torch": pass')
    for kind, names in KNOWN.items():
        wrong = {text.split(":")[0] for text in comparisons(kind, names, sources)}
        assert wrong == {file for file in FILES if not is_own(kind, file)}


def quotes(error, names):
    """Return whether a message quotes 'x' and all of the names."""
    return all(repr(name) in str(error.value) for name in ("x", *names))


def test_an_unknown_method_names_those_that_exist():
    with pytest.raises(ValueError, match="method") as error:
        anpgpu.Perturbation(method="x")
    assert quotes(error, KNOWN["methods"])


def test_an_unknown_backend_names_those_that_exist():
    with pytest.raises(ValueError, match="backend") as error:
        anpgpu.Perturbation(backend="x")
    assert quotes(error, {"auto", *KNOWN["backends"]})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dispatch_takes_no_unknown_backend_for_another(device):
    dispatch = importlib.import_module("anpgpu.runtime.dispatch")
    with pytest.raises(ValueError, match="backend") as error:
        dispatch.choose_backend("x", torch.device(device), torch.float32)
    assert quotes(error, KNOWN["backends"])


def test_an_unknown_loss_names_those_that_exist():
    rnn, readout = nn.RNN(2, 3), nn.Linear(3, 1)
    with pytest.raises(ValueError, match="loss") as error:
        anpgpu.estimate_grad_(rnn, readout, torch.ones(4, 1, 2), torch.ones(4, 1, 1), "x")
    assert quotes(error, {"mse", "cross_entropy"})
    assert rnn.weight_hh_l0.grad is None


def test_an_unknown_cell_names_those_that_exist():
    states = torch.zeros(4, 1, 3)
    with pytest.raises(ValueError, match="nonlinearity") as error:
        anpgpu.functional.rollout(states, states, torch.eye(3), None, 0, rollouts=2, nonlinearity="x")
    assert quotes(error, KNOWN["cells"])


def test_an_unknown_rule_names_those_that_exist():
    with pytest.raises(ValueError, match="method") as error:
        anpgpu.functional.adjoint(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2, 3), 0, method="x")
    assert quotes(error, {"np", "anp"})


@pytest.mark.parametrize("suffix", ["", "_numba", "_triton"])
def test_a_kernel_names_the_weights_that_exist(suffix):
    if suffix:
        pytest.importorskip(suffix[1:], reason=f"needs {suffix[1:]}, which `make` installs")
    kernels = importlib.import_module(f"anpgpu.kernels.adjoint{suffix}")
    options = importlib.import_module("anpgpu.kernels.rollout").RolloutOptions(2, 1e-3)
    credit, delta_a = torch.zeros(4, 1, 2), torch.zeros(4, 1, 2, 3)
    with pytest.raises(ValueError, match="weight_by") as error:
        kernels.adjoint(credit, delta_a, torch.tensor(0), weight_by="x", units=3, options=options)
    assert quotes(error, {"noise", "activity"})
