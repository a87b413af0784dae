"""Finds where a source compares a name, from its syntax tree, for test_names.py.

A comparison is ==, !=, is, in and their negations with a name on one side; a `case`; a look-up in a dict that is keyed
by names, or of one name; a test of a name's beginning, end or place in a list. Names may stand in displays, in
constants of the module or of another (see `constants`), in class attributes and in the loops over them. Arguments of a
call, defaults, docstrings and annotations are no comparisons.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

IMPORTS = {"torch", "triton", "numba", "cupy"}
"""Names that are also packages."""
OF_PACKAGES = (
    *("sys.modules", "__module__", "__name__", "find_spec", "import_module", "os.environ"),
    *("split('.')", "partition('.')", "device.type"),
)
"""Expressions that hold the name of a package or a device."""
SEPARATORS = "-_"
CONTAINERS = {"set", "frozenset", "tuple", "list", "sorted", "dict", "MappingProxyType"}
SAME_NAMES = {"keys", "items", "copy", "union"}
"""Methods whose result holds the same names as their object."""
ENDS = {"startswith", "endswith", "removeprefix", "removesuffix"}
LOOKUPS = {"get", "pop", "setdefault", "__getitem__", "__contains__"}
PLACES = {"index", "count", "find", "isdisjoint", "issubset", "issuperset", "intersection", "difference"}
CUTS = ("split(", "partition(", "removeprefix(", "removesuffix(", ":]", "[:")
COMPARED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)


class Finding(NamedTuple):
    """A comparison with a name."""

    line: int
    names: tuple[str, ...]
    text: str


class Held(NamedTuple):
    """The names that an expression holds."""

    names: frozenset[str]
    mapping: bool = False
    """Whether it is a dict that is keyed by them."""

    def __or__(self, other: Held) -> Held:
        return Held(self.names | other.names, self.mapping or other.mapping)


NOTHING = Held(frozenset())
Constants = Mapping[tuple[str, str], Held]
"""Constants of other modules, by the last part of the module's name and their own."""


def pieces_of(names: Collection[str]) -> dict[str, str]:
    """Return names by each of their parts between separators, with which beginnings and ends are compared."""
    pieces = {}
    for name in sorted(names, key=len, reverse=True):
        cuts = [place for place, letter in enumerate(name) if letter in SEPARATORS]
        for cut in cuts:
            parts = (name[:cut], name[: cut + 1], name[cut:], name[cut + 1 :])
            pieces.update(dict.fromkeys(parts, name))
        for separator in SEPARATORS:
            pieces.update({name + separator: name, separator + name: name})
    return pieces | {name: name for name in names}


