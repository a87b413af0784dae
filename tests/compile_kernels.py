"""Compile every kernel for every architecture without a GPU, and compare with the checked-in table.

    python tests/compile_kernels.py              compile what changed, print what differs from tests/compiled.json
    python tests/compile_kernels.py --all        compile all of them
    python tests/compile_kernels.py --write      the same, then rewrite the table
    python tests/compile_kernels.py --only PART  only the cases whose name contains PART
    python tests/compile_kernels.py --oldest     with the oldest Triton that is supported, and its own table

`make oldest-triton` puts that Triton into a folder of its own, which OLDEST_TRITON names where it is another.

Cases come from the modules `compile_cases_*.py` beside this file: `cases()` returns {name: (kernel, signature,
constexprs, options)}. In a signature, "i32:16" is an integer known to be divisible by 16, a named tuple is a tuple
argument, and ("=", value) is a constant. Pointers count as aligned to 16 bytes. A case whose name begins with
"sm_90:" is compiled for that architecture alone.

A row's `source` is a hash of all that its machine code is made from: Triton's version, the kernel with every function
it calls, signature, constants and options. The tests compile the rows whose hash is not the table's, and one of each
kernel; those of `make test-slow` and `make test-oldest` compile all.

A failed assertion of the compiler kills its process: cases run in worker processes. Triton's cache is temporary.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "compiled.json"
OLDEST_TABLE = HERE / "compiled_oldest.json"
OLDEST = Path(os.environ.get("OLDEST_TRITON") or HERE.parent / ".venv" / "oldest-triton")
"""Folder of the package triton in its oldest supported version."""
ARCHES = (80, 89, 90, 100)
SAMPLED = 90
"""The architecture on which one case of each kernel is always compiled."""
WORKERS = 2

SLACK = {"registers": 8, "stack": 32, "shared": 0, "local_in_loop": 0, "barriers": 0, "issued": 0.15, "special": 0.05}
"""How far a figure may exceed the table's before the test fails: ptxas's choices move a little with every edit."""

MATRIX_OPS = re.compile(r"(HGMMA|QGMMA|IGMMA|UTC\w*MMA|HMMA)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")


def found_cases():
    """Return {(name, arch): case} of all modules of cases."""
    result = {}
    for path in sorted(HERE.glob("compile_cases_*.py")):
        for name, case in importlib.import_module(path.stem).cases().items():
            match = re.match(r"sm_(\d+):(.*)", name)
            if match:
                result[match[2], int(match[1])] = case
            else:
                result.update(dict.fromkeys(((name, arch) for arch in ARCHES), case))
    return result


def ast_source(kernel, signature, constexprs):
    """Return triton's source object, constants and divisibility taken out of the signature."""
    from triton.compiler import ASTSource

    constants = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    attributes = {}

    def plain(kind, path):
        if isinstance(kind, tuple) and kind[:1] == ("=",):
            constants[path] = kind[1]
            return "constexpr"
        if isinstance(kind, tuple):
            fields = [plain(item, (*path, index)) for index, item in enumerate(kind)]
            return type(kind)(*fields) if hasattr(kind, "_fields") else tuple(fields)
        kind, _, divisor = kind.partition(":")
        if divisor or kind.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    types = {name: plain(signature[name], (index,)) for index, name in enumerate(kernel.arg_names)}
    return ASTSource(kernel, types, constants, attributes)


