"""Every block of the README runs: Python blocks as they stand, make targets by name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anpgpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
PYTHON = [source for language, source in BLOCKS if language == "python"]
SHELL = [source for language, source in BLOCKS if language in {"sh", "bash", "shell", "console"}]


def test_the_readme_shows_python_and_shell():
    assert PYTHON
    assert SHELL
    # Every fence was read: an unlabelled or unclosed one would hide what follows it.
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(anpgpu.__file__).resolve().parent.parent), "MPLBACKEND": "Agg"}
    script = tmp_path / "block.py"
    script.write_text(PYTHON[number], encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {target for block in SHELL for target in re.findall(r"^\s*make ([a-z-]+)", block, re.MULTILINE)}
    named |= set(re.findall(r"`make ([a-z-]+)`", README))
    assert named
    assert named <= targets, f"no such targets: {sorted(named - targets)}"


def test_files_it_names_exist():
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", README)
    scripts = [path for block in SHELL for path in re.findall(r"\b((?:examples|profiling)/\w+\.py)", block)]
    missing = [path for path in (*links, *scripts) if not (ROOT / path).exists()]
    assert missing == []


def test_tests_and_scripts_it_cites_exist():
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    cited = set(re.findall(r"`(test_\w+)`", README))
    assert cited
    assert cited <= defined, f"no such tests: {sorted(cited - defined)}"
    # Every row that says what works names what shows it.
    rows = re.findall(r"^\| .* \|$", README[README.index("## Works with") : README.index("## On a GPU")], re.MULTILINE)
    assert [row for row in rows[1:] if "`test_" not in row] == []
    scripts = re.findall(r"`python ((?:profiling|examples|tests)/\w+\.py)", README)
    assert scripts
    assert [path for path in scripts if not (ROOT / path).exists()] == []