class Reader(ast.NodeVisitor):
    """Walks a syntax tree and notes comparisons."""

    def __init__(self, tree: ast.Module, names: Collection[str], constants: Constants) -> None:
        self.names, self.pieces, self.constants = frozenset(names), pieces_of(names), constants
        self.modules: dict[str, str] = {}
        self.env: dict[str, Held] = {}
        self.attributes: dict[str, Held] = {}
        self.findings: list[Finding] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                self._import(node)
        for statement in tree.body:
            self._bind(statement, self.env, strings=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                # In a class, a string is the default of a field.
                for statement in node.body:
                    self._bind(statement, self.attributes, strings=False)

    def _import(self, node: ast.ImportFrom | ast.Import) -> None:
        origin = (getattr(node, "module", None) or "").rpartition(".")[2]
        for alias in node.names:
            name = alias.asname or alias.name
            self.modules[name] = alias.name.rpartition(".")[2]
            if (origin, alias.name) in self.constants:
                self.env[name] = self.constants[origin, alias.name]

    def _bind(self, statement: ast.AST, env: dict[str, Held], *, strings: bool) -> None:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign | ast.NamedExpr):
            targets = [statement.target]
        else:
            return
        value = statement.value
        if value is None or (isinstance(value, ast.Constant | ast.Name | ast.Attribute | ast.IfExp) and not strings):
            return
        held = self.holds(value)
        for target in targets:
            if isinstance(target, ast.Name) and held.names:
                env[target.id] = held

    def holds(self, node: ast.AST | None) -> Held:
        """Return the names that an expression holds as they stand."""
        method = getattr(self, f"_held_by_{type(node).__name__.lower()}", None)
        return NOTHING if method is None else method(node)

    def _all(self, nodes: Collection[ast.AST | None]) -> Held:
        held = NOTHING
        for node in nodes:
            held |= self.holds(node)
        return held

    def _held_by_constant(self, node: ast.Constant) -> Held:
        return Held(self.names & {node.value}) if isinstance(node.value, str) else NOTHING

    def _held_by_tuple(self, node: ast.Tuple | ast.List | ast.Set) -> Held:
        return Held(self._all(node.elts).names)

    _held_by_list = _held_by_set = _held_by_tuple

    def _held_by_dict(self, node: ast.Dict) -> Held:
        keys = [value if key is None else key for key, value in zip(node.keys, node.values, strict=True)]
        return Held(self._all(keys).names, mapping=True)

    def _held_by_starred(self, node: ast.Starred | ast.NamedExpr) -> Held:
        return self.holds(node.value)

    _held_by_namedexpr = _held_by_starred

    def _held_by_binop(self, node: ast.BinOp) -> Held:
        return self.holds(node.left) | self.holds(node.right)

    def _held_by_ifexp(self, node: ast.IfExp) -> Held:
        return self.holds(node.body) | self.holds(node.orelse)

    def _held_by_boolop(self, node: ast.BoolOp) -> Held:
        return self._all(node.values)

    def _held_by_joinedstr(self, node: ast.JoinedStr) -> Held:
        parts = [piece.value for piece in node.values if isinstance(piece, ast.Constant)]
        return Held(frozenset(self.pieces[piece] for piece in parts if piece in self.pieces))

    def _held_by_name(self, node: ast.Name) -> Held:
        return self.env.get(node.id, NOTHING)

    def _held_by_attribute(self, node: ast.Attribute) -> Held:
        if not isinstance(node.value, ast.Name):
            return NOTHING
        module = self.modules.get(node.value.id)
        return self.constants.get((module or "", node.attr), self.attributes.get(node.attr, NOTHING))

    def _held_by_subscript(self, node: ast.Subscript) -> Held:
        held = self.holds(node.value)
        return NOTHING if held.mapping else held

    def _held_by_call(self, node: ast.Call) -> Held:
        function = node.func
        if isinstance(function, ast.Attribute):
            text = function.value.value if isinstance(function.value, ast.Constant) else None
            if function.attr == "split" and isinstance(text, str):
                return Held(self.names & set(text.split()))
            return self.holds(function.value) if function.attr in SAME_NAMES else NOTHING
        if getattr(function, "id", None) not in CONTAINERS:
            return NOTHING
        held = self._all(node.args)
        if function.id != "dict":
            return held if function.id == "MappingProxyType" else Held(held.names)
        return Held(held.names | (self.names & {keyword.arg for keyword in node.keywords}), mapping=True)

    def _held_by_listcomp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Held:
        with self._loops(node.generators):
            return Held(self.holds(node.elt).names)

    _held_by_setcomp = _held_by_generatorexp = _held_by_listcomp

    def _held_by_dictcomp(self, node: ast.DictComp) -> Held:
        with self._loops(node.generators):
            return Held(self.holds(node.key).names, mapping=True)

    @contextlib.contextmanager
    def _loops(self, loops: Collection[ast.comprehension | ast.For]) -> Iterator[None]:
        """Note that the variables of loops over names hold names."""
        before = dict(self.env)
        for loop in loops:
            self._bind_loop(loop.target, loop.iter)
        yield
        self._restore(before)

    def _restore(self, env: dict[str, Held]) -> None:
        self.env.clear()
        self.env.update(env)

    def _bind_loop(self, target: ast.AST, values: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = Held(self.holds(values).names)
            return
        if not isinstance(target, ast.Tuple):
            return
        rows = [row.elts for row in getattr(values, "elts", ()) if isinstance(row, ast.Tuple)]
        for place, variable in enumerate(target.elts):
            column = self._all([row[place] for row in rows if place < len(row)])
            if not rows and not place and isinstance(values, ast.Call):
                column = self.holds(values)
            if isinstance(variable, ast.Name):
                self.env[variable.id] = Held(column.names)

    def note(self, node: ast.AST, names: Collection[str]) -> None:
        """Add a comparison."""
        if names:
            self.findings.append(Finding(node.lineno, tuple(sorted(names)), ast.unparse(node)))

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        arguments = node.args
        for default in (*arguments.defaults, *arguments.kw_defaults, *getattr(node, "decorator_list", ())):
            if default is not None:
                self.visit(default)
        before = dict(self.env)
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                self.env.pop(argument.arg, None)
        body = node.body if isinstance(node.body, list) else [node.body]
        for statement in body:
            for inner in ast.walk(statement):
                self._bind(inner, self.env, strings=False)
        for statement in body:
            self.visit(statement)
        self._restore(before)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function  # noqa: N815  (ast's names)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        with self._loops([node]):
            for statement in (*node.body, *node.orelse):
                self.visit(statement)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        with self._loops(node.generators):
            self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehension  # noqa: N815

    def visit_Compare(self, node: ast.Compare) -> None:
        if any(isinstance(operation, COMPARED) for operation in node.ops):
            sides = [node.left, *node.comparators]
            names = self._all(sides).names
            text = ast.unparse(node)
            cut = any(mark in text for mark in CUTS)
            inside = isinstance(node.ops[0], ast.In | ast.NotIn) and isinstance(node.left, ast.Constant)
            if cut or inside:
                # Pieces are searched in names, or compared with other pieces.
                literals = {side.value for side in sides if isinstance(side, ast.Constant)}
                names |= {self.pieces[piece] for piece in literals & set(self.pieces)}
            if any(mark in text for mark in OF_PACKAGES):
                names -= IMPORTS
            self.note(node, names)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # Intersections and differences of sets compare their members.
        if isinstance(node.op, ast.BitAnd | ast.BitXor | ast.Sub):
            self.note(node, self.holds(node).names)
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        for case in node.cases:
            for pattern in ast.walk(case.pattern):
                if isinstance(pattern, ast.MatchValue):
                    self.note(pattern, self.holds(pattern.value).names)
                elif isinstance(pattern, ast.MatchMapping):
                    self.note(pattern, self._all(pattern.keys).names)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Load) and ast.unparse(node.value).rpartition(".")[2] != "Literal":
            self._look_up(node, node.value, node.slice)
        self.generic_visit(node)

    def _look_up(self, node: ast.AST, table: ast.AST, key: ast.AST | None) -> None:
        held = self.holds(table)
        names = (held.names if held.mapping else frozenset()) | self.holds(key).names
        if any(mark in ast.unparse(table) for mark in OF_PACKAGES):
            names -= IMPORTS
        self.note(node, names)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            text, method = node.func.value, node.func.attr
            if method in LOOKUPS:
                self._look_up(node, text, node.args[0] if node.args else None)
            elif method in PLACES:
                self.note(node, self.holds(text).names | self._all(node.args).names)
            elif method in ENDS:
                ends = [end for argument in node.args for end in ast.walk(argument) if isinstance(end, ast.Constant)]
                pieces = {end.value for end in ends} & set(self.pieces)
                names = {self.pieces[piece] for piece in pieces} | self._all(node.args).names
                self.note(node, names - IMPORTS if any(mark in ast.unparse(text) for mark in OF_PACKAGES) else names)
        self.generic_visit(node)


def findings(source: str, names: Collection[str], constants: Constants | None = None) -> list[Finding]:
    """Return where a source compares one of the names, by line.

    `constants` are those of other modules that hold names; see `constants_of`.
    """
    tree = ast.parse(source)
    reader = Reader(tree, names, constants or {})
    reader.visit(tree)
    return sorted(set(reader.findings))


def constants_of(source: str, names: Collection[str], constants: Constants | None = None) -> dict[str, Held]:
    """Return the constants of a module that hold names, imported ones too."""
    return Reader(ast.parse(source), names, constants or {}).env