def forget_places():
    """Let what Triton hashes not depend on where in its file a kernel stands."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith("anpgpu.") else ():
            if isinstance(kernel, JITFunction):
                kernel.starting_line_number = 1


def source_of(kernel, signature, constexprs, options, arch):
    """Return a hash of all that a case's machine code is made from."""
    import triton

    made_from = ast_source(kernel, signature, constexprs).hash(), triton.__version__, arch, sorted(options.items())
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def measure(kernel, signature, constexprs, options, arch):
    """Compile a case and return its row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = ast_source(kernel, signature, constexprs)
    settings = {"enable_fp_fusion": True, **options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _output(tools / "nvdisasm", "-c", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    loop = Counter(longest_loop(text))
    issued = sum(loop.values())
    elements = constexprs.get("BLOCK_ROWS", 0) * constexprs.get("BLOCK_UNITS", 0) / (32 * options["num_warps"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "loop": issued,
        "issued": round(issued / elements, 2) if elements else 0,
        "special": round(_count(loop, "MUFU") / elements, 2) if elements else 0,
        "barriers": _count(loop, "BAR"),
        "local_in_loop": _count(loop, "LDL", "STL"),
        "shared_in_loop": _count(loop, "LDS", "STS", "LDSM", "STSM"),
        "overwritten": overwritten_operands(text),
        "matrix_in_loop": sorted({match[1] for name in loop if (match := MATRIX_OPS.match(name))}),
    }


def _output(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(instructions, *stems):
    return sum(count for name, count in instructions.items() if name.split(".")[0] in stems)


def longest_loop(text):
    """Return the instructions of the longest loop of a disassembly: from a label to the branch back to it.

    A branch back across the program's end is no loop: it ends a piece of code that was moved out of the way.
    """
    labels, instructions = {}, []
    for line in text.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line.strip())
        if label:
            labels[label[1]] = len(instructions)
        match = INSTRUCTION.match(line)
        if match:
            instructions.append((match[2], match[1], match[3]))
    longest = []
    for place, (name, _, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        body = instructions[labels.get(target[0], place) : place + 1] if target else []
        if len(body) > len(longest) and not any(step == "EXIT" and not guard for step, guard, _ in body):
            longest = body
    return [name for name, _, _ in longest]


NO_RESULT = re.compile(r"(RET|BRX|JMX|CALL|BMOV|FCHK|R2P|\w*SETP)\b")
"""Instructions whose first register is read, not written."""


def overwritten_operands(text):
    """Return how often a disassembly writes a register that an unfinished HGMMA may still read its left operand from.

    Such an operand is four registers of each thread, read until the next WARPGROUP.DEPBAR. ptxas before 13.3 can miss
    this (github.com/triton-lang/triton, issues 9433 and 11781), and results are then wrong now and then.
    """
    groups, count = [set()], 0
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if not match:
            continue
        name, operands = match[2], match[3].strip(" ;")
        if name.startswith("WARPGROUP.DEPBAR"):
            unfinished = int(operands.split()[-1], 0)
            groups = groups[max(0, len(groups) - 1 - unfinished) :]
        elif name.startswith("HGMMA"):
            left = re.match(r"R\d+, R(\d+),", operands)
            if left:
                groups[-1] |= set(range(int(left[1]), int(left[1]) + 4))
            if operands.endswith("gsb0"):
                groups.append(set())
        elif not NO_RESULT.match(name):
            result = re.match(r"(?:!?U?P\w, )*R(\d+)\b", operands)
            if result:
                written = range(int(result[1]), int(result[1]) + _width(name))
                count += any(not group.isdisjoint(written) for group in groups)
    return count


def _width(name):
    """Return how many registers an instruction writes, from its name."""
    parts = name.split(".")
    if "128" in parts or name.startswith(("LDSM.16.M88.4", "LDSM.16.MT88.4", "HMMA")):
        return 4
    return 2 if "64" in parts or "WIDE" in parts or parts[0] in {"DADD", "DMUL", "DFMA"} else 1


def key_of(name, arch):
    return f"sm_{arch}:{name}"


def work():
    """Compile the cases of standard input, one line of JSON for each.

    An input is a case's name and the row that its table has, or null; that row is the answer where its source is the
    case's.
    """
    cases = {key_of(*place): (case, place[1]) for place, case in found_cases().items()}
    forget_places()
    for line in sys.stdin:
        name, row = json.loads(line)
        case, arch = cases[name]
        try:
            source = source_of(*case, arch)
            if row is None or row.get("source") != source:
                row = measure(*case, arch) | {"source": source}
        except Exception as error:  # noqa: BLE001  (whatever it is, it belongs in the table)
            row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def version_in(folder):
    """Return the version of the package triton in a folder."""
    found = [path.name for path in folder.glob("triton-*.dist-info")]
    if len(found) != 1:
        raise FileNotFoundError(f"no package triton in {folder}: make oldest-triton")
    return found[0].removeprefix("triton-").removesuffix(".dist-info")


def sample(cases):
    """Return the names of one case of each kernel, for `SAMPLED` where it has one."""
    first = {}
    for (name, arch), (kernel, *_) in sorted(cases.items()):
        first.setdefault(kernel.__name__, key_of(name, arch))
        if arch == SAMPLED and not first[kernel.__name__].startswith(f"sm_{SAMPLED}:"):
            first[kernel.__name__] = key_of(name, arch)
    return set(first.values())


def compile_all(only="", triton=None, table=None):
    """Return {name: row} of all cases whose name contains `only`, compiled with the package in the folder `triton`.

    Rows of the table whose source is as it was are taken from there, but for one of each kernel. Without a table all
    are compiled.
    """
    cases = found_cases()
    anew = sample(cases)
    names = [key_of(*place) for place in cases]
    asked = [(name, None if name in anew else (table or {}).get(name)) for name in names if only in name]
    with ThreadPoolExecutor(WORKERS) as pool:
        shares = [(asked[start::WORKERS], triton) for start in range(WORKERS)]
        parts = list(pool.map(lambda share: _compile_part(*share), shares))
    rows = {name: row for part in parts for name, row in part.items()}
    return {name: rows[name] for name in sorted(rows)}


def _compile_part(asked, triton):
    """Return the rows of some cases, given with those of the table; a worker that dies takes one case with it."""
    rows = {}
    paths = [str(HERE), *sys.path] if triton is None else [str(triton), str(HERE), *sys.path]
    left = list(asked)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("TRITON_INTERPRET", None)
        while left:
            command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
            pipe = subprocess.PIPE
            with subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
            ) as worker:
                while left:
                    name, row = left.pop(0)
                    try:
                        worker.stdin.write(json.dumps([name, row]) + "\n")
                        worker.stdin.flush()
                        line = worker.stdout.readline()
                    except BrokenPipeError:
                        line = ""
                    rows[name] = json.loads(line) if line.startswith("{") else {"error": "the compiler died"}
                    if not line:
                        break
                worker.stdin.close()
    return rows


def differences(table, rows):
    """Return a line for each row that is new, gone or different."""
    lines = []
    for name in sorted(table.keys() | rows.keys()):
        old, new = table.get(name), rows.get(name)
        if old is None:
            lines.append(f"+ {name}: {new}")
        elif new is None:
            lines.append(f"- {name}")
        elif old != new:
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key != "source"]
            changes = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys]
            lines += [f"  {name}: {', '.join(changes)}"] if changes else []
    return lines


def regressions(table, rows):
    """Return a line for each figure that exceeds the table's by more than `SLACK`, and for each missing row."""
    lines = [f"{name}: in one of table and cases only" for name in sorted(table.keys() ^ rows.keys())]
    for name in sorted(table.keys() & rows.keys()):
        old, new = table[name], rows[name]
        if "error" in new:
            lines.append(f"{name}: {new['error']}")
            continue
        lines += [
            f"{name}: {key} {old[key]} -> {new[key]}" for key, slack in SLACK.items() if new[key] > old[key] + slack
        ]
        lines += [f"{name}: no {op} any more" for op in old["matrix_in_loop"] if op not in new["matrix_in_loop"]]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--only", default="", help="part of the names of the cases to compile")
    parser.add_argument("--all", action="store_true", help="also those whose source is that of the table")
    parser.add_argument("--oldest", action="store_true", help="compile with the oldest Triton")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    import triton

    table, folder, version = TABLE, None, triton.__version__
    if arguments.oldest:
        table, folder, version = OLDEST_TABLE, OLDEST, version_in(OLDEST)
    stored = json.loads(table.read_text()) if table.exists() else {"rows": {}}
    rows = compile_all(arguments.only, folder, {} if arguments.all else stored["rows"])
    before = {name: row for name, row in stored["rows"].items() if arguments.only in name}
    sys.stdout.write("\n".join(differences(before, rows)) + "\n")
    if arguments.write:
        kept = {name: row for name, row in stored["rows"].items() if arguments.only not in name}
        merged = {**kept, **rows}
        body = ",\n".join(f"    {json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged))
        table.write_text(f'{{\n  "triton": {json.dumps(version)},\n  "rows": {{\n{body}\n  }}\n}}\n')


if __name__ == "__main__":
    sys.path.append(str(HERE.parent))
    main()
